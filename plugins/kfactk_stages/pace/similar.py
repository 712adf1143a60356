"""Similar statistics: refresh a block less often while its factors hardly change."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from kfactk import hookimpl
from kfactk.options import number, whole


@attrs.frozen
class Similar:
    """Lengthen the interval of a block while its statistics are similar, and halve it otherwise.

    X is similar to an earlier X_k where

        ||X - X_k||_F / ||X_k||_F < alpha

    With the intervals `D_1, D_2` that ended now and before, and X of the last two refreshes, `X_1`
    and `X_2`, the next interval is

        D = max(1, floor(D_1 / 2))    where X is not similar to X_1
        D = D_1                       where it is similar to X_1, and not to X_2
        D = D_1 + D_2                 where it is similar to both

    It begins with 1, 1. Statistics that stay the same are refreshed after 1, 1, 2, 3, 5, 8, ...
    units, the numbers of Fibonacci. A block is similar where all of its factors are.

    Mini-batches differ too: alpha must be larger than what two batches of one network differ by,
    or the interval stays at 1.

    Args:
        alpha: Relative change below which statistics are similar; positive.
        longest: Longest interval, in units of `factor_every`; `None` for no limit.

    Raises:
        OptionError: A value cannot work.

    Example:
        >>> pace = Similar(alpha=0.1)
        >>> pace.interval([0.02, 0.05], [3, 2]), pace.interval([0.02, 0.2], [3, 2])
        (5, 3)
        >>> pace.interval([0.3, 0.05], [3, 2])
        1

    References:
        Osawa, Tsuji, Ueno, Naruse, Yokota & Matsuoka 2019, "Large-Scale Distributed Second-Order
        Optimization Using Kronecker-Factored Approximate Curvature for Deep Convolutional Neural
        Networks", arXiv:1811.12019; the rule in full in Osawa et al. 2020, "Scalable and Practical
        Natural Gradient for Large-Scale Deep Learning", arXiv:2002.06015.
    """

    alpha: float = attrs.field(default=0.1, validator=number(low=0, low_open=True))
    longest: int | None = attrs.field(default=None, validator=whole(1, optional=True))

    @property
    def keeps(self) -> int:
        """Two refreshes: the last one, and the one before."""
        return 2

    def interval(self, changes: Sequence[float], intervals: Sequence[int]) -> int:
        """Return the next interval."""
        if not changes:
            return 1
        if not changes[0] < self.alpha:
            found = max(1, intervals[0] // 2)
        elif len(changes) < 2 or not changes[1] < self.alpha:
            found = intervals[0]
        else:
            found = intervals[0] + intervals[1]
        return found if self.longest is None else min(found, self.longest)


@hookimpl
def kfactk_paces() -> dict[str, type[Similar]]:
    """Register the pace `similar`."""
    return {"similar": Similar}
