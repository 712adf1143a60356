"""Paced blocks through forwards, faults, ranks and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CombinationError, DecompositionError, Optimizer, PluginError, StateError
from kfactk.preconditioner.footprint import footprint_of
from kfactk.preconditioner.pacing import relative_change
from kfactk.testing._support.ranks import shared_workers
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.kfac import Kfac
from kfactk_stages.fisher.exact import Exact
from tests.kfactk.small import F64, assert_equal, net, train, values

OPTIONS: dict[str, Any] = {
    "curvature": "kfac",
    "fisher": "exact",
    "clip": "none",
    "update": "sgd",
    "lr": 0.1,
    "damping": 0.05,
}


@attrs.frozen
class Listed:
    """Gives these intervals, one after the other; it is told how often the block was refreshed."""

    intervals: tuple[Any, ...]
    keeps: int = 4

    def interval(self, changes: Sequence[float], intervals: Sequence[int]) -> Any:
        return self.intervals[min(len(changes), len(self.intervals) - 1)]


def bound(model: nn.Module, pace: Any, **recipe: Any) -> Optimizer:
    return kfactk.build(**{**OPTIONS, "factor_every": 1, "pace": pace, **recipe}).bind(model)


def batch(step: int, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, 4, generator=generator, dtype=F64)
    return x, torch.randint(3, (n,), generator=generator)


def refreshed(optimizer: Optimizer, model: nn.Module, steps: int) -> dict[str, list[int]]:
    """The steps at which each layer's statistics were refreshed."""
    found: dict[str, list[int]] = {name: [] for name in optimizer.layers}
    for _ in range(steps):
        before = {name: view.refreshes for name, view in optimizer.layers.items()}
        number = optimizer.steps
        train(optimizer, model, batch(number))
        for name, view in optimizer.layers.items():
            found[name] += [number] if view.refreshes != before[name] else []
    return found


# -------------------------------------------------------------------------------------- what is due


@pytest.mark.parametrize("basis", ["kfac", "ekfac", {"name": "ekfac", "scale": "running"}])
def test_blocks_are_refreshed_when_their_pace_says(basis: Any) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model, Listed((1, 3, 2, 4)), basis=basis)
    assert refreshed(optimizer, model, 12) == {"0": [0, 1, 4, 6, 10], "2": [0, 1, 4, 6, 10]}
    assert [view.interval for view in optimizer.layers.values()] == [4, 4]


def test_unit_of_intervals_may_be_a_function_of_the_step() -> None:
    model = net()
    optimizer = bound(model, Listed((1, 2)), factor_every=lambda step: 1 if step < 2 else 3)
    assert refreshed(optimizer, model, 17)["0"] == [0, 1, 3, 9, 15]  # 1 + 2 * 1, 3 + 2 * 3


class Counting(Exact):
    """Counts its passes."""

    def losses(self, *args: Any, **kwargs: Any) -> Any:
        PASSES.append(0)
        return super().losses(*args, **kwargs)


class Watched(Kfac):
    """Notes the layers whose calls are measured."""

    def samples(self, layer: Any, calls: Any, **kwargs: Any) -> Any:
        MEASURED.append(layer.name)
        return super().samples(layer, calls, **kwargs)


@attrs.frozen
class Unchanged:
    """Long intervals for what has not changed at all."""

    keeps: int = 1

    def interval(self, changes: Sequence[float], intervals: Sequence[int]) -> int:
        return 1 if not changes or changes[0] > 0 else 3


