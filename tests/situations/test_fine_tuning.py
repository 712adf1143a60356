"""Freezing schedules, new heads, averages of weights: the curvature follows what is trained.

Truth is a loop that begins where the other one changed, with the curvature that is due anew.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import kfactk
from kfactk import Optimizer

EVERY = {"factor_every": 1, "scale_every": 1, "basis_every": 1, "factor_decay": 0.0}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (9,), generator=generator)


def bound(model: nn.Module, **options: Any) -> Optimizer:
    given = {"fisher": "exact", "update": "sgd", "lr": 0.1, "damping": 0.1, **EVERY, **options}
    return kfactk.build(curvature="kfac", **given).bind(model)


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    x, y = batch(number)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_gradual_unfreezing(fisher: str) -> None:
    """The head learns alone, then the body joins: with memoryless averages, as if bound then."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = bound(model, fisher=fisher)
    for number in range(2):
        step(model, optimizer, number)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each[0].requires_grad_(True)
    other = bound(twin, fisher=fisher)
    for number in range(2, 5):
        step(model, optimizer, number)
        step(twin, other, number)
    assert_close(values(model), values(twin))
    assert set(optimizer.layers) == {"0", "2"}


def test_a_new_head_is_followed() -> None:
    model = net()
    optimizer = bound(model)
    step(model, optimizer, 0)
    torch.manual_seed(1)
    model[2] = nn.Linear(6, 3).double()
    optimizer.param_groups[0]["params"][2:] = list(model[2].parameters())
    twin = copy.deepcopy(model)
    other = bound(twin)
    for number in range(1, 4):
        step(model, optimizer, number)
        step(twin, other, number)
    assert_close(values(model), values(twin))


def test_averages_of_weights_and_evaluations_between_steps_leave_no_trace() -> None:
    ends = []
    for averaged in (False, True):
        model = net()
        optimizer = bound(model)
        average = AveragedModel(model) if averaged else None
        for number in range(4):
            step(model, optimizer, number)
            if average is not None:
                average.update_parameters(model)
                average(batch(number)[0])
                model.eval()
                model(batch(number)[0]).sum().backward()
                model.train()
                with torch.no_grad():
                    model(batch(number)[0])
        ends.append(values(model))
    assert_close(*ends)


def test_distillation_from_a_copy_leaves_no_trace() -> None:
    """A frozen teacher, called in training mode with gradients enabled."""
    ends = []
    for distilled in (False, True):
        model = net()
        teacher = copy.deepcopy(model).requires_grad_(False)
        optimizer = bound(model)
        for number in range(3):
            x, y = batch(number)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if distilled:
                loss = loss + 0 * F.mse_loss(teacher(x), torch.zeros(9, 3, dtype=torch.float64))
            loss.backward()
            optimizer.step()
        ends.append(values(model))
    assert_close(*ends)
