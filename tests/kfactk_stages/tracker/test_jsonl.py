"""JSON lines: valid, batched, appended to."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import kfactk
from kfactk import OptionError
from kfactk.testing import Recorded, TrackerLaws
from kfactk_stages.tracker.jsonl import JsonLines


def lines(path: Path) -> list[Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("unmeasured")  # the process of a law dies
class TestJsonLines(TrackerLaws):
    stage = "jsonl"
    keeps_nonfinite = survives_exit = True

    def stage_in(self, folder: Path) -> Any:
        return {"name": "jsonl", "path": str(folder / "run.jsonl"), "every": 1}

    def read(self, folder: Path) -> Recorded:
        recipe, *rows = lines(folder / "run.jsonl")
        assert set(recipe) == {"recipe"}
        return Recorded(
            [
                (row.pop("step"), {name: float(value) for name, value in row.items()})
                for row in rows
            ],
            recipe["recipe"],
        )


class TestSparseJsonLines(TestJsonLines):
    test_flushed_records_survive_the_process = None

    def stage_in(self, folder: Path) -> Any:
        return {"name": "jsonl", "path": str(folder / "run.jsonl"), "every": 3, "buffer": 2}


def test_file_has_the_recipe_and_one_object_for_each_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "run.jsonl"
    tracker = JsonLines(path=path)
    tracker.start({"lr": 0.1, "clip": {"name": "kl"}, "betas": (0.9, 0.99)})
    tracker.record(0, {"loss": torch.tensor(0.5), "seconds/basis": 0.25})
    tracker.record(10, {"loss": torch.tensor(0.25), "skipped": 1})
    tracker.close()
    tracker.close()
    assert lines(path) == [
        {"recipe": {"lr": 0.1, "clip": {"name": "kl"}, "betas": [0.9, 0.99]}},
        {"step": 0, "loss": 0.5, "seconds/basis": 0.25},
        {"step": 10, "loss": 0.25, "skipped": 1},
    ]


def test_writes_when_the_buffer_is_full_or_flushed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    tracker = JsonLines(path=str(path), buffer=3)
    tracker.start({})
    counts = []
    for step in range(7):
        tracker.record(step, {"x": torch.tensor(float(step))})
        counts.append(len(lines(path)))
    assert counts == [1, 1, 4, 4, 4, 7, 7]
    tracker.flush()
    assert [line["step"] for line in lines(path)[1:]] == list(range(7))
    tracker.flush()
    assert len(lines(path)) == 8


def test_nonfinite_values_are_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    tracker = JsonLines(path=path)
    tracker.start({"limit": math.inf, "nested": [math.nan]})
    tracker.record(0, {"a": torch.tensor(math.nan), "b": -math.inf, "c": torch.tensor(math.inf)})
    tracker.close()
    recipe, metrics = lines(path)
    assert recipe == {"recipe": {"limit": "inf", "nested": ["nan"]}}
    assert metrics == {"step": 0, "a": "nan", "b": "-inf", "c": "inf"}
    assert math.isnan(float(metrics["a"]))
    assert float(metrics["b"]) == -math.inf


def test_resuming_appends_after_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for step in (0, 1):
        tracker = JsonLines(path=path)
        tracker.start({"run": step})
        tracker.record(step, {})
        tracker.close()
    assert lines(path) == [{"recipe": {"run": 0}}, {"step": 0}, {"recipe": {"run": 1}}, {"step": 1}]
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    JsonLines(path=path).start({"run": 2})
    assert path.read_text().splitlines()[4:] == ['{"step": 2, "lo', '{"recipe": {"run": 2}}']


def test_starting_again_flushes_first(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    tracker = JsonLines(path=path)
    tracker.start({"run": 0})
    tracker.record(0, {})
    tracker.start({"run": 1})
    assert lines(path) == [{"recipe": {"run": 0}}, {"step": 0}, {"recipe": {"run": 1}}]


def test_unwritable_paths_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "run.jsonl"):
        with pytest.raises(OptionError, match=r"jsonl.*cannot write.*path="):
            JsonLines(path=path).start({})


def test_equality_is_over_options_and_buffers_are_separate(tmp_path: Path) -> None:
    one, other = JsonLines(path=tmp_path / "x"), JsonLines(path=str(tmp_path / "x"))
    one.record(0, {"x": 1.0})
    assert one == other
    assert hash(one) == hash(other)
    other.flush()
    assert not (tmp_path / "x").exists()
    assert "_pending" not in repr(one)


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"every": 2.5}, {"every": True}, {"buffer": 0}, {"path": ""}, {"path": None}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        JsonLines(**options)


def test_unwritable_paths_are_errors_of_bind(tmp_path: Path) -> None:
    recipe = kfactk.build(tracker={"name": "jsonl", "path": str(tmp_path)})
    with pytest.raises(OptionError, match=r"jsonl.*cannot write"):
        recipe.bind(torch.nn.Linear(2, 2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_write_no_step_of_the_parent(tmp_path: Path) -> None:
    tracker = JsonLines(path=tmp_path / "run.jsonl")
    tracker.start({})
    tracker.record(0, {})
    if (child := os.fork()) == 0:
        tracker.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    tracker.close()
    assert lines(tmp_path / "run.jsonl") == [{"recipe": {}}, {"step": 0}]
