import os
import shutil
import socket
import struct
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from experiments import data, settings
from experiments.errors import ExperimentError
from experiments.settings import Data


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
    together = torch.cat([dataset.train.inputs, dataset.test.inputs])[:, 0].flatten(1).numpy()
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
        for pixels, label in zip(part.inputs, part.labels, strict=True):
            assert original[tuple(pixels.flatten().tolist())] == label


def test_normalisation_is_that_of_the_training_images(images: Path, tmp_path: Path):
    dataset = data.load(Data(source="cifar10"), images, tmp_path / "cache", quiet)
    mean, deviation = dataset.normalisation()
    pixels = dataset.train.inputs.double()
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
    red = first.train.inputs[:, 0].float().mean((1, 2))
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


def test_grey_images_are_those_that_pillow_makes(images: Path, tmp_path: Path):
    coloured = data.load(Data(source="cifar10"), images, tmp_path / "cache", quiet)
    grey = data.load(Data(source="cifar10_grey"), images, tmp_path / "cache", quiet)
    assert "in grey" in grey.name
    for ours, theirs in ((grey.train, coloured.train), (grey.test, coloured.test)):
        made = [
            np.asarray(Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L"))
            for pixels in theirs.inputs
        ]
        assert ours.inputs.shape == (len(theirs), 1, 32, 32)
        assert ours.inputs.dtype == torch.uint8
        difference = ours.inputs[:, 0].int() - torch.from_numpy(np.stack(made)).int()
        assert difference.abs().max() <= 1  # theirs are rounded at other places
        assert torch.equal(ours.labels, theirs.labels)
    mean, deviation = grey.normalisation()
    assert mean.shape == deviation.shape == (1, 1, 1)


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
    with pytest.raises(ExperimentError, match=rf"data.{part} = {count}, but .* only"):
        data.load(Data(source="cifar10", **{part: count}), images, tmp_path, quiet)
    with pytest.raises(ExperimentError, match=r"data.train = 1797, .*number of samples 1797"):
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
    assert dataset.train.inputs.shape == (8, 3, 32, 32)
    assert dataset.test.inputs.shape == (10, 3, 32, 32)
    assert (dataset.train.inputs[:, 0, 0, 0] % 10 == dataset.train.labels).all()


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
        torch.save({**torch.load(path), "inputs": torch.zeros(3)}, path)
    again = data.load(Data(source="cifar10"), images, cache, quiet)
    assert again.checksum() == first.checksum()


@pytest.mark.parametrize("counts", [{"train": 9}, {"test": 3}, {"train": 1790, "test": 7}])
def test_each_digit_needs_an_image(counts: dict[str, int]):
    with pytest.raises(ExperimentError, match=r"data.train = .*number of classes = 10"):
        load_tiny_digits(**counts)


def test_names_of_folders_become_printable(images: Path, tmp_path: Path):
    odd = images.rename(tmp_path / "a\udcffb")
    assert data.load(Data(source="cifar10"), odd, tmp_path / "cache", quiet).name.isprintable()


LISTED = (".jpg", ".png", ".bmp", ".ppm", ".tif", ".webp")


def load_images(root: Path, tmp_path: Path) -> data.Dataset:
    return data.load(Data(source="cifar10"), root, tmp_path / "cache", quiet)


def test_downloads_go_to_new_folders_or_among_their_own(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    load_images(tmp_path / "new", tmp_path)
    (tmp_path / "empty").mkdir()
    load_images(tmp_path / "empty", tmp_path)
    for name in ("cifar-10-batches-py", "other"):
        (tmp_path / "used" / name).mkdir(parents=True)
    load_images(tmp_path / "used", tmp_path)  # torchvision has been here


def test_other_targets_are_refused(tmp_path: Path, images: Path):
    shutil.rmtree(images / "test")
    file = tmp_path / "file"
    file.touch()
    for path, words in (
        (images, "has no test folder"),
        (images / "train", "has no train and no test folder"),
        (file, "is a file"),
    ):
        with pytest.raises(ExperimentError, match=words):
            load_images(path, tmp_path)


def test_parts_must_have_the_same_classes(images: Path, tmp_path: Path):
    shutil.move(images / "test" / "dog", images / "test" / "fox")
    with pytest.raises(ExperimentError, match="different classes: cat, dog and cat, fox"):
        load_images(images, tmp_path)


def test_parts_without_images_are_refused(images: Path, tmp_path: Path):
    for path in (images / "test").rglob("*.jpg"):
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ExperimentError, match=r"must hold train/CLASS/\*.jpg .*no valid file"):
        load_images(images, tmp_path)
    shutil.rmtree(images / "test" / "cat")
    shutil.rmtree(images / "test" / "dog")
    with pytest.raises(ExperimentError, match="must hold train/CLASS"):
        load_images(images, tmp_path)


@pytest.mark.parametrize("suffix", LISTED)
def test_grey_images_of_any_listed_format_are_read(suffix: str, images: Path, tmp_path: Path):
    Image.new("L", (32, 32), 77).save(images / "test" / "dog" / f"z{suffix}")
    found = load_images(images, tmp_path).test[4]
    assert found.inputs.shape == (3, 32, 32)
    assert (found.inputs.int() - 77).abs().max() <= 3
    assert found.labels == 1


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
    elif kind == "small":
        Image.new("RGB", (48, 32)).save(path)
    elif kind == "text":
        path.write_bytes(b"not an image")
    else:
        Image.new("RGB", (32, 32)).save(path, format="GIF")


@pytest.mark.skipif(os.name != "posix", reason="the system has no such files")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dangling", "No such file"),
        ("pipe", "is not a regular file"),
        ("bomb", "DecompressionBombError"),
        ("large", "11000x11000 pixels"),
        ("small", "48x32 pixels"),
        ("cut", "is not a readable image"),
        ("empty", "is not a readable image"),
        ("text", "is not a readable image"),
        ("gif", "is not a readable image"),
    ],
)
def test_odd_files_are_named_on_one_line(images: Path, tmp_path: Path, kind: str, words: str):
    odd_file(images / "train" / "cat" / "a\udcffb.png", kind)
    with pytest.raises(ExperimentError) as told:
        load_images(images, tmp_path)
    message = str(told.value)
    assert words in message
    assert "a\\udcffb.png" in message
    assert message.isprintable()


