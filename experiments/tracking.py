"""Runs in MLflow: an experiment for each preset, a run for each algorithm and seed.

Metrics begin with `epoch/` or, those of single steps, with `step/`: MLflow charts them apart.

A study outlives its store: it never waits for one that does not answer longer than about two
seconds. What the store has not confirmed then goes to a file, to be imported later.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.algorithms import Point
from experiments.errors import ExperimentError, system_reason
from experiments.runner import Job, Listener
from experiments.store import Epoch, Run, flatten, write_text
from kfactk.masking import mask, mask_settings
from kfactk_stages.tracker.mlflow_store import Outbox, is_mistake, reason

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

STATUS = {"finished": "FINISHED", "diverged": "FAILED", "interrupted": "KILLED"}
IDENTITY = ".study"
UNSENT = "mlflow-unsent.jsonl"
"""The file in the output for what the store has not confirmed."""


class Tracking(Listener):
    """A listener that records jobs in MLflow: a run each, trials nested under one of the search.

    Args:
        preset: The preset.
        output: Folder of the database, unless `MLFLOW_TRACKING_URI` names another store.
        resume: Whether runs of the same study are continued.

    Raises:
        ExperimentError: The store can never be used: its address is wrong, or it is damaged.
    """

    def __init__(self, preset: str, output: Path, *, resume: bool = False) -> None:
        import mlflow  # noqa: F401 - a thread would report late that it is missing

        logging.getLogger("alembic").setLevel(logging.WARNING)
        output.mkdir(parents=True, exist_ok=True)
        given, self.uri = os.environ.get("MLFLOW_TRACKING_URI"), store_of(output)
        self.experiment = f"kfactk-{preset}"
        artifacts = None if given else (output / "mlartifacts").resolve().as_uri()
        self._where = {"experiment": self.experiment, "artifacts": artifacts}
        self._study = _identity(output / IDENTITY, resume=resume)
        self._outbox = Outbox(self.uri, output / UNSENT)
        self._open: dict[str, Job | None] = {}
        self._held: dict[tuple[str, str], list[tuple[str, float, int, int]]] = {}
        self._moved: set[tuple[str, str]] = set()
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

    def open(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> None:
        """Make a run, or continue the one of the same study; `parent` is the name of another."""
        where = {**self._where, "name": name, "tags": dict(tags), "time": _now(), "resumed": True}
        if parent is not None:
            where["parent"] = self._key(parent)
        self._open[name] = None
        self._outbox.put({"run": self._key(name), "start": where})

    def begin(self, job: Job, history: Sequence[Epoch]) -> None:
        """Start the run of a job, or continue an earlier one; add the epochs that it lacks."""
        parent = str(job.trial["stage"]) if job.trial else None
        if parent is not None and parent not in self._open:
            self.open(parent, {"kind": "search"})
        tags = {"algorithm": job.algorithm.name, "seed": str(job.seed)}
        self.open(job.key, tags, parent)
        self._open[job.key] = job
        params = {name: str(value) for name, value in flatten(mask_settings(job.settings))}
        self._outbox.put({"run": self._key(job.key), "params": params})
        self._put_metrics(job.key, _epoch_points(history), resumed=True)
        self._settle()

    def epoch(self, job: Job, epoch: Epoch, points: Sequence[Point]) -> None:
        """Record the metrics of an epoch by epoch, and those of single steps by step.

        Metrics that never change, such as a constant damping, are left out: parameters have them.
        Others are held back until they change.
        """
        now, steps = _now(), []
        names = {name for point in points for name in point.metrics}
        for name in sorted(names):
            key, held = (job.key, name), self._held.setdefault((job.key, name), [])
            held += [
                (f"step/{name}", p.metrics[name], now, p.step) for p in points if name in p.metrics
            ]
            if key in self._moved or any(value != held[0][1] for _, value, _, _ in held):
                self._moved.add(key)
                steps += self._held.pop(key)
        self._put_metrics(job.key, [*_epoch_points([epoch]), *steps])
        self._settle()

    def end(self, job: Job, run: Run) -> None:
        """End the run of a job."""
        self._close(job.key, STATUS[run.status])

    def finish(
        self, name: str, metrics: Mapping[str, float], files: Sequence[Path] = (), *, count: int = 0
    ) -> None:
        """Add a summary and files to a run, if it is open, and end it.

        Args:
            name: Name of the run.
            metrics: The summary.
            files: The files.
            count: How many runs or trials the summary is of; one of as many is recorded once.
        """
        if name not in self._open:
            return
        now = _now()
        points = [(key, value, now, count) for key, value in metrics.items()]
        self._put_metrics(name, points, resumed=True)
        self._outbox.put({"run": self._key(name), "files": [str(path) for path in files]})
        self._close(name, "FINISHED")

    def close(self, *, interrupted: bool = False) -> None:
        """Wait, not long, for what is on its way; write what a silent store has not confirmed."""
        for name in list(self._open):
            self._close(name, STATUS["interrupted"] if interrupted else "FINISHED")
        self._outbox.delivery.settle()
        self._outbox.delivery.stop()
        self._attend()

    @property
    def unsent(self) -> Path | None:
        """The file with what the store has not confirmed, if there is anything."""
        return self._outbox.path if self._outbox.delivery.failure is not None else None

    def _key(self, name: str) -> str:
        return f"{self._study}/{name}"

    def _close(self, name: str, status: str) -> None:
        if name in self._open:
            del self._open[name]
            self._outbox.put({"run": self._key(name), "end": status, "time": _now()})
            self._settle()

    def _settle(self) -> None:
        self._outbox.delivery.wait()
        self._attend()

    def _put_metrics(self, name: str, points: Sequence[Any], *, resumed: bool = False) -> None:
        if points:
            entry = {"run": self._key(name), "metrics": list(points), "resumed": resumed}
            self._outbox.put(entry)

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

    def how_to_open(self, python: str) -> tuple[str, str]:
        """Return what starts MLflow's pages, "" for a server, and the address of the runs there."""
        uri = mask(self.uri)
        number = self._outbox.store.experiments.get(self.experiment, "")
        page = f"/#/experiments/{number}/runs?workflowType=machine_learning" if number else ""
        if self.uri.startswith("http"):
            return "", f"{uri.rstrip('/')}{page}"
        start = f"{python} -m mlflow ui --backend-store-uri {shlex.quote(uri)}"
        return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {start}", f"http://127.0.0.1:5000{page}"


def store_of(output: Path) -> str:
    """Return the address of the store: a file in the output, or `MLFLOW_TRACKING_URI`."""
    local = f"sqlite:///{(output / 'mlflow.db').resolve().as_posix()}"
    return os.environ.get("MLFLOW_TRACKING_URI") or local


def _identity(path: Path, *, resume: bool) -> str:
    """Return what tells this study from others in a store; kept with its outputs."""
    with contextlib.suppress(OSError, ValueError):
        kept = path.read_text(encoding="utf-8").strip() if resume and path.is_file() else ""
        if re.fullmatch("[0-9a-f]{32}", kept):
            return kept
    made = uuid.uuid4().hex
    write_text(path, made + "\n")
    return made


def _now() -> int:
    return int(time.time() * 1000)


def _epoch_points(epochs: Sequence[Epoch]) -> list[tuple[str, float, int, int]]:
    now = _now()
    return [
        (f"epoch/{name}", value, now, epoch.epoch)
        for epoch in epochs
        for name, value in {**epoch.metrics, "seconds": epoch.seconds}.items()
    ]
