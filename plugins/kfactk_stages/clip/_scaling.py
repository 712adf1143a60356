"""What the clips share: the check of a limit, sums of squares in float32, scaling on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfactk.options import number

check_limit = number(low=0, low_open=True, hint=", or use clip='none' to leave gradients unbounded")
"""Check that a limit is a positive, finite number."""
_HALF_PRECISIONS = (torch.float16, torch.bfloat16)


def widen(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return half-precision tensors as float32, so that squares can be summed; others as is."""
    return [t.float() if t.dtype in _HALF_PRECISIONS else t for t in tensors]


def scale(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Return new tensors `factor * t`, of the same dtypes and devices.

    `factor` is 0-dimensional. The host never reads it.
    """
    # For 0-dimensional tensors, torch would keep the wider dtype of the two.
    return [(t * factor.to(t.device)).to(t.dtype) for t in tensors]


def unit_factor(tensors: Sequence[Tensor]) -> Tensor:
    """Return the factor 1, on the device of the first tensor."""
    return torch.ones((), device=tensors[0].device if tensors else None)
