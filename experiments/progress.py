"""What is shown while the runs go on: bars on a terminal, plain lines elsewhere."""

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

from experiments.results import Epoch

SLOW = 5.0
"""Seconds of an epoch from which on the run's epochs get lines of their own where there are no bars."""


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Shown(Protocol):
    """One run, as it is shown."""

    def step(self) -> None:
        """A step was taken."""

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is over."""


def summary(epoch: Epoch) -> str:
    """An epoch in a line."""
    return (
        f"epoch {epoch.epoch}: training loss {epoch.train_loss:.4f}, accuracy {epoch.train_accuracy:.2f} %; "
        f"test loss {epoch.test_loss:.4f}, accuracy {epoch.test_accuracy:.2f} %"
    )


class Progress:
    """Shows all runs.

    Args:
        console: Where to.
        runs: How many runs there are.
    """

    def __init__(self, console: Console, runs: int) -> None:
        self._console, self._runs, self._done = console, runs, 0
        self._bars: Bars | None = None
        self._total: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Bars(*columns, TextColumn("{task.fields[note]}"), console=self._console)
            self._total = self._bars.add_task("all runs", total=self._runs, note="")
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def skipped(self, label: str, epochs: int) -> None:
        """A run was finished already."""
        self._over(f"{label}: finished earlier, {epochs} epochs")

    @contextlib.contextmanager
    def run(self, label: str, steps: int, history: Sequence[Epoch]) -> Iterator[Shown]:
        """Show one run of `steps` steps, of which `history` is done."""
        started, last = time.perf_counter(), list(history)
        task = None
        if self._bars is not None:
            note = summary(history[-1]) if history else ""
            task = self._bars.add_task(
                label, total=steps, completed=sum(epoch.steps for epoch in history), note=note
            )
        elif history:
            say(self._console, f"{label}: goes on after epoch {history[-1].epoch}")
        try:
            yield _Shown(self._console, self._bars, task, label, steps, last)
        finally:
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)
        self._over(f"{label}: {summary(last[-1])} ({time.perf_counter() - started:.1f} s)")

    def _over(self, text: str) -> None:
        self._done += 1
        say(self._console, f"[{self._done}/{self._runs}] {text}")
        if self._bars is not None and self._total is not None:
            self._bars.advance(self._total)


class _Shown:
    def __init__(
        self,
        console: Console,
        bars: Bars | None,
        task: TaskID | None,
        label: str,
        steps: int,
        seen: list[Epoch],
    ) -> None:
        self._console, self._bars, self._task, self._label, self._steps, self._seen = (
            console,
            bars,
            task,
            label,
            steps,
            seen,
        )
        self._slow = False

    def step(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task)

    def epoch(self, epoch: Epoch) -> None:
        self._seen.append(epoch)
        self._slow = self._slow or epoch.seconds > SLOW
        if self._bars is not None and self._task is not None:
            self._bars.update(
                self._task,
                note=f"training loss {epoch.train_loss:.4f}, test accuracy {epoch.test_accuracy:.2f} %",
            )
        elif (
            self._slow and sum(epoch.steps for epoch in self._seen) < self._steps
        ):  # the last one is in the run's own line
            say(self._console, f"{self._label}: {summary(epoch)}")
