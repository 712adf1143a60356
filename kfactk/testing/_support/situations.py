"""What a basis meets: one layer's matrices, decomposed, with moments, a gradient and a damping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from kfactk.linalg import kron
from kfactk.operators import CurvatureOperator
from kfactk.preconditioner.block import mean_diagonals
from kfactk.samples import LayerCall, Samples, Statistic
from kfactk.stages import Decomposition, FactorContext, Tensors
from kfactk.statistics import add_sums, local_means
from kfactk.testing._support.strategies import Case, seeds
from kfactk.testing._support.truth import module_gradients
from kfactk.validation import square

NULL, CLEAR = 1e-13, 1e-9
"""Eigenvalues below the first fraction of the largest are zero; laws avoid those in between."""


@attrs.frozen(eq=False, repr=False)
class Situation:
    """One layer as its basis meets it.

    Args:
        basis: The stage.
        curvature: What measured the matrices and the samples.
        case: The layer with one mini-batch.
        num_terms: Number M of likelihood terms of the mini-batch.
        damping: tau.
        samples: The mini-batch as samples.
        mean_gradient: The gradient of the mini-batch's summed loss over M, `[..., d_out, d_in]`.
            Moments may be measured on it.
        gradient: What is to be preconditioned, of the same shape; drawn on its own.
        matrices: What the curvature assembled from the mini-batch.
        decomposition: What the basis made of those it requires.
        moments: What the basis measured, on the samples or the mean gradient as `moments_from`
            says; empty before the first measurement.
    """

    basis: Any
    curvature: Any
    case: Case
    num_terms: float
    damping: float
    samples: Samples
    mean_gradient: Tensor
    gradient: Tensor
    matrices: dict[str, Tensor]
    decomposition: dict[str, dict[str, Tensor]] = attrs.Factory(dict)
    moments: dict[str, Tensor] = attrs.Factory(dict)

    @classmethod
    def of(
        cls,
        basis: Any,
        curvature: Any,
        case: Case,
        *,
        damping: float = 0.1,
        num_terms: float | None = None,
        seed: int = 0,
    ) -> Situation:
        """Return a basis on one mini-batch, whose matrices are those of this batch.

        Args:
            basis: The stage.
            curvature: What measures.
            case: The layer and the mini-batch.
            damping: tau.
            num_terms: M; the number of examples by default.
            seed: Of the gradient to be preconditioned.
        """
        layer, examples = case.layer, float(len(case.gradient))
        num_terms = examples if num_terms is None else num_terms
        mean = gradient_of(curvature, case) / num_terms
        if curvature.statistics_from == "gradient":
            samples, sums = _of_gradients(basis, curvature, case, num_terms)
        else:
            calls = [LayerCall(x, g) for x, g in case.calls]
            samples = curvature.samples(layer, calls, num_terms=num_terms, first=True)
            sums = curvature.factors(layer, samples)
        matrices = curvature.assemble(layer, local_means(sums))
        gradient = _normal(mean, torch.Generator().manual_seed(seed))
        bare = cls(
            basis, curvature, case, num_terms, damping, samples, mean, gradient, dict(matrices)
        )
        return bare.refreshed()

    def blank(self) -> Situation:
        """Return what there is without data, as the framework allocates state."""
        curvature, layer = self.curvature, self.case.layer
        nothing, samples = 0 * self.mean_gradient, self.samples
        if curvature.statistics_from == "gradient":
            weighed = self.basis.weighed({}, nothing)
            sums = curvature.weighed_factors(layer, nothing, weighed)
        else:
            calls = [curvature.blank(layer)]
            samples = curvature.samples(layer, calls, num_terms=1.0, first=True)
            sums = curvature.factors(layer, samples)
        zeros = {name: torch.zeros_like(mean) for name, mean in local_means(sums).items()}
        matrices = dict(curvature.assemble(layer, zeros))
        return self.refreshed(samples=samples, matrices=matrices, mean_gradient=nothing)

    def refreshed(self, **changes: Any) -> Situation:
        """Return the situation with these changes, decomposed and measured anew."""
        bare = attrs.evolve(self, **changes)
        made = {
            name: self.basis.decompose(name, bare.matrices[name], bare.context(name))
            for name in sorted(self.basis.requires)
        }
        decomposition = {
            name: {part: each.contiguous() for part, each in parts.items()}
            for name, parts in made.items()
        }  # as the framework keeps it
        return bare.remeasured(decomposition=decomposition)

    def remeasured(self, **changes: Any) -> Situation:
        """Return the situation with these changes, measured anew in the same decomposition."""
        bare = attrs.evolve(self, **changes)
        return attrs.evolve(bare, moments=bare.measured(bare.decomposition))

    def measured(self, decomposition: Decomposition) -> dict[str, Tensor]:
        """Return the moments that the mini-batch has in a decomposition."""
        source = self.basis.moments_from
        if source is None:
            return {}
        if source == "samples":
            return local_means(self.basis.moments(decomposition, self.samples))
        return local_means(
            self.basis.gradient_moments(decomposition, self.mean_gradient, self.num_terms)
        )

    @property
    def required(self) -> dict[str, Tensor]:
        """The matrices that the basis requires."""
        return {name: self.matrices[name] for name in sorted(self.basis.requires)}

    def context(self, name: str) -> FactorContext:
        """Return what the framework tells about the other matrices when it decomposes one."""
        beside = {each: self.matrices[each] for each in self.basis.beside.get(name, ())}
        return FactorContext(self.damping, mean_diagonals(self.matrices), beside=beside)

    def next_context(self, name: str) -> FactorContext:
        """Return what it tells at the refresh that follows this one."""
        parts, names = self.decomposition, self.basis.beside.get(name, ())
        return attrs.evolve(
            self.context(name),
            previous=parts[name],
            previous_beside={each: parts[each] for each in names if each in parts},
        )

    @property
    def per_example(self) -> Tensor:
        """D from torch.func, one example at a time, in float64: `[..., N, d_out, d_in]`."""
        case = self.case.to(torch.float64)
        return torch.stack([module_gradients(case.module, x, g) for x, g in case.calls]).sum(0)

    @property
    def groups(self) -> int | None:
        """Number of groups; `None` where the layer has none."""
        return len(self.gradient) if self.gradient.ndim > 2 else None

    def group(self, k: int) -> Situation:
        """Return one group on its own, decomposed and measured on its own."""
        samples = Samples(
            self.samples.inputs()[k], self.samples.gradients()[k], num_terms=self.num_terms
        )
        matrices = {name: matrix[k] for name, matrix in self.matrices.items()}
        return self.refreshed(
            samples=samples,
            matrices=matrices,
            gradient=self.gradient[k],
            mean_gradient=self.mean_gradient[k],
        )

    @functools.cached_property
    def operator(self) -> CurvatureOperator:
        """F as the basis gives it, made once."""
        return self.fresh_operator()

    def fresh_operator(self) -> CurvatureOperator:
        """Return F as the basis gives it, made anew."""
        found: CurvatureOperator = self.basis.operator(
            self.decomposition, self.moments, self.damping, self.matrices
        )
        return found

    def solve(self, gradient: Tensor | None = None) -> Tensor:
        """Return `(F + damping I)^-1` times a gradient; by default times the situation's."""
        return self.operator.solve(self.gradient if gradient is None else gradient)

    def multiply(self, vector: Tensor | None = None) -> Tensor:
        """Return F times `[..., d_out, d_in]`; by default times the situation's gradient."""
        return self.operator.multiply(self.gradient if vector is None else vector)

    def another(self, seed: int) -> Tensor:
        """Return a further gradient of the same shape."""
        return _normal(self.gradient, torch.Generator().manual_seed(seed))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {_shape(matrix)}" for name, matrix in self.matrices.items())
        moments = f"moments {', '.join(self.moments)}" if self.moments else "no moments"
        rest = f"{moments}, terms {self.num_terms:g}, damping {self.damping:g}"
        return f"Situation({self.case!r}, {self.curvature!r} gives {shown}; {rest})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what Hypothesis prints


