"""Every collective that kfactk makes: sums, copies and small agreements between ranks.

Every rank makes the same calls in the same order, whatever its data. What is sent, and by whom,
follows from the recipe, the shapes and the step. A rank that lacks something sends zeros.

Bytes are counted as each rank sends or receives them, whatever algorithm torch uses: x bytes
reduced to one of g ranks, or broadcast by one, move (g - 1) x in all; an all-reduce moves twice
that.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from kfactk.distributed.messages import PendingMessage, explain_failures, receive_in_order
from kfactk.distributed.packing import TensorSpec, buckets, common_spec, pack, spec_of, unpack
from kfactk.errors import OptionError
from kfactk.samples import Statistic
from kfactk.statistics import ReducedStatistic

Members = tuple[int, ...]
"""Ranks, ascending, counted from 0 within the process group."""
TensorSpecs = Mapping[str, TensorSpec | None]
"""Specs of totals by name; `None` for a statistic without a total."""


class _Subgroups:
    """Process groups made from the ranks of another one."""

    def __init__(self) -> None:
        self.subgroups: dict[Members, Any] = {}
        self.known: set[Members] = set()
        self.aside: Any = None


_SUBGROUPS: weakref.WeakKeyDictionary[Any, _Subgroups] = weakref.WeakKeyDictionary()


def forget_groups() -> None:
    """Forget the process groups made for optimizers of this process.

    All optimizers share them. Call this before `torch.distributed` is destroyed, where the same
    process initialises it again.
    """
    _SUBGROUPS.clear()


class Communicator:
    """The ranks of one process group, and their collectives.

    Args:
        group: A `torch.distributed` process group; `None` for all processes, and for one process
            where `torch.distributed` is not initialised.
        wire_dtype: Name of the floating dtype of what travels; `None` for that of the tensors.

    Example:
        >>> communicator = Communicator()
        >>> communicator.rank, communicator.size
        (0, 1)
    """

    def __init__(self, group: Any = None, wire_dtype: str | None = None) -> None:
        self.group = group
        self._wire = None if wire_dtype is None else _dtype(wire_dtype)
        self.moved: dict[str, float] = {}

    # ---------------------------------------------------------------------------------------- who

    @property
    def size(self) -> int:
        """Number of ranks; 1 in a single process."""
        return self._place()[1]

    @property
    def rank(self) -> int:
        """This process's rank within the group; 0 in a single process."""
        return self._place()[0]

    @property
    def everyone(self) -> Members:
        """All ranks."""
        return tuple(range(self.size))

    def _place(self) -> tuple[int, int]:
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if rank < 0:
            raise OptionError(
                "this process is not in the placement's process_group, so it cannot share work. "
                "Give each process the group it belongs to."
            )
        return rank, size

    def prepare(self, groups: Iterable[Members]) -> None:
        """Make the process groups that will be needed; a collective call.

        Every rank makes exactly one group in each round: torch names a group by the number of
        groups made before.
        """
        made = self._subgroups
        rounds: list[list[Members]] = []
        for members in sorted(
            {group for group in groups if 1 < len(group) < self.size} - made.known
        ):
            made.known.add(members)
            free = next(
                (each for each in rounds if not any(set(members) & set(other) for other in each)),
                None,
            )
            if free is None:
                rounds.append([members])
            else:
                free.append(members)
        for each in rounds:
            mine = next((members for members in each if self.rank in members), (self.rank,))
            made.subgroups[mine] = self._new_group(mine)

    def _new_group(self, members: Members) -> Any:
        ranks = [self._global(member) for member in members]
        with explain_failures():
            return dist.new_group(
                ranks,
                timeout=self._timeout(),
                backend=dist.get_backend(self.group),
                use_local_synchronization=True,
            )

    def _timeout(self) -> timedelta | None:
        """Return how long the user lets a collective of the group take; `None` where unknown.

        torch tells it of backends only, and not of all.
        """
        group: Any = dist.group.WORLD if self.group is None else self.group
        device = self._device(None)
        try:
            options = group._get_backend(device).options
        except (AttributeError, RuntimeError):
            return None
        found = getattr(options, "_timeout", None)
        return found if isinstance(found, timedelta) else None

    @property
    def _subgroups(self) -> _Subgroups:
        """The groups made before from this one, by any optimizer."""
        return _SUBGROUPS.setdefault(
            dist.group.WORLD if self.group is None else self.group, _Subgroups()
        )

    def _global(self, rank: int) -> int:
        return rank if self.group is None else int(dist.get_global_rank(self.group, rank))

    def _group(self, members: Members) -> Any:
        if len(members) == self.size:
            return self.group
        return self._subgroups.subgroups[members]

    # --------------------------------------------------------------------------- small agreements

    def total(self, numbers: Sequence[float], device: torch.device | None = None) -> list[float]:
        """Return each number summed over ranks."""
        if self.size == 1 or not numbers:
            return [float(number) for number in numbers]
        buffer = torch.tensor(numbers, dtype=torch.float64, device=self._device(device))
        self._all_reduce(buffer, "agreements")
        return [float(number) for number in buffer.tolist()]

    def any(self, flag: bool, device: torch.device | None = None) -> bool:
        """Return whether a flag is set on any rank."""
        return bool(self.total([float(flag)], device)[0])

    def gathered(self, value: Any) -> list[Any]:
        """Return a small picklable value of every rank, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with explain_failures():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def same(self, what: str) -> bool:
        """Return whether all ranks give the same text."""
        if self.size == 1:
            return True
        number = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=6).digest(), "big")
        buffer = torch.tensor([number, -number], dtype=torch.int64, device=self._device(None))
        with explain_failures():
            dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=self.group)
        self._record("agreements", buffer, 2 * (self.size - 1) / self.size)
        largest, least = buffer.tolist()
        return bool(largest == -least)

    # --------------------------------------------------------------------------------------- sums

    def agree(self, statistics: Mapping[str, Statistic]) -> tuple[TensorSpecs, torch.device]:
        """Return the names and specs that all ranks' statistics have, in one order; a collective.

        A spec has the shape, and the common_spec dtype that any rank has. The second result is the
        device of this rank's buffers.

        Args:
            statistics: This rank's; it may lack names that others have.

        Raises:
            StateError: Two ranks have statistics of one name but different shapes.
        """
        mine = {name: spec_of(statistic) for name, statistic in sorted(statistics.items())}
        totals = [each.total for each in statistics.values() if each.total is not None]
        kinds = sorted({total.device.type for total in totals} - {"cpu"})
        if self.size > 1 and not self.same(repr((list(mine.items()), kinds))):
            everyones = self.gathered((mine, kinds))
            kinds = sorted({kind for _, theirs in everyones for kind in theirs})
            names = sorted({name for theirs, _ in everyones for name in theirs})
            mine = {
                name: common_spec(name, [theirs[name] for theirs, _ in everyones if name in theirs])
                for name in names
            }
        here = next((total.device for total in totals if total.device.type in kinds), None)
        device = here if here is not None else _accelerator(kinds[0]) if kinds else None
        return mine, self._device(device)

    def joining(
        self, statistics: Mapping[str, Statistic]
    ) -> tuple[dict[str, Statistic], dict[str, int]]:
        """Return statistics whose sum over ranks joins the rows of all ranks; a collective.

        Each rank puts its rows where those of the ranks before it end, among zeros.

        Returns:
            The statistics, and the degree of those that are rows, the same on all ranks.
        """
        mine = {
            name: (tuple(each.total.shape), each.rows)
            for name, each in sorted(statistics.items())
            if each.rows and each.total is not None
        }
        everyones = self.gathered(mine)
        joined, degrees = dict(statistics), dict[str, int]()
        for name in sorted({name for theirs in everyones for name in theirs}):
            shapes = [theirs[name][0] if name in theirs else None for theirs in everyones]
            degrees[name] = next(theirs[name][1] for theirs in everyones if name in theirs)
            if name not in mine:
                continue
            total, there = statistics[name].total, [shape for shape in shapes if shape is not None]
            assert total is not None
            start = sum(shape[0] for shape in shapes[: self.rank] if shape is not None)
            sizes = [max(shape[dim] for shape in there) for dim in range(1, total.ndim)]
            wide = total.new_zeros(sum(shape[0] for shape in there), *sizes)
            wide[(slice(start, start + len(total)), *map(slice, total.shape[1:]))] = total
            joined[name] = attrs.evolve(statistics[name], total=wide)
        return joined, degrees

    def reduce(
        self, statistics: Mapping[str, Statistic], routing: Routing, what: str
    ) -> dict[str, ReducedStatistic]:
        """Sum statistics over ranks: totals reach the ranks that want them, counts reach all.

        Args:
            statistics: This rank's; it contributes nothing to names that it lacks.
            routing: Says which ranks want a total.
            what: What is summed, for the record of bytes.

        Returns:
            All ranks' names, in the same order on every rank.

        Raises:
            StateError: Two ranks have statistics of one name but different shapes.
        """
        if self.size == 1:
            return {name: ReducedStatistic.alone(each) for name, each in statistics.items()}
        return self.begin(statistics, *self.agree(statistics), routing, what).wait()

    def begin(
        self,
        statistics: Mapping[str, Statistic],
        specs: TensorSpecs,
        device: torch.device,
        routing: Routing,
        what: str,
        *,
        aside: bool = False,
    ) -> PendingReduction:
        """Begin such a sum without waiting for it.

        Args:
            statistics: This rank's.
            specs: The names that are summed with their specs, the same on every rank.
            device: Where this rank's buffers live.
            routing: As for `reduce`.
            what: As for `reduce`.
            aside: Whether it travels beside other messages, such as those of a backward pass, in a
                process group of its own (`stand_aside`).
        """
        if not specs:
            return PendingReduction([], {}, None, None, {}, device)
        group = self._subgroups.aside if aside else self.group
        counts = torch.stack([_count(statistics.get(name), device) for name in specs])
        counting = self._all_reduce(counts, "agreements", wait=False, group=group)
        goals: dict[Members, dict[str, TensorSpec]] = {}
        for name, spec in specs.items():
            if spec is not None:
                goals.setdefault(routing.wanted(name), {})[name] = spec
        messages: Iterable[PendingMessage] = (
            self._summed(run, these, statistics, members, device, what, group)
            for members, these in sorted(goals.items())
            for run in buckets(these)
        )
        if aside:
            messages = list(messages)
        homes = {n: s.total.device for n, s in statistics.items() if s.total is not None}
        return PendingReduction(messages, specs, counting, counts, homes, device)

    def stand_aside(self) -> None:
        """Make the process group of sums that are begun early; a collective call."""
        if self._subgroups.aside is None:
            self._subgroups.aside = self._new_group(self.everyone)

    def _summed(
        self,
        names: Sequence[str],
        specs: Mapping[str, TensorSpec],
        statistics: Mapping[str, Statistic],
        members: Members,
        device: torch.device,
        what: str,
        group: Any,
    ) -> PendingMessage:
        """Send one bucket on its way to the ranks that want it."""
        these = {name: specs[name] for name in names}
        filled = []
        for name, spec in these.items():
            total = statistics[name].total if name in statistics else None
            filled.append(spec.blank(device).zero_() if total is None else total.to(device))
        dtype = self._travels(next(iter(these.values())))
        buffer = pack(filled, list(these.values()), dtype)
        if len(members) == self.size:
            work = self._all_reduce(buffer, what, wait=False, group=group)
            return _Summed(work, self, buffer, these, None, what)
        with explain_failures():
            work = dist.reduce(buffer, self._global(members[0]), group=group, async_op=True)
        if self.rank != members[0]:
            self._record(what, buffer, 1.0)
        return _Summed(work, self, buffer, these, members, what)

    # ------------------------------------------------------------------------------------- copies

    def send(
        self,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, TensorSpec],
        source: int,
        members: Members,
        what: str,
        device: torch.device,
    ) -> list[PendingMessage]:
        """Copy tensors of one rank to others; every member calls it, and no other rank does.

        All members, the source too, go on with what the wire has made of the values, so that they
        agree bit for bit.

        Args:
            tensors: On the source, the tensors by name.
            specs: Their specs, the same on all members.
            source: Whose they are.
            members: The source and the receivers.
            what: What is copied, for the record of bytes.
            device: Where receivers want them.

        Returns:
            Messages under way, in the order in which they have to be waited for.
        """
        messages: list[PendingMessage] = []
        for names in buckets(specs):
            these = {name: specs[name] for name in names}
            mine = {name: tensors[name] for name in names} if self.rank == source else {}
            if len(members) == 1:
                messages.append(_Copied(None, mine, None, these))
                continue
            own = these[names[0]].dtype
            dtype = self._travels(these[names[0]])
            if self.rank == source:
                buffer = pack(list(mine.values()), list(these.values()), dtype)
            else:
                numel = sum(spec.numel for spec in these.values())
                buffer = torch.empty(numel, dtype=dtype, device=device)
            work = self._broadcast(buffer, source, members, what)
            kept = mine if dtype == own else {}
            messages.append(_Copied(work, kept, buffer, these))
        return messages

    # --------------------------------------------------------------------------------------- wire

    def _all_reduce(
        self, buffer: Tensor, what: str, *, wait: bool = True, group: Any = None
    ) -> Any:
        self._record(what, buffer, 2 * (self.size - 1) / self.size)
        with explain_failures():
            return dist.all_reduce(
                buffer,
                op=dist.ReduceOp.SUM,
                group=self.group if group is None else group,
                async_op=not wait,
            )

    def pass_on(self, buffer: Tensor, members: Members, what: str) -> None:
        """Copy a buffer from the first member to the others, and wait."""
        work = self._broadcast(buffer, members[0], members, what)
        with explain_failures():
            work.wait()

    def _broadcast(self, buffer: Tensor, source: int, members: Members, what: str) -> Any:
        if self.rank != source:
            self._record(what, buffer, 1.0)
        with explain_failures():
            return dist.broadcast(
                buffer, self._global(source), group=self._group(members), async_op=True
            )

    def _record(self, what: str, buffer: Tensor, times: float) -> None:
        self.moved[what] = self.moved.get(what, 0.0) + times * buffer.numel() * buffer.itemsize

    def _travels(self, spec: TensorSpec) -> torch.dtype:
        """Return the dtype in which tensors of a spec travel."""
        wire, dtype = self._wire, spec.dtype
        if wire is None or spec.unrounded or not dtype.is_floating_point:
            return dtype
        return wire if dtype.itemsize > wire.itemsize else dtype

    def _device(self, device: torch.device | None) -> torch.device:
        """Return the device of buffers: the accelerator where the backend needs it."""
        if device is not None:
            return device
        return (
            _accelerator("cuda") if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
        )


def _count(statistic: Statistic | None, device: torch.device) -> Tensor:
    return torch.as_tensor(
        0.0 if statistic is None else statistic.count, dtype=torch.float64, device=device
    ).reshape(())


def _accelerator(kind: str) -> torch.device:
    return torch.device(kind, torch.accelerator.current_device_index())


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(
            f"wire_dtype is {name!r}; it must name a floating dtype of torch, such as 'bfloat16', "
            "or be None."
        )
    return found


class Routing(Protocol):
    """Says which ranks want the total of a statistic."""

    def wanted(self, key: str) -> Members:
        """Return the ranks that want the total of this name."""


class PendingReduction:
    """A sum over ranks that is under way.

    Args:
        messages: Its buckets; where they are made one by one, a few are under way at a time.
        specs: The names with their specs.
        counting: The reduction of the counts.
        counts: One for each name.
        homes: Devices of this rank's totals.
        device: The device of all others.
    """

    def __init__(
        self,
        messages: Iterable[PendingMessage],
        specs: TensorSpecs,
        counting: Any,
        counts: Tensor | None,
        homes: Mapping[str, torch.device],
        device: torch.device,
    ) -> None:
        self._messages, self._specs = receive_in_order(iter(messages)), specs
        self._counting, self._counts = counting, counts
        self._homes, self._device = homes, device

    def wait(self) -> dict[str, ReducedStatistic]:
        """Wait for the sums, and return them by name."""
        if self._counts is None:
            return {}
        totals = {name: total for found in self._messages for name, total in found.items()}
        with explain_failures():
            self._counting.wait()
        reduced = {}
        for (name, spec), count in zip(self._specs.items(), self._counts.unbind(), strict=True):
            total = totals.get(name)
            if total is not None:
                total = total.to(self._homes.get(name, self._device))
            reduced[name] = ReducedStatistic(total, count, spec is not None)
        return reduced


class _Summed(PendingMessage):
    """One bucket of a sum; where some ranks alone want it, its first member passes it on."""

    def __init__(
        self,
        work: Any,
        communicator: Communicator,
        buffer: Tensor,
        specs: Mapping[str, TensorSpec],
        members: Members | None,
        what: str,
    ) -> None:
        super().__init__(work)
        self._communicator, self._buffer, self._specs = communicator, buffer, specs
        self._members, self._what = members, what

    def tensors(self) -> dict[str, Tensor]:
        """Return the totals, or nothing on a rank that does not want them."""
        members = self._members
        if members is not None:
            if self._communicator.rank not in members:
                return {}
            if len(members) > 1:
                self._communicator.pass_on(self._buffer, members, self._what)
        return dict(zip(self._specs, unpack(self._buffer, list(self._specs.values())), strict=True))


class _Copied(PendingMessage):
    """One bucket of copies."""

    def __init__(
        self,
        work: Any,
        kept: Mapping[str, Tensor],
        buffer: Tensor | None,
        specs: Mapping[str, TensorSpec],
    ) -> None:
        super().__init__(work)
        self._kept, self._buffer, self._specs = kept, buffer, specs

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors; the source keeps its own, laid out as the receivers have them."""
        if self._buffer is None:
            return dict(self._kept)
        if self._kept:
            return {name: tensor.contiguous() for name, tensor in self._kept.items()}
        return dict(zip(self._specs, unpack(self._buffer, list(self._specs.values())), strict=True))
