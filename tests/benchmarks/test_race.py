"""Ratios of the race, from known seconds."""

import pytest
import torch

from benchmarks import race, tasks
from benchmarks.floor import Floor
from benchmarks.race import Run
from benchmarks.settings import ADAMW, BASELINE

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
    assert ours["stages"] == {"fisher": 0.5, "rest": 0.25}
    assert ours["floors"] == {"fisher": 0.25, "precondition": 0.05}
    assert (base["mean"], base["median"], base["worst"], base["floor"]) == (1.0, 1.0, 1.5, None)


def test_tables_show_metrics():
    found = race.metrics(RUNS, FLOORS)
    first, second = race.table(found).splitlines()[1:]
    assert first.split()[-3:] == ["1.00", "1.00", "1.5"]
    assert second.split() == ["ours", "3.00", "1.30", "2.00", "3.0"]
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