class Pair(nn.Module):
    """Gives the same distribution, whatever its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, moving: Tensor, still: Tensor) -> Tensor:
        return (self.a(moving) + self.b(still)) * 0.0


PASSES: list[int] = []
MEASURED: list[str] = []


def test_steps_measure_only_what_is_due() -> None:
    """The inputs of one layer change, and those of the other do not; gradients are zero."""
    model = Pair()
    optimizer = bound(model, Unchanged(), fisher=Counting(), curvature=Watched(), lr=0.0)
    still, found = batch(99)[0], []
    for step in range(9):
        PASSES.clear()
        optimizer.zero_grad()
        MEASURED.clear()
        x, y = batch(0)
        F.cross_entropy(model(x * (1 + step), still), y).backward()
        measured = set(MEASURED)
        optimizer.step()
        found.append(("".join(sorted(measured)), bool(PASSES)))
    assert [layers for layers, _ in found] == ["ab", "ab", "a", "a", "ab", "a", "a", "ab", "a"]
    assert all(passed for _, passed in found)


def test_a_step_without_due_blocks_runs_no_pass() -> None:
    model = net()
    optimizer = bound(model, Listed((1, 4)), fisher=Counting())
    passes = []
    for step in range(7):
        PASSES.clear()
        train(optimizer, model, batch(step))
        passes.append(len(PASSES))
    assert passes == [1, 1, 0, 0, 0, 1, 0]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.a(x) + (self.b(x) if both else 0)


def test_a_layer_that_did_not_run_is_refreshed_when_it_does() -> None:
    model = Branch()
    optimizer = bound(model, Listed((1, 2)))
    found: dict[str, list[int]] = {"a": [], "b": []}
    for step in range(12):
        before = {name: view.refreshes for name, view in optimizer.layers.items()}
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x, both=step not in (3, 4)), y).backward()
        optimizer.step()
        for name, view in optimizer.layers.items():
            found[name] += [step] if view.refreshes != before[name] else []
    assert found == {"a": [0, 1, 3, 5, 7, 9, 11], "b": [0, 1, 5, 7, 9, 11]}


def test_frozen_layers_are_refreshed_when_they_are_trained_again() -> None:
    model = net()
    optimizer = bound(model, Listed((1, 2)))
    refreshed(optimizer, model, 3)
    model[0].requires_grad_(False)
    refreshed(optimizer, model, 6)
    model[0].requires_grad_(True)
    assert refreshed(optimizer, model, 5) == {"0": [9, 11, 13], "2": [9, 11, 13]}


# ------------------------------------------------------------------------------------------- faults


def test_a_bad_batch_is_no_refresh_and_the_next_unit_is_due() -> None:
    model = net()
    optimizer = bound(model, Listed((1, 4, 5)), factor_every=2)
    refreshed(optimizer, model, 10)
    before = {name: view.factors["A"].clone() for name, view in optimizer.layers.items()}
    x, y = batch(10)
    with pytest.warns(kfactk.KfactkWarning, match="NaN or inf"):
        train(optimizer, model, (x * math.nan, y))
    view = optimizer.layers["0"]
    assert optimizer.counters["skipped_batches"] == 1
    assert torch.equal(view.factors["A"], before["0"])
    assert (view.refreshes, view.interval) == (2, 4)
    assert refreshed(optimizer, model, 13)["0"] == [12, 22]


class Moody(KfacInverse):
    """Cannot decompose at some of the steps."""

    bad = False

    def decompose(self, name: str, matrix: Tensor, context: Any) -> dict[str, Tensor]:
        if Moody.bad:
            raise DecompositionError("it has a bad day")
        return super().decompose(name, matrix, context)


def test_a_failed_decomposition_is_no_refresh_and_the_next_unit_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the old one would stay in use for a whole interval, which may be long."""
    model = net()
    optimizer = bound(model, Listed((1, 4, 5)), factor_every=2, basis=Moody())
    refreshed(optimizer, model, 10)
    monkeypatch.setattr(Moody, "bad", True)
    with pytest.warns(kfactk.KfactkWarning, match="it has a bad day; the last good"):
        train(optimizer, model, batch(10))
    monkeypatch.undo()
    view = optimizer.layers["0"]
    assert optimizer.counters["failed_decompositions"] == 2
    assert (view.refreshes, view.interval) == (2, 4)
    assert refreshed(optimizer, model, 13)["0"] == [12, 22]


@pytest.mark.parametrize("wrong", [0, 1.5, True, "1", 2**40, None])
def test_an_interval_that_counts_nothing_is_the_stages_fault(wrong: Any) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model, Listed((1, wrong)))
    train(optimizer, model, batch(0))
    before = values(model), optimizer.state_dict()
    decomposition = optimizer.layers["0"].decomposition
    with pytest.raises(PluginError, match=r"pace .*:Listed failed on layer '0' .*interval gave"):
        train(optimizer, model, batch(1))
    assert_equal(before[0], values(model))
    assert optimizer.layers["0"].decomposition == decomposition
    assert optimizer.layers["0"].refreshes == 1


