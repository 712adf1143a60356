"""The basis of K-FAC: damped inverses of the Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

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
from kfactk.options import choice
from kfactk.sides import KRONECKER, is_diagonal, names_of, side_of, slices_of


@attrs.frozen
class KfacInverse(Basis):
    """Inverse of the Kronecker product with factored Tikhonov damping.

        P V = (G + sqrt(tau) / pi I)^-1  V  (A + pi sqrt(tau) I)^-1
        pi = sqrt((tr A / dim A) / (tr G / dim G))

    A constant that moves from A to G does not change the product, within the range of the factors'
    precision. `pi` is 1 where a trace is zero, and is that of the refresh.

    Where a curvature has stand-ins for a wide side, A or G is the diagonal, or the matrix of blocks
    along its diagonal; the trace in pi is that of the whole side. Each block has a factor of its
    own.

    Args:
        solver: "cholesky": two triangular solves a side. "inverse": the
            explicit inverse, one product a side. Both contain the damping of their refresh: a
            changed damping acts at the next one only. "eigh": two products a side with the
            eigenvectors, at more cost for a refresh, and a changed damping acts at once.

    Raises:
        OptionError: An option has a value that cannot work.

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

    takes_stand_ins: ClassVar[bool] = True

    requires = frozenset({"A", "G"})
    laws = frozenset({"rotation-equivariant", "null-space-independent", "exact-when-kronecker"})
    forms = MappingProxyType(
        {
            "cholesky": "cholesky",
            "inverse": "inverse",
            "pivots": "eigenvalues",
            "eigenvalues": "eigenvalues",
            "eigenvectors": "eigenvectors",
        }
    )

    solver: str = attrs.field(default="cholesky", validator=choice("cholesky", "inverse", "eigh"))

    @property
    def damped_at(self) -> str:
        """The eigenvalues are damped when they are used; a factor or inverse contains its own."""
        return "solve" if self.solver == "eigh" else "refresh"

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return what the solver needs of the damped A / pi or pi G.

        - `{"cholesky": [..., n, n]}`, lower triangular;
        - `{"inverse": [..., n, n], "pivots": [..., n]}`, the squares of the diagonal of that;
        - `{"eigenvalues": [..., n], "eigenvectors": [..., n, n], "floor": [..., 1]}`, without
          damping, and the least damping;
        - of a diagonal `{"eigenvalues": [..., n]}`, damped but for "eigh".

        Both factors are then as large as the root of F, and so is the least damping, whatever size
        A and G have: what lies between the solves of the two sides lies between V and P V in size.
        """
        mean_a, mean_g = context.mean_diagonal["A"], context.mean_diagonal["G"]
        balance, least = linalg.balanced_sides(mean_a, mean_g)[side_of(name)]
        shift = least.clamp(min=context.damping**0.5)
        undamped = {"floor": least.unsqueeze(-1)} if self.solver == "eigh" else {}
        if is_diagonal(name):
            linalg.check_finite(matrix)
            values = matrix * balance[..., None]
            return {"eigenvalues": values if undamped else values + shift[..., None]} | undamped
        balanced = matrix * balance[..., None, None]
        if undamped:
            values, vectors = linalg.eigh(balanced)
            return {"eigenvalues": values, "eigenvectors": vectors} | undamped
        lower = linalg.cholesky(balanced, shift)
        if self.solver == "cholesky":
            return {"cholesky": lower}
        pivots = lower.diagonal(dim1=-2, dim2=-1).square()
        return {"inverse": torch.cholesky_inverse(lower), "pivots": pivots}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> KfacOperator:
        """Return `A kron G`, which solves with the damping of the refresh, or that of now."""
        if self.solver == "eigh":
            decomposition = {
                name: _now_damped(each, damping) for name, each in decomposition.items()
            }
        return KfacOperator(decomposition, matrices)


@attrs.define(eq=False)
class KfacOperator(CurvatureOperator):
    """`F vec(V) = vec(G V A)`.

    Args:
        decomposition: What solves with the damped matrices; `solve` and `condition` read it.
        matrices: A and G, or what stands for them; `multiply` reads them.
    """

    decomposition: Decomposition
    matrices: Tensors

    def solve(self, v: Tensor) -> Tensor:
        """Return `G^-1 v A^-1` with the damped factors."""
        half = self._on_rows("G", self.decomposition, v, _solve)
        return self._on_rows("A", self.decomposition, half.transpose(-1, -2), _solve).mT

    def multiply(self, v: Tensor) -> Tensor:
        """Return `G v A`."""
        half = self._on_rows("G", self.matrices, v, _multiply)
        return self._on_rows("A", self.matrices, half.transpose(-1, -2), _multiply).mT

    def condition(self) -> Tensor:
        """Return that of the worst group; of Cholesky factors a lower bound, by their diagonals."""
        ratios = []
        for side in KRONECKER:
            names = names_of(side, self.decomposition)
            found = torch.cat([_damped(self.decomposition[name]) for name in names], -1)
            ratios.append(found.amax(-1) / found.amin(-1))
        return (ratios[0] * ratios[1]).max()

    def _on_rows(
        self,
        side: str,
        parts: Mapping[str, Any],
        v: Tensor,
        apply: Callable[[str, Any, Tensor], Tensor],
    ) -> Tensor:
        """Return what a side does to the rows of `v`, block by block."""
        names = names_of(side, parts)
        if len(names) == 1:
            return apply(names[0], parts[names[0]], v)
        sizes = [_damped(self.decomposition[name]).shape[-1] for name in names]
        rows = zip(names, slices_of(sizes), strict=True)
        return torch.cat([apply(name, parts[name], v[..., s, :]) for name, s in rows], -2)


def _solve(name: str, parts: Tensors, v: Tensor) -> Tensor:
    """Return `(M + shift I)^-1 v` of a matrix or diagonal M."""
    if "eigenvectors" in parts:
        vectors = parts["eigenvectors"].to(v.dtype)
        return vectors @ (vectors.mT @ v / parts["eigenvalues"].to(v.dtype).unsqueeze(-1))
    if is_diagonal(name):
        return v / parts["eigenvalues"].to(v.dtype).unsqueeze(-1)
    if "inverse" in parts:
        return parts["inverse"].to(v.dtype) @ v
    return torch.cholesky_solve(v, parts["cholesky"].to(v.dtype))


def _multiply(name: str, matrix: Tensor, v: Tensor) -> Tensor:
    """Return `M v` of a matrix or diagonal M."""
    matrix = matrix.to(v.dtype)
    return matrix.unsqueeze(-1) * v if is_diagonal(name) else matrix @ v


def _now_damped(parts: Tensors, damping: float) -> dict[str, Tensor]:
    """Return parts with the damping in their eigenvalues."""
    shift = parts["floor"].clamp(min=damping**0.5)
    return {**parts, "eigenvalues": parts["eigenvalues"] + shift}


def _damped(parts: Tensors) -> Tensor:
    """Return the damped spectrum, or the squares of the Cholesky factor's diagonal, `[..., n]`."""
    for name in ("eigenvalues", "pivots"):
        if name in parts:
            return parts[name]
    return parts["cholesky"].diagonal(dim1=-2, dim2=-1).square()


@hookimpl
def kfactk_bases() -> dict[str, type[KfacInverse]]:
    """Provide `kfac`."""
    return {"kfac": KfacInverse}