def test_folders_named_like_images_are_folders(images: Path, tmp_path: Path):
    (images / "train" / "cat" / "a.png").mkdir()
    assert len(load_images(images, tmp_path).train) == 6


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on Unix only")
def test_names_need_not_be_utf8(images: Path, tmp_path: Path):
    shutil.move(images / "train" / "cat", images / "train" / "c\udcff")
    shutil.move(images / "test" / "cat", images / "test" / "c\udcff")
    found = load_images(images, tmp_path)
    assert found.classes == ("c\udcff", "dog")
    assert found.train.inputs.shape == (6, 3, 32, 32)
    assert load_images(images, tmp_path).checksum() == found.checksum()


def test_folders_that_cannot_be_read_are_named(images: Path, tmp_path: Path, monkeypatch):
    def refuse(path: object):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ExperimentError, match=r"must hold train/CLASS.*Permission denied"):
        load_images(images, tmp_path)


def test_mnist1d_needs_no_network_and_is_always_the_same(monkeypatch, capfd):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    first = data.load(Data(source="mnist1d"), None, Path("unused"), quiet)
    np.random.rand(3)  # the global state has no say
    part = data.load(Data(source="mnist1d", train=3999, seed=3), None, Path("unused"), quiet)
    assert torch.equal(part.test.inputs, first.test.inputs)
    ours, all_ = (set(map(tuple, each.train.inputs[:, 0].tolist())) for each in (part, first))
    assert len(ours) == 3999
    assert ours < all_
    assert (len(first.train), len(first.test), len(first.classes)) == (4000, 1000, 10)
    assert first.train.inputs.shape == (4000, 1, 40)
    assert first.train.inputs.dtype == torch.float32
    mean, deviation = first.normalisation()
    scaled = (first.train.inputs - mean) / deviation
    assert scaled.mean().abs() < 1e-5
    assert abs(scaled.std() - 1) < 1e-3
    assert capfd.readouterr().out == ""
    with pytest.raises(ExperimentError, match="leave --data-dir out"):
        data.load(Data(source="mnist1d"), Path("x"), Path("unused"), quiet)
    with pytest.raises(ExperimentError, match=r"data.train = 4001, .*only 4000 train examples"):
        first.train.subset(4001, 0, "train")


