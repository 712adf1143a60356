"""Bases with one fault each, and a curvature with its basis as an outside author may write them."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import (
    Basis,
    CurvatureOperator,
    Decomposition,
    DecompositionError,
    FactorContext,
    Samples,
    SpectralOperator,
    Statistic,
    Tensors,
)
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.basis.soap import Soap
from kfactk_stages.curvature.kfac import Kfac

Parts = dict[str, Tensor]


@attrs.frozen(kw_only=True)
class DiagonalFisher(Kfac):
    """`E[D_n^2]`, entry by entry; its matrix is neither A nor G, nor square."""

    provides: ClassVar[frozenset[str]] = frozenset({"square"})

    def input_factors(self, layer: Any, samples: Samples) -> dict[str, Statistic]:
        return {}

    def gradient_factors(self, layer: Any, samples: Samples) -> dict[str, Statistic]:
        return {"square": samples.projected_square(None, None)}


@attrs.frozen
class DiagonalInverse(Basis):
    """`V / (E[D^2] + tau)`."""

    requires = frozenset({"square"})

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        if not bool(torch.isfinite(matrix).all()):
            raise DecompositionError(f"the factor {name!r} holds NaN or inf; it was not taken")
        return {"diagonal": matrix}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        return SpectralOperator(decomposition["square"]["diagonal"], damping)


class Strange(DiagonalInverse):
    """Requires what there is not."""

    requires = frozenset({"strange"})


class WithoutFloor(SpectralOperator):
    def _tau(self) -> Tensor:
        return torch.full_like(self.spectrum[..., :1, :1], self.damping)


class Plain(DiagonalInverse):
    """As one would write it at first."""

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        return {"diagonal": matrix}

    def operator(self, decomposition, moments, damping, matrices):
        return WithoutFloor(decomposition["square"]["diagonal"], damping)


@attrs.define(eq=False)
class Changed(CurvatureOperator):
    """Another operator with some of its methods replaced.

    Args:
        right: The other operator.
        methods: By name; each takes the other operator and what the method takes.
    """

    right: CurvatureOperator
    methods: dict[str, Any]

    def solve(self, v: Tensor) -> Tensor:
        return self._of("solve", v)

    def multiply(self, v: Tensor) -> Tensor:
        return self._of("multiply", v)

    def condition(self) -> Tensor:
        return self._of("condition")

    def _of(self, name: str, *given: Any) -> Tensor:
        if name in self.methods:
            return self.methods[name](self.right, *given)
        return getattr(self.right, name)(*given)


def changing(base: type = Ekfac, **methods: Any) -> type:
    """Return a basis whose operators have these methods."""

    def operator(self, *given):
        return Changed(base.operator(self, *given), methods)

    return type("Changing", (base,), {"operator": operator})


class Twice(Ekfac):
    """Twice the step."""

    operator = changing(solve=lambda right, v: 2 * right.solve(v)).operator


class Undamped(Ekfac):
    """A damping of its own in place of the recipe's."""

    def operator(self, decomposition, moments, damping, matrices):
        return super().operator(decomposition, moments, 0.5, matrices)


class Denying(Ekfac):
    """A damping that it says it has not."""

    damped_at = "never"


class Normalised(Ekfac):
    """A step whose length does not grow with the gradient."""

    operator = changing(solve=lambda right, v: right.solve(v / v.norm())).operator


class Uphill(Ekfac):
    """The opposite step."""

    operator = changing(solve=lambda right, v: -right.solve(v)).operator


class OneWay(Ekfac):
    """Into the basis and not all the way back."""

    operator = changing(solve=lambda right, v: right.to_basis(right.solve(v))).operator


class Transposed(Ekfac):
    """Projects with the transposes."""

    def operator(self, decomposition, moments, damping, matrices):
        parts = {
            name: {**each, "eigenvectors": each["eigenvectors"].mT}
            for name, each in decomposition.items()
        }
        wrong = super().operator(parts, moments, damping, matrices)
        right = super().operator(decomposition, moments, damping, matrices)
        return Changed(right, {"solve": lambda right, v: wrong.solve(v)})


class Shifted(Ekfac):
    """A product with something added."""

    operator = changing(multiply=lambda right, v: right.multiply(v) + 1).operator


class Indefinite(Ekfac):
    """A product that is minus what it should be."""

    operator = changing(multiply=lambda right, v: -right.multiply(v)).operator


class Lopsided(KfacInverse):
    """A product on one side only, from a matrix that is not symmetric."""

    operator = changing(
        KfacInverse, multiply=lambda right, v: v @ right.matrices["A"].tril()
    ).operator


