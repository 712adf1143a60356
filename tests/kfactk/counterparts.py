"""torch.optim's own optimizers as truth for loops.

With damping tau so large that the curvature vanishes beside it, the preconditioned gradient is the
gradient over tau. A learning rate times tau then gives the plain step, to about 1e-13.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import kfactk
from kfactk import Optimizer
from tests.kfactk.small import batch, net, train

TAU = 2.0**47
OFTEN: dict[str, Any] = {
    "fisher": "mc",
    "clip": "none",
    "factor_every": 2,
    "scale_every": 3,
    "basis_every": 4,
}
SGD: dict[str, Any] = {"damping": TAU, "lr": 0.1 * TAU, **OFTEN}
RULES: dict[str, tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer], float]] = {
    "sgd": ({**SGD, "update": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.1), TAU),
    "momentum": (
        {**SGD, "update": "momentum"},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        TAU,
    ),
    "nag": (
        {**SGD, "update": "nag"},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        TAU,
    ),
    "adam": (
        {"damping": TAU, "lr": 0.01, "update": {"name": "adam", "eps": 0.0}, **OFTEN},
        lambda p: torch.optim.Adam(p, lr=0.01, eps=0.0),
        1.0,
    ),
}
"""Recipe, its counterpart, and what a learning rate of the counterpart is to be multiplied by."""


def pair(
    rule: str, model: nn.Module | None = None
) -> tuple[nn.Module, Optimizer, nn.Module, torch.optim.Optimizer, float]:
    model = net() if model is None else model
    twin = copy.deepcopy(model)
    recipe, make, factor = RULES[rule]
    return model, kfactk.build(**recipe).bind(model), twin, make(twin.parameters()), factor


def assert_close(model: nn.Module, twin: nn.Module) -> None:
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def both(
    *runs: tuple[nn.Module, torch.optim.Optimizer],
    steps: int = 5,
    after: Callable[[int], None] | None = None,
) -> None:
    for model, optimizer in runs:
        torch.manual_seed(1)
        for _ in range(steps):
            train(optimizer, model, batch())  # type: ignore[arg-type]
