"""`Profile`: where the seconds of training steps go, stage by stage, for whoever asks, with no tracker."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch

MODEL, REST = "model", "rest"
"""What is no stage's: between steps, forward, backward and whatever else the loop does; within `step()`, all that remains."""


class Profile:
    """Seconds of each step by stage, gathered by `optimizer.profile()`; prints as a table.

    A step reaches from the end of the one before (the first from where profiling began) to its own end, and is divided without remainder:

        whole = model + fisher + factors + scale + basis + precondition + clip + update + rest

    `model` is what the loop does outside of `step()`, the Fisher pass apart: forward, backward, loading data. A closure runs inside of
    `step()`, and counts as `rest`. What a stage does inside another's block counts once, for itself. A step that fails is part of the next.
    Where the parameters are on an accelerator, it is waited for at both ends of each block, so that the seconds are those of the work and
    not of its launches: a profiled step is a little slower than others there.

    Args:
        devices: Those of the parameters.
        clock: Tells seconds.

    Example:
        >>> import kfactk, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = kfactk.build(factor_every=2, scale_every=2).bind(model)
        >>> with optimizer.profile() as profile:
        ...     for _ in range(3):
        ...         torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,))).backward()
        ...         optimizer.step()
        >>> profile.counts["fisher"], profile.counts["basis"], profile.counts["update"]
        (2, 1, 3)
        >>> sum(profile.seconds.values()) <= profile.whole * (1 + 1e-9)
        True
        >>> print(str(profile).splitlines()[0].split())
        ['3', 'steps', 'mean,', 'ms', 'share', 'ran', 'in', 'worst,', 'ms']
    """

    def __init__(
        self, devices: Iterable[torch.device] = (), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._devices = tuple(
            sorted({device for device in devices if device.type not in ("cpu", "meta")}, key=str)
        )
        self._clock = clock
        self._steps: list[Mapping[str, float]] = []
        self._stages: dict[str, float] = {}
        self._mark, self._model = self.now(), 0.0

    @property
    def steps(self) -> tuple[Mapping[str, float], ...]:
        """Seconds by stage of each step, of the stages that ran in it."""
        return tuple(self._steps)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, all steps together, in the order in which they first began; `model` and `rest` stand last."""
        found: dict[str, float] = {}
        for step in self._steps:
            for stage, taken in step.items():
                found[stage] = found.get(stage, 0.0) + taken
        return {
            stage: found[stage] for stage in sorted(found, key=lambda stage: stage in (MODEL, REST))
        }

    @property
    def counts(self) -> dict[str, int]:
        """By stage, the number of steps in which it ran."""
        return {stage: sum(stage in step for step in self._steps) for stage in self.seconds}

    @property
    def worst(self) -> dict[str, float]:
        """By stage, its seconds in the step in which it took longest."""
        return {stage: max(step.get(stage, 0.0) for step in self._steps) for stage in self.seconds}

    @property
    def whole(self) -> float:
        """Seconds of all steps."""
        return sum(sum(step.values()) for step in self._steps)

    def now(self) -> float:
        """The time, once the devices have done what they were given."""
        for device in self._devices:
            torch.accelerator.synchronize(device)
        return self._clock()

    def add(self, stage: str, seconds: float) -> None:
        """A stage of the step under way ran for so long."""
        self._stages[stage] = self._stages.get(stage, 0.0) + seconds

    def enter(self) -> None:
        """`step()` begins."""
        self._model = max(0.0, self.now() - self._mark - sum(self._stages.values()))

    def leave(self) -> None:
        """`step()` ends."""
        end = self.now()
        rest = max(0.0, end - self._mark - self._model - sum(self._stages.values()))
        self._steps.append({**self._stages, MODEL: self._model, REST: rest})
        self._mark, self._model, self._stages = end, 0.0, {}

    def __str__(self) -> str:
        """Rows of stages: milliseconds of a mean step, their share of it, in how many steps the stage ran, and its worst step."""
        steps, whole = len(self._steps), self.whole
        if not steps:
            return "no steps"
        counts, worst = self.counts, self.worst
        lines = [f"{f'{steps} steps':16}{'mean, ms':>12}{'share':>9}{'ran in':>9}{'worst, ms':>12}"]
        for stage, taken in self.seconds.items():
            share = taken / whole if whole else 0.0
            lines.append(
                f"{stage:16}{1e3 * taken / steps:12.3f}{share:9.1%}{counts[stage]:9}{1e3 * worst[stage]:12.3f}"
            )
        longest = [sum(step.values()) for step in self._steps]
        median = f"median {1e3 * statistics.median(longest):.3f} ms"
        lines.append(
            f"{'step':16}{1e3 * whole / steps:12.3f}{1:9.1%}{steps:9}{1e3 * max(longest):12.3f}  {median}"
        )
        return "\n".join(lines)
