"""Losses and models that hold derivatives: physics-informed networks and gradient penalties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk import CaptureError

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)


class Residual(nn.Module):
    """du/dx + u of a small network u."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.u = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = self.u(x)
        [slope] = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope[:, :1] + u


def recipe(**options: Any) -> kfactk.Recipe:
    given = {"likelihood": "gaussian", "update": "adam", "lr": 0.01, "clip": "none", **options}
    return kfactk.build(curvature="kfac", **given)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_residual_is_refused_with_all_its_layers(fisher: str) -> None:
    model = Residual()
    optimizer = recipe(fisher=fisher).bind(model)
    with pytest.raises(CaptureError, match=r"derivative.*exclude=\['u.0', 'u.2'\]"):
        model(X)
    optimizer.close()


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.filterwarnings("ignore::kfactk.KfactkWarning")
def test_a_residual_trains_plainly_on_request(fisher: str) -> None:
    """As by the update rule alone."""
    ends = []
    for bind in (
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        lambda model: recipe(fisher=fisher, unseen="plain").bind(model),
    ):
        model = Residual()
        optimizer = bind(model)
        for _ in range(4):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
        ends.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_a_gradient_penalty_leaves_the_fisher_of_the_output_alone(fisher: str) -> None:
    """The penalty is no part of the likelihood: factors are those without it."""
    found = []
    for penalty in (0.0, 1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        optimizer = recipe(fisher=fisher, lr=0.0).bind(model)
        x = X.clone().requires_grad_()
        out = model(x)
        loss = out.square().mean()
        if penalty:
            [slope] = torch.autograd.grad(out.sum(), x, create_graph=True)
            loss = loss + penalty * (slope.norm(dim=1) - 1).square().mean()
        loss.backward()
        optimizer.step()
        found.append([f for view in optimizer.layers.values() for f in view.factors.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
