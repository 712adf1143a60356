"""Load images into memory: scikit-learn's digits, torchvision's CIFAR-10, or a folder of images."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from torch import Tensor

from experiments import folder
from experiments.config import Data
from experiments.errors import ExperimentError, printable
from experiments.files import write_atomically

SIZE = 32
"""Height and width of CIFAR-10's images."""


@attrs.frozen(eq=False)
class Images:
    """Images and their classes.

    Args:
        pixels: `[N, C, H, W]`, uint8.
        labels: `[N]`, int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def checked(self, count: int) -> Images:
        """Return these images, if they can be `count` images of CIFAR-10.

        Raises:
            ValueError: They cannot.
        """
        shape = (count, 3, SIZE, SIZE)
        if self.pixels.shape != shape or self.pixels.dtype != torch.uint8:
            raise ValueError(f"pixels of shape {tuple(self.pixels.shape)} are not {shape} of uint8")
        if self.labels.shape != (count,) or self.labels.dtype != torch.int64:
            raise ValueError("the labels do not fit the pixels")
        return self

    def subset(self, count: int, seed: int, name: str) -> Images:
        """Draw `count` images by `seed`; 0 returns all."""
        if count > len(self):
            raise ExperimentError(
                f"data.{name} = {count}, but there are only {len(self)} {name} images"
            )
        if count in (0, len(self)):
            return self
        index = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        """Return the images on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device))


@attrs.frozen(eq=False)
class Dataset:
    """Training and test images.

    Args:
        name: Name for readers.
        train: Training images.
        test: Test images.
        classes: Names of the classes.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the training images per channel, `[C, 1, 1]`."""
        channels = self.train.pixels.shape[1]
        counts = torch.stack(
            [
                torch.bincount(self.train.pixels[:, c].flatten(), minlength=256)
                for c in range(channels)
            ]
        ).double()
        values, total = torch.arange(256, dtype=torch.float64), counts.sum(1)
        mean = (counts * values).sum(1) / total
        deviation = ((counts * (values - mean[:, None]) ** 2).sum(1) / total).sqrt().clamp(min=1.0)
        return mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)

    def checksum(self) -> int:
        """Return a checksum of all images and labels."""
        value = 0
        for tensor in (self.train.pixels, self.train.labels, self.test.pixels, self.test.labels):
            value = zlib.crc32(tensor.contiguous().numpy().data, value)
        return value


def load(settings: Data, data_dir: Path | None, cache: Path, say: Callable[[str], None]) -> Dataset:
    """Load the images of an experiment.

    Args:
        settings: The images.
        data_dir: Folder of the images, or for their download; `None` for the default.
        cache: Folder for decoded images.
        say: Takes a message before work that may take long.

    Raises:
        ExperimentError: The images are missing and cannot be downloaded.
    """
    if settings.source == "digits":
        if data_dir is not None:
            raise ExperimentError(
                "the digits come with scikit-learn: leave --data-dir out, or choose "
                "--preset cifar10-small"
            )
        return _digits(settings)
    data_dir = Path("runs/data") if data_dir is None else data_dir
    if folder.is_image_folder(data_dir):
        return _from_folder(settings, data_dir, cache, say)
    return _from_torchvision(settings, data_dir, say)


def _digits(settings: Data) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = settings.train or len(digits.target) * 4 // 5, settings.test or None
    if train + (test or 1) > len(digits.target):
        raise ExperimentError(
            f"data.train + data.test = {train + (test or 1)}, but there are only "
            f"{len(digits.target)} digits"
        )
    classes = len(digits.target_names)
    for part, count in (("train", train), ("test", test)):
        if count is not None and count < classes:
            raise ExperimentError(
                f"data.{part} = {count} is too few: each of the {classes} digits needs an image"
            )
    split = train_test_split(
        digits.images,
        digits.target,
        train_size=train,
        test_size=test,
        stratify=digits.target,
        random_state=settings.seed,
    )
    parts = [torch.from_numpy(part) for part in split]
    pixels = [(part * (255 / 16)).round().to(torch.uint8)[:, None] for part in parts[:2]]
    return Dataset(
        name="scikit-learn's digits (8x8)",
        train=Images(pixels[0], parts[2].long()),
        test=Images(pixels[1], parts[3].long()),
        classes=tuple(str(name) for name in digits.target_names),
    )


def _from_folder(
    settings: Data, data_dir: Path, cache: Path, say: Callable[[str], None]
) -> Dataset:
    classes, listing = folder.list_images(data_dir)
    parts = {}
    for part, count in (("train", settings.train), ("test", settings.test)):
        files = listing[part]
        if count > len(files):
            raise ExperimentError(
                f"data.{part} = {count}, but {data_dir / part} holds only {len(files)} images"
            )
        if 0 < count < len(files):
            generator = torch.Generator().manual_seed(settings.seed)
            index = torch.randperm(len(files), generator=generator)[:count]
            files = [files[i] for i in index.tolist()]
        parts[part] = _decode_once(files, data_dir, cache / f"{part}.pt", say)
    return Dataset(printable(f"CIFAR-10 from {data_dir}"), parts["train"], parts["test"], classes)


def _decode_once(
    files: list[tuple[Path, int]], data_dir: Path, cache: Path, say: Callable[[str], None]
) -> Images:
    key = folder.signature(files, data_dir)
    try:
        kept = torch.load(cache, weights_only=True) if cache.is_file() else {"key": None}
        if kept["key"] == key:
            return Images(kept["pixels"], kept["labels"]).checked(len(files))
    except Exception as error:  # torch.load may raise anything for a damaged file
        if cache.exists():
            say(f"{cache} cannot be read ({type(error).__name__}): decoding the images again")
    say(f"decoding {len(files):,} images from {data_dir} (once; kept in {cache})")
    images = Images(
        folder.decode([path for path, _ in files], SIZE),
        torch.tensor([label for _, label in files]),
    )
    write_atomically(
        cache,
        lambda path: torch.save(
            {"key": key, "pixels": images.pixels, "labels": images.labels}, path
        ),
    )
    return images


def _from_torchvision(settings: Data, data_dir: Path, say: Callable[[str], None]) -> Dataset:
    from torchvision.datasets import CIFAR10

    folder.check_download_target(data_dir)
    say(f"CIFAR-10 from torchvision, in {data_dir} (downloaded if missing: 170 MB)")
    try:
        parts = [CIFAR10(data_dir, train=train, download=True) for train in (True, False)]
    # The errors of urllib are OSErrors; torchvision raises RuntimeError for damaged files.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        if data_dir.is_dir() and not any(data_dir.iterdir()):
            data_dir.rmdir()  # made for the download
        raise ExperimentError(
            f"CIFAR-10 is not in {data_dir} and could not be downloaded ({reason}): connect to the "
            "network, or give --data-dir a folder with torchvision's cifar-10-batches-py or with "
            "images as train/CLASS/*.jpg and test/CLASS/*.jpg"
        ) from error
    images = [
        Images(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
        )
        for part in parts
    ]
    return Dataset(
        name="CIFAR-10 from torchvision",
        train=images[0].subset(settings.train, settings.seed, "train"),
        test=images[1].subset(settings.test, settings.seed, "test"),
        classes=tuple(parts[0].classes),
    )
