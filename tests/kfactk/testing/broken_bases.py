"""Bases with one fault each, and a stranger's pair of a curvature and a basis without any."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import (
    Decomposition,
    DecompositionError,
    FactorContext,
    Samples,
    Statistic,
    Tensors,
    linalg,
    project,
)
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.kfac import Kfac

Parts = dict[str, Tensor]


@attrs.frozen(kw_only=True)
class DiagonalFisher(Kfac):
    """A stranger's curvature: `E[D_n^2]`, entry by entry; its matrix is neither A nor G, nor square."""

    provides: ClassVar[frozenset[str]] = frozenset({"square"})

    def factors(self, layer: Any, samples: Samples) -> dict[str, Statistic]:
        return {"square": samples.projected_square(None, None)}

    def assemble(self, layer: Any, factors: Tensors) -> dict[str, Tensor]:
        return dict(factors)


@attrs.frozen
class DiagonalInverse:
    """A stranger's basis: `V / (E[D^2] + tau)`."""

    requires: ClassVar[frozenset[str]] = frozenset({"square"})
    laws: ClassVar[frozenset[str]] = frozenset()
    moments_from: ClassVar[str | None] = None
    moment_decay: ClassVar[float] = 0.0

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        if not bool(torch.isfinite(matrix).all()):
            raise DecompositionError(f"the factor {name!r} holds NaN or inf; it was not taken")
        return {"diagonal": matrix}

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        return {}

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        return {}

    def transport(self, moments: Tensors, old: Decomposition, new: Decomposition) -> Parts:
        return {}

    def damped(self, decomposition: Decomposition, damping: float) -> Tensor:
        diagonal = decomposition["square"]["diagonal"]
        return diagonal + linalg.damping_floor(diagonal.mean((-2, -1), keepdim=True)).clamp(
            min=damping
        )

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        return gradient / self.damped(decomposition, damping)

    def product(
        self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors
    ) -> Tensor:
        return vector * matrices["square"]

    def condition(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Tensor:
        damped = self.damped(decomposition, damping)
        return damped.max() / damped.min()


class Strange(DiagonalInverse):
    """Requires what there is not."""

    requires = frozenset({"strange"})


class Plain(DiagonalInverse):
    """As one would write it at first."""

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        return {"diagonal": matrix}

    def damped(self, decomposition: Decomposition, damping: float) -> Tensor:
        return decomposition["square"]["diagonal"] + damping


class Twice(Ekfac):
    """Twice the step."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        return 2 * super().precondition(gradient, decomposition, moments, damping)


class Normalised(Ekfac):
    """A step whose length does not grow with the gradient."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        return super().precondition(gradient / gradient.norm(), decomposition, moments, damping)


class Uphill(Ekfac):
    """The opposite step."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        return -super().precondition(gradient, decomposition, moments, damping)


class OneWay(Ekfac):
    """Into the basis and not all the way back."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        left, right = decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"]
        return project(super().precondition(gradient, decomposition, moments, damping), left, right)


class Transposed(Ekfac):
    """Projects with the transposes."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        parts = {
            name: {**each, "eigenvectors": each["eigenvectors"].mT}
            for name, each in decomposition.items()
        }
        return super().precondition(gradient, parts, moments, damping)


class Shifted(Ekfac):
    """A product with something added."""

    def product(
        self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors
    ) -> Tensor:
        return super().product(vector, matrices, decomposition, moments) + 1


class Indefinite(Ekfac):
    """A product that is minus what it should be."""

    def product(
        self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors
    ) -> Tensor:
        return -super().product(vector, matrices, decomposition, moments)


class Lopsided(KfacInverse):
    """A product on one side only, from a matrix that is not symmetric."""

    def product(
        self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors
    ) -> Tensor:
        return vector @ matrices["A"].tril()


class Boasting(Ekfac):
    """A condition number above the true one."""

    def condition(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Tensor:
        return 2 * super().condition(decomposition, moments, damping)


class ByGroup(Boasting):
    """One condition number a group, or an odd shape."""

    def condition(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Tensor:
        return super().condition(decomposition, moments, damping).reshape(1)


class Bare(Ekfac):
    """No floor under the damping."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        left, right = decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"]
        values = decomposition["G"]["eigenvalues"].unsqueeze(-1) * decomposition["A"][
            "eigenvalues"
        ].unsqueeze(-2)
        return project(
            project(gradient, left, right) / (moments.get("scale", values) + damping),
            left.mT,
            right.mT,
        )


