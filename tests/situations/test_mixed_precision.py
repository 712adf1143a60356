"""Gradient scalers, skipped batches, autocast and parameters in bfloat16.

Truth is EKFAC written again in float64, which never sees the batches that were skipped.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from tests.situations.by_hand import (
    RUNNING,
    Hand,
    assert_same,
    batch,
    categorical,
    draw,
    gaussian,
    perceptron,
    recipe,
    sgd,
    take,
)

EXAMPLES, LAYERS = 8, ["0", "2"]


def one(model: nn.Module, fisher: str, x: Tensor, y: Tensor, parts: int) -> list[Tensor]:
    logits = model(x[None])
    return categorical(logits) if fisher == "exact" else [F.cross_entropy(logits, y[None]) / parts]


def step_by_hand(
    model: nn.Module, rule: Any, fisher: str, numbers: list[int], limit: float | None = None
) -> None:
    """Take a step on some micro-batches, with a limit on the norm of the gradient before it."""
    hand = Hand(model, LAYERS)
    for number in numbers:
        for row, label in zip(*batch(number), strict=True):
            hand.example(one, model, fisher, row, label, len(numbers))
    losses = [plain(model, *batch(number)) for number in numbers]
    loss = torch.stack(losses).mean()
    if limit is not None:
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        loss = loss * (limit / (norm + 1e-6)).clamp(max=1.0)
    take(rule, hand, loss, how="running" if fisher == "running" else "solve")


def with_fisher(fisher: str) -> kfactk.Recipe:
    """Return a recipe; "running" is that of gradients of the user's own backward alone."""
    if fisher == "running":
        return recipe(fisher="empirical", basis=RUNNING)
    return recipe(fisher=fisher)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def of_a_broken_input(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One example holds NaN, and so does its output."""
    x = x.clone()
    x[2, 1] = torch.nan
    return F.cross_entropy(model(x), y)


def of_an_infinite_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The forward is finite, its gradients overflow."""
    return F.cross_entropy(model(x), y) * torch.inf


SKIPPED = pytest.mark.parametrize(
    ("fisher", "overflow"),
    [
        ("exact", of_a_broken_input),
        ("empirical", of_a_broken_input),
        ("empirical", of_an_infinite_loss),
        ("running", of_a_broken_input),
        ("running", of_an_infinite_loss),
    ],
)


@pytest.mark.parametrize("clipped", [False, True])
@SKIPPED
@pytest.mark.filterwarnings("ignore:a batch gave NaN")
def test_a_skipped_batch_counts_nothing(fisher: str, overflow: Any, clipped: bool) -> None:
    """`unscale_` and a clip of gradients come in between, or not."""
    model, scaler = perceptron(), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    twin = copy.deepcopy(model)
    optimizer, rule = with_fisher(fisher).bind(model, scaler=scaler), sgd(twin)
    for number, good in enumerate([False, True, True, False, False, True]):
        optimizer.zero_grad()
        loss = (plain if good else overflow)(model, *batch(number))
        scaler.scale(loss).backward()
        if clipped:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        scaler.step(optimizer)
        scaler.update()
        if good:
            step_by_hand(twin, rule, fisher, [number], 0.2 if clipped else None)
    assert optimizer.steps == 3
    assert_same(model, twin)


@pytest.mark.parametrize("bad", [0, 1])
@SKIPPED
@pytest.mark.filterwarnings("ignore:a batch gave NaN")
def test_an_overflow_of_one_micro_batch_skips_them_all(
    fisher: str, overflow: Any, bad: int
) -> None:
    """The second step skips; nothing of its finite micro-batch stays, where gradients count."""
    model, scaler = perceptron(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    twin = copy.deepcopy(model)
    optimizer, rule = with_fisher(fisher).bind(model, scaler=scaler), sgd(twin)
    for number in range(4):
        optimizer.zero_grad()
        for micro in range(2):
            wrong = number == 1 and (micro == bad or fisher == "exact")
            loss = (overflow if wrong else plain)(model, *batch(2 * number + micro))
            scaler.scale(loss / 2).backward()
        scaler.step(optimizer)
        scaler.update()
        if number != 1:
            step_by_hand(twin, rule, fisher, [2 * number, 2 * number + 1])
    assert_same(model, twin)


@pytest.mark.parametrize("fisher", ["empirical", "running"])
def test_one_scaler_of_two_optimizers(fisher: str) -> None:
    """As for a GAN: where one of them overflows the other steps, and both go on."""
    models = perceptron(), perceptron()
    twins, scaler = copy.deepcopy(models), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [with_fisher(fisher).bind(model, scaler=scaler) for model in models]
    rules = [sgd(twin) for twin in twins]
    for number in range(4):
        wrong = {1: 0, 2: 1}.get(number)
        for each, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = (of_an_infinite_loss if each == wrong else plain)(model, *batch(number))
            scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for each, (twin, rule) in enumerate(zip(twins, rules, strict=True)):
            if each != wrong:
                step_by_hand(twin, rule, fisher, [number])
    for model, twin in zip(models, twins, strict=True):
        assert_same(model, twin)


def test_a_scaler_that_is_disabled_changes_nothing() -> None:
    model, scaler = perceptron(), torch.amp.GradScaler("cpu", enabled=False)
    twin = copy.deepcopy(model)
    optimizer, rule = recipe(fisher="empirical").bind(model, scaler=scaler), sgd(twin)
    for number in range(3):
        optimizer.zero_grad()
        scaler.scale(plain(model, *batch(number))).backward()
        scaler.step(optimizer)
        scaler.update()
        step_by_hand(twin, rule, "empirical", [number])
    assert_same(model, twin)


def whole(*shape: int, seed: int) -> Tensor:
    """Return small whole numbers, whose products half precision holds exactly."""
    return draw(*shape, seed=seed).round().clamp(-1, 1)


def linear_net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(whole(*parameter.shape, seed=number))
    return model


def squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(-1).mean() / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 2.0**8])
def test_autocast_is_exact_where_its_numbers_are(dtype: torch.dtype, scale: float) -> None:
    """Deep linear networks have a Kronecker-factored Fisher matrix: truth inverts all of it."""
    model = linear_net().float()
    twin = copy.deepcopy(model).double()
    x, y = whole(4, 4, seed=7), whole(4, 2, seed=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = recipe(likelihood="gaussian", fisher="exact").bind(model, scaler=scaler)
    with torch.autocast("cpu", dtype=dtype):
        out = model(x.float())
    assert out.dtype is dtype
    scaler.scale((out.float() - y.float()).square().sum(-1).mean() / 2).backward()
    scaler.step(optimizer)
    hand = Hand(twin, ["0", "1"])
    for row in x:
        hand.example(lambda row: gaussian(twin(row[None])), row)
    take(sgd(twin), hand, squares(twin, x, y), how="dense")
    assert_same(model.double(), twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("way", ["autocast", "parameters"])
def test_bfloat16_is_near(way: str, fisher: str) -> None:
    """One step; the curvature is kept in float32, so the direction is off by the rounding only."""
    twin = perceptron()
    model = copy.deepcopy(twin).to(torch.bfloat16 if way == "parameters" else torch.float32)
    optimizer, rule = with_fisher(fisher).bind(model), torch.optim.SGD(twin.parameters(), lr=1)
    x, y = batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        plain(model, x.to(next(model.parameters()).dtype), y).backward()
    optimizer.step()
    step_by_hand(twin, rule, fisher, [0])
    views = optimizer.layers
    for name in LAYERS:
        assert all(factor.dtype is torch.float32 for factor in views[name].factors.values())
        layer: Any = twin.get_submodule(name)
        gradient = {f"{name}.weight": model.get_submodule(name).weight.grad.float()}
        found = optimizer.precondition(gradient | {f"{name}.bias": bias_gradient(model, name)})
        error = found[f"{name}.weight"].double() - layer.weight.grad
        assert error.norm() < 0.03 * layer.weight.grad.norm()


def bias_gradient(model: nn.Module, name: str) -> Tensor:
    layer: Any = model.get_submodule(name)
    return layer.bias.grad.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_scaler_that_was_not_told_is_refused_where_it_matters(fisher: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    for enabled in (False, True):
        optimizer = kfactk.build(curvature="kfac", fisher=fisher).bind(model)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        loss = F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3)
        scaler.scale(loss).backward()
        if enabled and fisher == "empirical":
            with pytest.raises(kfactk.CaptureError, match=r"bind\(model, scaler=scaler\)"):
                scaler.step(optimizer)
            assert optimizer.steps == 0
        else:
            scaler.step(optimizer)
            assert optimizer.steps == 1
        optimizer.close()
        model.zero_grad()
