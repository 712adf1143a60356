"""One run: an algorithm learns with one seed. Knows nothing of files, MLflow or terminals."""

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
from experiments.config import Algorithm, Study
from experiments.data import Dataset
from experiments.ranks import Communicator
from experiments.results import Epoch

RECORDED = 10
"""Of so many steps, one has the figures of its second-order stages recorded."""


class Trainer:
    """A run under way.

    Args:
        study: What is learnt, and how.
        algorithm: The algorithm.
        seed: Sets initial weights, order of images and draws of the Fisher pass.
        dataset: The images, on `device`.
        device: Where the work is done.
        ranks: Who shares it; each process has a trainer.
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
        self._training, self._augment, self._seed = study.training, study.data.augment, seed
        self._dataset, self._device = dataset, device
        self._mean, self._deviation = (value.to(device) for value in dataset.normalisation())
        channels = dataset.train.pixels.shape[1]
        model = models.make(
            study.model.name, channels=channels, classes=len(dataset.classes), seed=seed
        )
        if ranks.size > 1:
            norm.share(model)
        self.model = model.to(device)
        self._shared = ranks.wrap(self.model, device)
        self._collector = Collector(RECORDED)
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

    @property
    def diverged(self) -> bool:
        """Whether the last epoch's loss is no longer finite: there is nothing left to learn."""
        return bool(self.history) and not math.isfinite(self.history[-1].train_loss)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        limit = self._training.max_steps
        return (
            len(self.history) >= self._training.epochs
            or self.diverged
            or (limit is not None and self._steps >= limit)
        )

    def run_epoch(self, on_step: Callable[[], None]) -> Epoch:
        """Learn for one epoch, then test; `on_step` is called after every step. `points` are then the recorded steps of this epoch."""
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
        loss, right, count = self._ranks.sum(
            sums
        ).tolist()  # waits for the device, so that the time below is the work's
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
            batches.in_order(self._dataset.test, self._training.test_batch_size)
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
        """All that `load_state_dict` needs to go on as if nothing had happened; all processes ask, and the first one's is kept."""
        return {
            "model": self.model.state_dict(),
            "optimizer": algorithms.state(self.optimizer),
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
        """Go on from a state that `state_dict` gave."""
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
        """Let go of the optimiser's hooks."""
        algorithms.close(self.optimizer)


def _sums(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    right = (logits.argmax(1) == labels).sum()
    return torch.stack(
        [loss.double(), right.double(), torch.full_like(loss, len(labels), dtype=torch.float64)]
    )


def steps(study: Study, dataset: Dataset, ranks: int = 1) -> int:
    """Optimiser steps of one run that so many processes share."""
    count = study.training.epochs * batches.steps(
        len(dataset.train), study.training.batch_size, ranks
    )
    return min(count, study.training.max_steps or count)
