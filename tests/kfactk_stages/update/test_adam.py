"""Adam against equation (13) and against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kfactk
from kfactk import OptionError
from kfactk.testing import UpdateLaws
from kfactk.testing._support.trajectories import Groups
from kfactk_stages.update.adam import Adam
from tests.kfactk_stages.update.trajectories import assert_same, groups, parameters, run


class Literal(torch.optim.Optimizer):
    """Equation (13), line by line."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rho1, rho2 = group["betas"]
            for p in group["params"]:
                state, g = self.state[p], p.grad + group["weight_decay"] * p.data
                state["t"] = t = state.get("t", 0) + 1
                state["s"] = s = rho1 * state.get("s", 0.0) + (1 - rho1) * g
                state["r"] = r = rho2 * state.get("r", 0.0) + (1 - rho2) * g * g
                s_hat, r_hat = s / (1 - rho1**t), r / (1 - rho2**t)
                p.data = p.data - group["lr"] * s_hat / (torch.sqrt(r_hat) + group["eps"])


class TestAdam(UpdateLaws):
    stage = "adam"

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Literal(
            groups, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
        )


class TestFusedAmsgrad(UpdateLaws):
    stage = {"name": "adam", "amsgrad": True, "fused": True, "eps": 1e-3}  # noqa: RUF012

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            groups, lr=lr, weight_decay=weight_decay, amsgrad=True, eps=1e-3, foreach=False
        )


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {}])
@pytest.mark.parametrize("rates", [((0.9, 0.999), 1e-8), ((0.5, 0.8), 0.1)])
def test_is_equation_13(rates: tuple[tuple[float, float], float], options: dict[str, Any]) -> None:
    betas, eps = rates
    factors = [1, 1, 0.1, 1, 5]
    history = run(
        lambda g: Adam(betas=betas, eps=eps, **options).make(g, lr=0.05, weight_decay=0.01),
        lr_factors=factors,
    )
    literal = run(
        lambda g: Literal(g, {"lr": 0.05, "weight_decay": 0.01, "betas": betas, "eps": eps}),
        lr_factors=factors,
    )
    assert_same(history, literal, rtol=1e-9, atol=1e-10)


def test_amsgrad_is_passed_on() -> None:
    history = run(lambda g: Adam(amsgrad=True).make(g, lr=0.05, weight_decay=0.01))
    assert_same(
        history, run(lambda g: torch.optim.Adam(g, lr=0.05, weight_decay=0.01, amsgrad=True))
    )
    assert not torch.equal(
        history[-1][0], run(lambda g: torch.optim.Adam(g, lr=0.05, weight_decay=0.01))[-1][0]
    )


def test_is_the_torch_optimizer() -> None:
    assert type(Adam().make(groups(parameters()), lr=0.05, weight_decay=0.0)) is torch.optim.Adam


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_fused_steps_equal_plain_steps_for_every_memory_layout(
    format: torch.memory_format,
) -> None:
    histories = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = (
            torch.nn.Sequential(
                torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 2)
            )
            .double()
            .to(memory_format=format)
        )
        optimizer = kfactk.build(
            update={"name": "adam", "fused": fused}, clip="none", fisher="exact"
        ).bind(model)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                model(torch.randn(4, 2, 3, 3, dtype=torch.float64)), torch.tensor([0, 1, 1, 0])
            ).backward()
            optimizer.step()
        histories.append([[p.detach() for p in model.parameters()]])
    assert_same(*histories, rtol=1e-9, atol=1e-10)


def test_betas_may_come_from_json() -> None:
    assert Adam(betas=[0.9, 0.99]) == Adam(betas=(0.9, 0.99))
    assert hash(Adam(betas=[0.9, 0.99])) == hash(Adam(betas=(0.9, 0.99)))


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"betas": 0.9},
        {"betas": (-0.1, 0.9)},
        {"eps": -1e-8},
        {"eps": "0"},
        {"amsgrad": 1},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Adam(**options)
