"""Plain steps against their equation."""

from __future__ import annotations

import pytest
import torch

from kfactk import OptionError
from kfactk.testing import UpdateLaws
from kfactk.testing._support.trajectories import Groups
from kfactk_stages.update.sgd import Sgd
from tests.kfactk_stages.update.trajectories import assert_same, groups, parameters, run


class TestSgd(UpdateLaws):
    stage = "sgd"

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Literal(groups, {"lr": lr, "weight_decay": weight_decay})


def test_is_the_torch_optimizer_with_its_options() -> None:
    optimizer = Sgd(foreach=False).make(groups(parameters()), lr=0.1, weight_decay=0.01)
    assert type(optimizer) is torch.optim.SGD
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.003]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.2]
    assert all(
        group["foreach"] is False and group["momentum"] == 0 for group in optimizer.param_groups
    )


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {}])
def test_equation(options: dict[str, bool]) -> None:
    history = run(lambda g: Sgd(**options).make(g, lr=0.1, weight_decay=0.01))
    literal = run(lambda g: Literal(g, {"lr": 0.1, "weight_decay": 0.01}))
    assert_same(history, literal, rtol=1e-13, atol=1e-14)


class Literal(torch.optim.Optimizer):
    """theta <- theta - mu (g + lambda theta)."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * (p.grad + group["weight_decay"] * p.data)


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="exclude"):
        Sgd(foreach=True, fused=True)
    with pytest.raises(OptionError, match=r"foreach.*None"):
        Sgd(foreach="yes")
    assert Sgd() == Sgd(foreach=None)
    assert Sgd() != Sgd(foreach=False)
