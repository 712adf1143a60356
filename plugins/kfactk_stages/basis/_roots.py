"""Roots K of inverses, `K K^T = M^-1`, in a structure that products keep: dense, triangular, ...

A matrix is *stored* as far as its root sees it: `[..., n, n]` for dense and triangular roots, its
diagonal `[..., n]` for diagonal ones, and `[..., count, size, size]` for blocks along the diagonal,
where zeros fill up the last block. A root is stored like its matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfactk import linalg

STRUCTURES = ("dense", "lower", "upper", "diagonal", "blocks")
"""The forms of roots that there are."""


def stored(matrix: Tensor, structure: str, size: int) -> Tensor:
    """Return what a root of this structure sees of a symmetric matrix.

    Args:
        matrix: `[..., n, n]`.
        structure: One of `STRUCTURES`.
        size: Side of a block; that of the matrix where this is smaller.

    Example:
        >>> matrix = torch.arange(9.0).view(3, 3) + torch.arange(9.0).view(3, 3).T
        >>> stored(matrix, "blocks", 2)
        tensor([[[ 0.,  4.],
                 [ 4.,  8.]],
        <BLANKLINE>
                [[16.,  0.],
                 [ 0.,  0.]]])
    """
    if structure == "diagonal":
        return matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    matrix = linalg.symmetrise(matrix)
    if structure != "blocks":
        return matrix
    n = matrix.shape[-1]
    size = min(size, n)
    count = -(-n // size)
    more = count * size - n
    filled = torch.nn.functional.pad(matrix, (0, more, 0, more))
    cut = filled.view(*matrix.shape[:-2], count, size, count, size)
    return cut.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()


def start(target: Tensor, shift: Tensor, structure: str, n: int) -> Tensor:
    """Return K with `K K^T = (M + shift I)^-1`.

    Args:
        target: M as it is stored.
        shift: `[...]`, positive.
        structure: One of `STRUCTURES`.
        n: Side of M.

    Raises:
        DecompositionError: M is not finite, or cannot be factored.
    """
    if structure == "diagonal":
        return (target + shift[..., None]).rsqrt()
    if structure == "lower":
        return _upper_root(target.flip(-1, -2), shift).flip(-1, -2)
    if structure == "blocks":
        there = _there(target, n)
        return _upper_root(target, shift[..., None]) * there[..., None] * there[..., None, :]
    return _upper_root(target, shift)


def mean_square(root: Tensor, matrix: Tensor | None, structure: str, n: int) -> Tensor:
    """Return `tr(K^T M K) / n`, `[...]`; M the identity where it is `None`.

    Args:
        root: K.
        matrix: M as it is stored.
        structure: One of `STRUCTURES`.
        n: Side of M.
    """
    if structure == "diagonal":
        square = root.square()
        return (square if matrix is None else square * matrix).sum(-1) / n
    other = root if matrix is None else matrix @ root
    dims = (-3, -2, -1) if structure == "blocks" else (-2, -1)
    return (root * other).sum(dims) / n


def slope(root: Tensor, target: Tensor, shift: Tensor, structure: str, n: int) -> Tensor:
    """Return `(K^T (M + shift I) K - I) / 2`, projected to the structure of K.

    The projection changes `K K^T` to first order as the whole matrix does.

    Args:
        root: K.
        target: M as it is stored.
        shift: `[...]`.
        structure: One of `STRUCTURES`.
        n: Side of M.
    """
    if structure == "diagonal":
        return (root.square() * (target + shift[..., None]) - 1) / 2
    there: Tensor | float = 1.0
    if structure == "blocks":
        shift, there = shift[..., None], _there(target, n)
    inside = root.mT @ linalg.add_diagonal(target, shift) @ root
    found = linalg.symmetrise(inside)
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    diagonal -= there
    return _projected(found / 2, structure)


def shortened(m: Tensor, longest: float, structure: str) -> Tensor:
    """Return a direction, shortened where its spectral norm may be larger than the longest.

    Args:
        m: The direction, stored like K.
        longest: The largest norm.
        structure: One of `STRUCTURES`.
    """
    if structure == "diagonal":
        return m / (m.abs().amax(-1, keepdim=True) / longest).clamp(min=1)
    return m / (_norm(m) / longest).clamp(min=1)[..., None, None]


def moved(root: Tensor, m: Tensor, step: float, structure: str) -> Tensor:
    """Return `K (I - step m)`."""
    return root * (1 - step * m) if structure == "diagonal" else root - step * (root @ m)


def times_inverse(v: Tensor, root: Tensor, structure: str) -> Tensor:
    """Return `v K K^T` of rows `[..., k, n]`."""
    root = root.to(v.dtype)
    if structure == "diagonal":
        return v * root.square().unsqueeze(-2)
    if structure != "blocks":
        return v @ root @ root.mT
    n, (count, size) = v.shape[-1], root.shape[-3:-1]
    filled = torch.nn.functional.pad(v, (0, count * size - n))
    parts = filled.reshape(*v.shape[:-1], count, size).movedim(-2, -3)
    return (parts @ root @ root.mT).movedim(-3, -2).flatten(-2)[..., :n]


def condition(root: Tensor, structure: str) -> Tensor:
    """Return the largest over the smallest number on the diagonal of `K K^T`, `[...]`."""
    values = root.square()
    if structure != "diagonal":
        values = values.sum(-1)
    if structure == "blocks":
        values = values.flatten(-2)
    least = torch.where(values > 0, values, torch.inf).amin(-1)  # zeros fill up a block
    return values.amax(-1) / least


def _there(blocks: Tensor, n: int) -> Tensor:
    """Return 1 for the rows of blocks `[..., count, size, size]` that there are, 0 for the rest."""
    count, size = blocks.shape[-3:-1]
    return (torch.arange(count * size, device=blocks.device) < n).view(count, size).to(blocks)


def _upper_root(matrix: Tensor, shift: Tensor) -> Tensor:
    """Return the upper triangular K with `K K^T = (M + shift I)^-1`."""
    lower = linalg.cholesky(matrix, shift)
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.mT.contiguous()


def _projected(slope: Tensor, structure: str) -> Tensor:
    if structure == "lower":
        return slope.tril() + slope.tril(-1)
    if structure == "upper":
        return slope.triu() + slope.triu(1)
    return slope


def _norm(m: Tensor) -> Tensor:
    """Return an upper bound of the spectral norm, `[...]`."""
    size = m.abs()
    return (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt().minimum(m.norm(dim=(-2, -1)))
