import math
from pathlib import Path

import attrs
import pytest
import torch
from torch.nn import functional

from experiments import batches, config, data, models
from experiments.training import Trainer, steps

CPU = torch.device("cpu")


@pytest.fixture
def experiment(tiny: Path) -> config.Experiment:
    return config.read(tiny)


@pytest.fixture
def dataset(experiment: config.Experiment, tmp_path: Path) -> data.Dataset:
    return data.load(experiment.data, None, tmp_path, print)


def changed(algorithm: config.Algorithm, **settings: object) -> config.Algorithm:
    return attrs.evolve(algorithm, settings={**algorithm.settings, **settings})


def test_metrics_are_those_of_the_model(experiment, dataset):
    """With a learning rate of zero the weights stay, and all figures can be computed apart."""
    trainer = Trainer(experiment, changed(experiment.algorithms["sgd"], lr=0.0), 4, dataset, CPU)
    epoch = trainer.run_epoch(lambda: None)
    model = models.make("digits_resnet", channels=1, classes=10, seed=4)
    pixels = dataset.train.pixels.double()

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return ((x.double() - pixels.mean()) / pixels.std(correction=0)).float()

    losses, right = 0.0, 0
    for x, y in batches.shuffled(dataset.train, 50, seed=4, epoch=0, augment=False):
        logits = model(normalised(x))
        losses += functional.cross_entropy(logits, y, reduction="sum").item()
        right += (logits.argmax(1) == y).sum().item()
    assert epoch.train_loss == pytest.approx(losses / 150, rel=1e-4)
    assert epoch.train_accuracy == pytest.approx(100 * right / 150)
    model.eval()
    logits = model(normalised(dataset.test.pixels))
    assert epoch.test_loss == pytest.approx(
        functional.cross_entropy(logits, dataset.test.labels).item(), rel=1e-4
    )
    assert epoch.test_accuracy == pytest.approx(
        100 * (logits.argmax(1) == dataset.test.labels).double().mean().item()
    )
    assert (epoch.epoch, epoch.steps) == (1, 3)


def test_learning_lowers_the_loss(experiment, dataset):
    for algorithm in experiment.algorithms.values():
        trainer = Trainer(experiment, algorithm, 0, dataset, CPU)
        while not trainer.finished:
            trainer.run_epoch(lambda: None)
        trainer.close()
        assert trainer.history[-1].train_loss < 0.95 * trainer.history[0].train_loss
        assert not trainer.diverged


def test_cosine_schedule_ends_at_zero(experiment, dataset):
    trainer = Trainer(experiment, experiment.algorithms["sgd"], 0, dataset, CPU)
    rates = []
    while not trainer.finished:
        trainer.run_epoch(lambda: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    expected = [0.03 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(1, 10)]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_runs_stop_after_max_steps(experiment, dataset):
    experiment = config.with_options(experiment, max_steps=4)
    trainer = Trainer(experiment, experiment.algorithms["sgd"], 0, dataset, CPU)
    while not trainer.finished:
        trainer.run_epoch(lambda: None)
    assert [epoch.steps for epoch in trainer.history] == [3, 1]
    assert steps(experiment, dataset) == 4


def test_divergence_ends_runs(experiment, dataset):
    trainer = Trainer(experiment, changed(experiment.algorithms["sgd"], lr=1e30), 0, dataset, CPU)
    while not trainer.finished:
        trainer.run_epoch(lambda: None)
    assert trainer.diverged
    assert len(trainer.history) < 3


def test_close_removes_hooks(experiment, dataset):
    trainer = Trainer(experiment, experiment.algorithms["ekfacadam"], 0, dataset, CPU)
    trainer.close()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules()
    )
