"""Placements that break a law, and which."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import strategies as st

from kfactk import Statistic
from kfactk.testing import PlacementLaws
from kfactk.testing.placement import statistics
from tests.kfactk.testing.broken import caught

SUMS = "test_sums_and_counts_are_those_of_all_ranks"
GIVEN = "test_what_is_given_is_not_changed"
ORDER = "test_any_order_of_names_gives_the_same"


class Alone:
    """A right placement for one process."""

    rank = 0

    def reduce(self, statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {name: self.one(each) for name, each in statistics.items()}

    def one(self, each: Statistic) -> Statistic:
        return each


class RankOne(Alone):
    rank = 1


class DropsNone(Alone):
    def reduce(self, statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {name: each for name, each in statistics.items() if each.total is not None}


class FillsNone(Alone):
    def one(self, each: Statistic) -> Statistic:
        return Statistic(torch.zeros(()) if each.total is None else each.total, each.count)


class Averages(Alone):
    def one(self, each: Statistic) -> Statistic:
        return Statistic(None if each.total is None else each.total / (1 + float(each.count)), each.count)


class CountsInFloat32(Alone):
    def one(self, each: Statistic) -> Statistic:
        return Statistic(each.total, torch.as_tensor(each.count).float())


class SumsInFloat32(Alone):
    def one(self, each: Statistic) -> Statistic:
        return Statistic(None if each.total is None else each.total.float(), each.count)


class Flattens(Alone):
    def one(self, each: Statistic) -> Statistic:
        return Statistic(None if each.total is None else each.total.reshape(-1), each.count)


class AddsInPlace(Alone):
    def one(self, each: Statistic) -> Statistic:
        return Statistic(None if each.total is None else each.total.add_(0.5), each.count)


class Empties(Alone):
    def reduce(self, statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
        return {name: statistics.pop(name) for name in list(statistics)}  # type: ignore[attr-defined]


class Remembers(Alone):
    def __init__(self) -> None:
        self.calls = 0

    def one(self, each: Statistic) -> Statistic:
        self.calls += 1
        return Statistic(each.total, each.count + self.calls)


class FirstCounts(Alone):
    def reduce(self, statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
        counts = [each.count for each in statistics.values()]
        return {name: Statistic(each.total, counts[0]) for name, each in statistics.items()}


@pytest.mark.parametrize(
    ("stage", "law", "says"),
    [
        (RankOne, "test_ranks_count_from_zero", r"1 ranks are numbered \[1\]: they must count from 0"),
        (DropsNone, SUMS, r"rank 0 gets the names \[.*\], not \["),
        (FillsNone, SUMS, r"the total is 0\.0, and 0 ranks have one"),
        (Averages, SUMS, "the total is not the sum of the ranks' totals"),
        (CountsInFloat32, SUMS, r"the count is 1073741824\.0, and the ranks' counts sum to 1073741825\.0"),
        (SumsInFloat32, SUMS, "the total is torch.float32, not torch.float64"),
        (Flattens, SUMS, r"the total has shape \[\d\], not \["),
        (AddsInPlace, GIVEN, "which was given, is changed"),
        (Empties, GIVEN, r"names that were given are changed, from \['.*'\] to \[\]"),
        (FirstCounts, ORDER, "the result depends on the order of the names"),
    ],
)
def test_a_broken_placement_is_caught(stage: type[Alone], law: str, says: str) -> None:
    found = caught(PlacementLaws, stage, law)
    assert list(found) == [law]
    assert re.search(says, found[law]), found[law]


def test_a_placement_that_remembers_is_caught() -> None:
    found = caught(PlacementLaws, Remembers(), GIVEN)
    assert "a second call gives something else" in found[GIVEN]


def test_a_right_placement_obeys() -> None:
    assert caught(PlacementLaws, Alone) == {}


class TwoRanks(PlacementLaws):
    """Several ranks, played in one process."""

    def shares(self) -> st.SearchStrategy[list[dict[str, Statistic]]]:
        def agreeing(shares: list[dict[str, Statistic]]) -> bool:
            shapes = [{name: each.total.shape for name, each in share.items() if each.total is not None} for share in shares]
            return all(shapes[0][name] == shapes[1][name] for name in shapes[0].keys() & shapes[1].keys())

        return st.lists(statistics(), min_size=2, max_size=2).filter(agreeing)

    def ranks(self) -> list[int]:
        return [0, 1]

    def reduced(self, shares: Sequence[Mapping[str, Statistic]]) -> list[dict[str, Statistic]]:
        joined = dict(shares[0])
        for name, each in shares[1].items():
            joined[name] = self.joined(joined[name], each) if name in joined else each
        return [joined, joined]

    def joined(self, one: Statistic, other: Statistic) -> Statistic:
        return one + other


class Forgetful(TwoRanks):
    def joined(self, one: Statistic, other: Statistic) -> Statistic:
        return one


def test_laws_hold_over_several_ranks_too() -> None:
    assert caught(TwoRanks, Alone) == {}
    assert list(caught(Forgetful, Alone)) == [SUMS]
