"""Progress of jobs: a bar on a terminal, plain lines elsewhere, both with the remaining time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TaskProgressColumn, TextColumn

from experiments.algorithms import Point
from experiments.runner import Job, Listener
from experiments.store import Epoch, Run
from kfactk.masking import mask

SLOW = 30.0
"""Seconds; without a bar, a run that lasts longer says so between its epochs."""


def say(console: Console, text: str) -> None:
    """Print text as it is: without markup, and without credentials."""
    console.print(mask(text), highlight=False, markup=False, emoji=False, soft_wrap=True)


def summary(epoch: Epoch) -> str:
    """Describe an epoch in one line."""

    def part(loss: float, accuracy: float | None) -> str:
        return f"loss {loss:.4f}" + ("" if accuracy is None else f", accuracy {accuracy:.2f} %")

    return (
        f"epoch {epoch.epoch}: training {part(epoch.train_loss, epoch.train_accuracy)}; "
        f"test {part(epoch.test_loss, epoch.test_accuracy)}"
    )


def duration(seconds: float) -> str:
    """Return a time in words.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Progress(Listener):
    """A listener that shows jobs.

    Args:
        console: Where to print.
        jobs: All jobs.
    """

    def __init__(self, console: Console, jobs: Sequence[Job]) -> None:
        self._console, self._jobs = console, len(jobs)
        self._steps, self._before, self._taken, self._ended = sum(j.steps for j in jobs), 0, 0, 0
        self._started = self._said = time.perf_counter()
        self._bars: Bars | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            columns = TextColumn("{task.description}", markup=False), BarColumn()
            self._bars = Bars(
                *(*columns, TaskProgressColumn(), TextColumn("{task.fields[left]}")),
                console=self._console,
            )
            self._task = self._bars.add_task("all", total=self._steps, left="")
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, job: Job, history: Sequence[Epoch]) -> None:
        """Say where a job continues."""
        done = sum(epoch.steps for epoch in history)
        self._before += done
        if 0 < done < job.steps:
            say(self._console, f"{job.label}: continues after epoch {history[-1].epoch}")
        self._show()

    def epoch(self, job: Job, epoch: Epoch, points: Sequence[Point]) -> None:
        """Show an epoch."""
        self._taken += epoch.steps
        now = time.perf_counter()
        if (
            self._bars is None
            and now - self._said > SLOW
            and epoch.epoch < job.study.training.epochs
        ):
            say(self._console, f"{job.label}: {summary(epoch)}{self._left()}")
            self._said = now
        self._show()

    def end(self, job: Job, run: Run) -> None:
        """Show the end of a job."""
        self._ended += 1
        if run.status == "diverged":  # its other steps never come
            self._before += max(0, job.steps - sum(epoch.steps for epoch in run.history))
        self._said = time.perf_counter()
        seconds = sum(epoch.seconds for epoch in run.history)
        say(
            self._console,
            f"[{self._ended}/{self._jobs}] {job.label}: {summary(run.history[-1])} "
            f"({seconds:.1f} s){self._left()}",
        )
        self._show()

    def _left(self) -> str:
        """Return the remaining time, as far as steps tell it."""
        steps = self._steps - self._before - self._taken
        if steps <= 0 or not self._taken:
            return ""
        each = (time.perf_counter() - self._started) / self._taken
        return f"; about {duration(steps * each)} left"

    def _show(self) -> None:
        if self._bars is not None:
            done = self._before + self._taken
            self._bars.update(self._task, completed=done, left=self._left().removeprefix("; "))
