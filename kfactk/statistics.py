"""Arithmetic of sums and counts: name them, add them, drop what is not finite, divide, average."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kfactk.samples import Statistic


@attrs.define(eq=False)
class RunningMean:
    """Weighted mean of the values seen so far; value k of t weighs `decay ** (t - k)`.

        w_t = decay * w_{t-1} + 1,    m_t = m_{t-1} + (x_t - m_{t-1}) / w_t

    It carries its own weight, so the mean of a constant is that constant from the first value on.
    `decay=0` keeps the last value; `decay=1` is the arithmetic mean.

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
        """Take in one more value, of the shape of the mean; `decay` lies in [0, 1]."""
        new = new.detach()
        self.weight = 1.0 if self.value is None else decay * self.weight + 1.0
        if self.value is None:
            self.value = new.clone(memory_format=torch.contiguous_format)
        elif self.weight == 1.0:  # forget the old mean, also where it is not finite
            self.value = new.to(self.value.dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            self.value = torch.lerp(self.value, new.to(self.value.dtype), 1.0 / self.weight)

    def replace(self, value: Tensor) -> None:
        """Set the mean after a change of basis; its weight stays."""
        self.value = value


@attrs.frozen(eq=False)
class ReducedStatistic:
    """A statistic summed over ranks.

    Args:
        total: The sum; `None` where this rank does not receive it, or where no rank has one.
        count: The sum of the counts, known on every rank.
        exists: Whether any rank had a total.
        rows: As in `Statistic`.
    """

    total: Tensor | None
    count: Tensor | float
    exists: bool
    rows: int = 0

    @classmethod
    def alone(cls, statistic: Statistic) -> ReducedStatistic:
        """Return the statistic of a single rank as if it were reduced."""
        return cls(statistic.total, statistic.count, statistic.total is not None, statistic.rows)


def add_prefix(prefix: str, statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """Return the statistics under the names `prefix.name`."""
    return {f"{prefix}.{name}": statistic for name, statistic in statistics.items()}


def join_key(layer: str, key: str) -> str:
    """Return one name for a statistic of a layer; `key` holds no bar, `layer` may."""
    return f"{key}|{layer}"


def split_key(joined: str) -> tuple[str, str]:
    """Return the layer's name and the key, the inverse of `join_key`."""
    key, _, layer = joined.partition("|")
    return layer, key


def add_sums(into: dict[str, Statistic], sums: Mapping[str, Statistic]) -> None:
    """Add `sums` to those of `into`, name by name."""
    for name, statistic in sums.items():
        into[name] = into[name] + statistic if name in into else statistic


def drop_nonfinite(sums: Mapping[str, Statistic], nonfinite: list[Tensor]) -> dict[str, Statistic]:
    """Return the sums of one batch, or (0, 0) for each of them if any total is not finite.

    Args:
        sums: The sums, by name.
        nonfinite: Receives a boolean scalar: whether the sums were dropped. It stays on its device;
            only on a CPU is it read here.
    """
    totals = [
        statistic.total
        for statistic in sums.values()
        if statistic.total is not None and statistic.total.numel()
    ]
    if not totals:
        return dict(sums)
    if all(total.device.type == "cpu" for total in totals) and all(map(_surely_finite, totals)):
        nonfinite.append(torch.tensor(False, device="cpu"))
        return dict(sums)
    good = torch.stack(
        [torch.isfinite(torch.linalg.vector_norm(total, math.inf)) for total in totals]
    ).all()
    nonfinite.append(~good)
    if good.device.type == "cpu" and good:
        return dict(sums)
    return {
        name: attrs.evolve(
            statistic,
            total=None if statistic.total is None else torch.where(good, statistic.total, 0.0),
            count=_count_tensor(statistic.count, good.device) * good,
        )
        for name, statistic in sums.items()
    }


def _surely_finite(tensor: Tensor) -> bool:
    """Return whether the sum is finite: then all numbers are. It is faster than the largest."""
    return math.isfinite(tensor.sum().item())


def _count_tensor(count: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(count, Tensor):
        return count.detach().double()
    return torch.tensor(float(count), dtype=torch.float64, device=device)


def means(sums: Mapping[str, ReducedStatistic]) -> dict[str, Tensor | None]:
    """Return sum over count where the count is positive; `None` where another rank has the sum.

    Rows of degree k are divided by the k-th root.

    All counts are read in one transfer from their device.
    """
    some = {name: reduced for name, reduced in sums.items() if reduced.exists}
    if not some:
        return {}
    devices = (s.count.device for s in some.values() if isinstance(s.count, Tensor))
    device = next(devices, torch.device("cpu"))
    counts = torch.stack(
        [torch.as_tensor(s.count, dtype=torch.float64, device=device) for s in some.values()]
    ).tolist()
    return {
        name: None if reduced.total is None else _divided(reduced.total, count, reduced.rows)
        for (name, reduced), count in zip(some.items(), counts, strict=True)
        if count > 0
    }


def _divided(total: Tensor, count: float, rows: int) -> Tensor:
    """Return a total over its count; of rows of degree k over the k-th root, 0 for other things."""
    return total if count == 1 else total / count ** (1 / (rows or 1))


def local_means(sums: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """Return the `means` of the sums of a single rank."""
    alone = {name: ReducedStatistic.alone(statistic) for name, statistic in sums.items()}
    return {name: mean for name, mean in means(alone).items() if mean is not None}