def test_a_pace_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(PluginError, match=r"pace .*:Listed failed saying .*keeps is 0"):
        kfactk.build(**OPTIONS, pace=Listed((1,), keeps=0))


# ------------------------------------------------------------------------------------------ changes


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_changes_are_relative_at_every_scale(scale: float) -> None:
    old = torch.tensor([[3.0, 0.0], [0.0, 4.0]]) * scale
    new = torch.tensor([[3.0, 0.5], [0.0, 4.0]]) * scale
    assert float(relative_change(new, old)) == pytest.approx(0.1, rel=1e-6)
    assert float(relative_change(old, old)) == 0.0


def test_changes_from_zero_are_infinite() -> None:
    zero = torch.zeros(3, 3)
    assert float(relative_change(zero, zero)) == 0.0
    assert float(relative_change(torch.eye(3), zero)) == math.inf
    assert float(relative_change(zero, torch.eye(3))) == 1.0


# -------------------------------------------------------------------------------------------- ranks


def step_on(rank: int, ranks: int, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    x, y = batch(step % 4, 8)
    optimizer.zero_grad()
    F.cross_entropy(model(x[rank::ranks]), y[rank::ranks]).backward()
    if ranks > 1:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
    optimizer.step()


def run_on(rank: int, ranks: int, placement: Any, steps: int = 14) -> tuple[Any, ...]:
    """Where each layer was refreshed, the parameters, and the state of all ranks."""
    torch.manual_seed(0)
    model = net()
    pace = {"name": "similar", "alpha": 1.0}
    optimizer = bound(model, pace, basis="ekfac", placement=placement, lr=0.02)
    found: dict[str, list[int]] = {"0": [], "2": []}
    for step in range(steps):
        before = {name: view.refreshes for name, view in optimizer.layers.items()}
        step_on(rank, ranks, model, optimizer, step)
        for name, view in optimizer.layers.items():
            found[name] += [step] if view.refreshes != before[name] else []
    optimizer.consolidate_state_dict(to=None)
    return found, values(model), optimizer.state_dict(), dict(optimizer.moved_bytes)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("placement", ["replicated", "comm_opt", "mem_opt"])
def test_ranks_decide_what_one_process_decides(placement: str) -> None:
    steps, parameters, _, _ = run_on(0, 1, "replicated")
    assert steps["0"] != list(range(14))
    found = shared_workers().run(2, run_on, 2, placement)
    for theirs, their_parameters, state, _ in found:
        assert theirs == steps
        for mine, other in zip(their_parameters, parameters, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
        resumed = bound(net(), {"name": "similar", "alpha": 1.0}, basis="ekfac")
        resumed.load_state_dict(state)
        assert [view.refreshes for view in resumed.layers.values()] == [
            len(steps["0"]),
            len(steps["2"]),
        ]


# -------------------------------------------------------------------------------------- checkpoints


def trained(pace: Any, steps: int = 5, **recipe: Any) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model, pace, **recipe)
    refreshed(optimizer, model, steps)
    return model, optimizer


def test_a_state_without_pace_is_due_at_once() -> None:
    model, optimizer = trained(None, basis_every=1, scale_every=1)
    other = bound(model, Listed((1, 3)))
    other.load_state_dict(optimizer.state_dict())
    assert refreshed(other, model, 6) == {"0": [5, 6, 9], "2": [5, 6, 9]}


def test_a_recipe_without_pace_takes_a_paced_state() -> None:
    model, optimizer = trained(Listed((1, 3)))
    other = kfactk.build(**OPTIONS).bind(model)
    other.load_state_dict(optimizer.state_dict())
    assert not any("pace" in key for entry in other.state.values() for key in entry)
    assert other.layers["0"].interval is other.layers["0"].refreshes is None


@pytest.mark.parametrize("keeps", [1, 3, 6])
def test_a_pace_that_keeps_more_or_less_goes_on(keeps: int) -> None:
    model, optimizer = trained(Listed((1, 1, 1, 1, 2)), steps=6)
    other = bound(model, Listed((1, 1, 1, 1, 2), keeps))
    other.load_state_dict(optimizer.state_dict())
    known = other._preconditioner.blocks.current()[0].state.pace.known_intervals
    assert known == (2, 1, 1, 1)[:keeps]
    refreshed(other, model, 6)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("value.0.A", torch.full((5, 5), math.nan, dtype=F64), "pace.value.0.A holds NaN"),
        ("value.1.A", torch.eye(4, dtype=F64), r"pace.value.1 .*has the factors"),
        ("interval.0", torch.tensor(0), "pace.interval.0 .*is not there"),
        ("interval.1", torch.tensor(-3), "pace.interval.1 is no single whole number"),
        ("due", torch.tensor([1, 2]), "pace.due is no single whole number"),
        ("values", torch.tensor(1), "a key 'kfactk.pace.values' that this version does not know"),
    ],
)
def test_a_damaged_state_is_refused(key: str, value: Tensor, says: str) -> None:
    _, optimizer = trained({"name": "similar"})
    saved = optimizer.state_dict()
    saved["state"][0][f"kfactk.pace.{key}"] = value
    with pytest.raises(StateError, match=says):
        bound(net(), {"name": "similar"}).load_state_dict(saved)


