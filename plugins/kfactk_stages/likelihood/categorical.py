"""Softmax classification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk import CaptureError, hookimpl
from kfactk.options import whole
from kfactk_stages.likelihood._misfit import (
    NORMALISED,
    SOME,
    certain_factor,
    factor_between,
    scale_fault,
    single_term,
    slope_between,
    softmax_axes,
    summed_share,
    temperature,
)
from kfactk_stages.likelihood.layout import Layout, arranged, expand_to_terms


@attrs.frozen(kw_only=True)
class Categorical(Layout):
    """One of C classes for each term; the output is logits.

        R(y | f) = p_y,    p = softmax(f),    -log R = logsumexp(f) - f_y
        Fisher of the output = diag(p) - p p^T

    This is the likelihood of `F.cross_entropy`. The root for exact Fisher passes follows the
    stick-breaking form of p: with tails `q_c = sum_{j >= c} p_j`, column c = 1 .. C-1 is

        sqrt(p_c q_{c+1} / q_c) (e_c - sum_{j > c} (p_j / q_{c+1}) e_j).

    That is one column, and one backward pass, fewer than `sqrt(p_c) (e_c - p)`: half as many for
    two classes.

    Args:
        class_axis: Dimension of the classes for outputs of more than two dimensions: 1 for images,
            -1 for language models.
        ignore_index: The label of masked terms, as in `F.cross_entropy`; read where `targets` is
            given.
        targets: Name of the argument of the forward, or keyword of `Optimizer.observe`, with the
            labels. Those equal to `ignore_index` get weight 0. Labels must be aligned with the
            output, but for `shift`.
        weights: Name of the one with sample weights or a padding mask, `[N]` or the terms' shape.
        shift: By how many positions the labels are ahead of the output: 1 for a causal language
            model that shifts its labels itself.

    Raises:
        OptionError: An option has a value that cannot work.
        CaptureError: The output cannot be logits over classes.

    Example:
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> likelihood = Categorical(class_axis=-1, weights="attention_mask")
        >>> view = likelihood.view(logits)
        >>> view.shape, likelihood.term_weights(view, {"attention_mask": mask}).sum()
        (torch.Size([2, 3, 5]), tensor(3.))

    References:
        Martens 2020, "New insights and perspectives on the natural gradient method",
        arXiv:1412.1193.
    """

    read_with: ClassVar[tuple[tuple[str, str], ...]] = (("ignore_index", "targets"),)

    ignore_index: int = attrs.field(
        default=-100, validator=whole(None, hint=", the label that marks terms without one")
    )

    def view(self, output: Tensor) -> Tensor:
        """Return the logits as `[N, S, C]`, at least float32."""
        if output.ndim == 1 and output.is_floating_point():
            raise CaptureError(
                f"the model's output has shape {list(output.shape)}: one number in each example "
                'cannot choose between classes. Give likelihood="gaussian" for regression or '
                'likelihood="bernoulli" for binary labels.'
            )
        view = super().view(output)
        if view.shape[-1] == 1:
            raise CaptureError(
                f"the model's output (shape {list(output.shape)}) has a single class, whose "
                'probability is always 1. Give likelihood="gaussian" for regression or '
                'likelihood="bernoulli" for binary labels.'
            )
        return view

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Draw classes `[N, S]` from the softmax, by the Gumbel trick.

        It needs no host transfer, and does not crash on NaN.
        """
        noise = torch.empty_like(view, requires_grad=False).exponential_(generator=generator)
        # An exact zero would make a class of vanishing probability win.
        noise.clamp_(min=torch.finfo(noise.dtype).eps / 2)
        return (view.detach() - noise.log_()).argmax(-1)

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy, `[N, S]`, of targets `[N, S]`.

        It is 0 where the target is `ignore_index`, unless that is a class.
        """
        classes = view.shape[-1]
        ignored = -100 if 0 <= self.ignore_index < classes else self.ignore_index
        losses = F.cross_entropy(
            view.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=ignored
        )
        return losses.reshape(view.shape[:2])

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """Yield C - 1 columns `[N, S, C]` whose outer products sum to `diag(p) - p p^T`."""
        log_p = view.detach().log_softmax(-1)
        log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)
        for c in range(view.shape[-1] - 1):
            ahead = log_q[..., c + 1]
            size = (0.5 * (log_p[..., c] + ahead - log_q[..., c])).exp()
            size = torch.where(torch.isneginf(log_p[..., c]) | torch.isneginf(ahead), 0.0, size)
            share = (log_p[..., c + 1 :] - ahead.unsqueeze(-1)).exp()
            column = torch.zeros_like(log_p)
            column[..., c] = size
            column[..., c + 1 :] = torch.where(
                size.unsqueeze(-1) > 0, -size.unsqueeze(-1) * share, 0.0
            )
            yield column

    def misfit(self, output: Tensor, gradient: Tensor, *, measured: bool) -> str | None:
        """Return why a loss with this gradient at the output is no softmax cross entropy."""
        logits, found = arranged(output, self.class_axis), arranged(gradient, self.class_axis)
        if measured:  # on the gradient of the loss itself, whatever it is
            k = factor_between(logits.softmax(-1), found)
            if k is not None:  # of a single term it may be the term's own weight
                k = None if single_term(found) else k
                return scale_fault(k, "the cross entropy", output.shape, 1)
            fits = (
                axis
                for axis in softmax_axes(gradient)
                if factor_between(output.softmax(axis), gradient) is not None
            )
            return next((_axis_fault(output.shape, axis) for axis in fits), None)
        if bool(logits.logsumexp(-1).abs().max() < NORMALISED):
            return None  # the logarithms of probabilities are logits too, with another gradient
        if summed_share(found, -1) < SOME:
            t = temperature(logits, found)
            return None if t is None else _temperature_fault(output.shape, t)
        for axis in softmax_axes(gradient):
            return _axis_fault(output.shape, axis)
        return (
            f"the gradient of your loss at the output (shape {list(output.shape)}) does not sum to "
            "zero over the classes, so your loss is no softmax cross entropy, and the curvature of "
            "likelihood='categorical' is not that of your loss. Give likelihood='gaussian' for "
            "squared errors and values, 'bernoulli' for binary labels; or fisher='empirical', "
            "which measures on your loss itself. output= picks the logits where the model returns "
            "more"
        )

    def loss_factor(
        self, output: Tensor, gradient: Tensor, later: tuple[Tensor, Tensor] | None
    ) -> float | None:
        """Return by what a cross entropy with this gradient is multiplied, where that is certain.

        It is for one label a term; after a step, for any labels.
        """
        p, found = (arranged(each, self.class_axis) for each in (output, gradient))
        if later is None:
            return certain_factor(p.softmax(-1), found)
        moved, turned = (arranged(each, self.class_axis) for each in later)
        return slope_between((p.softmax(-1), moved.softmax(-1)), (found, turned))

    def _has_label(self, labels: Tensor, view: Tensor) -> Tensor:
        return expand_to_terms(labels, view, "targets", str(self.targets)) != self.ignore_index


def _axis_fault(shape: Sequence[int], axis: int) -> str:
    return (
        f"the gradient of your loss at the output (shape {list(shape)}) sums to zero over "
        f"dimension {axis}, so the classes are there, and not where the likelihood has them. Give "
        f"likelihood={{'name': 'categorical', 'class_axis': {axis}}}"
    )


def _temperature_fault(shape: Sequence[int], t: float) -> str:
    return (
        f"the gradient of your loss at the output (shape {list(shape)}) is that of a cross entropy "
        f"of logits / {t:.4g}: the loss applies a temperature, which the likelihood does not, so "
        "the curvature is not that of your loss. Divide in the model; or, where it returns the "
        f"logits alone, build(..., output=lambda logits: logits / {t:.4g})"
    )


@hookimpl
def kfactk_likelihoods() -> dict[str, type[Categorical]]:
    """Register the likelihood `categorical`."""
    return {"categorical": Categorical}
