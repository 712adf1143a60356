"""The basis of K-FAC: damped inverses of the Kronecker factors, through Cholesky."""

from __future__ import annotations

from types import MappingProxyType

import attrs
import torch
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


@attrs.frozen
class KfacInverse(Basis):
    """Inverse of the Kronecker product with factored Tikhonov damping.

        P V = (G + sqrt(tau) / pi I)^-1  V  (A + pi sqrt(tau) I)^-1
        pi = sqrt((tr A / dim A) / (tr G / dim G))

    A constant that moves from A to G does not change the product, within the range of the factors'
    precision. `pi` is 1 where a trace is zero. The Cholesky factors contain the damping of their
    refresh: a changed damping acts at the next refresh only.

    Example:
        >>> import torch
        >>> basis, tau = KfacInverse(), 0.04
        >>> matrices = {"A": torch.eye(3), "G": torch.eye(2)}
        >>> context = FactorContext(tau, {k: linalg.mean_diagonal(m) for k, m in matrices.items()})
        >>> parts = {name: basis.decompose(name, m, context) for name, m in matrices.items()}
        >>> operator = basis.operator(parts, {}, tau, matrices)
        >>> operator.solve(torch.ones(2, 3))[0, 0]  # 1 / 1.2**2
        tensor(0.6944)

    References:
        Martens & Grosse 2015, arXiv:1503.05671, sections 4.2 and 6.3.
    """

    requires = frozenset({"A", "G"})
    laws = frozenset({"rotation-equivariant", "null-space-independent", "exact-when-kronecker"})
    forms = MappingProxyType({"cholesky": "cholesky"})

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return `{"cholesky": [..., n, n]}`, lower triangular, of the damped A / pi or pi G.

        Both factors are then as large as the root of F, and so is the least damping, whatever size
        A and G have: what lies between the two triangular solves lies between V and P V in size.
        """
        mean_a, mean_g = context.mean_diagonal["A"], context.mean_diagonal["G"]
        pi = linalg.tikhonov_pi(mean_a, mean_g)
        balance = 1 / pi if name == "A" else pi
        least = linalg.damping_floor(context.mean_diagonal[name] * balance)
        shift = least.clamp(min=context.damping**0.5)
        return {"cholesky": linalg.cholesky(matrix * balance[..., None, None], shift)}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> KfacOperator:
        """Return `A kron G`, which solves with the damping of the refresh."""
        return KfacOperator(decomposition, matrices)


@attrs.define(eq=False)
class KfacOperator(CurvatureOperator):
    """`F vec(V) = vec(G V A)`.

    Args:
        decomposition: Cholesky factors of the damped matrices; `solve` and `condition` read them.
        matrices: A and G; `multiply` reads them.
    """

    decomposition: Decomposition
    matrices: Tensors

    def solve(self, v: Tensor) -> Tensor:
        """Return `G^-1 v A^-1` with the damped factors."""
        lower_a = self.decomposition["A"]["cholesky"].to(v.dtype)
        lower_g = self.decomposition["G"]["cholesky"].to(v.dtype)
        half = torch.cholesky_solve(v, lower_g)
        return torch.cholesky_solve(half.transpose(-1, -2), lower_a).transpose(-1, -2)

    def multiply(self, v: Tensor) -> Tensor:
        """Return `G v A`."""
        return self.matrices["G"].to(v.dtype) @ v @ self.matrices["A"].to(v.dtype)

    def condition(self) -> Tensor:
        """Return a lower bound, from the diagonals of the Cholesky factors."""
        ratio = torch.ones((), device="cpu")
        for parts in self.decomposition.values():
            diagonal = parts["cholesky"].diagonal(dim1=-2, dim2=-1)
            ratio = ratio.to(diagonal) * (diagonal.amax(-1) / diagonal.amin(-1)).square().max()
        return ratio


@hookimpl
def kfactk_bases() -> dict[str, type[KfacInverse]]:
    """Provide `kfac`."""
    return {"kfac": KfacInverse}
