"""Clipping by value: bound every entry of the preconditioned gradients."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kfactk import Dot, GradientPair, hookimpl
from kfactk_stages.clip._scaling import check_limit, unit_factor, widen


@attrs.frozen
class ValueClip:
    """Bound the size of every entry.

        p_i <- min(limit, max(-limit, p_i))

    The direction may change. The recorded factor is the ratio of norms over all parameters,

        factor = ||clipped|| / ||p||,    1 where nothing was bounded.

    For clips that scale, this ratio is the scaling itself. NaN entries stay NaN. Clipping is
    idempotent.

    Args:
        limit: Largest absolute value of an entry, in the unit of the preconditioned gradient.

    Raises:
        OptionError: `limit` is not a positive finite number.

    Example:
        >>> from kfactk import GradientPair
        >>> def dot(xs, ys):
        ...     return torch.stack([(x * y).sum() for x, y in zip(xs, ys)])
        >>> pair = GradientPair(torch.ones(2), torch.tensor([3.0, -4.0]), lr=0.1)
        >>> clipped, factor = ValueClip(limit=1.0).clip([pair], dot)
        >>> clipped[0], factor
        (tensor([ 1., -1.]), tensor(0.2828))

    References:
        Mikolov 2012, "Statistical language models based on neural networks", PhD thesis, Brno
        University of Technology, which bounds entries one by one.
    """

    limit: float = attrs.field(default=1.0, validator=check_limit)

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """Return the bounded preconditioned gradients, and the ratio of their norms."""
        tensors = [pair.preconditioned for pair in pairs]
        clipped = [self._clamp(tensor) for tensor in tensors]
        if not tensors:
            return clipped, unit_factor(tensors)
        wide, wide_clipped = widen(tensors), widen(clipped)
        before, after = dot(wide, wide).sum(), dot(wide_clipped, wide_clipped).sum()
        return clipped, torch.where(after < before, (after / before).sqrt(), 1.0)

    def _clamp(self, tensor: Tensor) -> Tensor:
        limit = min(self.limit, torch.finfo(tensor.dtype).max)
        return tensor.clamp(-limit, limit)


@hookimpl
def kfactk_clips() -> dict[str, type[ValueClip]]:
    """Register the clip `value`."""
    return {"value": ValueClip}
