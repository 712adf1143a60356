"""What the gradient of a Gaussian loss with predicted noise tells of the loss.

With means m and noise parameters s, of variance v = v(s), the loss c (-log N(y; m, v)) has

    dm = c (m - y) / v,    ds = c a (1 - (m - y)^2 / v),    a = v'(s) / (2 v)

at an entry. y drops out of the two: `c^2 - (ds / a) c - dm^2 v = 0`. So each entry tells c, and
where the noise has another meaning than is thought, they do not agree.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk_stages.likelihood._misfit import EQUAL, MOST, SPREAD, TOLD

LEAST_ENTRIES = 8
"""Entries, or terms, that must agree."""
MOST_APART = 0.05
"""Share of terms that may not agree with the others, or in themselves: clipped ones."""


@attrs.frozen
class Noise:
    """What noise parameters may mean.

    Args:
        name: In words.
        variance: v of s.
        rate: a of s.
        logarithm: log v as Python text, of s; what `heteroscedastic` wants.
        positive: Whether s must be positive.
    """

    name: str
    variance: Callable[[Tensor], Tensor]
    rate: Callable[[Tensor], Tensor]
    logarithm: str
    positive: bool = False


LOG_VARIANCE = Noise(
    "the logarithm of the variance", torch.exp, lambda s: torch.full_like(s, 0.5), "s"
)
OTHERS = (
    Noise(
        "the logarithm of the standard deviation", lambda s: (2 * s).exp(), torch.ones_like, "2 * s"
    ),
    Noise("the variance", lambda s: s, lambda s: 0.5 / s, "s.log()", positive=True),
    Noise("the standard deviation", torch.square, torch.reciprocal, "2 * s.log()", positive=True),
    Noise(
        "the variance before a softplus",
        F.softplus,
        lambda s: s.sigmoid() / (2 * F.softplus(s)),
        "torch.nn.functional.softplus(s).log()",
    ),
    Noise(
        "the standard deviation before a softplus",
        lambda s: F.softplus(s).square(),
        lambda s: s.sigmoid() / F.softplus(s),
        "2 * torch.nn.functional.softplus(s).log()",
    ),
)
"""What else noise parameters are, in the libraries of the field."""


def factor_of(output: Tensor, gradient: Tensor, noise: Noise = LOG_VARIANCE) -> float | None:
    """Return c of a loss with this gradient, where all entries agree.

    Args:
        output: Means, then noise parameters, `[..., 2 C]`.
        gradient: The gradient at them.
        noise: What the parameters mean.

    Example:
        >>> f = torch.randn(9, 4, requires_grad=True)
        >>> m, s = f.chunk(2, -1)
        >>> loss = 3 * F.gaussian_nll_loss(m, torch.randn(9, 2), s.exp(), reduction="sum")
        >>> f"{factor_of(f.detach(), *torch.autograd.grad(loss, f)):.4f}"
        '3.0000'
    """
    found = _factors(output, gradient, noise)
    if found is None:
        return None
    factors = found[0].nan_to_num(0.0)
    factors = factors[factors != 0]
    if len(factors) < LEAST_ENTRIES:
        return None
    least, most = MOST_APART, 1 - MOST_APART
    low, middle, high = factors.quantile(factors.new_tensor([least, 0.5, most])).tolist()
    return middle if high - low <= EQUAL * abs(middle) else None


def certain_factor_of(output: Tensor, gradient: Tensor) -> float | None:
    """Return c of a loss with this gradient, where nothing else is like it.

    Where all noise parameters are nearly equal, other meanings of them are.

    Args:
        output: Means, then logarithms of variances, `[..., 2 C]`.
        gradient: The gradient at them.
    """
    s = output.chunk(2, -1)[1]
    if not s.numel() or float(s.max() - s.min()) < SPREAD:
        return None
    return factor_of(output, gradient)


def other_noise(output: Tensor, gradient: Tensor) -> Noise | None:
    """Return what noise parameters mean in a loss with this gradient, if not log-variances.

    Losses may weigh each term by another number, as advantages do: then the C entries of a term
    must agree. Nothing is told where the loss has more parts.

    Args:
        output: Means, then noise parameters, `[..., 2 C]`.
        gradient: The gradient at them.
    """
    if _fits(output, gradient, LOG_VARIANCE):
        return None
    found = [noise for noise in OTHERS if _fits(output, gradient, noise)]
    return found[0] if len(found) == 1 else None


def _fits(output: Tensor, gradient: Tensor, noise: Noise) -> bool:
    """Return whether all entries agree, or the entries of each term do."""
    if factor_of(output, gradient, noise) is not None:
        return True
    found = _factors(output, gradient, noise)
    if found is None or output.shape[-1] < 4:
        return False
    whole = [each[each.isfinite().all(-1)] for each in found]
    if len(whole[0]) < LEAST_ENTRIES:
        return False
    spreads = [(c.amax(-1) - c.amin(-1)) / c.abs().amax(-1) for c in whole]
    apart = torch.minimum(*spreads) > EQUAL
    return float(apart.double().mean()) <= MOST_APART


def _factors(output: Tensor, gradient: Tensor, noise: Noise) -> tuple[Tensor, Tensor] | None:
    """Return the positive and the negative solution c of each entry, `[rows, C]`.

    They are NaN where the gradient is too small to tell; `None` where parameters cannot mean this.
    """
    width = output.shape[-1]
    rows = output.reshape(-1, width)
    every = -(-rows.numel() // MOST)
    f, g = (each.reshape(-1, width)[::every].double() for each in (output, gradient))
    (_, s), (dm, ds) = f.chunk(2, -1), g.chunk(2, -1)
    if noise.positive and not bool((s > 0).all()):
        return None
    half, square = ds / (2 * noise.rate(s)), dm.square() * noise.variance(s)
    root = (half.square() + square).sqrt()
    positive = torch.where(half < 0, square / (root - half), half + root)
    negative = torch.where(half > 0, -square / (root + half), half - root)
    there = root > TOLD * root.nan_to_num(0.0).max()
    return positive.where(there, torch.nan), negative.where(there, torch.nan)
