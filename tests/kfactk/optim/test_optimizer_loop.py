"""In common loops the optimizer does what that of torch.optim does (see `counterparts`)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import kfactk
from kfactk import KfactkError, Optimizer
from kfactk.registry.registry import registry
from tests.kfactk.counterparts import RULES, assert_close, both, pair
from tests.kfactk.small import F64, assert_equal, batch, bound, factors, net, train, values

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, float], Any]] = {
    "StepLR": lambda o, k: lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o, k: lr_scheduler.OneCycleLR(o, 0.2 * k, total_steps=8),
    "CyclicLR": lambda o, k: lr_scheduler.CyclicLR(o, 0.01 * k, 0.1 * k, 2),
    "CosineAnnealingLR": lambda o, k: lr_scheduler.CosineAnnealingLR(o, 6),
    "ReduceLROnPlateau": lambda o, k: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0),
    "LambdaLR": lambda o, k: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o, k: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_learning_rate_schedules(rule: str, schedule: str) -> None:
    model, optimizer, twin, plain, factor = pair(rule)
    for one, followed, times in ((model, optimizer, factor), (twin, plain, 1.0)):
        scheduler = SCHEDULES[schedule](followed, times)
        torch.manual_seed(1)
        for step in range(7):
            train(followed, one, batch())  # type: ignore[arg-type]
            scheduler.step(*([float(step)] if schedule == "ReduceLROnPlateau" else []))
    assert_close(model, twin)
    group, truth = optimizer.param_groups[0], plain.param_groups[0]
    torch.testing.assert_close(group["lr"] / factor, truth["lr"])
    if rule == "adam":
        torch.testing.assert_close(group["betas"], truth["betas"])
    else:
        torch.testing.assert_close(group["momentum"], truth["momentum"])
    if schedule in ("OneCycleLR", "CyclicLR"):
        assert group.get("momentum", group.get("betas", [0])[0] if rule == "adam" else None) != 0.9


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_takes_the_steps_of_its_counterpart(rule: str) -> None:
    model, optimizer, twin, plain, _ = pair(rule)
    both((model, optimizer), (twin, plain), steps=6)
    assert_close(model, twin)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_closure(rule: str) -> None:
    model, optimizer, twin, plain, _ = pair(rule)
    losses: dict[int, list[float]] = {0: [], 1: []}
    for which, (one, followed) in enumerate(((model, optimizer), (twin, plain))):
        torch.manual_seed(1)
        for _ in range(4):
            x, y = batch()

            def closure(
                one: nn.Module = one,
                followed: torch.optim.Optimizer = followed,
                x: Tensor = x,
                y: Tensor = y,
            ) -> Tensor:
                followed.zero_grad()
                loss = F.cross_entropy(one(x), y)
                loss.backward()
                return loss

            losses[which].append(followed.step(closure).item())  # type: ignore[arg-type]
    assert_close(model, twin)
    torch.testing.assert_close(losses[0], losses[1])
    optimizer.zero_grad()
    assert optimizer.step(lambda: None) is None  # type: ignore[arg-type, func-returns-value, return-value]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model, optimizer, twin, plain, _ = pair("momentum")
    for one, followed in ((model, optimizer), (twin, plain)):
        torch.manual_seed(1)
        for _ in range(4):
            x, y = batch()
            loss = F.cross_entropy(
                one(x), y
            )  # the order in which the gradients are reset after the forward
            followed.zero_grad(set_to_none=set_to_none)
            assert all(
                p.grad is None if set_to_none else p.grad is None or not p.grad.any()
                for p in one.parameters()
            )
            loss.backward()
            followed.step()
    assert_close(model, twin)


def test_gradient_clipping_and_accumulation() -> None:
    model, optimizer, twin, plain, _ = pair("momentum")
    for one, followed in ((model, optimizer), (twin, plain)):
        torch.manual_seed(1)
        for _ in range(4):
            followed.zero_grad()
            for _ in range(2):
                x, y = batch()
                (F.cross_entropy(one(x), y) / 2).backward()
            nn.utils.clip_grad_norm_(one.parameters(), 0.1)
            followed.step()
    assert_close(model, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_scaler_with_autocast(dtype: torch.dtype) -> None:
    """Steps 1 and 3 overflow: they are skipped, the scale falls, and no step is counted."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    twin = copy.deepcopy(model)
    recipe, make, _ = RULES["momentum"]
    optimizer, plain = kfactk.build(**recipe).bind(model), make(twin.parameters())
    scales: list[list[float]] = []
    for one, followed in ((model, optimizer), (twin, plain)):
        torch.manual_seed(1)
        scaler, seen = torch.amp.GradScaler("cpu", init_scale=2.0**8), []
        for step in range(6):
            x, y = batch()
            followed.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(one(x.float()), y) * (
                    float("inf") if step in (1, 3) else 1.0
                )
            scaler.scale(loss).backward()
            scaler.unscale_(followed)
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            scaler.step(followed)
            scaler.update()
            seen.append(scaler.get_scale())
        scales.append(seen)
    assert scales[0] == scales[1] == [256.0, 128.0, 128.0, 64.0, 64.0, 64.0]
    assert optimizer.steps == 4
    for ours, truth in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-2, atol=1e-3)


