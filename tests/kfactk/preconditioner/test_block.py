"""A layer's work by its shapes, and what its two stages are asked for."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from kfactk import Layer, PluginError, Work
from kfactk.preconditioner.block import Blocks, diagonals, parts_of
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.conv_kfac import ConvKfac

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
        assert Blocks(ConvKfac(), basis).work(layer(module, *parameters)) == work


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
    found = Blocks(curvature, KfacInverse()).work(layer(nn.Linear(4, 3)))
    assert found == Work("mine", {"A": (5, 5), "G": (3, 3)}, (3, 5), indivisible=True)


@attrs.frozen(kw_only=True)
class OnlyG(KfacInverse):
    """Needs one of the two."""

    requires = frozenset({"G"})


def test_what_a_basis_does_not_need_is_no_work() -> None:
    found = Blocks(ConvKfac(), OnlyG()).work(layer(nn.Linear(4, 3)))
    assert found.matrices == {"G": (3, 3)}
    assert found.indivisible  # the other statistic is kept where this one is


def test_parts_and_diagonals() -> None:
    linear = layer(nn.Linear(4, 3))
    blocks = Blocks(ConvKfac(), Ekfac())
    _, sums = blocks.blank(linear)
    assert set(sums) == {"A", "G"}
    matrices = {
        "A": torch.diag(torch.arange(1.0, 6.0)),
        "G": 2 * torch.eye(3),
        "flat": torch.ones(2, 3),
    }
    assert {name: float(each) for name, each in diagonals(matrices).items()} == {"A": 3.0, "G": 2.0}
    made = blocks.decompose(
        linear, {"A": matrices["A"], "G": matrices["G"]}, 0.1, diagonals(matrices)
    )
    assert parts_of(made) == blocks.blank_parts(linear, sums)
    assert list(made) == ["A", "G"]


def test_missing_tensors_count_as_zeros() -> None:
    linear = layer(nn.Linear(2, 2))
    joined = Blocks(ConvKfac(), KfacInverse()).joined(
        linear, {"weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    )
    assert torch.equal(joined, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]], dtype=F64))


@attrs.frozen(kw_only=True)
class Flattening(KfacInverse):
    def precondition(
        self, gradient: Tensor, decomposition: Any, moments: Any, damping: float
    ) -> Tensor:
        return super().precondition(gradient, decomposition, moments, damping).flatten()


def test_a_gradient_that_changes_its_shape_is_refused() -> None:
    linear = layer(nn.Linear(1, 2))
    blocks = Blocks(ConvKfac(), Flattening())
    matrices = {"A": torch.eye(2, dtype=F64), "G": torch.eye(2, dtype=F64)}
    made = blocks.decompose(linear, matrices, 0.1, diagonals(matrices))
    with pytest.raises(
        PluginError,
        match=r"Flattening failed on layer 'mine' .*preconditioned gradient of shape \(4,\) for \(2, 2\)",
    ):
        blocks.preconditioned(
            linear, blocks.operator(linear, made, {}, 0.1), torch.ones(2, 2, dtype=F64)
        )
