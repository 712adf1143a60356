"""Bases: how matrices are decomposed, and the operator that the result makes."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import attrs
from torch import Tensor

from kfactk.operators import CurvatureOperator
from kfactk.samples import Samples, Statistic
from kfactk.stages.layer import Tensors

Decomposition = Mapping[str, Tensors]
"""For the name of each factor, what `Basis.decompose` made of it."""

WAIVABLE: Mapping[str, str] = MappingProxyType(
    {
        "linear": "solve is linear",
        "self-adjoint": "solve is self-adjoint",
        "damped-inverse": "solve is (F + damping I)^-1",
        "fisher": "there is an F, with multiply and condition",
    }
)
"""Laws that a basis may waive, by name, each with what it says."""


@attrs.frozen(eq=False)
class FactorContext:
    """What `Basis.decompose` may know besides the matrix it decomposes.

    Args:
        damping: The layer's damping tau.
        mean_diagonal: `trace / dimension` of each square matrix that the basis requires, `[...]`;
            of A, G, L and R also where a diagonal or blocks stand for it.
        previous: The matrix's decomposition at the last refresh, where it is on this rank.
        beside: The matrices that `Basis.beside` names for this one, or what stands for them.
        previous_beside: Of those that are decomposed too, their decompositions at the last refresh,
            by name.
    """

    damping: float
    mean_diagonal: Tensors
    previous: Tensors | None = None
    beside: Tensors = MappingProxyType({})
    previous_beside: Decomposition = MappingProxyType({})


class Basis(abc.ABC):
    """How the assembled matrices are decomposed, and the operator that the result makes.

    An author writes `requires`, `decompose` and `operator`; the rest has defaults. The laws of the
    operator stand at `kfactk.CurvatureOperator`. Where damping is seen at the refresh only, they
    hold for the damping of the refresh.
    """

    takes_stand_ins: ClassVar[bool] = False
    """Whether it treats what a curvature has in place of wide matrices (`Curvature.stand_ins`).
    `decompose` and `operator` are then given these under their own names."""

    @property
    @abc.abstractmethod
    def requires(self) -> frozenset[str]:
        """Names of the matrices that it decomposes; a class attribute or a property."""

    @property
    def beside(self) -> Mapping[str, tuple[str, ...]]:
        """For a matrix of `requires`, other ones that its decomposition reads; by default none.

        `FactorContext.beside` has them. Those outside `requires` are averaged and kept, but nobody
        decomposes them by themselves. Those of `requires` make the sides of a layer need each
        other: `FactorContext.previous_beside` has their last decompositions. The ranks that
        decompose such a layer decompose all its matrices.
        """
        return {}

    @property
    def follows(self) -> bool:
        """Whether decompositions must go on from the last ones; by default where sides do so.

        The ranks that decompose a layer are then among those that keep the results, since they
        precondition its gradient. Otherwise `FactorContext.previous` may be `None` on some ranks.
        """
        return any(self.requires.intersection(names) for names in self.beside.values())

    @property
    def reads(self) -> frozenset[str]:
        """Names of all matrices that it needs from the curvature. Do not replace it."""
        return self.requires.union(*self.beside.values())

    @property
    def measured_by(self) -> str:
        """What to paste for a curvature that provides what it reads; "" for the list of stages."""
        return ""

    @property
    def laws(self) -> frozenset[str]:
        """Further laws it claims; `kfactk.testing.BasisLaws` tests those claimed.

        - "rotation-equivariant": in other orthonormal coordinates of inputs and outputs, `solve` is
          the same operator.
        - "null-space-independent": it does not depend on which eigenvectors span the null space of
          A or G.
        - "closer-than-kfac": on the mini-batch it was measured on, F is at least as close to the
          Fisher matrix, in the Frobenius norm, as `A kron G`. Where the basis requires C,
          `C kron K` or `C kron I_taps` stands for A; where it requires a, `diag(a)` does.
        - "exact-when-kronecker": for one example with T = 1, F is the Fisher matrix.
        """
        return frozenset()

    @property
    def waives(self) -> frozenset[str]:
        """Laws of every basis that its operator does not obey, by name (`WAIVABLE`).

        Stages that need one of them are refused in a recipe with the basis.
        """
        return frozenset()

    def unsupported(self, shape: tuple[int, ...]) -> str | None:
        """Return why it cannot treat layers whose matrix has this shape, or `None` when it can."""
        return None

    @property
    def moments_from(self) -> str | None:
        """Where moments come from: "samples" (Fisher pass) or "gradient" (the user's own gradient).

        `None` for a basis without moments.
        """
        return None

    @property
    def damped_at(self) -> str:
        """Where damping enters: "solve", so that a changed one acts at once, or the "refresh".

        "never" where it has no part; `build` then warns of a damping.
        """
        return "solve"

    @property
    def moment_decay(self) -> float:
        """Decay of the running mean of the moments, in [0, 1]; 0 keeps the last mini-batch's."""
        return 0.0

    @property
    def forms(self) -> Mapping[str, str]:
        """What parts of a decomposition and moments are, by name; a damaged state is known by it.

        - "eigenvalues": `[..., n]` of a matrix `[..., n, n]`, none negative. Of a diagonal, such as
          a, they have its shape.
        - "eigenvectors": `[..., n, n]`, orthonormal columns.
        - "cholesky": `[..., n, n]`, lower triangular, the diagonal positive.
        - "inverse": `[..., n, n]`, symmetric positive semi-definite, made by a Cholesky factor.
        - "diagonal": of the shape of the layer's matrix, none negative.
        - "root": of the matrix's shape, invertible.
        - "lower", "upper": `[..., n, n]`, triangular, no zero on the diagonal.
        - "correlations": `[..., n]`, in [-1, 1].
        - "contraction": `[..., n, n]`, no row longer than 1.
        - "count": `[..., 1]` of a vector, a whole number from 1 on.
        - "matrix": of the matrix's shape.

        Saved tensors are checked when they are loaded. What has no form must be finite only; its
        shape is not known then, and a file with another one fails in a step. So give each part one.
        """
        return {}

    @abc.abstractmethod
    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Decompose one matrix.

        Args:
            name: Which of `requires` it is.
            matrix: `[..., n, n]`, or whatever the curvature assembles under this name.
            context: What couples it to the layer's other matrices and to the last refresh.

        Raises:
            DecompositionError: It cannot be decomposed. The last good decomposition stays in use.
        """

    def shapes(self, name: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of parts of a decomposition that a corner of the matrix does not tell.

        By default there are none: a part has sides of the matrix, or fixed ones. What layers will
        take is told without numbers, from the decompositions of small corners.

        Args:
            name: Which of `requires` it is.
            shape: Shape of the matrix.
        """
        return {}

    @abc.abstractmethod
    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return F of the layer as an operator.

        The framework keeps the operator until the next refresh or another damping. What it holds
        counts as memory of the optimizer. The tensors given do not change while it is in use.

        Args:
            decomposition: What `decompose` made of each matrix.
            moments: Averaged moments; empty before the first batch was measured.
            damping: tau.
            matrices: The averaged matrices, each made when it is read, on ranks that keep factors.
                Read them in `multiply` alone, and only where the decomposition does not tell F.
        """

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        """Return moments of the per-example gradients, in the basis."""
        return {}

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        """Return moments of the mini-batch mean gradient.

        Args:
            decomposition: What `decompose` made of each matrix.
            gradient: `[..., d_out, d_in]`.
            num_terms: Number of likelihood terms that it is the mean over.
        """
        return {}

    def coordinates(self, decomposition: Decomposition, v: Tensor) -> Tensor | None:
        """Return a matrix in the coordinates that `gradient_moments` and `solve` turn it into.

        `None`, the default, for a basis that has no such coordinates. They are linear in the
        matrix. Where there are some, the framework calls `coordinate_moments` in place of
        `gradient_moments`, and with a first moment `CurvatureOperator.solve_coordinates` in place
        of `solve`. Each gradient is then turned once.

        Args:
            decomposition: What `decompose` made of each matrix.
            v: `[..., d_out, d_in]`.

        Returns:
            Coefficients of the shape of `v`.
        """
        return None

    def coordinate_moments(
        self, decomposition: Decomposition, coordinates: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        """Return `gradient_moments` of a gradient that is given by its `coordinates`."""
        raise NotImplementedError

    def weighed(self, decomposition: Decomposition, gradient: Tensor) -> Tensors:
        """Return what statistics of the mini-batch gradient are taken of; by default it, as it is.

        For curvatures of gradients alone. It lets the statistic of one side be weighed by what the
        other side was decomposed into. A basis with it names those sides in `beside`.

        Args:
            decomposition: What `decompose` made of each matrix at the last refresh; empty before.
            gradient: `[..., d_out, d_in]`.

        Returns:
            By the name of a matrix of `requires`, what takes the place of the gradient in its
            statistic, or in those of what stands for it; of the gradient's shape.
        """
        return {}

    def transport(
        self, moments: Tensors, old: Decomposition, new: Decomposition
    ) -> dict[str, Tensor]:
        """Carry moments from the old basis to the new one; those left out are reset."""
        return {}
