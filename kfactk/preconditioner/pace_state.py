"""When a paced block is due, what its next refresh is compared with, and both in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

KEY = re.compile(r"(due|refreshes|interval\.\d+|value\.\d+\..+)")
"""Keys of a saved one, after the prefix."""
LONGEST = 2**31
"""Longest interval that a pace may decide on."""


@attrs.define(eq=False)
class PaceState:
    """When a paced block is due, and what its next refresh is compared with.

    The lists have an item for each earlier refresh that the pace compares with, the last one first.

    Args:
        due: The step at which the block is due.
        refreshes: How often it was refreshed.
        intervals: The intervals that were decided; 0 where there was no such refresh yet.
        values: The averages of the factors that this rank keeps.
    """

    due: int = 0
    refreshes: int = 0
    intervals: list[int] = attrs.Factory(list)
    values: list[dict[str, Tensor]] = attrs.Factory(list)

    @property
    def known_intervals(self) -> tuple[int, ...]:
        """The intervals that were decided, the last one first."""
        return tuple(interval for interval in self.intervals if interval)

    @classmethod
    def blank(cls, factors: Mapping[str, Tensor], keeps: int) -> PaceState:
        """Return one without data, for factors of these shapes."""
        values = [{n: torch.zeros_like(each) for n, each in factors.items()} for _ in range(keeps)]
        return cls(intervals=[0] * keeps, values=values)

    def copy(self) -> PaceState:
        """Return one that stays as it is when this one changes."""
        return PaceState(self.due, self.refreshes, self.intervals, self.values)

    def note(self, interval: int, averages: Mapping[str, Tensor | None], keeps: int) -> None:
        """Keep a refresh, in place of the oldest one.

        Before there are as many, its values stand for older ones, so that a state always has the
        same keys.

        Args:
            interval: What was decided.
            averages: The averages by factor; `None` on ranks that do not keep them.
            keeps: How many refreshes are kept.
        """
        mine = {n: value.contiguous() for n, value in averages.items() if value is not None}
        known = self.refreshes > 0
        self.values = [mine, *(self.values if known else [mine] * keeps)][:keeps]
        self.intervals = [interval, *(self.intervals if known else [0] * keeps)][:keeps]
        self.refreshes += 1

    def fitted(self, keeps: int, factors: frozenset[str]) -> PaceState:
        """Return what another pace and placement keep of it; blank where they keep nothing.

        Args:
            keeps: How many refreshes are kept.
            factors: The factors that this rank keeps.
        """
        if not keeps or not self.refreshes:
            return PaceState()
        mine = [{n: each for n, each in old.items() if n in factors} for old in self.values]
        intervals = [*self.intervals, *[0] * keeps][:keeps]
        values = [*mine, *[mine[-1]] * keeps][:keeps]
        return PaceState(self.due, self.refreshes, intervals, values)

    def flat(self) -> dict[str, Tensor]:
        """Return it as tensors: `due`, `refreshes`, `interval.0`, `value.0.A` and so on."""
        if not self.intervals:
            return {}
        numbers = {"due": self.due, "refreshes": self.refreshes}
        numbers |= {f"interval.{place}": each for place, each in enumerate(self.intervals)}
        found = {
            name: torch.tensor(number, dtype=torch.int64, device="cpu")
            for name, number in numbers.items()
        }
        for place, values in enumerate(self.values):
            found |= {f"value.{place}.{factor}": value for factor, value in values.items()}
        return found

    @classmethod
    def from_flat(cls, numbers: Mapping[str, int], values: Mapping[str, Tensor]) -> PaceState:
        """Return the inverse of `flat`; places that are missing have no factors.

        Args:
            numbers: By their keys.
            values: Likewise.
        """
        state = cls(numbers.get("due", 0), numbers.get("refreshes", 0))
        places = [int(key.split(".")[1]) for key in (*numbers, *values) if "." in key]
        for place in range(min(1 + max(places, default=-1), len(places))):
            state.intervals.append(numbers.get(f"interval.{place}", 0))
            state.values.append({})
        for key, value in values.items():
            _, number, factor = key.split(".", 2)
            if int(number) < len(state.values):
                state.values[int(number)][factor] = value
        return state
