"""All runs of a study: in turn, in workers, killed, resumed, in any order; the same bits."""

import importlib.metadata
import json
import os
import queue
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import multiprocessing

from experiments import data, runner, settings
from experiments.algorithms import Point
from experiments.data import Dataset
from experiments.errors import ExperimentError
from experiments.ranks import Communicator
from experiments.runner import Job, Listener
from experiments.settings import Study
from experiments.store import Epoch, Run
from kfactk.testing._support.ranks import process_context
from tests.experiments.studies import plain, with_training

CPU = torch.device("cpu")
WHERE = {"device": "cpu", "processes": 1}


class Heard(Listener):
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, Any]] = []

    def begin(self, job: Job, history: Sequence[Epoch]) -> None:
        self.events.append(("begin", job.key, len(history)))

    def epoch(self, job: Job, epoch: Epoch, points: Sequence[Point]) -> None:
        self.events.append(("epoch", job.key, epoch.epoch))

    def end(self, job: Job, run: Run) -> None:
        self.events.append(("end", job.key, run))

    @property
    def runs(self) -> dict[str, Run]:
        return {key: value for name, key, value in self.events if name == "end"}


@pytest.fixture
def own_study(own: Path) -> tuple[Study, Dataset]:
    study = settings.read(own, trusted=True)
    return study, data.load(study.data, None, own.parent, print, trusted=True)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are forked from a process which has imported torch, and start at once."""
    context = process_context()
    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda _: context)


def done(
    study: Study, dataset: Dataset, output: Path, *, workers: int = 1, backwards: bool = False
) -> Heard:
    heard, groups = Heard(), runner.plan(study, dataset, WHERE, output)
    runner.check_resumable(groups)
    groups = groups[::-1] if backwards else groups
    runner.run_all(groups, heard, device=CPU, ranks=Communicator(), workers=workers)
    return heard


def assert_same(found: Path, whole: Path) -> None:
    """The same settings, numbers and weights, and nothing else."""
    names = {path.name for path in (whole / "runs").iterdir()}
    assert {path.name for path in (found / "runs").iterdir()} == names
    for name in names:
        mine, other = (runner.store.RunFolder(each / "runs" / name) for each in (found, whole))
        assert {path.name for path in mine.path.iterdir()} == {"run.json", "model.pt"}
        one, two = mine.run(), other.run()
        assert (one.settings, one.status) == (two.settings, two.status)
        assert plain(one.history) == plain(two.history)
        weights = [torch.load(x.path / "model.pt", weights_only=True) for x in (mine, other)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_algorithms_of_a_seed_take_turns(own_study: tuple[Study, Dataset], tmp_path: Path):
    study, dataset = own_study
    heard = done(with_training(study, seeds=(5,)), dataset, tmp_path)
    events = [(name, key, each if name != "end" else None) for name, key, each in heard.events]
    assert events == [
        ("begin", "adamw-seed5", 0),
        ("begin", "ekfac-seed5", 0),
        ("epoch", "adamw-seed5", 1),
        ("epoch", "ekfac-seed5", 1),
        ("epoch", "adamw-seed5", 2),
        ("end", "adamw-seed5", None),
        ("epoch", "ekfac-seed5", 2),
        ("end", "ekfac-seed5", None),
    ]
    run = heard.runs["ekfac-seed5"]
    assert run.status == "finished"
    assert run.environment["versions"]["torch"] == importlib.metadata.version("torch")
    assert run.settings["training"]["batch_size"] == 16
    assert run.settings["algorithm"]["fisher"]["seed"] == 5


def test_runs_do_not_depend_on_turns_or_order(own_study: tuple[Study, Dataset], tmp_path: Path):
    study, dataset = own_study
    done(study, dataset, tmp_path / "whole")
    alone = with_training(study, alternate=False)
    assert [len(group) for group in runner.plan(alone, dataset, WHERE, tmp_path)] == [1] * 4
    done(alone, dataset, tmp_path / "alone", backwards=True)
    assert_same(tmp_path / "alone", tmp_path / "whole")
    again = done(study, dataset, tmp_path / "alone", backwards=True)  # nothing is done twice
    assert [name for name, _, _ in again.events] == ["begin", "end"] * 4


def test_diverged_runs_end_and_others_go_on(own_study: tuple[Study, Dataset], tmp_path: Path):
    study, dataset = own_study
    worse = study.algorithms["adamw"].with_options(lr=1e30)
    study = attrs.evolve(study, algorithms={**study.algorithms, "adamw": worse})
    runs = done(with_training(study, epochs=3), dataset, tmp_path).runs
    assert {key: run.status for key, run in runs.items()} == {
        **dict.fromkeys(("adamw-seed0", "adamw-seed1"), "diverged"),
        **dict.fromkeys(("ekfac-seed0", "ekfac-seed1"), "finished"),
    }
    assert [len(run.history) for run in runs.values()] != [3] * 4
    again = done(with_training(study, epochs=3), dataset, tmp_path).runs  # they are over
    assert {key: repr(run) for key, run in again.items()} == {
        key: repr(attrs.evolve(run, settings=again[key].settings)) for key, run in runs.items()
    }


def test_interrupted_runs_continue_after_any_event(
    own_study: tuple[Study, Dataset], tmp_path: Path
):
    """Also between the checkpoint and `run.json`."""
    study, dataset = own_study
    study = with_training(study, seeds=(0,), schedule="cosine")
    done(study, dataset, tmp_path / "whole")
    groups = runner.plan(study, dataset, WHERE, tmp_path / "out")

    class Stopped(Heard):
        left = 0

        def epoch(self, *values: Any) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            super().epoch(*values)

    for number in range(5):
        stopped = Stopped()
        stopped.left = number % 2
        try:
            runner.run_all(groups, stopped, device=CPU, ranks=Communicator())
        except KeyboardInterrupt:
            continue
        break
    else:
        pytest.fail("it makes no progress")
    assert number > 2
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_resuming_refuses_other_settings(own_study: tuple[Study, Dataset], tmp_path: Path):
    study, dataset = own_study
    done(with_training(study, seeds=(0,)), dataset, tmp_path)
    for changed, words in (
        (with_training(study, epochs=3), "training.epochs was 2, now 3"),
        (with_training(study, batch_size=8), "training.batch_size was 16, now 8"),
        (attrs.evolve(study, model=attrs.evolve(study.model, options={"width": 9})), "model.opt"),
        (
            attrs.evolve(
                study,
                algorithms={"ekfac": study.algorithms["ekfac"].with_options(damping=0.5)},
            ),
            "algorithm.damping was 0.01, now 0.5",
        ),
    ):
        with pytest.raises(ExperimentError, match=words):
            runner.check_resumable(runner.plan(changed, dataset, WHERE, tmp_path))
    other = attrs.evolve(dataset, train=dataset.train[torch.arange(64).flip(0)])
    with pytest.raises(ExperimentError, match=r"data.checksum was"):
        runner.check_resumable(runner.plan(study, other, WHERE, tmp_path))
    same = with_training(study, seeds=(0, 1), threads=3, target=0.1)
    runner.check_resumable(runner.plan(same, dataset, WHERE, tmp_path))


def test_two_workers_give_the_runs_of_one_process(own_study: tuple[Study, Dataset], tmp_path: Path):
    study, dataset = own_study
    one = done(study, dataset, tmp_path / "one")
    two = done(study, dataset, tmp_path / "two", workers=2)
    assert_same(tmp_path / "two", tmp_path / "one")
    assert sorted(two.runs) == sorted(one.runs)
    for key, run in two.runs.items():
        assert plain(run.history) == plain(one.runs[key].history)
        mine, theirs = (
            [event[:2] for event in heard.events if event[1] == key] for heard in (one, two)
        )
        assert mine == theirs


FATAL = """
import multiprocessing, os, signal, time
from pathlib import Path
folder = Path(__file__).parent

