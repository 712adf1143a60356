"""The ladder of wide layers: seconds of a step, the worst step, and memory, model by model.

    python -m benchmarks.wide_ladder head mlp vgg --max-side 2048

Seconds are those of the processor, on one thread, so that other processes do not count. The first
step does everything that is due at once, and is shown apart. Peak memory is that of the process,
data and model included; each model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import kfactk

MODELS: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "line": ("Linear(64, 8000)", lambda: nn.Linear(64, 8000), 64),
    "head": ("head 768 -> 50257", lambda: nn.Linear(768, 50257, bias=False), 768),
    "mlp": (
        "MLP 4096 -> 14336 -> 4096",
        lambda: nn.Sequential(nn.Linear(4096, 14336), nn.GELU(), nn.Linear(14336, 4096)),
        4096,
    ),
    "vgg": ("VGG-16's 25088 -> 4096", lambda: nn.Linear(25088, 4096), 25088),
}
"""By name: a title, what makes the model, and the width of its input."""
TITLES = ("model", "median s", "worst s", "worst/median", "first s", "peak GB")
PERIODS = {"factor_every": 5, "scale_every": 5, "basis_every": 10}
MOST = 3.0
"""A step that takes this many times the median or more is told."""


def recipe_of(max_side: int | str | None, wide: str, basis: str) -> kfactk.Recipe:
    """Return the recipe of the ladder."""
    curvature = {"name": "kfac", "max_side": max_side, "wide": wide}
    return kfactk.build(curvature=curvature, basis=basis, stagger=True, update="sgd", **PERIODS)


def seconds_of(model: nn.Module, width: int, recipe: kfactk.Recipe, steps: int) -> list[float]:
    """Return the seconds of each step, forward and backward included."""
    optimizer = recipe.bind(model)
    classes = int(model(torch.zeros(1, width)).shape[1])
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, width, generator=generator)
        labels = torch.randint(classes, (16,), generator=generator)
        start = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        found.append(time.process_time() - start)
    return found


def row(name: str, seconds: list[float], peak: float) -> str:
    """Return the row of a model in the table; a worst step of `MOST` medians or more is told."""
    first, *later = seconds
    median, worst = statistics.median(later), max(later)
    ratio = f"{worst / median:.2f}" + (f": not below {MOST:g}" if worst >= MOST * median else "")
    numbers = (f"{median:.3g}", f"{worst:.3g}", ratio, f"{first:.3g}")
    return " | ".join(("", MODELS[name][0], *numbers, f"{peak:.1f}", "")).strip()


def _longest(text: str) -> int | str:
    return text if text == "auto" else int(text)


def main() -> None:
    """Print the table, one row a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--max-side", type=_longest, default="auto", help="a number, or auto")
    parser.add_argument("--wide", default="diagonal")
    parser.add_argument("--basis", default="ekfac")
    parser.add_argument("--steps", type=int, default=21)
    arguments = parser.parse_args()
    if len(arguments.models) > 1:
        print(f"| {' | '.join(TITLES)} |\n|{' --- |' * len(TITLES)}", flush=True)
        for name in arguments.models:
            options = [f"--max-side={arguments.max_side}", f"--wide={arguments.wide}"]
            options += [f"--basis={arguments.basis}", f"--steps={arguments.steps}"]
            subprocess.run(
                [sys.executable, "-m", "benchmarks.wide_ladder", name, *options], check=True
            )
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", kfactk.KfactkWarning)
    [name] = arguments.models
    _, make, width = MODELS[name]
    recipe = recipe_of(arguments.max_side, arguments.wide, arguments.basis)
    seconds = seconds_of(make(), width, recipe, arguments.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(row(name, seconds, peak), flush=True)


if __name__ == "__main__":
    main()
