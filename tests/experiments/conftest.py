from pathlib import Path

import attrs
import pytest
from PIL import Image

from experiments import data, settings
from experiments.data import Dataset
from experiments.settings import Study

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


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Study:
    """The study of these settings."""
    path = tmp_path_factory.mktemp("settings") / "tiny.toml"
    path.write_text(tiny_text)
    return settings.read(path)


@pytest.fixture(scope="session")
def dataset(study: Study) -> Dataset:
    """Its examples."""
    return data.load(study.data, None, Path("unused"), print)


def with_training(study: Study, **changes: object) -> Study:
    """The study, trained otherwise."""
    return attrs.evolve(study, training=attrs.evolve(study.training, **changes))


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


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of a study whose examples and network, with dropout, are of a module of its own."""
    module = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "own.toml"
    path.write_text(SIGNALS % (f"{module}:signals", f"{module}:network"))
    return path
