"""Paces: when the statistics of each block are refreshed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Pace(Protocol):
    """Decides when the statistics of each block are refreshed again.

    A refresh measures the factors of a block, decomposes them, and measures its moments on samples.
    At each, the framework compares the new averages of the factors with those of earlier refreshes,
    and asks for the interval to the next one. A pace sees numbers alone, the same on every rank.

    Laws: the interval is a whole number of at least 1. It depends on the arguments alone. The first
    one is 1, so that there soon is something to compare. Larger changes never give a longer one.
    """

    @property
    def keeps(self) -> int:
        """With how many earlier refreshes the new one is compared; at least 1.

        The framework keeps the factors of so many: memory of that many more sets of factors.
        """

    def interval(self, changes: Sequence[float], intervals: Sequence[int]) -> int:
        """Return the interval to the next refresh, in units of `factor_every`.

        Args:
            changes: For each earlier refresh that is kept, the last one first, how much the block
                has changed since: the largest `||X - X_k||_F / ||X_k||_F` of its factors X; 0 where
                nothing changed, inf where X_k was zero. Empty at the first refresh.
            intervals: As many intervals that were decided, the last one first.
        """
