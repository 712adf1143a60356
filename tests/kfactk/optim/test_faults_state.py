"""A damaged state is refused with a clear error and changes nothing, or is known to be harmless."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kfactk import Optimizer, StateError
from tests.kfactk.optim.test_optimizer_state import assert_same, net, recipe, run

DELETED = object()
DAMAGES: dict[str, Callable[[Any], Any]] = {
    "deleted": lambda value: DELETED,
    "none": lambda value: None,
    "text": lambda value: "rubbish",
    "another shape": lambda value: torch.ones(2, 3, 5) if isinstance(value, Tensor) else value,
    "nan": lambda value: (
        value * float("nan") if isinstance(value, Tensor) and value.is_floating_point() else value
    ),
    "emptied": lambda value: type(value)() if isinstance(value, dict | list) else value,
}
HARMLESS = {
    # A bare update rule has none of the first either; an older torch, or the rule, not the others.
    "deleted": r"state/\d+|state/\d+/(kfactk\.(step|overdue)|momentum_buffer)"
    r"|param_groups/0/(damping|foreach|fused|maximize|differentiable|capturable|amsgrad|nesterov"
    r"|decoupled_weight_decay)",
    # This is the state of an optimizer that has taken no step.
    "emptied": r"state|state/\d+",
    "none": r"state/\d+/momentum_buffer",
}
"""What may be lost without harm."""


def paths(nested: Any, start: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every entry of a state, by its keys."""
    for key, value in (
        nested.items()
        if isinstance(nested, dict)
        else enumerate(nested)
        if isinstance(nested, list)
        else ()
    ):
        yield (*start, key)
        yield from paths(value, (*start, key))


def damaged(state: dict[str, Any], path: tuple[Any, ...], damage: str) -> dict[str, Any] | None:
    """The state with one entry damaged; `None` where this damage does not apply."""
    state = copy.deepcopy(state)
    gradient_worker: Any = state
    for key in path[:-1]:
        gradient_worker = gradient_worker[key]
    new = DAMAGES[damage](gradient_worker[path[-1]])
    if new is gradient_worker[path[-1]]:
        return None
    if new is DELETED:
        del gradient_worker[path[-1]]
    else:
        gradient_worker[path[-1]] = new
    return state


def trained(basis: str, update: str, steps: int) -> tuple[Optimizer, torch.nn.Module]:
    model = net()
    optimizer = recipe(basis, update).bind(model)
    run(optimizer, model, 0, steps)
    return optimizer, model


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("basis", "update"), [("kfac", "momentum"), ("ekfac", "adam")])
def test_a_damaged_state_is_refused_and_changes_nothing(
    basis: str, update: str, damage: str
) -> None:
    saved, _ = trained(basis, update, 7)
    good = saved.state_dict()
    optimizer, model = trained(basis, update, 3)
    before, weights, refused = (
        copy.deepcopy(optimizer.state_dict()),
        copy.deepcopy(model.state_dict()),
        0,
    )
    for path in paths(good):
        name = "/".join(map(str, path))
        state = damaged(good, path, damage)
        if state is None or re.fullmatch(HARMLESS.get(damage, "(?!)"), name):
            continue
        sizes = name.startswith("param_groups/0/params")  # torch refuses some of these
        with pytest.raises((StateError, ValueError) if sizes else StateError) as caught:
            optimizer.load_state_dict(state)
        assert len(str(caught.value)) > 40, f"{name}: {caught.value}"
        assert_same(before, optimizer.state_dict())
        refused += 1
    assert refused >= 3, refused
    run(optimizer, model, 3, 2)
    twin, other = trained(basis, update, 3)
    assert_same(weights, other.state_dict())
    run(twin, other, 3, 2)
    assert_same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("lost", ["step", "exp_avg"])
def test_a_state_in_which_the_update_rule_misses_something(lost: str) -> None:
    saved, _ = trained("ekfac", "adam", 7)
    optimizer, model = trained("ekfac", "adam", 3)
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(saved.state_dict())
    del state["state"][0][lost]
    with pytest.raises(StateError, match=rf"state\[0\]\['{lost}'\] is missing, which Adam needs"):
        optimizer.load_state_dict(state)
    assert_same(before, optimizer.state_dict())
    run(optimizer, model, 3, 2)


def test_what_is_lost_without_harm_trains_on() -> None:
    saved, _ = trained("ekfac", "adam", 7)
    good = saved.state_dict()
    for damage, pattern in HARMLESS.items():
        for path in paths(good):
            if not re.fullmatch(pattern, "/".join(map(str, path))):
                continue
            optimizer, model = trained("ekfac", "adam", 0)
            state = damaged(good, path, damage)
            assert state is not None
            optimizer.load_state_dict(state)
            run(optimizer, model, 7, 2)
            assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused_by_torch(part: float, tmp_path: Path) -> None:
    """As it is left by a save that was interrupted; the optimizer never sees it."""
    optimizer, _ = trained("ekfac", "adam", 2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    path = tmp_path / "state.pt"
    path.write_bytes(buffer.getvalue()[: int(part * len(buffer.getvalue()))])
    with pytest.raises((RuntimeError, OSError, EOFError)):
        torch.load(path, weights_only=True)


def test_a_save_that_is_interrupted_leaves_the_optimizer_as_it_was() -> None:
    optimizer, model = trained("ekfac", "adam", 3)
    twin, other = trained("ekfac", "adam", 3)

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError("disk full")

    with pytest.raises((OSError, RuntimeError)):
        torch.save(optimizer.state_dict(), Full())
    assert_same(twin.state_dict(), optimizer.state_dict())
    run(optimizer, model, 3, 3)
    run(twin, other, 3, 3)
    assert_same(model.state_dict(), other.state_dict())


def test_a_number_of_steps_beyond_an_int64_changes_nothing() -> None:
    """The last thing that is taken over is refused as the first is."""
    saved, _ = trained("ekfac", "adam", 7)
    optimizer, _ = trained("ekfac", "adam", 3)
    before, groups = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups
    state = copy.deepcopy(saved.state_dict())
    for entry in state["state"].values():
        entry["kfactk.step"] = 10**30
    with pytest.raises(StateError, match="no number of steps"):
        optimizer.load_state_dict(state)
    assert_same(before, optimizer.state_dict())
    assert optimizer.param_groups is groups
    assert optimizer.steps == 3


@pytest.mark.parametrize("update", ["adam", "momentum", "nag"])
def test_a_loaded_state_is_read_whatever_its_tensors_look_like(update: str) -> None:
    """Tensors that need gradients, or lie in odd places of memory, hold the same numbers."""
    saved, _ = trained("ekfac", update, 7)
    (one, model), (other, twin) = trained("ekfac", update, 0), trained("ekfac", update, 0)
    one.load_state_dict(copy.deepcopy(saved.state_dict()))
    odd = copy.deepcopy(saved.state_dict())
    for entry in odd["state"].values():
        for key, value in entry.items():
            if value.is_floating_point():
                spread = torch.empty(*value.shape, 2, dtype=value.dtype)[..., 0].copy_(value)
                entry[key] = spread.requires_grad_() * 1
    other.load_state_dict(odd)
    run(one, model, 7, 4)
    run(other, twin, 7, 4)
    assert_same(model.state_dict(), twin.state_dict())
