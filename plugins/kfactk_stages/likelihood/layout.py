"""Where the terms of a model's output lie and what each weighs: the options all likelihoods share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk import CaptureError, OptionError
from kfactk.errors import near_names


def _check_axis(
    instance: object, attribute: attrs.Attribute[int | None], value: int | None
) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(
            f"{attribute.alias} must be an integer or None, not {value!r}: it is the dimension of the output that holds the classes"
        )
    if value == 0:
        raise OptionError(
            f"{attribute.alias}=0 is the dimension of the examples; use 1 for images or -1 for language models"
        )


def _check_name(
    instance: object, attribute: attrs.Attribute[str | None], value: str | None
) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise OptionError(
            f"{attribute.alias} must be the name of an argument, not {type(value).__name__}: give the name under which the tensor reaches "
            "the model's forward or Optimizer.observe, such as 'attention_mask'"
        )


def _check_shift(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise OptionError(
            f"shift={value!r} is not a number of positions: give 0 for labels aligned with the output, 1 for a causal language model that "
            "shifts its labels itself"
        )


@attrs.frozen(kw_only=True)
class Layout(abc.ABC):
    """Which dimension of the output is the event (classes, labels, regressed values), and how much each term counts.

    Args:
        class_axis: Dimension of the output that holds the event, for outputs of more than two dimensions: 1 for images
            (`[N, C, H, W]`, the layout of `F.cross_entropy`), -1 for language models (`[N, T, C]`). Outputs `[N, C]` need none.
        targets: Name of the argument of the model's forward, or of the keyword given to `Optimizer.observe`, that holds the labels.
            Only which of them are missing is read, and those terms get weight 0. Labels must be aligned with the output, or `shift`
            must say how they are not.
        weights: Name of the argument or keyword that holds sample weights or a padding mask, such as `attention_mask`: `[N]` or the
            shape of the terms (the output without its class axis), boolean or numbers that are not negative. With `targets` given
            too the two multiply.
        shift: How many positions ahead of the output its labels and masks are, for outputs of one sequence an example: 1 for a causal
            language model that is given `labels` equal to its tokens and shifts them itself, so that output t is about token t + 1 and
            the last position is about none. What `targets` and `weights` name is shifted likewise; the last `shift` positions get
            weight 0.
    """

    class_axis: int | None = attrs.field(default=None, validator=_check_axis)
    targets: str | None = attrs.field(default=None, validator=_check_name)
    weights: str | None = attrs.field(default=None, validator=_check_name)
    shift: int = attrs.field(default=0, validator=_check_shift)

    def view(self, output: Tensor) -> Tensor:
        """The output as `[N, S, C]`, float32 at least, sharing its graph."""
        return as_terms(output, self.class_axis)

    def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        """Weight of each term, `[N, S]`, in the precision of `view`; `None` when nothing is masked or weighted.

        Raises:
            CaptureError: An argument is missing from `batch`, has another shape, or holds negative weights.
        """
        result = None
        if self.targets is not None:
            labels = fetch(batch, self.targets, "targets", view)
            result = self._present(labels, view).to(view.dtype)
        if self.weights is not None:
            given = spread(
                fetch(batch, self.weights, "weights", view), view, "weights", self.weights
            ).to(view.dtype)
            if not bool((given >= 0).all()) or not bool(torch.isfinite(given).all()):
                raise CaptureError(
                    f"weights={self.weights!r} holds negative or non-finite numbers: a weight says how often a term counts. "
                    "Additive attention masks (0 and -inf) do not fit; give the mask of ones and zeros."
                )
            result = given if result is None else result * given
        return result if not self.shift else ahead(result, view, self.shift)

    @abc.abstractmethod
    def _present(self, labels: Tensor, view: Tensor) -> Tensor:
        """Which terms have a label, `[N, S]` boolean."""


def as_terms(output: Tensor, class_axis: int | None) -> Tensor:
    """`[N, S, C]` from an output with its event in dimension `class_axis`; 1-D outputs are N scalars.

    Raises:
        CaptureError: See the messages.
    """
    seen = f"shape {list(output.shape)}, {output.dtype}"
    if not output.is_floating_point():
        raise CaptureError(
            f"the model's output ({seen}) is not floating point: return logits, or pick them with output=, not class indices or masks"
        )
    if output.ndim == 0:
        raise CaptureError(
            "the model's output is a single number, which looks like a loss: return the logits, or pick them with output="
        )
    if not output.requires_grad:
        raise CaptureError(
            f"the model's output ({seen}) does not require gradients, so no curvature can be measured on it. Was the forward run under "
            "torch.no_grad() or detached, or are all parameters frozen?"
        )
    if output.ndim > 2:
        if class_axis is None:
            raise CaptureError(
                f"the model's output has {output.ndim} dimensions ({seen}), and which of them holds the classes is not known: give the "
                "likelihood class_axis=1 for images (the layout of F.cross_entropy) or class_axis=-1 for language models"
            )
        output = output.movedim(_resolve(class_axis, output, seen), -1).flatten(1, -2)
    elif output.ndim == 2:
        if class_axis is not None:
            _resolve(class_axis, output, seen)
        output = output.unsqueeze(1)
    else:
        output = output.reshape(-1, 1, 1)
    return output if output.dtype == torch.float64 else output.float()


def _resolve(class_axis: int, output: Tensor, seen: str) -> int:
    axis = class_axis + output.ndim if class_axis < 0 else class_axis
    if not 0 < axis < output.ndim:
        raise CaptureError(
            f"class_axis={class_axis} does not fit the model's output ({seen}): dimension 0 holds the examples, "
            f"so that 1 to {output.ndim - 1}, or -1 to {1 - output.ndim}, can hold the classes"
        )
    return axis


def fetch(batch: Mapping[str, Any], name: str, option: str, view: Tensor) -> Tensor:
    """The tensor called `name`, on the device of `view`, detached.

    Raises:
        CaptureError: It is missing, `None`, or no tensor.
    """
    if name not in batch:
        there = ", ".join(repr(key) for key in batch) or "none"
        raise CaptureError(
            f"{option}={name!r} names an argument that this forward was not given; there are: {there}.{near_names(name, batch)} "
            f"Name one of those, or hand it over with Optimizer.observe({name}=...)."
        )
    value = batch[name]
    if value is None:
        raise CaptureError(
            f"{option}={name!r} is None in this forward: pass a tensor (of ones where every term counts), or drop the option"
        )
    try:
        return torch.as_tensor(value, device=view.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(
            f"{option}={name!r} is a {type(value).__name__} that cannot be made a tensor: {error}"
        ) from error


def spread(values: Tensor, view: Tensor, option: str, name: str) -> Tensor:
    """Values of shape `[N]`, or of the terms' shape before they were flattened, as `[N, S]`.

    Raises:
        CaptureError: The shape is neither.
    """
    n, s = view.shape[:2]
    if values.ndim and values.shape[0] == n:
        if values.numel() == n * s:
            return values.reshape(n, s)
        if values.numel() == n:
            return values.reshape(n, 1).expand(n, s)
    raise CaptureError(
        f"{option}={name!r} has shape {list(values.shape)}, but the output has {n} examples of {s} terms each: give [{n}] or the shape "
        "of the output without its class axis. Where labels are shifted against the output (causal language models), leave "
        "both whole and give shift=1."
    )


def spread_event(missing: Tensor, view: Tensor, class_axis: int | None, name: str) -> Tensor:
    """Which terms are missing, `[N, S]`, from flags for each term or for each entry of its vector.

    Args:
        missing: Boolean, of the terms' shape or of the output's.
        view: `[N, S, C]`.
        class_axis: Dimension of the vectors in the output.
        name: Name of the labels, for the message.

    Raises:
        CaptureError: The shape is neither, or a vector is missing in part: a term counts as a whole.
    """
    n, s, c = view.shape
    axis = -1 if class_axis is None or missing.ndim == 2 else class_axis
    entries = (
        missing.ndim > 1
        and -missing.ndim <= axis < missing.ndim
        and missing.shape[axis] == c
        and missing.shape[0] == n
    )
    if c == 1 or not entries or missing.numel() != n * s * c:
        return spread(missing, view, "targets", name)
    flags = missing.movedim(axis, -1).reshape(n, s, c)
    whole = flags.all(-1)
    if bool((flags.any(-1) & ~whole).any()):
        raise CaptureError(
            f"targets={name!r} has vectors of which only some entries are missing: a term counts as a whole. Give weights= for each term "
            "in place of targets="
        )
    return whole


def ahead(weights: Tensor | None, view: Tensor, shift: int) -> Tensor:
    """Weights `[N, S]` of the terms, from those of the positions `shift` further on; 0 where there is none.

    Args:
        weights: By position, `[N, S]`; `None` where all count.
        view: `[N, S, C]`.
        shift: How far the terms are behind, at least 1.

    Raises:
        CaptureError: The sequences are not longer than that.
    """
    n, s = view.shape[:2]
    if s <= shift:
        raise CaptureError(
            f"shift={shift}, but the model's output has {s} positions an example, so that no term is left: shift is for sequences whose "
            "labels the model shifts itself; leave it out otherwise"
        )
    moved = view.new_zeros(n, s)
    moved[:, :-shift] = 1 if weights is None else weights[:, shift:]
    return moved


def number(
    kind: Callable[[float], bool], why: str
) -> Callable[[object, attrs.Attribute[Any], Any], None]:
    """An attrs validator for numbers: `kind` says whether the value will do, `why` what it has to be."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not kind(value):
            raise OptionError(f"{attribute.alias} must be {why}, not {value!r}")

    return check
