"""The processes that share a model: every collective that kfactk makes is made here.

Every rank makes the same calls in the same order, whatever its data: what is sent, and by whom, follows from the recipe, the shapes and
the step. A rank that lacks something sends zeros. Bytes are counted as each rank sends or receives them, whatever the algorithm below:
x bytes reduced to one of g ranks, or broadcast by one, move (g - 1) x in all, an all-reduce twice that.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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
"""Forms of totals by name; `None` for a statistic without one."""


class _Made:
    """Process groups made out of another one."""

    def __init__(self) -> None:
        self.subgroups: dict[Members, Any] = {}
        self.known: set[Members] = set()
        self.aside: Any = None


_MADE: weakref.WeakKeyDictionary[Any, _Made] = weakref.WeakKeyDictionary()


def forget_groups() -> None:
    """Forget the process groups made for optimizers of this process; they are shared by all of them, and kept until this is called.

    Wanted only where `torch.distributed` is initialised anew in the same process, before it is destroyed.
    """
    _MADE.clear()


class Communicator:
    """The ranks of one process group, and what they say to each other.

    Args:
        group: A `torch.distributed` process group; `None` for all processes, or for none where nothing is initialised.
        wire_dtype: Name of the floating dtype that totals, decompositions and gradients travel in; `None` for their own.

    Example:
        >>> ranks = Communicator()
        >>> ranks.rank, ranks.size
        (0, 1)
    """

    def __init__(self, group: Any = None, wire_dtype: str | None = None) -> None:
        self.group = group
        self._wire = None if wire_dtype is None else _dtype(wire_dtype)
        self.moved: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------------------ who

    @property
    def size(self) -> int:
        """Number of ranks: 1 when alone."""
        return self._place()[1]

    @property
    def rank(self) -> int:
        """This process' rank within the group: 0 when alone."""
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
                "this process is not in the placement's process_group, so it has nobody to share work with. "
                "Give each process the group it belongs to."
            )
        return rank, size

    def prepare(self, groups: Iterable[Members]) -> None:
        """Make the process groups that will be needed; a collective call.

        They are made in rounds in which every rank makes exactly one: torch names groups by how many were made before.
        """
        made = self._made
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
                ranks, backend=dist.get_backend(self.group), use_local_synchronization=True
            )

    @property
    def _made(self) -> _Made:
        """The groups made before out of this one, by whatever optimizer."""
        return _MADE.setdefault(dist.group.WORLD if self.group is None else self.group, _Made())

    def _global(self, rank: int) -> int:
        return rank if self.group is None else int(dist.get_global_rank(self.group, rank))

    def _group(self, members: Members) -> Any:
        if len(members) == self.size:
            return self.group
        return self._made.subgroups[members]

    # ------------------------------------------------------------------------------------------------- small agreements

    def total(self, numbers: Sequence[float], device: torch.device | None = None) -> list[float]:
        """Each number summed over ranks."""
        if self.size == 1 or not numbers:
            return [float(number) for number in numbers]
        buffer = torch.tensor(numbers, dtype=torch.float64, device=self._device(device))
        self._all_reduce(buffer, "agreements")
        return [float(number) for number in buffer.tolist()]

    def any(self, flag: bool, device: torch.device | None = None) -> bool:
        """Whether a flag is set on any rank."""
        return bool(self.total([float(flag)], device)[0])

    def gathered(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with explain_failures():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def same(self, what: str) -> bool:
        """Whether all ranks give the same text."""
        if self.size == 1:
            return True
        number = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=6).digest(), "big")
        buffer = torch.tensor([number, -number], dtype=torch.int64, device=self._device(None))
        with explain_failures():
            dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=self.group)
        self._count("agreements", buffer, 2 * (self.size - 1) / self.size)
        largest, least = buffer.tolist()
        return bool(largest == -least)

    # ----------------------------------------------------------------------------------------------------------- sums

    def reduce(
        self,
        statistics: Mapping[str, Statistic],
        wanted: Callable[[str], Members],
        what: str,
        agreed: Callable[[TensorSpecs, torch.device], None] | None = None,
    ) -> dict[str, ReducedStatistic]:
        """Sum statistics over ranks; totals reach the ranks that want them, counts all.

        Args:
            statistics: This rank's; it may lack names that others have, and then contributes nothing to them.
            wanted: For a name, the ranks that want its total.
            what: What is summed, for the record of bytes.
            agreed: Told of all ranks' names with their forms, and where this rank's buffers live.

        Returns:
            All ranks' names, in the same order on every rank.

        Raises:
            StateError: Two ranks have statistics of one name but different shapes.
        """
        if self.size == 1:
            return {name: ReducedStatistic.alone(each) for name, each in statistics.items()}
        specs, device = self._forms(statistics)
        if agreed is not None:
            agreed(specs, device)
        return self._begun(statistics, specs, device, wanted, what, self.group)()

    def begin(
        self,
        statistics: Mapping[str, Statistic],
        specs: TensorSpecs,
        device: torch.device,
        wanted: Callable[[str], Members],
        what: str,
    ) -> Callable[[], dict[str, ReducedStatistic]]:
        """Begin such a sum, and go on; what is returned waits for it.

        It travels beside other messages, such as those of a backward pass, in a process group of its own (`stand_aside`).

        Args:
            statistics: This rank's.
            specs: The names that are summed with their forms, the same on every rank.
            device: Where this rank's buffers live.
            wanted: As for `reduce`; so is the next one.
            what: What is summed.
        """
        return self._begun(statistics, specs, device, wanted, what, self._made.aside, at_once=True)

    def stand_aside(self) -> None:
        """Make the process group of sums that are begun early; a collective call."""
        if self._made.aside is None:
            self._made.aside = self._new_group(self.everyone)

    def _begun(
        self,
        statistics: Mapping[str, Statistic],
        specs: TensorSpecs,
        device: torch.device,
        wanted: Callable[[str], Members],
        what: str,
        group: Any,
        *,
        at_once: bool = False,
    ) -> Callable[[], dict[str, ReducedStatistic]]:
        if not specs:
            return dict
        counts = torch.stack([_count(statistics.get(name), device) for name in specs])
        counting = self._all_reduce(counts, "agreements", wait=False, group=group)
        goals: dict[Members, dict[str, TensorSpec]] = {}
        for name, form in specs.items():
            if form is not None:
                goals.setdefault(wanted(name), {})[name] = form
        messages = (
            self._summed(run, these, statistics, members, device, what, group)
            for members, these in sorted(goals.items())
            for run in buckets(these)
        )
        flow = receive_in_order(iter(list(messages)) if at_once else messages)

        def finish() -> dict[str, ReducedStatistic]:
            totals = {name: total for found in flow for name, total in found.items()}
            with explain_failures():
                counting.wait()
            homes = {
                name: each.total.device
                for name, each in statistics.items()
                if each.total is not None
            }
            return {
                name: ReducedStatistic(
                    totals[name].to(homes.get(name, device)) if name in totals else None,
                    count,
                    form is not None,
                )
                for (name, form), count in zip(specs.items(), counts.unbind(), strict=True)
            }

        return finish

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
        """One bucket on its way to the ranks that want it."""
        these = [specs[name] for name in names]
        mine = [statistics[name].total if name in statistics else None for name in names]
        filled = [
            form.blank(device).zero_() if total is None else total.to(device)
            for total, form in zip(mine, these, strict=True)
        ]
        buffer = pack(filled, these, self._travels(these[0].dtype))
        if len(members) == self.size:
            work = self._all_reduce(buffer, what, wait=False, group=group)
            return PendingMessage(
                work, lambda: dict(zip(names, unpack(buffer, these), strict=True))
            )
        with explain_failures():
            work = dist.reduce(buffer, self._global(members[0]), group=group, async_op=True)
        if self.rank != members[0]:
            self._count(what, buffer, 1.0)

        def finish() -> dict[str, Tensor]:
            if self.rank not in members:
                return {}
            if len(members) > 1:
                work = self._broadcast(buffer, members[0], members, what)
                with explain_failures():
                    work.wait()
            return dict(zip(names, unpack(buffer, these), strict=True))

        return PendingMessage(work, finish)

    def _forms(self, statistics: Mapping[str, Statistic]) -> tuple[TensorSpecs, torch.device]:
        """All ranks' names in one order, each with the shape and the widest dtype any rank has; and where this rank's buffers live."""
        mine = {name: spec_of(statistic) for name, statistic in sorted(statistics.items())}
        kinds = sorted(
            {each.total.device.type for each in statistics.values() if each.total is not None}
            - {"cpu"}
        )
        if not self.same(repr((list(mine.items()), kinds))):
            everyones = self.gathered((mine, kinds))
            kinds = sorted({kind for _, theirs in everyones for kind in theirs})
            names = sorted({name for theirs, _ in everyones for name in theirs})
            mine = {
                name: common_spec(name, [theirs[name] for theirs, _ in everyones if name in theirs])
                for name in names
            }
        here = next(
            (
                s.total.device
                for s in statistics.values()
                if s.total is not None and s.total.device.type in kinds
            ),
            None,
        )
        device = here if here is not None else _accelerator(kinds[0]) if kinds else None
        return mine, self._device(device)

    # ----------------------------------------------------------------------------------------------------------- copies

    def send(
        self,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, TensorSpec],
        source: int,
        members: Members,
        what: str,
        device: torch.device,
    ) -> list[PendingMessage]:
        """Copy tensors of one rank to others; every member calls it, and others must not.

        All members, the source too, go on with what the wire has made of the values, so that they agree bit for bit.

        Args:
            tensors: On the source, the tensors by name.
            specs: Their forms, the same on all members.
            source: Whose they are.
            members: The source and the receivers.
            what: What is copied, for the record of bytes.
            device: Where receivers want them.

        Returns:
            Messages under way, in the order in which they have to be waited for.
        """
        return [
            self._sent(run, tensors, specs, source, members, what, device) for run in buckets(specs)
        ]

    def _sent(
        self,
        names: Sequence[str],
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, TensorSpec],
        source: int,
        members: Members,
        what: str,
        device: torch.device,
    ) -> PendingMessage:
        these = [specs[name] for name in names]
        if len(members) == 1:
            return PendingMessage(None, lambda: {name: tensors[name] for name in names})
        dtype = self._travels(these[0].dtype)
        if self.rank == source:
            buffer = pack([tensors[name] for name in names], these, dtype)
        else:
            buffer = torch.empty(sum(form.numel for form in these), dtype=dtype, device=device)
        work = self._broadcast(buffer, source, members, what)

        def finish() -> dict[str, Tensor]:
            if self.rank == source and dtype == these[0].dtype:
                return {
                    name: tensors[name].contiguous() for name in names
                }  # laid out as the receivers have them
            return dict(zip(names, unpack(buffer, these), strict=True))

        return PendingMessage(work, finish)

    # ------------------------------------------------------------------------------------------------------------ wire

    def _all_reduce(
        self, buffer: Tensor, what: str, *, wait: bool = True, group: Any = None
    ) -> Any:
        self._count(what, buffer, 2 * (self.size - 1) / self.size)
        with explain_failures():
            return dist.all_reduce(
                buffer,
                op=dist.ReduceOp.SUM,
                group=self.group if group is None else group,
                async_op=not wait,
            )

    def _broadcast(self, buffer: Tensor, source: int, members: Members, what: str) -> Any:
        if self.rank != source:
            self._count(what, buffer, 1.0)
        with explain_failures():
            return dist.broadcast(
                buffer, self._global(source), group=self._group(members), async_op=True
            )

    def _count(self, what: str, buffer: Tensor, times: float) -> None:
        self.moved[what] = self.moved.get(what, 0.0) + times * buffer.numel() * buffer.itemsize

    def _travels(self, dtype: torch.dtype) -> torch.dtype:
        return (
            dtype
            if self._wire is None
            or not dtype.is_floating_point
            or dtype.itemsize <= self._wire.itemsize
            else self._wire
        )

    def _device(self, device: torch.device | None) -> torch.device:
        """Where buffers live: on the accelerator if the backend knows nothing else."""
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
            f"wire_dtype is {name!r}; it must name a floating dtype of torch, such as 'bfloat16', or be None."
        )
    return found