class Boasting(Ekfac):
    """A condition number above the true one."""

    operator = changing(condition=lambda right: 2 * right.condition()).operator


class ByGroup(Ekfac):
    """One condition number a group, or an odd shape."""

    operator = changing(condition=lambda right: right.condition().reshape(1)).operator


class Bare(Ekfac):
    """No floor under the damping."""

    def operator(self, *given):
        def solve(right, v):
            return right.from_basis(right.to_basis(v) / (right.spectrum + right.damping))

        return Changed(super().operator(*given), {"solve": solve})


class Overflowing(Ekfac):
    """Leaves the range of float32 on its way."""

    operator = changing(solve=lambda right, v: right.solve(v * 1e35) / 1e35).operator


@attrs.define(eq=False)
class InBasisOf(SpectralOperator):
    """An operator in the basis of another one."""

    right: SpectralOperator

    def to_basis(self, v: Tensor) -> Tensor:
        return self.right.to_basis(v)

    def from_basis(self, coefficients: Tensor) -> Tensor:
        return self.right.from_basis(coefficients)


class TwiceAsMuch(InBasisOf):
    def multiply(self, v: Tensor) -> Tensor:
        return 2 * super().multiply(v)


class Repeating(InBasisOf):
    def function(self, f: Any, v: Tensor) -> Tensor:
        return self.from_basis(f(f(self.spectrum)) * self.to_basis(v))


class Misjudging(Ekfac):
    """A spectrum that is half that of its matrix."""

    def operator(self, *given):
        found = super().operator(*given)
        return TwiceAsMuch(found.spectrum, found.damping, found)


class Rooting(Ekfac):
    """A function that is applied twice."""

    def operator(self, *given):
        found = super().operator(*given)
        return Repeating(found.spectrum, found.damping, found)


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


class Misstating(Ekfac):
    """Eigenvectors that are said to be triangular."""

    @property
    def forms(self) -> dict[str, str]:
        return {"eigenvectors": "cholesky"}


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

    operator = changing(
        solve=lambda right, v: (
            right.solve(v).mean(0, keepdim=True).expand_as(v) if v.ndim > 2 else right.solve(v)
        )
    ).operator


class Scribbling(Ekfac):
    """Adds the damping in place."""

    def operator(self, decomposition, moments, damping, matrices):
        if "scale" in moments:
            moments["scale"].add_(damping)
        return super().operator(decomposition, moments, 0.0, matrices)


class Narrow(Ekfac):
    """In the precision of its state."""

    operator = changing(solve=lambda right, v: right.solve(v.to(right.spectrum.dtype))).operator


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
        return super().decompose(name, diagonal(matrix), context)

    def operator(self, decomposition, moments, damping, matrices):
        diagonals = {name: diagonal(matrices[name]) for name in ("A", "G")}
        return super().operator(decomposition, moments, damping, diagonals)


def diagonal(matrix: Tensor) -> Tensor:
    return torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


class Doubling(KfacInverse):
    """An operator whose step grows each time it is used."""

    def operator(self, *given):
        used = []

        def solve(right, v):
            used.append(1)
            return len(used) * right.solve(v)

        return Changed(super().operator(*given), {"solve": solve})


class Wandering(KfacInverse):
    """Each decomposition adds to the last one."""

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> Parts:
        found, last = super().decompose(name, matrix, context), context.previous
        return found if last is None else {"cholesky": last["cholesky"] + found["cholesky"]}


class Further(Ekfac):
    """The running scale, claimed to be as close to the Fisher matrix as K-FAC."""

    laws = frozenset({"closer-than-kfac"})


class Unknown(Ekfac):
    """A claim nobody knows."""

    laws = frozenset({"rotation-equivarient"})


class Claiming(DiagonalInverse):
    """Claims what is said of A and G."""

    laws = frozenset({"rotation-equivariant", "null-space-independent", "closer-than-kfac"})


class Unturned(Soap):
    """Takes the matrix itself for its coordinates."""

    def coordinates(self, decomposition: Decomposition, v: Tensor) -> Tensor | None:
        return v


class Displaced(Soap):
    """Has coordinates that are not zero for zero."""

    def coordinates(self, decomposition: Decomposition, v: Tensor) -> Tensor | None:
        return v + 1


class Miscounting(Soap):
    """Measures the coordinates otherwise than the gradient."""

    def coordinate_moments(
        self, decomposition: Decomposition, coordinates: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        return {"square": Statistic(coordinates.abs(), 1.0)}

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        turned = self.coordinates(decomposition, gradient)
        return {"square": Statistic(gradient if turned is None else turned.square(), 1.0)}
