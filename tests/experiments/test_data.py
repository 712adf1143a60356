import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from experiments import data
from experiments.config import Data
from experiments.errors import ExperimentError


def quiet(_: str) -> None:
    pass


def load_tiny_digits(**changes) -> data.Dataset:
    return data.load(
        Data(**{"source": "digits", "train": 1437, "test": 360, **changes}),
        None,
        Path("unused"),
        quiet,
    )


def test_split_of_digits_depends_on_the_seed_alone():
    dataset = load_tiny_digits()
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (1437, 360, 10)
    together = torch.cat([dataset.train.pixels, dataset.test.pixels])[:, 0].flatten(1).numpy()
    original = (load_digits().data * 255 / 16).round()
    assert sorted(map(tuple, together)) == sorted(map(tuple, original.astype(np.uint8)))
    share = torch.bincount(dataset.test.labels) / torch.bincount(
        torch.cat([dataset.train.labels, dataset.test.labels])
    )
    assert ((share - 0.2).abs() < 0.02).all()
    assert load_tiny_digits().checksum() == dataset.checksum()
    assert load_tiny_digits(seed=1).checksum() != dataset.checksum()


def test_labels_stay_with_their_images():
    original = {
        tuple(row): label
        for row, label in zip(
            (load_digits().data * 255 / 16).round(), load_digits().target, strict=True
        )
    }
    dataset = load_tiny_digits(train=50, test=20)
    for part in (dataset.train, dataset.test):
        for pixels, label in zip(part.pixels, part.labels, strict=True):
            assert original[tuple(pixels.flatten().tolist())] == label


def test_normalisation_is_that_of_the_training_images(images: Path, tmp_path: Path):
    dataset = data.load(Data(source="cifar10"), images, tmp_path / "cache", quiet)
    mean, deviation = dataset.normalisation()
    pixels = dataset.train.pixels.double()
    torch.testing.assert_close(mean.flatten(), pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(deviation.flatten()[0], pixels[:, 0].std(correction=0).float())
    assert deviation.min() >= 1  # a channel without any contrast is not divided by zero


def test_folders_of_images_are_decoded_once(images: Path, tmp_path: Path):
    said: list[str] = []
    settings = Data(source="cifar10")
    first = data.load(settings, images, tmp_path / "cache", said.append)
    assert first.classes == ("cat", "dog")
    assert first.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert first.test.labels.tolist() == [0, 0, 1, 1]
    red = first.train.pixels[:, 0].float().mean((1, 2))
    torch.testing.assert_close(red, torch.tensor([0.0, 1, 2, 10, 11, 12]), atol=2, rtol=0)
    assert len(said) == 2
    assert (
        data.load(settings, images, tmp_path / "cache", said.append).checksum() == first.checksum()
    )
    assert len(said) == 2  # from the cache
    (images / "train" / "cat" / "0.jpg").unlink()
    assert len(data.load(settings, images, tmp_path / "cache", said.append).train) == 5
    assert len(said) == 3
    (tmp_path / "cache" / "train.pt").write_bytes(b"broken")
    assert len(data.load(settings, images, tmp_path / "cache", said.append).train) == 5


def test_subset_depends_on_its_seed(images: Path, tmp_path: Path):
    def load(seed: int) -> data.Dataset:
        return data.load(
            Data(source="cifar10", train=4, test=2, seed=seed),
            images,
            tmp_path / f"cache{seed}",
            quiet,
        )

    assert len(load(0).train) == 4
    assert load(0).checksum() == load(0).checksum()
    assert len({load(seed).checksum() for seed in range(6)}) > 1


@pytest.mark.parametrize(("part", "count"), [("train", 7), ("test", 5)])
def test_number_of_images_is_checked(images: Path, tmp_path: Path, part: str, count: int):
    with pytest.raises(ExperimentError, match=f"data.{part} = {count}, but .* only"):
        data.load(Data(source="cifar10", **{part: count}), images, tmp_path, quiet)
    with pytest.raises(ExperimentError, match="only 1797 digits"):
        load_tiny_digits(train=1797, test=1)


def test_digits_refuse_a_folder(images: Path):
    with pytest.raises(ExperimentError, match="leave --data-dir out"):
        data.load(Data(source="digits"), images, images, quiet)


class FakeCifar:
    classes = tuple("abcdefghij")

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        count = 20 if train else 10
        self.data = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones(
            (1, 32, 32, 3), np.uint8
        )
        self.targets = [i % 10 for i in range(count)]


def test_images_of_torchvision_become_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    dataset = data.load(Data(source="cifar10", train=8), tmp_path / "new", tmp_path, quiet)
    assert dataset.train.pixels.shape == (8, 3, 32, 32)
    assert dataset.test.pixels.shape == (10, 3, 32, 32)
    assert (dataset.train.pixels[:, 0, 0, 0] % 10 == dataset.train.labels).all()


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), RuntimeError("File not found or corrupted.")]
)
def test_failed_downloads_are_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    with pytest.raises(
        ExperimentError,
        match=r"could not be downloaded .*connect to the network, or give --data-dir",
    ):
        data.load(Data(source="cifar10"), tmp_path / "new", tmp_path, quiet)


@pytest.mark.parametrize("kind", ["file", "pipe", "other tensors"])
def test_caches_that_cannot_be_used_are_made_again_or_told(kind: str, images: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    if kind == "file":
        cache.touch()
        with pytest.raises(ExperimentError, match="cannot be written"):
            data.load(Data(source="cifar10"), images, cache, quiet)
        return
    first = data.load(Data(source="cifar10"), images, cache, quiet)
    path = cache / "train.pt"
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        torch.save({**torch.load(path), "pixels": torch.zeros(3)}, path)
    again = data.load(Data(source="cifar10"), images, cache, quiet)
    assert again.checksum() == first.checksum()


@pytest.mark.parametrize("counts", [{"train": 9}, {"test": 3}, {"train": 1790, "test": 7}])
def test_each_digit_needs_an_image(counts: dict[str, int]):
    with pytest.raises(ExperimentError, match="each of the 10 digits"):
        load_tiny_digits(**counts)


def test_names_of_folders_become_printable(images: Path, tmp_path: Path):
    odd = images.rename(tmp_path / "a\udcffb")
    assert data.load(Data(source="cifar10"), odd, tmp_path / "cache", quiet).name.isprintable()
