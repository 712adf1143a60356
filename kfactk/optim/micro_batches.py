"""`MicroBatches`: the forwards that count in a step, and what each is measured for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from kfactk.capture.fisher_pass import FisherPass
from kfactk.capture.forward import Forward
from kfactk.errors import CaptureError, KfactkWarning
from kfactk.optim.control import Control
from kfactk.timing import StageTimer

MANY_FORWARDS = 100
"""After so many forwards without a step there is a warning."""


class MicroBatches:
    """The forwards of one step: each is measured, in its turn.

    Args:
        fisher_pass: Measures curvature.
        control: What a controller does with the steps; `None` without one.
        timer: Times the stages.
        manual: Whether forwards wait for `observe`.
    """

    def __init__(
        self, fisher_pass: FisherPass, control: Control | None, timer: StageTimer, *, manual: bool
    ) -> None:
        self._fisher_pass, self._control, self._timer = fisher_pass, control, timer
        self._manual = manual
        self._waiting: Forward | None = None
        self.measured = 0
        """Number of forwards measured in this step."""
        self._warned = False

    def take(self, forward: Forward, step: int) -> None:
        """Measure a followed forward, or keep it until `observe` is called.

        Args:
            forward: The forward.
            step: Index of the step.
        """
        if self._manual:
            self._waiting = forward
        else:
            self._measure(forward, {}, step)

    def observe(self, batch: Mapping[str, Any], step: int) -> None:
        """Measure the forward that waits.

        Args:
            batch: What the user gave besides the model's own arguments.
            step: Index of the step.

        Raises:
            CaptureError: None waits.
        """
        forward, self._waiting = self._waiting, None
        if forward is None:
            raise CaptureError(
                "observe() was called, but the model has made no forward since the last step() or "
                "observe() that could count. Call the bound model first."
            )
        self._measure(forward, batch, step)

    def clear(self) -> None:
        """Begin the next step."""
        self._waiting, self.measured = None, 0

    def _measure(self, forward: Forward, batch: Mapping[str, Any], step: int) -> None:
        control = self._control
        if control is not None and control.repeating:
            control.end_forward(forward, batch)
            return
        with self._timer.timed("fisher"):
            self._fisher_pass.run(forward, batch, step=step, micro_batch=self.measured)
        if control is not None:
            control.end_forward(forward, batch)
        self.measured += 1
        if self.measured == MANY_FORWARDS and not self._warned:
            self._warned = True
            warnings.warn(
                f"{MANY_FORWARDS} forwards were counted since the last step(), and what curvature "
                "needs of each is kept until step(): memory grows. If this optimizer is not "
                "stepped, close() it; run forwards that are not for training in evaluation mode "
                "or under torch.no_grad(), or name those that count with observe='manual'. If you "
                "accumulate so many micro-batches, basis={'name': 'ekfac', 'scale': 'running'} "
                "keeps no samples (said once)",
                KfactkWarning,
                stacklevel=2,
            )
