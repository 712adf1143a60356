"""Metrics of recorded steps, gathered only when a tracker or a profile asks for them."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.errors import KfactkError, KfactkWarning, OptionError
from kfactk.stages import GradientPair, Tracker
from kfactk.timing import Profile, StageTimer


class MetricsRecorder:
    """Gathers the metrics of one step and hands them to the recipe's tracker.

    A tracker that raises costs one warning, never the training run. Only where it refuses its
    options at the start, nothing has been lost yet: that is an error.

    Args:
        tracker: The recipe's; without one, and without a profile, the recorder does nothing.
        recipe: The recipe as text-safe mappings.
        timer: Times the stages.

    Raises:
        OptionError: The tracker refuses its options, or what they need is not installed.
    """

    def __init__(
        self, tracker: Tracker | None, recipe: Mapping[str, Any], timer: StageTimer
    ) -> None:
        self._tracker = _own(tracker)
        self._timer = timer
        self._timer.recording = self._tracker is not None
        self._metrics: dict[str, Tensor | float] = {}
        self._warned: list[str] = []
        self._finalizer: weakref.finalize[Any, MetricsRecorder] | None = None
        if self._tracker is not None:
            started, warned = self._tracker, self._warned
            _surviving(warned, lambda: started.start(recipe), refusals=OptionError)
            self._finalizer = weakref.finalize(self, _surviving, warned, started.close)

    @contextlib.contextmanager
    def profiled(self, optimizer: torch.optim.Optimizer) -> Iterator[Profile]:
        """Gather the seconds of the optimizer's steps.

        Raises:
            KfactkError: They are being gathered already.
        """
        if self._timer.profile is not None:
            raise KfactkError(
                "this optimizer is being profiled already. Leave the first "
                "`with optimizer.profile()` before another one begins."
            )
        profile = Profile(p.device for group in optimizer.param_groups for p in group["params"])
        self._timer.profile = profile
        hook = optimizer.register_step_pre_hook(lambda *_: profile.enter_step())
        try:
            yield profile
        finally:
            hook.remove()
            self._timer.profile = None

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Take metrics such as the loss for the current step."""
        if self._tracker is not None:
            for name, value in metrics.items():
                self._metrics[name] = value.detach() if isinstance(value, Tensor) else value

    def due(self, step: int) -> bool:
        """Return whether this rank records `step`."""
        answers: list[bool] = []
        if (tracker := self._tracker) is not None:
            _surviving(self._warned, lambda: answers.append(step % tracker.every == 0))
        return any(answers)

    def add_norms(self, pairs: Sequence[GradientPair]) -> None:
        """Record the norms of what goes to the clip.

        The pairs hold full tensors: not every rank records, so a norm must not ask other ranks.
        """
        if self._tracker is not None:
            self._metrics["gradient_norm"] = _norm([pair.gradient for pair in pairs])
            self._metrics["preconditioned_norm"] = _norm([pair.preconditioned for pair in pairs])

    def finish(self, step: int, more: Mapping[str, Tensor | float]) -> dict[str, Any]:
        """End a step, record it if it is due, and return its metrics.

        Args:
            step: Index of the step just taken.
            more: Metrics that are computed for recorded steps only.
        """
        metrics: dict[str, Tensor | float] = {}
        if self.due(step):
            seconds = {f"seconds/{name}": value for name, value in self._timer.seconds.items()}
            metrics = {**self._metrics, **more, **seconds}
            tracker = self._tracker
            assert tracker is not None
            _surviving(self._warned, lambda: tracker.record(step, metrics))
        if self._timer.profile is not None:
            self._timer.profile.leave_step()
        self.discard()
        return dict(metrics)

    def discard(self) -> None:
        """Drop what was gathered in the current step."""
        self._timer.seconds.clear()
        self._metrics.clear()

    def close(self) -> None:
        """Flush and close the tracker; may be called twice."""
        if self._finalizer is not None:
            self._finalizer()


def _own(tracker: Tracker | None) -> Tracker | None:
    """Return a tracker for one run: a recipe may be bound many times."""
    if tracker is not None and attrs.has(type(tracker)):
        return attrs.evolve(tracker)  # type: ignore[misc]
    return tracker


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    squares = [tensor.square().sum().to(tensors[0].device) for tensor in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device="cpu")


def _surviving(
    warned: list[str], call: Callable[[], None], refusals: type[Exception] | tuple[()] = ()
) -> None:
    """Call the tracker; warn once where it fails with anything but one of the refusals."""
    try:
        call()
    except refusals:
        raise
    except Exception as error:  # a record is worth less than the run it records
        if not warned:
            warned.append(str(error))
            warnings.warn(
                f"the tracker failed, and training goes on without its records: {error!r}. Check "
                "where it writes (said once)",
                KfactkWarning,
                stacklevel=3,
            )
