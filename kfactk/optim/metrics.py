"""What a tracker is given: figures of recorded steps, gathered only when one is asked for."""

from __future__ import annotations

import contextlib
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.errors import KfactkError, KfactkWarning
from kfactk.optim.profile import Profile
from kfactk.stages import GradientPair, Tracker

IDLE = contextlib.nullcontext()


class MetricsRecorder:
    """Gathers one step's figures and hands them to the recipe's tracker, and the seconds of stages to a profile while there is one.

    A tracker that raises costs a warning, said once, never the training run.

    Args:
        tracker: The recipe's; with none, and no profile, everything here does nothing.
        summary: Gives the recipe as text-safe mappings.
    """

    def __init__(self, tracker: Tracker | None, summary: Callable[[], Mapping[str, Any]]) -> None:
        self._tracker = _fresh(tracker)
        self._figures: dict[str, Tensor | float] = {}
        self._seconds: dict[str, float] = {}
        self._inside: list[float] = []
        self._profile: Profile | None = None
        self._warned: list[str] = []
        self._finalizer: weakref.finalize[Any, MetricsRecorder] | None = None
        if self._tracker is not None:
            fresh, warned = self._tracker, self._warned
            _surviving(warned, lambda: fresh.start(summary()))
            self._finalizer = weakref.finalize(self, _surviving, warned, fresh.close)

    def timed(self, stage: str) -> contextlib.AbstractContextManager[None]:
        """Add the wall-clock seconds of the block to those of `stage` in this step, those of blocks inside it left out.

        On a device that works asynchronously these are the seconds until the work was queued, or, within a profile, done.
        """
        return IDLE if self._tracker is None and self._profile is None else self._timing(stage)

    @contextlib.contextmanager
    def _timing(self, stage: str) -> Iterator[None]:
        now = time.perf_counter if self._profile is None else self._profile.now
        if self._profile is not None:
            self._profile.add(stage, 0.0)  # stages in the order in which they begin
        start = now()
        self._inside.append(0.0)
        try:
            yield
        finally:
            whole = now() - start
            own = whole - self._inside.pop()
            self._seconds[stage] = self._seconds.get(stage, 0.0) + own
            if self._profile is not None:
                self._profile.add(stage, own)
            if self._inside:
                self._inside[-1] += whole

    @contextlib.contextmanager
    def profiled(self, optimizer: torch.optim.Optimizer) -> Iterator[Profile]:
        """Gather the seconds of an optimizer's steps.

        Raises:
            KfactkError: Its steps are being gathered already.
        """
        if self._profile is not None:
            raise KfactkError(
                "this optimizer is being profiled already: leave the first `with optimizer.profile()` before another begins."
            )
        self._profile = profile = Profile(
            parameter.device for group in optimizer.param_groups for parameter in group["params"]
        )
        begins = optimizer.register_step_pre_hook(lambda *_: profile.enter())
        try:
            yield profile
        finally:
            begins.remove()
            self._profile = None

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Take figures from outside (loss, accuracy)."""
        if self._tracker is not None:
            self._figures.update(
                {
                    name: value.detach() if isinstance(value, Tensor) else value
                    for name, value in metrics.items()
                }
            )

    def due(self, step: int) -> bool:
        """Whether `step` is recorded."""
        answers: list[bool] = []
        if (tracker := self._tracker) is not None:
            _surviving(self._warned, lambda: answers.append(step % tracker.every == 0))
        return any(answers)

    def see(self, pairs: Sequence[GradientPair]) -> None:
        """Note the norms of what goes to the clip: full tensors, since not every rank records, so that none may ask the others."""
        if self._tracker is not None:
            self._figures["gradient_norm"] = _norm([pair.gradient for pair in pairs])
            self._figures["preconditioned_norm"] = _norm([pair.preconditioned for pair in pairs])

    def finish(self, step: int, more: Callable[[], Mapping[str, Tensor | float]]) -> dict[str, Any]:
        """End a step: record it if it is due, and return the figures.

        Args:
            step: Index of the step just taken.
            more: Gives figures that are worked out for recorded steps only.
        """
        metrics: dict[str, Tensor | float] = {}
        if self.due(step):
            seconds = {f"seconds/{name}": value for name, value in self._seconds.items()}
            metrics = {**self._figures, **more(), **seconds}
            tracker = self._tracker
            assert tracker is not None
            _surviving(self._warned, lambda: tracker.record(step, metrics))
        if self._profile is not None:
            self._profile.leave()
        self.forget()
        return dict(metrics)

    def forget(self) -> None:
        """Drop what was gathered of the step under way."""
        self._seconds.clear()
        self._figures.clear()

    def close(self) -> None:
        """Flush and close the tracker; may be called twice."""
        if self._finalizer is not None:
            self._finalizer()


def _fresh(tracker: Tracker | None) -> Tracker | None:
    """One recipe may be bound many times; each run has a tracker of its own where the class allows it."""
    return attrs.evolve(tracker) if tracker is not None and attrs.has(type(tracker)) else tracker  # type: ignore[misc]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    squares = [tensor.square().sum().to(tensors[0].device) for tensor in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _surviving(warned: list[str], call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:  # a record is worth less than the run it records
        if not warned:
            warned.append(str(error))
            warnings.warn(
                f"the tracker failed, and training goes on without its records: {error!r} (said once)",
                KfactkWarning,
                stacklevel=3,
            )
