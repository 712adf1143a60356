"""Groups of a saved state pass as rules make them; values that cannot be are refused by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from kfactk import StateError
from kfactk.optim.saved_groups import check_groups, check_numbers
from kfactk.preconditioner.damage import Damage
from tests.kfactk.optim.test_rule_state import VARIANTS, stepped


def faults(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str:
    damage = Damage()
    check_groups([group], optimizer.param_groups, type(optimizer), dict(optimizer.defaults), damage)
    try:
        damage.refuse()
    except StateError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("rule", "options"), VARIANTS)
def test_groups_that_a_rule_has_made_pass(
    rule: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    optimizer = stepped(rule, torch.float32, 1, 1.0, **options)
    [group] = copy.deepcopy(optimizer.state_dict()["param_groups"])
    assert faults(optimizer, group) == ""
    numbers = {name: value for name, value in group.items() if type(value) in (int, float)}
    assert numbers
    for name, value in numbers.items():
        for bad in (str(value), math.nan, [value], {}, torch.tensor([1.0, 2.0]), 1j, math.inf):
            assert f"param_groups[0]['{name}'] is" in faults(optimizer, {**group, name: bad})
        assert faults(optimizer, {**group, name: torch.tensor(value)}) == ""


WRONG: dict[str, dict[str, Any]] = {
    "'betas'] is (0.9,), where it must hold 2 values": {"betas": (0.9,)},
    "'betas'] is 'text', where it must be a finite number": {"betas": ("text", 0.9)},
    "is refused by Adam: Invalid beta parameter at index 0: 1.5": {"betas": (1.5, 0.9)},
    "is refused by Adam: Invalid epsilon value: -1": {"eps": -1},
    "'amsgrad'] is None, where it must be True or False": {"amsgrad": None},
    "'foreach'] is 3, where it must be True or False": {"foreach": 3},
    "'lr'] is -1; it must be a finite number of at least 0": {"lr": -1},
    "'lr'] is 'text'; it must be": {"lr": "text"},
    "'damping'] is nan; it must be": {"damping": math.nan},
    "'weight_decay'] is inf; it must be": {"weight_decay": torch.tensor(math.inf)},
    "'lr'] is tensor(..., d...eta', size=()); it": {"lr": torch.ones((), device="meta")},
    "'param_names'] is no list of one name for each": {"param_names": ["a"]},
}


@pytest.mark.parametrize("message", WRONG)
def test_values_that_cannot_be_are_refused(message: str) -> None:
    optimizer = stepped(torch.optim.Adam, torch.float32, 1, 1.0)
    [group] = optimizer.state_dict()["param_groups"]
    assert message in faults(optimizer, group | WRONG[message])


def test_what_a_user_keeps_in_a_group_passes() -> None:
    optimizer = stepped(torch.optim.Adam, torch.float32, 1, 1.0)
    [group] = optimizer.state_dict()["param_groups"]
    more: dict[Any, Any] = {"name": None, 3: math.nan, "damping": 0.1, "initial_lr": 1, "x": {}}
    assert faults(optimizer, group | more | {"betas": [0.5, 0.9], "foreach": True}) == ""


def test_numbers_of_parameters_may_be_texts_but_once_each() -> None:
    damage = Damage()
    groups = [{"params": [0, "fc.weight"]}, {"params": [2]}]
    assert check_numbers(groups, damage) == [0, "fc.weight", 2]
    damage.refuse()
    for bad, message in (([0, 0], "0 more than once"), ([{}], "{}, which is no number")):
        check_numbers([{"params": bad}], damage)
        with pytest.raises(StateError, match=message):
            damage.refuse()
        damage = Damage()
