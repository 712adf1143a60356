"""Sides of a gradient's matrix: a square factor, blocks along its diagonal, or its diagonal.

A diagonal is `[..., n]` under its own name, l or r. That of a vector is a column `[..., n, 1]`
under the name of its side, L.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfactk import linalg
from kfactk.sides import is_diagonal, names_of, slices_of


def is_column(matrix: Tensor) -> bool:
    """Return whether a factor is a column `[..., n, 1]`; one of a single number is square.

    Example:
        >>> import torch
        >>> is_column(torch.ones(3, 1)), is_column(torch.ones(3, 3)), is_column(torch.ones(1, 1))
        (True, False, False)
    """
    return matrix.shape[-1] != matrix.shape[-2]


def is_whole(name: str, matrix: Tensor) -> bool:
    """Return whether a factor is a square matrix, and not what stands for a diagonal.

    Example:
        >>> is_whole("L", torch.ones(3, 3)), is_whole("L", torch.ones(3, 1))
        (True, False)
        >>> is_whole("l", torch.ones(3)), is_whole("l", torch.ones(3, 3))
        (False, False)
    """
    return not is_diagonal(name) and not is_column(matrix)


def as_column(name: str, matrix: Tensor) -> Tensor:
    """Return the diagonal of a side, or its column, as a column `[..., n, 1]`."""
    return matrix.unsqueeze(-1) if is_diagonal(name) else matrix


def check_column(matrix: Tensor) -> Tensor:
    """Return a column or diagonal with rounding below zero removed.

    Raises:
        DecompositionError: It holds NaN or inf.
    """
    linalg.check_finite(matrix)
    return matrix.clamp(min=0)


def from_both_sides(sides: Mapping[str, Tensor], v: Tensor) -> Tensor:
    """Return `L v R`; a side of which nothing is given stays as it is.

    Args:
        sides: By name, symmetric matrices, blocks of them, diagonals or columns.
        v: `[..., d_out, d_in]`.

    Example:
        >>> blocks = {"L0": torch.eye(1), "L1": 2 * torch.eye(1), "r": torch.tensor([1.0, 10.0])}
        >>> from_both_sides(blocks, torch.ones(2, 2))
        tensor([[ 1., 10.],
                [ 2., 20.]])
    """
    left, right = (names_of(side, sides) for side in ("L", "R"))
    if len(left) == 1:
        v = _left(left[0], sides[left[0]], v)
    elif left:
        rows = slices_of(sides[name].shape[-1] for name in left)
        parts = zip(left, rows, strict=True)
        v = torch.cat([_left(name, sides[name], v[..., s, :]) for name, s in parts], -2)
    if len(right) == 1:
        return _right(right[0], sides[right[0]], v)
    if not right:
        return v
    columns = slices_of(sides[name].shape[-1] for name in right)
    parts = zip(right, columns, strict=True)
    return torch.cat([_right(name, sides[name], v[..., s]) for name, s in parts], -1)


def _left(name: str, matrix: Tensor, v: Tensor) -> Tensor:
    matrix = matrix.to(v.dtype)
    return matrix @ v if is_whole(name, matrix) else as_column(name, matrix) * v


def _right(name: str, matrix: Tensor, v: Tensor) -> Tensor:
    matrix = matrix.to(v.dtype)
    return v @ matrix if is_whole(name, matrix) else v * as_column(name, matrix).mT
