"""One run: an algorithm trains with one seed. It knows nothing of files, MLflow or terminals.

Mini-batches depend on (seed, epoch) alone: a run can resume at any epoch, and processes that share
a batch need not communicate.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfactk
from experiments import algorithms, models
from experiments.algorithms import Collector, Point, means
from experiments.data import Dataset, Examples
from experiments.errors import ExperimentError
from experiments.ranks import Communicator
from experiments.settings import Algorithm, Study
from experiments.store import Epoch
from experiments.tasks import TASKS

SHIFT = 4
"""Largest shift of an augmented image, in pixels."""
RECORD_EVERY = 10
"""Steps between records of the metrics of second-order stages."""


class Trainer:
    """A run in progress.

    Args:
        study: The settings.
        algorithm: The algorithm.
        seed: Seed of initial weights, order of examples and draws of the Fisher pass.
        dataset: The examples, on `device`.
        device: Device of this process.
        ranks: The processes that share the run; each has a trainer.
    """

    def __init__(
        self,
        study: Study,
        algorithm: Algorithm,
        seed: int,
        dataset: Dataset,
        device: torch.device,
        ranks: Communicator | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self._ranks = ranks = Communicator() if ranks is None else ranks
        self._training, self._seed = study.training, seed
        self._augment = study.data.augment
        if self._augment and dataset.train.inputs.ndim != 4:
            raise ExperimentError("data.augment shifts and mirrors images; these are none")
        if not steps(study, dataset, ranks.size):
            raise ExperimentError(f"{len(dataset.train)} training examples make no batch")
        self._dataset, self._device = dataset, device
        self._task = TASKS[study.training.loss]
        found = self._task.normalisation(dataset)
        self._normalisation = None if found is None else [value.to(device) for value in found]
        model = models.make(
            study.model,
            channels=dataset.train.inputs.shape[1],
            classes=self._task.outputs(dataset),
            seed=seed,
            trusted=study.trusted,
        )
        if ranks.size > 1:
            _share_batch_norms(model, algorithm)
        self.model = model.to(device)
        self._shared = ranks.wrap(self.model, device)
        self._collector = Collector(RECORD_EVERY)
        self.optimizer = algorithms.make(
            algorithm, self.model, seed=seed, collector=self._collector
        )
        self.points: list[Point] = []
        self.history: list[Epoch] = []
        self._steps = 0
        self._scheduler = None
        if study.training.schedule == "cosine":
            self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
                self.optimizer, T_max=steps(study, dataset, ranks.size)
            )
        self._random = self._random_state()

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last epoch is not finite."""
        return bool(self.history) and not math.isfinite(self.history[-1].train_loss)

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        limit = self._training.max_steps
        return (
            len(self.history) >= self._training.epochs or self.diverged or 0 < limit <= self._steps
        )

    def run_epoch(self) -> Epoch:
        """Train for one epoch, then test; `points` are then the recorded steps of the epoch."""
        self._set_random_state(self._random)  # other runs may take turns in this process
        self.model.train()
        sums, losses, clock = [], [], _Clock(self._device)
        order = shuffled(
            self._dataset.train,
            self._training.batch_size,
            seed=self._seed,
            epoch=len(self.history),
            parts=self._training.parts,
            augment=self._augment,
            rank=self._ranks.rank,
            ranks=self._ranks.size,
        )
        for inputs, labels in order:
            row, lost = self._step(inputs, labels)
            sums.append(row)
            self._steps += 1
            clock.tick()
            if lost or self._steps == self._training.max_steps:
                break
        times = clock.seconds()
        table = self._ranks.sum(torch.stack(sums))
        losses = (table[:, 0] / table[:, 2]).tolist()
        loss, right, count = table.sum(0).tolist()
        self.points = self._collector.take()
        test_loss, test_accuracy = self._test()
        epoch = Epoch(
            epoch=len(self.history) + 1,
            steps=len(losses),
            seconds=sum(times),
            train_loss=loss / count,
            train_accuracy=self._accuracy(right, count),
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            losses=tuple(losses),
            times=tuple(times),
            curvature=means(self.points),
        )
        self.history.append(epoch)
        self._random = self._random_state()
        return epoch

    def _step(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, bool]:
        """Take a step; return its sums, and whether the optimizer has given up a lost run."""
        inputs = self._normalised(inputs)
        found: list[tuple[Tensor, Tensor]] = []

        def evaluate() -> Tensor:
            self.optimizer.zero_grad()
            found.append(self._task.measure(self._shared(inputs), inputs, labels))
            found[-1][0].backward()
            return found[-1][0]

        controlled = (
            isinstance(self.optimizer, kfactk.Optimizer)
            and self.optimizer.recipe.controller is not None
        )
        if not controlled:
            evaluate()
        lost = False
        try:
            # A controller evaluates the loss itself, some steps twice; the first one counts.
            self.optimizer.step(evaluate if controlled else None)
        except kfactk.KfactkError:
            if not found:
                raise
            loss, sums = found[0]
            lost = not loss.item() < self._task.lost
            if not lost:
                raise
            sums[0] = math.nan
        if self._scheduler is not None:
            self._scheduler.step()
        return found[0][1], lost

    @torch.no_grad()
    def _test(self) -> tuple[float, float | None]:
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        test, size = self._dataset.test, self._training.test_batch_size
        if most := self._training.max_steps * size:  # of all classes, also where these are sorted
            test = test[:: max(1, len(test) // most)][:most]
        for i in range(-(-len(test) // size)):
            if i % self._ranks.size != self._ranks.rank:
                continue
            part = test[i * size : (i + 1) * size]
            inputs = self._normalised(part.inputs)
            sums += self._task.measure(self.model(inputs), inputs, part.labels)[1]
        loss, right, count = self._ranks.sum(sums).tolist()
        return loss / count, self._accuracy(right, count)

    def _accuracy(self, right: float, count: float) -> float | None:
        return 100 * right / count if self._task.has_accuracy else None

    def _normalised(self, inputs: Tensor) -> Tensor:
        if self._normalisation is None:
            return inputs
        mean, deviation = self._normalisation
        return (inputs.float() - mean) / deviation

    def _random_state(self) -> dict[str, Any]:
        gpu = self._device.type == "cuda"
        return {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(self._device)] if gpu else [],
            "python": random.getstate(),
        }

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"][0], self._device)
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to continue bit for bit.

        All processes must call it; the state of the first one is complete.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": algorithms.full_state(self.optimizer),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "random": self._random,
            "steps": self._steps,
            "history": [attrs.asdict(epoch) for epoch in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        self._set_random_state(state["random"])
        self._random = state["random"]
        self._steps = state["steps"]
        self.history = [Epoch(**epoch) for epoch in state["history"]]

    def close(self) -> None:
        """Remove the optimizer's hooks."""
        algorithms.close(self.optimizer)


class _Clock:
    """The seconds of consecutive steps; on a GPU, measured by the GPU without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks = [self._now()]

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def tick(self) -> None:
        self._marks.append(self._now())

    def seconds(self) -> list[float]:
        pairs = itertools.pairwise(self._marks)
        if not self._gpu:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


def steps(study: Study, dataset: Dataset, ranks: int = 1) -> int:
    """Return the number of optimizer steps of one run, shared by `ranks` processes."""
    size, count = study.training.batch_size, len(dataset.train) // study.training.parts
    each = count // size + (count % size // ranks * ranks > 1)
    count = study.training.epochs * each
    return min(count, study.training.max_steps or count)


def shuffled(
    examples: Examples,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augment: bool,
    parts: int = 1,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the examples of an epoch in random order; each process gets an equal part of a batch.

    The epochs of a pass have no example in common. Examples of the last batch that cannot be
    divided equally are left out. So is a last batch of one example, since BatchNorm cannot learn
    from it.

    Args:
        examples: All examples.
        batch_size: Examples in all parts of a batch; a multiple of `ranks`.
        seed: Seed of the run.
        epoch: Index of the epoch.
        augment: Whether to shift and mirror images.
        parts: Epochs of a pass.
        rank: Index of this process.
        ranks: Number of processes.
    """
    turn, number = divmod(epoch, parts)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    order = torch.randperm(len(examples), generator=generator)
    size = len(examples) // parts
    order = order[number * size : (number + 1) * size]
    if augment and parts > 1:
        generator.manual_seed(seed * 1_000_003 + epoch)
    for index in order.split(batch_size):
        each = len(index) // ranks
        if each * ranks < 2:
            continue
        part = slice(rank * each, (rank + 1) * each)
        chosen = index[part].to(examples.inputs.device)
        inputs = examples.inputs[chosen]
        if augment:
            moves = draw_moves(len(index), generator)
            inputs = apply_moves(inputs, *(draws[:, part] for draws in moves))
        yield inputs, examples.labels[chosen]


def draw_moves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw offsets from 0 to twice `SHIFT`, `[2, N]`, and whether to mirror each image, `[1, N]`.

    Args:
        count: Number N of images.
        generator: On the CPU, so that every device draws the same.
    """
    offsets = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)[..., 0]
    return offsets, torch.randint(0, 2, (count, 1), generator=generator).bool().T


def apply_moves(pixels: Tensor, offsets: Tensor, mirror: Tensor) -> Tensor:
    """Shift images `[N, C, H, W]` by up to `SHIFT` pixels, zeros moving in, and mirror them.

    Args:
        pixels: The images.
        offsets: As `draw_moves` returns.
        mirror: As `draw_moves` returns.
    """
    count, _, height, width = pixels.shape
    offsets, mirror = offsets[..., None].to(pixels.device), mirror[0, :, None].to(pixels.device)
    rows = torch.arange(height, device=pixels.device) + offsets[0]
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(mirror, columns.flip(0), columns) + offsets[1]
    padded = functional.pad(pixels, (SHIFT, SHIFT, SHIFT, SHIFT))
    example = torch.arange(count, device=pixels.device)
    return (
        padded[example[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def _share_batch_norms(model: nn.Module, algorithm: Algorithm) -> None:
    """Share statistics between the processes.

    Raises:
        ExperimentError: The algorithm would leave out parameters that it has in one process.
    """
    before = algorithms.covered(algorithm, model)
    models.share_batch_norms(model)
    if lost := before - algorithms.covered(algorithm, model):
        raise ExperimentError(
            f"algorithms.{algorithm.name}: in several processes BatchNorm has the statistics of "
            f"all, which no curvature sees: {len(lost)} parameters would be left out, such as "
            f"{min(lost)}. Run it in one process, or leave norm out of its curvature"
        )
