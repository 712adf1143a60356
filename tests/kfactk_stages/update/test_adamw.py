"""AdamW: decay apart from the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kfactk import OptionError
from kfactk.testing import UpdateLaws
from kfactk.testing._support.trajectories import Groups
from kfactk_stages.update.adamw import AdamW
from tests.kfactk_stages.update.trajectories import assert_same, groups, parameters, run


class Literal(torch.optim.Optimizer):
    """theta <- (1 - mu lambda) theta, then Adam on the gradient alone."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rho1, rho2 = group["betas"]
            for p in group["params"]:
                state, g = self.state[p], p.grad
                state["t"] = t = state.get("t", 0) + 1
                state["s"] = s = rho1 * state.get("s", 0.0) + (1 - rho1) * g
                state["r"] = r = rho2 * state.get("r", 0.0) + (1 - rho2) * g * g
                step = (s / (1 - rho1**t)) / (torch.sqrt(r / (1 - rho2**t)) + group["eps"])
                p.data = (1 - group["lr"] * group["weight_decay"]) * p.data - group["lr"] * step


class TestAdamW(UpdateLaws):
    stage = "adamw"

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Literal(
            groups, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
        )


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_equation(options: dict[str, Any]) -> None:
    history = run(
        lambda g: AdamW(betas=(0.7, 0.9), eps=1e-3, **options).make(g, lr=0.05, weight_decay=0.3)
    )
    literal = run(
        lambda g: Literal(g, {"lr": 0.05, "weight_decay": 0.3, "betas": (0.7, 0.9), "eps": 1e-3})
    )
    assert_same(history, literal, rtol=1e-9, atol=1e-10)


def test_is_the_torch_optimizer() -> None:
    given = groups(parameters())
    optimizer = AdamW(amsgrad=True).make(given, lr=0.05, weight_decay=0.0)
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["amsgrad"] for group in optimizer.param_groups)
    assert given[0]["weight_decay"] == 0.0  # not torch's default of 0.01


@pytest.mark.parametrize(
    "options", [{"betas": (0.9, 1.0)}, {"eps": -1.0}, {"amsgrad": None}, {"fused": "yes"}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        AdamW(**options)
