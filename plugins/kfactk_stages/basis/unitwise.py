"""The basis of small dense blocks: each unit's block is inverted exactly."""

from __future__ import annotations

from types import MappingProxyType

import attrs
import torch
from torch import Tensor

from kfactk import (
    Basis,
    CurvatureOperator,
    Decomposition,
    DecompositionError,
    FactorContext,
    SpectralOperator,
    Tensors,
    hookimpl,
    linalg,
)


@attrs.define(eq=False)
class UnitwiseOperator(SpectralOperator):
    """`V -> V (U + damping I)^-1` for symmetric blocks `U = Q diag(s) Q^T`.

    Args:
        spectrum: s, `[..., 1, n]`.
        damping: tau.
        vectors: Q, `[..., n, n]`, eigenvectors in columns.
    """

    vectors: Tensor
    _inverse: Tensor | None = attrs.field(default=None, init=False)

    def to_basis(self, v: Tensor) -> Tensor:
        """Return `V Q`."""
        return v @ self.vectors.to(v.dtype)

    def from_basis(self, coefficients: Tensor) -> Tensor:
        """Return `C Q^T`."""
        return coefficients @ self.vectors.to(coefficients.dtype).mT

    def solve(self, v: Tensor) -> Tensor:
        """Return `V Q diag(1 / (s + damping)) Q^T`, the product of the matrices made once."""
        if self._inverse is None:
            self._inverse = (self.vectors / (self.spectrum + self._tau())) @ self.vectors.mT
        return v @ self._inverse.to(v.dtype)


@attrs.frozen
class Unitwise(Basis):
    """Exact inverse of one small block for each unit of a layer.

        U = Q S Q^T,    F V = V U,    P V = V Q (S + tau I)^-1 Q^T

    Each group of the layer's matrix `[..., d_out, n]` is one unit with the block U, `[..., n, n]`.
    Rows of one group share the block. A unit of one row (`d_out = 1`) has the exact Fisher block of
    its n parameters: two for the scale and the shift of a normalisation layer. P is its exact
    damped inverse, at the damping of the step.

    Example:
        >>> basis = Unitwise()
        >>> block = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
        >>> context = FactorContext(damping=1.0, mean_diagonal={})
        >>> decomposition = {"U": basis.decompose("U", block, context)}
        >>> operator = basis.operator(decomposition, {}, 1.0, {})
        >>> operator.solve(torch.tensor([[[4.0, 4.0]]])), operator.condition()
        (tensor([[[1.0000, 1.0000]]]), tensor(2.))

    References:
        Ollivier 2015, "Riemannian metrics for neural networks I: feedforward networks",
        arXiv:1303.0818, the unitwise Fisher metric.
        Osawa et al. 2020, "Scalable and Practical Natural Gradient for Large-Scale Deep Learning",
        arXiv:2002.06015, the blocks of batch normalisation.
    """

    requires = frozenset({"U"})
    laws = frozenset({"rotation-equivariant"})
    forms = MappingProxyType({"eigenvalues": "eigenvalues", "eigenvectors": "eigenvectors"})

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return `{"eigenvalues": [..., n], "eigenvectors": [..., n, n]}`, vectors in columns."""
        values, vectors = _eigh(matrix)
        return {"eigenvalues": values, "eigenvectors": vectors}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return F of the layer, block by block."""
        parts = decomposition["U"]
        return UnitwiseOperator(parts["eigenvalues"].unsqueeze(-2), damping, parts["eigenvectors"])


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending and at least 0, and eigenvectors; in closed form up to n = 2.

    LAPACK takes thousands of tiny blocks one by one.
    """
    if matrix.shape[-1] > 2:
        return linalg.eigh(matrix)
    matrix = linalg.symmetrise(matrix)
    if not bool(torch.isfinite(matrix).all()):
        raise DecompositionError(
            "a factor holds NaN or inf; raise damping, or look for extreme values"
        )
    if matrix.shape[-1] == 1:
        return matrix.squeeze(-1).clamp(min=0), torch.ones_like(matrix)
    return _jacobi(matrix)


def _jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of `[..., 2, 2]` by the one rotation that is needed.

    References:
        Golub & Van Loan, "Matrix Computations", section 8.5.2, the symmetric Schur decomposition.
    """
    p, q, r = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 1]
    ratio = (r - p) / (2 * q)
    tangent = torch.where(ratio < 0, -1.0, 1.0) / (ratio.abs() + (1 + ratio.square()).sqrt())
    tangent = torch.where(q == 0, 0.0, tangent.to(matrix.dtype))
    cosine = (1 + tangent.square()).rsqrt()
    sine = tangent * cosine
    values = torch.stack([p - tangent * q, r + tangent * q], -1)
    vectors = torch.stack([cosine, sine, -sine, cosine], -1).view(matrix.shape)
    descending = values[..., :1] > values[..., 1:]
    values = torch.where(descending, values.flip(-1), values).clamp(min=0)
    return values, torch.where(descending.unsqueeze(-1), vectors.flip(-1), vectors)


@hookimpl
def kfactk_bases() -> dict[str, type[Unitwise]]:
    """Provide `unitwise`."""
    return {"unitwise": Unitwise}
