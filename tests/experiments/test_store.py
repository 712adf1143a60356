"""Files of a study: whole or absent, locked, and told where damaged."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
import torch

from experiments import store
from experiments.errors import ExperimentError
from experiments.store import Epoch, Run, RunFolder, hold, write_atomically, write_text

EPOCH = Epoch(
    *(1, 2, 0.5, math.nan, 90.0, math.inf, 80.0),
    losses=(1.5, math.nan),
    times=(0.2, 0.3),
    curvature={"damping": 0.1},
)
RUN = Run("sgd", 3, "finished", {"algorithm": {"lr": 0.1}, "x": [1, 2]}, {"commit": "a"}, (EPOCH,))
RUNNING = attrs.evolve(RUN, status="running", history=())
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def quiet(text: str) -> None:
    raise AssertionError(text)


def test_runs_are_read_as_written(tmp_path: Path):
    folder = store.folder(tmp_path, "sgd", 3)
    assert folder.run() is None
    folder.write_run(RUN)
    assert repr(folder.run()) == repr(RUN)
    assert RUN.key == folder.path.name == "sgd-seed3"


def test_finished_runs_have_no_checkpoint(tmp_path: Path):
    folder = store.folder(tmp_path, "sgd", 0)
    folder.write_checkpoint({"steps": 3, "weights": torch.ones(2)})
    assert folder.checkpoint()["steps"] == 3
    folder.write_run(RUNNING)
    assert folder.checkpoint() is not None
    folder.write_run(RUN)
    assert folder.checkpoint() is None


def test_compact_runs_keep_means_of_all_steps():
    losses = tuple(float(i) for i in range(7))
    history = tuple(
        attrs.evolve(EPOCH, epoch=i, steps=7, losses=losses, times=losses, train_loss=1 / 3)
        for i in (1, 2)
    )
    found = attrs.evolve(RUN, history=history).compact(4)
    for epoch in found.history:
        assert epoch.losses == epoch.times == (1.5, 5.0)
        assert (epoch.train_loss, epoch.curvature) == (0.333333, {})
    assert attrs.evolve(RUN, history=history).compact(1000).history[0].losses == losses


@pytest.mark.parametrize("name", ["run.json", "checkpoint.pt"])
def test_damaged_files_are_named(tmp_path: Path, name: str):
    folder = store.folder(tmp_path, "sgd", 0)
    folder.path.mkdir(parents=True)
    (folder.path / name).write_bytes(b'{"settings": ')
    with pytest.raises(ExperimentError, match=rf"{name.split('.')[0]}.*delete"):
        folder.run() if name == "run.json" else folder.checkpoint()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes")
@pytest.mark.parametrize("name", ["run.json", "checkpoint.pt"])
def test_pipes_in_place_of_files_are_not_waited_for(tmp_path: Path, name: str):
    folder = store.folder(tmp_path, "sgd", 0)
    folder.path.mkdir(parents=True)
    os.mkfifo(folder.path / name)
    with pytest.raises(ExperimentError, match="cannot be read"):
        folder.run() if name == "run.json" else folder.checkpoint()


def test_files_in_place_of_folders_are_told(tmp_path: Path):
    (tmp_path / "runs").touch()
    with pytest.raises(ExperimentError, match=r"run\.json cannot be read"):
        store.folder(tmp_path, "sgd", 0).run()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"finished"', '"done"'),
        ('"finished"', "3"),
        ('"settings":{', '"setting":{'),
        ('"settings":{', '"settings":3,"x":{'),
        ('"steps":2', '"steps":null'),
        ('"steps":2', '"steps":[1]'),
        ('"seed":3', '"seed":null'),
        ('"train_loss":"nan"', '"train_loss":"much"'),
        ('"losses":[', '"losses":["much",'),
        ('"losses":[', '"losses":3,"x":['),
        ('"curvature":{', '"curvature":3,"x":{'),
        ('"history":[', '"history":[],"h":['),
        ('"history":[', '"history":' + "[" * 100_000),
        ('"environment":{', '"environment":3,"x":{'),
        ("{", "3"),
    ],
)
def test_values_that_no_run_has_are_damage(tmp_path: Path, old: str, new: str):
    folder = store.folder(tmp_path, "sgd", 0)
    folder.write_run(RUN)
    text = (folder.path / "run.json").read_text()
    assert old in text
    (folder.path / "run.json").write_text(text.replace(old, new, 1))
    with pytest.raises(ExperimentError, match="delete the folder") as told:
        folder.run()
    assert str(told.value).isprintable()


def test_earlier_runs_and_trials_are_moved(tmp_path: Path):
    assert store.move_earlier_runs(tmp_path) is None
    for number in ("1", "2"):
        store.folder(tmp_path, "sgd", 0).write_run(attrs.evolve(RUN, algorithm=number))
        write_text(tmp_path / "search" / "fair.log", number)
        assert store.move_earlier_runs(tmp_path) == tmp_path / "earlier" / number
        assert store.folder(tmp_path, "sgd", 0).run() is None
        assert not (tmp_path / "search").exists()
    moved = RunFolder(tmp_path / "earlier" / "2" / "runs" / "sgd-seed0").run()
    assert moved is not None
    assert moved.algorithm == "2"
    assert (tmp_path / "earlier" / "1" / "search" / "fair.log").read_text() == "1"


@pytest.mark.parametrize(
    "foreign",
    [
        *("runs/digits/runs/sgd-seed0/run.json", "runs/notes.txt", "runs/-seed0/run.json"),
        *("runs/sgd-seed0/events.out.tfevents.1", "runs/Nov29_host/events.out"),
        *("runs/sgd-seed0.txt", "runs/sgd-seed0/sub/run.json"),
        *("search/notes.txt", "search/thesis.json/x", "search/x.log"),
    ],
)
def test_folders_of_others_are_never_moved(tmp_path: Path, foreign: str):
    store.folder(tmp_path, "adam", 0).write_run(RUN)
    path = tmp_path / foreign
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
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "fair.log.lock").symlink_to("nowhere")  # as Optuna makes it
    (tmp_path / "search" / ".fair.json.12").touch()
    assert store.move_earlier_runs(tmp_path) == tmp_path / "earlier" / "1"


def test_differences_are_listed_by_key():
    old, new = {"a": 1, "b": {"c": [1, 2], "d": 0}}, {"a": 1, "b": {"c": (1, 2), "e": 4}}
    assert store.differences(old, old) == []
    assert store.differences(old, {"a": 1, "b": {"c": [1, 2], "d": 9}}) == ["b.d was 0, now 9"]
    assert store.differences(old, new) == ["b.d was 0, now not set", "b.e was not set, now 4"]


def test_settings_are_compared_as_they_are_read(tmp_path: Path):
    settings = {"a": math.inf, "b": (1, {"c": math.nan}), "d": {"e": ("x",)}, "f": None}
    folder = store.folder(tmp_path, "sgd", 0)
    folder.write_run(attrs.evolve(RUN, settings=settings))
    assert store.differences(folder.run().settings, store.as_read(settings)) == []


def test_interrupted_writes_keep_the_old_file(tmp_path: Path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from experiments.errors import ExperimentError
from experiments.store import write_atomically, write_text
folder = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow further
for work in (
    lambda: write_text(folder / "text", "x" * 30_000),
    lambda: write_atomically(
        folder / "tensors", lambda file: torch.save({"x": torch.zeros(30_000)}, file)
    ),
):
    try:
        work()
    except ExperimentError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is Unix's")
def test_full_disk_is_one_line_and_keeps_the_old_file(tmp_path: Path):
    for name in ("text", "tensors"):
        (tmp_path / name).write_text("whole")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.partition(" cannot be written")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / "text"),
        str(tmp_path / "tensors"),
    ]
    assert {each.read_text() for each in tmp_path.iterdir()} == {"whole"}
    assert len(list(tmp_path.iterdir())) == 2


def test_folders_in_the_way_are_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path in (tmp_path / "file" / "new", tmp_path / "folder"):
        with pytest.raises(ExperimentError, match="cannot be written"):
            write_text(path, "text")


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path: Path):
    write_text(tmp_path / "file", "a\udcffb")
    assert (tmp_path / "file").read_bytes() == b"a\\udcffb"


def test_errors_of_the_writer_itself_are_not_hidden(tmp_path: Path):
    with pytest.raises(KeyError):
        write_atomically(tmp_path / "file", lambda path: {}["x"])
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from experiments import store
with store.hold(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_second_holder_is_told_who_holds_it(tmp_path: Path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    try:
        assert other.stdout.readline() == b"held\n"
        began = time.monotonic()
        with pytest.raises(ExperimentError, match=rf"in use by .*process {other.pid} on"):
            hold(tmp_path, quiet).__enter__()
        assert time.monotonic() - began < 1.0
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    (tmp_path / ".report.html.77").write_text("half")
    with hold(tmp_path, quiet):  # the lock has ended with its process
        assert f"process {os.getpid()} on" in (tmp_path / store.OWNER).read_text()
    assert not (tmp_path / store.OWNER).exists()
    assert not (tmp_path / ".report.html.77").exists()


def test_it_may_be_held_again_and_after_errors(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), hold(tmp_path / "new" / "folder", quiet):
            raise KeyboardInterrupt


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path):
    run = tmp_path / "runs" / "sgd-seed0"
    names = ("cache", "figures", "results", "search", "other")
    for folder in (run, *(tmp_path / name for name in names)):
        folder.mkdir(parents=True)
    gone = [
        *(run / ".run.json.12", run / ".checkpoint.pt.3", tmp_path / "cache" / ".train.pt.9"),
        *(tmp_path / "figures" / ".test_loss.svg.1", tmp_path / ".report.html.99"),
        *(tmp_path / "results" / ".study.json.1", tmp_path / "search" / ".fair.json.1"),
        *(tmp_path / "..study.12", tmp_path / "..lock-owner.12"),
    ]
    kept = [
        *(run / "run.json", run / ".note.12", tmp_path / ".git.1", tmp_path / "report.html.1"),
        *(tmp_path / "other" / ".x.json.1", tmp_path / "figures" / ".mine.svg"),
        *(tmp_path / "search" / "fair.log", tmp_path / ".study"),
    ]
    for path in (*gone, *kept):
        path.write_text("")
    (run / ".a.pt.1").mkdir()
    with hold(tmp_path, quiet):
        assert not any(path.exists() for path in gone)
        assert all(path.exists() for path in kept)


def test_file_systems_without_locks_are_told(tmp_path: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(store.filelock.FileLock, "acquire", refuse)
    said = []
    with hold(tmp_path, said.append):
        pass
    assert "without locks" in said[0]


@pytest.mark.parametrize("refused", [PermissionError(13, "Permission denied"), OSError(28, "full")])
def test_folders_that_cannot_be_locked_are_refused(tmp_path: Path, monkeypatch, refused: OSError):
    def refuse(*_: object, **__: object) -> None:
        raise refused

    monkeypatch.setattr(store.filelock.FileLock, "acquire", refuse)
    with pytest.raises(ExperimentError, match=r"--output .* cannot be written to") as told:
        hold(tmp_path, quiet).__enter__()
    assert refused.strerror in str(told.value)


def test_json_holds_no_nan(tmp_path: Path):
    store.write_json(tmp_path / "x.json", {"a": (math.nan, -math.inf, 1.0), "b": {"c": math.inf}})
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": ["nan", "-inf", 1.0], "b": {"c": "inf"}}
