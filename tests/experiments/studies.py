"""Small studies for tests, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from experiments.data import Dataset
from experiments.runner import Job
from experiments.settings import Study
from experiments.store import Epoch, Run

TINY = """
title = "A tiny experiment"
[data]
source = "digits"
train = 150
test = 60
[model]
name = "digits_resnet"
[training]
epochs = 3
batch_size = 50
test_batch_size = 32
seeds = [0]
schedule = "cosine"
threads = 1
[second_order]
curvature = "conv_kfac"
factor_every = 2
scale_every = 2
basis_every = 3
[algorithms.sgd]
label = "SGD"
optimizer = "SGD"
momentum = 0.9
lr = 0.03
weight_decay = 0.0001
[algorithms.ekfacadam]
label = "EKFACadam"
basis = "ekfac"
update = "adam"
lr = 0.01
weight_decay = 0.001
damping = 0.03
"""


SIGNALS = """
title = "Signals"
data = { source = "%s", train = 64, test = 32 }
model = { name = "%s" }
[training]
epochs = 2
batch_size = 16
seeds = [0, 1]
threads = 1
[second_order]
curvature = "conv_kfac"
[algorithms.adamw]
label = "AdamW"
optimizer = "AdamW"
lr = 0.01
search = { lr = [0.001, 0.1], weight_decay = [0.001, 1] }
[algorithms.ekfac]
basis = "ekfac"
update = "momentum"
lr = 0.01
damping = 0.01
search = { lr = [0.001, 0.1], damping = [0.001, 1] }
[search.thesis]
first_order = { epochs = 1, values = { lr = [0.1, 0.01], weight_decay = [0.1, 0.01] } }
second_order = { epochs = 2, values = { lr = [0.1, 0.01, 0.001] } }
[search.fair]
trials = 4
epochs = 1
train = 40
confirm = 2
"""

OWN = """
import torch
from experiments.data import Dataset, Examples

def signals(settings, data_dir, cache, say):
    draw = torch.Generator().manual_seed(settings.seed)
    def part(count):
        labels = torch.arange(count) % 2
        values = torch.randn(count, 2, 6, generator=draw) + labels[:, None, None]
        return Examples(values, labels)
    return Dataset("own", part(settings.train), part(settings.test), ("no", "yes"))

def network(*, channels, classes, width=8, rate=0.5):
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6 * channels, width), torch.nn.ReLU(),
        torch.nn.Dropout(rate), torch.nn.Linear(width, classes),
    )
"""


def with_training(study: Study, **changes: object) -> Study:
    """The study, trained otherwise."""
    return attrs.evolve(study, training=attrs.evolve(study.training, **changes))


def plain(history: Sequence[Epoch]) -> list[Epoch]:
    """Epochs without what a clock says."""
    return [
        attrs.evolve(
            epoch,
            seconds=0,
            times=(),
            curvature={k: v for k, v in epoch.curvature.items() if not k.startswith("seconds")},
        )
        for epoch in history
    ]


def job(study: Study, dataset: Dataset, name: str = "sgd", seed: int = 0, **changes: Any) -> Job:
    """A job of a study, which is not saved."""
    values = {"settings": {"algorithm": {"lr": 0.1}}, "folder": None, **changes}
    return Job(study=study, algorithm=study.algorithms[name], seed=seed, dataset=dataset, **values)


def epoch(number: int, *, steps: int = 3, seconds: float = 0.5) -> Epoch:
    """A made-up epoch."""
    return Epoch(number, steps, seconds, 1 / number, 90.0, 2 / number, 80.0)


def ended(job: Job, history: Sequence[Epoch], status: str = "finished") -> Run:
    """The made-up run of a job."""
    return Run(job.algorithm.name, job.seed, status, job.settings, {}, tuple(history))
