"""Steps with a velocity against their equation."""

from __future__ import annotations

import pytest
import torch

from kfactk import OptionError
from kfactk.testing import UpdateLaws
from kfactk.testing._support.trajectories import Groups
from kfactk_stages.update.velocity import Velocity


class Literal(torch.optim.Optimizer):
    """v <- alpha v - mu p, theta <- theta + v; v starts as 0."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad + group["weight_decay"] * p.data
                v = group["momentum"] * self.state[p].get("v", 0 * g) - group["lr"] * g
                self.state[p]["v"] = v.clone()
                p.data = p.data + v


class TestVelocity(UpdateLaws):
    stage = {"name": "velocity", "momentum": 0.7}  # noqa: RUF012

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Literal(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.7})


def test_constant_numbers_are_heavy_ball() -> None:
    found = []
    for make in (
        lambda groups: Velocity(momentum=0.8).make(groups, lr=0.1, weight_decay=0.02),
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, weight_decay=0.02),
    ):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = make([{"params": [w]}])
        for number in range(6):
            w.grad = torch.tensor([1.0, 0.5], dtype=torch.float64) * (number - 2.5)
            optimizer.step()
        found.append(w.detach())
    torch.testing.assert_close(*found)


def test_a_changed_rate_acts_on_the_new_gradient_only() -> None:
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = Velocity(momentum=0.5).make([{"params": [w]}], lr=0.1, weight_decay=0.0)
    w.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert w.item() == pytest.approx(-0.1 - 0.05)
    assert optimizer.state[w]["velocity"].item() == pytest.approx(-0.05)


def test_sparse_gradients_are_taken() -> None:
    w = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = Velocity(momentum=0.5).make([{"params": [w]}], lr=1.0, weight_decay=0.0)
    w.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2))
    optimizer.step()
    assert w.tolist() == [[0.0, 0.0], [-1.0, -1.0], [0.0, 0.0]]


def test_refuses_a_share_out_of_range() -> None:
    with pytest.raises(OptionError, match=r"momentum=1.*in \[0, 1\)"):
        Velocity(momentum=1.0)
