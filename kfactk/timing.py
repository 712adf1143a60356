"""Seconds of the stages of a step: for trackers, and for whoever profiles training."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import attrs
import torch

MODEL, REST = "model", "rest"
"""What belongs to no stage: everything outside `step()`, and what remains inside it."""
IDLE = contextlib.nullcontext()


@attrs.frozen
class SolverRates:
    """Rates of a device, from which the seconds of decompositions are estimated.

    They are the latency of n dependent columns, the memory traffic of `n^3/3` numbers, and the
    products.

    Args:
        column: Seconds of launches and synchronisation for one column.
        bandwidth: Bytes a second.
        rate: FLOP/s in float32.

    Example:
        >>> SOLVER_RATES["cpu"].seconds("eigh", 8192) > 60
        True
    """

    column: float
    bandwidth: float
    rate: float

    def seconds(self, solver: str, n: int) -> float:
        """Return the seconds of "eigh" or "cholesky" for a side of n."""
        if solver == "cholesky":
            return n * self.column / 32 + n**3 / 3 / (self.rate / 4)
        return n * self.column + 4 * n**3 / 3 / self.bandwidth + 10 / 3 * n**3 / self.rate


SOLVER_RATES: Mapping[str, SolverRates] = MappingProxyType(
    {
        "cpu": SolverRates(10e-6, 0.5 * 20e9, 0.3 * 64e9),
        "cuda": SolverRates(40e-6, 0.8 * 3.35e12, 0.75 * 67e12),
    }
)
"""One core of a server, and an H100, by the type of the device."""


class Profile:
    """Seconds of each step by stage, gathered by `optimizer.profile()`; prints as a table.

    A step reaches from the end of the one before to its own end. The first step begins where
    profiling begins. A step is divided without remainder:

        whole = model + fisher + factors + scale + basis + precondition + clip + update + rest

    `model` is what the loop does outside `step()`, apart from the Fisher pass: forward, backward,
    loading of data. A closure runs inside `step()` and counts as `rest`. A stage that runs inside
    another stage counts once, for itself. A step that fails is part of the next one. On an
    accelerator the profile waits for the device at both ends of each stage. The seconds are then
    those of the work, and a profiled step is a little slower than others.

    Args:
        devices: Those of the parameters.

    Example:
        >>> import kfactk, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = kfactk.build(factor_every=2, scale_every=2).bind(model)
        >>> with optimizer.profile() as profile:
        ...     for _ in range(3):
        ...         x, y = torch.randn(8, 3), torch.randint(2, (8,))
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
        >>> profile.counts["fisher"], profile.counts["basis"], profile.counts["update"]
        (2, 1, 3)
        >>> sum(profile.seconds.values()) <= profile.whole * (1 + 1e-9)
        True
        >>> print(str(profile).splitlines()[0].split())
        ['3', 'steps', 'mean,', 'ms', 'share', 'ran', 'in', 'worst,', 'ms']
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        used = {device for device in devices if device.type not in ("cpu", "meta")}
        self._devices = tuple(sorted(used, key=str))
        self._steps: list[Mapping[str, float]] = []
        self._stages: dict[str, float] = {}
        self._start, self._model = self.now(), 0.0

    @property
    def steps(self) -> tuple[Mapping[str, float], ...]:
        """Seconds by stage of each step, for the stages that ran in it."""
        return tuple(self._steps)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage over all steps, in order of first start; `model` and `rest` are last."""
        found: dict[str, float] = {}
        for step in self._steps:
            for stage, taken in step.items():
                found[stage] = found.get(stage, 0.0) + taken
        order = sorted(found, key=lambda stage: stage in (MODEL, REST))
        return {stage: found[stage] for stage in order}

    @property
    def counts(self) -> dict[str, int]:
        """Number of steps in which each stage ran."""
        return {stage: sum(stage in step for step in self._steps) for stage in self.seconds}

    @property
    def worst(self) -> dict[str, float]:
        """Seconds of each stage in the step in which it took longest."""
        stages = self.seconds
        return {stage: max(step.get(stage, 0.0) for step in self._steps) for stage in stages}

    @property
    def whole(self) -> float:
        """Seconds of all steps."""
        return sum(sum(step.values()) for step in self._steps)

    def now(self) -> float:
        """Wait for the devices and return the time in seconds."""
        for device in self._devices:
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage of the current step."""
        self._stages[stage] = self._stages.get(stage, 0.0) + seconds

    def enter_step(self) -> None:
        """Note that `step()` begins."""
        self._model = max(0.0, self.now() - self._start - sum(self._stages.values()))

    def leave_step(self) -> None:
        """Note that `step()` ends."""
        end = self.now()
        rest = max(0.0, end - self._start - self._model - sum(self._stages.values()))
        self._steps.append({**self._stages, MODEL: self._model, REST: rest})
        self._start, self._model, self._stages = end, 0.0, {}

    def __str__(self) -> str:
        """Return a table: for each stage its mean milliseconds, share, steps and worst step."""
        steps, whole = len(self._steps), self.whole
        if not steps:
            return "no steps"
        counts, worst = self.counts, self.worst
        lines = [f"{f'{steps} steps':16}{'mean, ms':>12}{'share':>9}{'ran in':>9}{'worst, ms':>12}"]
        for stage, taken in self.seconds.items():
            share = taken / whole if whole else 0.0
            lines.append(
                f"{stage:16}{1e3 * taken / steps:12.3f}{share:9.1%}{counts[stage]:9}"
                f"{1e3 * worst[stage]:12.3f}"
            )
        longest = [sum(step.values()) for step in self._steps]
        median = f"median {1e3 * statistics.median(longest):.3f} ms"
        lines.append(
            f"{'step':16}{1e3 * whole / steps:12.3f}{1:9.1%}{steps:9}{1e3 * max(longest):12.3f}"
            f"  {median}"
        )
        return "\n".join(lines)


class StageTimer:
    """Times the stages of the current step, where a tracker or a profile wants to know.

    Args:
        recording: Whether a tracker wants the seconds of each step.
    """

    def __init__(self, recording: bool = False) -> None:
        self.recording = recording
        self.profile: Profile | None = None
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    def timed(self, stage: str) -> contextlib.AbstractContextManager[None]:
        """Return a context that adds its wall-clock seconds to `stage`, without those inside it.

        On an asynchronous device these are the seconds until the work was queued, or, within a
        profile, done.
        """
        return self._timing(stage) if self.recording or self.profile is not None else IDLE

    @contextlib.contextmanager
    def _timing(self, stage: str) -> Iterator[None]:
        profile = self.profile
        if profile is not None:
            profile.add(stage, 0.0)  # keeps stages in the order in which they begin
        start = self._now(profile)
        self._inside.append(0.0)
        try:
            yield
        finally:
            whole = self._now(profile) - start
            own = whole - self._inside.pop()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + own
            if profile is not None:
                profile.add(stage, own)
            if self._inside:
                self._inside[-1] += whole

    @staticmethod
    def _now(profile: Profile | None) -> float:
        return time.perf_counter() if profile is None else profile.now()
