"""What `Optimizer.state` shows between steps, and for how long."""

from __future__ import annotations

import contextlib
import copy
import weakref
from typing import Any

import pytest
from torch import Tensor

import kfactk
from kfactk_stages.basis.ekfac import Ekfac
from tests.kfactk.optim.test_optimizer_state import AFTER, SAVED_AT, UPDATES, net, recipe, run


@pytest.mark.parametrize("update", UPDATES)
def test_every_parameter_has_state_after_the_first_step(update: str) -> None:
    model = net()
    optimizer = recipe(update=update).bind(model)
    assert not optimizer.state
    assert optimizer.state_dict()["state"] == {}
    run(optimizer, model, 0, 1)
    for name, parameter in model.named_parameters():
        entry = optimizer.state[parameter]
        assert int(entry["kfactk.step"]) == 1
        assert ("kfactk.factor.A" in entry) == (
            name.endswith("weight") and not name.startswith("3.")
        )
    if update == "adam":
        assert {"exp_avg", "exp_avg_sq", "step"} < set(optimizer.state[model[0].weight])


def test_state_shows_the_update_rules_own_tensors() -> None:
    model = net()
    optimizer = recipe(update="momentum").bind(model)
    run(optimizer, model, 0, 2)
    assert (
        optimizer.state[model[0].weight]["momentum_buffer"]
        is optimizer._inner.state[model[0].weight]["momentum_buffer"]
    )


def test_a_saved_state_stays_as_it_was_and_what_was_shown_is_let_go() -> None:
    model = net()
    optimizer = recipe(update="sgd").bind(model)
    run(optimizer, model, 0, SAVED_AT)
    weight = model[4].weight
    old = weakref.ref(optimizer.state[weight]["kfactk.basis.A.eigenvectors"])
    saved = optimizer.state_dict()
    copied = copy.deepcopy(saved["state"])
    run(optimizer, model, SAVED_AT, AFTER)
    assert saved["state"].keys() == copied.keys()
    assert all(saved["state"][key].keys() == entry.keys() for key, entry in copied.items())
    del saved
    assert old() is None, "a basis that was replaced"


@pytest.mark.parametrize("failing", [False, True])
def test_state_does_not_hold_a_basis_while_it_is_replaced(failing: bool) -> None:
    seen: list[bool] = []

    class Looking(Ekfac):
        def decompose(self, name: str, matrix: Tensor, context: Any) -> dict[str, Tensor]:
            seen.append(
                any(".eigenvectors" in key for key in optimizer.state.get(model[4].weight, {}))
            )
            if failing and optimizer.steps == 5:
                raise KeyboardInterrupt
            return super().decompose(name, matrix, context)

    model = net()
    optimizer = kfactk.build(basis=Looking(), update="momentum", basis_every=5).bind(model)
    run(optimizer, model, 0, 5)
    shown = optimizer.state[model[4].weight].keys()
    assert any(".eigenvectors" in key for key in shown)
    with pytest.raises(KeyboardInterrupt) if failing else contextlib.nullcontext():
        run(optimizer, model, 5, 1)
    assert not any(seen)
    assert optimizer.state[model[4].weight].keys() == shown
