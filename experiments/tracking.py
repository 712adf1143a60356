"""Runs in MLflow: an experiment for each preset, a run for each algorithm and seed.

A study outlives its store: it never waits for one that does not answer longer than about two
seconds. What the store has not confirmed then goes to a file, to be imported later.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from experiments.errors import ExperimentError, system_reason
from experiments.store import Epoch, flatten
from kfactk.masking import mask, mask_settings
from kfactk_stages.tracker.mlflow_store import Outbox, is_mistake, reason

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

STATUS = {"finished": "FINISHED", "diverged": "FAILED", "interrupted": "KILLED"}
UNSENT = "mlflow-unsent.jsonl"
"""The file in the output for what the store has not confirmed."""


class Tracking:
    """An experiment in MLflow.

    Args:
        preset: The preset.
        output: Folder of the database, unless `MLFLOW_TRACKING_URI` names another store.

    Raises:
        ExperimentError: The store can never be used: its address is wrong, or it is damaged.
    """

    def __init__(self, preset: str, output: Path) -> None:
        import mlflow  # noqa: F401 - a thread would report late that it is missing

        logging.getLogger("alembic").setLevel(logging.WARNING)
        given = os.environ.get("MLFLOW_TRACKING_URI")
        output.mkdir(parents=True, exist_ok=True)
        self.uri = given or f"sqlite:///{(output / 'mlflow.db').resolve().as_posix()}"
        self.experiment = f"kfactk-{preset}"
        artifacts = None if given else (output / "mlartifacts").resolve().as_uri()
        self._where = {"experiment": self.experiment, "artifacts": artifacts}
        self._outbox = Outbox(self.uri, output / UNSENT)
        self._keys: dict[str, str] = {}
        self._lost = False
        self._outbox.put({"run": "", "experiment": self._where})
        self._outbox.delivery.wait(needed=True)
        failure = self._outbox.delivery.failure
        if failure is not None and (is_mistake(failure) or self._is_damaged(failure)):
            remedy = (
                "check MLFLOW_TRACKING_URI"
                if given
                else "move that file away, and a new one is made; or choose another --output"
            )
            raise ExperimentError(
                f"MLflow's store {self.uri} cannot be used ({reason(failure)}): {remedy}"
            )
        self._attend()

    def _is_damaged(self, failure: Exception) -> bool:
        """Return whether a local database failed for another reason than being in use."""
        return self.uri.startswith("sqlite:") and "locked" not in str(failure)

    def start(
        self,
        algorithm: str,
        seed: int,
        settings: Mapping[str, Any],
        history: Sequence[Epoch],
        earlier: str | None,
    ) -> str:
        """Start the run of one algorithm and seed, or continue an earlier one, and return its id.

        Epochs of `history` that the earlier run lacks are added. Where it is gone, or in another
        store, a new run gets the whole history. While the store has not told the id, it is a name
        by which the run can be found later.
        """
        key = earlier or uuid.uuid4().hex
        tags = {"algorithm": algorithm, "seed": str(seed)}
        name = f"{algorithm}-seed{seed}"
        where = {**self._where, "run_id": earlier, "name": name, "tags": tags, "time": _now()}
        params = {name: str(value) for name, value in flatten(mask_settings(settings))}
        self._outbox.put({"run": key, "start": where})
        self._outbox.put({"run": key, "params": params})
        self._put_metrics(key, _epoch_points(history), resumed=earlier is not None)
        self._outbox.delivery.wait()
        self._attend()
        run_id = self._outbox.store.runs.get(key, key)
        self._keys[run_id] = key
        return run_id

    def log(self, run_id: str, epochs: Sequence[Epoch], points: Sequence[Point] = ()) -> None:
        """Record the metrics of epochs by epoch, and those of single steps by step."""
        now = _now()
        steps = [
            (f"step/{name}", value, now, point.step)
            for point in points
            for name, value in point.metrics.items()
        ]
        self._put_metrics(self._keys[run_id], [*_epoch_points(epochs), *steps])
        self._outbox.delivery.wait()
        self._attend()

    def end(self, run_id: str, status: str) -> None:
        """End a run as "finished", "diverged" or "interrupted"."""
        self._outbox.put({"run": self._keys[run_id], "end": STATUS[status], "time": _now()})
        self._outbox.delivery.wait()
        self._attend()

    def close(self) -> None:
        """Wait, not long, for what is on its way; write what a silent store has not confirmed."""
        self._outbox.delivery.settle()
        self._outbox.delivery.stop()
        self._attend()

    @property
    def unsent(self) -> Path | None:
        """The file with what the store has not confirmed, if there is anything."""
        return self._outbox.path if self._outbox.delivery.failure is not None else None

    def _put_metrics(self, key: str, points: Sequence[Any], *, resumed: bool = False) -> None:
        if points:
            self._outbox.put({"run": key, "metrics": list(points), "resumed": resumed})

    def _attend(self) -> None:
        """Write what a failed store has not confirmed; warn once."""
        try:
            message = self._outbox.keep()
        except OSError as error:
            message = (
                f"MLflow's store {mask(self.uri)} fails, and its records cannot be written to "
                f"{self._outbox.path} either ({system_reason(error)}). Training goes on without "
                "them; run.json of each run has its epochs (said once)"
            )
            if self._lost:
                return
            self._lost = True
        if message is not None:
            warnings.warn(message, stacklevel=3)

    @contextlib.contextmanager
    def recording(self, run_id: str) -> Iterator[None]:
        """End the run as interrupted where the body raises."""
        try:
            yield
        except BaseException:
            self.end(run_id, "interrupted")
            raise

    def how_to_open(self, python: str) -> str:
        """Return the command, or the address, that shows the runs; credentials are masked."""
        uri = mask(self.uri)
        if self.uri.startswith("http"):
            return uri
        return f"{python} -m mlflow ui --backend-store-uri {shlex.quote(uri)}"


def _now() -> int:
    return int(time.time() * 1000)


def _epoch_points(epochs: Sequence[Epoch]) -> list[tuple[str, float, int, int]]:
    now = _now()
    return [
        (name, value, now, epoch.epoch)
        for epoch in epochs
        for name, value in {**epoch.metrics, "seconds": epoch.seconds}.items()
    ]


class Untracked:
    """The tracking of processes other than the first: it records nothing."""

    def start(
        self,
        algorithm: str,
        seed: int,
        settings: Mapping[str, Any],
        history: Sequence[Epoch],
        earlier: str | None,
    ) -> str:
        """Return an empty id."""
        return ""

    def log(self, run_id: str, epochs: Sequence[Epoch], points: Sequence[Point] = ()) -> None:
        """Do nothing."""

    def end(self, run_id: str, status: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def recording(self, run_id: str) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()


@attrs.frozen
class Point:
    """The metrics of one step."""

    step: int
    metrics: dict[str, float]


class Collector:
    """A kfactk tracker, passed to `kfactk.build` as an instance.

    Args:
        every: Record one step in so many.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps: list[tuple[int, dict[str, Tensor | float]]] = []

    @property
    def every(self) -> int:
        """Record one step in so many."""
        return self._every

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Do nothing."""

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Keep the metrics of one step; tensors stay on their device."""
        self._steps.append((step, dict(metrics)))

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def take(self) -> list[Point]:
        """Return all metrics, and forget them."""
        steps, self._steps = self._steps, []
        return [
            Point(step, {name: float(value) for name, value in metrics.items()})
            for step, metrics in steps
        ]


def means(points: list[Point]) -> dict[str, float]:
    """Return the mean of each metric over the points where it is finite."""
    values: dict[str, list[float]] = {}
    for point in points:
        for name, value in point.metrics.items():
            if math.isfinite(value):
                values.setdefault(name, []).append(value)
    return {name: sum(known) / len(known) for name, known in values.items()}
