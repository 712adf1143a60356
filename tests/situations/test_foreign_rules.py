"""Update rules of other packages, and of torch.optim.

Truth is the rule itself: on the model's own gradients where nothing has a block, and otherwise on
the gradients that EKFAC, written again in float64, makes of them.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Optimizer
from tests.situations.by_hand import Hand, assert_same, categorical, draw, recipe

EXAMPLES, STEPS, RATE = 8, 4, 0.01
LAYERS = ["0", "3"]
DEFAULTS: dict[str, Any] = {"weight_decay": 0.01}

TORCH = {
    "torch.optim.Adadelta": {},
    "torch.optim.Adafactor": {},
    "torch.optim.Adagrad": {},
    "torch.optim.Adamax": {},
    "torch.optim.ASGD": {},
    "torch.optim.NAdam": {},
    "torch.optim.RMSprop": {"momentum": 0.5, "centered": True},
    "torch.optim.SGD": {"momentum": 0.9, "nesterov": True},
}
SCHEDULE_FREE = {
    "schedulefree.AdamWScheduleFree": {"warmup_steps": 2},
    "schedulefree.RAdamScheduleFree": {"silent_sgd_phase": False},
    "schedulefree.SGDScheduleFree": {},
}
HEAVYBALL = {
    "heavyball.AdamW": {},
    "heavyball.ADOPT": {},
    "heavyball.LaProp": {},
    "heavyball.Muon": {},
    "heavyball.PSGDKron": {},
    "heavyball.SFAdamW": {},
}
BITSANDBYTES = {
    "bitsandbytes.optim.Adam": {},
    "bitsandbytes.optim.AdamW": {},
    "bitsandbytes.optim.Lion": {},
    "bitsandbytes.optim.SGD": {"momentum": 0.9},
}
UNSTEADY = {
    "heavyball.SOAP": {"precondition_frequency": 2},
    "bitsandbytes.optim.AdamW8bit": {"min_8bit_size": 0},
    "bitsandbytes.optim.Lion8bit": {"min_8bit_size": 0},
}
"""Here the last bit of a gradient may turn the step: by rounding, or in a null space."""
RULES = {**TORCH, **SCHEDULE_FREE, **HEAVYBALL, **BITSANDBYTES}


def rule(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """Return a class with options; its package is imported here, which takes seconds."""
    package, _, kind = name.rpartition(".")
    module = importlib.import_module(package)
    if package == "heavyball":
        module.utils.compile_mode = None
    return functools.partial(getattr(module, kind), **options)


def net(dtype: torch.dtype) -> nn.Sequential:
    """A normalization is left to the rule."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def precision(name: str) -> torch.dtype:
    """The last two packages compute in single precision."""
    single = name.startswith(("heavyball", "bitsandbytes"))
    return torch.float32 if single else torch.float64


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return draw(EXAMPLES, 4, seed=step).to(dtype), (torch.arange(EXAMPLES) + step) % 3


def bound(model: nn.Module, update: Any, **options: Any) -> Optimizer:
    return recipe(update=update, lr=RATE, **{**DEFAULTS, **options}).bind(model)


def alone(model: nn.Module, update: Any) -> Any:
    return update(model.parameters(), lr=RATE, **DEFAULTS)


def mode(optimizer: Any, name: str) -> None:
    """As loops do that allow for schedule-free rules."""
    if hasattr(optimizer, name):
        getattr(optimizer, name)()


def step_of(model: nn.Module, optimizer: Any, number: int) -> None:
    x, y = batch(number, next(model.parameters()).dtype)
    mode(optimizer, "train")
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    torch.manual_seed(number)  # heavyball rounds at random
    optimizer.step()


def step_by_hand(model: nn.Module, optimizer: Any, number: int) -> None:
    """Take the rule's step on preconditioned gradients."""
    mode(optimizer, "train")
    double = copy.deepcopy(model).double()
    hand, (x, y) = Hand(double, LAYERS), batch(number, torch.float64)
    for row in x:
        hand.example(lambda row: categorical(double(row[None])), row)
    hand.fill(F.cross_entropy(double(x), y), double.parameters())
    for mine, theirs in zip(model.parameters(), double.parameters(), strict=True):
        assert theirs.grad is not None
        mine.grad = theirs.grad.to(mine.dtype)
    torch.manual_seed(number)
    optimizer.step()


