"""Clipping by norm: one norm over all preconditioned gradients is bounded."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kfactk import Dot, GradientPair, hookimpl
from kfactk_stages.clip._limit import one, positive, scaled, widened


@attrs.frozen
class NormClip:
    """Bound the Euclidean norm of all preconditioned gradients together.

        factor = min(1, limit / ||p||),    ||p||^2 = sum_l ||p_l||^2,    p_l <- factor * p_l

    The direction is kept; idempotent. Half-precision gradients are measured in float32. A norm too large for the precision it is
    measured in scales everything to zero; a NaN norm leaves everything as it is.

    Args:
        limit: Largest norm, in the unit of the preconditioned gradient.

    Raises:
        OptionError: `limit` is not a positive finite number.

    Example:
        >>> from kfactk import GradientPair
        >>> def dot(xs, ys):
        ...     return torch.stack([(x * y).sum() for x, y in zip(xs, ys)])
        >>> clipped, factor = NormClip(limit=1.0).clip([GradientPair(torch.ones(2), torch.tensor([3.0, 4.0]), lr=0.1)], dot)
        >>> clipped[0], factor
        (tensor([0.6000, 0.8000]), tensor(0.2000))

    References:
        Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063, section 3.2.
    """

    limit: float = attrs.field(default=1.0, validator=positive)

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """The scaled preconditioned gradients, and what they were scaled by."""
        tensors = [pair.preconditioned for pair in pairs]
        if not tensors:
            return [], one(tensors)
        wide = widened(tensors)
        norm = dot(wide, wide).sum().sqrt()
        factor = torch.where(norm > self.limit, self.limit / norm, 1.0)
        return scaled(tensors, factor), factor


@hookimpl
def kfactk_clips() -> dict[str, type[NormClip]]:
    """The clip `norm`."""
    return {"norm": NormClip}
