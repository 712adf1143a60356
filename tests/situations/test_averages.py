"""Averages of weights, schedulers, and gradient accumulation with an uneven last batch.

Truth is a rule of torch that EKFAC written again feeds, with torch's own averages and schedulers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from tests.situations.by_hand import (
    LR,
    RUNNING,
    Hand,
    assert_same,
    batch,
    bound,
    categorical,
    perceptron,
    sgd,
    take,
)

EXAMPLES, LAYERS = 8, ["0", "2"]


def step_of(model: nn.Module, optimizer: Any, number: int) -> Tensor:
    x, y = batch(number)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def step_by_hand(model: nn.Module, rule: Any, number: int) -> Tensor:
    x, y = batch(number)
    hand = Hand(model, LAYERS)
    for row in x:
        hand.example(lambda row: categorical(model(row[None])), row)
    loss = F.cross_entropy(model(x), y)
    take(rule, hand, loss)
    return loss.detach()


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "step": lambda opt: schedulers.StepLR(opt, 2, 0.3),
    "lambda": lambda opt: schedulers.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "cosine": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 3),
    "cycle": lambda opt: schedulers.CyclicLR(opt, 0.01, 0.3, 2, cycle_momentum=True),
    "one cycle": lambda opt: schedulers.OneCycleLR(opt, 0.5, 6),
    "warmup": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.LinearLR(opt, 0.1, 1.0, 3), schedulers.ExponentialLR(opt, 0.7)], [3]
    ),
    "plateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0, threshold=1.0),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedulers(name: str) -> None:
    """Those that cycle the momentum, too."""
    model = perceptron()
    twin = copy.deepcopy(model)
    optimizer: Any = bound(model, update="momentum")
    rule = torch.optim.SGD(twin.parameters(), lr=LR, momentum=0.9)
    mine, theirs = SCHEDULES[name](optimizer), SCHEDULES[name](rule)
    for number in range(6):
        losses = step_of(model, optimizer, number), step_by_hand(twin, rule, number)
        for scheduler, loss in zip((mine, theirs), losses, strict=True):
            scheduler.step(*([loss] if name == "plateau" else []))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rule.param_groups[0]["lr"])
    assert_same(model, twin)


@pytest.mark.parametrize("made", ["before bind", "after bind"])
def test_a_moving_average_that_is_evaluated_and_trained_from(made: str) -> None:
    """The average is a copy; halfway its weights become those of the model."""
    model = perceptron()
    twin = copy.deepcopy(model)
    ema = {"multi_avg_fn": get_ema_multi_avg_fn(0.7)}
    if made == "before bind":
        average = AveragedModel(model, **ema)
    optimizer, rule = bound(model), sgd(twin)
    if made == "after bind":
        average = AveragedModel(model, **ema)
    other = AveragedModel(twin, **ema)
    for number in range(6):
        step_of(model, optimizer, number)
        step_by_hand(twin, rule, number)
        average.update_parameters(model)
        other.update_parameters(twin)
        F.cross_entropy(average(batch(number)[0]), batch(number)[1]).backward()
        if number == 3:
            model.load_state_dict(average.module.state_dict())
            twin.load_state_dict(other.module.state_dict())
    assert_same(model, twin)
    assert_same(average.module, other.module)


def weights_from(model: nn.Module, average: nn.Module) -> Callable[[], None]:
    """Put an average's weights into the model for an evaluation; return how to undo it."""
    kept = [parameter.detach().clone() for parameter in model.parameters()]

    def back() -> None:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), kept, strict=True):
                parameter.copy_(value)

    with torch.no_grad():
        for parameter, value in zip(model.parameters(), average.parameters(), strict=True):
            parameter.copy_(value)
    return back


