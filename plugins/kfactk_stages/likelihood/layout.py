"""Options that all likelihoods share: where the terms of an output are, and what each weighs."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import CaptureError, OptionError
from kfactk.errors import near_names
from kfactk.options import choice, refusal, text, whole

_integer = whole(None, optional=True, hint=": it is the dimension of the output with the classes")
_argument_name = text(
    optional=True,
    hint=": the name under which the tensor reaches the model's forward or Optimizer.observe, "
    "such as 'attention_mask'",
)
_shift = whole(
    0,
    hint=": 0 for labels aligned with the output, 1 for a causal language model that shifts its "
    "labels itself",
)


def _axis(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    _integer(instance, attribute, value)
    if value == 0:
        must = "another dimension than that of the examples: 1 for images, -1 for language models"
        raise refusal(instance, attribute, value, must)


@attrs.frozen(kw_only=True)
class Layout(abc.ABC):
    """Which dimension of the output is the event, and how much each term counts.

    The event axis holds the classes, labels or regressed values of one term.

    Args:
        class_axis: Dimension of the event axis, for outputs of more than two dimensions: 1 for
            images (`[N, C, H, W]`, the layout of `F.cross_entropy`), -1 for language models
            (`[N, T, C]`). Outputs `[N, C]` need none.
        targets: Name of the argument of the model's forward, or of the keyword of
            `Optimizer.observe`, with the labels. Only which labels are missing is read; those terms
            get weight 0. Labels must be aligned with the output, but for `shift`.
        weights: Name of the argument or keyword with sample weights or a padding mask, such as
            `attention_mask`: `[N]` or the shape of the terms (the output without its class axis),
            boolean or non-negative. It multiplies with the weights that `targets` gives.
        shift: By how many positions labels and masks are ahead of the output, for outputs of one
            sequence in each example. It is 1 for a causal language model that takes `labels` equal
            to its tokens and shifts them itself: output t predicts token t + 1. The last `shift`
            positions get weight 0.
    """

    beside: ClassVar[str] = "gaussian"
    """The likelihood that messages propose for the other parts of an output."""

    class_axis: int | None = attrs.field(default=None, validator=_axis)
    targets: str | None = attrs.field(default=None, validator=_argument_name)
    weights: str | None = attrs.field(default=None, validator=_argument_name)
    shift: int = attrs.field(default=0, validator=_shift)

    def view(self, output: Tensor) -> Tensor:
        """Return the output as `[N, S, C]`, at least float32, sharing its graph."""
        return as_terms(output, self.class_axis)

    def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the weight of each term, `[N, S]`, or `None` where all weights are 1.

        Raises:
            CaptureError: An argument is missing from `batch`, has another shape, or holds negative
                or non-finite weights.
        """
        result = None
        if self.targets is not None:
            labels = tensor_named(batch, self.targets, "targets", view)
            result = self._has_label(labels, view).to(view.dtype)
        if self.weights is not None:
            given = tensor_named(batch, self.weights, "weights", view)
            given = expand_to_terms(given, view, "weights", self.weights).to(view.dtype)
            if not bool((given >= 0).all()) or not bool(torch.isfinite(given).all()):
                raise CaptureError(
                    f"weights={self.weights!r} holds negative or non-finite numbers: a weight says "
                    "how often a term counts. Additive attention masks (0 and -inf) do not fit; "
                    "give the mask of ones and zeros."
                )
            result = given if result is None else result * given
        return shift_weights(result, view, self.shift) if self.shift else result

    @abc.abstractmethod
    def _has_label(self, labels: Tensor, view: Tensor) -> Tensor:
        """Return which terms have a label, `[N, S]` boolean."""


@attrs.frozen(kw_only=True)
class IndependentEntries(Layout):
    """A layout whose event consists of C independent entries, so that each can be a term.

    Args:
        divisor: What a loss with `reduction="mean"` divides its sum by. "terms": the number of
            terms, so that the C entries of a term add up. "entries": the number of all entries, C
            times as many, as torch's own losses do. Each entry is a term then, with a label and a
            weight of its own, and `class_axis` plays no part.
    """

    divisor: str = attrs.field(default="terms", validator=choice("terms", "entries"))

    def __attrs_post_init__(self) -> None:
        if self.divisor == "entries" and self.class_axis is not None:
            raise OptionError(
                f"{type(self).__name__}: class_axis={self.class_axis} plays no part with "
                "divisor='entries', where each entry is a term. Leave class_axis out."
            )
        if self.divisor == "entries" and self.shift:
            raise OptionError(
                f"{type(self).__name__}: shift={self.shift} cannot work with divisor='entries': "
                "entries have no positions to shift. Align the labels with the output, and leave "
                "shift out."
            )

    def view(self, output: Tensor) -> Tensor:
        """Return the output as `[N, S, C]`, or, where each entry is a term, as `[N, S C, 1]`."""
        if self.divisor == "terms":
            return super().view(output)
        check_output(output)
        entries = output if output.ndim == 1 else output.flatten(1).unsqueeze(-1)
        return as_terms(entries, None if output.ndim == 1 else -1)


def check_output(output: Tensor) -> None:
    """Check that an output can hold the parameters of a likelihood.

    Raises:
        CaptureError: The output is not floating point, is a scalar, or needs no gradient.
    """
    what = f"shape {list(output.shape)}, {output.dtype}"
    if not output.is_floating_point():
        raise CaptureError(
            f"the model's output ({what}) is not floating point: return logits, or pick them with "
            "output=, not class indices or masks"
        )
    if output.ndim == 0:
        raise CaptureError(
            "the model's output is a single number, which looks like a loss: return the logits, or "
            "pick them with output="
        )
    if not output.requires_grad:
        raise CaptureError(
            f"the model's output ({what}) does not require gradients, so its curvature cannot be "
            "measured. Run the forward without torch.no_grad() and without detaching, with at "
            "least one trained parameter"
        )


