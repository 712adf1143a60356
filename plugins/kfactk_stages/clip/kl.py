"""KL clipping: bound the predicted change of the model's predictive distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
from torch import Tensor

from kfactk import Dot, GradientPair, hookimpl
from kfactk_stages.clip._scaling import (
    check_limit,
    scale,
    shortening,
    unit_factor,
    weighted_sum,
    widen,
)


@attrs.frozen
class KlClip:
    """Bound the predicted squared Fisher length of the step, by scaling all gradients alike.

        s = sum_l mu_l^2 <g_l, p_l>,    nu = min(1, sqrt(C / s)),    p_l <- nu * p_l

    With `p = (F + tau I)^-1 g` and the plain step `-mu p`, `s` bounds the squared length of the
    step under the Fisher matrix. To second order, that length is twice the KL divergence between
    the predictions before and after the step. After clipping, `nu^2 s <= C`. Every preconditioned
    parameter takes part, with the learning rate mu_l of its own group. With momentum, the bound
    applies to each step's own contribution. It bounds nothing for Adam and similar rules, which
    divide by the size of the gradient: a constant factor cancels there.

    Clipping is not idempotent: clipping twice scales twice. Half-precision gradients are measured
    in float32. A zero gradient, or mu = 0, gives nu = 1. An `s` that overflows gives zero
    gradients; a NaN changes nothing.

    Args:
        limit: C, in nats.

    Raises:
        OptionError: `limit` is not a positive finite number.

    Example:
        >>> import torch
        >>> from kfactk import GradientPair
        >>> def dot(xs, ys):
        ...     return torch.stack([(x * y).sum() for x, y in zip(xs, ys)])
        >>> pair = GradientPair(torch.tensor([2.0]), torch.tensor([2.0]), lr=0.1)
        >>> clipped, factor = KlClip(limit=0.01).clip([pair], dot)
        >>> round(float(clipped[0]), 4), round(float(factor), 4)
        (1.0, 0.5)

    References:
        Ba, Grosse & Martens 2017, "Distributed second-order optimization using Kronecker-factored
        approximations", ICLR.
        Wu et al. 2017, arXiv:1708.05144, on the choice of the step size.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"linear", "self-adjoint", "damped-inverse"})
    """`<g, p>` is a squared Fisher length for `p = (F + tau I)^-1 g` only."""

    limit: float = attrs.field(default=0.01, validator=check_limit)

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """Return the scaled preconditioned gradients, and the factor nu."""
        tensors = [pair.preconditioned for pair in pairs]
        if not tensors:
            return [], unit_factor(tensors)
        products = dot(widen([pair.gradient for pair in pairs]), widen(tensors)).unbind()
        factor = shortening(weighted_sum(products, [pair.lr**2 for pair in pairs]), self.limit)
        return scale(tensors, factor), factor


@hookimpl
def kfactk_clips() -> dict[str, type[KlClip]]:
    """Register the clip `kl`."""
    return {"kl": KlClip}
