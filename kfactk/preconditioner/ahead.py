"""Decompositions that run beside the training loop: begun in one step, adopted in a later one.

    step s: factors -> a copy -> decompose, on a thread       step s + lag: wait for it -> adopt

What is adopted when follows from the schedule alone, not from how fast the thread is. So a run is
the same on every machine. It equals one that decomposes at once what the factors were `lag` steps
ago. On a GPU the thread has a stream of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Parts = dict[str, dict[str, Tensor]]
"""For each matrix, the parts of its decomposition."""


class Ahead:
    """A decomposition that is on its way, or waits to be adopted.

    Args:
        future: What gives it.
        device: Where its tensors are.
        work: Makes it once more, for a forked process: that has no thread that would finish it.
    """

    def __init__(
        self, future: Future[Parts], device: torch.device, work: Callable[[], Parts] | None = None
    ) -> None:
        self._future, self._device, self._work, self._process = future, device, work, os.getpid()
        if work is not None:
            future.add_done_callback(self._finish)

    def _finish(self, future: Future[Parts]) -> None:
        self._work = None

    @classmethod
    def begin(
        cls, decompose: Callable[[Mapping[str, Tensor]], Parts], matrices: Mapping[str, Tensor]
    ) -> Ahead:
        """Begin to decompose copies of matrices, on a thread.

        Args:
            decompose: Decomposes them; it must change nothing.
            matrices: By name; the originals may change from now on.
        """
        copies = {name: matrix.clone() for name, matrix in matrices.items()}
        device = next(iter(copies.values())).device
        stream = _stream(device)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
            for copy in copies.values():
                copy.record_stream(stream)
        work = functools.partial(_run, decompose, copies, stream, torch.get_num_threads())
        return cls(_pool().submit(work), device, work)

    @classmethod
    def of(cls, parts: Parts) -> Ahead:
        """Return one that was finished before, such as a saved one."""
        future: Future[Parts] = Future()
        future.set_result(parts)
        return cls(future, next(t for its in parts.values() for t in its.values()).device)

    @property
    def done(self) -> bool:
        """Whether nobody has to wait for it."""
        return self._work is None

    def result(self) -> Parts:
        """Wait for it, and return it.

        Raises:
            DecompositionError: A matrix could not be decomposed.
            Exception: The basis failed otherwise, in its own way.
        """
        if self._work is not None and self._process != os.getpid():
            self._future = Future()
            self._future.set_result(self._work())
        try:
            found = self._future.result()
        finally:
            self._work = None  # the callback may come later
        if self._device.type == "cuda":  # made on another stream
            now = torch.cuda.current_stream(self._device)
            for part in (part for parts in found.values() for part in parts.values()):
                part.record_stream(now)
        return found

    def parts(self) -> Parts:
        """Wait for it, and return it; nothing where that failed, which is told at adoption."""
        with contextlib.suppress(Exception):
            return self.result()
        return {}


def _run(
    decompose: Callable[[Mapping[str, Tensor]], Parts],
    matrices: Mapping[str, Tensor],
    stream: torch.cuda.Stream | None,
    threads: int,
) -> Parts:
    if torch.get_num_threads() != threads:  # it is each thread's own, and the last bits follow it
        torch.set_num_threads(threads)
    if stream is None:
        with torch.no_grad():
            return decompose(matrices)
    with torch.no_grad(), torch.cuda.stream(stream):
        found = decompose(matrices)
    stream.synchronize()  # who waits for the thread waits for the work
    return found


_streams: dict[torch.device, torch.cuda.Stream] = {}
_pools: list[ThreadPoolExecutor] = []


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream of decompositions on a device; `None` on a CPU."""
    if device.type != "cuda":
        return None
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


def _pool() -> ThreadPoolExecutor:
    """Return the thread, which all optimizers of a process share: it uses every core by itself."""
    if not _pools:
        _pools.append(ThreadPoolExecutor(1, thread_name_prefix="kfactk"))
    return _pools[0]


if hasattr(os, "register_at_fork"):  # a forked process has no thread but its own
    os.register_at_fork(after_in_child=_pools.clear)
