"""The processes that share a study: this one alone, or those that torchrun has started. Rank 0 decides, prints and writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.errors import ExperimentError

Result = TypeVar("Result")

TURNS = 3
"""Rank 0; then the first process of each other machine; then the rest."""


@attrs.frozen
class Communicator:
    """This process among those that share the study. What a method does is done by all of them, at the same point of the study.

    Args:
        rank: Its number, from 0.
        size: How many there are.
        local: Its number on its machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether it is the one that decides, prints and writes."""
        return self.rank == 0

    def lead(self, work: Callable[[], Result]) -> Result:
        """What `work` gives on rank 0, on all; or its error."""
        if self.size == 1:
            return work()
        answer = [_attempt(work) if self.first else None]
        dist.broadcast_object_list(answer, src=0)
        assert answer[0] is not None
        value, fault = answer[0]
        if fault is not None:
            raise ExperimentError(fault)
        return value  # type: ignore[return-value]

    def first_only(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives, on rank 0; `None` on the others, which only learn of its error."""
        kept: list[Result] = []
        self.lead(lambda: kept.append(work()))
        return kept[0] if kept else None

    def in_turns(self, work: Callable[[], Result]) -> Result:
        """Each does the work, rank 0 first and the first of each machine next: later ones find what earlier ones have fetched."""
        if self.size == 1:
            return work()
        mine = 0 if self.first else 1 if self.local == 0 else TURNS - 1
        done: list[Result] = []
        for turn in range(TURNS):
            fault = None
            if turn == mine:
                value, fault = _attempt(work)
                done += [] if fault is not None else [value]  # type: ignore[list-item]
            faults = self.gather(fault)
            for rank, found in enumerate(faults):
                if found is not None:
                    raise ExperimentError(found if rank == 0 else f"process {rank}: {found}")
        return done[0]

    def gather(self, value: Result) -> list[Result]:
        """The value of each, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Result] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all, in place of what `tensor` held."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model that averages its gradients over all."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


def launched() -> bool:
    """Whether this process is one of several that were started together, by torchrun or in the same way."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Communicator]:
    """Join the others that torchrun has started, if it has, until the study is over on all of them.

    Args:
        device: Where this process works; decides between nccl, gloo and others.
    """
    if not launched():
        yield Communicator()
        return
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend)
    orderly = False
    try:
        yield Communicator(
            dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
        )
        dist.barrier()
        orderly = True
    finally:
        if (
            orderly or backend == "gloo"
        ):  # after an error nccl would wait for what the others have not begun
            dist.destroy_process_group()


def device(name: str) -> torch.device:
    """The device of a name; for one of several processes, its own one.

    Raises:
        ExperimentError: It cannot be used here, or there are fewer than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ExperimentError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]})"
        ) from error
    if launched() and found.type != "cpu":
        module = torch.get_device_module(found)
        found = own(
            found,
            int(os.environ.get("LOCAL_RANK", "0")),
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            module.device_count(),
        )
        module.set_device(found)
    return found


def own(device: torch.device, local: int, here: int, count: int) -> torch.device:
    """One process' own device.

    Args:
        device: What was asked for.
        local: Number of the process on its machine.
        here: How many processes there are on it.
        count: How many devices.

    Raises:
        ExperimentError: There is not one for each.
    """
    if here > 1 and device.index is not None:
        raise ExperimentError(
            f"--device {device} cannot be shared by {here} processes: give --device {device.type}, each takes its own"
        )
    if here > count:
        raise ExperimentError(
            f"{here} processes cannot share {count} {device.type} device(s): start fewer of them, or give --device cpu"
        )
    return torch.device(device.type, local if device.index is None else device.index)


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What `work` gives, and what was wrong."""
    try:
        return work(), None
    except ExperimentError as error:
        return None, str(error)
