"""When hooks go, and that nothing is kept alive by them."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import KfactkError
from tests.kfactk.small import assert_equal, batch, bound, factors, hooks, net, train, values


class Sentinel:
    pass


class Marked(torch.autograd.Function):
    """Identity; its node, and so the graph, holds a sentinel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sentinels: list[weakref.ref[Sentinel]]) -> Tensor:
        ctx.sentinel = Sentinel()
        sentinels.append(weakref.ref(ctx.sentinel))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.graphs: list[weakref.ref[Sentinel]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Marked.apply(torch.tanh(self.a(x)), self.graphs))


def test_closing_takes_every_hook_away_and_may_be_done_twice() -> None:
    model = net()
    optimizer = bound(model)
    assert hooks(model) == 2
    optimizer.close()
    optimizer.close()
    assert hooks(model) == 0
    model(batch()[0])
    before = values(model)
    with pytest.raises(KfactkError, match="was closed"):
        train(optimizer, model, batch())
    assert_equal(before, values(model))


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("observe", ["automatic", "manual"])
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_outlives_the_optimizer(fisher: str, observe: str, backward: bool) -> None:
    """Reference counting alone frees it: no cycle, whether or not the user's backward ever runs."""
    model = Traced()
    optimizer = bound(model, fisher=fisher, observe=observe)
    inputs, labels = batch()
    output = model(inputs)
    optimizer.observe()
    if backward:
        F.cross_entropy(output, labels).backward()
        optimizer.step()
    gc.disable()
    try:
        alive = weakref.ref(optimizer)
        del output, optimizer
        assert alive() is None
        assert model.graphs[0]() is None
        assert hooks(model) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_step_keeps_no_graph(fisher: str) -> None:
    model, data = Traced(), batch()
    optimizer = bound(model, fisher=fisher, observe="manual")
    train(optimizer, model, data, observe=True)
    assert model.graphs[0]() is None


def test_a_scheduler_does_not_keep_the_optimizer_alive() -> None:
    model = net()
    optimizer = bound(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(optimizer, model, batch())
    scheduler.step()
    alive = weakref.ref(optimizer)
    del optimizer, scheduler
    gc.collect()
    assert alive() is None
    assert hooks(model) == 0


def test_a_second_bind_counts_for_itself() -> None:
    torch.manual_seed(1)
    model, data = net(), batch()
    alone = copy.deepcopy(model)
    first, second = bound(model), bound(model)
    single = bound(alone)
    F.cross_entropy(model(data[0]), data[1]).backward()
    F.cross_entropy(alone(data[0]), data[1]).backward()
    for optimizer in (first, second, single):
        optimizer.step()
    assert_equal(factors(first), factors(single))
    assert_equal(factors(second), factors(single))


def test_a_bind_in_place_of_an_earlier_one() -> None:
    model, data = net(), batch()
    alone = copy.deepcopy(model)
    optimizer = bound(model)
    optimizer = bound(model)
    assert hooks(model) == 2
    single = bound(alone)
    train(optimizer, model, data)
    train(single, alone, data)
    assert_equal(factors(optimizer), factors(single))


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.error = nn.Linear(4, 5), nn.Linear(5, 3), None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        if self.error is not None:
            raise self.error
        return self.b(hidden)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("between", ["zero_grad", "step"])
def test_an_exception_inside_the_forward(error: BaseException, between: str) -> None:
    """No hook is left on a layer, and the steps are those of a run without the exception."""
    model, data = Fragile().double(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = bound(model), bound(twin)
    model.error = error
    with pytest.raises(type(error)):
        model(data[0])
    model.error = None
    if between == "zero_grad":
        optimizer.zero_grad()
    else:
        optimizer.step()
        optimizer._step.zero_()
    assert hooks(model) == 2
    train(optimizer, model, data)
    train(other, twin, data)
    assert_equal(factors(optimizer), factors(other))
    assert_equal(list(model.parameters()), list(twin.parameters()))
