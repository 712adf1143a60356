"""Second moments of a gradient's two sides that weigh each other.

    L = E[V S_R^-1 V^T] / d_in,    R = E[V^T S_L^-1 V] / d_out

S_L and S_R are what the last refresh made of L and R. Before the first one they are `s I`, with s
the root of the mean square of V, so that L and R have the mean diagonal s.

Where blocks stand for a side, L and S_L are block-diagonal, and all that is one number of a side is
that of the whole side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from kfactk import Decomposition, FactorContext, Tensors, linalg
from kfactk.sides import is_diagonal, names_of, side_of
from kfactk_stages.basis._root_operator import roots_of
from kfactk_stages.basis._sides import from_both_sides, is_whole

BESIDE: Mapping[str, tuple[str, ...]] = MappingProxyType({"L": ("R",), "R": ("L",)})
"""For each side the other one."""


def weighed(decomposition: Decomposition, gradient: Tensor) -> dict[str, Tensor]:
    """Return what L and R are second moments of: for L, V times a root of `S_R^-1 / d_in`.

    Args:
        decomposition: For each side, or each of what stands for it, "root" and "start"; empty
            before the first refresh.
        gradient: V, `[..., d_out, d_in]`.
    """
    square = gradient.square().mean((-2, -1), keepdim=True)
    plain = gradient / square.sqrt().clamp(min=torch.finfo(square.dtype).tiny ** 0.5).sqrt()
    left, right = plain, plain
    if decomposition:
        left, right = (
            torch.where(
                _known(decomposition, other),
                from_both_sides(roots_of(decomposition, other), gradient),
                plain,
            )
            for other in ("R", "L")
        )
    d_out, d_in = gradient.shape[-2:]
    return {"L": left / math.sqrt(d_in), "R": right / math.sqrt(d_out)}


def started(
    values: Tensor, name: str, matrix: Tensor, context: FactorContext, fade: float, eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the eigenvalues of S, and the parts of a decomposition that its start needs.

        S_L = (1 - f_k) L + f_k s I + eps m_L m_R tr(S_R^-1) / d_in I,    f_k = fade^k

    k counts refreshes, m is a mean diagonal, and S_R is that of the last refresh.

    Args:
        values: Eigenvalues of L, `[..., n]`, or its column `[..., n, 1]`; those of a block of it.
        name: "L" or "R", or that of what stands for it.
        matrix: It, `[..., n, n]`, or the column, diagonal or block.
        context: The other side beside it, and what both were decomposed into.
        fade: Share of the start that a refresh leaves.
        eps: What is added, as a share of the mean square of gradients.

    Raises:
        DecompositionError: The other side holds NaN or inf.
    """
    for each in context.beside.values():
        linalg.check_finite(each)
    side = side_of(name)
    block = name != side and not is_diagonal(name)
    mean = context.mean_diagonal[side].unsqueeze(-1) if block else _mean({name: matrix})
    beside, last = _mean(context.beside), context.previous
    last_other = context.previous_beside
    start, share = mean, torch.full_like(mean, fade)
    inverse = beside.reciprocal()
    if last is not None and last_other:
        known, there = last["start"] > 0, next(iter(last_other.values()))["start"] > 0
        start = torch.where(known, last["start"].to(mean), start)
        share = torch.where(known, last["share"].to(mean) * fade, share)
        found = _reciprocals(last_other, context.beside).to(mean)
        inverse = torch.where(there, found, inverse)
    added = eps * mean * beside * torch.where(beside > 0, inverse, 0.0)
    columns = [1] * (values.ndim - mean.ndim)
    weight, shift = (
        each.view(*mean.shape, *columns) for each in (1 - share, share * start + added)
    )
    values = weight * values + shift
    floor = linalg.damping_floor(values.mean(tuple(range(mean.ndim - 1, values.ndim))))
    values = values.maximum(floor.view(*mean.shape[:-1], *[1] * (values.ndim - mean.ndim + 1)))
    return values, {"start": start, "share": share}


def _known(decomposition: Decomposition, side: str) -> Tensor:
    """Return whether the side has seen any gradient but zeros, `[..., 1, 1]`."""
    return decomposition[names_of(side, decomposition)[0]]["start"].unsqueeze(-1) > 0


def _mean(matrices: Tensors) -> Tensor:
    """Return the mean diagonal of a side that is given by its parts, `[..., 1]`."""
    diagonals = [_numbers(name, m, m, square=True) for name, m in matrices.items()]
    return torch.cat(diagonals, -1).mean(-1, keepdim=True)


def _reciprocals(decomposition: Decomposition, matrices: Tensors) -> Tensor:
    """Return the mean of 1 / eigenvalues of a side, `[..., 1]`."""
    values = [
        _numbers(name, parts["eigenvalues"], matrices[name], square=False)
        for name, parts in decomposition.items()
    ]
    return torch.cat(values, -1).reciprocal().mean(-1, keepdim=True)


def _numbers(name: str, numbers: Tensor, matrix: Tensor, *, square: bool) -> Tensor:
    """Return a diagonal or eigenvalues as `[..., n]`.

    Args:
        name: Of a matrix.
        numbers: Of it.
        matrix: It.
        square: Whether the numbers are on the diagonal of a square matrix.
    """
    if is_diagonal(name):
        return numbers
    if not is_whole(name, matrix):
        return numbers.flatten(-2)
    return numbers.diagonal(dim1=-2, dim2=-1) if square else numbers
