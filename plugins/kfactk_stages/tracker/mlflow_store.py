"""A store of MLflow that takes entries: live from a tracker, or later from a file of them.

An entry is a dict with the key `run`, a name of the run that is unique everywhere, and one of:

- `experiment`: the experiment of later runs, which the store makes (`run` is empty);
- `start`: where the run is, or how to make it: `run_id`, `experiment` (name) or `experiment_id`,
  `name`, `tags`, `artifacts` (location for a new experiment), `time`, `parent` (the `run` of the
  one that it is nested under), `resumed` (a run of this name that is there already continues);
- `params`: parameters by name; those that the run has already stay;
- `metrics`: a list of `[name, value, milliseconds, step]`; with `resumed`, points that the run has
  already are left out;
- `files`: a list of paths, which are attached to the run; those that are gone are left out;
- `end`: the status of the ended run, and its `time`.
"""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfactk.errors import OptionError
from kfactk.masking import mask
from kfactk_stages.tracker import delivery
from kfactk_stages.tracker.delivery import Delivery, Entry

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_PARAMS, MAX_METRICS = 100, 1000
"""MLflow's limits on the entries of one request."""
MAKING = 60.0
"""Seconds that MLflow may take to make a new local database."""
TAG = "kfactk.records"
"""The tag of a run that holds its name in entries."""
PARENT = "mlflow.parentRunId"
"""MLflow's tag of a run that is nested under another."""
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")
"""MLflow's codes for a run that is not there, or deleted."""
NEVER = ("InvalidUrlException", "NoSuchModuleError", "ArgumentError")
"""Classes of MLflow and SQLAlchemy for addresses that cannot be read, or need what is missing."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
KINDS = ("experiment", "start", "params", "metrics", "files", "end")


class Store:
    """Runs in a store of MLflow. MLflow opens the store with the first entry.

    Args:
        uri: The tracking URI.

    Attributes:
        runs: MLflow's id of each run, by its name in entries.
        experiments: MLflow's id of each experiment, by its name.
        conflicts: Parameters that a run had with another value, which MLflow cannot change.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.runs: dict[str, str] = {}
        self.experiments: dict[str, str] = {}
        self.conflicts: list[str] = []
        self._client: MlflowClient | None = None
        self._known: dict[tuple[str, str], set[int]] = {}

    @property
    def patience(self) -> float:
        """Seconds that the first answer may take: MLflow makes a new local database slowly."""
        if self.uri.startswith("sqlite:///"):
            path = Path(self.uri.removeprefix("sqlite:///").partition("?")[0])
            if not path.exists() or path.stat().st_size == 0:
                return MAKING
        return delivery.PATIENCE

    def load(self) -> None:
        """Import what MLflow needs for such a store: that takes seconds, and is no silence."""
        database = self.uri.partition(":")[0].partition("+")[0] in DATABASES
        kind = "sqlalchemy_store" if database else "rest_store"
        importlib.import_module(f"mlflow.store.tracking.{kind}")

    def send(self, entry: Entry) -> None:
        """Send one entry; sending it again changes nothing.

        Raises:
            Exception: Whatever MLflow, its database or its server raise.
        """
        run, again = str(entry["run"]), bool(entry.get("resumed"))
        if "experiment" in entry:
            self._experiment(entry["experiment"])
        elif "start" in entry:
            self.runs[run] = self._start(run, entry["start"])
        elif "params" in entry:
            self._log_params(self.runs[run], entry["params"])
        elif "metrics" in entry:
            self._log_metrics(self.runs[run], entry["metrics"], again=again)
        elif "files" in entry:
            for path in filter(os.path.exists, entry["files"]):
                self._opened().log_artifact(self.runs[run], path)
        else:
            self._opened().set_terminated(self.runs[run], entry["end"], entry.get("time"))

    def _opened(self) -> MlflowClient:
        if self._client is None:
            import mlflow

            self._client = mlflow.MlflowClient(tracking_uri=self.uri)
        return self._client

    def _start(self, run: str, wanted: Mapping[str, Any]) -> str:
        """Return the id of a run: the given one, one with our tag, or a new one."""
        from mlflow import MlflowException

        client, given = self._opened(), wanted.get("run_id")
        if wanted.get("active") and not wanted.get("imported"):
            return str(given)
        if given:
            try:
                return self._continued(given, wanted)
            except MlflowException as error:
                if error.error_code not in GONE:
                    raise
        experiment = self._experiment(wanted)
        if given or wanted.get("imported") or wanted.get("resumed"):
            found = client.search_runs([experiment], f"tags.`{TAG}` = '{run}'", max_results=1)
            if found:
                return self._continued(found[0].info.run_id, wanted)
        tags = {**(wanted.get("tags") or {}), TAG: run}
        if parent := self._parent(experiment, wanted.get("parent")):
            tags[PARENT] = parent
        made = client.create_run(
            experiment, start_time=wanted.get("time"), tags=tags, run_name=wanted.get("name")
        )
        return str(made.info.run_id)

    def _parent(self, experiment: str, name: str | None) -> str | None:
        """Return the id of another run by its name in entries, also of one made by others."""
        if name is None or name in self.runs:
            return self.runs.get(name or "")
        found = self._opened().search_runs([experiment], f"tags.`{TAG}` = '{name}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _continued(self, run_id: str, wanted: Mapping[str, Any]) -> str:
        if wanted.get("imported"):
            self._opened().get_run(run_id)
        else:
            self._opened().update_run(run_id, status="RUNNING")
        return str(run_id)

    def _experiment(self, wanted: Mapping[str, Any]) -> str:
        """Return the id of the experiment, made or restored where needed."""
        client, name = self._opened(), wanted.get("experiment")
        if name is None:
            return str(wanted.get("experiment_id") or "0")
        found = client.get_experiment_by_name(name)
        if found is None:
            made = client.create_experiment(name, artifact_location=wanted.get("artifacts"))
            self.experiments[name] = str(made)
            return str(made)
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        self.experiments[name] = str(found.experiment_id)
        return str(found.experiment_id)

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        known = self._opened().get_run(run_id).data.params
        self.conflicts += sorted(
            key for key, value in params.items() if known.get(key, value) != value
        )
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self._opened().log_batch(run_id, params=new[start : start + MAX_PARAMS])

    def _log_metrics(self, run_id: str, points: Iterable[Any], *, again: bool) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), int(time), int(step))
            for name, value, time, step in points
            if not (again and int(step) in self._steps(run_id, name))
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            self._opened().log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])

    def _steps(self, run_id: str, name: str) -> set[int]:
        """Return the steps at which a run has a metric, as of the first time it is asked."""
        key = run_id, name
        if key not in self._known:
            history = self._opened().get_metric_history(run_id, name)
            self._known[key] = {point.step for point in history}
        return self._known[key]


