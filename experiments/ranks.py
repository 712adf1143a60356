"""The processes that share an experiment: this one alone, or those that torchrun has started.

Rank 0 decides, prints and writes.
"""

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

from experiments.errors import ExperimentError, from_system

Result = TypeVar("Result")

ROUNDS = 3
"""Rank 0; then the first process of each other machine; then the rest."""


@attrs.frozen
class Communicator:
    """This process among those that share the experiment.

    All processes must call the same methods in the same order.

    Args:
        rank: Its number, from 0.
        size: Number of processes.
        local: Its number on its machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, prints and writes."""
        return self.rank == 0

    def broadcast(self, work: Callable[[], Result]) -> Result:
        """Do the work on rank 0; return its result, or raise its error, on all."""
        if self.size == 1:
            return work()
        answer = [_attempt(work) if self.first else None]
        dist.broadcast_object_list(answer, src=0)
        assert answer[0] is not None
        value, error = answer[0]
        if error is not None:
            raise ExperimentError(error)
        return value  # type: ignore[return-value]

    def on_first(self, work: Callable[[], Result]) -> Result | None:
        """Do the work on rank 0 and return its result there; on others, return `None`.

        An error is raised on all.
        """
        results: list[Result] = []
        self.broadcast(lambda: results.append(work()))
        return results[0] if results else None

    def in_order(self, work: Callable[[], Result]) -> Result:
        """Do the work on all, rank 0 first, then the first process of each machine, then the rest.

        Later processes can then use what earlier ones have downloaded.
        """
        if self.size == 1:
            return work()
        mine = 0 if self.first else 1 if self.local == 0 else ROUNDS - 1
        results: list[Result] = []
        for number in range(ROUNDS):
            error = None
            if number == mine:
                value, error = _attempt(work)
                results += [] if error is not None else [value]  # type: ignore[list-item]
            for rank, found in enumerate(self.gather(error)):
                if found is not None:
                    raise ExperimentError(found if rank == 0 else f"process {rank}: {found}")
        return results[0]

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Result] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return a model that averages its gradients over all."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


def launched() -> bool:
    """Return whether torchrun, or a similar launcher, started this process with others."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[Communicator]:
    """Join the processes that torchrun has started, if any, until all have finished.

    Args:
        device: Device of this process; it determines the backend, such as nccl or gloo.
    """
    if not launched():
        yield Communicator()
        return
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend)
    complete = False
    try:
        yield Communicator(
            dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
        )
        dist.barrier()
        complete = True
    finally:
        # After an error, nccl would wait for calls that the others never make.
        if complete or backend == "gloo":
            dist.destroy_process_group()


def device(name: str) -> torch.device:
    """Return the device of a name; each of several processes gets its own.

    Raises:
        ExperimentError: It cannot be used, or there are fewer devices than processes.
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
        found = own_device(
            found,
            int(os.environ.get("LOCAL_RANK", "0")),
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            module.device_count(),
        )
        module.set_device(found)
    return found


def own_device(device: torch.device, local: int, here: int, count: int) -> torch.device:
    """Return the device of one process.

    Args:
        device: The requested device.
        local: Number of the process on its machine.
        here: Number of processes on its machine.
        count: Number of devices on its machine.

    Raises:
        ExperimentError: There are fewer devices than processes.
    """
    if here > 1 and device.index is not None:
        raise ExperimentError(
            f"--device {device} cannot be shared by {here} processes: give --device {device.type}, "
            "and each takes its own"
        )
    if here > count:
        raise ExperimentError(
            f"{here} processes cannot share {count} {device.type} device(s): start fewer of them, "
            "or give --device cpu"
        )
    return torch.device(device.type, local if device.index is None else device.index)


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return the result of `work`, or its error as text: what the user or the system did wrong."""
    try:
        return work(), None
    except ExperimentError as error:
        return None, str(error)
    except OSError as error:
        return None, str(from_system(error))
