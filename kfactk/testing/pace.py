"""Laws of paces: intervals count units, and blocks that change more are not due later."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import strategies as st

from kfactk.stages import Pace
from kfactk.testing._support.division import InRecipe
from kfactk.testing._support.laws import law

LARGEST = 10**6
"""Longest interval that is drawn."""
History = tuple[list[float], list[int]]
"""Changes and intervals, the last refresh first."""

_CHANGES = st.sampled_from((0.0, math.inf)) | st.floats(-5.0, 1.0).map(lambda each: 10.0**each)
_FACTORS = st.sampled_from((1.0, 1.5, 10.0, 1e3, 1e6))
_INTERVALS = st.integers(1, 12) | st.integers(1, LARGEST)


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Draw what has changed since up to 4 refreshes, and as many intervals."""
    length = draw(st.integers(1, 4))
    changes = draw(st.lists(_CHANGES, min_size=length, max_size=length))
    intervals = draw(st.lists(_INTERVALS, min_size=length, max_size=length))
    return changes, intervals


class PaceLaws(InRecipe):
    """Laws of every pace.

    Example:
        >>> class Doubling:
        ...     keeps = 1
        ...     def interval(self, changes, intervals):
        ...         return 2 * intervals[0] if changes and changes[0] < 0.1 else 1
        >>> class TestDoubling(PaceLaws):
        ...     stage = Doubling
        >>> TestDoubling().test_interval_counts_units()
        >>> TestDoubling().test_larger_changes_give_no_longer_interval()
    """

    family = "pace"

    def run(self, changes: Sequence[float], intervals: Sequence[int]) -> int:
        """Return the interval after these changes, of which the pace sees those that it keeps."""
        stage: Pace = self.subject()
        keeps = stage.keeps
        return stage.interval(tuple(changes[:keeps]), tuple(intervals[:keeps]))

    @law()
    def test_keeps_at_least_one_refresh(self) -> None:
        """It says with how many earlier refreshes it compares: a whole number of at least 1."""
        keeps = self.subject().keeps
        assert _is_whole(keeps), f"keeps is {keeps!r}: make it a whole number of at least 1"

    @law()
    def test_first_interval_is_one(self) -> None:
        """After the first refresh there is nothing to compare: the next one is a unit away."""
        found = self.run([], [])
        assert found == 1, f"the first interval is {found!r}, not 1"

    @law(examples=50, history=histories())
    def test_interval_counts_units(self, history: History) -> None:
        """An interval is a whole number of at least 1, also where all has changed."""
        found = self.run(*history)
        assert _is_whole(found), f"the interval is {found!r}: make it a whole number of at least 1"

    @law(examples=50, history=histories(), factor=_FACTORS)
    def test_larger_changes_give_no_longer_interval(self, history: History, factor: float) -> None:
        """Where everything has changed more, the block is not due later."""
        changes, intervals = history
        found = self.run(changes, intervals)
        larger = self.run([change * factor for change in changes], intervals)
        assert larger <= found, (
            f"changes of {changes} give the interval {found}, and those that are {factor:g} times "
            f"as large the longer one of {larger}"
        )

    @law(examples=20, history=histories())
    def test_interval_follows_from_the_arguments(self, history: History) -> None:
        """The same stage, asked twice and asked anew, gives the same: ranks ask on their own."""
        stage: Pace = self.subject()
        changes, intervals = history[0][: stage.keeps], history[1][: stage.keeps]
        found = [stage.interval(changes, intervals) for _ in range(2)]
        found.append(self.run(*history))
        assert len(set(found)) == 1, f"the same changes give the intervals {found}"

    @law(examples=20, history=histories())
    def test_what_stays_the_same_is_not_due_earlier(self, history: History) -> None:
        """Where nothing has changed, the interval grows or stays, up to the longest one."""
        stage: Pace = self.subject()
        intervals = [1] * stage.keeps
        found = [1]
        for _ in range(8):
            found.append(self.run([0.0] * stage.keeps, intervals))
            intervals = [found[-1], *intervals][: stage.keeps]
        assert found == sorted(found), f"nothing changes, and the intervals are {found}"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
