"""Training loss against wall-clock at a reference point: ResNet-8, 5,000 images, four epochs.

Contestants alternate in one process, one step each, on the same mini-batches and from the same
weights. One race therefore gives losses and seconds: a rival's loss after its last step can be
compared with ours after the same wall-clock.

Images are a folder with train/CLASS/* and test/CLASS/*, or torchvision's CIFAR-10, downloaded where
it is missing. Of them, seed 0 draws 5,000 training and 2,000 test images, as in `experiments`.
Batches have 64 images; incomplete batches are left out, so an epoch has 78. There is no
augmentation, and the learning rate is constant. A seed sets initial weights, order of images and
draws of the Fisher pass.

Within an epoch the loss of new mini-batches rises, since their images were last seen longer ago; at
the end of the epoch it drops. So there are two means: over 20 steps, and over an epoch, which does
not depend on the position in an epoch. The second one decides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import heap
from benchmarks.contestants import BASELINE, Contestant, due_steps, everyone
from experiments import batches, data, models
from experiments.config import Data

TRAIN, TEST, BATCH, STEPS = 5000, 2000, 64, 312
SMOOTHED, EPOCH = 20, 78
"""Losses are means over the last steps, and over an epoch."""


@attrs.define
class Run:
    """The run of one contestant with one seed.

    Args:
        name: Name of the contestant.
        seed: Seed of the run.
        settings: Settings of the contestant, as text.
        losses: Loss of the mini-batch of each step, before the step.
        seconds: Seconds of each step, with forward and backward.
        accuracy: On the test images, in per cent, after `STEPS` steps.
    """

    name: str
    seed: int
    settings: str
    losses: list[float] = attrs.field(factory=list)
    seconds: list[float] = attrs.field(factory=list)
    accuracy: float = float("nan")

    def loss(self, steps: int, over: int) -> float:
        """Return the mean over the last `over` of the first `steps` steps."""
        return statistics.fmean(self.losses[steps - over : steps])


class Runner:
    """A contestant with its model, its optimizer and the record of its run."""

    def __init__(self, name: str, contestant: Contestant, seed: int, device: torch.device) -> None:
        self.run = Run(name, seed, contestant.settings)
        self._model = models.make("resnet8", channels=3, classes=10, seed=seed).to(device)
        torch.manual_seed(seed)
        self._optimizer = contestant.make(self._model, seed)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take a timed step on one mini-batch."""
        start = time.perf_counter()
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self._model(images), labels)
        loss.backward()
        self._optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        self.run.seconds.append(time.perf_counter() - start)
        self.run.losses.append(loss.item())

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> None:
        """Record the test accuracy."""
        self._model.eval()
        right = sum(
            int((self._model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
        self._model.train()
        self.run.accuracy = 100 * right / len(labels)


@attrs.frozen(eq=False)
class Task:
    """Normalised images with their labels, on the device.

    Args:
        train: Training images.
        test: Test images.
    """

    train: data.Images
    test: data.Images

    @classmethod
    def load(cls, folder: Path, cache: Path, device: torch.device) -> Task:
        """Read the images; `cache` is a folder for decoded ones."""
        dataset = data.load(Data("cifar10", train=TRAIN, test=TEST), folder, cache, print)
        mean, deviation = dataset.normalisation()
        parts = (dataset.train, dataset.test)
        return cls(
            *(
                data.Images((part.pixels.float() - mean) / deviation, part.labels).to(device)
                for part in parts
            )
        )

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield complete mini-batches, without end."""
        for epoch in itertools.count():
            for images, labels in batches.shuffled(
                self.train, BATCH, seed=seed, epoch=epoch, augment=False
            ):
                if len(labels) == BATCH:
                    yield images, labels


def race(task: Task, contestants: Mapping[str, Contestant], seed: int, steps: int) -> list[Run]:
    """Let contestants train alternately, one step each.

    Args:
        task: The images.
        contestants: By name; the baseline is among them.
        seed: Seed of all runs.
        steps: Steps of each; more than `STEPS`, so that fast contestants can use the time of slow
            ones.
    """
    device = task.train.pixels.device
    runners = [Runner(name, each, seed, device) for name, each in contestants.items()]
    # This one takes the first step, which includes one-time work of the process.
    warmup = Runner(BASELINE, contestants[BASELINE], seed, device)
    for step, (images, labels) in enumerate(itertools.islice(task.batches(seed), steps), start=1):
        if step == 1:
            warmup.step(images, labels)
        if step % 50 == 0:
            print(f"seed {seed}: step {step} of {steps}", file=sys.stderr, flush=True)
        for each in runners:
            each.step(images, labels)
            if step == STEPS:
                each.test(task.test.pixels, task.test.labels)
    return [each.run for each in runners]


def cumulative_seconds(runs: Sequence[Run]) -> list[float]:
    """Return the seconds up to the end of each step; each step counts with its median over runs."""
    return list(
        itertools.accumulate(
            statistics.median(seconds)
            for seconds in zip(*(run.seconds for run in runs), strict=True)
        )
    )


def table(runs: Mapping[str, Sequence[Run]], contestants: Mapping[str, Contestant]) -> str:
    """Return a table of means over seeds after `STEPS` steps, the lowest loss of an epoch first."""
    spent = {name: cumulative_seconds(found) for name, found in runs.items()}
    head = f"{f'after {STEPS} steps':44}{f'last {SMOOTHED}':>9}{'epoch':>8}{'+-':>7}"
    lines = [head + f"{'test acc.':>11}{'wall, x SGD':>13}{'factors/scale/basis due':>25}"]
    for name, found in sorted(runs.items(), key=lambda item: _mean(item[1], STEPS, EPOCH)):
        spread = (
            statistics.stdev(run.loss(STEPS, EPOCH) for run in found)
            if len(found) > 1
            else float("nan")
        )
        accuracy, recipe = statistics.fmean(run.accuracy for run in found), contestants[name].recipe
        due = "/".join(map(str, due_steps(recipe, STEPS).values())) if recipe else ""
        losses = (
            f"{_mean(found, STEPS, SMOOTHED):9.3f}{_mean(found, STEPS, EPOCH):8.3f}{spread:7.3f}"
        )
        relative = spent[name][STEPS - 1] / spent[BASELINE][STEPS - 1]
        lines.append(f"{name:44}{losses}{accuracy:11.1f}{relative:13.2f}{due:>25}")
    return "\n".join(lines)


def duels(runs: Mapping[str, Sequence[Run]], contestants: Mapping[str, Contestant]) -> str:
    """Compare each setting of kfactk with each rival at equal wall-clock; means over seeds.

    The wall-clock is that of the rival for `STEPS` steps.
    """
    spent = {name: cumulative_seconds(found) for name, found in runs.items()}
    lines = [
        f"{'':44}{'our':>7}{f'loss over {SMOOTHED} steps':>24}{'over an epoch':>20}",
        f"{'':44}{'steps':>7}" + f"{'theirs':>15}{'ours':>8}" * 2,
    ]
    for ours in (name for name in runs if contestants[name].recipe is not None):
        lines.append(f"{ours}, at the wall-clock of")
        for rival in (name for name in runs if contestants[name].recipe is None):
            steps = max(EPOCH, sum(seconds <= spent[rival][STEPS - 1] for seconds in spent[ours]))
            # "+": there was time for more steps than the run had.
            short = "+" if steps == len(spent[ours]) else " "
            pairs = [
                (_mean(runs[rival], STEPS, over), _mean(runs[ours], steps, over))
                for over in (SMOOTHED, EPOCH)
            ]
            lines.append(
                f"  {rival:42}{steps:6}{short}"
                + "".join(f"{theirs:15.3f}{mine:8.3f}" for theirs, mine in pairs)
            )
    return "\n".join(lines)


def _mean(runs: Sequence[Run], steps: int, over: int) -> float:
    return statistics.fmean(run.loss(steps, over) for run in runs)


def main() -> None:
    """Race the seeds without results, and print a table of all."""
    parser = argparse.ArgumentParser(
        description="Training loss against wall-clock at the reference point."
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with train/CLASS/* and test/CLASS/*, or torchvision's CIFAR-10",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/reference"),
        help="folder for the results, a file of JSON for each seed",
    )
    parser.add_argument(
        "--steps", type=int, default=480, help=f"steps of each contestant; at least {STEPS}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        help="contestants whose name contains one of these, besides SGD",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    arguments = parser.parse_args()
    if arguments.steps < STEPS:
        parser.error(f"--steps must be at least {STEPS}")
    torch.set_num_threads(arguments.threads)
    heap.keep_freed()
    chosen = {
        n: c
        for n, c in everyone().items()
        if n == BASELINE or not arguments.only or any(part in n for part in arguments.only)
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    task = Task.load(arguments.data, arguments.out / "images", torch.device(arguments.device))
    runs: dict[str, list[Run]] = {name: [] for name in chosen}
    for seed in arguments.seeds:
        path = arguments.out / f"seed-{seed}.json"
        found = [Run(**each) for each in json.loads(path.read_text())] if path.exists() else []
        if {(run.name, run.settings) for run in found} != {
            (name, each.settings) for name, each in chosen.items()
        }:
            found = race(task, chosen, seed, arguments.steps)
            path.write_text(json.dumps([attrs.asdict(run) for run in found]))
        for run in found:
            runs[run.name].append(run)
        print(f"seed {seed}: {path}", flush=True)
    print(table(runs, chosen))
    print(f"\n{duels(runs, chosen)}")


if __name__ == "__main__":
    main()
