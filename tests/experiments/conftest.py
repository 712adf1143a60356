import math
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from PIL import Image

from experiments import config
from experiments.results import Epoch, Results, Run

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
optimizer = "sgd"
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


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """Settings for runs of three steps an epoch."""
    return TINY


@pytest.fixture
def tiny(tmp_path: Path, tiny_text: str) -> Path:
    """A file with these settings."""
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_text)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images, 3 + 2 of each of 2 classes; red is 10 * class + number, all else 100."""
    root = tmp_path / "images"
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (10 * label + i, 100, 100)).save(
                    root / part / name / f"{i}.jpg", quality=100, subsampling=0
                )
    return root


def make_results(losses: dict[str, list[list[float]]], **training: object) -> Results:
    """Results of made-up runs; the other metrics follow from the training losses of each seed."""
    experiment = config.load("digits")
    experiment = attrs.evolve(experiment, training=attrs.evolve(experiment.training, **training))
    runs = []
    for name, seeds in losses.items():
        for seed, values in enumerate(seeds):
            history = tuple(
                Epoch(
                    i + 1,
                    10,
                    2.0 if name == "sgd" else 3.0,
                    value,
                    100 - value,
                    2 * value,
                    100 - 2 * value,
                )
                for i, value in enumerate(values)
            )
            status = "finished" if math.isfinite(values[-1]) else "diverged"
            runs.append(
                Run(name, seed, status, history, {"lr": 0.1, "update": {"name": "<adam & co>"}})
            )
    return Results(experiment, "made-up images", "cpu", runs)


@pytest.fixture
def made_up() -> Callable[..., Results]:
    return make_results
