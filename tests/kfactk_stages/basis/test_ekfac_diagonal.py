"""EKFAC in the coordinates of the inputs: the laws of bases, against `Q = I kron U_G`."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfactk
from kfactk import CombinationError, DecompositionError, FactorContext, SpectralOperator, Statistic
from kfactk.testing import BasisLaws
from kfactk.testing._support.situations import Situation
from kfactk.testing._support.truth import projected_square
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.curvature.conv_kfac import ConvKfac
from tests.kfactk.dense import each_group, ekfac_block, is_eigenbasis

F64 = torch.float64
NULL = {F64: 1e-10, torch.float32: 1e-6}
"""Eigenvalues below this fraction of the largest are zero."""
ROUNDING = {F64: 1e-9, torch.float32: 1e-4}
DIAGONAL = Ekfac(inputs="diagonal")


@attrs.frozen(kw_only=True)
class DiagonalInputs(ConvKfac):
    """The diagonal of A, and G."""

    provides: ClassVar[frozenset[str]] = frozenset({"a", "G"})

    def input_factors(self, layer: Any, samples: Any) -> dict[str, Statistic]:
        whole = super().input_factors(layer, samples)["A"]
        total = None if whole.total is None else whole.total.diagonal(dim1=-2, dim2=-1)
        return {"a": Statistic(total, whole.count)}

    def assemble(self, layer: Any, factors: Any) -> dict[str, Tensor]:
        return dict(factors)


class TestEkfacDiagonal(BasisLaws):
    """Its block is `Q diag(s* + tau) Q^T` with Q = I kron U_G; inputs are never mixed."""

    stage: ClassVar[Any] = {"name": "ekfac", "inputs": "diagonal"}
    curvature: ClassVar[Any] = DiagonalInputs

    def block(self, situation: Situation) -> Tensor:
        return each_group(situation.groups, lambda k: self.block_of(situation, k))

    def block_of(self, situation: Situation, k: Any) -> Tensor:
        dtype = situation.gradient.dtype
        a, g = (situation.matrices[name][k].double() for name in ("a", "G"))
        u_g = situation.decomposition["G"]["eigenvectors"][k].double()
        assert is_eigenbasis(g, u_g, ROUNDING[dtype]), "the eigenvectors of G are none"
        values = (u_g.T @ g @ u_g).diagonal()
        scale = torch.outer(values, a)
        if situation.moments:
            scale = self.scale(situation, k, u_g)
            null = values <= NULL[dtype] * values.max().clamp(min=0)
            if bool(null.any()):
                scale[null] = scale[null].mean(0)
        return ekfac_block(torch.eye(len(a), dtype=F64), u_g, scale, situation.damping)

    def scale(self, situation: Situation, k: Any, u_g: Tensor) -> Tensor:
        return projected_square(situation.per_example[k], u_g, None) / situation.num_terms


class TestEkfacDiagonalRunning(TestEkfacDiagonal):
    """Its scale is M times the square of the mini-batch's mean gradient."""

    stage: ClassVar[Any] = {"name": "ekfac", "inputs": "diagonal", "scale": "running"}

    def scale(self, situation: Situation, k: Any, u_g: Tensor) -> Tensor:
        return situation.num_terms * (u_g.T @ situation.mean_gradient[k].double()) ** 2


def decomposed(a: Tensor, g: Tensor) -> dict[str, dict[str, Tensor]]:
    context = FactorContext(damping=0.1, mean_diagonal={})
    return {name: DIAGONAL.decompose(name, m, context) for name, m in (("a", a), ("G", g))}


def test_it_requires_the_diagonal_and_claims_what_holds_in_fixed_coordinates() -> None:
    assert DIAGONAL.requires == {"a", "G"}
    assert DIAGONAL.laws == {"null-space-independent", "closer-than-kfac"}
    assert Ekfac(inputs="diagonal", scale="running").laws == {"null-space-independent"}


def test_before_any_measurement_products_of_eigenvalues_are_the_spectrum() -> None:
    a, g = torch.tensor([0.0, 1.0, 4.0], dtype=F64), torch.diag(torch.tensor([2.0, 3.0], dtype=F64))
    operator = DIAGONAL.operator(decomposed(a, g), {}, 0.5, {})
    assert isinstance(operator, SpectralOperator)
    torch.testing.assert_close(operator.spectrum, torch.outer(g.diagonal(), a))
    v = torch.randn(2, 3, dtype=F64)
    torch.testing.assert_close(operator.solve(v), v / (torch.outer(g.diagonal(), a) + 0.5))