def fatal(*, channels, classes):
    if multiprocessing.parent_process() is not None and (folder / "armed").exists():
        (folder / "armed").unlink(missing_ok=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return network(channels=channels, classes=classes)

def stuck(*, channels, classes):
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(600)
"""


def with_network(own: Path, name: str) -> tuple[Study, Dataset]:
    """The study with another network of its module, which has more of them from now on."""
    module = next(own.parent.glob("own_*.py"))
    module.write_text(module.read_text() + FATAL)
    own.write_text(own.read_text().replace(f"{module.stem}:network", f"{module.stem}:{name}"))
    study = settings.read(own, trusted=True)
    return study, data.load(study.data, None, own.parent, print, trusted=True)


@pytest.mark.usefixtures("soon")
def test_killed_workers_are_one_line_and_the_rest_resumes(own: Path, tmp_path: Path):
    study, dataset = with_network(own, "fatal")
    done(study, dataset, tmp_path / "whole")
    (own.parent / "armed").touch()
    with pytest.raises(ExperimentError, match=r"a worker ended with code -9: .*--resume"):
        done(study, dataset, tmp_path / "out", workers=2)
    statuses = [
        json.loads(path.read_text())["status"] for path in tmp_path.glob("out/runs/*/run.json")
    ]
    assert statuses.count("finished") == 2  # the other worker has done its group
    done(study, dataset, tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "whole")


def parent_of_workers(own: str) -> None:
    context = multiprocessing.get_context("fork")
    runner.multiprocessing.get_context = lambda _: context
    study = settings.read(Path(own), trusted=True)
    dataset = data.load(study.data, None, Path(own).parent, print, trusted=True)
    done(study, dataset, Path(own).parent / "out", workers=2)


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are seen in /proc")
def test_workers_end_with_a_killed_parent(own: Path):
    """Otherwise they would write into a folder that another study has locked by then."""
    with_network(own, "stuck")
    parent = process_context().Process(target=parent_of_workers, args=(str(own),))
    parent.start()
    until = time.monotonic() + 60
    while len(found := list(own.parent.glob("*.pid"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    workers = [int(path.stem) for path in found]
    assert len(workers) == 2
    until = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.mark.usefixtures("soon")
def test_errors_of_a_worker_are_those_of_the_study(
    own_study: tuple[Study, Dataset], tmp_path: Path
):
    study, dataset = own_study
    (tmp_path / "runs" / "adamw-seed1").mkdir(parents=True)
    (tmp_path / "runs" / "adamw-seed1" / "run.json").mkdir()
    groups = runner.plan(study, dataset, WHERE, tmp_path)
    with pytest.raises(ExperimentError, match=r"adamw-seed1/run.json cannot be read"):
        runner.run_all(groups, Heard(), device=CPU, ranks=Communicator(), workers=2)


@pytest.mark.parametrize(
    ("error", "name", "words"),
    [
        (ExperimentError("so"), "error", "so"),
        (OSError(28, "No space left", "/x"), "error", "/x: No space left"),
        (ZeroDivisionError("a bug"), "crash", "ZeroDivisionError: a bug"),
    ],
)
def test_workers_report_their_errors(
    error: Exception, name: str, words: str, own_study: tuple[Study, Dataset], monkeypatch
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(runner, "_run_group", fail)
    before, events = signal.getsignal(signal.SIGINT), queue.Queue()
    try:
        taken = multiprocessing.get_context("spawn").Value("i", 0)
        runner._work([[]], CPU, torch.get_num_threads(), taken, events)
    finally:
        signal.signal(signal.SIGINT, before)
    found, _, _, (text,) = events.get_nowait()
    assert found == name
    assert words in text
