"""Laws of paces, put to paces that break them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest

from kfactk.testing import PaceLaws
from tests.kfactk.testing.broken import caught, laws_of

KEEPS = "test_keeps_at_least_one_refresh"
FIRST = "test_first_interval_is_one"
UNITS = "test_interval_counts_units"
LARGER = "test_larger_changes_give_no_longer_interval"
ARGUMENTS = "test_interval_follows_from_the_arguments"
SAME = "test_what_stays_the_same_is_not_due_earlier"
TRAINING = "test_two_ranks_are_one_process"


@attrs.frozen
class By:
    """A pace that is one function, asked from the second refresh on."""

    rule: Callable[[Sequence[float], Sequence[int]], Any]
    first: Any = 1
    keeps: Any = 1

    def interval(self, changes: Sequence[float], intervals: Sequence[int]) -> Any:
        return self.rule(changes, intervals) if changes else self.first


def doubled(changes: Sequence[float], intervals: Sequence[int]) -> int:
    """As it ought to be."""
    return 2 * intervals[0] if changes[0] < 0.1 else 1


class Growing:
    """Remembers how often it was asked."""

    keeps, asked = 1, 0

    def interval(self, changes: Sequence[float], intervals: Sequence[int]) -> int:
        self.asked += 1
        return self.asked if changes else 1


@pytest.mark.parametrize(
    ("stage", "law", "says"),
    [
        (By(doubled, keeps=True), KEEPS, "keeps is True"),
        (By(doubled, first=2), FIRST, "the first interval is 2, not 1"),
        (By(lambda c, i: i[0] / 2), UNITS, r"the interval is \d+\.\d+: make it a whole number"),
        (By(lambda c, i: i[0] // 2), UNITS, "the interval is 0: make it a whole number of at"),
        (By(lambda c, i: 1 if c[0] < 0.1 else 3), LARGER, "the longer one of 3"),
        (Growing(), ARGUMENTS, r"the same changes give the intervals \[\d+, \d+, \d+\]"),
        (By(lambda c, i: 1 + i[0] % 3), SAME, r"nothing changes, and the intervals are \[1, 2, 3"),
    ],
)
def test_a_broken_pace_is_caught(stage: Any, law: str, says: str) -> None:
    found = caught(PaceLaws, stage, law)
    assert list(found) == [law]
    assert re.search(says, found[law]), found[law]


def test_a_right_pace_obeys() -> None:
    assert caught(PaceLaws, By(doubled, keeps=2)) == {}


def test_every_law_is_tried() -> None:
    [mark] = test_a_broken_pace_is_caught.pytestmark
    assert {case[1] for case in mark.args[1]} | {TRAINING} == set(laws_of(PaceLaws))