# ------------------------------------------------------------------------------ what a recipe says


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"stagger": True}, "pace 'similar' and stagger=True cannot work together"),
        ({"lag": 3}, "pace 'similar' and lag=3 cannot work together"),
        ({"curvature": ["kfac", "gradient"]}, "the curvature 'gradient' has none"),
        ({"basis_every": 50}, r"factor_every=10, and basis_every=50 .*Leave basis_every out"),
        ({"scale_every": 5}, "and scale_every=5 says otherwise"),
    ],
)
def test_what_contradicts_a_pace_is_refused(recipe: dict[str, Any], says: str) -> None:
    with pytest.raises(CombinationError, match=says):
        kfactk.build(pace="similar", **recipe)


def test_moments_of_your_own_gradient_keep_their_period() -> None:
    recipe = kfactk.build(
        pace="similar", basis={"name": "ekfac", "scale": "running"}, scale_every=1
    )
    assert recipe.scale_every == 1


def test_a_paced_recipe_is_written_and_evolves() -> None:
    recipe = kfactk.build(pace={"name": "similar", "alpha": 0.2}, factor_every=5)
    assert (recipe.basis_every, recipe.scale_every) == (5, 5)
    assert repr(recipe) == "kfactk.build(factor_every=5, pace={'name': 'similar', 'alpha': 0.2})"
    assert kfactk.Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.evolve(factor_every=7).basis_every == 7
    assert recipe.evolve(pace=None) == kfactk.build(factor_every=5)
    assert kfactk.build(factor_every=5).evolve(pace=recipe.pace) == recipe


class Kept:
    """Keeps what it is told."""

    every = 1

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []

    def start(self, recipe: Any) -> None:
        pass

    def record(self, step: int, metrics: Any) -> None:
        self.metrics.append({name: float(value) for name, value in metrics.items()})

    def close(self) -> None:
        pass

    flush = close


def test_intervals_are_recorded() -> None:
    tracker = Kept()
    model = net()
    refreshed(bound(model, Listed((1, 3)), tracker=tracker), model, 4)
    named = ("interval_mean", "interval_max", "refreshes")
    assert [tuple(each[name] for name in named) for each in tracker.metrics] == [
        (1.0, 1.0, 2.0),
        (3.0, 3.0, 4.0),
        (3.0, 3.0, 4.0),
        (3.0, 3.0, 4.0),
    ]


def test_memory_counts_what_is_compared_with() -> None:
    _, plain = trained(None, basis_every=1, scale_every=1)
    _, paced = trained({"name": "similar"})
    bytes_of = [
        [footprint_of(block).factors for block in each._preconditioner.blocks.current()]
        for each in (plain, paced)
    ]
    assert bytes_of[1] == [3 * each for each in bytes_of[0]]
    kept = sum(
        value.nbytes
        for entry in paced.state.values()
        for key, value in entry.items()
        if key.startswith("kfactk.pace.value.")
    )
    assert kept == 2 * sum(bytes_of[0])
