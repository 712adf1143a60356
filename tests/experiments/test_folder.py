import shutil
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
