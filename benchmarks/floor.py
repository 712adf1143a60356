"""The least time of a setting's curvature here: its arithmetic and its decompositions.

The arithmetic runs at the rate of a large matrix product. The cost model of
`python -m kfactk plan` counts the FLOPs of each part of a step, from shapes. Its machine has free
memory and launches, and convolutions as fast as matrix products. Decompositions take their measured
time.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

import kfactk
from benchmarks.settings import Setting
from kfactk.costmodel.cost import TrainingLoad, cost
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.costmodel.hardware import CPU, Curve, Machine

STAGES = {
    "Fisher pass": "fisher",
    "factors": "factors",
    "scale": "scale",
    "decomposition": "basis",
    "preconditioning": "precondition",
}
"""Parts of the cost model, and the stages that a profile tells apart."""
SOLVERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "eigh": torch.linalg.eigh,
    "cholesky": torch.linalg.cholesky,
}


@attrs.frozen
class Floor:
    """Least times, in seconds.

    Args:
        mean: Curvature in a mean step, by stage.
        worst: Curvature in the most expensive step.
        model: Forward and backward, which a step of SGD has too.
    """

    mean: Mapping[str, float]
    worst: float
    model: float

    def ratio(self, base: float) -> float:
        """Return a mean step relative to the baseline's, if the rest takes the baseline's time.

        Args:
            base: Seconds of the baseline's step.

        Example:
            >>> Floor({"fisher": 0.1, "precondition": 0.3}, 1.0, 0.5).ratio(2.0)
            1.2
        """
        return 1.0 + sum(self.mean.values()) / base

    def worst_ratio(self, base: float, median: float) -> float:
        """Return the most expensive step relative to a median, with the rest as in `ratio`.

        Args:
            base: Seconds of the baseline's step.
            median: Seconds of the median step of the setting.

        Example:
            >>> Floor({"fisher": 0.1, "precondition": 0.3}, 1.0, 0.5).worst_ratio(2.0, 2.5)
            1.2
        """
        return (base + self.worst) / median


def median_seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median seconds of a run, after one that is not counted."""
    return statistics.median([seconds(run, device) for _ in range(repeats + 1)][1:])


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run, until the device has finished it.

    Work on other streams, such as decompositions with a lag, is not waited for.
    """
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until a device has finished the work of the current stream."""
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()


@attrs.frozen
class Product:
    """A large matrix product, whose rate is measured.

    Args:
        precision: Name of its dtype.
        device: Where it runs.
    """

    precision: str
    device: torch.device
    _operands: tuple[torch.Tensor, torch.Tensor] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        one, other = (
            torch.randn(self.side, self.side, device=self.device).to(getattr(torch, self.precision))
            for _ in range(2)
        )
        object.__setattr__(self, "_operands", (one, other))

    @property
    def side(self) -> int:
        """Side of its square matrices."""
        return 1024 if self.device.type == "cpu" else 8192

    def seconds(self) -> float:
        """Return the seconds of one product."""
        one, other = self._operands
        return seconds(lambda: one @ other, self.device)

    def rate(self, taken: Sequence[float]) -> float:
        """Return FLOPs per second, for the median of these times."""
        return 2 * self.side**3 / statistics.median(taken)


def sides(jobs: Iterable[TrainingLoad]) -> dict[str, list[int]]:
    """Return, for each solver, the sides of the matrices that these jobs decompose."""
    found: dict[str, set[int]] = {}
    for job in jobs:
        for work in job.workload.works:
            if solver := job.layers[work.layer].solver:
                found.setdefault(solver, set()).update(
                    shape[-1] for shape in work.matrices.values() if len(shape) > 1
                )
    return {solver: sorted(each) for solver, each in found.items()}


def solving(
    device: torch.device, wanted: Mapping[str, Sequence[int]], repeats: int = 3
) -> dict[str, Curve]:
    """Measure the seconds to decompose one matrix of each of these sides, by solver."""
    found = {}
    for solver, each in wanted.items():
        points = []
        for n in each:
            rows = torch.randn(2 * n, n, device=device)
            matrix = rows.T @ rows / n + torch.eye(n, device=device)
            run = SOLVERS[solver]
            points.append(
                (
                    n,
                    median_seconds(
                        lambda run=run, matrix=matrix: run(matrix),
                        repeats if n < 1000 else 1,
                        device,
                    ),
                )
            )  # type: ignore[misc]
        found[solver] = Curve(tuple(points))
    return found


def ideal(rate: float, solvers: Mapping[str, Curve]) -> Machine:
    """Return a machine where only arithmetic and decompositions take time."""
    free = math.inf
    return attrs.evolve(
        CPU,
        name="floor",
        products={"float32": rate},
        convolutions=1.0,
        triangular=1.0,
        bandwidth=free,
        launch=0.0,
        solvers={**CPU.solvers, **solvers},
    )


def job(setting: Setting, model: nn.Module, shape: str, batch: int) -> TrainingLoad:
    """Return the job of a setting on mini-batches of so many examples of this shape."""
    return training_load(
        copy.deepcopy(model).to("meta"), setting.recipe(), meta_batch(shape, batch)
    )


def floor_of(found: TrainingLoad, recipe: kfactk.Recipe, machine: Machine) -> Floor:
    """Return the least times of one rank's steps."""
    costs = cost(found, recipe.placement.assign(found.workload, 1), 1, machine)
    mean = {stage: costs.compute[part].mean for part, stage in STAGES.items()}
    model = costs.compute["forward and backward"].mean
    return Floor(mean, costs.worst - model - costs.compute["update"].mean, model)


def floors(
    settings: Mapping[str, Setting],
    model: nn.Module,
    shape: str,
    batch: int,
    speed: Mapping[str, float],
    device: torch.device,
) -> dict[str, Floor]:
    """Return the least times of kfactk's settings, by name.

    Args:
        settings: All settings, by name.
        model: The model that they train.
        shape: Shape of one example, in the form of `kfactk plan`.
        batch: Examples in a mini-batch.
        speed: FLOPs per second of a large matrix product, by precision.
        device: Where the decompositions are measured.
    """
    mine = {name: setting for name, setting in settings.items() if setting.options is not None}
    jobs = {name: job(setting, model, shape, batch) for name, setting in mine.items()}
    solvers = solving(device, sides(jobs.values()))
    machines = {precision: ideal(rate, solvers) for precision, rate in speed.items()}
    return {
        name: floor_of(jobs[name], setting.recipe(), machines[setting.precision])
        for name, setting in mine.items()
    }