def test_inputs_that_never_came_keep_their_own_scale() -> None:
    """Coordinates are fixed, so zeros of a are not pooled; the null space of G is."""
    parts = decomposed(torch.tensor([0.0, 0.0, 1.0]), torch.zeros(2, 2))
    gradient = torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 1.0]])
    running = Ekfac(inputs="diagonal", scale="running")
    found = running.gradient_moments(parts, gradient, 1.0)["scale"].total
    expected = gradient.square().mean(0, keepdim=True).expand(2, 3)
    torch.testing.assert_close(found, expected)


def test_transport_turns_the_outputs_only() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 5, 3, generator=generator, dtype=F64)
    a = torch.ones(4, dtype=F64)
    old, new = (decomposed(a, each.T @ each) for each in rows)
    scale = torch.rand(3, 4, generator=generator, dtype=F64)
    u, w = (each["G"]["eigenvectors"] for each in (old, new))
    found = DIAGONAL.transport({"scale": scale}, old, new)["scale"]
    columns = [(w.T @ u @ torch.diag(s) @ u.T @ w).diagonal() for s in scale.T]
    torch.testing.assert_close(found, torch.stack(columns, -1))


def test_a_diagonal_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DecompositionError, match="NaN or inf"):
        decomposed(torch.tensor([1.0, float("inf")]), torch.eye(2))


def test_large_products_are_rounded() -> None:
    """The scale and the step, on the side that is rotated."""
    generator = torch.Generator().manual_seed(0)
    rounded, plain = Ekfac(inputs="diagonal", products="bfloat16"), DIAGONAL
    vectors = torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q
    values = torch.rand(256, generator=generator)
    parts = {
        "a": {"eigenvalues": torch.ones(80)},
        "G": {"eigenvalues": values, "eigenvectors": vectors},
    }
    a, g = (torch.randn(80, 1, n, generator=generator) for n in (80, 256))
    samples = kfactk.Samples(a, g, num_terms=80)
    scales = [each.moments(parts, samples)["scale"].total for each in (rounded, plain)]
    assert not torch.equal(*scales)
    torch.testing.assert_close(*scales, rtol=0.1, atol=0.1 * float(scales[1].max()))
    v = torch.randn(256, 80, generator=generator)
    moments = {"scale": scales[1] / 80}
    steps = [each.operator(parts, moments, 0.1, {}).solve(v) for each in (rounded, plain)]
    assert not torch.equal(*steps)
    assert float((steps[0] - steps[1]).norm()) <= 4 * 2.0**-8 * float(v.norm()) / 0.1


def test_it_trains_with_a_curvature_that_provides_the_diagonal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    recipe = kfactk.build(
        curvature=DiagonalInputs(), basis=DIAGONAL, clip="none", update="sgd", lr=0.1, damping=0.1
    )
    optimizer = recipe.bind(model)
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    view = optimizer.layers["0"]
    assert {name: tuple(m.shape) for name, m in view.factors.items()} == {"a": (6,), "G": (8, 8)}
    assert view.decomposition["a"].keys() == {"eigenvalues"}


def test_a_curvature_without_the_diagonal_is_refused() -> None:
    with pytest.raises(CombinationError, match="needs a, which curvature 'kfac' does not provide"):
        kfactk.build(curvature="kfac", basis={"name": "ekfac", "inputs": "diagonal"})


@pytest.mark.parametrize("few", [True, False])
def test_columns_of_zeros_take_no_part_and_stay(few: bool) -> None:
    """Rows of an embedding that do not occur have no gradient: nothing is multiplied for them."""
    generator = torch.Generator().manual_seed(0)
    a, gradients = torch.rand(40, generator=generator, dtype=F64), torch.zeros(40, 3, dtype=F64)
    rows = torch.tensor([7, 0, 39]) if few else torch.arange(30)
    gradients[rows] = torch.randn(len(rows), 3, generator=generator, dtype=F64)
    gradients[rows[0], 0] = 0.0
    matrices = {"a": a, "G": torch.cov(torch.randn(3, 9, generator=generator, dtype=F64))}
    context = FactorContext(damping=0.1, mean_diagonal={})
    parts = {name: DIAGONAL.decompose(name, each, context) for name, each in matrices.items()}
    scale = torch.rand(3, 40, generator=generator, dtype=F64)
    operator = DIAGONAL.operator(parts, {"scale": scale}, 0.1, matrices)
    with Columns() as seen:
        found = operator.solve(gradients.mT)
    u = parts["G"]["eigenvectors"]
    torch.testing.assert_close(found, u @ ((u.T @ gradients.mT) / (scale + 0.1)))
    assert not found[:, 30:39].any()
    assert seen.columns == (3 if few else 40)


class Columns(TorchDispatchMode):
    """The largest number of columns of a product."""

    columns = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.columns = max(self.columns, found.shape[-1])
        return found
