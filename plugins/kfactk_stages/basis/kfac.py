"""The basis of K-FAC: damped inverses of the Kronecker factors, through Cholesky."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import Decomposition, FactorContext, Samples, Statistic, Tensors, hookimpl, linalg


@attrs.frozen
class KfacInverse:
    """Inverse of the Kronecker product with factored Tikhonov damping.

        P V = (G + sqrt(tau) / pi I)^-1  V  (A + pi sqrt(tau) I)^-1,    pi = sqrt((tr A / dim A) / (tr G / dim G))

    The product does not change when A and G share a constant; `pi` is 1 where a trace is zero. The Cholesky factors are taken with the
    damping of the step of their refresh: a changed damping is seen at the next refresh only.

    Example:
        >>> import torch
        >>> basis, tau = KfacInverse(), 0.04
        >>> matrices = {"A": torch.eye(3), "G": torch.eye(2)}
        >>> context = FactorContext(damping=tau, mean_diagonal={k: linalg.mean_diagonal(m) for k, m in matrices.items()})
        >>> decomposition = {name: basis.decompose(name, matrix, context) for name, matrix in matrices.items()}
        >>> basis.precondition(torch.ones(2, 3), decomposition, {}, tau)[0, 0]  # 1 / 1.2**2
        tensor(0.6944)

    References:
        Martens & Grosse 2015, arXiv:1503.05671, sections 4.2 and 6.3.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"A", "G"})
    laws: ClassVar[frozenset[str]] = frozenset(
        {"rotation-equivariant", "null-space-independent", "exact-when-kronecker"}
    )

    moments_from: ClassVar[str | None] = None
    moment_decay: ClassVar[float] = 0.0

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Cholesky factor of the damped matrix, `{"cholesky": [..., n, n]}`, lower triangular: of A / pi, and of pi G.

        So both are as large as the root of F, and what lies between one division and the next stays between V and P V.
        """
        mean_a, mean_g = context.mean_diagonal["A"], context.mean_diagonal["G"]
        pi = linalg.tikhonov_pi(mean_a, mean_g)
        root = context.damping**0.5
        shift = pi * root if name == "A" else root / pi
        shift = torch.maximum(shift, linalg.damping_floor(context.mean_diagonal[name]))
        balance = pi.rsqrt() if name == "A" else pi.sqrt()
        return {"cholesky": linalg.cholesky(matrix, shift).mul_(balance[..., None, None])}

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        """None."""
        return {}

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        """None."""
        return {}

    def transport(
        self, moments: Tensors, old: Decomposition, new: Decomposition
    ) -> dict[str, Tensor]:
        """Nothing to carry."""
        return {}

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        """`G^-1 V A^-1` with the damped factors; `gradient` is `[..., d_out, d_in]`."""
        lower_a = decomposition["A"]["cholesky"].to(gradient.dtype)
        lower_g = decomposition["G"]["cholesky"].to(gradient.dtype)
        half = torch.cholesky_solve(gradient, lower_g)
        return torch.cholesky_solve(half.transpose(-1, -2), lower_a).transpose(-1, -2)

    def product(
        self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors
    ) -> Tensor:
        """`F vec(V) = vec(G V A)`, undamped."""
        return matrices["G"].to(vector.dtype) @ vector @ matrices["A"].to(vector.dtype)

    def condition(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Tensor:
        """Lower bound of the damped curvature's condition number, from the diagonals of the Cholesky factors."""
        ratio = torch.ones(())
        for parts in decomposition.values():
            diagonal = parts["cholesky"].diagonal(dim1=-2, dim2=-1)
            ratio = ratio.to(diagonal) * (diagonal.amax(-1) / diagonal.amin(-1)).square().max()
        return ratio


@hookimpl
def kfactk_bases() -> dict[str, type[KfacInverse]]:
    """Provide `kfac`."""
    return {"kfac": KfacInverse}
