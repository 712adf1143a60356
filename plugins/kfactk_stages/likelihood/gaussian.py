"""Regression with noise of known variance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import hookimpl
from kfactk.options import number
from kfactk_stages.likelihood._misfit import (
    certain_factor,
    single_term,
    slope_between,
    softmax_axes,
)
from kfactk_stages.likelihood.layout import IndependentEntries, arranged, missing_terms

SAME = 0.01
"""Relative deviation of a slope from that of a mean over entries."""


@attrs.frozen(kw_only=True)
class Gaussian(IndependentEntries):
    """A vector of C real numbers for each term; the output is its mean.

        R(y | f) = N(y; f, v I),    -log R = |y - f|^2 / (2 v) + (C / 2) log(2 pi v)
        Fisher of the output = I / v

    This is the likelihood of squared errors. `F.mse_loss` with its mean divides by all N C numbers:
    choose `divisor="entries"` for it. F is then `1 / (N C v)` times the sum of J J^T over all
    numbers, J the gradient of one of them. The Gauss-Newton matrix of that loss is `2 v` times F:
    with `variance=0.5` the two are equal, whatever C is, and damping has the units of the curvature
    of that loss.

    With `divisor="terms"`, the mean is over N terms whose C numbers add up, so F is C times as
    large: `variance = C / 2` gives the same matrix as above. With `variance = 1`, damping tau acts
    as `2 tau / C` would there, and steps are `2 / C` times as long.

    Args:
        variance: v, the variance of the noise, in squared units of the output. Positive.
        class_axis: Dimension of the C numbers for outputs of more than two dimensions: 1 for
            images, -1 for sequences. An output `[N]` is one number in each example.
        targets: Name of the argument of the forward, or keyword of `Optimizer.observe`, with the
            labels, of the terms' shape or the output's. NaN marks missing terms, which get weight
            0.
        weights: Name of the one with sample weights or a padding mask, `[N]` or the terms' shape.
        shift: By how many positions the labels are ahead of the output: 1 for a causal language
            model that shifts its labels itself.

        divisor: "terms": a term is the vector of C numbers, whose losses add up. "entries": each
            number is a term, may be missing by itself, and `class_axis` plays no part; `targets`
            and `weights` have the output's shape, or `[N]`.

    Raises:
        OptionError: An option has a value that cannot work.
        CaptureError: The output cannot be the mean of a Gaussian.

    Example:
        >>> likelihood = Gaussian(variance=0.25)
        >>> view = likelihood.view(torch.zeros(4, 2, requires_grad=True))
        >>> [column[0].tolist() for column in likelihood.root(view)]
        [[[2.0, 0.0]], [[0.0, 2.0]]]

    References:
        Martens 2020, "New insights and perspectives on the natural gradient method",
        arXiv:1412.1193.
    """

    only_own_pass: ClassVar[tuple[str, ...]] = ("variance",)

    variance: float = attrs.field(
        default=1.0, validator=number(low=0, low_open=True, hint=", the variance of the noise")
    )

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Draw vectors `[N, S, C]`: the output plus noise."""
        noise = torch.empty_like(view, requires_grad=False).normal_(generator=generator)
        return view.detach() + math.sqrt(self.variance) * noise

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-density, `[N, S]`, of targets `[N, S, C]`."""
        constant = 0.5 * view.shape[-1] * math.log(2 * math.pi * self.variance)
        return (targets.to(view.dtype) - view).square().sum(-1) / (2 * self.variance) + constant

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """Yield C columns `e_c / sqrt(v)`, `[N, S, C]`."""
        for c in range(view.shape[-1]):
            column = torch.zeros_like(view, requires_grad=False)
            column[..., c] = 1 / math.sqrt(self.variance)
            yield column

    def misfit(self, output: Tensor, gradient: Tensor, *, measured: bool) -> str | None:
        """Return why a loss with this gradient at the output is of classes, and no squared error.

        It is told for labels of 0 and 1 alone, where nothing else has such a gradient.
        """
        if measured:  # on the gradient of the loss itself, whatever it is
            return None
        for axis in softmax_axes(gradient):
            if certain_factor(output.softmax(axis), gradient) is not None:
                likelihood = "'categorical'"
                if output.ndim > 2:
                    likelihood = f"{{'name': 'categorical', 'class_axis': {axis}}}"
                return _class_fault(output, "softmax", likelihood)
        if certain_factor(output.double().sigmoid(), gradient.double()) is not None:
            return _class_fault(output, "binary", "'bernoulli'")
        return None

    def divisor_misfit(
        self, output: Tensor, gradient: Tensor, other: tuple[Tensor, Tensor]
    ) -> str | None:
        """Return why a squared error with these gradients is a mean over entries, if it is.

        It is where its gradient is `2 / C` times the output minus the targets, or half of it. For
        up to two numbers a term, half the sum of squares has that too.
        """
        terms = arranged(gradient, self.class_axis) if self.divisor == "terms" else None
        if terms is None or terms.shape[-1] < 3 or single_term(terms):
            return None
        entries, slope = terms.shape[-1], slope_between((output, other[0]), (gradient, other[1]))
        if slope is None or min(abs(slope * entries / k - 1) for k in (1, 2)) > SAME:
            return None
        options: dict[str, Any] = {"targets": self.targets, "weights": self.weights}
        given = {key: value for key, value in options.items() if value is not None}
        return (
            f"the gradient of your loss at the output (shape {list(output.shape)}) is that of a "
            f"squared error whose mean is over all entries, as that of F.mse_loss, and not over "
            f"terms of {entries} entries each. Curvature is measured on this gradient. Counted by "
            f"terms it is 1/{entries} of what it is counted by entries, so your damping acts "
            f"{entries} times as strongly. Unless you divide by the variance of a noise, or by "
            f"{entries} micro-batches, give "
            f"likelihood={ {'name': 'gaussian', 'divisor': 'entries', **given} }"
        )

    def loss_factor(
        self, output: Tensor, gradient: Tensor, later: tuple[Tensor, Tensor] | None
    ) -> float | None:
        """Return by what a squared error with this gradient is multiplied, where certain.

        It takes two gradients to tell, with the same targets.
        """
        if later is None:
            return None
        slope = slope_between((output, later[0]), (gradient, later[1]))
        return None if slope is None else self.variance * slope

    def _has_label(self, labels: Tensor, view: Tensor) -> Tensor:
        return ~missing_terms(labels.isnan(), view, self.class_axis, str(self.targets))


def _class_fault(output: Tensor, kind: str, likelihood: str) -> str:
    return (
        f"the gradient of your loss at the output (shape {list(output.shape)}) is that of a {kind} "
        "cross entropy, so your loss is no squared error, and the curvature of "
        f"likelihood='gaussian' is not that of your loss. Give likelihood={likelihood}"
    )


@hookimpl
def kfactk_likelihoods() -> dict[str, type[Gaussian]]:
    """Register the likelihood `gaussian`."""
    return {"gaussian": Gaussian}
