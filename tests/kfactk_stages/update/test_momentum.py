"""Heavy-ball momentum against its equation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kfactk import OptionError
from kfactk.testing import UpdateLaws
from kfactk.testing._support.trajectories import Groups
from kfactk_stages.update.momentum import Momentum
from tests.kfactk_stages.update.trajectories import assert_same, groups, parameters, run


class Literal(torch.optim.Optimizer):
    """b <- alpha b + (1 - dampening) p, theta <- theta - mu b; b starts as the first p."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad + group["weight_decay"] * p.data
                first = "b" not in self.state[p]
                b = (
                    g
                    if first
                    else group["momentum"] * self.state[p]["b"] + (1 - group["dampening"]) * g
                )
                self.state[p]["b"] = b.clone()
                p.data = p.data - group["lr"] * b


class TestMomentum(UpdateLaws):
    stage = "momentum"

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Literal(
            groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.9, "dampening": 0.0}
        )


class TestDampedMomentum(UpdateLaws):
    stage = {"name": "momentum", "momentum": 0.7, "dampening": 0.3, "foreach": False}  # noqa: RUF012

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Literal(
            groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.7, "dampening": 0.3}
        )


@pytest.mark.parametrize("dampening", [0.0, 0.3])
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_equation(dampening: float, options: dict[str, Any]) -> None:
    common = {"momentum": 0.8, "dampening": dampening}
    history = run(
        lambda g: Momentum(**common, **options).make(g, lr=0.1, weight_decay=0.01),
        lr_factors=[1, 1, 0.1, 1, 3],
    )
    literal = run(
        lambda g: Literal(g, {"lr": 0.1, "weight_decay": 0.01, **common}),
        lr_factors=[1, 1, 0.1, 1, 3],
    )
    assert_same(history, literal, rtol=1e-12, atol=1e-13)


def test_is_the_torch_optimizer() -> None:
    optimizer = Momentum().make(groups(parameters()), lr=0.1, weight_decay=0.0)
    assert type(optimizer) is torch.optim.SGD
    assert all(
        group["momentum"] == 0.9 and group["dampening"] == 0 and not group["nesterov"]
        for group in optimizer.param_groups
    )


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": "0.9"},
        {"dampening": 1.5},
        {"momentum": True},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Momentum(**options)