def test_weights_that_are_swapped_for_an_evaluation() -> None:
    """As timm and diffusers do, between two steps."""
    model = perceptron()
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model), sgd(twin)
    average = AveragedModel(model)
    for number in range(4):
        step_of(model, optimizer, number)
        step_by_hand(twin, rule, number)
        average.update_parameters(model)
        back = weights_from(model, average.module)
        model.eval()
        with torch.no_grad():
            model(batch(number)[0])
        model.train()
        back()
    assert_same(model, twin)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
        self.double()


def test_stochastic_weight_averaging() -> None:
    """SWALR, and `update_bn`, which calls the average in training mode.

    With a damping that outweighs the curvature the step is SGD's, with `lr / damping`.
    """
    model, damping = Normed(), 1e8
    twin = copy.deepcopy(model)
    optimizer = bound(model, damping=damping, lr=0.1 * damping)
    rule = torch.optim.SGD(twin.parameters(), lr=0.1)
    averages = AveragedModel(model), AveragedModel(twin)
    schedules = SWALR(optimizer, 0.05 * damping, 2), SWALR(rule, 0.05, 2)
    for number in range(5):
        step_of(model, optimizer, number)
        step_of(twin, rule, number)
        for average, each, scheduler in zip(averages, (model, twin), schedules, strict=True):
            average.update_parameters(each)
            scheduler.step()
    data = [batch(number)[0] for number in range(3)]
    for average in averages:
        update_bn(data, average)
    assert_same(averages[0].module, averages[1].module, rtol=1e-5, atol=1e-5)
    mine, theirs = (dict(average.module.named_buffers()) for average in averages)
    for name, buffer in mine.items():
        torch.testing.assert_close(buffer, theirs[name], rtol=1e-5, atol=1e-5)


def test_update_bn_on_the_bound_model_leaves_no_trace() -> None:
    """It runs without gradients, though in training mode."""
    ends = []
    for updated in (False, True):
        model = Normed()
        optimizer = bound(model)
        for number in range(3):
            step_of(model, optimizer, number)
            if updated:
                kept = copy.deepcopy(dict(model.named_buffers()))
                update_bn([batch(number)[0]], model)
                model.load_state_dict(kept, strict=False)
        ends.append(model)
    assert_same(*ends)


SIZES = [3, 3, 3, 2]
"""Examples of the micro-batches, of which the last one of a loader is smaller."""


def micro_loss(model: nn.Module, x: Tensor, y: Tensor, *, summed: bool) -> Tensor:
    """Return the loss of a micro-batch: its sum, or its mean divided by their number."""
    loss = F.cross_entropy(model(x), y, reduction="sum" if summed else "mean")
    return loss if summed else loss / len(SIZES)


def in_micro_batch(
    model: nn.Module, fisher: str, x: Tensor, y: Tensor, *, summed: bool
) -> list[Tensor]:
    if fisher == "exact":
        return categorical(model(x[None]))
    return [micro_loss(model, x[None], y[None], summed=summed)]


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "running"])
def test_accumulation_with_an_uneven_last_batch(fisher: str, summed: bool) -> None:
    """Curvature counts examples; the gradient is what the loop made of its losses."""
    model = perceptron()
    twin = copy.deepcopy(model)
    kind = {"fisher": "empirical", "basis": RUNNING} if fisher == "running" else {"fisher": fisher}
    optimizer = bound(model, reduction="sum" if summed else "mean", **kind)
    rule = sgd(twin)
    for number in range(3):
        x, y = batch(number, sum(SIZES))
        parts = list(zip(x.split(SIZES), y.split(SIZES), strict=True))
        optimizer.zero_grad()
        for part in parts:
            micro_loss(model, *part, summed=summed).backward()
        optimizer.step()
        hand = Hand(twin, LAYERS, summed=summed)
        for row, label in zip(x, y, strict=True):
            hand.example(partial(in_micro_batch, summed=summed), twin, fisher, row, label)
        how = "running" if fisher == "running" else "solve"
        total = sum(micro_loss(twin, *part, summed=summed) for part in parts)
        take(rule, hand, total, how=how)
    assert_same(model, twin)
