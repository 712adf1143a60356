"""Operators that are diagonal in a basis `U_G kron U_A`, made once and applied to many gradients."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from kfactk.samples import product
from kfactk.stages import Operator
from kfactk_stages.basis._channels import ChannelDiagonal, joint_basis

WORTH = 4_000_000
"""Multiplications from which on a product of rounded operands is the faster one, their rounding included."""
DENSE = 128
"""Columns up to which two products with the basis of a layer's whole input side are faster than many small ones with its parts."""


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
        right: U_A, `[..., d_in, d_in]`; both in the precision their operands are rounded to.
        weights: w, `[..., d_out, d_in]`.
    """

    left: Tensor
    right: Tensor
    weights: Tensor

    def __call__(self, vector: Tensor) -> Tensor:
        """Apply it to `[..., d_out, d_in]`, each product in the precision of its rotation where that is the lower one."""
        left, right, dtype = self.left, self.right, vector.dtype
        lower_left, lower_right = _lower(left), _lower(right)
        turned = product(
            product(left.mT, vector, dtype, lower_left), right, dtype, lower_right
        ).mul_(self.weights)
        return product(product(left, turned, dtype, lower_left), right.mT, dtype, lower_right)


def diagonal(
    left: Tensor, right: Tensor, taps: Tensor | None, weights: Tensor, precision: torch.dtype | None
) -> Operator:
    """`V -> U [(U^T V) * w]` for the basis that these directions make.

    Args:
        left: U_G, `[..., d_out, d_out]`.
        right: U_A, `[..., d_in, d_in]`, or U_C, `[..., channels, channels]`.
        taps: U_K, `[..., taps, taps]`, beside U_C; `None` for the identity.
        weights: w, `[..., d_out, d_in]`.
        precision: What operands of large products with U_A or U_G are rounded to; `None` for none.
    """
    d_out, d_in = weights.shape[-2:]
    if right.shape[-1] < d_in:
        return (
            ChannelDiagonal.of(left, right, taps, weights)
            if d_in > DENSE
            else Diagonal(left, joint_basis(right, taps, d_in), weights)
        )
    if precision is not None:
        left = left.to(precision) if worth_rounding(d_in, left) else left
        right = right.to(precision) if worth_rounding(d_out, right) else right
    return Diagonal(left, right, weights)


def _lower(rotation: Tensor) -> torch.dtype | None:
    return rotation.dtype if rotation.dtype == torch.bfloat16 else None
