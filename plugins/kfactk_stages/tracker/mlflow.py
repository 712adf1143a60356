"""Tracking to MLflow."""

from __future__ import annotations

import os
import re
import time
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from kfactk import KfactkError, KfactkWarning, OptionError, hookimpl
from kfactk.masking import mask, mask_settings
from kfactk.options import text, whole
from kfactk_stages.tracker._buffer import Buffer, Row, flattened
from kfactk_stages.tracker.delivery import Entry
from kfactk_stages.tracker.mlflow_store import Outbox, import_file, is_mistake, reason

MAX_VALUE, MAX_NAME = 6000, 250
"""MLflow's limits on the characters of a parameter's value and of a name."""


@attrs.define(eq=False)
class _Run:
    """The run that the tracker writes to, once started.

    Args:
        key: Its name in entries.
        outbox: Where its entries go.
        start: The entries that describe it.
        own: Whether the tracker made it.
        process: The process that started it; a fork of that has no thread to send with.
    """

    key: str
    outbox: Outbox
    start: list[Entry]
    own: bool
    process: int = attrs.field(factory=os.getpid)


@attrs.define(eq=False)
class _Current:
    run: _Run | None = None


def _masked_repr(value: str | None) -> str:
    return repr(None if value is None else mask(value))


@attrs.frozen
class Mlflow:
    """Record a run in MLflow: the recipe as parameters, each recorded step as metrics.

    If a run is active in this process at the start, the tracker uses it and leaves it active.
    Otherwise it makes a new run through MLflow's client, and `close` ends it. The active run,
    experiment and store of the process do not change. To continue an earlier run, make it active
    first (`mlflow.start_run(run_id=...)`). Non-finite metrics are sent as they are; each MLflow
    store keeps them in its own way.

    A thread sends the records, in order. Training never waits for the store: `start`, `flush` and
    `close` wait up to two seconds for a store that does not answer. When a call has failed, or the
    store was silent for half a minute, or at `close`, all records that it has not confirmed go to
    the file `unsent`. One warning names that file and the command that imports it. A new local
    database, which MLflow takes seconds to make, is waited for.

    Credentials in `tracking_uri` are masked in `repr`, in messages and in what is recorded.

    It needs `pip install mlflow`. MLflow is imported at the start, not before.

    Args:
        experiment: Name of the experiment for a new run, made when missing; `None` for the one set
            in MLflow, or its default.
        run_name: Name of a new run; `None` lets MLflow choose one.
        tracking_uri: Where a new run is stored; `None` for the store set in MLflow.
        every: Record one step in so many.
        prefix: Prefix of the names of parameters and metrics.
        buffer: Number of recorded steps to collect before they are sent.
        unsent: The file for records that cannot be sent. Several runs may share it.

    Raises:
        OptionError: An option has a value that cannot work. At the start: MLflow is not installed,
            or no store can have this `tracking_uri`.

    Example:
        >>> tracker = Mlflow(experiment="digits", every=5)
        >>> tracker.prefix, tracker.buffer
        ('kfactk/', 50)
    """

    experiment: str | None = attrs.field(default=None, validator=text(optional=True))
    run_name: str | None = attrs.field(default=None, validator=text(optional=True))
    tracking_uri: str | None = attrs.field(
        default=None, validator=text(optional=True), repr=_masked_repr
    )
    every: int = attrs.field(default=10, validator=whole())
    prefix: str = attrs.field(default="kfactk/", validator=text(empty=True))
    buffer: int = attrs.field(default=50, validator=whole())
    unsent: str = attrs.field(default="kfactk-unsent.jsonl", validator=text())
    _pending: Buffer = attrs.field(factory=Buffer, init=False, eq=False, repr=False)
    _current: _Current = attrs.field(factory=_Current, init=False, eq=False, repr=False)

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Find or make the run, and write the recipe's parameters."""
        self.close()
        try:
            import mlflow
        except ImportError as error:
            raise OptionError(
                f"tracker 'mlflow' needs MLflow, which cannot be imported ({error}). Run: "
                "pip install mlflow"
            ) from error
        active = mlflow.active_run()
        if active is not None:
            self._warn_of_unused_options(active.info.run_name)
            where: dict[str, Any] = {"run_id": active.info.run_id, "active": True}
            uri = mlflow.get_tracking_uri()
        else:
            uri = self.tracking_uri or mlflow.get_tracking_uri()
            where = {"name": self.run_name, **self._experiment()}
        key, outbox = uuid.uuid4().hex, Outbox(uri, Path(self.unsent))
        where["time"] = _now()
        params = {
            self._key(name): str(value)[:MAX_VALUE]
            for name, value in flattened(mask_settings(recipe)).items()
        }
        entries = [{"run": key, "start": where}, {"run": key, "params": params}]
        for entry in entries:
            outbox.put(entry)
        outbox.delivery.wait()
        failure = outbox.delivery.failure
        if failure is not None and is_mistake(failure):
            raise OptionError(
                f"tracker 'mlflow' cannot make a run at {mask(uri)!r}: {reason(failure)}. Check "
                "tracking_uri and experiment."
            )
        self._current.run = run = _Run(key, outbox, entries, active is None)
        self._attend(run)

    def _warn_of_unused_options(self, run_name: str) -> None:
        names = ("experiment", "run_name", "tracking_uri")
        unused = [name for name in names if getattr(self, name) is not None]
        if unused:
            warnings.warn(
                f"tracker 'mlflow' writes to the active run {run_name!r}, so "
                f"{' and '.join(unused)} have no effect. To make a new run, end the active run "
                "first.",
                KfactkWarning,
                stacklevel=3,
            )

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of one step to the buffer; hand it to the thread when it is full."""
        self._pending.add(step, metrics)
        if len(self._pending) >= self.buffer:
            self._hand_over(self._started())

    def flush(self) -> None:
        """Send the buffer, and wait for the store while it answers."""
        if not len(self._pending) and self._current.run is None:
            return
        run = self._started()
        self._hand_over(run)
        run.outbox.delivery.wait(needed=True)
        self._attend(run)

    def close(self) -> None:
        """Send the buffer, and end the run if this tracker made it."""
        run = self._current.run
        if run is None:
            return
        if run.process != os.getpid() and not len(self._pending):
            self._current.run = None  # a fork that has recorded nothing
            return
        run = self._started()
        self._hand_over(run)
        self._current.run = None
        if run.own:
            run.outbox.put({"run": run.key, "end": "FINISHED", "time": _now()})
        run.outbox.delivery.settle()
        run.outbox.delivery.stop()
        self._attend(run)

    def import_records(self, path: Path) -> str:
        """Send the records of a file `unsent` to `tracking_uri`, and return what was done.

        Raises:
            OptionError: The file cannot be read or holds no records, or the store fails.
        """
        return import_file(path, self.tracking_uri)

    def _started(self) -> _Run:
        run = self._current.run
        if run is None:
            raise KfactkError(
                "tracker 'mlflow' has metrics but no run: it was not started, or is closed. Bind "
                "the recipe again."
            )
        if run.process != os.getpid():
            run = self._current.run = self._continued(run)
        return run

    def _continued(self, run: _Run) -> _Run:
        """Return the run for a fork of the process: it stays the parent's, which ends it."""
        outbox, known = (
            Outbox(run.outbox.store.uri, run.outbox.path),
            run.outbox.store.runs.get(run.key),
        )
        (start, params), where = run.start, {"run_id": known, "active": known is not None}
        entries = [{"run": run.key, "start": {**start["start"], **where}}, params]
        for entry in entries:
            outbox.put(entry)
        return _Run(run.key, outbox, entries, own=False)

    def _hand_over(self, run: _Run) -> None:
        """Give the buffer to the thread, or to the file after a failure."""
        rows = self._pending.take()
        if rows:
            run.outbox.put({"run": run.key, "metrics": self._points(rows)})
        self._attend(run)

    def _points(self, rows: list[Row]) -> list[tuple[str, float, int, int]]:
        return [
            (self._key(name), float(value), row.milliseconds, row.step)
            for row in rows
            for name, value in row.metrics.items()
        ]

    def _attend(self, run: _Run) -> None:
        """Keep what a failed store has not confirmed, and warn once."""
        store = run.outbox.store
        if store.conflicts:
            conflicts, store.conflicts = store.conflicts, []
            warnings.warn(
                f"the MLflow run already has other values for {', '.join(conflicts)}, and MLflow "
                "cannot change them: they keep the values of the earlier recipe. Start another run "
                "to record the new ones.",
                KfactkWarning,
                stacklevel=4,
            )
        try:
            message = run.outbox.keep()
        except OSError as error:
            raise KfactkError(
                f"tracker 'mlflow' can neither send its records to {mask(store.uri)} nor write "
                f"them to {run.outbox.path} ({error.strerror or error}): they are lost. Give "
                "unsent= in a writable directory, on a disk with free space."
            ) from error
        if message:
            warnings.warn(message, KfactkWarning, stacklevel=4)

    def _experiment(self) -> dict[str, str]:
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if name is not None:
            return {"experiment": name}
        # mlflow.set_experiment sets it too
        return {"experiment_id": os.environ.get("MLFLOW_EXPERIMENT_ID", "0")}

    def _key(self, name: str) -> str:
        return re.sub(r"[^\w\-./ ]", "_", self.prefix + name)[:MAX_NAME]


def _now() -> int:
    return int(time.time() * 1000)


@hookimpl
def kfactk_trackers() -> dict[str, type[Mlflow]]:
    """Register the tracker `mlflow`."""
    return {"mlflow": Mlflow}
