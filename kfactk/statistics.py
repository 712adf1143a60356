"""Exponential running mean that carries its own weight, so that it is unbiased from the first value on.

Arithmetic of local sums and counts: joining them, keeping bad batches out, dividing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kfactk.samples import Statistic


@attrs.define(eq=False)
class RunningMean:
    """Weighted mean of the values seen so far, value k of t weighing `decay ** (t - k)`.

        w_t = decay * w_{t-1} + 1,    m_t = m_{t-1} + (x_t - m_{t-1}) / w_t

    The mean of a constant is that constant from the first value on (no identity start, no bias). `decay=0` keeps the last value;
    `decay=1` is the plain arithmetic mean.

    Args:
        value: The mean, any shape; `None` before the first update.
        weight: w_t; 0 before the first update.

    Example:
        >>> mean = RunningMean()
        >>> mean.update(torch.tensor(3.0), decay=0.95); mean.value
        tensor(3.)
        >>> mean.update(torch.tensor(5.0), decay=1.0); mean.value
        tensor(4.)
    """

    value: Tensor | None = None
    weight: float = 0.0

    def update(self, new: Tensor, decay: float) -> None:
        """Take one more value in. `new` has the shape of the mean; `decay` lies in [0, 1]."""
        new = new.detach()
        self.weight = 1.0 if self.value is None else decay * self.weight + 1.0
        if self.value is None:
            self.value = new.clone(memory_format=torch.contiguous_format)
        elif self.weight == 1.0:  # nothing of the old mean is left, not even what is not finite
            self.value = new.to(self.value.dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            self.value = torch.lerp(self.value, new.to(self.value.dtype), 1.0 / self.weight)

    def replace(self, value: Tensor) -> None:
        """Set the mean to a transformed version of itself (a change of basis), its weight unchanged."""
        self.value = value


@attrs.frozen(eq=False)
class ReducedStatistic:
    """A statistic summed over ranks.

    Args:
        total: The sum; `None` where this rank is not among those that want it, or where no rank has one.
        count: The sum of the counts, known on every rank.
        exists: Whether any rank had a total.
    """

    total: Tensor | None
    count: Tensor | float
    exists: bool

    @classmethod
    def alone(cls, statistic: Statistic) -> ReducedStatistic:
        """The statistic of the only rank there is."""
        return cls(statistic.total, statistic.count, statistic.total is not None)


def prefixed(prefix: str, statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """The statistics under names that begin with `prefix` and a dot."""
    return {f"{prefix}.{name}": statistic for name, statistic in statistics.items()}


def joined_key(name: str, key: str) -> str:
    """One name for a layer's statistic; `split_key` takes it apart, whatever the layer is called."""
    return f"{key}|{name}"


def split_key(text: str) -> tuple[str, str]:
    """Inverse of `joined_key`: the layer's name and the key, which holds no bar."""
    key, _, name = text.partition("|")
    return name, key


def add(into: dict[str, Statistic], sums: Mapping[str, Statistic]) -> None:
    """Add `sums` to those of `into`, name by name."""
    for name, statistic in sums.items():
        into[name] = into[name] + statistic if name in into else statistic


def finite_only(sums: Mapping[str, Statistic], bad: list[Tensor]) -> dict[str, Statistic]:
    """The sums with a batch that is not finite anywhere contributing (0, 0) everywhere; the flag is kept, and only a CPU's is read."""
    totals = [
        statistic.total
        for statistic in sums.values()
        if statistic.total is not None and statistic.total.numel()
    ]
    if not totals:
        return dict(sums)
    good = torch.stack(
        [torch.isfinite(torch.linalg.vector_norm(total, math.inf)) for total in totals]
    ).all()
    bad.append(~good)
    if good.device.type == "cpu" and good:
        return dict(sums)
    return {
        name: attrs.evolve(
            statistic,
            total=None if statistic.total is None else torch.where(good, statistic.total, 0.0),
            count=_count(statistic.count, good) * good,
        )
        for name, statistic in sums.items()
    }


def _count(count: Tensor | float, like: Tensor) -> Tensor:
    return (
        count.detach().double()
        if isinstance(count, Tensor)
        else torch.tensor(float(count), dtype=torch.float64, device=like.device)
    )


def local_means(sums: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """The same of one process' sums."""
    return {
        name: mean
        for name, mean in means(
            {name: ReducedStatistic.alone(each) for name, each in sums.items()}
        ).items()
        if mean is not None
    }


def means(sums: Mapping[str, ReducedStatistic]) -> dict[str, Tensor | None]:
    """Sum over count, of those that counted something; `None` where the sum is another rank's. One transfer tells which."""
    some = {name: joined for name, joined in sums.items() if joined.exists}
    if not some:
        return {}
    device = next((s.count.device for s in some.values() if isinstance(s.count, Tensor)), None)
    counts = torch.stack(
        [torch.as_tensor(s.count, dtype=torch.float64, device=device) for s in some.values()]
    ).tolist()
    return {
        name: None if joined.total is None else joined.total / count
        for (name, joined), count in zip(some.items(), counts, strict=True)
        if count > 0
    }
