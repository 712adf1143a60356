"""Decompositions on a thread: adopted at their step, whatever the thread does, and saved."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
import warnings
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import DecompositionError, OptionError
from kfactk.preconditioner.ahead import Ahead
from kfactk.preconditioner.block import Block
from kfactk.testing import PipelineLaws

F64 = torch.float64


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator, dtype=F64)
    return x, torch.randint(3, (8,), generator=generator)


def train(model: nn.Module, optimizer: kfactk.Optimizer, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def recipe(**changes: Any) -> kfactk.Recipe:
    usual = {"curvature": "kfac", "factor_every": 1, "scale_every": 2, "basis_every": 4}
    return kfactk.build(**{**usual, "lr": 0.05, "update": "sgd", "clip": "none", **changes})


@pytest.mark.parametrize("basis", ["ekfac", "kfac", {"name": "ekfac", "iterate_from": 1}])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_a_lag_is_a_run_that_decomposes_older_factors(
    basis: Any, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the truth decomposes at once what it kept of the factors then."""
    model = network()
    train(model, recipe(basis=basis, lag=lag).bind(model), range(14))

    kept: dict[tuple[str, int], dict[str, Tensor]] = {}
    truth = network()
    optimizer = recipe(basis=basis).bind(truth)
    decompose = Block.decompose

    def of_older_factors(self: Block, damping: float, matrices: Any = None, *args: Any) -> Any:
        if self.state.ready and matrices is not None:
            matrices = kept[self.name, optimizer.steps - lag]
        return decompose(self, damping, matrices, *args)

    monkeypatch.setattr(Block, "decompose", of_older_factors)
    for step in range(14):
        train(truth, optimizer, range(step, step + 1))
        for name, view in optimizer.layers.items():
            kept[name, step] = {k: v.clone() for k, v in view.block.matrices().items()}
    for one, other in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_loop_goes_on_while_a_thread_decomposes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that begins a decomposition does not wait for it; the one that is due does."""
    model, free = network(), threading.Event()
    optimizer = recipe(lag=2, basis="kfac").bind(model)
    train(model, optimizer, range(2))
    decompose, where = Block.decompose, []

    def waiting(self: Block, *args: Any, **how: Any) -> Any:
        where.append(threading.current_thread())
        assert free.wait(30)
        return decompose(self, *args, **how)

    monkeypatch.setattr(Block, "decompose", waiting)
    train(model, optimizer, range(2, 4))  # step 2 begins what step 4 uses
    before = optimizer.layers["0"].decomposition["A"]["cholesky"]
    timer = threading.Timer(0.2, free.set)
    timer.start()
    began = time.perf_counter()
    train(model, optimizer, range(4, 5))
    assert time.perf_counter() - began > 0.1
    assert optimizer.layers["0"].decomposition["A"]["cholesky"] is not before
    assert threading.main_thread() not in where


@pytest.mark.parametrize("at", [2, 3, 4, 5, 6, 7])
def test_a_resumed_run_is_the_same_bit_for_bit(at: int) -> None:
    model = network()
    optimizer = recipe(lag=3, basis="ekfac").bind(model)
    train(model, optimizer, range(at))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(at, 12))
    other = network()
    other.load_state_dict(saved[0])
    resumed = recipe(lag=3, basis="ekfac").bind(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved[1])
    train(other, resumed, range(at, 12))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("at", range(1, 10))
def test_a_state_that_lacks_what_was_on_its_way_is_told(at: int, stagger: bool) -> None:
    """`torch.distributed.checkpoint` loads what a fresh optimizer has, and this is not there."""
    model, how = network(), {"lag": 2, "stagger": stagger}
    optimizer = recipe(**how).bind(model)
    train(model, optimizer, range(at))
    saved = optimizer.state_dict()
    lost = 0
    for entry in saved["state"].values():
        for key in [key for key in entry if str(key).startswith("kfactk.ahead")]:
            del entry[key]
            lost += 1
    resumed = recipe(**how).bind(network())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.load_state_dict(saved)
    told = [str(each.message) for each in caught]
    assert len(told) == bool(lost)
    assert all("lacks the decompositions" in each for each in told)


def test_saving_does_not_change_a_run() -> None:
    runs = []
    for saves in (False, True):
        model = network()
        optimizer = recipe(lag=3).bind(model)
        for step in range(12):
            train(model, optimizer, range(step, step + 1))
            if saves:
                optimizer.state_dict()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("gathers", [False, True])
def test_a_state_has_what_a_thread_is_still_making(
    gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving waits for the thread, so the resumed run is the same bit for bit."""
    model, free = network(), threading.Event()
    optimizer = recipe(lag=2, basis="kfac").bind(model)
    train(model, optimizer, range(2))
    decompose = Block.decompose

    def waiting(*args: Any, **how: Any) -> Any:
        assert free.wait(30)
        return decompose(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "decompose", waiting)
        train(model, optimizer, range(2, 3))  # begins what step 4 uses
        threading.Timer(0.2, free.set).start()
        if gathers:
            optimizer.consolidate_state_dict()
            assert free.is_set()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert any("ahead" in key for entry in saved[1]["state"].values() for key in entry)
    train(model, optimizer, range(3, 9))
    other = network()
    other.load_state_dict(saved[0])
    resumed = recipe(lag=2, basis="kfac").bind(other)
    resumed.load_state_dict(saved[1])
    train(other, resumed, range(3, 9))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_recipe_without_a_lag_drops_a_waiting_decomposition() -> None:
    """It decomposes the factors of the step, as it did before."""
    model = network()
    optimizer = recipe(lag=3, basis="ekfac").bind(model)
    train(model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    entries = saved[1]["state"].values()
    waiting = [[key for key in entry if "ahead" in str(key)] for entry in entries]
    assert any(waiting)
    runs = []
    for drops in (False, True):
        for entry, keys in zip(entries, waiting, strict=True):
            for key in keys if drops else ():
                del entry[key]
        other = network()
        other.load_state_dict(saved[0])
        plain = recipe(basis="ekfac").bind(other)
        plain.load_state_dict(copy.deepcopy(saved[1]))
        train(other, plain, range(2, 6))
        runs.append(other.state_dict())
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_a_damaged_one_is_refused() -> None:
    model = network()
    optimizer = recipe(lag=3, basis="ekfac").bind(model)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        for key, value in entry.items():
            if str(key).startswith("kfactk.ahead") and str(key).endswith("eigenvectors"):
                value.mul_(2)
    with pytest.raises(kfactk.StateError, match="ahead"):
        recipe(lag=3, basis="ekfac").bind(network()).load_state_dict(saved)


def test_a_failure_is_told_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = recipe(lag=2, basis="ekfac").bind(model)
    train(model, optimizer, range(2))

    def failing(*args: Any, **how: Any) -> Any:
        raise DecompositionError("it is no matrix")

    before = optimizer.layers["0"].decomposition["A"]["eigenvectors"]
    with monkeypatch.context() as patch:
        patch.setattr(Block, "decompose", failing)
        train(model, optimizer, range(2, 4))
        optimizer.state_dict()  # a saved state has nothing of it
    with pytest.warns(kfactk.KfactkWarning, match="it is no matrix"):
        train(model, optimizer, range(4, 5))
    assert optimizer.layers["0"].decomposition["A"]["eigenvectors"] is before


def test_a_fault_of_a_plugin_is_raised_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the steps before, nor by `state_dict`, whatever the thread has done by then."""
    model = network()
    optimizer = recipe(lag=2, basis="ekfac").bind(model)
    train(model, optimizer, range(2))

    def failing(*args: Any, **how: Any) -> Any:
        raise ZeroDivisionError("a fault of a plugin")

    with monkeypatch.context() as patch:
        patch.setattr(Block, "decompose", failing)
        train(model, optimizer, range(2, 3))
        assert not any(
            "ahead" in key for e in optimizer.state_dict()["state"].values() for key in e
        )
        train(model, optimizer, range(3, 4))
    with pytest.raises(ZeroDivisionError, match="a fault of a plugin"):
        train(model, optimizer, range(4, 5))
    assert optimizer.steps == 4
    train(model, optimizer, range(4, 6))


def test_the_thread_computes_with_as_many_threads_as_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last bits of a product depend on the number, and OpenMP keeps it for each thread."""
    model, numbers = network(), []
    optimizer = recipe(lag=1).bind(model)
    decompose, before = Block.decompose, torch.get_num_threads()

    def noting(self: Block, *args: Any, **how: Any) -> Any:
        numbers.append(torch.get_num_threads())
        return decompose(self, *args, **how)

    monkeypatch.setattr(Block, "decompose", noting)
    train(model, optimizer, range(5))
    torch.set_num_threads(before + 1)
    try:
        train(model, optimizer, range(5, 9))
    finally:
        torch.set_num_threads(before)
    assert numbers[-4:] == [before] * 2 + [before + 1] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_makes_what_was_on_its_way_itself() -> None:
    free = threading.Event()
    thread = threading.get_ident()

    def doubled(matrices: Any) -> Any:
        assert threading.get_ident() == thread or free.wait(30)
        return {name: {"it": 2 * each} for name, each in matrices.items()}

    ahead = Ahead.begin(doubled, {"A": torch.ones(2, 2)})
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if bool((ahead.result()["A"]["it"] == 2).all()) else 1)
    free.set()
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(ahead.result()["A"]["it"], torch.full((2, 2), 2.0))


