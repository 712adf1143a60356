"""Second moments of a gradient's two sides that weigh each other.

    L = E[V S_R^-1 V^T] / d_in,    R = E[V^T S_L^-1 V] / d_out

S_L and S_R are what the last refresh made of L and R. Before the first one they are `s I`, with s
the root of the mean square of V, so that L and R have the mean diagonal s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from kfactk import Decomposition, FactorContext, Tensors, linalg
from kfactk_stages.basis._sides import is_column

BESIDE: Mapping[str, tuple[str, ...]] = MappingProxyType({"L": ("R",), "R": ("L",)})
"""For each side the other one."""


def weighed(decomposition: Decomposition, gradient: Tensor) -> dict[str, Tensor]:
    """Return what L and R are second moments of: for L, V times a root of `S_R^-1 / d_in`.

    Args:
        decomposition: For each side "root" and "start"; empty before the first refresh.
        gradient: V, `[..., d_out, d_in]`.
    """
    square = gradient.square().mean((-2, -1), keepdim=True)
    plain = gradient / square.sqrt().clamp(min=torch.finfo(square.dtype).tiny ** 0.5).sqrt()
    left, right = plain, plain
    if decomposition:
        left = torch.where(_known(decomposition["R"]), _times(gradient, decomposition["R"]), plain)
        other = _times(gradient.mT, decomposition["L"]).mT
        right = torch.where(_known(decomposition["L"]), other, plain)
    d_out, d_in = gradient.shape[-2:]
    return {"L": left / math.sqrt(d_in), "R": right / math.sqrt(d_out)}


def started(
    values: Tensor, name: str, matrix: Tensor, context: FactorContext, fade: float, eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the eigenvalues of S, and the parts of a decomposition that its start needs.

        S_L = (1 - f_k) L + f_k s I + eps m_L m_R tr(S_R^-1) / d_in I,    f_k = fade^k

    k counts refreshes, m is a mean diagonal, and S_R is that of the last refresh.

    Args:
        values: Eigenvalues of L, `[..., n]`, or its column `[..., n, 1]`.
        name: "L" or "R".
        matrix: It, `[..., n, n]`, or the column.
        context: The other side beside it, and what both were decomposed into.
        fade: Share of the start that a refresh leaves.
        eps: What is added, as a share of the mean square of gradients.

    Raises:
        DecompositionError: The other side holds NaN or inf.
    """
    [other] = BESIDE[name]
    linalg.check_finite(context.beside[other])
    mean, beside = _mean(matrix), _mean(context.beside[other])
    last, last_other = context.previous, context.previous_beside.get(other)
    start, share = mean, torch.full_like(mean, fade)
    inverse = beside.reciprocal()
    if last is not None and last_other is not None:
        known, there = last["start"] > 0, last_other["start"] > 0
        start = torch.where(known, last["start"].to(mean), start)
        share = torch.where(known, last["share"].to(mean) * fade, share)
        found = _reciprocals(last_other["eigenvalues"], context.beside[other]).to(mean)
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


def _known(parts: Tensors) -> Tensor:
    """Return whether the side has seen any gradient but zeros, `[..., 1, 1]`."""
    return parts["start"].unsqueeze(-1) > 0


def _times(rows: Tensor, parts: Tensors) -> Tensor:
    """Return rows `[..., k, n]` times a root of the inverse of a side's S."""
    root = parts["root"].to(rows.dtype)
    return rows * root.mT if is_column(root) else rows @ root


def _mean(matrix: Tensor) -> Tensor:
    """Return the mean diagonal of a side, `[..., 1]`."""
    if is_column(matrix):
        return matrix.mean((-2, -1)).unsqueeze(-1)
    return linalg.mean_diagonal(matrix).unsqueeze(-1)


def _reciprocals(values: Tensor, matrix: Tensor) -> Tensor:
    """Return the mean of 1 / values, `[..., 1]`."""
    return values.reciprocal().mean((-2, -1) if is_column(matrix) else -1).unsqueeze(-1)
