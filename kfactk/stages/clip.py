"""Clips: what bounds the preconditioned gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
from torch import Tensor


@attrs.frozen(eq=False)
class GradientPair:
    """One preconditioned parameter on its way to the update rule.

    Args:
        gradient: The user's gradient, any shape.
        preconditioned: Its preconditioned form, same shape.
        lr: Learning rate of the parameter's group.
        damping: tau of the parameter's block.
    """

    gradient: Tensor
    preconditioned: Tensor
    lr: float
    damping: float = 0.0


Dot = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Inner products pair by pair, `[len]`; supplied by the framework, which knows about shards."""


class Clip(Protocol):
    """Bounds the preconditioned gradients. Laws: never enlarges; zero stays zero.

    It may have an attribute `needs`: laws that no basis of the recipe may waive (`WAIVABLE`). It
    sees the gradients of blocks alone. With an attribute `of_whole_step = True` its bound is meant
    for all parameters, and `bind` warns of those that have no block.
    """

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """Return the clipped gradients, in order, and the factor applied.

        The factor is a scalar tensor, 1 where nothing was clipped; it is recorded.
        """