class Outbox:
    """A store, the thread that sends to it, and the file for what it does not take.

    Args:
        uri: The tracking URI.
        path: The file.
    """

    def __init__(self, uri: str, path: Path) -> None:
        self.store, self.path = Store(uri), path.absolute()
        self.store.load()
        self.delivery = Delivery(self.store.send, self.store.patience)
        self._starts: dict[str, Entry] = {}
        self._kept: set[str] = set()
        self._told = False

    def put(self, entry: Entry) -> None:
        """Hand over an entry; return at once."""
        if "start" in entry:
            self._starts[entry["run"]] = entry
        self.delivery.put(entry)

    def keep(self) -> str | None:
        """Write what a failed store has not confirmed to the file; return what to tell, once.

        Raises:
            OSError: The file cannot be written, so these entries are lost.
        """
        entries = self.delivery.unsent()
        failure = self.delivery.failure
        if failure is None or not entries:
            return None
        delivery.append(self.path, [each for entry in entries for each in self._complete(entry)])
        told, self._told = self._told, True
        return None if told else self._message(failure)

    def _complete(self, entry: Entry) -> list[Entry]:
        """Return an entry, with the start of its run before the first one that is kept."""
        run = entry["run"]
        if run in self._kept or run not in self._starts:
            return [entry]
        self._kept.add(run)
        start = self._starts[run]["start"]
        known = self.store.runs.get(run, start.get("run_id"))
        first = {"run": run, "start": {**start, "run_id": known}}
        return [first] if "start" in entry else [first, entry]

    def _message(self, failure: Exception) -> str:
        path, uri = shlex.quote(str(self.path)), shlex.quote(mask(self.store.uri))
        return (
            f"MLflow's store {mask(self.store.uri)} failed ({reason(failure)}). Training goes on, "
            f"and records that it has not confirmed go to {self.path}. When it is up again, run: "
            f"python -m kfactk import-records {path} --tracking-uri {uri} (said once)"
        )


def is_mistake(error: Exception) -> bool:
    """Return whether a store can never be used as it is named, however long one waits."""
    mistake = isinstance(error, ImportError) or type(error).__name__ in NEVER
    return mistake or getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"


def reason(error: Exception) -> str:
    """Return what an error says, on one line, without credentials, and not at length."""
    return mask(" ".join((str(error) or type(error).__name__).split()))[:500]


def import_file(path: Path, uri: str | None) -> str:
    """Send the entries of a file to a store, and return what was done.

    Importing the same file again adds nothing, so it may be repeated after a failure.

    Args:
        path: A file that `delivery.append` has written.
        uri: The tracking URI; `None` for the one that is set in MLflow.

    Raises:
        OptionError: The file cannot be read or holds no such entries, or the store fails.
    """
    try:
        import mlflow
    except ImportError as error:
        raise OptionError(
            f"MLflow, which these records are for, cannot be imported ({error}). Run: "
            "pip install mlflow"
        ) from error
    store = Store(uri or mlflow.get_tracking_uri())
    sent, skipped = 0, 0
    try:
        for number, entry in delivery.read(path):
            if not _is_entry(entry) or not (entry["run"] in store.runs or _begins(entry)):
                skipped += 1
                continue
            if "start" in entry:
                entry["start"]["imported"] = True
            try:
                store.send({**entry, "resumed": True})
            except Exception as error:  # databases, servers and MLflow raise classes of their own
                raise OptionError(
                    f"line {number} of {path} cannot be sent to {mask(store.uri)}: "
                    f"{reason(error)}. Check that the store is up, and run the same command again: "
                    "what is there already is not sent twice."
                ) from None
            sent += 1
    except OSError as error:
        raise OptionError(
            f"{path} cannot be read: {error.strerror or error}. Give the file that the warning "
            "named."
        ) from error
    if not sent:
        raise OptionError(
            f"{path} holds no records of the tracker 'mlflow'. Give the file that the warning "
            "named."
        )
    text = f"{sent} lines on {len(store.runs)} runs of {path} are in {mask(store.uri)}"
    return f"{text}; {skipped} damaged lines were left out" if skipped else text


def _begins(entry: Entry) -> bool:
    return "start" in entry or "experiment" in entry


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("run"), str)
        and any(kind in entry for kind in KINDS)
        and isinstance(entry.get("start", {}), dict)
    )
