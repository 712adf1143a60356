"""What is shown, saved and loaded: parts of a saved state, its checks, and what a load changes.

Whole runs that are saved and resumed are in `test_optimizer_state`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kfactk import OptionError, StateError
from kfactk.distributed.gathering import Progress
from kfactk.optim import checkpoint
from kfactk.optim.checkpoint import SavedState, completed_groups, progress_of
from kfactk.preconditioner.schedule import DueWork
from kfactk.preconditioner.state import STEP, BlockState
from tests.kfactk.small import batch, bound, net, train

RULE = {"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False, "foreach": None}


def saved(entries: dict[int, Any], *groups: list[int]) -> dict[str, Any]:
    return {"state": entries, "param_groups": [{"params": group} for group in groups]}


def test_a_saved_state_is_divided_by_owner() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
    own = torch.ones(1)
    state = saved(
        {
            0: {"exp_avg": 1, STEP: torch.tensor(5), "kfactk.factor.A": own},
            1: {STEP: torch.tensor(5)},
        },
        [0],
        [1],
    )
    found = SavedState.split(state, [{"params": [first, second]}])
    assert found.curvature == {id(first): {"kfactk.factor.A": own}}
    assert (found.rule, found.step) == ({0: {"exp_avg": 1}}, 5)
    empty = SavedState.split(saved({}, [0, 1]), [{"params": [first, second]}])
    assert (empty.curvature, empty.rule, empty.step) == ({}, {}, 0)


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        {},
        {"state": {}, "param_groups": {}},
        {"state": {}, "param_groups": [{}]},
        {"state": {}, "param_groups": [{"params": 0}]},
        {"state": [], "param_groups": []},
        {"state": {0: 1}, "param_groups": []},
        saved({0: {STEP: -1}}, [0]),
        saved({0: {STEP: 1.5}}, [0]),
        saved({0: {STEP: torch.tensor(float("nan"))}}, [0]),
        saved({0: {STEP: torch.tensor([1, 2])}}, [0]),
    ],
)
def test_a_state_of_another_form_is_refused(damaged: Any) -> None:
    with pytest.raises(StateError, match=r"damaged: it must hold \"state\""):
        SavedState.split(damaged, [{"params": [nn.Parameter(torch.ones(1))]}])


def test_nan_in_the_state_of_the_rule_is_refused_by_name() -> None:
    entry = {"exp_avg": torch.tensor([1.0, float("nan")]), "exp_avg_sq": torch.ones(2)}
    with pytest.raises(StateError, match="the update rule's exp_avg holds NaN"):
        SavedState.split(saved({0: entry}, [0]), [{"params": [nn.Parameter(torch.ones(2))]}])


# ------------------------------------------------------------------------------- parameter groups


def test_saved_groups_are_completed_by_what_they_lack() -> None:
    known = RULE | {"damping": 0.1}
    current = [known | {"params": ["p"], "damping": 0.5, "mine": 1}]
    group = {"params": [0], "lr": 0.3, "betas": (0.8, 0.9), "theirs": 2}
    expected = {
        **{"params": [0], "lr": 0.3, "betas": (0.8, 0.9), "amsgrad": False, "foreach": None},
        **{"damping": 0.5, "theirs": 2},
    }
    assert completed_groups([group], current, known, RULE) == [expected]
    assert completed_groups([group, group], current, known, RULE) == [group, group]


def test_groups_of_another_rule_are_refused() -> None:
    known = RULE | {"damping": 0.1}
    with pytest.raises(StateError, match="another update rule's: its parameter groups have no bet"):
        completed_groups([{"params": [0], "lr": 0.3, "momentum": 0.9}], [known], known, RULE)


@pytest.mark.parametrize("name", ["lr", "damping", "weight_decay"])
def test_saved_numbers_that_cannot_be_are_refused(name: str) -> None:
    group = {"params": [0], **RULE, name: -1.0}
    with pytest.raises(OptionError, match=f"{name} of a saved parameter group is -1.0"):
        completed_groups([group], [RULE], RULE, RULE)


# -------------------------------------------------------------------------- all of it or nothing


def half_load(optimizer: torch.optim.Optimizer, error: BaseException) -> None:
    with checkpoint.all_or_nothing(optimizer):
        optimizer.state, optimizer.param_groups = {}, []
        raise error


@pytest.mark.parametrize("error", [AttributeError, KeyError, IndexError, TypeError])
def test_a_rule_that_lacks_something_of_the_state_leaves_all_as_it_was(
    error: type[Exception],
) -> None:
    optimizer = torch.optim.Adam(net().parameters())
    state, groups = optimizer.state, optimizer.param_groups
    with pytest.raises(StateError, match="the update rule cannot take over the saved state"):
        half_load(optimizer, error("exp_avg"))
    assert optimizer.state is state
    assert optimizer.param_groups is groups


def test_other_errors_of_a_load_keep_their_class() -> None:
    optimizer = torch.optim.Adam(net().parameters())
    state = optimizer.state
    with pytest.raises(KeyboardInterrupt):
        half_load(optimizer, KeyboardInterrupt())
    assert optimizer.state is state


def test_ranks_compare_step_and_standing_of_their_layers() -> None:
    states = {
        "a": BlockState(ready=True),
        "b": BlockState(overdue=DueWork(True, False, False, True)),
    }
    nothing = (False,) * 4
    assert progress_of(7, states) == Progress(
        7, {"a": (True, nothing), "b": (False, (True, False, False, True))}
    )


# ---------------------------------------------------------------------------------------- showing


def test_the_shown_state_holds_the_tensors_themselves() -> None:
    model = net()
    optimizer = bound(model, update="adam")
    train(optimizer, model, batch())
    weight, bias = model[0].weight, model[0].bias
    block = optimizer.layers["0"].block
    assert optimizer.state[weight]["kfactk.factor.A"] is block.state.factors["A"].value
    assert "exp_avg" in optimizer.state[bias]
    assert {key for key in optimizer.state[bias] if key.startswith("kfactk")} == {STEP}


def test_curvature_can_be_hidden_while_it_is_replaced() -> None:
    model = net()
    optimizer = bound(model, update="adam")
    train(optimizer, model, batch())
    blocks = [view.block for view in optimizer.layers.values()]
    entries = dict(optimizer.state)
    before = copy.copy(entries[model[0].weight])
    assert checkpoint.hide_curvature(entries, blocks)
    hidden = entries[model[0].weight]
    assert {key for key in before if key not in hidden} == set(blocks[0].flat())
    assert STEP in hidden
    assert entries[model[0].weight] is not before
    assert not checkpoint.hide_curvature({}, blocks)