def test_sources_by_import_path_need_trust(own: Path):
    study = settings.read(own)
    with pytest.raises(ExperimentError, match=r"data.source: .*add --trust-config"):
        data.load(study.data, None, own.parent, quiet)
    found = data.load(study.data, None, own.parent, quiet, trusted=True)
    assert (found.name, found.classes, len(found.train)) == ("own", ("no", "yes"), 64)
    with pytest.raises(ExperimentError, match=r"data.source: there is no 'digit'. .*'digits'"):
        data.load(Data(source="digit"), None, own.parent, quiet, trusted=True)


def test_enlarged_digits_are_the_digits(tmp_path: Path):
    small, large = (
        data.load(Data(source=name, train=90, test=30), None, tmp_path, quiet)
        for name in ("digits", "digits28")
    )
    assert large.train.inputs.shape == (90, 1, 28, 28)
    assert large.test.inputs.dtype == torch.uint8
    assert torch.equal(large.train.labels, small.train.labels)
    shrunk = torch.nn.functional.adaptive_avg_pool2d(large.train.inputs.float(), 8).flatten()
    assert torch.corrcoef(torch.stack([shrunk, small.train.inputs.flatten().float()]))[0, 1] > 0.9
    pixels = large.train.inputs
    assert (pixels.amin(), pixels.amax()) == (0, 255)
    assert ((pixels > 0) & (pixels < 255)).float().mean() < 0.5  # ink has edges


def test_parts_for_a_search_have_no_test_example(dataset: data.Dataset):
    def rows(examples: data.Examples) -> list[tuple[int, ...]]:
        return [tuple(each.flatten().tolist()) for each in examples.inputs]

    own, test = set(rows(dataset.train)), set(rows(dataset.test))
    assert not own & test
    part = dataset.for_search(0, 0.2, 5)
    assert (len(part.train), len(part.test)) == (120, 30)
    assert sorted(rows(part.train) + rows(part.test)) == sorted(rows(dataset.train))
    assert not (set(rows(part.train)) | set(rows(part.test))) & test
    assert part.checksum() == dataset.for_search(0, 0.2, 5).checksum()
    assert part.checksum() != dataset.for_search(0, 0.2, 6).checksum()
    few = dataset.for_search(50, 0.1, 5)
    assert (len(few.train), len(few.test)) == (45, 5)
    assert len({*rows(few.train), *rows(few.test)}) == 50
    plain = dataset.for_search(50, 0, 5)
    assert len(plain.train) == 50
    assert set(rows(plain.train)) <= own


def test_source_code_predicts_its_next_byte_and_keeps_files_apart(tmp_path: Path, monkeypatch):
    for i in range(12):
        (tmp_path / f"{i:02}.py").write_bytes(bytes([i]) * 10)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_bytes(b"x" * 99)
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(tmp_path))
    chosen = Data(source="python_source", length=4, train=15)
    dataset = data.load(chosen, None, tmp_path, quiet)
    assert dataset.is_text
    assert len(dataset.train) == 15
    assert len(dataset.classes) == 256
    whole = data.load(Data(source="python_source", length=4), None, tmp_path, quiet)
    train, test = whole.train, whole.test
    assert torch.equal(train.inputs[:, 1:], train.labels[:, :-1])
    assert set(test.inputs.flatten().tolist()) == {0, 10}
    assert set(train.labels.flatten().tolist()) == set(range(12)) - {0, 10}
    assert len(train) == 100 // 5
