"""Metrics equal what happened, and a tracker that fails costs one warning, not the run."""

from __future__ import annotations

import gc
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import KfactkWarning, Optimizer
from kfactk.optim.metrics import MetricsRecorder
from kfactk.timing import StageTimer
from tests.kfactk.small import batch, net, train, values

LOG: list[tuple[str, Any]] = []


@attrs.frozen
class Listener:
    """Notes all that it is told, and fails where it is asked to."""

    every: int = 1
    fails: tuple[str, ...] = ()

    def start(self, recipe: Mapping[str, Any]) -> None:
        self._note("start", dict(recipe))

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        self._note("record", (step, {name: float(value) for name, value in metrics.items()}))

    def flush(self) -> None:
        self._note("flush", None)

    def close(self) -> None:
        self._note("close", None)

    def _note(self, what: str, told: Any) -> None:
        LOG.append((what, told))
        if what in self.fails:
            raise OSError("disk full")


@pytest.fixture(autouse=True)
def empty_log() -> None:
    gc.collect()  # what earlier tests left behind closes now
    LOG.clear()


def bound(model: nn.Module, **recipe: Any) -> Optimizer:
    options: dict[str, Any] = {
        "fisher": "exact",
        "update": "sgd",
        "lr": 0.1,
        "damping": 0.05,
        "tracker": Listener(),
    }
    return kfactk.build(**(options | recipe)).bind(model)


def records() -> dict[int, dict[str, float]]:
    return {told[0]: told[1] for what, told in LOG if what == "record"}


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(number**2 for tensor in tensors for number in tensor.flatten().tolist()))


def test_metrics_are_what_happened() -> None:
    model = net()
    optimizer = bound(model, clip={"name": "norm", "limit": 0.5})
    before = values(model)
    train(optimizer, model, batch())
    metrics = records()[0]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    preconditioned = optimizer.precondition(gradients)
    moved = norm([a - b for a, b in zip(before, model.parameters(), strict=True)])
    assert metrics["gradient_norm"] == pytest.approx(norm(list(gradients.values())))
    assert metrics["preconditioned_norm"] == pytest.approx(norm(list(preconditioned.values())))
    assert metrics["clip_factor"] == pytest.approx(0.5 / metrics["preconditioned_norm"])
    assert moved == pytest.approx(0.1 * 0.5)
    assert (
        metrics["lr"],
        metrics["damping"],
        metrics["skipped_batches"],
        metrics["failed_decompositions"],
    ) == (0.1, 0.05, 0.0, 0.0)
    conditions = sorted(float(view.condition()) for view in optimizer.layers.values())
    assert metrics["condition_max"] == pytest.approx(conditions[-1])
    assert metrics["condition_median"] == pytest.approx(conditions[0])
    seconds = {name for name in metrics if name.startswith("seconds/")}
    assert {"seconds/fisher", "seconds/precondition", "seconds/clip", "seconds/update"} <= seconds
    assert all(metrics[name] > 0 for name in seconds)


@pytest.mark.parametrize(
    ("curvature", "basis", "has_condition"),
    [
        ("kfac", "newton_muon", False),
        ("gradient", "muon", False),
        ("gradient", "shampoo", True),
        ("gradient", "soap", True),
        ("rows", "cg", True),
        ("kfac", "kfac", True),
    ],
)
def test_conditions_are_those_of_bases_that_invert_a_curvature(
    curvature: str, basis: str, has_condition: bool
) -> None:
    model = net()
    optimizer = bound(model, curvature=curvature, basis=basis, clip="none", update="sgd")
    train(optimizer, model, batch())
    train(optimizer, model, batch())
    metrics = records()[1]
    assert ("condition_max" in metrics) == has_condition
    assert math.isfinite(metrics["preconditioned_norm"])


