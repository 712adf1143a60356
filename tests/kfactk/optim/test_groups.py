"""The groups of parameters, and which damping is whose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kfactk
from kfactk import OptionError
from kfactk.optim.groups import ParameterGroups, check_group_numbers, trained, without_lr


def group(damping: float | None = None, **more: Any) -> dict[str, Any]:
    made = {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1, **more}
    return made if damping is None else {**made, "damping": damping}


def test_groups_are_completed_and_found_by_parameter() -> None:
    known = ParameterGroups(kfactk.build(damping=0.25, weight_decay=0.5))
    groups, view = [group(), group(weight_decay=0.0)], known.by_parameter
    known.index(groups)
    assert [each["damping"] for each in groups] == [0.25, 0.25]
    assert [each["weight_decay"] for each in groups] == [0.5, 0.0]
    assert [view[id(p)] for p in trained(groups)] == groups
    known.index(groups[1:])
    assert view is known.by_parameter, "it is shared"
    assert list(view.values()) == groups[1:]


def test_a_schedule_of_damping_leaves_groups_with_their_own() -> None:
    known = ParameterGroups(kfactk.build(damping=lambda step: 1.0 / (step + 1)))
    groups = [group(), group(0.7), group(1.0)]
    for each, own in zip(groups, [False, True, True], strict=True):
        known.join(each, own=own)
    known.index(groups)
    known.set_damping(3)
    assert [each["damping"] for each in groups] == [0.25, 0.7, 1.0]
    assert known.damping == 0.25


def test_a_group_that_nobody_announced_has_its_own_damping_where_it_differs() -> None:
    known = ParameterGroups(kfactk.build(damping=lambda step: 1.0 / (step + 1)))
    groups = [group(), group(0.7)]
    known.index(groups)
    known.set_damping(1)
    assert [each["damping"] for each in groups] == [0.5, 0.7]


def test_loaded_groups_take_the_places_of_the_others() -> None:
    known = ParameterGroups(kfactk.build(damping=lambda step: 1.0 / (step + 1)))
    groups = [group(1.0), group(1.0)]
    for each, own in zip(groups, [True, False], strict=True):
        known.join(each, own=own)
    loaded = [group(1.0), group(1.0)]
    known.replace(loaded)
    known.index(loaded)
    known.set_damping(1)
    assert [each["damping"] for each in loaded] == [1.0, 0.5]


@pytest.mark.parametrize("name", ["lr", "damping", "weight_decay"])
def test_numbers_of_a_group_are_checked(name: str) -> None:
    check_group_numbers({name: 0.1, "params": []})
    check_group_numbers({name: torch.tensor(0.1)})
    with pytest.raises(OptionError, match=f"{name} of a parameter group"):
        check_group_numbers({name: -1.0})


def test_a_damping_that_was_written_is_checked_in_the_step() -> None:
    known = ParameterGroups(kfactk.build(damping=0.1))
    groups = [group()]
    known.index(groups)
    groups[0]["damping"] = float("nan")
    with pytest.raises(OptionError, match="damping of a parameter group"):
        known.set_damping(0)


def test_no_learning_rate_is_known_without_a_device() -> None:
    assert without_lr([{"lr": 0.0}, {"lr": torch.zeros(())}])
    assert not without_lr([{"lr": 0.0}, {"lr": 0.1}])
    assert not without_lr([{"lr": torch.zeros((), device="meta")}]), "it is not asked for"
