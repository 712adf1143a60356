"""The example of Poisson's equation: its residuals, and their curvature, against autograd.

The truth is of the same network, whose derivatives in the points are autograd's own.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import kfactk

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "poisson.py"
EXACT = {"rtol": 1e-9, "atol": 1e-11}
POINTS = 12


pytestmark = pytest.mark.usefixtures("doubles")


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="poisson"))


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    """Points, of which the first two thirds are inside."""
    return torch.rand(POINTS, 2), (torch.arange(POINTS) < 8)[:, None]


def residuals(script: SimpleNamespace, net: nn.Module, points: Tensor, inside: Tensor) -> Tensor:
    """Return the residuals by autograd in the points."""
    x = points.clone().requires_grad_()
    u = net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    bends = [
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    ]
    laplacian = torch.stack(bends, 1).sum(1, keepdim=True)
    return torch.where(inside, laplacian + script.source(points), 10 * u)


def test_the_residuals_are_those_of_the_equation(script, points):
    model = script.Residual(6)
    torch.testing.assert_close(model(*points), residuals(script, model.net, *points), **EXACT)
    x = torch.rand(7, 2, requires_grad=True)
    hessian = [
        torch.autograd.functional.hessian(lambda p: script.solution(p[None]).sum(), each)
        for each in x.detach()
    ]
    found = -torch.stack([each.trace() for each in hessian])
    torch.testing.assert_close(script.source(x).flatten(), found)


@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_the_scale_is_the_diagonal_of_the_curvature_of_the_residuals(script, points):
    model = script.Residual(6)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    parameters = [p for layer in layers.values() for p in (layer.weight, layer.bias)]
    rows = [
        torch.autograd.grad(each, parameters, retain_graph=True, materialize_grads=True)
        for each in residuals(script, model.net, *points).flatten()
    ]
    recipe = kfactk.build(
        **{"curvature": "taylor", "basis": "ekfac", "fisher": "exact", "likelihood": "gaussian"},
        **{"update": "sgd", "factor_every": 1, "scale_every": 1, "basis_every": 1, "lr": 1e-9},
    )
    optimizer = recipe.bind(model)
    (model(*points).square().mean() / 2).backward()
    optimizer.step()
    for i, name in enumerate(layers):
        d = torch.stack([torch.cat([r[2 * i], r[2 * i + 1][:, None]], 1) for r in rows])
        view = optimizer.layers[name]
        left, right = (view.decomposition[side]["eigenvectors"] for side in ("G", "A"))
        scale = (left.T @ d @ right).square().sum(0) / POINTS
        torch.testing.assert_close(view.scale["scale"], scale, **EXACT)
    optimizer.close()
