"""Loops around a model divided by `fully_shard` do the same as plain ones, on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import kfactk
from kfactk import KfactkError, KfactkWarning, Optimizer
from kfactk.distributed.sharding import is_sharded
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.sharded import (
    RECIPE,
    Net,
    bound,
    data,
    deviation,
    found,
    full,
    grid,
    in_part,
    line,
    nested,
    net,
    part,
    root_only,
    train,
)

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = 3
Found = dict[str, Tensor]
Data = Callable[[int], tuple[Tensor, Tensor]]


# Ways through a step: each is run on a plain model with `data`, and on ranks with `part`.


def plainly(optimizer: Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    train(optimizer, model, batch)


def after_clipping(optimizer: Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def in_micro_batches(optimizer: Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    for last, (x, y) in enumerate(zip(batch[0].chunk(2), batch[1].chunk(2), strict=True)):
        if isinstance(model, nn.Module) and hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(bool(last))
        (F.cross_entropy(model(x), y) / 2).backward()
    optimizer.step()


def observed_by_hand(optimizer: Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    assert list(optimizer.layers) == ["conv", "grouped", "middle", "shared", "head"], (
        "also while parameters are gathered"
    )
    optimizer.observe()
    loss.backward()
    optimizer.step()


def evaluated_before_the_step(
    optimizer: Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    """A forward without a backward leaves gathered parameters in place of the sharded ones."""
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    with torch.no_grad():
        model(batch[0])
    optimizer.step()
    if hasattr(model, "reshard"):
        model.reshard()


def with_a_closure(optimizer: Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)


LOOPS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "gradients clipped by the user": (after_clipping, {}),
    "micro-batches": (in_micro_batches, {}),
    "observed by hand": (observed_by_hand, {"observe": "manual"}),
    "evaluated before the step": (evaluated_before_the_step, {}),
    "closure": (with_a_closure, {}),
    "foreach": (plainly, {"update": {"name": "adam", "foreach": True}}),
    "fused": (
        plainly,
        {
            "update": {"name": "adamw", "fused": True},
            "weight_decay": 0.1,
            "weight_decay_at": "gradient",
        },
    ),
    "one by one": (plainly, {"update": {"name": "adam", "foreach": False}}),
    "any class": (plainly, {"update": torch.optim.Adagrad}),
}


def looped(loop: str, model: nn.Module, batches: Data) -> Found:
    step, recipe = LOOPS[loop]
    optimizer = bound(model, **recipe)
    for number in range(STEPS):
        step(optimizer, model, batches(number))
    results = found(optimizer, model)
    optimizer.close()
    return results


def loops_on_ranks(rank: int, names: list[str]) -> dict[str, Found]:
    return {
        name: looped(name, (root_only, in_part)[number % 2](net(), line()), part)
        for number, name in enumerate(names)
    }


def test_loops_equal_those_of_one_process() -> None:
    results = shared_workers().run(2, loops_on_ranks, list(LOOPS))
    for name in LOOPS:
        truth = looped(name, net(), data)
        for ours in results:
            assert deviation(ours[name], truth) < 1e-10, name


# When the model is divided, and when its parameters are made.


def filled(model: nn.Module) -> nn.Module:
    """Real parameters, with the values of `net()`, for a model made on the meta device."""
    truth = net()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = truth.get_parameter(name).detach()
            if is_sharded(parameter):
                rows = value.chunk(parameter.device_mesh.size())
                place = parameter.device_mesh.get_local_rank()
                value = rows[place] if place < len(rows) else value[:0]
                parameter = parameter.to_local()
            parameter.copy_(value)
    return model


def meta() -> nn.Module:
    with torch.device("meta"):
        model = Net().double()
    return model


def orders(rank: int) -> dict[str, Found]:
    results = {}
    for shape in (root_only, nested):
        models = {
            name: net() if name != "meta" else meta() for name in ("before", "swapped", "meta")
        }
        optimizers = {}
        optimizers["before"] = bound(models["before"])
        shape(models["before"], line())
        optimizers["swapped"] = bound(models["swapped"])
        shape(models["swapped"], line())
        optimizers["swapped"].param_groups[0]["params"] = list(
            models["swapped"].parameters()
        )  # as some engines do it
        shape(models["meta"], line())
        optimizers["meta"] = bound(models["meta"])
        filled(models["meta"])
        for name, model in models.items():
            for step in range(STEPS):
                train(optimizers[name], model, part(step))
            results[f"{name} {shape.__name__}"] = found(optimizers[name], model)
            assert all(
                is_sharded(parameter)
                for group in optimizers[name].param_groups
                for parameter in group["params"]
            )
    return results


def test_the_order_of_binding_dividing_and_filling_does_not_matter() -> None:
    truth = looped_plainly()
    for results in shared_workers().run(2, orders):
        for name, ours in results.items():
            assert deviation(ours, truth) < 1e-10, name


def looped_plainly(**recipe: Any) -> Found:
    model = net()
    optimizer = bound(model, **recipe)
    for step in range(STEPS):
        train(optimizer, model, data(step))
    return found(optimizer, model)


def too_late(rank: int) -> None:
    model = net()
    optimizer = bound(model)
    train(optimizer, model, data(0))
    root_only(model, line())
    with pytest.raises(KfactkError, match="after the optimizer's first step"):
        train(optimizer, model, part(1))


def test_dividing_after_the_first_step_is_refused() -> None:
    shared_workers().run(2, too_late)


# Faults, and what is told.


def one_bad_shard(rank: int, where: str) -> tuple[dict[str, int], bool, Found]:
    model = in_part(net(), line())
    optimizer = bound(model)
    train(optimizer, model, part(0))
    before = found(optimizer, model)
    F.cross_entropy(model(part(1)[0]), part(1)[1]).backward()
    if rank == 1:
        model.get_parameter(where).grad.to_local().view(-1)[0] = float("nan")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()
    after = found(optimizer, model)
    kept = all(torch.equal(full(p), before[name]) for name, p in model.named_parameters())
    assert any(
        issubclass(each.category, KfactkWarning)
        and "NaN or inf in its gradient" in str(each.message)
        for each in said
    )
    train(optimizer, model, part(2))
    assert all(bool(full(p).isfinite().all()) for p in model.parameters())
    return optimizer.counters, kept, after


@pytest.mark.parametrize("where", ["conv.weight", "norm.bias"])
def test_a_bad_shard_on_one_rank_keeps_all_from_stepping(where: str) -> None:
    results = shared_workers().run(3, one_bad_shard, where)
    for counters, kept, after in results:
        assert counters["skipped_batches"] == 1
        assert kept
        assert all(torch.equal(after[name], results[0][2][name]) for name in after)


def scaled(rank: int, replicas: int) -> tuple[list[float], list[bool], Found]:
    """Take three steps under a GradScaler; in the second, one shard and its replicas overflow."""
    model = in_part(net(), grid(replicas) if replicas else line())
    optimizer = bound(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    scales, moved = [], []
    for step in range(STEPS):
        before = full(model.head.weight)
        optimizer.zero_grad()
        x, y = part(step)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if step == 1 and rank in (1, 3):
            model.conv.weight.grad.to_local().view(-1)[0] = float("inf")
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(before, full(model.head.weight)))
    return scales, moved, found(optimizer, model)


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 0), (4, 2)])
def test_a_scaler_sees_the_overflow_of_one_shard_on_every_rank(ranks: int, replicas: int) -> None:
    model = net()
    optimizer = bound(model)
    after_clipping(optimizer, model, data(0))
    F.cross_entropy(
        model(data(1)[0]), data(1)[1]
    )  # a forward whose step the scaler leaves out: its curvature counts with the next step's
    after_clipping(optimizer, model, data(2))
    truth = found(optimizer, model)
    for scales, moved, ours in shared_workers().run(ranks, scaled, replicas):
        assert scales == [2.0**10, 2.0**9, 2.0**9]
        assert moved == [True, False, True]
        assert deviation(ours, truth) < 1e-10


@attrs.frozen
class Listener:
    """A tracker that keeps what it is told."""

    told: list[dict[str, float]]
    every: int = 2

    def start(self, recipe: Mapping[str, Any]) -> None: ...

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        self.told.append(
            {
                name: float(value)
                for name, value in metrics.items()
                if not name.startswith(("seconds", "bytes"))
            }
        )

    def flush(self) -> None: ...

    def close(self) -> None: ...


def told(rank: int) -> list[dict[str, float]]:
    return recorded(in_part(net(), line()), part)


def recorded(model: nn.Module, batches: Data) -> list[dict[str, float]]:
    listener = Listener([])
    optimizer = kfactk.build(**RECIPE, tracker=listener).bind(model)
    for step in range(STEPS):
        train(optimizer, model, batches(step))
    return listener.told


def test_figures_are_those_of_one_process_and_told_by_the_first_rank() -> None:
    truth = recorded(net(), data)
    first, second = shared_workers().run(2, told)
    assert (len(first), second) == (2, [])
    for ours, whole in zip(first, truth, strict=True):
        for name in ("gradient_norm", "preconditioned_norm", "clip_factor", "condition_max"):
            assert ours[name] == pytest.approx(whole[name], rel=1e-10), name
