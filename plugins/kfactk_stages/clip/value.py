"""Clipping by value: every entry of the preconditioned gradients is bounded."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kfactk import Dot, GradientPair, hookimpl
from kfactk_stages.clip._limit import one, positive, widened


@attrs.frozen
class ValueClip:
    """Bound the size of every entry.

        p_i <- min(limit, max(-limit, p_i))

    The direction is not kept. The recorded factor is the part of the norm that is left, over all parameters,

        factor = ||clipped|| / ||p||,    1 when nothing was bounded,

    which for the clips that scale is the scaling itself. NaN entries stay NaN. Idempotent.

    Args:
        limit: Largest absolute value of an entry, in the unit of the preconditioned gradient.

    Raises:
        OptionError: `limit` is not a positive finite number.

    Example:
        >>> from kfactk import GradientPair
        >>> def dot(xs, ys):
        ...     return torch.stack([(x * y).sum() for x, y in zip(xs, ys)])
        >>> clipped, factor = ValueClip(limit=1.0).clip([GradientPair(torch.ones(2), torch.tensor([3.0, -4.0]), lr=0.1)], dot)
        >>> clipped[0], factor
        (tensor([ 1., -1.]), tensor(0.2828))

    References:
        Mikolov 2012, Statistical language models based on neural networks (PhD thesis, Brno), where entries are bounded one by one.
    """

    limit: float = attrs.field(default=1.0, validator=positive)

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """The bounded preconditioned gradients, and the part of their norm that is left."""
        tensors = [pair.preconditioned for pair in pairs]
        clipped = [self._bounded(tensor) for tensor in tensors]
        if not tensors:
            return clipped, one(tensors)
        wide, wide_clipped = widened(tensors), widened(clipped)
        before, after = dot(wide, wide).sum(), dot(wide_clipped, wide_clipped).sum()
        return clipped, torch.where(after < before, (after / before).sqrt(), 1.0)

    def _bounded(self, tensor: Tensor) -> Tensor:
        limit = min(self.limit, torch.finfo(tensor.dtype).max)
        return tensor.clamp(-limit, limit)


@hookimpl
def kfactk_clips() -> dict[str, type[ValueClip]]:
    """The clip `value`."""
    return {"value": ValueClip}
