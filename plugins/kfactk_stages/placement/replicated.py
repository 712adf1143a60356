"""Replicated placement: every rank does all the work, on sums over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial, reduce
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from kfactk import OptionError, StateError, Statistic, hookimpl


@attrs.frozen
class _Entry:
    """What a rank tells the others of one statistic: shape and dtype are `None` without a total."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    device: str | None


@attrs.frozen
class Replicated:
    """Join the ranks' sums and let every rank do the same work with them.

        total = sum_r total_r,    count = sum_r count_r

    The ranks first tell each other what they have, so that a rank that lacks a name, or everything, adds zeros rather than leaving the
    others waiting. Totals then travel as one flat buffer for each dtype, counts in float64. Results are the same on every rank, in
    the order of the names. Alone, statistics are returned as they are. Factors and decompositions are held once a rank, and nothing but
    sums is ever sent.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It cannot be written to JSON.

    Raises:
        OptionError: This process is not in `process_group`.
        StateError: Two ranks have statistics of one name but different shapes.

    Example:
        >>> from kfactk import Statistic
        >>> placement = Replicated()
        >>> placement.rank, placement.reduce({"A": Statistic(torch.ones(2), 4.0)})["A"].count
        (0, 4.0)
    """

    process_group: Any = None

    @property
    def rank(self) -> int:
        """This process' rank in the group: 0 when alone."""
        return self._place()[0]

    def reduce(self, statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
        """Sum statistics over ranks; a collective call, whatever this rank has."""
        _, size = self._place()
        if size == 1:
            return dict(statistics)
        entries = self._entries(statistics, size)
        if not entries:
            return {}
        device = self._device(entries.values(), statistics)
        totals, counts = self._contributions(entries, statistics, device)
        joined = self._all_reduce(totals)
        self._sum(counts)
        result = {}
        for name, count in zip(entries, counts.unbind(), strict=True):
            mine = statistics.get(name)
            home = device if mine is None or mine.total is None else mine.total.device
            total = joined.get(name)
            result[name] = Statistic(None if total is None else total.to(home), count.to(home))
        return result

    def _place(self) -> tuple[int, int]:
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        rank, size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        if rank < 0:
            raise OptionError(
                "placement 'replicated': this process is not in its process_group, so it has nobody to share sums with. "
                "Give each process the group it belongs to."
            )
        return rank, size

    def _sum(self, buffer: Tensor) -> None:
        dist.all_reduce(buffer, op=dist.ReduceOp.SUM, group=self.process_group)

    def _entries(self, statistics: Mapping[str, Statistic], size: int) -> dict[str, _Entry]:
        """All ranks' names in one order, each with the shape and the widest dtype that any rank has for it."""
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, {name: _entry(statistic) for name, statistic in statistics.items()}, group=self.process_group)
        names = sorted({name for theirs in gathered for name in theirs})
        return {name: reduce(partial(_joined, name), (theirs[name] for theirs in gathered if name in theirs)) for name in names}

    def _device(self, entries: Iterable[_Entry], statistics: Mapping[str, Statistic]) -> torch.device:
        """Where this rank's buffers live: of one kind on all ranks, the accelerator if any rank has tensors there."""
        kinds = sorted({entry.device for entry in entries if entry.device is not None} - {"cpu"})
        nccl_only = dist.get_backend(self.process_group) == "nccl"
        kind = kinds[0] if kinds else "cuda" if nccl_only else "cpu"
        for statistic in statistics.values():
            if statistic.total is not None and statistic.total.device.type == kind:
                return statistic.total.device
        return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())

    def _contributions(
        self, entries: Mapping[str, _Entry], statistics: Mapping[str, Statistic], device: torch.device
    ) -> tuple[dict[str, Tensor], Tensor]:
        """This rank's totals, zeros for what it lacks, and its counts `[names]`."""
        nothing = Statistic(None, 0.0)
        totals, counts = {}, []
        for name, entry in entries.items():
            mine = statistics.get(name, nothing)
            if entry.shape is not None:
                total = torch.zeros(entry.shape, device=device) if mine.total is None else mine.total
                totals[name] = total.to(device, entry.dtype)
            counts.append(torch.as_tensor(mine.count, dtype=torch.float64, device=device).reshape(()))
        return totals, torch.stack(counts)

    def _all_reduce(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over ranks, one collective for each dtype."""
        joined: dict[str, Tensor] = {}
        for dtype in sorted({total.dtype for total in totals.values()}, key=str):
            same = {name: total for name, total in totals.items() if total.dtype == dtype}
            buffer = torch.cat([total.reshape(-1) for total in same.values()])
            self._sum(buffer)
            parts = torch.split(buffer, [total.numel() for total in same.values()])
            joined.update({name: part.view(total.shape) for (name, total), part in zip(same.items(), parts, strict=True)})
        return joined


def _entry(statistic: Statistic) -> _Entry:
    total = statistic.total
    return _Entry(None, None, None) if total is None else _Entry(tuple(total.shape), total.dtype, total.device.type)


def _joined(name: str, one: _Entry, other: _Entry) -> _Entry:
    if one.shape is None or other.shape is None:
        return other if one.shape is None else one
    if one.shape != other.shape:
        raise StateError(
            f"ranks disagree on the shape of {name!r}: {one.shape} and {other.shape}. "
            "Each rank must hold the same model, bound in the same way; check what differs between them."
        )
    assert one.dtype is not None
    assert other.dtype is not None
    kinds = sorted({one.device, other.device} - {None, "cpu"}, key=str)
    return _Entry(one.shape, torch.promote_types(one.dtype, other.dtype), kinds[0] if kinds else "cpu")


@hookimpl
def kfactk_placements() -> dict[str, type[Replicated]]:
    """The placement `replicated`."""
    return {"replicated": Replicated}
