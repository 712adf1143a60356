"""Entries arrive in order, or stay together for a file; nobody waits long for a silent store."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kfactk_stages.tracker import delivery
from kfactk_stages.tracker.delivery import Delivery, append, read


def entries(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"run": "r", "number": first + number} for number in range(count)]


class Sink:
    """A store that fails, or stops answering, at one entry."""

    def __init__(self, *, fails: int = -1, hangs: int = -1, seconds: float = 0.0) -> None:
        self.got: list[dict[str, Any]] = []
        self.fails, self.hangs, self.seconds = fails, hangs, seconds
        self.answers = threading.Event()

    def send(self, entry: dict[str, Any]) -> None:
        time.sleep(self.seconds)
        if entry["number"] == self.fails:
            raise OSError("refused")
        if entry["number"] == self.hangs:
            self.answers.wait(60)
        self.got.append(entry)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PATIENCE", 1.0)


def put(made: Delivery, given: list[dict[str, Any]]) -> None:
    for entry in given:
        made.put(entry)


def test_entries_arrive_in_order() -> None:
    sink = Sink()
    made = Delivery(sink.send)
    put(made, entries(500))
    made.settle()
    made.stop()
    assert sink.got == entries(500)
    assert made.failure is None
    assert made.unsent() == []


def test_slow_stores_that_answer_get_everything(hasty: None) -> None:
    sink = Sink(seconds=0.3)
    made = Delivery(sink.send)
    put(made, entries(5))
    made.settle()  # 1.5 s in all, more than the patience, but each answer starts it again
    assert sink.got == entries(5)
    assert made.failure is None


def test_after_a_failure_the_rest_is_kept_in_order() -> None:
    sink = Sink(fails=2)
    made = Delivery(sink.send)
    put(made, entries(5))
    made.settle()
    assert isinstance(made.failure, OSError)
    assert sink.got == entries(2)
    assert made.unsent() == entries(3, first=2)
    made.put(*entries(1, first=5))
    assert made.unsent() == entries(1, first=5)
    assert made.unsent() == []


def test_silent_stores_are_given_up(hasty: None) -> None:
    sink = Sink(hangs=1)
    made = Delivery(sink.send)
    began = time.monotonic()
    put(made, entries(4))
    assert time.monotonic() - began < 0.9
    for _ in range(5):  # what is waited in vain does not add up
        assert not made.wait()
    assert made.failure is None
    made.settle()
    assert time.monotonic() - began < 4.5
    assert "no answer for 1 s" in str(made.failure)
    assert made.unsent() == entries(3, first=1)
    sink.answers.set()  # a late answer changes nothing
    time.sleep(0.1)
    assert made.unsent() == []


def test_stores_that_answer_late_lose_nothing(hasty: None) -> None:
    sink = Sink(hangs=1)
    made = Delivery(sink.send)
    put(made, entries(3))
    assert not made.wait()
    sink.answers.set()
    made.settle()
    assert made.failure is None
    assert sink.got == entries(3)


def test_first_answer_may_take_as_long_as_making(hasty: None) -> None:
    sink = Sink(hangs=0)
    made = Delivery(sink.send, making=30.0)
    put(made, entries(2))
    assert not made.wait()
    threading.Timer(1.5, sink.answers.set).start()
    made.settle()
    assert made.failure is None


@pytest.mark.parametrize(("name", "value"), [("LIMIT", 3), ("SILENCE", 0.2)])
def test_waiting_entries_are_bounded(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, name, value)
    sink = Sink(hangs=0)
    made = Delivery(sink.send)
    put(made, entries(3))
    time.sleep(0.3)
    put(made, entries(1, first=3))
    assert isinstance(made.failure, TimeoutError)
    assert made.unsent() == entries(4)


def test_process_ends_while_a_store_is_silent() -> None:
    program = (
        "import time; from kfactk_stages.tracker.delivery import Delivery\n"
        "made = Delivery(lambda entry: time.sleep(600)); made.put({})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60)
    assert done.returncode == 0


def test_file_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "unsent.jsonl"
    append(path, [{"a": math.inf, "b": [math.nan, 1.5]}, {"c": "é"}])
    path.write_bytes(path.read_bytes() + b'{"cut')
    append(path, [{"d": {"e": -math.inf}}])
    found = list(read(path))
    assert found == [
        (1, {"a": "inf", "b": ["nan", 1.5]}),
        (2, {"c": "é"}),
        (3, None),
        (4, {"d": {"e": "-inf"}}),
    ]
    assert all(json.loads(path.read_text().splitlines()[line]) for line in (0, 1, 3))


def test_unreadable_bytes_and_depths_are_lines_without_value(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xff\xfe\n" + b"[" * 100_000 + b"\n{}\n")
    assert [value for _, value in read(path)] == [None, None, {}]
