"""Several ranks on this machine: worker processes that run functions as ranks of a gloo group.

Importing torch takes seconds; forming a process group takes milliseconds. Workers therefore start
once, and each job forms its own group, of any size. On Linux, workers are forked from a process
that has already imported torch.
"""

from __future__ import annotations

import atexit
import datetime
import gc
import io
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kfactk.distributed.communicator import forget_groups

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

STARTING = 300.0
"""Seconds that a worker may take to start; much of it is importing torch."""
PATIENCE = 90.0
"""Seconds that a job may take before its ranks are considered hung."""
WORN = 40
"""Threads in a worker above which it is replaced."""
GRACE = 20.0
"""Seconds that the other ranks may continue after one has failed."""


class RankError(AssertionError):
    """A rank failed or did not end; the message holds the tracebacks."""


class Workers:
    """Worker processes that run functions as ranks.

    Example:
        >>> from operator import mul
        >>> with Workers() as workers:  # each rank calls mul(rank, 10)
        ...     workers.run(2, mul, 10)
        [0, 10]
    """

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="kfactk-ranks-")
        self._jobs = 0

    def run(
        self, ranks: int, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE
    ) -> list[Any]:
        """Call `function(rank, *arguments)` on each rank of one gloo process group.

        Args:
            ranks: Number of ranks. Their group is the default group while the function runs.
            function: Importable by name. The function, its arguments and its results must be
                picklable.
            *arguments: The same for every rank.
            patience: Seconds after which the ranks are considered hung.

        Returns:
            What each call returned, in the order of ranks.

        Raises:
            RankError: A rank raised, died or hangs. The next run starts new workers.
        """
        if any(_worn(process) for process, _ in self._workers):
            self.close()
        self._start(ranks - len(self._workers))
        self._jobs += 1
        store = str(Path(self._folder.name) / str(self._jobs))
        job = _packed((function, arguments))
        for rank, (_, pipe) in enumerate(self._workers[:ranks]):
            pipe.send((rank, ranks, store, patience, job))
        answers, failures = self._answers(ranks, patience)
        if failures:
            self.close()
            raise RankError(
                "\n".join(f"rank {rank} of {ranks}: {failures[rank]}" for rank in sorted(failures))
            )
        return [answers[rank] for rank in range(ranks)]

    def _start(self, number: int) -> None:
        """Start workers, all at once, and wait until they are ready."""
        new = [_started() for _ in range(number)]
        self._workers += new
        for process, pipe in new:
            if not pipe.poll(STARTING):
                self.close()
                raise RankError(f"a worker process did not start within {STARTING:.0f} seconds")
            try:
                pipe.recv()
            except EOFError:
                process.join(GRACE)
                self.close()
                raise RankError(
                    f"a worker process ended with exit code {process.exitcode} before it could work"
                ) from None

    def _answers(self, ranks: int, patience: float) -> tuple[dict[int, Any], dict[int, str]]:
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:ranks])}
        deadline = time.monotonic() + patience
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures |= dict.fromkeys(
                    waiting.values(), "did not end: it waits for the others, or hangs"
                )
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    good, answer = pipe.recv()
                    answer = _unpacked(answer)
                except EOFError:
                    process = self._workers[rank][0]
                    process.join(GRACE)
                    good, answer = False, f"the process ended with exit code {process.exitcode}"
                if good:
                    answers[rank] = answer
                else:
                    failures[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers, failures

    def close(self) -> None:
        """End the processes, by force where they do not answer; a later `run` starts new ones."""
        for _, pipe in self._workers:
            pipe.close()
        deadline = time.monotonic() + GRACE
        for process, _ in self._workers:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        self._workers.clear()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_SHARED: list[Workers] = []


def shared_workers() -> Workers:
    """Return the workers that all laws and tests of this process share; they end with it."""
    if not _SHARED:
        _SHARED.append(Workers())
        atexit.register(_SHARED[0].close)
    return _SHARED[0]


def _worn(process: BaseProcess) -> bool:
    """Return whether a worker runs many threads (Linux): groups of earlier jobs left them.

    Such threads would slow down later jobs.
    """
    threads = Path(f"/proc/{process.pid}/task")
    return threads.is_dir() and len(list(threads.iterdir())) > WORN


def process_context() -> SpawnContext | ForkServerContext:
    """Return how processes start: on Linux forked from one that only imported torch, else spawned.

    Forked processes have the environment variables of the first start.
    """
    if sys.platform != "linux":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    # The first optimizer imports the compiler.
    context.set_forkserver_preload(["torch._dynamo", "kfactk", __name__])
    return context


def _started() -> tuple[BaseProcess, Connection]:
    context = process_context()
    mine, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, mine


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    gc.freeze()  # else each collection after a job walks through all of torch
    pipe.send(None)
    while True:
        try:
            rank, ranks, store, patience, job = pipe.recv()
        except EOFError:
            return
        answer = _done(rank, ranks, store, patience, job)
        try:
            pipe.send(answer)
        except BrokenPipeError:  # the parent process stopped waiting
            return
        if not answer[0]:  # a failed rank ends, as it would elsewhere, and the others notice
            return


def _done(rank: int, ranks: int, store: str, patience: float, job: bytes) -> tuple[bool, bytes]:
    limit = datetime.timedelta(seconds=patience)
    environment = dict(os.environ)
    try:
        function, arguments = _unpacked(job)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit
        )
        answer = _packed(function(rank, *arguments))
        dist.barrier()
        return True, answer
    except BaseException:
        return False, _packed(traceback.format_exc())
    finally:
        forget_groups()
        gc.collect()  # a live model or optimizer would keep the threads of its groups running
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()  # engines set variables that would tell the next job their ranks
        os.environ.update(environment)


def _packed(value: Any) -> bytes:
    """Return the value pickled, tensors as plain data: processes then share no memory."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=pickle)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
