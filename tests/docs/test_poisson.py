"""The curvature of the example of Poisson's equation, against autograd's gradient of each residual.

The truth is of a plain network with biases, whose derivatives in the points are autograd's own.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk.errors import CaptureError

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "poisson.py"
EXACT = {"rtol": 1e-9, "atol": 1e-11}
POINTS = 12


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="poisson"))


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    """Points, of which the first two thirds are inside."""
    return torch.rand(POINTS, 2), (torch.arange(POINTS) < 8)[:, None]


def plain(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = (x.tanh() if i else x) @ weight.T + bias
    return x


def derivatives(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Return u, its gradient and its Laplacian at each point, by autograd in the points."""
    x = x.detach().requires_grad_()
    u = plain(weights, biases, x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    bends = [
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    ]
    return u, slope, torch.stack(bends, 1).sum(1, keepdim=True)


def halves(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and biases of the example's network as leaves of their own."""
    joined = [layer.weight.detach() for layer in model.layers]
    return (
        [each[:, :-1].clone().requires_grad_() for each in joined],
        [each[:, -1].clone().requires_grad_() for each in joined],
    )


def step(optimizer: kfactk.Optimizer, residuals: Tensor) -> None:
    (residuals.square().mean() / 2).backward()
    optimizer.step()


def test_jets_are_the_derivatives_of_a_network_with_biases(script, points):
    model = script.Jet(2, 6, 5, 1)
    u, slope, laplacian = derivatives(*halves(model), points[0])
    jets = model.jets(points[0])
    truth = torch.cat([u[:, None], slope[..., None], laplacian[:, None]], 1)
    torch.testing.assert_close(jets, truth, **EXACT)


def gradients(script, model: nn.Module, points: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return `D_n` of each layer, `[N, d_out, d_in + 1]`, bias last: a row of autograd a point."""
    weights, biases = halves(model)
    u, _, laplacian = derivatives(weights, biases, points[0])
    residuals = torch.where(points[1], laplacian + script.source(points[0]), 10 * u)
    torch.testing.assert_close(residuals, model(*points), **EXACT)
    rows = [
        torch.autograd.grad(each, [*weights, *biases], retain_graph=True, materialize_grads=True)
        for each in residuals.flatten()
    ]
    return [
        torch.stack([torch.cat([row[i], row[len(weights) + i][:, None]], 1) for row in rows])
        for i in range(len(weights))
    ]


@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_curvature_is_that_of_the_residuals(basis: str, script, points):
    """The scale of EKFAC is the exact diagonal of F in its basis, and G sums to F's trace."""
    model = script.Jet(2, 6, 5, 1)
    truth = gradients(script, model, points)
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, given, out: inputs.append(given[0].detach()))
        for layer in model.layers
    ]
    recipe = kfactk.build(
        **{"curvature": "kfac", "basis": basis, "fisher": "exact", "likelihood": "gaussian"},
        **{"update": "sgd", "factor_every": 1, "basis_every": 1, "lr": 1e-9},
    )
    optimizer = recipe.bind(model)
    step(optimizer, model(*points))
    for hook in hooks:
        hook.remove()
    for i, d in enumerate(truth):
        view = optimizer.layers[f"layers.{i}"]
        rows = inputs[i]  # [N, 4, d_in + 1]: the value has a one, its derivatives have none
        assert torch.equal(rows[..., -1], torch.tensor([1.0, 0, 0, 0]).expand(POINTS, 4))
        torch.testing.assert_close(
            view.factors["A"], torch.einsum("nta,ntb->ab", rows, rows) / POINTS, **EXACT
        )
        if basis == "ekfac":
            left, right = (view.decomposition[name]["eigenvectors"] for name in ("G", "A"))
            scale = (left.T @ d @ right).square().sum(0) / POINTS
            torch.testing.assert_close(view.scale["scale"], scale, **EXACT)
    optimizer.close()


def test_the_gradient_of_all_points_is_what_the_samples_sum_to(script, points):
    model = script.Jet(2, 6, 5, 1)
    truth = gradients(script, model, points)
    model(*points).sum().backward()
    for layer, d in zip(model.layers, truth, strict=True):
        torch.testing.assert_close(layer.weight.grad, d.sum(0), **EXACT)


def test_a_bias_that_derivatives_are_freed_of_afterwards_is_refused(script, points):
    """`nn.Linear` adds its bias to all rows; to take it off again uses it outside of the layer."""

    class Freed(script.Jet):
        def __init__(self) -> None:
            super().__init__(2, 6, 1)
            self.layers = nn.ModuleList([nn.Linear(2, 6), nn.Linear(6, 1)])

        def jets(self, points: Tensor) -> Tensor:
            count, d = points.shape
            rows = [points[:, None], torch.eye(d).expand(count, d, d), torch.zeros(count, 1, d)]
            jet, is_value = torch.cat(rows, 1), (torch.arange(d + 2) == 0)[:, None]
            for i, layer in enumerate(self.layers):
                jet = script.tanh(jet) if i else jet
                jet = layer(jet) - torch.where(is_value, 0.0, layer.bias)
            return jet

    model = Freed()
    recipe = kfactk.build(
        curvature="kfac", fisher="exact", likelihood="gaussian", factor_every=1, update="sgd"
    )
    optimizer = recipe.bind(model)
    with pytest.raises(CaptureError, match=r"layers\.0"):
        step(optimizer, model(*points))
    optimizer.close()
