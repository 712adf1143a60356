"""Algebra in a basis `U_G kron (U_C kron U_K)` of a layer's matrix, with no matrix larger than U_G, U_C and U_K.

Columns are in the order channel, tap; the bias, where there is one, comes last and is a direction of its own. U_K is left out where the
taps are not rotated. What is said of the input side follows from shapes: d_in is `channels * taps (+ 1)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfactk import linalg
from kfactk.samples import channel_columns, project_channels


def spread(channels: Tensor, taps: Tensor | None, d_in: int) -> Tensor:
    """Eigenvalues of channels and taps as one for each column: their products, the bias with the mean of all.

    Args:
        channels: `[..., channels]`.
        taps: `[..., taps]`; `None` for ones.
        d_in: Number of columns.

    Returns:
        `[..., d_in]`.

    Example:
        >>> spread(torch.tensor([1.0, 3.0]), None, 5)
        tensor([1., 1., 3., 3., 2.])
    """
    columns = channel_columns(d_in, channels.shape[-1], None if taps is None else taps.shape[-1])
    found = channels.repeat_interleave(columns // channels.shape[-1], -1) if taps is None else products(channels, taps)
    return found if columns == d_in else torch.cat([found, found.mean(-1, keepdim=True)], -1)


def products(channels: Tensor, taps: Tensor) -> Tensor:
    """`[..., channels * taps]`, channel by channel."""
    return (channels.unsqueeze(-1) * taps.unsqueeze(-2)).flatten(-2)


def pool_channels(scale: Tensor, null: Tensor, null_taps: Tensor | None) -> Tensor:
    """Give the channel directions in `null` their shared mean, tap by tap, and those of taps theirs; the bias keeps its own.

    Args:
        scale: `[..., d_out, d_in]`.
        null: `[..., channels]`, boolean.
        null_taps: `[..., taps]`, boolean; `None` for none.
    """
    columns = channel_columns(scale.shape[-1], null.shape[-1], None if null_taps is None else null_taps.shape[-1])
    pooled = linalg.pool_null(_by_channel(scale, null.shape[-1], columns), null.unsqueeze(-2), -2)
    if null_taps is not None:
        pooled = linalg.pool_null(pooled, null_taps.unsqueeze(-2), -1)
    pooled = pooled.flatten(-2)
    return pooled if columns == scale.shape[-1] else torch.cat([pooled, scale[..., columns:]], -1)


def scaled(matrix: Tensor, left: Tensor, right: Tensor, taps: Tensor | None, weights: Tensor) -> Tensor:
    """`U [(U^T V) * w]` for the basis U, V as a matrix.

    Args:
        matrix: `[..., d_out, d_in]`.
        left: U_G, `[..., d_out, d_out]`.
        right: U_C, `[..., channels, channels]`.
        taps: U_K, `[..., taps, taps]`; `None` for the identity.
        weights: `[..., d_out, d_in]`.
    """
    if taps is not None:
        turned = scaled(project_channels(matrix, None, None, taps), left, right, None, weights)
        return project_channels(turned, None, None, taps.transpose(-1, -2))
    left, right = left.to(matrix.dtype), right.to(matrix.dtype)
    channels, turn = right.shape[-1], left.transpose(-1, -2)
    columns = channel_columns(matrix.shape[-1], channels)
    by_tap = _by_channel(matrix, channels, columns).transpose(-1, -2)
    rows, flat = (*right.shape[:-2], -1, channels), (*matrix.shape[:-1], columns)  # all that one rotation turns, as one product
    inside = (turn @ (by_tap.reshape(rows) @ right).view(flat)).view(by_tap.shape)
    inside = (inside * _by_channel(weights, channels, columns).transpose(-1, -2)).view(flat)
    outside = ((left @ inside).view(rows) @ right.transpose(-1, -2)).view(by_tap.shape)
    found = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    _by_channel(found, channels, columns).copy_(outside.transpose(-1, -2))
    if columns < matrix.shape[-1]:
        found[..., columns:] = left @ ((turn @ matrix[..., columns:]) * weights[..., columns:])
    return found


def _by_channel(matrix: Tensor, channels: int, columns: int) -> Tensor:
    """Columns without the bias as a view `[..., d_out, channels, taps]`."""
    body = matrix[..., :columns]
    return body.view(*body.shape[:-1], channels, columns // channels)
