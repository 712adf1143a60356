"""A folder of images: train/CLASS/*.jpg and test/CLASS/*.jpg, as for torchvision's ImageFolder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.errors import ExperimentError

SUFFIXES = (".jpg", ".jpeg", ".png")
PARTS = ("train", "test")
DOWNLOADED = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
LAYOUT = "train/CLASS/*.jpg and test/CLASS/*.jpg"


def is_image_folder(data_dir: Path) -> bool:
    """Return whether `data_dir` has both parts of a folder of images."""
    return all((data_dir / part).is_dir() for part in PARTS)


def check_download_target(data_dir: Path) -> None:
    """Check that `data_dir` is suitable for a download.

    Raises:
        ExperimentError: It is a file, or has content but nothing of CIFAR-10.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise ExperimentError(f"--data-dir {data_dir} is a file: give a folder")
    if not data_dir.is_dir() or any((data_dir / name).exists() for name in DOWNLOADED):
        return
    try:
        names = sorted(path.name for path in data_dir.iterdir())
    except OSError as error:
        raise ExperimentError(f"--data-dir {data_dir} cannot be read ({error.strerror})") from error
    if names:
        missing = [part for part in PARTS if not (data_dir / part).is_dir()]
        raise ExperimentError(
            f"--data-dir {data_dir} has no {' and no '.join(missing)} folder and no "
            f"{DOWNLOADED[0]}: give a folder with {LAYOUT}, one that torchvision filled, or a new "
            "or empty one to download CIFAR-10 into"
        )


def list_images(data_dir: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[Path, int]]]]:
    """Return the classes, and for each part its files with the index of their class, by name.

    Raises:
        ExperimentError: A part has no images, or the parts differ in their classes.
    """
    classes, listing = {}, {}
    for part in PARTS:
        classes[part] = tuple(
            sorted(path.name for path in (data_dir / part).iterdir() if path.is_dir())
        )
        listing[part] = [
            (path, label)
            for label, name in enumerate(classes[part])
            for path in sorted((data_dir / part / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not listing[part]:
            raise ExperimentError(
                f"--data-dir {data_dir}: {part} holds no images; the layout must be {LAYOUT} "
                f"({', '.join(SUFFIXES)})"
            )
    if classes["train"] != classes["test"]:
        odd = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise ExperimentError(
            f"--data-dir {data_dir}: train and test must have the same class folders; not in both: "
            f"{', '.join(odd)}"
        )
    return classes["train"], listing


def signature(files: list[tuple[Path, int]], data_dir: Path) -> str:
    """Return a digest of the files, their order, sizes, times and classes."""
    digest = hashlib.sha256()
    for path, label in files:
        status = path.stat()
        digest.update(
            f"{path.relative_to(data_dir)} {label} {status.st_size} {status.st_mtime_ns}\n".encode()
        )
    return digest.hexdigest()


def decode(paths: list[Path], size: int) -> Tensor:
    """Return the images as `[N, 3, size, size]` of uint8.

    Raises:
        ExperimentError: An image cannot be read, or has another size.
    """
    pixels = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises these for damaged files
            raise ExperimentError(f"{path} is not a readable image: {error}") from error
        if image.size != (size, size):
            raise ExperimentError(
                f"{path} is {image.width}x{image.height} pixels; all images must be {size}x{size}"
            )
        pixels[i] = np.asarray(image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
