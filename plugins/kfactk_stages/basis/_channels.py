"""Algebra in a basis `U_G kron (U_C kron U_K)` of a layer's matrix, with no matrix larger than U_G, U_C and U_K, but for `joint_basis`.

Columns are in the order channel, tap; the bias, where there is one, comes last and is a direction of its own. U_K is left out where the
taps are not rotated. What is said of the input side follows from shapes: d_in is `channels * taps (+ 1)`.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from kfactk import linalg
from kfactk.samples import channel_columns


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
    found = (
        channels.repeat_interleave(columns // channels.shape[-1], -1)
        if taps is None
        else products(channels, taps)
    )
    return found if columns == d_in else torch.cat([found, found.mean(-1, keepdim=True)], -1)


def products(channels: Tensor, taps: Tensor) -> Tensor:
    """`[..., channels * taps]`, channel by channel."""
    return (channels.unsqueeze(-1) * taps.unsqueeze(-2)).flatten(-2)


def joint_basis(channels: Tensor, taps: Tensor | None, d_in: int) -> Tensor:
    """`blockdiag(U_C kron U_K, 1)`, `[..., d_in, d_in]`: the basis of the input side as one matrix, for layers that are small.

    Args:
        channels: U_C, `[..., channels, channels]`.
        taps: U_K, `[..., taps, taps]`; `None` for the identity.
        d_in: Number of columns.
    """
    columns = channel_columns(d_in, channels.shape[-1], None if taps is None else taps.shape[-1])
    if taps is None:
        taps = torch.eye(
            columns // channels.shape[-1], dtype=channels.dtype, device=channels.device
        )
    basis = linalg.kron(channels, taps)
    return (
        basis
        if columns == d_in
        else linalg.block_diagonal(basis, basis.new_ones(*basis.shape[:-2], 1, 1))
    )


def pool_channels(scale: Tensor, null: Tensor, null_taps: Tensor | None) -> Tensor:
    """Give the channel directions in `null` their shared mean, tap by tap, and those of taps theirs; the bias keeps its own.

    Args:
        scale: `[..., d_out, d_in]`.
        null: `[..., channels]`, boolean.
        null_taps: `[..., taps]`, boolean; `None` for none.
    """
    columns = channel_columns(
        scale.shape[-1], null.shape[-1], None if null_taps is None else null_taps.shape[-1]
    )
    pooled = linalg.pool_null(_by_channel(scale, null.shape[-1], columns), null.unsqueeze(-2), -2)
    if null_taps is not None:
        pooled = linalg.pool_null(pooled, null_taps.unsqueeze(-2), -1)
    pooled = pooled.flatten(-2)
    return pooled if columns == scale.shape[-1] else torch.cat([pooled, scale[..., columns:]], -1)


@attrs.frozen(eq=False)
class ChannelDiagonal:
    """`V -> U [(U^T V) * w]` for a basis U that is a product on the input side.

    What is turned lies tap by tap, `[..., taps, d_out, channels]`, so that each rotation is one product of whole matrices.

    Args:
        left: U_G, `[..., d_out, d_out]`.
        right: U_C, `[..., channels, channels]`.
        taps: U_K, `[..., taps, taps]`; `None` for the identity.
        weights: w, tap by tap.
        bias: The weights of the bias, `[..., d_out, 1]`; `None` where there is none.
    """

    left: Tensor
    right: Tensor
    taps: Tensor | None
    weights: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, left: Tensor, right: Tensor, taps: Tensor | None, weights: Tensor
    ) -> ChannelDiagonal:
        """The operator, its weights given as `[..., d_out, d_in]`."""
        d_in, channels = weights.shape[-1], right.shape[-1]
        columns = channel_columns(d_in, channels, None if taps is None else taps.shape[-1])
        return cls(
            left,
            right,
            taps,
            _tap_major(weights, channels, columns),
            weights[..., columns:] if columns < d_in else None,
        )

    def __call__(self, vector: Tensor) -> Tensor:
        """Apply it to `[..., d_out, d_in]`."""
        left, right = self.left.to(vector.dtype), self.right.to(vector.dtype)
        taps = None if self.taps is None else self.taps.to(vector.dtype)
        turn, channels, columns = (
            left.transpose(-1, -2),
            right.shape[-1],
            self.weights.shape[-3] * right.shape[-1],
        )
        by_tap = _tap_major(vector, channels, columns)
        inside = self._turned(
            by_tap, turn, right, None if taps is None else taps.transpose(-1, -2)
        ).mul_(self.weights)
        outside = self._turned(inside, left, right.transpose(-1, -2), taps)
        found = torch.empty_like(vector, memory_format=torch.contiguous_format)
        _by_channel(found, channels, columns).copy_(outside.movedim(-3, -1))
        if self.bias is not None:
            found[..., columns:] = left @ ((turn @ vector[..., columns:]) * self.bias)
        return found

    @staticmethod
    def _turned(by_tap: Tensor, left: Tensor, right: Tensor, taps: Tensor | None) -> Tensor:
        """`left M right` of each tap's matrix, of mixtures `taps` of them."""
        if taps is not None:
            by_tap = (taps @ by_tap.flatten(-2)).view(by_tap.shape)
        by_tap = (by_tap.flatten(-3, -2) @ right).view(by_tap.shape)
        return left.unsqueeze(-3) @ by_tap


def _tap_major(matrix: Tensor, channels: int, columns: int) -> Tensor:
    """Columns without the bias, `[..., taps, d_out, channels]`."""
    return _by_channel(matrix, channels, columns).movedim(-1, -3).contiguous()


def _by_channel(matrix: Tensor, channels: int, columns: int) -> Tensor:
    """Columns without the bias as a view `[..., d_out, channels, taps]`."""
    body = matrix[..., :columns]
    return body.view(*body.shape[:-1], channels, columns // channels)
