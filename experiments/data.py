"""Load examples into memory, by name.

They are scikit-learn's digits, also enlarged, MNIST-1D, CIFAR-10 as files or image folders, also in
grey, and source code.
"""

from __future__ import annotations

import hashlib
import platform
import stat
import sysconfig
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from experiments.errors import ExperimentError, named, printable, system_reason
from experiments.settings import Data
from experiments.store import write_atomically

SIZE = 32
"""Height and width of CIFAR-10's images."""
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
"""Of the files that `ImageFolder` lists."""
PARTS = ("train", "test")
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey pixel (ITU-R BT.601)."""
DOWNLOADED = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
Say = Callable[[str], None]


@attrs.frozen(eq=False)
class Examples:
    """Inputs and their classes.

    Args:
        inputs: `[N, C, ...]`: uint8 images, or float32 values. Of text `[N, T]`, int64 tokens.
        labels: `[N]`, int64; of text `[N, T]`, the next tokens.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Examples:
        return Examples(self.inputs[index], self.labels[index])

    def subset(self, count: int, seed: int, name: str) -> Examples:
        """Draw `count` examples by `seed`; 0 returns all."""
        if count > len(self):
            raise ExperimentError(
                f"data.{name} = {count}, but there are only {len(self)} {name} examples"
            )
        if count in (0, len(self)):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self[order[:count]]

    def to(self, device: torch.device) -> Examples:
        """Return the examples on `device`."""
        return Examples(self.inputs.to(device), self.labels.to(device))


@attrs.frozen(eq=False)
class Dataset:
    """Training and test examples.

    Args:
        name: Name for readers.
        train: Training examples.
        test: Test examples.
        classes: Names of the classes.
    """

    name: str
    train: Examples
    test: Examples
    classes: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        """Whether examples are tokens, which have no mean."""
        return self.train.labels.ndim == 2

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the training inputs, `[C, 1, ...]`."""
        inputs = self.train.inputs
        shape = (-1, *(1 for _ in inputs.shape[2:]))
        channels = [inputs[:, c].double() for c in range(inputs.shape[1])]
        least = 1.0 if inputs.dtype == torch.uint8 else 1e-6
        mean = torch.stack([values.mean() for values in channels])
        deviation = torch.stack([values.std(correction=0) for values in channels])
        return mean.float().view(shape), deviation.clamp(min=least).float().view(shape)

    def checksum(self) -> int:
        """Return a checksum of all inputs and labels."""
        value = 0
        for part in (self.train, self.test):
            for tensor in (part.inputs, part.labels):
                value = zlib.crc32(tensor.cpu().contiguous().numpy().data, value)
        return value

    def to(self, device: torch.device) -> Dataset:
        """Return the examples on `device`."""
        return attrs.evolve(self, train=self.train.to(device), test=self.test.to(device))

    def for_search(self, train: int, validation: float, seed: int) -> Dataset:
        """Return a part of the training examples; some are held out and stand for the test.

        Args:
            train: Number of examples; 0 for all.
            validation: Part that is held out; 0 keeps the test examples.
            seed: Seed of the choice.
        """
        chosen = self.train.subset(train, seed, "train")
        if not validation:
            return attrs.evolve(self, train=chosen)
        held = max(1, round(validation * len(chosen)))
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
        return attrs.evolve(self, train=chosen[held:], test=chosen[:held])


def load(
    settings: Data, data_dir: Path | None, cache: Path, say: Say, *, trusted: bool = False
) -> Dataset:
    """Load the examples of a study.

    Args:
        settings: The examples.
        data_dir: Folder of the examples, or for their download; `None` for the default.
        cache: Folder for decoded images.
        say: Takes a message before work that may take long.
        trusted: Whether the source may be an import path.

    Raises:
        ExperimentError: The examples are missing and cannot be downloaded.
    """
    source = named("data.source", settings.source, SOURCES, trusted=trusted)
    if data_dir is not None and settings.source in PACKAGED:
        raise ExperimentError(
            f"{settings.source} comes with a package: leave --data-dir out, or choose another "
            "--preset, such as cifar10-small"
        )
    dataset: Dataset = source(settings, data_dir, cache, say)
    return dataset


def digits(settings: Data, data_dir: Path | None, cache: Path, say: Say) -> Dataset:
    """Return the 1,797 scanned digits of scikit-learn, 8x8; the test part is stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    try:
        split = train_test_split(
            *(found.images, found.target),
            train_size=settings.train or len(found.target) * 4 // 5,
            test_size=settings.test or None,
            stratify=found.target,
            random_state=settings.seed,
        )
    except ValueError as error:
        raise ExperimentError(
            f"data.train = {settings.train}, data.test = {settings.test}: {error}"
        ) from error
    parts = [torch.from_numpy(part) for part in split]
    pixels = [(part * (255 / 16)).round().to(torch.uint8)[:, None] for part in parts[:2]]
    return Dataset(
        name="scikit-learn's digits (8x8)",
        train=Examples(pixels[0], parts[2].long()),
        test=Examples(pixels[1], parts[3].long()),
        classes=tuple(str(name) for name in found.target_names),
    )


