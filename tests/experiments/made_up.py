"""Results of made-up runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from experiments import settings
from experiments.results import Results
from experiments.store import Epoch, Run

ALL = ("sgd", "kfac", "ekfac", "ekfacnag", "ekfacadam", "ekfacradam")
LABELS = {
    "sgd": "SGD",
    "kfac": "K-FAC",
    "ekfac": "EKFAC",
    "ekfacnag": "EKFACnag",
    "ekfacadam": "EKFACadam",
    "ekfacradam": "EKFACradam",
}
STEPS = 4
"""Steps of an epoch."""
Losses = Mapping[str, Sequence[Sequence[float]]]


def epoch(number: int, loss: float, seconds: float = 2.0, **changes: Any) -> Epoch:
    """An epoch of four steps with this training loss; the other metrics follow from it."""
    values = {
        "epoch": number,
        "steps": STEPS,
        "seconds": seconds,
        "train_loss": loss,
        "train_accuracy": 100 - 10 * loss,
        "test_loss": 2 * loss,
        "test_accuracy": 100 - 20 * loss,
        "losses": (loss,) * STEPS,
        "times": (seconds / STEPS,) * STEPS,
    }
    return Epoch(**{**values, **changes})


def run(name: str, seed: int, losses: Sequence[float], **changes: Any) -> Run:
    """A run with these training losses; one that ends with NaN has diverged."""
    seconds = 2.0 if name == "sgd" else 3.0
    values = {
        "algorithm": name,
        "seed": seed,
        "status": "finished" if math.isfinite(losses[-1]) else "diverged",
        "settings": {
            "algorithm": {"update": {"name": f"<{name} & co>"}},
            "training": {"batch_size": 64},
            "seed": seed,
        },
        "environment": {"commit": "c0ffee", "processor": "a CPU", "versions": {"torch": "2.9"}},
        "history": tuple(epoch(i, loss, seconds) for i, loss in enumerate(losses, 1)),
    }
    return Run(**{**values, **changes})


def results(losses: Losses, **changes: Any) -> Results:
    """Results of runs with these training losses, by algorithm and seed.

    Args:
        losses: Training losses of each epoch.
        changes: Changes of `Study`; those of `Training` too. With `loss="reconstruction"` there are
            no accuracies.
    """
    training = {
        key: changes.pop(key)
        for key in [each.name for each in attrs.fields(settings.Training)]
        if key in changes
    }
    table = {
        "title": "Made-up runs",
        "data": {"source": "digits"},
        "model": {"name": "mlp"},
        "training": {"epochs": 3, "target": 0.5, **training},
        "algorithms": {name: {"label": LABELS.get(name, name), "lr": 0.1} for name in losses},
    }
    study = settings.structure(table, "made up", "made-up", trusted=True)
    study = attrs.evolve(study, **changes)
    runs = [
        run(name, seed, values)
        for name, seeds in losses.items()
        for seed, values in enumerate(seeds)
    ]
    if study.training.loss == "reconstruction":
        none = {"train_accuracy": None, "test_accuracy": None}
        runs = [
            attrs.evolve(each, history=tuple(attrs.evolve(e, **none) for e in each.history))
            for each in runs
        ]
    return Results(
        study=study,
        dataset="made-up images",
        device="cpu",
        command="python -m experiments --set 'a<b'",
        runs=runs,
    )
