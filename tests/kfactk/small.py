"""A small model, its data, and the loop that everyone writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer

F64 = torch.float64


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=F64), torch.arange(n) % 3


def bound(model: nn.Module, params: Any = None, **recipe: Any) -> Optimizer:
    """Bind a recipe whose defaults are no sampling, no clipping and the plain step."""
    options: dict[str, Any] = {
        "fisher": "exact",
        "clip": "none",
        "update": "sgd",
        "lr": 0.1,
        "damping": 0.05,
    }
    return kfactk.build(**(options | recipe)).bind(model, params)


def train(
    optimizer: Optimizer, model: nn.Module, data: tuple[Tensor, Tensor], observe: bool = False
) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(data[0]), data[1])
    if observe:
        optimizer.observe()
    loss.backward()
    optimizer.step()
    return loss.item()


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def factors(optimizer: Optimizer) -> list[Tensor]:
    return [
        value for view in optimizer.layers.values() for _, value in sorted(view.factors.items())
    ]


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    """The same bit for bit."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def rule_state(optimizer: torch.optim.Optimizer) -> str:
    """What the update rule keeps, to be compared."""
    found = {}
    for number, entry in optimizer.state_dict()["state"].items():
        mine = {k: v for k, v in entry.items() if not str(k).startswith("kfactk.")}
        if mine:
            found[number] = mine
    return str(found)