def gradient_of(curvature: Any, case: Case) -> Tensor:
    """Return autograd's gradient of a case's summed loss, as the curvature's matrix."""
    parameters = case.layer.tensors()
    loss = sum(((case.module(x) * g).sum() for x, g in case.calls), torch.zeros(()))
    found = torch.autograd.grad(loss, list(parameters.values()))
    matrix: Tensor = curvature.matrix(case.layer, dict(zip(parameters, found, strict=True)))
    return matrix


def _of_gradients(
    basis: Any, curvature: Any, case: Case, num_terms: float
) -> tuple[Samples, dict[str, Statistic]]:
    """Return what a curvature of gradients makes of examples: each is the gradient of one step.

    As samples they are `D_n = sum_t e_t d_t^T`, with the rows d of D_n.
    """
    each = [gradient_of(curvature, case.rows([n])) for n in range(len(case.gradient))]
    sums: dict[str, Statistic] = {}
    for gradient in each:
        weighed = basis.weighed({}, gradient)
        add_sums(sums, curvature.weighed_factors(case.layer, gradient, weighed))
    rows = torch.stack(each, -3)
    eye = torch.eye(rows.shape[-2], dtype=rows.dtype)
    outputs = eye.expand(*rows.shape[:-1], rows.shape[-2])
    return Samples(rows, outputs, num_terms=num_terms), sums


def _shape(matrix: Tensor) -> str:
    shape = "x".join(map(str, matrix.shape))
    if not square(matrix):
        return shape
    return f"{shape} of rank {torch.linalg.matrix_rank(matrix.double()).tolist()}"


# Hypothesis examines each strategy once: those that are made once draw faster.
_NOTHING = st.sampled_from(["", "", "", "", "inputs", "gradients"])
_TERMS = st.sampled_from([1.0, 3.0])
_EXPONENTS = st.integers(-3, 1)


