"""Training goes on after an interruption (Ctrl-C) at any line of kfactk, and nothing is left over.

A step that was interrupted while the update rule ran may have been taken in part, as with any
optimizer. What must hold: the next steps run, parameters are finite, the state can be saved and
loaded, and `close` leaves model and torch as they were.
"""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer
from kfactk.testing import effort

EVERY = {"factor_every": 1, "scale_every": 1, "basis_every": 2}
RECIPES: list[dict[str, Any]] = [
    {"basis": "ekfac", "curvature": "all"},
    {"basis": "kfac", "update": "nag"},
    {"basis": {"name": "ekfac", "scale": "running"}},
    {"basis": {"name": "ekfac", "iterate_from": 2}, "fisher": "exact"},
    {"fisher": "empirical"},
    {"observe": "manual"},
    {"stagger": True, "factor_every": 3, "scale_every": 3, "basis_every": 6},
]
MOST_LINES = 3000
"""About as many lines of kfactk as one step runs."""


class Interruption(BaseException):
    """As KeyboardInterrupt, which would end the tests."""


class Interrupter:
    """Raises an error at one line of kfactk, counted from now."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Run as a trace function."""
        if (
            event == "line"
            and Path(kfactk.__file__).parent in Path(frame.f_code.co_filename).parents
        ):
            self.left -= 1
            if self.left == 0:
                raise Interruption
        return self


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    output = model(torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4))
    if optimizer.recipe.observe == "manual":
        optimizer.observe()
    F.cross_entropy(output, torch.arange(8) % 3).backward()
    optimizer.step()


def traces() -> list[Any]:
    """What an optimizer changes around the model, all of it global."""
    return [Tensor.retain_grad, Tensor.register_hook, torch._dynamo.eval_frame._stance.stance]


def hooks(model: nn.Module) -> int:
    return sum(
        len(found)
        for module in model.modules()
        for found in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


@pytest.mark.parametrize("seed", range(effort(16)))
def test_an_interruption_at_any_line_is_survived(seed: int) -> None:
    before, draw = traces(), random.Random(seed)
    model, recipe = net(), draw.choice(RECIPES)
    optimizer = kfactk.build(**{**EVERY, **recipe}).bind(model)
    for _ in range(draw.randrange(4)):
        step(model, optimizer)
    interrupter, usual = Interrupter(draw.randrange(1, MOST_LINES)), sys.gettrace()
    sys.settrace(interrupter)
    try:
        while interrupter.left > 0:
            step(model, optimizer)
    except Interruption:
        pass
    finally:
        sys.settrace(usual)
    for _ in range(3):
        step(model, optimizer)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.close()
    assert hooks(model) == 0
    assert traces() == before
