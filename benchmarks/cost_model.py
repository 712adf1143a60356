"""Predicted against measured steps: the cost model of `python -m kfactk plan` on this machine's processors, over gloo.

Each number of ranks is measured by itself: the ranks calibrate, all at once, so that what they take from each other is in the machine's
profile, and then train two small models under each placement. Steps are compared over whole cycles of the periods. The same is done for
plain torch, forward, backward and update, whose error is that of the roofline and none of curvature's.

`--clock processor` measures seconds of the ranks' processors, in calibration and in steps: what a busy machine takes away does not count,
nor does a rank's waiting for others. Wall time is right only on a machine that is idle and has a core for each rank.
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
    """Four convolutions with BatchNorm, and a linear layer."""
    layers: list[nn.Module] = []
    for channels, wider in ((3, 32), (32, 64), (64, 64), (64, 64)):
        layers += [
            nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    """Linear layers whose matrices weigh more than their rows."""
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
    """Self-attention and a perceptron, of linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[N, T, width]` to the same."""
        asked = (
            self.attend(self.before(hidden))
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        heard = F.scaled_dot_product_attention(asked[0], asked[1], asked[2], is_causal=True)
        hidden = hidden + self.join(heard.transpose(1, 2).flatten(2))
        return hidden + self.narrow(F.gelu(self.widen(self.between(hidden))))


class Transformer(nn.Module):
    """A language model of the shape of GPT-2, by default the small one, head and token embedding apart.

    Args:
        width: Numbers a token.
        depth: Blocks.
        heads: Attention heads.
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
        """Logits of the next token, `[N, T, tokens]`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.place(places))))


MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "convolutions": (convolutions, "3x32x32", 32),
    "perceptron": (perceptron, "256", 64),
}
"""Maker, shape of an example, examples a rank."""


@attrs.frozen
class Result:
    """One model under one placement.

    Args:
        predicted: Seconds of a mean step.
        measured: The same, median over cycles of this rank's mean.
        worst: Seconds predicted of a step in which everything is due.
        measured_worst: The same, measured.
        parts: Seconds predicted of a mean step, by part.
    """

    predicted: float
    measured: float
    worst: float
    measured_worst: float
    parts: Mapping[str, float]


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def measure(rank: int, cycles: int, clock: str) -> tuple[Machine, dict[tuple[str, str], Result]]:
    """On one rank: calibrate, and measure and predict everything."""
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
            seconds = timed(
                model, None if placement == PLAIN else recipe, shape, batch, cycles, CLOCKS[clock]
            )
            found[name, placement] = compared(placement, job, recipe, ranks, machine, seconds)
    return machine, found


def timed(
    model: nn.Module,
    recipe: kfactk.Recipe | None,
    shape: str,
    batch: int,
    cycles: int,
    clock: Callable[[], float],
) -> list[list[float]]:
    """Seconds of each step, by cycle; the first cycle, which warms up, is left out."""
    images, labels = torch.randn(batch, *map(int, shape.split("x"))), torch.randint(10, (batch,))
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        if recipe is None
        else recipe.bind(wrapped)
    )
    taken = []
    for _ in range((cycles + 1) * CYCLE):
        dist.barrier()
        start = clock()
        optimizer.zero_grad()
        F.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()
        taken.append(clock() - start)
    return [taken[n : n + CYCLE] for n in range(CYCLE, len(taken), CYCLE)]


def compared(
    placement: str,
    job: TrainingLoad,
    recipe: kfactk.Recipe,
    ranks: int,
    machine: Machine,
    seconds: list[list[float]],
) -> Result:
    """What was measured beside what the model says."""
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
    """Lines for one number of ranks; a step is as long as its slowest rank's."""
    lines = []
    for key, result in answers[0][1].items():
        mean, worst = (
            max(getattr(found[key], which) for _, found in answers)
            for which in ("measured", "measured_worst")
        )
        error, worst_error = (
            100 * (said / seen - 1)
            for said, seen in ((result.predicted, mean), (result.worst, worst))
        )
        lines.append(
            f"{ranks:5}  {key[0]:13}{key[1]:12}{1e3 * result.predicted:9.1f}{1e3 * mean:10.1f}{error:+8.0f} %"
            f"{1e3 * result.worst:10.1f}{1e3 * worst:10.1f}{worst_error:+8.0f} %"
        )
    return lines


def main() -> None:
    """Measure on 1, 2 and 4 ranks, and print a table."""
    parser = argparse.ArgumentParser(description="Predicted against measured steps.")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks")
    parser.add_argument(
        "--cycles", type=int, default=5, help=f"cycles of {CYCLE} steps each; their median counts"
    )
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="whose seconds are measured"
    )
    parser.add_argument(
        "--parts", action="store_true", help="print what each part is predicted to take, too"
    )
    arguments = parser.parse_args()
    print(
        f"{'ranks':>5}  {'model':13}{'placement':12}{'mean step, ms: said':>20}{'seen':>5}  error   worst, ms: said   seen     error"
    )
    errors = []
    with Workers() as workers:
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
