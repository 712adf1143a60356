"""What an optimizer keeps is shown, hidden, joined, divided and completed as its docstrings say."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from kfactk import OptionError, StateError
from kfactk.optim.checkpoint import (
    SavedState,
    all_or_nothing,
    completed_groups,
    fit,
    joined,
    on_cpu,
    progress_of,
)
from kfactk.optim.shown import ShownState
from kfactk.preconditioner.pace_state import PaceState
from kfactk.preconditioner.schedule import DueWork
from kfactk.preconditioner.state import STEP, BlockState
from tests.kfactk.small import batch, bound, net, train

RULE: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False, "foreach": None}


def test_show_and_hide_curvature_of_a_state() -> None:
    model = net()
    optimizer = bound(model)
    train(optimizer, model, batch())
    blocks = optimizer._preconditioner.blocks.current()
    weight, bias = model[0].weight, model[0].bias
    step, moved = torch.tensor(3), torch.ones(1)
    entry = {"momentum_buffer": moved}
    state: dict[Any, Any] = {weight: entry, "all": 4, bias: {}}
    shown = ShownState()
    assert not shown.hide(state)
    shown.show(state, optimizer.param_groups, blocks, step)
    assert set(state) == {*model.parameters(), "all"}
    assert state[bias] == {STEP: step}
    assert state[weight] is entry, "who holds an entry sees what comes later"
    assert entry[STEP] is step
    assert entry["kfactk.factor.A"] is blocks[0].state.factors["A"].value
    assert shown.hide(state)
    assert state == {weight: {"momentum_buffer": moved}, "all": 4}
    assert state[weight] is entry


def test_what_was_removed_from_a_state_is_told_once() -> None:
    model = net()
    optimizer = bound(model)
    train(optimizer, model, batch())
    blocks, groups = optimizer._preconditioner.blocks.current(), optimizer.param_groups
    shown, state, step = ShownState(), {}, torch.tensor(1)
    shown.show(state, groups, blocks, step)
    assert not shown.removed(state).parameters
    del state[model[0].weight]
    state[model[2].bias] = {"m": 1}
    found = shown.removed(state)
    assert list(map(id, found.parameters)) == [id(model[0].weight), id(model[2].bias)]
    assert (found.blocks, found.everything) == (blocks[:1], False)
    shown.forget(found)
    assert not shown.removed(state).parameters
    state.clear()
    assert shown.removed(state).everything
    assert shown.removed(state).blocks == blocks[1:]


def test_values_written_by_hand_are_warned_of_once() -> None:
    model = net()
    optimizer = bound(model)
    train(optimizer, model, batch())
    before = optimizer.layers["0"].factors["A"].clone()
    for told in (True, False):
        optimizer.state[model[0].weight]["kfactk.factor.A"] = torch.zeros(5, 5)
        optimizer.state[model[0].bias]["kfactk.mine"] = 3
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            saved = optimizer.state_dict()
        messages = [str(each.message) for each in caught]
        expected = "optimizer.state was given other values of kfactk.factor.A, kfactk.mine."
        assert [message.startswith(expected) for message in messages] == [True] * told
        assert torch.equal(saved["state"][0]["kfactk.factor.A"], before)
        assert "kfactk.mine" not in saved["state"][1]


def test_joined_adds_curvature_to_a_rules_saved_state() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2), requires_grad=False)
    entry, groups = {0: {"m": 1}}, [{"params": [first, second]}]
    rule = {"state": {0: entry, "all": 7}, "param_groups": [{"params": [0, 1]}], "more": 5}
    step = torch.tensor(2)
    found = joined(rule, groups, {id(first): {"kfactk.factor.A": 4}}, step)
    assert found == {
        **rule,
        "state": {0: {0: {"m": 1}, STEP: step, "kfactk.factor.A": 4}, "all": 7},
    }
    assert entry == {0: {"m": 1}}
    with pytest.raises(StateError, match="keeps a list for a parameter"):
        joined({**rule, "state": {0: [1]}}, groups, {}, step)


def test_split_divides_a_saved_state_by_owner() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
    saved = {
        "state": {
            0: {"exp_avg": 1, STEP: torch.tensor(5), "kfactk.factor.A": 2},
            1: {STEP: torch.tensor(5)},
        },
        "param_groups": [{"params": [0]}, {"params": [1]}],
    }
    found = SavedState.split(saved, [{"params": [first, second]}])
    assert found.curvature == {id(first): {"kfactk.factor.A": 2}}
    assert found.rule == {0: {"exp_avg": 1}}
    assert found.step == 5
    fresh = {"state": {}, "param_groups": [{"params": [0, 1]}]}
    empty = SavedState.split(fresh, [{"params": [first, second]}])
    assert (empty.curvature, empty.rule, empty.step) == ({}, {}, 0)


@pytest.mark.parametrize(
    "saved",
    [
        None,
        {"param_groups": []},
        {"state": [], "param_groups": []},
        {"state": {0: 1}, "param_groups": [{"params": [0]}]},
        {"state": {}, "param_groups": {}},
        {"state": {}, "param_groups": [{"params": 0}]},
    ],
)
def test_split_refuses_what_is_no_optimizers_state(saved: Any) -> None:
    with pytest.raises(StateError, match="damaged: it must hold"):
        SavedState.split(saved, [])


STEPS: list[Any] = [
    *("5", 10**30, 2.5, True, None, -1),
    *map(torch.tensor, (-1, float("nan"), float("inf"), 2**62, [3])),
    torch.tensor(1, device="meta"),
]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_split_refuses_what_is_no_number_of_steps(step: Any) -> None:
    saved = {"state": {0: {STEP: step}}, "param_groups": [{"params": [0]}]}
    with pytest.raises(StateError, match=r"state\[0\]\['kfactk.step'\] is no number of steps"):
        SavedState.split(saved, [{"params": [nn.Parameter(torch.ones(1))]}])


@pytest.mark.parametrize("step", [5, 5.0, torch.tensor(5), torch.tensor(5.0)])
def test_split_reads_numbers_of_steps_of_any_kind(step: Any) -> None:
    saved = {"state": {0: {STEP: step}, 1: {}}, "param_groups": [{"params": [0, 1]}]}
    found = SavedState.split(saved, [{"params": [nn.Parameter(torch.ones(1))] * 2}])
    assert (found.step, type(found.step)) == (5, int)


def test_split_refuses_entries_that_do_not_agree() -> None:
    groups = [{"params": [0, 1]}]
    saved: Any = {"state": {0: {STEP: 3}, 1: {STEP: 4}}, "param_groups": groups}
    with pytest.raises(StateError, match=r"agree on 'kfactk.step': 3 in state\[0\], 4 in"):
        SavedState.split(saved, groups)
    saved["state"] = {"0": {STEP: 3}, "mine": {"a": 1}}
    with pytest.raises(StateError, match=r"state\['0'\] holds curvature, but no parameter"):
        SavedState.split(saved, groups)
    saved = {"state": {}, "param_groups": [{"params": [0]}, {"params": [0]}]}
    with pytest.raises(StateError, match="'params' holds 0 more than once"):
        SavedState.split(saved, groups)


def test_single_numbers_come_to_the_cpu_and_others_stay() -> None:
    entry = {"a": torch.ones(2), "b": torch.tensor(1), "c": "text"}
    found = on_cpu(entry)
    assert all(found[key] is entry[key] for key in entry)


def test_saved_groups_are_completed_or_refused() -> None:
    known = RULE | {"damping": 0.1}
    current = [known | {"params": ["p"], "damping": 0.5, "mine": 1}]
    saved = {"params": [0], "lr": 0.3, "betas": (0.8, 0.9), "theirs": 2}
    completed = {**RULE, **saved, "damping": 0.5}
    assert completed_groups([saved], current, known, RULE) == [completed]
    assert completed_groups([saved, saved], current, known, RULE) == [saved, saved]
    with pytest.raises(StateError, match="parameter groups have no betas"):
        completed_groups([{"params": [0], "lr": 0.3, "momentum": 0.9}], current, known, RULE)
    assert fit([saved], current)
    assert not fit([saved, saved], current)
    assert not fit([saved | {"params": []}], current)


@pytest.mark.parametrize(
    ("error", "fits", "told"),
    [
        (KeyError("step"), True, StateError),
        (ValueError("a value"), True, StateError),
        (ValueError("sizes"), False, ValueError),
        (OptionError("mine"), True, OptionError),
        (RuntimeError("not enough memory"), True, RuntimeError),
        (RuntimeError("no such kernel"), True, StateError),
        (KeyboardInterrupt(), True, KeyboardInterrupt),
    ],
)
def test_all_or_nothing_restores_state_and_groups(
    error: BaseException, fits: bool, told: type[BaseException]
) -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    state, groups = optimizer.state, optimizer.param_groups
    with pytest.raises(told), all_or_nothing(optimizer, fits=fits):  # noqa: PT012
        optimizer.state, optimizer.param_groups = defaultdict(dict), []
        raise error
    assert optimizer.state is state
    assert optimizer.param_groups is groups


def test_progress_is_what_messages_follow_from() -> None:
    overdue = DueWork(True, False, True, False)
    states = {
        "fc": BlockState(ready=True, overdue=overdue),
        "new": BlockState(pace=PaceState(due=7)),
    }
    found = progress_of(4, states)
    assert found.step == 4
    assert found.layers == {
        "fc": (True, (True, False, True, False), 0),
        "new": (False, (False, False, False, False), 7),
    }
