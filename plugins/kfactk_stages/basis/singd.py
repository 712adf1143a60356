"""The basis of inverse-free K-FAC: roots of the damped inverses that follow the factors."""

from __future__ import annotations

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
from kfactk.options import choice, number
from kfactk_stages.basis.kfac import KfacOperator


@attrs.frozen
class Singd(Basis):
    """Roots K and C of the inverses, which each refresh improves by matrix products alone.

        P V = C C^T  V  K K^T
        S = (K^T (A / pi + sqrt(tau) I) K - I) / 2,    m <- momentum m + S,    K <- K (I - step m)

    C follows `pi G + sqrt(tau) I` likewise. This is the variant IKFAC, with K-FAC's factored
    damping. The first refresh starts at the exact root, by one Cholesky factorisation a side; later
    ones factor and invert nothing. So it starts as the basis `kfac`, and lags behind it while A and
    G change; while they stand still, the structures that are not diagonal come back to it. With
    `structure="dense"`, `step=1` and `momentum=0` a refresh is a Newton-Schulz step.

    Where A and G are sums over the last mini-batch alone (`factor_decay=0`), K itself is the mean
    over time, with `step` as weight, as in the papers. A damping changed by a schedule acts at the
    next refresh, step by step too. Where a rank has no last root of a side, as one that a side was
    moved to, it starts anew.

    Args:
        structure: Form of K and C, which they keep. "dense"; "lower" or "upper": triangular, where
            m is the triangle of S with the numbers off the diagonal doubled; "diagonal": n numbers
            a side, which follow the diagonals of A and G.
        step: Step size, in (0, 1].
        momentum: Decay of m, in [0, 1).
        limit: Largest norm of `step m`, in (0, 1). A longer step is shortened to it, and K stays
            invertible: as where a factor grew by much since the last refresh.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> basis, tau = Singd(step=1.0), 0.04
        >>> matrices = {"A": torch.eye(3), "G": torch.eye(2)}
        >>> context = FactorContext(tau, {k: linalg.mean_diagonal(m) for k, m in matrices.items()})
        >>> parts = {name: basis.decompose(name, m, context) for name, m in matrices.items()}
        >>> operator = basis.operator(parts, {}, tau, matrices)
        >>> operator.solve(torch.ones(2, 3))[0, 0]  # 1 / 1.2**2
        tensor(0.6944)

    References:
        Lin et al. 2023, "Simplifying Momentum-based Positive-definite Submanifold Optimization with
        Applications to Deep Learning", arXiv:2302.09738.
        Lin et al. 2024, "Structured Inverse-Free Natural Gradient: Memory-Efficient &
        Numerically-Stable KFAC", arXiv:2312.05705.

    The formulas were compared with the authors' public code, not with the text of the papers.
    """

    requires = frozenset({"A", "G"})
    waives = frozenset({"damped-inverse"})
    damped_at = "refresh"

    structure: str = attrs.field(
        default="dense", validator=choice("dense", "lower", "upper", "diagonal")
    )
    step: float = attrs.field(default=0.5, validator=number(0, 1, low_open=True))
    momentum: float = attrs.field(default=0.0, validator=number(0, 1, high_open=True))
    limit: float = attrs.field(default=0.9, validator=number(0, 1, low_open=True, high_open=True))

    @property
    def laws(self) -> frozenset[str]:
        """Diagonals depend on the coordinates in a null space."""
        exact = frozenset({"exact-when-kronecker"})
        return exact if self.structure == "diagonal" else exact | {"null-space-independent"}

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return the root and m, `[..., n, n]`; of a diagonal structure `[..., n]`.

        Raises:
            DecompositionError: The matrix holds NaN or inf, or the first one cannot be factored, or
                the root is no longer finite.
        """
        linalg.check_finite(matrix)
        balance, least = linalg.balanced_sides(
            context.mean_diagonal["A"], context.mean_diagonal["G"]
        )[name]
        shift = least.clamp(min=context.damping**0.5)
        target = matrix * balance[..., None, None]
        if self.structure == "diagonal":
            target = target.diagonal(dim1=-2, dim2=-1).clamp(min=0) + shift[..., None]
        last = context.previous
        if last is None or last["root"].shape != target.shape:
            root = self._start(target, shift)
            return {"root": root, "m": torch.zeros_like(root)}
        if self.structure != "diagonal":
            target = linalg.add_diagonal(linalg.symmetrise(target), shift)
        root, m = self._followed(target, last["root"].to(matrix), last["m"].to(matrix))
        linalg.check_finite(root)
        return {"root": root, "m": m}

    def _start(self, target: Tensor, shift: Tensor) -> Tensor:
        """Return K with `K K^T = (M + shift I)^-1`, in its structure."""
        if self.structure == "diagonal":
            return target.rsqrt()
        if self.structure == "lower":
            return _upper_root(target.flip(-1, -2), shift).flip(-1, -2)
        return _upper_root(target, shift)

    def _followed(self, target: Tensor, root: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and m after one step towards the root of the inverse of `target`."""
        if self.structure == "diagonal":
            m = self.momentum * m + (root.square() * target - 1) / 2
            return root * (1 - self._step(m.abs().amax(-1))[..., None] * m), m
        slope = linalg.add_diagonal(linalg.symmetrise(root.mT @ target @ root), -1.0) / 2
        m = self.momentum * m + _projected(slope, self.structure)
        return root - self._step(_norm(m))[..., None, None] * (root @ m), m

    def _step(self, norm: Tensor) -> Tensor:
        """Return the step size, shortened so that it times the norm is no more than the limit."""
        return self.step / (self.step * norm / self.limit).clamp(min=1)

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return `A kron G`, which solves with the roots of the last refresh."""
        return SingdOperator(decomposition, matrices, self.structure == "diagonal")


@attrs.define(eq=False)
class SingdOperator(KfacOperator):
    """`F vec(V) = vec(G V A)`, whose `solve` knows the roots K and C only.

    Args:
        decomposition: The roots; `solve` and `condition` read them.
        matrices: A and G; `multiply` reads them.
        diagonal: Whether the roots are diagonals.
    """

    diagonal: bool

    def solve(self, v: Tensor) -> Tensor:
        """Return `C C^T v K K^T`."""
        right, left = (self.decomposition[name]["root"].to(v.dtype) for name in ("A", "G"))
        if self.diagonal:
            return left.square().unsqueeze(-1) * v * right.square().unsqueeze(-2)
        return left @ (left.mT @ v @ right) @ right.mT

    def condition(self) -> Tensor:
        """Return a lower bound, by the diagonals of `K K^T` and `C C^T`, of the worst group."""
        ratios = []
        for name in ("A", "G"):
            values = self.decomposition[name]["root"].square()
            values = values if self.diagonal else values.sum(-1)
            ratios.append(values.amax(-1) / values.amin(-1))
        return (ratios[0] * ratios[1]).max()


def _upper_root(matrix: Tensor, shift: Tensor) -> Tensor:
    """Return the upper triangular K with `K K^T = (M + shift I)^-1`."""
    lower = linalg.cholesky(matrix, shift)
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.mT.contiguous()


def _projected(slope: Tensor, structure: str) -> Tensor:
    """Return what changes K K^T to first order as `slope` does, in the structure of K."""
    if structure == "lower":
        return slope.tril() + slope.tril(-1)
    if structure == "upper":
        return slope.triu() + slope.triu(1)
    return slope


def _norm(m: Tensor) -> Tensor:
    """Return an upper bound of the spectral norm, `[...]`."""
    size = m.abs()
    return (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt().minimum(m.norm(dim=(-2, -1)))


@hookimpl
def kfactk_bases() -> dict[str, type[Singd]]:
    """Provide `singd`."""
    return {"singd": Singd}
