"""Algebra in a basis `U_G kron (U_C kron U_K)` of a layer's matrix.

No matrix here is larger than U_G, U_C and U_K, but for `joint_basis`. Columns are in the order
channel, tap; the bias, where there is one, comes last and is a direction of its own. U_K is left
out where the taps are not rotated. Shapes tell the rest: d_in is `channels * taps (+ 1)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfactk import linalg
from kfactk.samples import channel_columns


def spread(channels: Tensor, taps: Tensor | None, d_in: int) -> Tensor:
    """Return one eigenvalue a column: products of channel and tap, and their mean for the bias.

    Args:
        channels: Eigenvalues of channels, `[..., channels]`.
        taps: Eigenvalues of taps, `[..., taps]`; `None` for ones.
        d_in: Number of columns.

    Returns:
        `[..., d_in]`.

    Example:
        >>> spread(torch.tensor([1.0, 3.0]), None, 5)
        tensor([1., 1., 3., 3., 2.])
    """
    columns = channel_columns(d_in, channels.shape[-1], None if taps is None else taps.shape[-1])
    if taps is None:
        found = channels.repeat_interleave(columns // channels.shape[-1], -1)
    else:
        found = products(channels, taps)
    return found if columns == d_in else torch.cat([found, found.mean(-1, keepdim=True)], -1)


def products(channels: Tensor, taps: Tensor) -> Tensor:
    """Return the products of all pairs, `[..., channels * taps]`, channel by channel."""
    return (channels.unsqueeze(-1) * taps.unsqueeze(-2)).flatten(-2)


def joint_basis(channels: Tensor, taps: Tensor | None, d_in: int) -> Tensor:
    """Return `blockdiag(U_C kron U_K, 1)`, `[..., d_in, d_in]`, for layers that are small.

    Args:
        channels: U_C, `[..., channels, channels]`.
        taps: U_K, `[..., taps, taps]`; `None` for the identity.
        d_in: Number of columns.
    """
    columns = channel_columns(d_in, channels.shape[-1], None if taps is None else taps.shape[-1])
    if taps is None:
        many = columns // channels.shape[-1]
        taps = torch.eye(many, dtype=channels.dtype, device=channels.device)
    basis = linalg.kron(channels, taps)
    if columns == d_in:
        return basis
    return linalg.block_diagonal(basis, basis.new_ones(*basis.shape[:-2], 1, 1))


def pool_channels(scale: Tensor, null: Tensor, null_taps: Tensor | None) -> Tensor:
    """Give null directions their shared mean: of channels tap by tap, of taps channel by channel.

    The bias keeps its own scale.

    Args:
        scale: `[..., d_out, d_in]`.
        null: Null directions of channels, `[..., channels]`, boolean.
        null_taps: Null directions of taps, `[..., taps]`, boolean; `None` for none.
    """
    taps = None if null_taps is None else null_taps.shape[-1]
    columns = channel_columns(scale.shape[-1], null.shape[-1], taps)
    body = by_channel(scale, null.shape[-1], columns)
    pooled = linalg.pool_null(body, null.unsqueeze(-2), -2)
    if null_taps is not None:
        pooled = linalg.pool_null(pooled, null_taps.unsqueeze(-2), -1)
    pooled = pooled.flatten(-2)
    return pooled if columns == scale.shape[-1] else torch.cat([pooled, scale[..., columns:]], -1)


def by_channel(matrix: Tensor, channels: int, columns: int) -> Tensor:
    """Return the columns without the bias as a view `[..., d_out, channels, taps]`."""
    body = matrix[..., :columns]
    return body.view(*body.shape[:-1], channels, columns // channels)


def tap_major(matrix: Tensor, channels: int, columns: int) -> Tensor:
    """Return the columns without the bias as `[..., taps, d_out, channels]`, contiguous."""
    return by_channel(matrix, channels, columns).movedim(-1, -3).contiguous()
