"""Predicted against measured steps: the cost model of `python -m kfactk plan`, on CPUs over gloo.

For each number of ranks, all ranks calibrate at the same time, so that the profile includes how
they slow each other down. Then they train two small models under each placement. Steps are compared
over whole cycles of the periods. The same comparison for plain torch (forward, backward and update)
shows the error of the roofline alone.

`--clock processor` measures processor seconds in calibration and in steps: other processes, and
waiting for other ranks, then do not count. Wall time is right only on an idle machine with a core
for each rank.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk.costmodel.cost import AVERAGING, TrainingLoad, cost
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.costmodel.hardware import Machine, calibrate
from kfactk.testing._support.ranks import Workers

PERIODS = {"factor_every": 2, "scale_every": 4, "basis_every": 8}
CYCLE = math.lcm(*PERIODS.values())
PLACEMENTS = ("replicated", "comm_opt", "hybrid", "mem_opt", "auto")
PLAIN = "plain torch"


def convolutions() -> nn.Module:
    """Return four convolutions with BatchNorm, and a linear layer."""
    layers: list[nn.Module] = []
    for channels, wider in ((3, 32), (32, 64), (64, 64), (64, 64)):
        layers += [
            nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    """Return linear layers whose matrices are larger than their inputs."""
    return nn.Sequential(
        nn.Linear(256, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


class Block(nn.Module):
    """A transformer block of linear layers: self-attention and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[N, T, width]` to `[N, T, width]`."""
        projected = self.attend(self.before(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.join(attended.transpose(1, 2).flatten(2))
        return hidden + self.narrow(F.gelu(self.widen(self.between(hidden))))


class Transformer(nn.Module):
    """A language model of the shape of GPT-2, by default the small one, with an untied head.

    Args:
        width: Features of a token.
        depth: Number of blocks.
        heads: Number of attention heads.
        tokens: Size of the vocabulary.
        length: Longest sequence.
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        tokens: int = 50257,
        length: int = 1024,
    ) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token, `[N, T, tokens]`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.place(places))))


_REDUCED = {"name": "conv_kfac", "spatial": "reduce"}
_OFTEN = {"name": "quadratic", "adapt_every": 2, "search_every": 4}
_CONTROLLED = {
    "basis": {"name": "kfac", "solver": "eigh"},
    "update": "velocity",
    "controller": _OFTEN,
}
ADDED: Mapping[str, dict[str, Any]] = {
    "kfac": {"basis": "kfac"},
    "inverse": {"basis": {"name": "kfac", "solver": "inverse"}},
    "two_level": {"link": "two_level"},
    "block_tridiagonal": {"curvature": _REDUCED, "basis": "kfac", "link": "block_tridiagonal"},
    "controller": _CONTROLLED,
    "both": {**_CONTROLLED, "curvature": _REDUCED, "link": "block_tridiagonal"},
    "lag": {"lag": 3, "clip": "none"},
}
"""Recipes with what sees several layers or the step, on one rank."""
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "convolutions": (convolutions, "3x32x32", 32),
    "perceptron": (perceptron, "256", 64),
}
"""Maker, shape of an example, and examples on each rank."""


@attrs.frozen
class Result:
    """One model under one placement.

    Args:
        predicted: Predicted seconds of a mean step.
        measured: Measured seconds: the median over cycles of this rank's mean.
        worst: Predicted seconds of a step where everything is due.
        measured_worst: Measured seconds of such a step.
        parts: Predicted seconds of a mean step, by part.
    """

    predicted: float
    measured: float
    worst: float
    measured_worst: float
    parts: Mapping[str, float]


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def measure(rank: int, cycles: int, clock: str) -> tuple[Machine, dict[tuple[str, str], Result]]:
    """Calibrate on one rank, and measure and predict everything."""
    machine, ranks = calibrate(clock=CLOCKS[clock]), dist.get_world_size()
    found = {}
    for name, (make, shape, batch) in MODELS.items():
        for placement in (PLAIN, *PLACEMENTS):
            torch.manual_seed(0)
            model = make()
            recipe = kfactk.build(
                placement="replicated" if placement == PLAIN else placement,
                update="momentum",
                **PERIODS,
            )
            job = training_load(copy.deepcopy(model).to("meta"), recipe, meta_batch(shape, batch))
            seconds = time_steps(
                model, None if placement == PLAIN else recipe, shape, batch, cycles, CLOCKS[clock]
            )
            found[name, placement] = compare(placement, job, recipe, ranks, machine, seconds)
    return machine, found


def measure_added(rank: int, cycles: int, clock: str) -> dict[tuple[str, str], Result]:
    """Measure and predict the recipes of `ADDED` on one rank."""
    machine = calibrate(clock=CLOCKS[clock])
    found = {}
    for name, (make, shape, batch) in MODELS.items():
        for added, options in ADDED.items():
            torch.manual_seed(0)
            model = make()
            recipe = kfactk.build(**{"update": "momentum", **PERIODS, **options})
            job = training_load(copy.deepcopy(model).to("meta"), recipe, meta_batch(shape, batch))
            seconds = time_steps(model, recipe, shape, batch, cycles, CLOCKS[clock])
            found[name, added] = compare(added, job, recipe, 1, machine, seconds)
    return found


def time_steps(
    model: nn.Module,
    recipe: kfactk.Recipe | None,
    shape: str,
    batch: int,
    cycles: int,
    clock: Callable[[], float],
) -> list[list[float]]:
    """Return the seconds of each step, by cycle, without the first cycle."""
    images, labels = torch.randn(batch, *map(int, shape.split("x"))), torch.randint(10, (batch,))
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        if recipe is None
        else recipe.bind(wrapped)
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(images), labels)
        loss.backward()
        return loss

    taken = []
    for _ in range((cycles + 1) * CYCLE):
        dist.barrier()
        start = clock()
        if recipe is not None and recipe.controller is not None:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        taken.append(clock() - start)
    return [taken[n : n + CYCLE] for n in range(CYCLE, len(taken), CYCLE)]


def compare(
    placement: str,
    job: TrainingLoad,
    recipe: kfactk.Recipe,
    ranks: int,
    machine: Machine,
    seconds: list[list[float]],
) -> Result:
    """Return measured and predicted seconds."""
    assignment = recipe.placement.assign(job.workload, ranks)
    costs = cost(job, assignment, ranks, machine)
    parts = {**costs.compute, **costs.communication}
    if placement == PLAIN:
        parts = {name: parts[name] for name in ("forward and backward", "update", AVERAGING)}
    return Result(
        sum(part.mean for part in parts.values()),
        statistics.median(statistics.mean(cycle) for cycle in seconds),
        sum(part.worst for part in parts.values()),
        statistics.median(cycle[0] for cycle in seconds),
        {name: part.mean for name, part in parts.items()},
    )


def table(ranks: int, answers: list[tuple[Machine, dict[Any, Result]]]) -> list[str]:
    """Return lines for one number of ranks; a step is as long as that of the slowest rank."""
    lines = []
    for (model, placement), result in answers[0][1].items():
        line = f"{ranks:5}  {model:13}{placement:12}"
        for predicted, attribute in (
            (result.predicted, "measured"),
            (result.worst, "measured_worst"),
        ):
            measured = max(getattr(found[model, placement], attribute) for _, found in answers)
            error = 100 * (predicted / measured - 1)
            line += f"{1e3 * predicted:10.1f}{1e3 * measured:10.1f}{error:+8.0f} %"
        lines.append(line)
    return lines


def main() -> None:
    """Measure on 1, 2 and 4 ranks, and print a table."""
    parser = argparse.ArgumentParser(description="Predicted against measured steps.")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks")
    parser.add_argument(
        "--cycles", type=int, default=5, help=f"cycles of {CYCLE} steps each; their median counts"
    )
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="clock to use")
    parser.add_argument(
        "--parts", action="store_true", help="also print the predicted seconds of each part"
    )
    parser.add_argument(
        "--added", action="store_true", help="compare links, a controller and a lag, on one rank"
    )
    arguments = parser.parse_args()
    columns = f"{'predicted':>10}{'measured':>10}{'error':>10}" * 2
    print(f"{'':32}{'mean step, ms':>30}{'worst step, ms':>30}")
    print(f"{'ranks':>5}  {'model':13}{'placement':12}{columns}")
    errors = []
    with Workers() as workers:
        if arguments.added:
            answers = workers.run(1, measure_added, arguments.cycles, arguments.clock, patience=900)
            for (model, name), result in answers[0].items():
                error = 100 * (result.predicted / result.measured - 1)
                both = f"{1e3 * result.predicted:10.1f}{1e3 * result.measured:10.1f}"
                print(f"{1:5}  {model:13}{name:18}{both}{error:+8.0f} %")
            return
        for ranks in map(int, arguments.ranks.split(",")):
            answers = workers.run(ranks, measure, arguments.cycles, arguments.clock, patience=900)
            lines = table(ranks, answers)
            print("\n".join(lines), flush=True)
            errors += [abs(float(line.split("%")[0].split()[-1])) for line in lines]
            if arguments.parts:
                for key, result in answers[0][1].items():
                    print(
                        key,
                        {
                            name: f"{1e3 * seconds:.1f}"
                            for name, seconds in result.parts.items()
                            if seconds
                        },
                    )
                print(answers[0][0])
    print(f"mean step: median error {statistics.median(errors):.0f} %, largest {max(errors):.0f} %")


if __name__ == "__main__":
    main()