@st.composite
def situations(
    draw: st.DrawFn,
    basis: Any,
    curvature: Any,
    cases: st.SearchStrategy[Case],
    *,
    least: int = 1,
    zeros: bool = True,
    bare: bool = False,
) -> Situation:
    """Draw a situation.

    Args:
        draw: Given by Hypothesis.
        basis: The stage.
        curvature: What measures.
        cases: Layers with a mini-batch.
        least: Fewest examples. By default there are few, so that matrices lack rank, or enough.
        zeros: Whether inputs or gradients may be all zero.
        bare: Whether moments may be missing, as before the first measurement.
    """
    case, seed = draw(cases), draw(seeds())
    if least > 1 or draw(st.booleans()):
        case = enlarged(case, max(least, 6), seed)
    if zeros and (nothing := draw(_NOTHING)):
        case = case.times(**{nothing if case.inputs.is_floating_point() else "gradients": 0.0})
    num_terms = float(len(case.gradient)) * draw(_TERMS)
    damping = 10.0 ** draw(_EXPONENTS)
    found = Situation.of(basis, curvature, case, damping=damping, num_terms=num_terms, seed=seed)
    return attrs.evolve(found, moments={}) if bare and draw(st.booleans()) else found


def enlarged(case: Case, examples: int, seed: int) -> Case:
    """Return the case with that many examples of other numbers.

    Inputs that are not floating, indices, are repeated.
    """
    generator = torch.Generator().manual_seed(seed)
    case = case.rows([n % len(case.gradient) for n in range(examples)])
    calls = [
        (_normal(x, generator) if x.is_floating_point() else x, _normal(g, generator))
        for x, g in case.calls
    ]
    return attrs.evolve(
        case, inputs=calls[0][0], gradient=calls[0][1], further=tuple(calls[1:]), seed=seed
    )


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def columns(matrix: Tensor) -> Tensor:
    """Return `vec`, columns stacked: `[..., d_out, d_in]` to `[..., n]`, in float64."""
    return matrix.double().transpose(-1, -2).flatten(-2)


def dense(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return the matrix `[..., n, n]` of a linear map, in float64; one for each group.

    Args:
        apply: Maps matrices to matrices of the same shape.
        like: Any matrix of that shape.
    """
    found = []
    for j in range(like.shape[-1]):
        for i in range(like.shape[-2]):
            unit = torch.zeros_like(like)
            unit[..., i, j] = 1
            found.append(columns(apply(unit)))
    return torch.stack(found, -1)


def over_taps(channels: Tensor, taps: Tensor | None, d_in: int, bias: float) -> Tensor:
    """Return `blockdiag(M kron taps, bias)` of a matrix M of channels, with the side `d_in`.

    Taps are the identity where `None`. A matrix M that has the side `d_in` is returned as it is.
    """
    c = channels.shape[-1]
    if c == d_in:
        return channels
    many = d_in // c if taps is None else taps.shape[-1]
    out = channels.new_zeros(*channels.shape[:-2], d_in, d_in)
    eye = torch.eye(many, dtype=channels.dtype).expand(*channels.shape[:-2], many, many)
    out[..., : c * many, : c * many] = kron(channels, eye if taps is None else taps)
    if d_in > c * many:
        out[..., -1, -1] = bias
    return out


def named(decomposition: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """Return all tensors of a decomposition, as MATRIX.PART."""
    return {
        f"{name}.{part}": tensor
        for name, parts in decomposition.items()
        for part, tensor in parts.items()
    }


def orthogonal(like: Tensor, seed: int) -> Tensor:
    """Return a random orthogonal matrix for each of `[..., n, n]`."""
    rotation: Tensor = torch.linalg.qr(
        _normal(like.double(), torch.Generator().manual_seed(seed))
    ).Q.to(like.dtype)
    return rotation


def separated(matrix: Tensor, *, null: bool) -> bool:
    """Return whether eigenvalues lie so far apart that the eigenvectors are determined.

    Args:
        matrix: `[..., n, n]`.
        null: Whether to leave the null space aside.
    """
    for block in matrix.reshape(-1, *matrix.shape[-2:]):
        values = torch.linalg.eigvalsh(block)
        largest = max(float(values[-1]), 0.0)
        kept = values[values > NULL * largest] if null else values
        if bool((kept < CLEAR * largest).any()) or bool((kept.diff() < 1e-3 * largest).any()):
            return False
        if not null and largest == 0 and len(values) > 1:
            return False
    return True


def turn_within_null(matrix: Tensor, seed: int) -> Tensor:
    """Return an orthogonal R of each `[..., n, n]` with `R M R^T = M`.

    R is random within the null space of M, and the identity on what is orthogonal to it.
    """
    blocks = []
    for k, block in enumerate(matrix.reshape(-1, *matrix.shape[-2:])):
        values, vectors = torch.linalg.eigh(block)
        null = vectors[:, values <= NULL * values[-1].clamp(min=0)]
        turn = orthogonal(null.T @ null, seed + k)
        eye = torch.eye(len(block), dtype=block.dtype)
        blocks.append(eye - null @ null.T + null @ turn @ null.T)
    return torch.stack(blocks).reshape(matrix.shape)


def null_dimension(matrix: Tensor) -> int:
    """Return the dimension of the largest null space among `[..., n, n]`."""
    values = torch.linalg.eigvalsh(matrix)
    return int((values <= NULL * values[..., -1:].clamp(min=0)).sum(-1).max())
