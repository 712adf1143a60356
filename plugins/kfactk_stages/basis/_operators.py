"""Operators that are diagonal in a basis `U_G kron U_A`: made once, applied to many gradients.

Each keeps `1 / (s + tau)`, so that `solve` costs the rotations and one product by entries.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from kfactk import SpectralOperator, project, project_channels
from kfactk.samples import channel_columns, product
from kfactk_stages.basis._channels import by_channel, joint_basis, tap_major

WORTH = 4_000_000
"""Multiplications from which a product of rounded operands is faster, rounding included."""
DENSE = 128
"""Columns up to which one basis of the whole input side is faster than those of its parts."""


def worth_rounding(rows: int, right: Tensor) -> bool:
    """Return whether `rows` times a square matrix is so large that rounding the operands pays.

    Example:
        >>> worth_rounding(256, torch.empty(2304, 2304, device="meta"))
        True
        >>> worth_rounding(16, torch.empty(144, 144, device="meta"))
        False
    """
    return rows * right.shape[-1] ** 2 >= WORTH


def operator_in(
    left: Tensor | None,
    right: Tensor | None,
    taps: Tensor | None,
    *,
    spectrum: Tensor,
    damping: float,
    precision: torch.dtype | None = None,
    power: float = 1.0,
) -> SpectralOperator:
    """Return `U diag(s) U^T` for the basis that these directions make.

    Args:
        left: U_G, `[..., d_out, d_out]`; `None` for the coordinates, without `taps`.
        right: U_A, `[..., d_in, d_in]`, or U_C, `[..., channels, channels]`; `None` for the
            coordinates themselves.
        taps: U_K, `[..., taps, taps]`, beside U_C; `None` for the identity.
        spectrum: s, `[..., d_out, d_in]`.
        damping: tau.
        precision: What `solve` rounds the operands of large products with U_A or U_G to; `None` for
            no rounding.
        power: p of `solve`, `(F + damping I)^-p`.
    """
    d_in = spectrum.shape[-1]
    if left is not None and right is not None and right.shape[-1] < d_in:
        if d_in > DENSE:
            return ChannelOperator(spectrum, damping, left, right, taps, power=power)
        right, precision = joint_basis(right, taps, d_in), None
    return EigenbasisOperator(spectrum, damping, left, right, precision, power=power)


@attrs.define(eq=False)
class EigenbasisOperator(SpectralOperator):
    """`F = U diag(s) U^T` with `U^T V = U_G^T V U_A`.

    Args:
        spectrum: s, `[..., d_out, d_in]`.
        damping: tau.
        left: U_G, `[..., d_out, d_out]`; `None` for the identity.
        right: U_A, `[..., d_in, d_in]`; `None` for the identity.
        precision: What `solve` rounds the operands of large products to; `None` for no rounding.
        power: p of `solve`, `(F + damping I)^-p`.
    """

    left: Tensor | None
    right: Tensor | None
    precision: torch.dtype | None = None
    weights: Tensor = attrs.field(init=False)
    rounded: tuple[Tensor | None, Tensor | None] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        d_out, d_in = self.spectrum.shape[-2:]
        self.weights = self._weights()
        right = None if self.right is None else self._rounded(self.right, d_out)
        self.rounded = None if self.left is None else self._rounded(self.left, d_in), right

    def solve(self, v: Tensor) -> Tensor:
        """Return `U [(U^T v) / (s + damping)^p]`, each product in the precision of its rotation."""
        (left, right), dtype = self.rounded, v.dtype
        if right is None:
            return self._solve_columns(v)
        inside = v if left is None else product(left.mT, v, dtype, _lower(left))
        inside = product(inside, right, dtype, _lower(right)).mul_(self.weights)
        outside = inside if left is None else product(left, inside, dtype, _lower(left))
        return product(outside, right.mT, dtype, _lower(right))

    def solve_coordinates(self, coordinates: Tensor) -> Tensor:
        """Return `U [c / (s + damping)^p]`, each product in the precision of its rotation."""
        (left, right), dtype = self.rounded, coordinates.dtype
        found = self.weights * coordinates
        if left is not None:
            found = product(left, found, dtype, _lower(left))
        return found if right is None else product(found, right.mT, dtype, _lower(right))

    def _solve_columns(self, v: Tensor) -> Tensor:
        """Return `solve` where each column stays apart: those that are zero cost nothing.

        They are looked for on a CPU alone: other devices would have to wait for the answer.
        """
        left, weights = self.rounded[0], self.weights
        if left is None:
            return v * weights
        if v.device.type != "cpu" or v.ndim > 2:
            return _turned_back(left, v, weights)
        (there,) = v.any(-2).nonzero(as_tuple=True)
        if 2 * len(there) > v.shape[-1]:
            return _turned_back(left, v, weights)
        found = torch.zeros_like(v.mT, memory_format=torch.contiguous_format)
        found[there] = _turned_back(left, v[:, there], weights[:, there]).mT
        return found.mT

    def to_basis(self, v: Tensor) -> Tensor:
        """Return `U_G^T v U_A`, without rounding."""
        return project(v, self.left, self.right)

    def from_basis(self, coefficients: Tensor) -> Tensor:
        """Return `U_G c U_A^T`, without rounding."""
        left, right = (None if side is None else side.mT for side in (self.left, self.right))
        return project(coefficients, left, right)

    def _rounded(self, rotation: Tensor, rows: int) -> Tensor:
        if self.precision is None or not worth_rounding(rows, rotation):
            return rotation
        return rotation.to(self.precision)


@attrs.define(eq=False)
class ChannelOperator(SpectralOperator):
    """`F = U diag(s) U^T` for a basis that is a product on the input side.

        U^T V = U_G^T V blockdiag(U_C kron U_K, 1)

    `solve` lays the coefficients out tap by tap, `[..., taps, d_out, channels]`, so that each
    rotation is one product of whole matrices.

    Args:
        spectrum: s, `[..., d_out, d_in]`.
        damping: tau.
        left: U_G, `[..., d_out, d_out]`.
        right: U_C, `[..., channels, channels]`.
        taps: U_K, `[..., taps, taps]`; `None` for the identity.
        power: p of `solve`, `(F + damping I)^-p`.
    """

    left: Tensor
    right: Tensor
    taps: Tensor | None
    weights: Tensor = attrs.field(init=False)
    bias_weights: Tensor | None = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        weights, channels = self._weights(), self.right.shape[-1]
        taps = None if self.taps is None else self.taps.shape[-1]
        columns = channel_columns(weights.shape[-1], channels, taps)
        self.weights = tap_major(weights, channels, columns)
        biased = columns < weights.shape[-1]
        self.bias_weights = weights[..., columns:].clone() if biased else None

    def solve(self, v: Tensor) -> Tensor:
        """Return `U [(U^T v) / (s + damping)^p]`."""
        left, right = self.left.to(v.dtype), self.right.to(v.dtype)
        taps = None if self.taps is None else self.taps.to(v.dtype)
        channels = right.shape[-1]
        columns = self.weights.shape[-3] * channels
        by_tap = tap_major(v, channels, columns)
        inside = _rotated(by_tap, left.mT, right, None if taps is None else taps.mT)
        outside = _rotated(inside.mul_(self.weights), left, right.mT, taps)
        found = torch.empty_like(v, memory_format=torch.contiguous_format)
        by_channel(found, channels, columns).copy_(outside.movedim(-3, -1))
        if self.bias_weights is not None:
            found[..., columns:] = left @ ((left.mT @ v[..., columns:]) * self.bias_weights)
        return found

    def solve_coordinates(self, coordinates: Tensor) -> Tensor:
        """Return `U [c / (s + damping)^p]`."""
        weights = self._weights().to(coordinates.dtype)
        return self.from_basis(weights * coordinates)

    def to_basis(self, v: Tensor) -> Tensor:
        """Return `U_G^T v blockdiag(U_C kron U_K, 1)`."""
        return project_channels(v, self.left, self.right, self.taps)

    def from_basis(self, coefficients: Tensor) -> Tensor:
        """Return `U_G c blockdiag(U_C kron U_K, 1)^T`."""
        taps = None if self.taps is None else self.taps.mT
        return project_channels(coefficients, self.left.mT, self.right.mT, taps)


def _rotated(by_tap: Tensor, left: Tensor, right: Tensor, taps: Tensor | None) -> Tensor:
    """Return `left M right` of each tap's matrix M, after `taps` has mixed these."""
    if taps is not None:
        by_tap = (taps @ by_tap.flatten(-2)).view(by_tap.shape)
    by_tap = (by_tap.flatten(-3, -2) @ right).view(by_tap.shape)
    return left.unsqueeze(-3) @ by_tap


def _turned_back(left: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """Return `U_G [(U_G^T v) * weights]`."""
    inside = product(left.mT, v, v.dtype, _lower(left)).mul_(weights)
    return product(left, inside, v.dtype, _lower(left))


def _lower(rotation: Tensor) -> torch.dtype | None:
    return rotation.dtype if rotation.dtype == torch.bfloat16 else None
