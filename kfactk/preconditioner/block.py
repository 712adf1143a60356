"""Curvature and basis at work on one layer: every call of these two stages is made here, and what they give is checked.

Nothing is kept here; tensors come in and go out. What fails is told with the stage and the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import attrs
import torch
from torch import Tensor

from kfactk.assignment import Work
from kfactk.linalg import mean_diagonal
from kfactk.operators import CurvatureOperator
from kfactk.samples import LayerCall, Samples, Statistic, working
from kfactk.stages import (
    Basis,
    Curvature,
    Decomposition,
    FactorContext,
    Layer,
    Tensors,
)
from kfactk.statistics import prefixed
from kfactk.validation import (
    attribute_errors,
    check_matrices,
    check_parted,
    check_statistics,
    square,
)


@attrs.frozen
class Blocks:
    """The two stages that make a layer's block.

    Args:
        curvature: Its stage.
        basis: Its stage.
    """

    curvature: Curvature
    basis: Basis

    # ------------------------------------------------------------------------------------------------------- curvature

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """The uses of a layer in one pass, as samples."""
        with attribute_errors("curvature", self.curvature, _on(layer)):
            return self.curvature.samples(layer, calls, num_terms=num_terms, first=first)

    def none(self, layer: Layer, num_terms: Tensor | float) -> Samples:
        """No samples of a layer, in a forward of so many likelihood terms."""
        with attribute_errors("curvature", self.curvature, _on(layer)):
            call = self.curvature.blank(layer)
            return self.curvature.samples(
                layer,
                [LayerCall(call.inputs[:0], call.gradient[:0])],
                num_terms=num_terms,
                first=True,
            )

    def factors(
        self, layer: Layer, samples: Samples, *, inputs: bool = True, gradients: bool = True
    ) -> dict[str, Statistic]:
        """Sums and counts of the factors, as "factor.NAME".

        Args:
            layer: The layer.
            samples: What it saw.
            inputs: Whether those made of inputs alone are wanted, of a curvature that parts them.
            gradients: Whether the others are.
        """
        with attribute_errors("curvature", self.curvature, _on(layer)):
            found = self.curvature.input_factors(layer, samples) if inputs else {}
            if gradients:
                found = {**found, **self.curvature.gradient_factors(layer, samples)}
        return prefixed(
            "factor",
            check_statistics("curvature", self.curvature, _on(layer), found, required=True),
        )

    def from_inputs(self, layer: Layer) -> frozenset[str]:
        """Names of the factors made of inputs alone, where the curvature can sum them up apart."""
        samples, _ = self.blank(layer)
        with attribute_errors("curvature", self.curvature, _on(layer)):
            return frozenset(self.curvature.input_factors(layer, samples))

    def matrices(
        self, layer: Layer, factors: Tensors, names: frozenset[str] | None = None
    ) -> dict[str, Tensor]:
        """Averaged factors as matrices.

        Args:
            layer: The layer.
            factors: The means by name.
            names: Those that are needed; `None` for all that the basis requires.
        """
        with attribute_errors("curvature", self.curvature, _on(layer)):
            found = self.curvature.assemble(layer, factors)
        return check_matrices(
            self.curvature, _on(layer), found, self.basis.requires if names is None else names
        )

    def joined(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Tensors shaped like a layer's parameters as its matrix, float32 at least; those that are missing count as zeros."""
        named = {}
        for name, parameter in layer.tensors().items():
            tensor = tensors.get(name)
            tensor = (
                torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                if tensor is None
                else tensor
            )
            named[name] = working(tensor.detach())
        with attribute_errors("curvature", self.curvature, _on(layer)):
            return self.curvature.matrix(layer, named)

    def parted(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of `joined`."""
        with attribute_errors("curvature", self.curvature, _on(layer)):
            return check_parted(layer.tensors(), self.curvature.tensors(layer, matrix))

    def blank(self, layer: Layer) -> tuple[Samples, dict[str, Statistic]]:
        """A layer's samples and sums of a use on zeros: shapes without data."""
        with attribute_errors("curvature", self.curvature, _on(layer)):
            samples = self.curvature.samples(
                layer, [self.curvature.blank(layer)], num_terms=1.0, first=True
            )
            return samples, self.curvature.factors(layer, samples)

    def work(self, layer: Layer) -> Work:
        """The layer's work, by its shapes.

        Matrices can be kept apart where each is made of the one statistic of its name.
        """
        _, sums = self.blank(layer)
        blank = {name: torch.zeros_like(s.total) for name, s in sums.items() if s.total is not None}
        matrices = self.matrices(layer, blank)
        shapes = {name: tuple(matrices[name].shape) for name in sorted(self.basis.requires)}
        gradient = tuple(self.joined(layer, {}).shape)
        apart = set(blank) == set(shapes) and all(
            self._alone(layer, name, blank[name], shapes[name]) for name in shapes
        )
        return Work(layer.name, shapes, gradient, together=not apart)

    def _alone(self, layer: Layer, name: str, factor: Tensor, shape: tuple[int, ...]) -> bool:
        try:
            found = self.curvature.assemble(layer, {name: factor})
        except Exception:  # a curvature that needs all its factors at once says so in its own way
            return False
        return self.basis.requires & set(found) == {name} and tuple(found[name].shape) == shape

    # ------------------------------------------------------------------------------------------------------------ basis

    def decompose(
        self,
        layer: Layer,
        matrices: Tensors,
        damping: float,
        diagonals: Tensors,
        last: Decomposition = MappingProxyType({}),
    ) -> dict[str, dict[str, Tensor]]:
        """Decompose some of a layer's matrices.

        What comes out lies row by row, as it does on ranks that it is sent to and after it was loaded: the last bit of a product depends
        on that.

        Args:
            layer: The layer.
            matrices: Those to decompose.
            damping: The layer's.
            diagonals: `trace / dimension` of all its square matrices.
            last: Their decompositions at the last refresh, as far as they are here.
        """
        context = FactorContext(damping, diagonals)
        with attribute_errors("basis", self.basis, _on(layer)):
            found = {
                name: self.basis.decompose(
                    name, matrices[name], attrs.evolve(context, previous=last.get(name))
                )
                for name in sorted(matrices)
            }
        return {
            name: {part: tensor.contiguous() for part, tensor in parts.items()}
            for name, parts in found.items()
        }

    def blank_parts(self, layer: Layer, sums: Mapping[str, Statistic]) -> list[str]:
        """What the basis makes of the layer's matrices, learnt from their corners: decomposing them whole would cost as much as a step."""
        matrices = self.matrices(
            layer, {n: torch.zeros_like(s.total) for n, s in sums.items() if s.total is not None}
        )
        corners = {n: m[..., :1, :1] if square(m) else m for n, m in matrices.items()}
        return parts_of(self.decompose(layer, corners, 1.0, diagonals(corners)))

    def moments(
        self, layer: Layer, decomposition: Decomposition, samples: Samples
    ) -> dict[str, Statistic]:
        """Sums and counts of the moments on samples, as "moment.NAME"."""
        with attribute_errors("basis", self.basis, _on(layer)):
            found = self.basis.moments(decomposition, samples)
        return prefixed(
            "moment", check_statistics("basis", self.basis, _on(layer), found, required=False)
        )

    def gradient_moments(
        self,
        layer: Layer,
        decomposition: Decomposition,
        gradient: Tensor,
        num_terms: Tensor | float,
    ) -> dict[str, Statistic]:
        """The same of a mini-batch mean gradient."""
        with attribute_errors("basis", self.basis, _on(layer)):
            found = self.basis.gradient_moments(decomposition, gradient, num_terms)
        return prefixed(
            "moment", check_statistics("basis", self.basis, _on(layer), found, required=False)
        )

    def transport(
        self, layer: Layer, moments: Tensors, old: Decomposition, new: Decomposition
    ) -> dict[str, Tensor]:
        """Moments carried from one decomposition to another."""
        with attribute_errors("basis", self.basis, _on(layer)):
            return self.basis.transport(moments, old, new)

    def operator(
        self,
        layer: Layer,
        decomposition: Decomposition,
        moments: Tensors,
        damping: float,
        matrices: Tensors = MappingProxyType({}),
    ) -> CurvatureOperator:
        """F of a layer as an operator."""
        with attribute_errors("basis", self.basis, _on(layer)):
            return self.basis.operator(decomposition, moments, damping, matrices)

    def preconditioned(
        self, layer: Layer, operator: CurvatureOperator, gradient: Tensor
    ) -> Tensor:
        """The preconditioned form of a gradient `[..., d_out, d_in]`."""
        with attribute_errors("basis", self.basis, _on(layer)):
            preconditioned = operator.solve(gradient)
            if preconditioned.shape != gradient.shape:
                raise ValueError(
                    f"preconditioned gradient of shape {tuple(preconditioned.shape)} for {tuple(gradient.shape)}"
                )
        return preconditioned


@attrs.frozen(eq=False)
class LazyMatrices(Mapping[str, Tensor]):
    """The matrices of a layer, each assembled when it is read."""

    blocks: Blocks
    layer: Layer
    factors: Tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.blocks.matrices(self.layer, self.factors, frozenset({name}))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.blocks.basis.requires))

    def __len__(self) -> int:
        return len(self.blocks.basis.requires)


def diagonals(matrices: Tensors) -> dict[str, Tensor]:
    """`trace / dimension` of the square ones."""
    return {name: mean_diagonal(matrix) for name, matrix in matrices.items() if square(matrix)}


def parts_of(decomposition: Decomposition) -> list[str]:
    """The parts by name and number of dimensions; their sizes follow from the factors'."""
    return sorted(
        f"{name}.{part} ({tensor.ndim}-D)"
        for name, parts in decomposition.items()
        for part, tensor in parts.items()
    )


def _on(layer: Layer) -> str:
    return f"on layer {layer.name!r}"
