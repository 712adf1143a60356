import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from experiments import folder
from experiments.errors import ExperimentError


def test_download_targets_are_accepted(tmp_path: Path):
    folder.check_download_target(tmp_path)  # empty
    folder.check_download_target(tmp_path / "new")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "other").mkdir()
    folder.check_download_target(tmp_path)  # torchvision has been here


def test_other_targets_are_refused(tmp_path: Path, images: Path):
    shutil.rmtree(images / "test")
    assert not folder.is_image_folder(images)
    with pytest.raises(ExperimentError, match="has no test folder"):
        folder.check_download_target(images)
    with pytest.raises(ExperimentError, match="has no train and no test folder"):
        folder.check_download_target(images / "train")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ExperimentError, match="is a file"):
        folder.check_download_target(file)


def test_parts_must_have_the_same_classes(images: Path):
    assert folder.is_image_folder(images)
    shutil.move(images / "test" / "dog", images / "test" / "fox")
    with pytest.raises(ExperimentError, match="not in both: dog, fox"):
        folder.list_images(images)


def test_parts_without_images_are_refused(images: Path):
    for path in (images / "test").rglob("*.jpg"):
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ExperimentError, match="test holds no images"):
        folder.list_images(images)


def test_unsuitable_images_are_refused(tmp_path: Path):
    broken, large = tmp_path / "broken.jpg", tmp_path / "large.png"
    broken.write_bytes(b"not an image")
    Image.new("RGB", (48, 32)).save(large)
    with pytest.raises(ExperimentError, match=r"broken\.jpg is not a readable image"):
        folder.decode([broken], 32)
    with pytest.raises(ExperimentError, match=r"large\.png is 48x32 pixels"):
        folder.decode([large], 32)


def test_grey_images_have_three_channels(tmp_path: Path):
    Image.new("L", (32, 32), 77).save(tmp_path / "grey.png")
    pixels = folder.decode([tmp_path / "grey.png"], 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert (pixels == 77).all()


def png_of_size(path: Path, width: int, height: int) -> None:
    """A small file that says that it is a large image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


def odd_file(path: Path, kind: str) -> None:
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        png_of_size(path, 50_000, 50_000)
    elif kind == "large":
        png_of_size(path, 11_000, 11_000)
    elif kind == "cut":
        png_of_size(path, 32, 32)
    elif kind == "empty":
        path.touch()
    else:
        Image.new("RGB", (32, 32)).save(path, format="GIF")


def read_all(listing: list[tuple[Path, int]], root: Path) -> None:
    folder.signature(listing, root)
    folder.decode([path for path, _ in listing], 32)


@pytest.mark.skipif(os.name != "posix", reason="the system has no such files")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dangling", "No such file"),
        ("pipe", "is not a regular file"),
        ("folder", "is not a regular file"),
        ("bomb", "DecompressionBombError"),
        ("large", "11000x11000 pixels"),
        ("cut", "is not a readable image"),
        ("empty", "is not a readable image"),
        ("gif", "is not a readable image"),
    ],
)
def test_odd_files_are_named_on_one_line(images: Path, kind: str, words: str):
    path = images / "train" / "cat" / "a\udcffb.png"
    odd_file(path, kind)
    _, listing = folder.list_images(images)
    with pytest.raises(ExperimentError) as told:
        read_all(listing["train"], images)
    message = str(told.value)
    assert words in message
    assert "a\\udcffb.png" in message
    assert message.isprintable()


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on Unix only")
def test_names_need_not_be_utf8(images: Path):
    shutil.move(images / "train" / "cat", images / "train" / "c\udcff")
    shutil.move(images / "test" / "cat", images / "test" / "c\udcff")
    classes, listing = folder.list_images(images)
    assert classes == ("c\udcff", "dog")
    assert len(folder.signature(listing["train"], images)) == 64
    assert folder.decode([path for path, _ in listing["train"]], 32).shape == (6, 3, 32, 32)


def test_folders_that_cannot_be_read_are_named(images: Path, monkeypatch):
    def refuse(path: Path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ExperimentError, match=r"train cannot be read \(Permission denied\)"):
        folder.list_images(images)