def as_terms(output: Tensor, class_axis: int | None) -> Tensor:
    """Return an output with its event in dimension `class_axis` as `[N, S, C]`.

    A 1-dimensional output is N scalars.

    Raises:
        CaptureError: The output is not floating point, is a scalar, needs no gradient, or does not
            tell its event axis.
    """
    check_output(output)
    return arranged(output, class_axis)


def arranged(output: Tensor, class_axis: int | None) -> Tensor:
    """Return an output, or its gradient, as `as_terms` does."""
    what = f"shape {list(output.shape)}, {output.dtype}"
    if output.ndim > 2:
        if class_axis is None:
            raise CaptureError(
                f"the model's output has {output.ndim} dimensions ({what}), and it is unknown "
                "which of them holds the classes: give the likelihood class_axis=1 for images "
                "(the layout of F.cross_entropy) or class_axis=-1 for language models"
            )
        output = output.movedim(_resolve(class_axis, output, what), -1).flatten(1, -2)
    elif output.ndim == 2:
        if class_axis is not None:
            _resolve(class_axis, output, what)
        output = output.unsqueeze(1)
    else:
        output = output.reshape(-1, 1, 1)
    return output if output.dtype == torch.float64 else output.float()


def _resolve(class_axis: int, output: Tensor, what: str) -> int:
    axis = class_axis + output.ndim if class_axis < 0 else class_axis
    if not 0 < axis < output.ndim:
        raise CaptureError(
            f"class_axis={class_axis} does not fit the model's output ({what}): dimension 0 holds "
            f"the examples. Give 1 to {output.ndim - 1}, or -1 to {1 - output.ndim}, the "
            "dimension that holds the classes"
        )
    return axis


def tensor_named(batch: Mapping[str, Any], name: str, option: str, view: Tensor) -> Tensor:
    """Return the tensor called `name`, on the device of `view`, detached.

    Raises:
        CaptureError: It is missing, `None`, or cannot be made a tensor.
    """
    if name not in batch:
        known = ", ".join(repr(key) for key in batch) or "none"
        raise CaptureError(
            f"{option}={name!r} names an argument that this forward was not given; there are: "
            f"{known}.{near_names(name, batch)} Name one of those, or pass it with "
            f"Optimizer.observe({name}=...)."
        )
    value = batch[name]
    if value is None:
        raise CaptureError(
            f"{option}={name!r} is None in this forward: pass a tensor (of ones where every term "
            "counts), or drop the option"
        )
    try:
        return torch.as_tensor(value, device=view.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(
            f"{option}={name!r} is a {type(value).__name__} that cannot be made a tensor: {error}"
        ) from error


def expand_to_terms(values: Tensor, view: Tensor, option: str, name: str) -> Tensor:
    """Return values of shape `[N]`, or of the terms' shape before flattening, as `[N, S]`.

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
        f"{option}={name!r} has shape {list(values.shape)}, but the output has {n} examples of {s} "
        f"terms each: give [{n}] or the shape of the output without its class axis "
        "(with divisor='entries', that of the output). Where labels are "
        "shifted against the output (causal language models), leave both whole and give "
        "shift=1."
    )


def missing_terms(missing: Tensor, view: Tensor, class_axis: int | None, name: str) -> Tensor:
    """Return which terms are missing, `[N, S]`, from flags for each term or each event entry.

    Args:
        missing: Boolean, of the terms' shape or of the output's.
        view: `[N, S, C]`.
        class_axis: Dimension of the event axis in the output.
        name: Name of the labels, for the message.

    Raises:
        CaptureError: The shape is neither, or a term lacks only some entries: a term counts as a
            whole.
    """
    n, s, c = view.shape
    axis = -1 if class_axis is None or missing.ndim == 2 else class_axis
    has_entries = (
        missing.ndim > 1
        and -missing.ndim <= axis < missing.ndim
        and missing.shape[axis] == c
        and missing.shape[0] == n
    )
    if c == 1 or not has_entries or missing.numel() != n * s * c:
        return expand_to_terms(missing, view, "targets", name)
    flags = missing.movedim(axis, -1).reshape(n, s, c)
    complete = flags.all(-1)
    if bool((flags.any(-1) & ~complete).any()):
        raise CaptureError(
            f"targets={name!r} has vectors of which only some entries are missing: a term counts "
            "as a whole. Give weights= for each term in place of targets="
        )
    return complete


def shift_weights(weights: Tensor | None, view: Tensor, shift: int) -> Tensor:
    """Return the weights `[N, S]` of terms, from those of the positions `shift` further on.

    The last `shift` terms get 0.

    Args:
        weights: By position, `[N, S]`; `None` where all are 1.
        view: `[N, S, C]`.
        shift: How far the terms are behind, at least 1.

    Raises:
        CaptureError: The sequences are not longer than `shift`.
    """
    n, s = view.shape[:2]
    if s <= shift:
        raise CaptureError(
            f"shift={shift}, but the model's output has {s} positions in each example, so no term "
            "is left: shift is for sequences whose labels the model shifts itself; leave it out "
            "otherwise"
        )
    moved = view.new_zeros(n, s)
    moved[:, :-shift] = 1 if weights is None else weights[:, shift:]
    return moved
