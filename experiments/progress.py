"""Progress of the runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bars,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.store import Epoch
from kfactk.masking import mask

SLOW_EPOCH = 5.0
"""Seconds; without bars, each epoch of a run with a longer epoch gets its own line."""


def say(console: Console, text: str) -> None:
    """Print text as it is: without markup, and without credentials."""
    console.print(mask(text), highlight=False, markup=False, emoji=False, soft_wrap=True)


class RunProgress(Protocol):
    """Progress of one run."""

    def step(self) -> None:
        """Show that a step was taken."""

    def epoch(self, epoch: Epoch) -> None:
        """Show that an epoch is over."""


def summary(epoch: Epoch) -> str:
    """Describe an epoch in one line."""
    return (
        f"epoch {epoch.epoch}: training loss {epoch.train_loss:.4f}, "
        f"accuracy {epoch.train_accuracy:.2f} %; "
        f"test loss {epoch.test_loss:.4f}, accuracy {epoch.test_accuracy:.2f} %"
    )


class Progress:
    """Progress of all runs.

    Args:
        console: Where to print.
        runs: Number of runs.
    """

    def __init__(self, console: Console, runs: int) -> None:
        self._console, self._runs, self._done = console, runs, 0
        self._bars: Bars | None = None
        self._total: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Bars(
                *columns, TextColumn("{task.fields[note]}", markup=False), console=self._console
            )
            self._total = self._bars.add_task("all runs", total=self._runs, note="")
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def skip(self, label: str, epochs: int) -> None:
        """Show that a run was finished earlier."""
        self._end_run(f"{label}: finished earlier, {epochs} epochs")

    @contextlib.contextmanager
    def run(self, label: str, steps: int, history: Sequence[Epoch]) -> Iterator[RunProgress]:
        """Show one run of `steps` steps, of which `history` is done."""
        started, last = time.perf_counter(), list(history)
        task = None
        if self._bars is not None:
            note = summary(history[-1]) if history else ""
            task = self._bars.add_task(
                label, total=steps, completed=sum(epoch.steps for epoch in history), note=note
            )
        elif history:
            say(self._console, f"{label}: continues after epoch {history[-1].epoch}")
        try:
            yield _RunProgress(self._console, self._bars, task, label, steps, last)
        finally:
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)
        self._end_run(f"{label}: {summary(last[-1])} ({time.perf_counter() - started:.1f} s)")

    def _end_run(self, text: str) -> None:
        self._done += 1
        say(self._console, f"[{self._done}/{self._runs}] {text}")
        if self._bars is not None and self._total is not None:
            self._bars.advance(self._total)


class _RunProgress:
    def __init__(
        self,
        console: Console,
        bars: Bars | None,
        task: TaskID | None,
        label: str,
        steps: int,
        history: list[Epoch],
    ) -> None:
        self._console, self._bars, self._task = console, bars, task
        self._label, self._steps, self._history = label, steps, history
        self._slow = False

    def step(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task)

    def epoch(self, epoch: Epoch) -> None:
        self._history.append(epoch)
        self._slow = self._slow or epoch.seconds > SLOW_EPOCH
        last = sum(epoch.steps for epoch in self._history) >= self._steps
        if self._bars is not None and self._task is not None:
            loss, accuracy = epoch.train_loss, epoch.test_accuracy
            note = f"training loss {loss:.4f}, test accuracy {accuracy:.2f} %"
            self._bars.update(self._task, note=note)
        elif self._slow and not last:  # the line of the run describes the last epoch
            say(self._console, f"{self._label}: {summary(epoch)}")
