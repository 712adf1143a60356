"""Arithmetic of local sums and counts: joining them, keeping bad batches out, dividing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfactk.samples import Statistic


def prefixed(prefix: str, statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """The statistics under names that begin with `prefix` and a dot."""
    return {f"{prefix}.{name}": statistic for name, statistic in statistics.items()}


def keyed(name: str, key: str) -> str:
    """One name for a layer's statistic; `unkeyed` takes it apart, whatever the layer is called."""
    return f"{key}|{name}"


def unkeyed(text: str) -> tuple[str, str]:
    """Inverse of `keyed`: the layer's name and the key, which holds no bar."""
    key, _, name = text.partition("|")
    return name, key


def add(into: dict[str, Statistic], sums: Mapping[str, Statistic]) -> None:
    """Add `sums` to those of `into`, name by name."""
    for name, statistic in sums.items():
        into[name] = into[name] + statistic if name in into else statistic


def guarded(sums: Mapping[str, Statistic], bad: list[Tensor]) -> dict[str, Statistic]:
    """The sums with a batch that is not finite anywhere contributing (0, 0) everywhere; the flag is kept on the device."""
    totals = [statistic.total for statistic in sums.values() if statistic.total is not None]
    if not totals:
        return dict(sums)
    good = torch.stack([torch.isfinite(total).all() for total in totals]).all()
    bad.append(~good)
    return {
        name: Statistic(None if statistic.total is None else torch.where(good, statistic.total, 0.0), _count(statistic.count, good) * good)
        for name, statistic in sums.items()
    }


def _count(count: Tensor | float, like: Tensor) -> Tensor:
    return count.detach().double() if isinstance(count, Tensor) else torch.tensor(float(count), dtype=torch.float64, device=like.device)


def means(sums: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """Sum over count, of those that counted something; one transfer tells which."""
    some = {name: statistic for name, statistic in sums.items() if statistic.total is not None}
    if not some:
        return {}
    device = next((s.count.device for s in some.values() if isinstance(s.count, Tensor)), None)
    counts = torch.stack([torch.as_tensor(s.count, dtype=torch.float64, device=device) for s in some.values()]).tolist()
    return {
        name: statistic.total / count
        for (name, statistic), count in zip(some.items(), counts, strict=True)
        if count > 0 and statistic.total is not None
    }
