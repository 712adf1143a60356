"""What the clips share: the check of a limit, sums in float32, scaling on the device."""

from __future__ import annotations

import math
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


def weighted_sum(products: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of 0-dimensional tensors with weights, without waiting for the device."""
    by_weight: dict[float, list[Tensor]] = {}
    for product, weight in zip(products, weights, strict=True):
        by_weight.setdefault(weight, []).append(product)
    sums = [torch.stack(same).sum() * weight for weight, same in by_weight.items()]
    return torch.stack(sums).sum()


def shortening(square: Tensor, bound: float) -> Tensor:
    """Return the factor of a step with which its squared length is at most a bound; at most 1."""
    # The root of the quotient could underflow; the quotient of the roots does not.
    return torch.where(square > bound, math.sqrt(bound) / square.sqrt(), 1.0)


def scale(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Return new tensors `factor * t`, of the same dtypes and devices.

    `factor` is 0-dimensional. The host never reads it.
    """
    # For 0-dimensional tensors, torch would keep the wider dtype of the two.
    return [(t * factor.to(t.device)).to(t.dtype) for t in tensors]


def unit_factor(tensors: Sequence[Tensor]) -> Tensor:
    """Return the factor 1, on the device of the first tensor."""
    return torch.ones((), device=tensors[0].device if tensors else None)