@pytest.mark.parametrize(("name", "options"), list((RULES | UNSTEADY).items()))
@pytest.mark.filterwarnings("ignore:no layer is preconditioned")
def test_a_rule_without_curvature_is_itself(name: str, options: dict[str, Any]) -> None:
    """Bit for bit."""
    model = net(precision(name))
    twin = copy.deepcopy(model)
    optimizer = bound(model, rule(name, options), exclude=["*"])
    other = alone(twin, rule(name, options))
    for number in range(STEPS):
        step_of(model, optimizer, number)
        step_of(twin, other, number)
        for each in (optimizer, other):
            mode(each, "eval")
        assert_same(model, twin, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("name", "options"), list(RULES.items()))
def test_a_rule_takes_preconditioned_gradients(name: str, options: dict[str, Any]) -> None:
    dtype = precision(name)
    model = net(dtype)
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, other = bound(model, rule(name, options)), alone(twin, rule(name, options))
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {}
    for number in range(STEPS):
        step_of(model, optimizer, number)
        step_by_hand(twin, other, number)
        for each in (optimizer, other):
            mode(each, "eval")
        assert_same(model, twin, **tolerance)
    moved = [(p - q).norm() for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    assert min(moved) > 1e-3 * RATE


@pytest.mark.parametrize(("name", "options"), list(SCHEDULE_FREE.items()))
def test_a_rule_without_schedules_resumes(name: str, options: dict[str, Any]) -> None:
    """It is saved while its averages stand in the model, as its authors ask."""
    model = net(torch.float64)
    optimizer = bound(model, rule(name, options))
    for number in range(2):
        step_of(model, optimizer, number)
    mode(optimizer, "eval")
    twin = copy.deepcopy(model)
    other = bound(twin, rule(name, options))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(2, 4):
        step_of(model, optimizer, number)
        step_of(twin, other, number)
    for each in (optimizer, other):
        mode(each, "eval")
    assert_same(model, twin)


def test_a_rule_that_was_not_told_to_train_says_so() -> None:
    model = net(torch.float64)
    optimizer = bound(model, rule("schedulefree.AdamWScheduleFree", {}))
    x, y = batch(0, torch.float64)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(Exception, match="train mode when step is called"):
        optimizer.step()


def test_a_wrapper_around_the_optimizer() -> None:
    """schedulefree's wrapper takes any optimizer, and calls its step."""
    schedulefree = importlib.import_module("schedulefree")
    model = net(torch.float64)
    twin = copy.deepcopy(model)
    wrapper = schedulefree.ScheduleFreeWrapper(bound(model, "sgd"), momentum=0.9)
    other = schedulefree.ScheduleFreeWrapper(alone(twin, torch.optim.SGD), momentum=0.9)
    for number in range(STEPS):
        step_of(model, wrapper, number)
        step_by_hand(twin, other, number)
    assert_same(model, twin)
    for each in (wrapper, other):
        mode(each, "eval")
    assert_same(model, twin)


class Sharpness(torch.optim.Optimizer):
    """SAM as its users write it: a rule around another, which steps with a gradient from nearby."""

    def __init__(self, base: torch.optim.Optimizer, radius: float = 0.05) -> None:
        self.base, self.radius, self.moved = base, radius, []
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups

    def trained(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self) -> None:
        """Go up, along the gradient."""
        norm = torch.stack([p.grad.norm() for p in self.trained()]).norm()
        self.moved = [(p, self.radius * p.grad / norm) for p in self.trained()]
        for parameter, by in self.moved:
            parameter.add_(by)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Go back, and step."""
        for parameter, by in self.moved:
            parameter.sub_(by)
        self.base.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def of_one(model: nn.Module, fisher: str, x: Tensor, y: Tensor) -> list[Tensor]:
    logits = model(x[None])
    return categorical(logits) if fisher == "exact" else [F.cross_entropy(logits, y[None])]


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_step_with_the_gradient_of_another_point(fisher: str) -> None:
    """`exact` counts the forwards at both points, `empirical` the gradients of the second."""
    model = net(torch.float64)
    twin = copy.deepcopy(model)
    wrapper = Sharpness(bound(model, "sgd", fisher=fisher))
    other = Sharpness(alone(twin, torch.optim.SGD))
    for number in range(STEPS):
        x, y = batch(number, torch.float64)
        wrapper.zero_grad()
        loss_of(model, x, y).backward()
        wrapper.first_step()
        loss_of(model, x, y).backward()
        wrapper.second_step()
        hand = Hand(twin, LAYERS)
        for point in ("here", "nearby"):
            if point == "nearby":
                loss_of(twin, x, y).backward()
                other.first_step()
            if point == "nearby" or fisher == "exact":
                for row, label in zip(x, y, strict=True):
                    hand.example(of_one, twin, fisher, row, label)
        hand.fill(loss_of(twin, x, y), twin.parameters())
        other.second_step()
        other.zero_grad()
    assert_same(model, twin)