class Overflowing(Ekfac):
    """Leaves the range of float32 on its way."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        return super().precondition(gradient * 1e35, decomposition, moments, damping) / 1e35


class Absolute(Ekfac):
    """Nothing below an absolute threshold counts."""

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        found = super().decompose(name, matrix, context)
        return {
            **found,
            "eigenvalues": torch.where(found["eigenvalues"] < 1e-5, 0.0, found["eigenvalues"]),
        }

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        found = super().moments(decomposition, samples)["scale"]
        return {"scale": Statistic(torch.where(found.total < 1e-5, 0.0, found.total), found.count)}  # type: ignore[arg-type, operator]


class Patching(Ekfac):
    """Takes a matrix that is not finite for zero."""

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        return super().decompose(name, matrix.nan_to_num(0.0, 0.0, 0.0), context)


class Undeclared(Ekfac):
    """Moments that nobody asks for."""

    moments_from = None


class Silent(KfacInverse):
    """Says that it measures and does not."""

    moments_from = "samples"


class Forever(Ekfac):
    """A decay above 1."""

    moment_decay = 1.5


class Dotted(Ekfac):
    """A name that a checkpoint cannot hold."""

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        found = super().moments(decomposition, samples)
        return {**found, "scale.weight": found["scale"]}


class Sized(Ekfac):
    """Parts whose number depends on the data."""

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        found = super().decompose(name, matrix, context)
        return (
            found
            if float(matrix.abs().max()) == 0
            else {**found, "rank": torch.ones(int(torch.linalg.matrix_rank(matrix).max()))}
        )


class Remembering(Ekfac):
    """Averages with what it decomposed before."""

    last: ClassVar[dict[str, Tensor]] = {}

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        before = self.last.get(name)
        self.last[name] = matrix
        return super().decompose(
            name,
            matrix if before is None or before.shape != matrix.shape else (matrix + before) / 2,
            context,
        )


class Mixing(Ekfac):
    """Groups share their mean."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        found = super().precondition(gradient, decomposition, moments, damping)
        return found.mean(0, keepdim=True).expand_as(found) if found.ndim > 2 else found


class Scribbling(Ekfac):
    """Divides in place."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        if "scale" in moments:
            moments["scale"].add_(damping)
        return super().precondition(gradient, decomposition, moments, 0.0)


class Narrow(Ekfac):
    """In the precision of its state."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        narrow = gradient.to(decomposition["A"]["eigenvalues"].dtype)
        return super().precondition(narrow, decomposition, moments, damping)


class Keeping(Ekfac):
    """Keeps the scale of the old basis in the new one."""

    def transport(self, moments: Tensors, old: Decomposition, new: Decomposition) -> Parts:
        return dict(moments)


class Fading(Ekfac):
    """Loses half of the scale at each refresh."""

    def transport(self, moments: Tensors, old: Decomposition, new: Decomposition) -> Parts:
        return {name: value / 2 for name, value in super().transport(moments, old, new).items()}


class Inventing(Ekfac):
    """Transports what was never measured."""

    def transport(self, moments: Tensors, old: Decomposition, new: Decomposition) -> Parts:
        return super().transport(moments, old, new) or {"scale": torch.ones(())}


class Reset(Ekfac):
    """Leaves every moment out, which is well."""

    def transport(self, moments: Tensors, old: Decomposition, new: Decomposition) -> Parts:
        return {}


class Unpooled(Ekfac):
    """Each direction of a null space has the scale that the eigensolver's choice gives it."""

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        return {
            "scale": samples.projected_square(
                decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"]
            )
        }


class Entrywise(KfacInverse):
    """Only the diagonals of A and G, and claims that the coordinates do not matter."""

    laws = frozenset({"rotation-equivariant", "exact-when-kronecker"})

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        return super().decompose(name, torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)), context)

    def product(
        self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors
    ) -> Tensor:
        a, g = (torch.diag_embed(matrices[name].diagonal(dim1=-2, dim2=-1)) for name in ("A", "G"))
        return g @ vector @ a


class Doubling(KfacInverse):
    """Its operator is not its preconditioner."""

    def operator(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Any:
        return lambda gradient: 2 * self.precondition(gradient, decomposition, moments, damping)


class Wandering(KfacInverse):
    """Each decomposition adds to the last one."""

    def redecompose(
        self, name: str, matrix: Tensor, context: FactorContext, last: Tensors
    ) -> Parts:
        return {"cholesky": last["cholesky"] + self.decompose(name, matrix, context)["cholesky"]}


class Further(Ekfac):
    """The running scale, claimed to be as close to the Fisher matrix as K-FAC."""

    laws = frozenset({"closer-than-kfac"})


class Unknown(Ekfac):
    """A claim nobody knows."""

    laws = frozenset({"rotation-equivarient"})


@attrs.frozen
class Claiming(DiagonalInverse):
    """Claims what is said of A and G."""

    laws: ClassVar[frozenset[str]] = frozenset(
        {"rotation-equivariant", "null-space-independent", "closer-than-kfac"}
    )
