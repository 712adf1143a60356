"""Regression with noise whose variance the model predicts too."""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from kfactk import CaptureError, hookimpl
from kfactk_stages.likelihood._noise import certain_factor_of, other_noise
from kfactk_stages.likelihood.layout import Layout, arranged, missing_terms


@attrs.frozen(kw_only=True)
class Heteroscedastic(Layout):
    """A vector of C real numbers for each term; the output is their means, then log-variances.

        R(y | m, s) = prod_c N(y_c; m_c, exp(s_c)),    f = (m, s), 2 C numbers
        -log R = sum_c [(y_c - m_c)^2 exp(-s_c) + s_c + log(2 pi)] / 2
        Fisher of the output = diag(exp(-s), 1/2)

    This is the likelihood of `F.gaussian_nll_loss` with `var=s.exp()`, up to its constant. That
    function's mean divides by all N C numbers, a term here counts once: for C > 1 its curvature is
    F / C.

    Args:
        class_axis: Dimension of the 2 C numbers for outputs of more than two dimensions.
        targets: Name of the argument of the forward, or keyword of `Optimizer.observe`, with the
            labels, of the terms' shape. NaN marks missing terms.
        weights: Name of the one with sample weights or a padding mask, `[N]` or the terms' shape.
        shift: By how many positions the labels are ahead of the output.

    Raises:
        OptionError: An option has a value that cannot work.
        CaptureError: The output has an odd number of columns, or cannot be this.

    Example:
        >>> view = Heteroscedastic().view(torch.zeros(4, 2, requires_grad=True))
        >>> [column[0].tolist() for column in Heteroscedastic().root(view)]
        [[[1.0, 0.0]], [[0.0, 0.7071067690849304]]]

    References:
        Nix & Weigend 1994, "Estimating the mean and variance of the target probability
        distribution".
    """

    def view(self, output: Tensor) -> Tensor:
        """Return the output as `[N, S, 2 C]`, at least float32."""
        view = super().view(output)
        if view.shape[-1] % 2:
            raise CaptureError(
                f"the model's output (shape {list(output.shape)}) has {view.shape[-1]} numbers for "
                "a term; likelihood='heteroscedastic' wants a mean and a log-variance of each, so "
                "an even number. Give likelihood='gaussian' for means alone."
            )
        return view

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Draw vectors `[N, S, C]`."""
        mean, log_variance = view.detach().chunk(2, -1)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + (0.5 * log_variance).exp() * noise

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-density, `[N, S]`, of targets `[N, S, C]`."""
        mean, log_variance = view.chunk(2, -1)
        squares = (targets.to(view.dtype) - mean).square() * (-log_variance).exp()
        return 0.5 * (squares + log_variance + math.log(2 * math.pi)).sum(-1)

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """Yield 2 C columns, `exp(-s_c / 2)` for the means and `sqrt(1/2)` for log-variances."""
        mean, log_variance = view.detach().chunk(2, -1)
        half = torch.full_like(mean, math.sqrt(0.5))
        sizes = torch.cat([(-0.5 * log_variance).exp(), half], -1)
        for c in range(view.shape[-1]):
            column = torch.zeros_like(sizes)
            column[..., c] = sizes[..., c]
            yield column

    def misfit(self, output: Tensor, gradient: Tensor, *, measured: bool) -> str | None:
        """Return why a loss with this gradient takes the output for something else."""
        if measured:  # on the gradient of the loss itself, whatever it is
            return None
        noise = other_noise(*(arranged(each, self.class_axis) for each in (output, gradient)))
        if noise is None:
            return None
        axis = -1 if self.class_axis is None else self.class_axis
        return (
            f"the gradient of your loss at the output (shape {list(output.shape)}) is that of a "
            f"Gaussian for which the second half is {noise.name}, and "
            "likelihood='heteroscedastic' takes it for the logarithm of the variance, so the "
            "curvature is not that of your loss. Return this in the model; or, where it returns "
            "nothing else, define def as_log_variance(f): m, s = f.chunk(2, "
            f"{axis}); return torch.cat([m, {noise.logarithm}], {axis}), and build(..., "
            "output=as_log_variance)"
        )

    def loss_factor(
        self, output: Tensor, gradient: Tensor, later: tuple[Tensor, Tensor] | None
    ) -> float | None:
        """Return by what this loss with this gradient is multiplied, where that is certain."""
        return certain_factor_of(*(arranged(each, self.class_axis) for each in (output, gradient)))

    def _has_label(self, labels: Tensor, view: Tensor) -> Tensor:
        means = view[..., : view.shape[-1] // 2]
        return ~missing_terms(labels.isnan(), means, self.class_axis, str(self.targets))


@hookimpl
def kfactk_likelihoods() -> dict[str, type[Heteroscedastic]]:
    """Register the likelihood `heteroscedastic`."""
    return {"heteroscedastic": Heteroscedastic}