def test_a_matrix_may_change_after_it_was_given() -> None:
    free = threading.Event()

    def later(matrices: Any) -> Any:
        assert free.wait(30)
        return {name: {"it": each} for name, each in matrices.items()}

    matrix = torch.ones(2, 2)
    ahead = Ahead.begin(later, {"A": matrix})
    matrix.zero_()
    assert not ahead.done
    free.set()
    assert torch.equal(ahead.result()["A"]["it"], torch.ones(2, 2))


@pytest.mark.parametrize(("lag", "words"), [(4, "below basis_every"), (-1, "lag"), (1.5, "lag")])
def test_a_lag_that_cannot_work_is_refused(lag: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        recipe(lag=lag)


def test_a_period_that_changes_may_have_a_lag() -> None:
    model = network()
    optimizer = recipe(lag=3, basis_every=kfactk.early).bind(model)
    train(model, optimizer, range(10))
    before = optimizer.layers["0"].decomposition["A"]["eigenvectors"]
    train(model, optimizer, range(10, 11))  # begun at step 7
    assert optimizer.layers["0"].decomposition["A"]["eigenvectors"] is not before


def test_a_period_that_becomes_too_short_is_refused() -> None:
    model = network()
    optimizer = recipe(lag=3, basis_every=lambda step: 5 if step < 8 else 2).bind(model)
    with pytest.raises(OptionError, match="lag is 3 and basis_every is 2 at step 8"):
        train(model, optimizer, range(12))


class TestLag(PipelineLaws):
    """The laws of recipes with a lag: ranks, resuming, accumulation."""

    recipe: ClassVar[Any] = {
        "curvature": "kfac",
        "update": torch.optim.SGD,
        "lr": 0.01,
        "lag": 1,
        "factor_every": 1,
        "scale_every": 1,
        "basis_every": 2,
    }

    def model(self) -> nn.Module:
        return network()

    def batch(self, generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(examples, 4, generator=generator, dtype=F64)
        return x, torch.randint(3, (examples,), generator=generator)


class TestStaggeredLag(TestLag):
    """The same with a staggered schedule."""

    recipe: ClassVar[Any] = {**TestLag.recipe, "stagger": True, "basis_every": 3}
