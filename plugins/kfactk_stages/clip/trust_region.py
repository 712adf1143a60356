"""Trust region of ACKTR: the longest step whose predicted KL divergence is at most a radius."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import Dot, GradientPair, hookimpl
from kfactk.options import number
from kfactk_stages.clip._scaling import scale, shortening, unit_factor, weighted_sum, widen

LEAST_SHARE = 1e-3
"""Least share of `<g, p>` that `p^T F p` is taken for: below, rounding decides the difference."""


@attrs.frozen
class TrustRegion:
    """Bound the predicted KL divergence of the step, measured by F without its damping.

        eta = min(mu, sqrt(2 delta / p^T F p)),    p^T F p = <g, p> - tau <p, p>
        p_l <- (eta / mu) p_l

    The learning rate mu is eta_max, so the step `-eta p` is never longer than without the clip.
    To second order `eta^2 p^T F p / 2` is the divergence between the predictions before and after
    the step; with several heads it is the sum of theirs, each times its weight. The second equation
    follows from `(F + tau I) p = g`, and needs no product with F. Groups count with their own mu
    and tau: `sum_l mu_l^2 (<g_l, p_l> - tau_l <p_l, p_l>)`.

    With `F + tau I` in place of F this is the clip `kl` with `limit = 2 delta`, and never a shorter
    step. Where F has nearly no say, `p^T F p` is taken for a thousandth of `<g, p>`. The basis
    `kfac` damps both factors: p^T F p then holds also the products of one factor with the damping
    of the other. As for `kl`, nothing is bounded with Adam and similar rules. Parameters without a
    block are neither measured nor shortened, and `bind` warns of them.

    Clipping is not idempotent. Half-precision gradients are measured in float32. A zero gradient,
    or mu = 0, gives the factor 1. A length that overflows gives zero gradients; a NaN changes
    nothing.

    Args:
        radius: delta, in nats.

    Raises:
        OptionError: `radius` is not a positive finite number.

    Example:
        >>> from kfactk import GradientPair
        >>> def dot(xs, ys):
        ...     return torch.stack([(x * y).sum() for x, y in zip(xs, ys)])
        >>> # F = 3 and tau = 1
        >>> pair = GradientPair(torch.tensor([8.0]), torch.tensor([2.0]), lr=1.0, damping=1.0)
        >>> clipped, factor = TrustRegion(radius=1.5).clip([pair], dot)
        >>> round(float(clipped[0]), 4), round(float(factor), 4)
        (1.0, 0.5)

    References:
        Wu et al. 2017, "Scalable trust-region method for deep reinforcement learning using
        Kronecker-factored approximation", arXiv:1708.05144, section 3.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"linear", "self-adjoint", "damped-inverse"})
    """`<g, p> - tau <p, p>` is `p^T F p` for `p = (F + tau I)^-1 g` only."""

    of_whole_step: ClassVar[bool] = True
    """A parameter without a block, such as a spread of its own, is told at bind."""

    radius: float = attrs.field(
        default=0.001,
        validator=number(low=0, low_open=True, hint=", or use clip='none' for steps of any length"),
    )

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """Return the scaled preconditioned gradients, and the factor eta / mu."""
        tensors = [pair.preconditioned for pair in pairs]
        if not tensors:
            return [], unit_factor(tensors)
        wide = widen(tensors)
        damped = dot(widen([pair.gradient for pair in pairs]), wide).unbind()
        squares = dot(wide, wide).unbind()
        total = weighted_sum(damped, [pair.lr**2 for pair in pairs])
        excess = weighted_sum(squares, [pair.lr**2 * pair.damping for pair in pairs])
        length = torch.fmax(total - excess, LEAST_SHARE * total)  # inf - inf is left out
        factor = shortening(length, 2 * self.radius)
        return scale(tensors, factor), factor


@hookimpl
def kfactk_clips() -> dict[str, type[TrustRegion]]:
    """Register the clip `trust_region`."""
    return {"trust_region": TrustRegion}
