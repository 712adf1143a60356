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
    joined,
    progress_of,
)
from kfactk.optim.shown import ShownState
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
        {"state": {0: {STEP: "5"}}, "param_groups": [{"params": [0]}]},
        {"state": {0: {STEP: torch.tensor(-1)}}, "param_groups": [{"params": [0]}]},
        {"state": {0: {STEP: torch.tensor(float("nan"))}}, "param_groups": [{"params": [0]}]},
        {"state": {}, "param_groups": {}},
        {"state": {}, "param_groups": [{"params": 0}]},
    ],
)
def test_split_refuses_what_is_no_optimizers_state(saved: Any) -> None:
    with pytest.raises(StateError, match="damaged: it must hold"):
        SavedState.split(saved, [])


def test_split_refuses_nan_of_the_update_rule() -> None:
    saved = {"state": {0: {"m": torch.tensor([1.0, float("nan")])}}}
    with pytest.raises(StateError, match="the update rule's m holds NaN"):
        SavedState.split(saved | {"param_groups": [{"params": [0]}]}, [{"params": [0]}])


def test_saved_groups_are_completed_or_refused() -> None:
    known = RULE | {"damping": 0.1}
    current = [known | {"params": ["p"], "damping": 0.5, "mine": 1}]
    saved = {"params": [0], "lr": 0.3, "betas": (0.8, 0.9), "theirs": 2}
    completed = {**RULE, **saved, "damping": 0.5}
    assert completed_groups([saved], current, known, RULE) == [completed]
    assert completed_groups([saved, saved], current, known, RULE) == [saved, saved]
    with pytest.raises(StateError, match="parameter groups have no betas"):
        completed_groups([{"params": [0], "lr": 0.3, "momentum": 0.9}], current, known, RULE)
    with pytest.raises(OptionError, match="lr of a saved parameter group is -1"):
        completed_groups([saved | {"lr": -1}], current, known, RULE)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("step"), StateError),
        (ValueError("sizes"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_all_or_nothing_restores_state_and_groups(
    error: BaseException, told: type[BaseException]
) -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    state, groups = optimizer.state, optimizer.param_groups
    with pytest.raises(told), all_or_nothing(optimizer):  # noqa: PT012
        optimizer.state, optimizer.param_groups = defaultdict(dict), []
        raise error
    assert optimizer.state is state
    assert optimizer.param_groups is groups


def test_progress_is_what_messages_follow_from() -> None:
    overdue = DueWork(True, False, True, False)
    states = {"fc": BlockState(ready=True, overdue=overdue), "new": BlockState()}
    found = progress_of(4, states)
    assert found.step == 4
    assert found.layers == {
        "fc": (True, (True, False, True, False)),
        "new": (False, (False, False, False, False)),
    }
