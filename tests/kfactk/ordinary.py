"""A small convolutional network, and recipes of which nothing is due after the first steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer
from tests.kfactk.small import values

UPDATES: dict[str, Any] = {
    "sgd": {"name": "sgd", "fused": True},
    "momentum": {"name": "momentum", "fused": True},
    "adam": {"name": "adam", "fused": True},
    "amsgrad": {"name": "adam", "fused": True, "amsgrad": True},
    "adamw": {"name": "adamw", "fused": True},
}
RARELY: dict[str, Any] = {"factor_every": 100, "scale_every": 100, "basis_every": 100}


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return [(torch.randn(6, 2, 4, 4), torch.arange(6) % 3) for _ in range(count)]


def bound(model: nn.Module, params: Any = None, **recipe: Any) -> Optimizer:
    options: dict[str, Any] = {
        "update": UPDATES["adam"],
        "fisher": "exact",
        "lr": 0.01,
        "weight_decay": 0.01,
    }
    return kfactk.build(**(options | RARELY | recipe)).bind(model, params)


def train(
    optimizer: Optimizer,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    spoilt: Callable[[nn.Module], None] | None = None,
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    if spoilt is not None:
        spoilt(model)
    optimizer.step()


def spoil(value: float, layer: int = 0) -> Callable[[nn.Module], None]:
    def fault(model: Any) -> None:
        model[layer].weight.grad.view(-1)[1] = value

    return fault


def everything(optimizer: Optimizer, model: nn.Module) -> list[Tensor]:
    """Return the parameters, and all tensors of the optimizer's state but its number of steps."""
    entries = [optimizer.state[parameter] for parameter in model.parameters()]
    return values(model) + [
        v
        for entry in entries
        for key, v in sorted(entry.items())
        if key != "kfactk.step" and isinstance(v, Tensor)
    ]
