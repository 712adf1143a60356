"""One run: an algorithm trains with one seed. It knows nothing of files, MLflow or terminals."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from experiments import algorithms, batches, models, norm
from experiments.collector import Collector, Point, means
from experiments.config import Algorithm, Experiment
from experiments.data import Dataset
from experiments.ranks import Communicator
from experiments.results import Epoch

RECORD_EVERY = 10
"""Steps between records of the metrics of second-order stages."""


class Trainer:
    """A run in progress.

    Args:
        experiment: The settings.
        algorithm: The algorithm.
        seed: Seed of initial weights, order of images and draws of the Fisher pass.
        dataset: The images, on `device`.
        device: Device of this process.
        ranks: The processes that share the run; each has a trainer.
    """

    def __init__(
        self,
        experiment: Experiment,
        algorithm: Algorithm,
        seed: int,
        dataset: Dataset,
        device: torch.device,
        ranks: Communicator | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self._ranks = ranks = Communicator() if ranks is None else ranks
        self._training, self._augment = experiment.training, experiment.data.augment
        self._seed = seed
        self._dataset, self._device = dataset, device
        self._mean, self._deviation = (value.to(device) for value in dataset.normalisation())
        channels = dataset.train.pixels.shape[1]
        model = models.make(
            experiment.model.name, channels=channels, classes=len(dataset.classes), seed=seed
        )
        if ranks.size > 1:
            norm.share_batch_norms(model)
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
        if experiment.training.schedule == "cosine":
            self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
                self.optimizer, T_max=steps(experiment, dataset, ranks.size)
            )

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last epoch is not finite."""
        return bool(self.history) and not math.isfinite(self.history[-1].train_loss)

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        limit = self._training.max_steps
        return (
            len(self.history) >= self._training.epochs
            or self.diverged
            or (limit is not None and self._steps >= limit)
        )

    def run_epoch(self, on_step: Callable[[], None]) -> Epoch:
        """Train for one epoch, then test; `points` are then the recorded steps of the epoch.

        Args:
            on_step: Called after every step.
        """
        self.model.train()
        before, started = self._steps, time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        order = batches.shuffled(
            self._dataset.train,
            self._training.batch_size,
            seed=self._seed,
            epoch=len(self.history),
            augment=self._augment,
            rank=self._ranks.rank,
            ranks=self._ranks.size,
        )
        for pixels, labels in order:
            sums += self._step(pixels, labels)
            self._steps += 1
            on_step()
            if self._steps == self._training.max_steps:
                break
        # This waits for the device, so the time below includes all work.
        loss, right, count = self._ranks.sum(sums).tolist()
        seconds = time.perf_counter() - started
        self.points = self._collector.take()
        test_loss, test_accuracy = self._test()
        epoch = Epoch(
            epoch=len(self.history) + 1,
            steps=self._steps - before,
            seconds=seconds,
            train_loss=loss / count,
            train_accuracy=100 * right / count,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            curvature=means(self.points),
        )
        self.history.append(epoch)
        return epoch

    def _step(self, pixels: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        logits = self._shared(self._normalised(pixels))
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        return _sums(logits.detach(), labels, loss.detach() * len(labels))

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for i, (pixels, labels) in enumerate(
            batches.in_sequence(self._dataset.test, self._training.test_batch_size)
        ):
            if i == self._training.max_steps:
                break
            if i % self._ranks.size != self._ranks.rank:
                continue
            logits = self.model(self._normalised(pixels))
            sums += _sums(logits, labels, functional.cross_entropy(logits, labels, reduction="sum"))
        loss, right, count = self._ranks.sum(sums).tolist()
        return loss / count, 100 * right / count

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self._mean) / self._deviation

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to continue bit for bit.

        All processes must call it; the state of the first one is complete.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": algorithms.full_state(self.optimizer),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": [torch.cuda.get_rng_state(self._device)]
                if self._device.type == "cuda"
                else [],
                "python": random.getstate(),
            },
            "steps": self._steps,
            "history": [attrs.asdict(epoch) for epoch in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"]["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"][0], self._device)
        version, numbers, gauss = state["random"]["python"]
        random.setstate((version, tuple(numbers), gauss))
        self._steps = state["steps"]
        self.history = [Epoch(**epoch) for epoch in state["history"]]

    def close(self) -> None:
        """Remove the optimizer's hooks."""
        algorithms.close(self.optimizer)


def _sums(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    right = (logits.argmax(1) == labels).sum()
    return torch.stack(
        [loss.double(), right.double(), torch.full_like(loss, len(labels), dtype=torch.float64)]
    )


def steps(experiment: Experiment, dataset: Dataset, ranks: int = 1) -> int:
    """Return the number of optimizer steps of one run, shared by `ranks` processes."""
    count = experiment.training.epochs * batches.steps(
        len(dataset.train), experiment.training.batch_size, ranks
    )
    return min(count, experiment.training.max_steps or count)
