"""Clipping by norm: bound one norm over all preconditioned gradients."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kfactk import Dot, GradientPair, hookimpl
from kfactk_stages.clip._scaling import check_limit, scale, unit_factor, widen


@attrs.frozen
class NormClip:
    """Bound the Euclidean norm of all preconditioned gradients together.

        factor = min(1, limit / ||p||),    ||p||^2 = sum_l ||p_l||^2,    p_l <- factor * p_l

    The direction is kept. Clipping is idempotent. Half-precision gradients are measured in float32.
    A norm that overflows scales everything to zero; a NaN norm changes nothing.

    Args:
        limit: Largest norm, in the unit of the preconditioned gradient.

    Raises:
        OptionError: `limit` is not a positive finite number.

    Example:
        >>> from kfactk import GradientPair
        >>> def dot(xs, ys):
        ...     return torch.stack([(x * y).sum() for x, y in zip(xs, ys)])
        >>> pair = GradientPair(torch.ones(2), torch.tensor([3.0, 4.0]), lr=0.1)
        >>> clipped, factor = NormClip(limit=1.0).clip([pair], dot)
        >>> clipped[0], factor
        (tensor([0.6000, 0.8000]), tensor(0.2000))

    References:
        Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks",
        arXiv:1211.5063, section 3.2.
    """

    limit: float = attrs.field(default=1.0, validator=check_limit)

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """Return the scaled preconditioned gradients, and the factor."""
        tensors = [pair.preconditioned for pair in pairs]
        if not tensors:
            return [], unit_factor(tensors)
        wide = widen(tensors)
        norm = dot(wide, wide).sum().sqrt()
        factor = torch.where(norm > self.limit, self.limit / norm, 1.0)
        return scale(tensors, factor), factor


@hookimpl
def kfactk_clips() -> dict[str, type[NormClip]]:
    """Register the clip `norm`."""
    return {"norm": NormClip}