def digits28(settings: Data, data_dir: Path | None, cache: Path, say: Say) -> Dataset:
    """Return the digits of scikit-learn enlarged to 28x28 pixels, with the contrast of ink."""
    small = digits(settings, data_dir, cache, say)

    def enlarged(part: Examples) -> Examples:
        pixels = functional.interpolate(part.inputs.float(), size=(28, 28), mode="bicubic")
        pixels = (2 * (pixels - 64)).round().clamp(0, 255)
        return Examples(pixels.to(torch.uint8), part.labels)

    return attrs.evolve(
        small,
        name="scikit-learn's digits (enlarged to 28x28)",
        train=enlarged(small.train),
        test=enlarged(small.test),
    )


def mnist1d(settings: Data, data_dir: Path | None, cache: Path, say: Say) -> Dataset:
    """Return MNIST-1D (Greydanus and Kobak 2020): 5,000 signals of 40 values, made by a package."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    parts = [
        Examples(
            torch.from_numpy(made[f"x{suffix}"]).float()[:, None],
            torch.from_numpy(made[f"y{suffix}"]).long(),
        )
        for suffix in ("", "_test")
    ]
    return Dataset(
        name="MNIST-1D",
        train=parts[0].subset(settings.train, settings.seed, "train"),
        test=parts[1].subset(settings.test, settings.seed, "test"),
        classes=tuple(map(str, range(10))),
    )


def python_source(settings: Data, data_dir: Path | None, cache: Path, say: Say) -> Dataset:
    """Return the source code of Python's standard library, as bytes.

    Each tenth file is for the test. What the library holds depends on the version of Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if not {"test", "tests"} & set(path.parts))
    files = sorted(path for path in found if "site-packages" not in path.parts)
    parts = []
    for name, count, chosen in (
        ("test", settings.test, files[::10]),
        ("train", settings.train, [file for i, file in enumerate(files) if i % 10]),
    ):
        text = np.frombuffer(b"".join(file.read_bytes() for file in chosen), dtype=np.uint8)
        rows = len(text) // (settings.length + 1)
        tokens = torch.from_numpy(text[: rows * (settings.length + 1)].astype(np.int64))
        tokens = tokens.view(rows, settings.length + 1)
        examples = Examples(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        parts.append(examples.subset(count, settings.seed, name))
    return Dataset(
        name=f"the source of Python {platform.python_version()}, as bytes",
        train=parts[1],
        test=parts[0],
        classes=tuple(map(str, range(256))),
    )


def cifar10(settings: Data, data_dir: Path | None, cache: Path, say: Say) -> Dataset:
    """Return CIFAR-10: a folder of images, or torchvision's files, downloaded where missing."""
    data_dir = Path("runs/data") if data_dir is None else data_dir
    if data_dir.exists() and not data_dir.is_dir():
        raise ExperimentError(f"--data-dir {data_dir} is a file, and no folder of images")
    if all((data_dir / part).is_dir() for part in PARTS):
        return _from_folder(settings, data_dir, cache, say)
    return _from_torchvision(settings, data_dir, say)


def cifar10_grey(settings: Data, data_dir: Path | None, cache: Path, say: Say) -> Dataset:
    """Return CIFAR-10 in grey, `[N, 1, 32, 32]`: the luminance of each pixel."""
    coloured = cifar10(settings, data_dir, cache, say)

    def grey(part: Examples) -> Examples:
        pixels = torch.zeros_like(part.inputs[:, :1], dtype=torch.float32)
        for channel, weight in enumerate(LUMINANCE):
            pixels += weight * part.inputs[:, channel : channel + 1]
        return Examples(pixels.round().to(torch.uint8), part.labels)

    return attrs.evolve(
        coloured,
        name=f"{coloured.name}, in grey",
        train=grey(coloured.train),
        test=grey(coloured.test),
    )


SOURCES: dict[str, Callable[[Data, Path | None, Path, Say], Dataset]] = {
    "digits": digits,
    "digits28": digits28,
    "mnist1d": mnist1d,
    "python_source": python_source,
    "cifar10": cifar10,
    "cifar10_grey": cifar10_grey,
}
"""Functions that load examples, with the arguments of `cifar10`."""
PACKAGED = ("digits", "digits28", "mnist1d", "python_source")
"""Sources that read no folder."""


def _from_folder(settings: Data, data_dir: Path, cache: Path, say: Say) -> Dataset:
    from torchvision.datasets import ImageFolder

    parts, classes = {}, {}
    for name, count in (("train", settings.train), ("test", settings.test)):
        try:
            found = ImageFolder(data_dir / name)
        except (OSError, RuntimeError) as error:
            raise ExperimentError(
                f"--data-dir {data_dir} must hold train/CLASS/*.jpg and test/CLASS/*.jpg: "
                f"{system_reason(error)}"
            ) from error
        files, classes[name] = sorted(found.samples), tuple(found.classes)
        if count > len(files):
            raise ExperimentError(
                f"data.{name} = {count}, but {data_dir / name} holds only {len(files)} images"
            )
        if 0 < count < len(files):
            order = torch.Generator().manual_seed(settings.seed)
            files = [files[i] for i in torch.randperm(len(files), generator=order)[:count].tolist()]
        parts[name] = _decode_once(files, cache / f"{name}.pt", say)
    if classes["train"] != classes["test"]:
        raise ExperimentError(
            f"{data_dir}: train and test have different classes: {', '.join(classes['train'])} "
            f"and {', '.join(classes['test'])}"
        )
    return Dataset(
        printable(f"CIFAR-10 from {data_dir.name}"), parts["train"], parts["test"], classes["train"]
    )


def _decode_once(files: list[tuple[str, int]], cache: Path, say: Say) -> Examples:
    """Decode images, or read those that were decoded before from the same files."""
    stats = [(path, label, *_stat(path)) for path, label in files]
    key = hashlib.sha256(repr(stats).encode("utf-8", "backslashreplace")).hexdigest()
    try:
        kept = torch.load(cache, weights_only=True) if cache.is_file() else {"key": None}
        if kept["key"] == key:
            return _checked(Examples(kept["inputs"], kept["labels"]), len(files))
    except Exception as error:  # torch.load may raise anything for a damaged file
        say(f"{cache} cannot be read ({type(error).__name__}): decoding the images again")
    say(f"decoding {len(files):,} images (once; kept in {cache})")
    images = Examples(
        torch.from_numpy(np.stack([_pixels(path) for path, _ in files])).permute(0, 3, 1, 2),
        torch.tensor([label for _, label in files]),
    )
    images = Examples(images.inputs.contiguous(), images.labels)
    values = {"key": key, **attrs.asdict(images, recurse=False)}
    write_atomically(cache, lambda path: torch.save(values, path))
    return images


def _checked(images: Examples, count: int) -> Examples:
    """Return images of a cache if they are as we have written them."""
    kinds = (images.inputs.dtype, images.labels.dtype)
    shapes = (tuple(images.inputs.shape), tuple(images.labels.shape))
    if kinds != (torch.uint8, torch.int64) or shapes != ((count, 3, SIZE, SIZE), (count,)):
        raise ValueError("its values are not those of images")
    return images


def _stat(path: str) -> tuple[int, int]:
    try:
        found = Path(path).stat()
    except OSError as error:  # such as a link to a file that is not there
        raise ExperimentError(
            f"{path} cannot be read ({system_reason(error)}): restore or remove it"
        ) from error
    if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for its writer
        raise ExperimentError(f"{path} is not a regular file: remove it")
    return found.st_size, found.st_mtime_ns


def _pixels(path: str) -> np.ndarray[Any, Any]:
    from PIL import Image

    pixels = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow finds odd is no matter of ours
            with Image.open(path, formats=FORMATS) as image:
                size = image.size  # known without decoding, which may take all memory
                if size == (SIZE, SIZE):
                    pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises almost anything for damaged files
        raise ExperimentError(
            f"{path} is not a readable image ({type(error).__name__}: {system_reason(error)}): "
            "restore or remove it"
        ) from error
    if pixels is None:
        raise ExperimentError(
            f"{path} is {size[0]}x{size[1]} pixels; all images must be {SIZE}x{SIZE}"
        )
    return pixels


def _from_torchvision(settings: Data, data_dir: Path, say: Say) -> Dataset:
    from torchvision.datasets import CIFAR10

    filled = data_dir.is_dir() and any(data_dir.iterdir())
    if filled and not any((data_dir / name).exists() for name in DOWNLOADED):
        missing = [part for part in PARTS if not (data_dir / part).is_dir()]
        raise ExperimentError(
            f"--data-dir {data_dir} has no {' and no '.join(missing)} folder, and none of "
            f"{' and '.join(DOWNLOADED)}: nothing is downloaded among other files"
        )
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
        Examples(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
        )
        for part in parts
    ]
    return Dataset(
        name="CIFAR-10",
        train=images[0].subset(settings.train, settings.seed, "train"),
        test=images[1].subset(settings.test, settings.seed, "test"),
        classes=tuple(parts[0].classes),
    )
