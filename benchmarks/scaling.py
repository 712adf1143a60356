"""How the seconds of each stage grow with width, depth, batch and resolution.

A network of 3 x 3 convolutions grows in one dimension at a time. Exponents are fitted by least
squares in logarithms. The sizes alternate, and each step of kfactk follows one of SGD. Stages are
due far more often than in training. A mean step at the setting's periods is computed from the times
of due stages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from benchmarks.race import timed_step
from benchmarks.settings import BASELINE, PERIODS, settings
from benchmarks.tasks import resnet8

OFTEN = {"factor_every": 1, "scale_every": 1, "basis_every": 3}
STAGES = {
    "fisher": "factor_every",
    "factors": "factor_every",
    "scale": "scale_every",
    "basis": "basis_every",
}
"""Stages that are not due at every step, with the period that they follow."""


@attrs.frozen
class Shape:
    """A network and its mini-batch.

    Args:
        width: Number of channels.
        depth: Number of convolutions after the first.
        batch: Number of images.
        side: Height and width of an image.
    """

    width: int = 32
    depth: int = 4
    batch: int = 32
    side: int = 16

    def network(self) -> nn.Module:
        """Return convolutions with BatchNorm, and a linear layer."""
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs in [3] + [self.width] * self.depth:
            layers += [
                nn.Conv2d(inputs, self.width, 3, padding=1, bias=False),
                nn.BatchNorm2d(self.width),
                nn.ReLU(),
            ]
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.width, 10)
        )


DIMENSIONS: dict[str, tuple[int, ...]] = {
    "width": (16, 32, 64, 128),
    "depth": (2, 4, 8, 16),
    "batch": (16, 32, 64, 128),
    "side": (8, 16, 32, 64),
}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of log seconds over log size, by least squares.

    Example:
        >>> round(exponent([1, 2, 4], [3.0, 24.0, 192.0]), 6)
        3.0
    """
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(taken) for taken in seconds]
    ).slope


def measure(
    shapes: Sequence[Shape], name: str, steps: int, device: torch.device
) -> list[dict[str, float]]:
    """Return median seconds for each shape: of due stages, of SGD's step, and of a mean step.

    The last two have the keys `sgd` and `mean`.
    """
    chosen, task = settings(), resnet8(1)  # the loss of images
    recipe = chosen[name].recipe(**OFTEN)
    periods = {**PERIODS, **(chosen[name].options or {})}
    entries = []
    with contextlib.ExitStack() as stack:
        for shape in shapes:
            data = (
                torch.randn(shape.batch, 3, shape.side, shape.side, device=device),
                torch.randint(10, (shape.batch,), device=device),
            )
            model, plain = shape.network().to(device), shape.network().to(device)
            optimizer = recipe.bind(model)
            entries.append(
                (
                    data,
                    plain,
                    chosen[BASELINE].make(plain),
                    model,
                    optimizer,
                    stack.enter_context(optimizer.profile()),
                )
            )
        plains: list[list[float]] = [[] for _ in shapes]
        for _ in range(steps + 1):
            for (batch, plain, sgd, model, optimizer, _), taken in zip(
                entries, plains, strict=True
            ):
                taken.append(timed_step(task, plain, sgd, batch, "float32"))
                timed_step(task, model, optimizer, batch, "float32")
    found = []
    for (*_, profile), taken in zip(entries, plains, strict=True):
        counted = profile.steps[1:]
        stages = {
            stage: [step[stage] for step in counted if stage in step]
            for stage in profile.seconds
            if stage != "model"
        }
        each = {stage: statistics.median(times) for stage, times in stages.items() if times}
        sgd_step = statistics.median(taken[1:])
        found.append(
            {
                **each,
                "sgd": sgd_step,
                "mean": sgd_step
                + sum(_share(stage, periods) * times for stage, times in each.items()),
            }
        )
    return found


def _share(stage: str, periods: Mapping[str, Any]) -> float:
    """Return how often a stage occurs in a mean step.

    The update counts as 0: the step of SGD already includes one, and it is small.
    """
    return 0.0 if stage == "update" else 1.0 / periods[STAGES[stage]] if stage in STAGES else 1.0


def table(
    dimension: str, sizes: Sequence[int], found: Sequence[Mapping[str, float]]
) -> tuple[list[str], dict[str, float]]:
    """Return a line for each stage, and the exponents."""
    names = [name for name in found[0] if name not in ("sgd", "mean")]
    rows = {
        "step of SGD": [each["sgd"] for each in found],
        **{name: [each[name] for each in found] for name in names},
    }
    exponents = {name: exponent(sizes, taken) for name, taken in rows.items()}
    lines = [
        f"{f'{dimension}, ms when due':24}"
        + "".join(f"{size:10}" for size in sizes)
        + f"{'exponent':>10}"
    ]
    for name, taken in rows.items():
        lines.append(
            f"{name:24}"
            + "".join(f"{1e3 * seconds:10.2f}" for seconds in taken)
            + f"{exponents[name]:10.2f}"
        )
    lines.append(
        f"{'mean step, x SGD':24}"
        + "".join(f"{each['mean'] / each['sgd']:10.2f}" for each in found)
    )
    return lines, exponents


def main() -> None:
    """Measure, print tables, and write the results."""
    parser = argparse.ArgumentParser(
        prog="scaling", description="Seconds of stages over width, depth, batch and resolution."
    )
    parser.add_argument(
        "--dimensions", nargs="+", choices=tuple(DIMENSIONS), default=list(DIMENSIONS)
    )
    parser.add_argument(
        "--setting", default="ekfac", help="name of a setting of kfactk in the race"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        help="steps of each size after the first; a basis is due in every third",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--output", type=Path, help="folder to write scaling.json into")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.setting}; otherwise {Shape()}")
    results = {}
    for dimension in arguments.dimensions:
        sizes = DIMENSIONS[dimension]
        shapes = [attrs.evolve(Shape(), **{dimension: size}) for size in sizes]
        found = measure(shapes, arguments.setting, arguments.steps, torch.device(arguments.device))
        lines, exponents = table(dimension, sizes, found)
        print("\n".join(lines) + "\n", flush=True)
        results[dimension] = {"sizes": sizes, "seconds": found, "exponents": exponents}
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "scaling.json").write_text(
            json.dumps(
                {"torch": torch.__version__, "setting": arguments.setting, "dimensions": results},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
