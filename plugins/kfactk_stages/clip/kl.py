"""KL clipping: the step's predicted change of the model's predictive distribution is bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kfactk import Dot, GradientPair, hookimpl
from kfactk_stages.clip._limit import one, positive, scaled, widened


@attrs.frozen
class KlClip:
    """Scale all preconditioned gradients so that the step's predicted squared Fisher length stays small.

        s = sum_l mu_l^2 <g_l, p_l>,    nu = min(1, sqrt(C / s)),    p_l <- nu * p_l

    With `p = (F + tau I)^-1 g` and the plain step `-mu p`, `s` bounds the step's squared length under the Fisher matrix, twice the KL
    divergence between the predictions before and after, to second order; after clipping `nu^2 s <= C`. Every preconditioned parameter
    takes part with its own group's learning rate mu_l. With momentum the bound is on each step's own contribution; with Adam and its
    kin, which divide by the gradient's size, a constant factor cancels, and nothing is bounded.

    Not idempotent: clipping twice scales twice. Half-precision gradients are measured in float32. A zero gradient, or mu = 0, gives
    nu = 1. Too large an `s` for the precision it is measured in gives zero; a NaN leaves everything as it is.

    Args:
        limit: C, in nats.

    Raises:
        OptionError: `limit` is not a positive finite number.

    Example:
        >>> from kfactk import GradientPair
        >>> def dot(xs, ys):
        ...     return torch.stack([(x * y).sum() for x, y in zip(xs, ys)])
        >>> clipped, factor = KlClip(limit=0.01).clip([GradientPair(torch.tensor([2.0]), torch.tensor([2.0]), lr=0.1)], dot)
        >>> round(float(clipped[0]), 4), round(float(factor), 4)
        (1.0, 0.5)

    References:
        Ba, Grosse & Martens 2017, Distributed second-order optimization using Kronecker-factored approximations (ICLR);
        Wu et al. 2017, arXiv:1708.05144, on the choice of the step size.
    """

    limit: float = attrs.field(default=0.01, validator=positive)

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """The scaled preconditioned gradients, and what they were scaled by, nu."""
        tensors = [pair.preconditioned for pair in pairs]
        if not tensors:
            return [], one(tensors)
        products = dot(widened([pair.gradient for pair in pairs]), widened(tensors)).unbind()
        by_lr: dict[float, list[Tensor]] = {}
        for pair, product in zip(pairs, products, strict=True):
            by_lr.setdefault(pair.lr, []).append(product)
        total = torch.stack(
            [torch.stack(same).sum() * (lr * lr) for lr, same in by_lr.items()]
        ).sum()
        factor = torch.where(
            total > self.limit, math.sqrt(self.limit) / total.sqrt(), 1.0
        )  # the quotient's root could underflow
        return scaled(tensors, factor), factor


@hookimpl
def kfactk_clips() -> dict[str, type[KlClip]]:
    """The clip `kl`."""
    return {"kl": KlClip}
