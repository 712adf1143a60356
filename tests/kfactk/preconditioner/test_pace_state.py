"""What is kept of a paced block: its keys, and what another pace or placement takes of it."""

from __future__ import annotations

import torch

from kfactk.preconditioner.pace_state import KEY, PaceState


def noted(times: int, keeps: int) -> PaceState:
    state = PaceState()
    for number in range(times):
        values = {"A": torch.full((2, 2), float(number)), "G": torch.ones(1)}
        state.note(number + 1, values, keeps)
    return state


def test_the_last_refresh_comes_first() -> None:
    state = noted(5, keeps=3)
    assert (state.refreshes, state.intervals) == (5, [5, 4, 3])
    assert [float(each["A"][0, 0]) for each in state.values] == [4.0, 3.0, 2.0]


def test_keys_are_the_same_from_the_first_refresh_on() -> None:
    keys = noted(1, keeps=2).flat().keys()
    assert keys == noted(6, keeps=2).flat().keys()
    blank = PaceState.blank({"A": torch.ones(2, 2), "G": torch.ones(1)}, 2)
    assert keys == blank.flat().keys()
    assert all(KEY.fullmatch(key) for key in keys)
    assert PaceState().flat() == {}


def test_a_blank_state_has_seen_nothing() -> None:
    state = PaceState.blank({"A": torch.ones(2, 2)}, 2)
    assert state.known_intervals == ()
    state.note(1, {"A": torch.ones(2, 2)}, 2)
    assert state.known_intervals == (1,)
    assert all(bool(each["A"].all()) for each in state.values)


def test_flat_and_back() -> None:
    state = noted(3, keeps=2)
    state.due = 12
    flat = state.flat()
    numbers = {key: int(each) for key, each in flat.items() if not key.startswith("value")}
    values = {key: each for key, each in flat.items() if key.startswith("value")}
    found = PaceState.from_flat(numbers, values)
    assert (found.due, found.refreshes, found.intervals) == (12, 3, [3, 2])
    assert [each.keys() for each in found.values] == [{"A", "G"}] * 2


def test_ranks_keep_their_own_factors_and_all_numbers() -> None:
    state = PaceState()
    state.note(1, {"A": None, "G": torch.ones(1)}, 2)
    assert [each.keys() for each in state.values] == [{"G"}] * 2
    found = noted(3, keeps=2).fitted(3, frozenset({"A"}))
    assert found.intervals == [3, 2, 0]
    assert [each.keys() for each in found.values] == [{"A"}] * 3
    assert noted(3, keeps=2).fitted(0, frozenset({"A"})).flat() == {}