def test_a_scaler_that_the_empirical_fisher_knows_is_divided_out() -> None:
    model, twin, (x, y) = net(), net(), batch()
    twin.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    recipe = kfactk.build(fisher="empirical", clip="none", update="sgd", lr=0.1)
    optimizer, other = recipe.bind(model, scaler=scaler), recipe.bind(twin)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    train(other, twin, (x, y))
    for ours, truth in zip(
        [*factors(optimizer), *values(model)], [*factors(other), *values(twin)], strict=True
    ):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("at", ["update", "gradient"])
@pytest.mark.parametrize("update", ["sgd", "momentum", "nag", "adam", "adamw", "radam"])
def test_gradients_are_the_same_objects_with_the_same_values_after_a_step(
    update: str, at: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    optimizer = bound(model, update=update, weight_decay=0.1, weight_decay_at=at)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        before = [(parameter.grad, parameter.grad.clone()) for parameter in model.parameters()]
        optimizer.step()
        for parameter, (grad, found) in zip(model.parameters(), before, strict=True):
            assert parameter.grad is grad
            assert torch.equal(grad, found)


def test_gradients_come_back_when_the_update_rule_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = bound(model, weight_decay=0.1, weight_decay_at="gradient")
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    before = [parameter.grad for parameter in model.parameters()]

    def fail() -> None:
        raise ValueError("no")

    monkeypatch.setattr(optimizer._inner, "step", fail)
    with pytest.raises(ValueError, match="no"):
        optimizer.step()
    assert all(
        parameter.grad is grad for parameter, grad in zip(model.parameters(), before, strict=True)
    )
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_hooks_around_a_step() -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list[Any] = []

        @kfactk.hookimpl
        def kfactk_bound(self, optimizer: Optimizer) -> None:
            self.heard.append(("bound", optimizer.steps))

        @kfactk.hookimpl
        def kfactk_stepped(self, optimizer: Optimizer, step: int, metrics: Any) -> None:
            self.heard.append(("stepped", step, dict(metrics)))

    listener, model = Listener(), net()
    name = registry().register(listener)
    try:
        optimizer = bound(model)
        optimizer.register_step_pre_hook(
            lambda o, args, kwargs: listener.heard.append(("pre", o.steps))
        )
        optimizer.register_step_post_hook(
            lambda o, args, kwargs: listener.heard.append(("post", o.steps))
        )
        train(optimizer, model, batch())
        train(optimizer, model, batch())
    finally:
        registry().unregister(listener)
    assert name
    assert listener.heard == [
        *[("bound", 0), ("pre", 0), ("stepped", 0, {}), ("post", 1)],
        *[("pre", 1), ("stepped", 1, {}), ("post", 2)],
    ]


def test_an_optimizer_cannot_be_copied_and_says_what_to_do() -> None:
    optimizer = bound(net())
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(KfactkError, match=r"state_dict\(\)"):
            attempt(optimizer)


def test_stepping_without_any_gradient_changes_nothing() -> None:
    model = net()
    before = values(model)
    optimizer = bound(model, weight_decay=0.5)
    optimizer.step()
    assert_equal(before, values(model))
    train(optimizer, model, batch())
    assert optimizer.layers["0"].factors


def test_a_learning_rate_in_a_tensor() -> None:
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    optimizer = bound(model, [{"params": model.parameters(), "lr": torch.tensor(0.1)}], clip="kl")
    other = bound(twin, clip="kl")
    both((model, optimizer), (twin, other))
    for ours, truth in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-7)
    assert values(model)[0].dtype == F64


def test_a_scheduler_of_momentum_beside_a_first_moment_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = kfactk.build(
        curvature="gradient", basis="soap", update="sgd", first_moment=0.9
    ).bind(model)
    start = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    with pytest.raises(kfactk.OptionError, match=r"momentum=0.95, beside.*cycle_momentum=False"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), start))
    optimizer.param_groups[0]["momentum"] = 0.0
    lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8, cycle_momentum=False)
    optimizer.step()
    both = kfactk.build(
        curvature="gradient", basis="soap", update="momentum", first_moment=0.9
    ).bind(model)
    lr_scheduler.OneCycleLR(both, 0.1, total_steps=8)
    both.step()
