"""The basis of Shampoo: roots of the second moments of a gradient's rows and columns."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import attrs
from torch import Tensor

from kfactk import (
    Basis,
    CurvatureOperator,
    Decomposition,
    FactorContext,
    Tensors,
    hookimpl,
    linalg,
)
from kfactk.options import number
from kfactk.sides import is_diagonal
from kfactk_stages.basis._root_operator import RootOperator
from kfactk_stages.basis._sides import check_column, from_both_sides, is_whole


@attrs.frozen
class Shampoo(Basis):
    """Inverse roots of both sides.

        F vec(V) = vec(L^(1/2) V R^(1/2)),    P V = L^(-p/2) V R^(-p/2),    p = power

    With p = 1/2 each side has the power -1/4, as in the paper. There L and R are sums over steps
    and here they are means: `factor_decay=1` and a learning rate that falls with `1 / sqrt(t)` make
    them equal. A side of which there is the diagonal alone is divided row by row. Where blocks
    stand for a side that is too wide, L is block-diagonal, and so are its roots.

    Args:
        power: p, in (0, 1]. 0.5: P is the root of the inverse of F, as in Adam. 1: the inverse.
        eps: What is added to the eigenvalues of each side, as a share of the largest; of a side in
            blocks, of the largest of each block. The recipe's damping has no effect.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> import torch
        >>> basis = Shampoo(eps=0.0)
        >>> context = FactorContext(damping=0.0, mean_diagonal={})
        >>> sides = {"L": torch.tensor([[16.0]]), "R": torch.diag(torch.tensor([1.0, 16.0]))}
        >>> parts = {name: basis.decompose(name, m, context) for name, m in sides.items()}
        >>> basis.operator(parts, {}, 0.0, sides).solve(torch.tensor([[4.0, 4.0]]))
        tensor([[2.0000, 1.0000]])

    References:
        Gupta, Koren & Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization",
        arXiv:1802.09568, algorithm 1.
        Anil et al. 2020, "Scalable Second Order Optimization for Deep Learning", arXiv:2002.09018,
        for an eps in units of the largest eigenvalue.
    """

    takes_stand_ins: ClassVar[bool] = True

    requires = frozenset({"L", "R"})
    laws = frozenset({"rotation-equivariant", "null-space-independent"})
    waives = frozenset({"damped-inverse"})
    damped_at = "never"
    forms = MappingProxyType({"eigenvalues": "eigenvalues", "root": "root"})

    power: float = attrs.field(default=0.5, validator=number(0, 1, low_open=True))
    eps: float = attrs.field(default=1e-6, validator=number(0))

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return the damped eigenvalues and the matrix to the power -p/2, of the shape given.

        Raises:
            DecompositionError: The matrix holds NaN or inf, or cannot be decomposed.
        """
        if not is_whole(name, matrix):
            values = self._damped(check_column(matrix), -1 if is_diagonal(name) else -2)
            return {"eigenvalues": values, "root": values ** (-self.power / 2)}
        values, vectors = linalg.eigh(matrix)
        values = self._damped(values, -1)
        root = (vectors * (values ** (-self.power / 2)).unsqueeze(-2)) @ vectors.mT
        return {"eigenvalues": values, "root": root}

    def _damped(self, values: Tensor, dim: int) -> Tensor:
        """Return eigenvalues with eps times the largest along a dimension added."""
        floor = linalg.damping_floor(values.mean(dim, keepdim=True))
        return values + (values.amax(dim, keepdim=True) * self.eps).maximum(floor)

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return F with the inverse roots of the refresh."""
        return ShampooOperator(decomposition, matrices)


@attrs.define(eq=False)
class ShampooOperator(RootOperator):
    """`F vec(V) = vec(L^(1/2) V R^(1/2))`, with the step `L^(-p/2) V R^(-p/2)`."""

    def multiply(self, v: Tensor) -> Tensor:
        """Return `L^(1/2) v R^(1/2)`."""
        return from_both_sides({n: _root(n, m) for n, m in self.own_matrices().items()}, v)

    def condition(self) -> Tensor:
        """Return the condition number of F with eps, the largest among groups."""
        return self.spread().sqrt().max()


def _root(name: str, matrix: Tensor) -> Tensor:
    """Return the root of a side, or of a part of it."""
    if not is_whole(name, matrix):
        return matrix.clamp(min=0).sqrt()
    values, vectors = linalg.eigh(matrix)
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT


@hookimpl
def kfactk_bases() -> dict[str, type[Shampoo]]:
    """Provide `shampoo`."""
    return {"shampoo": Shampoo}
