import math
import os
from pathlib import Path

import attrs
import pytest
import torch

from experiments import store
from experiments.errors import ExperimentError
from experiments.files import write_atomically
from experiments.results import Epoch

EPOCH = Epoch(1, 10, 0.5, math.nan, 90.0, math.inf, 80.0, {"damping": 0.1})


def test_record_is_read_as_written(tmp_path: Path):
    folder = store.folder(tmp_path, "sgd", 3)
    assert folder.record() is None
    record = store.RunRecord(
        {"algorithm": {"lr": 0.1}, "data": {"train": 5}}, "running", "abc", (EPOCH,)
    )
    folder.write_record(record)
    found = folder.record()
    assert (found.settings, found.status, found.mlflow_run_id) == (
        record.settings,
        "running",
        "abc",
    )
    assert repr(found.history) == repr(record.history)


def test_finished_runs_have_no_checkpoint(tmp_path: Path):
    folder = store.folder(tmp_path, "sgd", 0)
    folder.write_checkpoint({"steps": 3, "weights": torch.ones(2)})
    assert folder.checkpoint()["steps"] == 3
    record = store.RunRecord({}, "running", "abc")
    folder.write_record(record)
    assert folder.checkpoint() is not None
    folder.write_record(attrs.evolve(record, status="finished"))
    assert folder.checkpoint() is None


@pytest.mark.parametrize("name", ["run.json", "checkpoint.pt"])
def test_damaged_files_are_named(tmp_path: Path, name: str):
    folder = store.folder(tmp_path, "sgd", 0)
    folder.path.mkdir(parents=True)
    (folder.path / name).write_bytes(b'{"settings": ')
    with pytest.raises(ExperimentError, match=f"{name.split('.')[0]}.*delete"):
        folder.record() if name == "run.json" else folder.checkpoint()


def test_earlier_runs_are_moved(tmp_path: Path):
    assert store.move_earlier_runs(tmp_path) is None
    for expected in ("1", "2"):
        store.folder(tmp_path, "sgd", 0).write_record(store.RunRecord({}, "finished", expected))
        assert store.move_earlier_runs(tmp_path) == tmp_path / "earlier" / expected
        assert store.folder(tmp_path, "sgd", 0).record() is None
    assert "2" in (tmp_path / "earlier" / "2" / "sgd-seed0" / "run.json").read_text()


def test_interrupted_writes_keep_the_old_file(tmp_path: Path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


def test_differences_are_listed_by_key():
    old, new = {"a": 1, "b": {"c": [1, 2], "d": 0}}, {"a": 1, "b": {"c": (1, 2), "e": 4}}
    assert store.differences(old, old) == []
    assert store.differences(old, {"a": 1, "b": {"c": [1, 2], "d": 9}}) == ["b.d was 0, now 9"]
    assert store.differences(old, new) == [
        "b.c was [1, 2], now (1, 2)",
        "b.d was 0, now not set",
        "b.e was not set, now 4",
    ]


@pytest.mark.parametrize(
    "foreign",
    [
        *("digits/runs/sgd-seed0/run.json", "notes.txt", "sgd-seed0/events.out.tfevents.1"),
        *("Nov29_host/events.out", "sgd-seed0.txt", "-seed0/run.json", "sgd-seed0/sub/run.json"),
    ],
)
def test_folders_of_others_are_never_moved(tmp_path: Path, foreign: str):
    store.folder(tmp_path, "adam", 0).write_record(store.RunRecord({}, "finished", ""))
    path = tmp_path / "runs" / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ExperimentError, match="nothing of others is moved"):
        store.move_earlier_runs(tmp_path)
    assert path.read_text() == "mine"
    assert not (tmp_path / "earlier").exists()


def test_leftovers_of_killed_writers_move_along(tmp_path: Path):
    folder = store.folder(tmp_path, "sgd", 0)
    folder.path.mkdir(parents=True)
    (folder.path / ".checkpoint.pt.123").touch()
    assert store.move_earlier_runs(tmp_path) == tmp_path / "earlier" / "1"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"finished"', '"done"'),
        ('"finished"', "3"),
        ('"algorithm": {', '"algorithms": {'),
        ('"steps": 10', '"steps": null'),
        ('"steps": 10', '"steps": [1]'),
        ('"train_loss": "nan"', '"train_loss": "much"'),
        ('"curvature": {', '"curvature": 3, "x": {'),
        ('"history": [', '"history": [], "h": ['),
        ('"history": [', '"history": ' + "[" * 100_000),
        ('"abc"', "null"),
        (
            "{",
            "3",
        ),
    ],
)
def test_values_that_no_run_has_are_damage(tmp_path: Path, old: str, new: str):
    folder = store.folder(tmp_path, "sgd", 0)
    folder.write_record(store.RunRecord({"algorithm": {"lr": 1}}, "finished", "abc", (EPOCH,)))
    assert folder.record() is not None
    text = (folder.path / "run.json").read_text()
    assert old in text
    (folder.path / "run.json").write_text(text.replace(old, new, 1))
    with pytest.raises(ExperimentError, match="delete the folder") as told:
        folder.record()
    assert "\n" not in str(told.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes")
@pytest.mark.parametrize("name", ["run.json", "checkpoint.pt"])
def test_pipes_in_place_of_files_are_not_waited_for(tmp_path: Path, name: str):
    folder = store.folder(tmp_path, "sgd", 0)
    folder.path.mkdir(parents=True)
    os.mkfifo(folder.path / name)
    with pytest.raises(ExperimentError, match="cannot be read"):
        folder.record() if name == "run.json" else folder.checkpoint()
