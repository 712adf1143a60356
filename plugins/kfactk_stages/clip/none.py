"""No clipping."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from kfactk import Dot, GradientPair, hookimpl
from kfactk_stages.clip._scaling import unit_factor


@attrs.frozen
class NoClip:
    """Leave the preconditioned gradients as they are.

        p_l <- p_l,    factor 1

    Example:
        >>> import torch
        >>> from kfactk import GradientPair
        >>> pair = GradientPair(torch.ones(2), torch.tensor([3.0, 4.0]), lr=0.1)
        >>> clipped, factor = NoClip().clip([pair], dot=None)
        >>> clipped[0], factor
        (tensor([3., 4.]), tensor(1.))
    """

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """Return the preconditioned gradients themselves, and 1."""
        tensors = [pair.preconditioned for pair in pairs]
        return tensors, unit_factor(tensors)


@hookimpl
def kfactk_clips() -> dict[str, type[NoClip]]:
    """Register the clip `none`."""
    return {"none": NoClip}
