"""RAdam against the paper's formulas with torch's threshold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kfactk import OptionError
from kfactk.testing import UpdateLaws
from kfactk.testing._support.trajectories import Groups
from kfactk_stages.update.radam import RAdam
from tests.kfactk_stages.update.trajectories import assert_same, groups, parameters, run

USUAL = {"betas": (0.9, 0.999), "eps": 1e-8, "threshold": 5.0}


class Literal(torch.optim.Optimizer):
    """Algorithm 2 of the paper with a threshold of choice; delta stands where torch has it."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rho1, rho2 = group["betas"]
            longest = 2 / (1 - rho2) - 1
            for p in group["params"]:
                state, g = self.state[p], p.grad
                if group["decoupled"]:
                    p.data = (1 - group["lr"] * group["weight_decay"]) * p.data
                else:
                    g = g + group["weight_decay"] * p.data
                state["t"] = t = state.get("t", 0) + 1
                state["s"] = s = rho1 * state.get("s", 0.0) + (1 - rho1) * g
                state["r"] = r = rho2 * state.get("r", 0.0) + (1 - rho2) * g * g
                step = s / (1 - rho1**t)
                length = longest - 2 * t * rho2**t / (1 - rho2**t)
                if length > group["threshold"]:
                    tempered = math.sqrt(
                        (length - 4)
                        * (length - 2)
                        * longest
                        / ((longest - 4) * (longest - 2) * length)
                    )
                    step = step * tempered * math.sqrt(1 - rho2**t) / (torch.sqrt(r) + group["eps"])
                p.data = p.data - group["lr"] * step


class TestRAdam(UpdateLaws):
    stage = "radam"

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Literal(
            groups, {"lr": lr, "weight_decay": weight_decay, **USUAL, "decoupled": False}
        )


class TestDecoupledRAdam(UpdateLaws):
    stage = {"name": "radam", "decoupled_weight_decay": True, "foreach": False}  # noqa: RUF012

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Literal(groups, {"lr": lr, "weight_decay": weight_decay, **USUAL, "decoupled": True})


def literal(threshold: float, decoupled: bool = False) -> list[list[torch.Tensor]]:
    defaults = {
        "lr": 0.05,
        "weight_decay": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-3,
        "decoupled": decoupled,
        "threshold": threshold,
    }
    return run(lambda g: Literal(g, defaults))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_formulas(decoupled: bool, foreach: bool) -> None:
    rule = RAdam(eps=1e-3, decoupled_weight_decay=decoupled, foreach=foreach)
    history = run(lambda g: rule.make(g, lr=0.05, weight_decay=0.1))
    assert_same(history, literal(5.0, decoupled), rtol=1e-9, atol=1e-10)


def test_rectifies_one_step_later_than_the_paper() -> None:
    history = run(lambda g: RAdam(eps=1e-3).make(g, lr=0.05, weight_decay=0.1))
    paper = literal(4.0)
    assert_same(history[:4], paper[:4], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(history[4][0], paper[4][0], rtol=1e-6)


def test_is_the_torch_optimizer() -> None:
    assert type(RAdam().make(groups(parameters()), lr=0.05, weight_decay=0.0)) is torch.optim.RAdam


@pytest.mark.parametrize(
    "options",
    [
        {"betas": [0.9, 0.9, 0.9]},
        {"eps": float("inf")},
        {"decoupled_weight_decay": 0},
        {"foreach": 1},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        RAdam(**options)
