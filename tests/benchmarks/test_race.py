"""Ratios of the race, from known seconds; and what it does when time or memory end."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks import race, tasks
from benchmarks.floor import Floor
from benchmarks.race import Run
from benchmarks.settings import ADAMW, BASELINE, Setting

RUNS = {
    BASELINE: Run([1.0, 2.0, 3.0], {}),
    "ours": Run([2.0, 4.0, 12.0], {"fisher": 1.0, "rest": 0.5}),
}
FLOORS = {"ours": Floor({"fisher": 0.5, "precondition": 0.1}, 2.0, 1.0)}


def test_metrics_are_relative_to_the_baseline():
    found = race.metrics(RUNS, FLOORS)
    ours, base = found["ours"], found[BASELINE]
    assert (ours["mean"], ours["median"], ours["worst"]) == (3.0, 2.0, 3.0)
    assert ours["floor"] == pytest.approx(1.3)
    assert ours["worst_floor"] == pytest.approx((2.0 + 2.0) / 4.0)  # SGD's step and the curvature's
    assert (ours["steps"], ours["first"]) == (3, 0.0)
    assert ours["stages"] == {"fisher": 0.5, "rest": 0.25}
    assert ours["floors"] == {"fisher": 0.25, "precondition": 0.05}
    assert (base["mean"], base["median"], base["worst"], base["floor"]) == (1.0, 1.0, 1.5, None)


def test_tables_show_metrics():
    found = race.metrics(RUNS, FLOORS)
    first, second = race.table(found).splitlines()[1:]
    assert first.split()[-3:] == ["1.00", "1.00", "1.5"]
    assert second.split() == ["ours", "3.00", "1.30", "2.00", "3.0", "1.0"]
    [line] = race.stages(found).splitlines()[1:]
    assert line.split() == [
        "ours",
        "0.500",
        "(0.250)",
        "0.000",
        "0.000",
        "0.000",
        "0.000",
        "(0.050)",
        "0.000",
        "0.000",
        "0.250",
    ]


def test_all_take_equal_steps_and_ours_are_timed_by_stage():
    task = tasks.resnet8(1)
    chosen = {name: each for name, each in task.settings().items() if name in (BASELINE, "ekfac")}
    runs, speed = race.measure(chosen, task, 2, 2, torch.device("cpu"), profiled=True)
    assert {name: len(run.seconds) for name, run in runs.items()} == dict.fromkeys(chosen, 2)
    assert set(speed) == {"float32"}
    mine = runs["ekfac"]
    assert set(mine.stages) == {
        "precondition",
        "clip",
        "update",
        "rest",
    }  # nothing else is due in the two steps after the first
    assert sum(mine.stages.values()) < sum(mine.seconds) / 2
    assert not runs[BASELINE].stages


def test_a_transformer_is_raced_against_adamw(capsys):
    task = tasks.transformer(4, depth=1)
    chosen = {name: each for name, each in task.settings().items() if name in (ADAMW, "ekfac")}
    found = race.race(chosen, task, 2, 2, torch.device("cpu"))
    printed = capsys.readouterr().out
    assert found["baseline"] == ADAMW
    assert found["settings"][ADAMW]["mean"] == 1
    assert found["settings"]["ekfac"]["floor"] > 1
    assert "x AdamW" in printed
    assert "GPT of 1 blocks, width 4, 128 tokens, 2 examples" in printed


CPU = torch.device("cpu")


def small(*names: str) -> tuple[tasks.Task, dict[str, Setting]]:
    task = tasks.resnet8(1)
    return task, task.settings(named=names)


def test_results_are_known_after_each_round():
    task, chosen = small("ekfac", "Adam (torch)")
    seen = []
    for runs, speed in race.rounds(chosen, task, 2, 2, CPU, profiled=False):
        seen.append(({name: len(run.seconds) for name, run in runs.items()}, set(speed)))
        assert all(run.first > 0 for run in runs.values())
    assert list(chosen) == [BASELINE, "ekfac", "Adam (torch)"]  # in the order asked for
    assert seen[:3] == [(dict.fromkeys(list(chosen)[:n], 0), set()) for n in (1, 2, 3)]
    rates = {"float32"}
    assert seen[3:] == [(dict.fromkeys(chosen, n), rates) for n in (1, 2, 2)]


def test_the_file_is_whole_after_each_round(tmp_path: Path, monkeypatch):
    task, chosen = small("ekfac")
    monkeypatch.setattr(race, "floors", lambda *given: 1 / 0)  # what follows the rounds fails
    output = race.Output(tmp_path / "new", [{"task": "earlier"}])
    with pytest.raises(ZeroDivisionError):
        race.race(chosen, task, 3, 2, CPU, output=output)
    earlier, found = json.loads((tmp_path / "new" / "race.json").read_text())["races"]
    assert earlier == {"task": "earlier"}
    assert {name: each["steps"] for name, each in found["settings"].items()} == {
        BASELINE: 3,
        "ekfac": 3,
    }
    assert found["settings"]["ekfac"]["floor"] is None
    assert found["left_out"] == []


def test_steps_end_when_the_time_is_up(capsys):
    task, chosen = small("ekfac", "Adam (torch)")
    found = race.race(chosen, task, 10**6, 2, CPU, until=time.perf_counter())
    assert list(found["first"]) == [BASELINE]  # the others would begin in the second half
    assert found["left_out"] == ["ekfac", "Adam (torch)"]
    assert found["settings"][BASELINE]["steps"] == 1
    assert "not begun in time: ekfac, Adam (torch)" in capsys.readouterr().out
    found = race.race(chosen, task, 10**6, 2, CPU, until=time.perf_counter() + 4)
    [steps] = {each["steps"] for each in found["settings"].values()}
    assert 1 <= steps < 10**6


def test_a_batch_that_needs_too_much_memory_is_halved(monkeypatch, capsys):
    task, chosen = small()
    batch = tasks.Task.batch

    def too_large(self: tasks.Task, size: int, *given: object) -> object:
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch(self, size, *given)

    monkeypatch.setattr(tasks.Task, "batch", too_large)
    found = race.race(chosen, task, 1, 8, CPU)
    assert (found["batch"], found["batch_asked"]) == (2, 8)
    assert "8 examples need more memory than there is; now 4" in capsys.readouterr().out
    monkeypatch.setattr(tasks.Task, "batch", lambda *given: too_large(task, 3))
    with pytest.raises(torch.OutOfMemoryError):
        race.race(chosen, task, 1, 2, CPU)


def test_a_setting_with_a_lag_does_not_alternate():
    """Its thread would work in the steps of others."""
    task = tasks.transformer(4, depth=1)
    late, other = "ekfac, staggered, a lag of 10", "ekfac, staggered"
    chosen = task.settings(named=(late, other))
    counts = [
        tuple(len(runs[name].seconds) for name in (ADAMW, other, late))
        for runs, _ in race.rounds(chosen, task, 2, 2, CPU, profiled=False)
        if len(runs) == 3
    ]
    assert counts == [(0, 0, 0), (1, 1, 0), (2, 2, 0), (2, 2, 1), (2, 2, 2), (2, 2, 2)]


def test_each_entry_has_the_same_share_of_the_time():
    model = torch.nn.Linear(1, 1)
    entries = [race.Entry(name, model, None, name == "late") for name in ("one", "late", "other")]
    start = time.perf_counter()
    (alternating, middle), (late, end) = race.groups(entries, start + 30)
    assert [[entry.name for entry in group] for group in (alternating, late)] == [
        ["one", "other"],
        ["late"],
    ]
    assert middle == pytest.approx(start + 20, abs=1)
    assert end == pytest.approx(start + 30, abs=1)
    assert {until for _, until in race.groups(entries, math.inf)} == {math.inf}
