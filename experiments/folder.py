"""A folder of images: train/CLASS/*.jpg and test/CLASS/*.jpg, as for torchvision's ImageFolder."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.errors import ExperimentError, system_reason

SUFFIXES = (".jpg", ".jpeg", ".png")
FORMATS = ("JPEG", "PNG")
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
        try:
            classes[part] = tuple(
                sorted(path.name for path in (data_dir / part).iterdir() if path.is_dir())
            )
            listing[part] = [
                (path, label)
                for label, name in enumerate(classes[part])
                for path in sorted((data_dir / part / name).iterdir())
                if path.suffix.lower() in SUFFIXES
            ]
        except OSError as error:
            raise ExperimentError(
                f"--data-dir {data_dir}: {error.filename} cannot be read ({system_reason(error)})"
            ) from error
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
    """Return a digest of the files, their order, sizes, times and classes.

    Raises:
        ExperimentError: One cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    for path, label in files:
        status = _status(path)
        name = os.fsencode(path.relative_to(data_dir))  # names need not be UTF-8
        digest.update(name + f" {label} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _status(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except OSError as error:  # such as a link to a file that is not there
        raise ExperimentError(
            f"{path} cannot be read ({system_reason(error)}): restore or remove it"
        ) from error
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
        raise ExperimentError(f"{path} is not a regular file: remove it")
    return status


def decode(paths: list[Path], size: int) -> Tensor:
    """Return the images as `[N, 3, size, size]` of uint8.

    Raises:
        ExperimentError: An image cannot be read, or has another size.
    """
    pixels = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for i, path in enumerate(paths):
        _status(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Pillow finds odd is no matter of ours
                with Image.open(path, formats=FORMATS) as file:
                    found = file.size  # known without decoding, which may take all memory
                    if found == (size, size):
                        pixels[i] = np.asarray(file.convert("RGB"))
        except Exception as error:  # Pillow raises almost anything for damaged files
            raise ExperimentError(
                f"{path} is not a readable image ({type(error).__name__}: {system_reason(error)}): "
                "restore or remove it"
            ) from error
        if found != (size, size):
            raise ExperimentError(
                f"{path} is {found[0]}x{found[1]} pixels; all images must be {size}x{size}"
            )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
