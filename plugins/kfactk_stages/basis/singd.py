"""The basis of SINGD: roots of the damped inverses, which follow the factors by products."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import attrs
import torch
from torch import Tensor

from kfactk import (
    Basis,
    CurvatureOperator,
    Decomposition,
    FactorContext,
    OptionError,
    Tensors,
    hookimpl,
    linalg,
)
from kfactk.options import choice, number, whole
from kfactk_stages.basis import _roots
from kfactk_stages.basis.kfac import KfacOperator

OTHER = MappingProxyType({"A": "G", "G": "A"})
"""For each side the other one."""


@attrs.frozen
class Singd(Basis):
    """Roots K and C of the inverses, which each refresh improves by matrix products alone.

        P V = C C^T  V  K K^T
        S = (K^T (w A + s I) K - I) / 2,    m <- momentum m + S,    K <- K (I - step m)

    C follows G likewise. With `variant="ikfac"` each side follows its own factor, under K-FAC's
    factored damping: `w = 1 / pi` and `s = sqrt(tau)` for A, and pi for G. With `variant="ingd"`
    each side needs the other:

        w = tr(C^T G C) / d_out,    s = tau tr(C^T C) / d_out

    and for C the same traces of K and A. So the damping is that of the whole block: where both
    sides stand still, `C C^T kron K K^T` is the Kronecker product that comes closest to
    `(A kron G + tau I)^-1` in the Kullback-Leibler divergence of normal distributions.

    The first refresh starts at the exact root of K-FAC's damped factors, by one Cholesky
    factorisation a side; later ones factor and invert nothing. So it starts as the basis `kfac`,
    and lags behind while A and G change. With `structure="dense"`, `step=1`, `momentum=0` and
    "ikfac" a refresh is a Newton-Schulz step.

    Where A and G are sums over the last mini-batch alone (`factor_decay=0`), K itself is the mean
    over time, with `step` as weight, as in the papers. A damping changed by a schedule acts at the
    next refresh, step by step too. A layer whose roots are lost starts anew.

    Args:
        variant: "ikfac" or "ingd".
        structure: Form of K and C, which they keep. "dense"; "lower" or "upper": triangular, where
            m is the triangle of S with the numbers off the diagonal doubled; "blocks": blocks along
            the diagonal; "diagonal": n numbers a side. The last two follow the blocks and the
            diagonals of A and G.
        block: Side of a block.
        step: Step size, in (0, 1].
        momentum: Decay of m, in [0, 1).
        limit: Largest norm of `step m`, in (0, 1). A longer m is shortened to it, and K stays
            invertible: as where a factor grew by much since the last refresh.

    Raises:
        OptionError: An option has a value that cannot work, or the roots would swing for ever.

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
    follows = True

    structure: str = attrs.field(default="dense", validator=choice(*_roots.STRUCTURES))
    step: float = attrs.field(default=0.5, validator=number(0, 1, low_open=True))
    momentum: float = attrs.field(default=0.0, validator=number(0, 1, high_open=True))
    limit: float = attrs.field(default=0.9, validator=number(0, 1, low_open=True, high_open=True))
    variant: str = attrs.field(default="ikfac", validator=choice("ikfac", "ingd"))
    block: int = attrs.field(default=32, validator=whole(1))

    def __attrs_post_init__(self) -> None:
        if self.block != attrs.fields(Singd).block.default and self.structure != "blocks":
            raise OptionError(
                f"Singd: block={self.block} is the side of a block, and has no effect with "
                f"structure={self.structure!r}. Leave block out, or give structure='blocks'."
            )
        if self.variant == "ingd" and self.step >= 1 + self.momentum:
            raise OptionError(
                f"Singd: with variant='ingd' both sides correct the scale that they share, so that "
                f"step={self.step:g} swings from one side of it to the other and never ends. Use "
                "step=0.5."
            )

    @property
    def beside(self) -> Mapping[str, tuple[str, ...]]:
        """With "ingd", for each side the other one."""
        if self.variant == "ikfac":
            return {}
        return {name: (other,) for name, other in OTHER.items()}

    @property
    def forms(self) -> Mapping[str, str]:
        """Those of whole matrices; diagonals and blocks have other shapes, which have no form."""
        if self.structure in ("diagonal", "blocks"):
            return {}
        triangular = self.structure in ("lower", "upper")
        return {"root": self.structure if triangular else "root", "m": "matrix"}

    @property
    def laws(self) -> frozenset[str]:
        """Diagonals and blocks depend on the coordinates in a null space."""
        exact = frozenset({"exact-when-kronecker"})
        cut = self.structure in ("diagonal", "blocks")
        return exact if cut else exact | {"null-space-independent"}

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return the root and m, each stored as `_roots` says.

        That is `[..., n, n]`; `[..., n]` of a diagonal, `[..., count, size, size]` of blocks.

        Raises:
            DecompositionError: A matrix holds NaN or inf, or the first one cannot be factored, or
                the root is no longer finite.
        """
        for each in (matrix, *context.beside.values()):
            linalg.check_finite(each)
        n, form = matrix.shape[-1], self.structure
        seen = _roots.stored(matrix, form, self.block)
        last, other = context.previous, context.previous_beside.get(OTHER[name])
        alone = self.variant == "ikfac"
        if last is None or last["root"].shape != seen.shape or not (alone or other):
            weight, shift = self._factored(name, context)
            root = _roots.start(_times(weight, seen, matrix), shift, form, n)
            return {"root": root, "m": torch.zeros_like(root)}
        if alone or other is None:
            weight, shift = self._factored(name, context)
        else:
            weight, shift = self._joint(name, other["root"].to(matrix), context)
        root = last["root"].to(matrix)
        slope = _roots.slope(root, _times(weight, seen, matrix), shift, form, n)
        m = self.momentum * last["m"].to(matrix) + slope
        m = _roots.shortened(m, self.limit / self.step, form)
        root = _roots.moved(root, m, self.step, form)
        linalg.check_finite(root)
        return {"root": root, "m": m}

    def shapes(self, name: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of blocks: how many there are follows from the whole matrix."""
        if self.structure != "blocks":
            return {}
        size = min(self.block, shape[-1])
        blocks = (*shape[:-2], -(-shape[-1] // size), size, size)
        return {"root": blocks, "m": blocks}

    def _factored(self, name: str, context: FactorContext) -> tuple[Tensor, Tensor]:
        """Return w and s of K-FAC's factored damping, `[...]`."""
        means = context.mean_diagonal
        balance, least = linalg.balanced_sides(means["A"], means["G"])[name]
        return balance, least.clamp(min=context.damping**0.5)

    def _joint(self, name: str, root: Tensor, context: FactorContext) -> tuple[Tensor, Tensor]:
        """Return w and s by the root of the other side and its factor, `[...]`."""
        matrix = context.beside[OTHER[name]]
        n, form = matrix.shape[-1], self.structure
        weight = _roots.mean_square(root, _roots.stored(matrix, form, self.block), form, n)
        shift = context.damping * _roots.mean_square(root, None, form, n)
        return weight, shift.maximum(linalg.damping_floor(context.mean_diagonal[name] * weight))

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return `A kron G`, which solves with the roots of the last refresh."""
        return SingdOperator(decomposition, matrices, self.structure)


@attrs.define(eq=False)
class SingdOperator(KfacOperator):
    """`F vec(V) = vec(G V A)`, whose `solve` knows the roots K and C only.

    Args:
        decomposition: The roots; `solve` and `condition` read them.
        matrices: A and G; `multiply` reads them.
        structure: Form of the roots.
    """

    structure: str

    def solve(self, v: Tensor) -> Tensor:
        """Return `C C^T v K K^T`."""
        right, left = (self.decomposition[name]["root"] for name in ("A", "G"))
        inside = _roots.times_inverse(v, right, self.structure)
        return _roots.times_inverse(inside.mT, left, self.structure).mT

    def condition(self) -> Tensor:
        """Return a lower bound, by the diagonals of `K K^T` and `C C^T`, of the worst group."""
        right, left = (
            _roots.condition(self.decomposition[name]["root"], self.structure)
            for name in ("A", "G")
        )
        return (right * left).max()


def _times(weight: Tensor, seen: Tensor, matrix: Tensor) -> Tensor:
    """Return a matrix as it is stored, times a number `[...]` for each group."""
    return seen * weight.reshape(*weight.shape, *[1] * (seen.ndim - matrix.ndim + 2))


@hookimpl
def kfactk_bases() -> dict[str, type[Singd]]:
    """Provide `singd`."""
    return {"singd": Singd}
