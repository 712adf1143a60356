"""A saved state in its parts: what fits is completed, and nothing of the optimizer changes."""

from __future__ import annotations

import copy

import pytest
import torch

from kfactk import Optimizer, StateError
from tests.kfactk.small import batch, bound, net, train


def trained(**recipe: object) -> Optimizer:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model, **recipe)
    train(optimizer, model, batch())
    return optimizer


def test_a_saved_state_is_read_in_its_parts() -> None:
    saved, other = trained(update="adam").state_dict(), trained(update="adam")
    before = copy.deepcopy(other.state_dict())
    found = other._loader.checked(saved)
    assert (int(found.step), found.step.device.type, found.fits) == (1, "cpu", True)
    assert sorted(found.curvature) == ["0", "2"]
    assert sorted(found.entries) == [0, 1, 2, 3]
    assert all("exp_avg" in entry for entry in found.entries.values())
    assert not any(key.startswith("kfactk.") for e in found.entries.values() for key in e)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, entry in before["state"].items():
        torch.testing.assert_close(after["state"][number], entry, rtol=0, atol=0)


def test_groups_are_completed_by_their_present_values() -> None:
    saved, other = trained().state_dict(), trained(damping=0.3)
    for group in saved["param_groups"]:
        del group["damping"]
    assert [group["damping"] for group in other._loader.checked(saved).groups] == [0.3]


def test_groups_of_other_sizes_are_left_to_torch() -> None:
    saved, other = trained().state_dict(), trained()
    saved["param_groups"][0]["params"] = [0, 1, 2]
    del saved["state"][3]
    found = other._loader.checked(saved)
    assert not found.fits
    assert found.curvature == {}
    with pytest.raises(ValueError, match="size"):
        other.load_state_dict(saved)


def test_the_entries_of_another_rule_are_refused() -> None:
    saved, other = trained(update="sgd").state_dict(), trained(update="adam")
    with pytest.raises(StateError, match="another update rule's"):
        other._loader.checked(saved)
