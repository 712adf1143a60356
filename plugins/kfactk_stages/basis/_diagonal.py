"""Operators that are diagonal in a basis `U_G kron U_A`, made once and applied to many gradients."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from kfactk import project
from kfactk_stages.basis._channels import scaled

WORTH = 4_000_000
"""Multiplications from which on a product of rounded operands is the faster one, their rounding included."""


def worth_rounding(rows: int, right: Tensor) -> bool:
    """Whether `rows` times a square matrix is so large a product that rounding its operands pays.

    Example:
        >>> worth_rounding(256, torch.empty(2304, 2304, device="meta")), worth_rounding(16, torch.empty(144, 144, device="meta"))
        (True, False)
    """
    return rows * right.shape[-1] ** 2 >= WORTH


@attrs.frozen(eq=False)
class Diagonal:
    """`V -> U [(U^T V) * w]`.

    Args:
        left: U_G, `[..., d_out, d_out]`.
        right: U_A, `[..., d_in, d_in]`, or U_C, `[..., channels, channels]`; in the precision its operands are rounded to.
        taps: U_K, `[..., taps, taps]`, beside U_C; `None` for the identity.
        weights: w, `[..., d_out, d_in]`.
    """

    left: Tensor
    right: Tensor
    taps: Tensor | None
    weights: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor, taps: Tensor | None, weights: Tensor, precision: torch.dtype | None) -> Diagonal:
        """The operator whose large products round their operands to `precision`; `None` for none."""
        d_out, d_in = weights.shape[-2:]
        if precision is not None and right.shape[-1] == d_in:
            left = left.to(precision) if worth_rounding(d_in, left) else left
            right = right.to(precision) if worth_rounding(d_out, right) else right
        return cls(left, right, taps, weights)

    def __call__(self, vector: Tensor) -> Tensor:
        """Apply it to `[..., d_out, d_in]`."""
        if self.right.shape[-1] < vector.shape[-1]:
            return scaled(vector, self.left, self.right, self.taps, self.weights)
        turned = self._turned(vector, self.left, self.right).mul_(self.weights)
        return self._turned(turned, self.left.transpose(-1, -2), self.right.transpose(-1, -2))

    def _turned(self, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """`left^T M right`, each product in the precision of its rotation where that is the lower one."""
        matrix = project(matrix, left, None, precision=_lower(left))
        return project(matrix, None, right, precision=_lower(right))


def _lower(rotation: Tensor) -> torch.dtype | None:
    return rotation.dtype if rotation.dtype == torch.bfloat16 else None
