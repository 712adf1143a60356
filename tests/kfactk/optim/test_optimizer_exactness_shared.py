"""Exact cases with weights that are shared over positions, and with other special batches.

The situations are those of Eschenhagen et al. 2023 (arXiv:2311.00636) and of the tests of
curvlinops and kfac-jax. Truth is the dense Fisher matrix, or the Hessian, from plain autograd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfactk import Optimizer
from kfactk.testing._support.truth import dense_fisher, dense_kron, layer_gradients, vec
from tests.kfactk.optim.test_optimizer_exactness import (
    F64,
    assert_exact,
    categorical_fisher,
    observed,
)

EXAMPLES, POSITIONS = 4, 5
FAR = 1e-2
"""Relative distance of an approximation that is not exact."""
VARIANCE = 0.5
bases = pytest.mark.parametrize("basis", ["kfac", "ekfac"])


class Mean(nn.Module):
    """The mean over positions: of tokens, or of the pixels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if x.ndim == 3 else x.mean((2, 3))


class Tied(nn.Module):
    """One layer that sees both halves of the input, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.head(self.shared(half)) for half in x.chunk(2, 1)], 1)


def tokens(*behind: nn.Module) -> tuple[nn.Module, Tensor]:
    """A deep linear net on every token."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2), nn.Linear(2, 3), *behind)
    return model.double(), torch.randn(EXAMPLES, POSITIONS, 3, dtype=F64)


def pixels(*behind: nn.Module) -> tuple[nn.Module, Tensor]:
    """Convolutions without nonlinearity, the later ones of single pixels."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=1, groups=2),
        nn.Conv2d(4, 2, 1, bias=False),
        nn.Conv2d(2, 3, 1),
        *behind,
    )
    return model.double(), torch.randn(EXAMPLES, 4, 4, 3, dtype=F64)


NETS = {"tokens": (tokens, -1), "pixels": (pixels, 1)}
"""Models, and the axis of the labels in an output that has positions."""


def gaussian_fisher(model: nn.Module, layer: str, inputs: Tensor, labels: int) -> Tensor:
    """Return `(1/M) sum_k D_k D_k^T / v` over all entries k of the output, `labels` to a term."""
    output = model(inputs)
    rows = [
        layer_gradients(model, layer, inputs, inputs, lambda out, _, k=k: out[0].flatten()[k])
        for k in range(output[0].numel())
    ]
    return dense_fisher(torch.cat(rows, dim=-3), output.numel() / labels) / VARIANCE


def conv_kfac(spatial: str) -> dict[str, Any]:
    return {"name": "conv_kfac", "spatial": spatial}


def gaussian(class_axis: int | None = None) -> dict[str, Any]:
    return {"name": "gaussian", "variance": VARIANCE, "class_axis": class_axis}


def distance(optimizer: Optimizer, layer: str, truth: Tensor) -> float:
    """Return how far the product of the factors is from the truth, relative to it."""
    factors = optimizer.layers[layer].factors
    return float((dense_kron(factors["A"], factors["G"]) - truth).norm() / truth.norm())


@bases
@pytest.mark.parametrize("net", NETS)
def test_deep_linear_nets_with_a_term_at_each_position(basis: str, net: str) -> None:
    """Positions are like examples: "sud" is exact, "reduce" is not."""
    make, class_axis = NETS[net]
    both, (model, inputs) = {"basis": basis, "likelihood": gaussian(class_axis)}, make()
    _, optimizer = observed(model, inputs, curvature=conv_kfac("sud"), **both)
    _, other = observed(model, inputs, curvature=conv_kfac("reduce"), **both)
    for name in optimizer.layers:
        truth = gaussian_fisher(model, name, inputs, 3)
        assert_exact(optimizer, name, truth, basis)
        assert distance(other, name, truth) > FAR


@bases
@pytest.mark.parametrize("net", NETS)
def test_deep_linear_nets_with_a_mean_over_positions(basis: str, net: str) -> None:
    """All positions have the same derivative: "reduce" is exact, "sud" is not."""
    model, inputs = NETS[net][0](Mean())
    both = {"basis": basis, "likelihood": gaussian()}
    _, optimizer = observed(model, inputs, curvature=conv_kfac("reduce"), **both)
    _, other = observed(model, inputs, curvature=conv_kfac("sud"), **both)
    for name in optimizer.layers:
        truth = gaussian_fisher(model, name, inputs, 3)
        assert_exact(optimizer, name, truth, basis)
        assert distance(other, name, truth) > FAR


@bases
def test_a_tied_layer_whose_calls_lead_to_different_outputs(basis: str) -> None:
    model, inputs = Tied().double(), torch.randn(EXAMPLES, 6, dtype=F64)
    _, optimizer = observed(
        model, inputs, basis=basis, curvature=conv_kfac("sud"), likelihood=gaussian()
    )
    for name in ("shared", "head"):
        assert_exact(optimizer, name, gaussian_fisher(model, name, inputs, 4), basis)


@bases
def test_the_first_layer_where_all_examples_are_alike(basis: str) -> None:
    """A is then the same for all examples, so that it leaves the mean."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs = torch.randn(1, 3, dtype=F64).expand(EXAMPLES, 3).contiguous()
    _, optimizer = observed(model, inputs, basis=basis, curvature="kfac")
    assert_exact(optimizer, "0", categorical_fisher(model, "0", inputs), basis)


def test_one_example_through_rectifiers_has_the_blocks_of_the_hessian() -> None:
    """A piecewise linear net has no second derivative of its own."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    inputs = torch.randn(1, 3, dtype=F64)
    _, optimizer = observed(model, inputs, basis="ekfac", curvature="kfac")
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        matrix = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()

        def loss(columns: Tensor, name: str = name, rows: int = len(matrix)) -> Tensor:
            own = columns.reshape(-1, rows).T
            parameters = {f"{name}.weight": own[:, :-1], f"{name}.bias": own[:, -1]}
            output = torch.func.functional_call(model, parameters, (inputs,))
            return nn.functional.cross_entropy(output, torch.tensor([1]))

        truth = torch.autograd.functional.hessian(loss, vec(matrix))
        assert_exact(optimizer, name, truth, "ekfac")


@pytest.mark.parametrize("spatial", ["sud", "reduce"])
def test_ekfac_is_nearer_than_kfac_behind_nonlinear_convolutions(spatial: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    inputs = torch.randn(12, 2, 3, 3, dtype=F64)
    _, optimizer = observed(model, inputs, basis="ekfac", curvature=conv_kfac(spatial))
    truth, view = categorical_fisher(model, "0", inputs), optimizer.layers["0"]
    made = view.decomposition
    basis = torch.kron(made["A"]["eigenvectors"], made["G"]["eigenvectors"])
    ekfac = basis @ torch.diag(vec(view.scale["scale"])) @ basis.T
    near = float((ekfac - truth).norm() / truth.norm())
    assert FAR < near < distance(optimizer, "0", truth)