def test_a_skipped_batch_is_counted() -> None:
    model = net()
    optimizer = bound(model, factor_every=1, scale_every=1, basis_every=1)
    train(optimizer, model, batch())
    x, y = batch()
    x[0, 0] = float("nan")
    model(x)
    loss = F.cross_entropy(model(batch()[0]), y)
    optimizer.zero_grad()
    loss.backward()
    with pytest.warns(KfactkWarning, match="NaN or inf"):
        optimizer.step()
    assert [records()[step]["skipped_batches"] for step in (0, 1)] == [0.0, 1.0]


def test_a_run_is_told_in_order_and_ends_once() -> None:
    model = net()
    optimizer = bound(model, tracker=Listener(every=2))
    for step in range(5):
        optimizer.record(loss=torch.tensor(float(step), requires_grad=True), accuracy=0.5)
        train(optimizer, model, batch())
    optimizer.close()
    optimizer.close()
    assert [what for what, _ in LOG] == ["start", "record", "record", "record", "close"]
    assert LOG[0][1] == optimizer.recipe.summary()
    json.dumps(LOG[0][1])
    found = records()
    assert list(found) == [0, 2, 4]
    assert [(metrics["loss"], metrics["accuracy"]) for metrics in found.values()] == [
        (0.0, 0.5),
        (2.0, 0.5),
        (4.0, 0.5),
    ]


def test_metrics_of_a_step_that_is_not_recorded_do_not_leak_into_the_next() -> None:
    model = net()
    optimizer = bound(model, tracker=Listener(every=2))
    train(optimizer, model, batch())
    optimizer.record(loss=1.0)
    train(optimizer, model, batch())
    train(optimizer, model, batch())
    assert "loss" not in records()[2]


def test_a_closures_loss_is_recorded() -> None:
    model, (x, y) = net(), batch()
    optimizer = bound(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)  # type: ignore[call-overload]
    assert records()[0]["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("fails", ["start", "record", "close"])
def test_a_tracker_that_fails_costs_one_warning_and_not_the_run(fails: str) -> None:
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one, tracker in ((model, Listener(fails=(fails,))), (twin, None)):
            torch.manual_seed(1)
            optimizer = bound(one, tracker=tracker)
            for _ in range(3):
                train(optimizer, one, batch())
            optimizer.close()
    said = [str(warning.message) for warning in caught if warning.category is KfactkWarning]
    assert len(said) == 1
    assert "training goes on" in said[0]
    assert "disk full" in said[0]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_tracker_is_closed_with_its_optimizer() -> None:
    optimizer = bound(net())
    del optimizer
    gc.collect()
    assert [what for what, _ in LOG] == ["start", "close"]


def test_without_a_tracker_nothing_is_measured() -> None:
    timer = StageTimer()
    recorder = MetricsRecorder(None, {}, timer)
    with timer.timed("refresh"):
        recorder.add({"loss": 1.0})
    assert not recorder.due(0)
    assert not timer.seconds
    assert recorder.finish(0, {"lr": 0.1}) == {}
    recorder.close()


def test_norms_are_taken_on_recorded_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = MetricsRecorder.add_norms
    monkeypatch.setattr(
        MetricsRecorder, "add_norms", lambda self, pairs: (asked.append(1), original(self, pairs))
    )
    model = net()
    optimizer = bound(model, tracker=Listener(every=3))
    for _ in range(6):
        train(optimizer, model, batch())
    assert len(asked) == 2


def test_two_runs_of_one_recipe_hold_back_their_own_lines(tmp_path: Path) -> None:
    recipe = kfactk.build(
        tracker={"name": "jsonl", "path": str(tmp_path / "run.jsonl"), "every": 1, "buffer": 10}
    )
    models = [nn.Linear(4, 3).double() for _ in range(2)]
    optimizers = [recipe.bind(model) for model in models]
    for optimizer, model in zip(optimizers, models, strict=True):
        train(optimizer, model, batch())
    optimizers[0].close()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, None, 0]
    optimizers[1].close()
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 4


def test_a_model_without_preconditioned_layers_is_recorded_too() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Tanh()).double()
    optimizer = bound(model)
    train(optimizer, model, batch())
    assert records()[0]["gradient_norm"] == 0.0
    assert "condition_max" not in records()[0]
