"""Runs that reconstruct images: what they minimise, and what they measure."""

from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import data, models, settings
from experiments.data import Dataset
from experiments.errors import ExperimentError
from experiments.settings import Study
from experiments.tasks import TASKS
from experiments.training import Trainer, shuffled

CPU = torch.device("cpu")
WIDTHS = "model.options.widths=[16, 8]"


@pytest.fixture(scope="module")
def study() -> Study:
    short = ("data.train=60", "data.test=30", "training.batch_size=20", "training.epochs=3")
    return settings.load("autoencoder", [WIDTHS, *short])


@pytest.fixture(scope="module")
def dataset(study: Study) -> Dataset:
    return data.load(study.data, None, Path("unused"), print)


def entropies(logits: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of an image, written out."""
    p = logits.sigmoid()
    return -(pixels * p.log() + (1 - pixels) * (1 - p).log()).sum(1).mean()


def test_a_run_minimises_cross_entropy_and_measures_squared_errors(
    study: Study, dataset: Dataset
) -> None:
    sgd = study.algorithms["sgd"].with_options(lr=0.01, momentum=0.9)
    trainer = Trainer(study, sgd, 3, dataset, CPU)
    model = models.make(study.model, channels=1, classes=784, seed=3, trusted=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    for epoch in range(2):
        errors = []
        for images, _ in shuffled(dataset.train, 20, seed=3, epoch=epoch, augment=False):
            pixels = images.double().flatten(1) / 255
            logits = model(images / 255)
            errors.append((logits.sigmoid() - pixels).square().sum(1).mean().item())
            optimizer.zero_grad()
            entropies(logits.double(), pixels).backward()
            optimizer.step()
        found = trainer.run_epoch()
        assert found.losses == pytest.approx(errors, rel=1e-4)
        assert found.train_loss == pytest.approx(sum(errors) / 3, rel=1e-4)
        pixels = dataset.test.inputs.flatten(1) / 255
        error = (model(dataset.test.inputs / 255).sigmoid() - pixels).square().sum(1).mean()
        assert found.test_loss == pytest.approx(error.item(), rel=1e-4)
        assert (found.train_accuracy, found.test_accuracy) == (None, None)
        assert list(found.metrics) == ["train_loss", "test_loss"]


@pytest.mark.parametrize("name", ["adamw", "kfac", "ekfac", "short"])
@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_all_of_the_preset_learn(name: str, study: Study, dataset: Dataset) -> None:
    trainer = Trainer(study, study.algorithms[name], 0, dataset, CPU)
    while not trainer.finished:
        trainer.run_epoch()
    trainer.close()
    assert trainer.history[-1].train_loss < trainer.history[0].train_loss


def test_inputs_that_are_no_pixels_are_refused(study: Study) -> None:
    signals = data.load(settings.Data(source="mnist1d", train=60), None, Path("unused"), print)
    with pytest.raises(ExperimentError, match=r"loss = reconstruction takes pixels.*digits28"):
        Trainer(study, study.algorithms["sgd"], 0, signals, CPU)


def test_a_lost_run_diverges(study: Study, dataset: Dataset, monkeypatch) -> None:
    """Outputs that are no numbers make errors that are none: a perfect sigmoid hides nothing."""
    trainer = Trainer(study, study.algorithms["kfac"], 0, dataset, CPU)
    with torch.no_grad():
        for each in trainer.model.modules():
            if isinstance(each, nn.Linear):
                each.weight.mul_(float("nan"))
    trainer.run_epoch()
    assert trainer.diverged
    assert trainer.finished


def test_every_loss_of_the_settings_has_a_task() -> None:
    assert set(TASKS) == set(settings.LOSSES)
