"""A layer's work by its shapes, and what its two stages are asked for."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from kfactk import (
    CurvatureOperator,
    Decomposition,
    FactorContext,
    Layer,
    PluginError,
    Tensors,
    Work,
)
from kfactk.preconditioner.block import Block, mean_diagonals, parts_of
from kfactk.stages import Basis
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.gradient import Gradient

F64 = torch.float64


def layer(module: nn.Module, *parameters: str) -> Layer:
    return Layer("mine", module.double(), parameters or ("weight", "bias"))


@pytest.mark.parametrize(
    ("module", "parameters", "work"),
    [
        (nn.Linear(4, 3), (), Work("mine", {"A": (5, 5), "G": (3, 3)}, (3, 5))),
        (nn.Linear(4, 3), ("weight",), Work("mine", {"A": (4, 4), "G": (3, 3)}, (3, 4))),
        (nn.Conv2d(2, 6, (3, 2)), (), Work("mine", {"A": (13, 13), "G": (6, 6)}, (6, 13))),
        (
            nn.Conv1d(4, 6, 2, groups=2),
            (),
            Work("mine", {"A": (2, 5, 5), "G": (2, 3, 3)}, (2, 3, 5)),
        ),
    ],
)
def test_the_work_of_a_layer(module: nn.Module, parameters: tuple[str, ...], work: Work) -> None:
    for basis in (KfacInverse(), Ekfac()):
        assert Block(layer(module, *parameters), ConvKfac(), basis).work() == work


@attrs.frozen(kw_only=True)
class ReducedStatistic(ConvKfac):
    """Makes each matrix of both statistics."""

    def assemble(self, layer: Layer, factors: Any) -> dict[str, Tensor]:
        a, g = factors["A"], factors["G"]
        return {"A": a * (1 + g.diagonal(dim1=-2, dim2=-1).mean()), "G": g}


@attrs.frozen(kw_only=True)
class Doubling(ConvKfac):
    """Gives G beside A even when asked for A alone."""

    def assemble(self, layer: Layer, factors: Any) -> dict[str, Tensor]:
        size = layer.tensors()["weight"].shape[0]
        return {"G": torch.zeros(size, size, dtype=F64), **super().assemble(layer, factors)}


@attrs.frozen(kw_only=True)
class Further(ConvKfac):
    """Has a statistic that is no matrix of the basis."""

    def factors(self, layer: Layer, samples: Any) -> Any:
        found = super().factors(layer, samples)
        return {
            **found,
            "trace": attrs.evolve(
                found["G"], total=found["G"].total.diagonal().sum(), symmetric=False
            ),
        }

    def assemble(self, layer: Layer, factors: Any) -> dict[str, Tensor]:
        return super().assemble(
            layer, {name: factor for name, factor in factors.items() if name != "trace"}
        )


@pytest.mark.parametrize("curvature", [ReducedStatistic(), Doubling(), Further()])
def test_matrices_of_common_statistics_stay_together(curvature: ConvKfac) -> None:
    found = Block(layer(nn.Linear(4, 3)), curvature, KfacInverse()).work()
    assert found == Work("mine", {"A": (5, 5), "G": (3, 3)}, (3, 5), indivisible=True)


@attrs.frozen(kw_only=True)
class OnlyG(KfacInverse):
    """Needs one of the two."""

    requires = frozenset({"G"})


def test_what_a_basis_does_not_need_is_no_work() -> None:
    found = Block(layer(nn.Linear(4, 3)), ConvKfac(), OnlyG()).work()
    assert found.matrices == {"G": (3, 3)}
    assert found.indivisible  # the other statistic is kept where this one is


def test_parts_and_diagonals() -> None:
    block = Block(layer(nn.Linear(4, 3)), ConvKfac(), Ekfac())
    sums = block.blank_factors()
    assert set(sums) == {"A", "G"}
    matrices = {
        "A": torch.diag(torch.arange(1.0, 6.0)),
        "G": 2 * torch.eye(3),
        "flat": torch.ones(2, 3),
    }
    found = mean_diagonals(matrices)
    assert {name: float(each) for name, each in found.items()} == {"A": 3.0, "G": 2.0}
    made = block.decompose(0.1, {"A": matrices["A"], "G": matrices["G"]}, found)
    assert parts_of(made) == block.parts_of_corners(matrices)
    assert list(made) == ["A", "G"]
    assert not block.state.decomposition, "decompose changes nothing"


def test_missing_tensors_count_as_zeros() -> None:
    block = Block(layer(nn.Linear(2, 2)), ConvKfac(), KfacInverse())
    joined = block.matrix({"weight": torch.ones(2, 2, dtype=torch.bfloat16)})
    assert torch.equal(joined, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]], dtype=F64))


def measured(basis: Basis) -> Block:
    """Return a block without damping whose matrices are 2 and 3 times the identity."""
    block = Block(layer(nn.Linear(1, 2)), ConvKfac(), basis)
    eye = torch.eye(2, dtype=F64)
    block.update_factors({"A": 2 * eye, "G": 3 * eye}, 0.0)
    block.adopt(block.decompose(0.0))
    return block


@attrs.frozen(kw_only=True)
class Flattening(KfacInverse):
    """Gives a preconditioned gradient in another shape."""

    def operator(self, *given: Any) -> CurvatureOperator:
        operator = super().operator(*given)

        class Flat(CurvatureOperator):
            def solve(self, v: Tensor) -> Tensor:
                return operator.solve(v).flatten()

            def multiply(self, v: Tensor) -> Tensor:
                return operator.multiply(v)

            def condition(self) -> Tensor:
                return operator.condition()

        return Flat()


def test_a_gradient_that_changes_its_shape_is_refused() -> None:
    gradient = torch.ones(2, 2, dtype=F64)
    torch.testing.assert_close(measured(KfacInverse()).solve(gradient), gradient / 6)
    says = r"Flattening failed on layer 'mine' .*solve gave the shape \(4,\) for \(2, 2\)"
    with pytest.raises(PluginError, match=says):
        measured(Flattening()).solve(gradient)


def test_an_operator_is_kept_until_the_block_or_the_damping_changes() -> None:
    block = measured(KfacInverse())
    first = block.operator()
    assert block.operator(0.0) is first
    assert block.operator(1.0) is not first
    second = block.operator(1.0)
    block.update_factors({"A": torch.eye(2, dtype=F64)}, 0.0)
    assert block.operator(1.0) is not second


@attrs.frozen(kw_only=True)
class Coupled(KfacInverse):
    """Decomposes each side from both sides, and from what both were decomposed into."""

    beside = MappingProxyType({"A": ("G",), "G": ("A",)})

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        [(other, beside)] = context.beside.items()
        last = [context.previous, context.previous_beside.get(other)]
        seen = [torch.zeros(1) if each is None else each["told"] for each in last]
        return {"told": torch.stack([matrix[0, 0], beside[0, 0], *(each[0] for each in seen)])}


def test_sides_see_each_other_and_their_last_decompositions() -> None:
    block = Block(layer(nn.Linear(1, 2)), ConvKfac(), Coupled())
    eye = torch.eye(2)
    block.update_factors({"A": 2 * eye, "G": 3 * eye}, 0.0)
    first = block.decompose(0.0)
    assert {name: parts["told"].tolist() for name, parts in first.items()} == {
        "A": [2.0, 3.0, 0.0, 0.0],
        "G": [3.0, 2.0, 0.0, 0.0],
    }
    block.adopt(first)
    block.state.ready = True
    block.update_factors({"A": 5 * eye, "G": 7 * eye}, 0.0)
    then = block.decompose(0.0)
    assert {name: parts["told"].tolist() for name, parts in then.items()} == {
        "A": [5.0, 7.0, 2.0, 3.0],
        "G": [7.0, 5.0, 3.0, 2.0],
    }
    work = block.work()
    assert (work.indivisible, work.follows, dict(work.beside)) == (True, True, {})


@attrs.frozen(kw_only=True)
class Weighing(KfacInverse):
    """Weighs the gradient for R alone."""

    requires = frozenset({"L", "R"})

    def weighed(self, decomposition: Decomposition, gradient: Tensor) -> Tensors:
        return {"R": (10.0 if decomposition else 2.0) * gradient}


@attrs.frozen(kw_only=True)
class WeighingMore(Weighing):
    """Weighs for a statistic that there is not."""

    def weighed(self, decomposition: Decomposition, gradient: Tensor) -> Tensors:
        return {"Z": gradient}


def test_a_basis_weighs_the_gradient_for_one_statistic() -> None:
    alone = Layer("mine", nn.Linear(2, 1).double(), ("weight",))
    block = Block(alone, Gradient(), Weighing())
    gradient = torch.tensor([[3.0, 4.0]], dtype=F64)
    for ready, times in ((False, 4.0), (True, 100.0)):
        found = block.factors_of_gradient(gradient)
        assert float(found["factor.L"].total) == 25.0
        assert torch.equal(found["factor.R"].total, times * gradient.T @ gradient), ready
        block.state.decomposition, block.state.ready = {"L": {}, "R": {}}, True
    block = Block(alone, Gradient(), WeighingMore())
    with pytest.raises(PluginError, match="weighs a gradient for 'Z'"):
        block.factors_of_gradient(gradient)
