"""Sides of a gradient's matrix: a square factor, or a column that stands for its diagonal."""

from __future__ import annotations

from torch import Tensor

from kfactk import linalg


def is_column(matrix: Tensor) -> bool:
    """Return whether a factor is a column `[..., n, 1]`; one of a single number is square.

    Example:
        >>> import torch
        >>> is_column(torch.ones(3, 1)), is_column(torch.ones(3, 3)), is_column(torch.ones(1, 1))
        (True, False, False)
    """
    return matrix.shape[-1] != matrix.shape[-2]


def check_column(matrix: Tensor) -> Tensor:
    """Return a column with rounding below zero removed.

    Raises:
        DecompositionError: It holds NaN or inf.
    """
    linalg.check_finite(matrix)
    return matrix.clamp(min=0)


def from_both_sides(left: Tensor, v: Tensor, right: Tensor) -> Tensor:
    """Return `left v right`, where columns stand for the diagonals of their sides.

    Args:
        left: `[..., d_out, d_out]`, or `[..., d_out, 1]`.
        v: `[..., d_out, d_in]`.
        right: `[..., d_in, d_in]`, symmetric, or `[..., d_in, 1]`.
    """
    v = left * v if is_column(left) else left @ v
    return v * right.mT if is_column(right) else v @ right
