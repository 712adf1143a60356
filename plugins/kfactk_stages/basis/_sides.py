"""Sides of a gradient's matrix: a square factor, or a column that stands for its diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from kfactk import DecompositionError


def is_column(matrix: Tensor) -> bool:
    """Return whether a factor is a column `[..., n, 1]`; one of a single number is square.

    Example:
        >>> is_column(torch.ones(3, 1)), is_column(torch.ones(3, 3)), is_column(torch.ones(1, 1))
        (True, False, False)
    """
    return matrix.shape[-1] != matrix.shape[-2]


def check_column(matrix: Tensor) -> Tensor:
    """Return a column with rounding below zero removed.

    Raises:
        DecompositionError: It holds NaN or inf.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise DecompositionError(
            "a factor holds NaN or inf; raise damping, or look for extreme values in the gradients"
        )
    return matrix.clamp(min=0)
