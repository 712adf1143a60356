"""Runs in MLflow: an experiment for each preset, a run for each algorithm and seed."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.collector import Point
from experiments.errors import ExperimentError
from experiments.results import Epoch
from experiments.store import flatten

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

MAX_METRICS = 1000
"""MLflow's limit on the metrics of one request."""
STATUS = {"finished": "FINISHED", "diverged": "FAILED", "interrupted": "KILLED"}


class Tracking:
    """An experiment in MLflow.

    Args:
        preset: The preset.
        output: Folder of the database, unless `MLFLOW_TRACKING_URI` names another store.

    Raises:
        ExperimentError: The store cannot be reached.
    """

    def __init__(self, preset: str, output: Path) -> None:
        import mlflow
        from mlflow.exceptions import MlflowException

        logging.getLogger("alembic").setLevel(logging.WARNING)

        given = os.environ.get("MLFLOW_TRACKING_URI")
        output.mkdir(parents=True, exist_ok=True)
        self.uri = given or f"sqlite:///{(output / 'mlflow.db').resolve().as_posix()}"
        self.experiment = f"kfactk-{preset}"
        self._unsent: list[Callable[[], object]] = []
        try:
            self._client = mlflow.MlflowClient(self.uri)
            found = self._client.get_experiment_by_name(self.experiment)
            if found is None:
                artifacts = None if given else (output / "mlartifacts").resolve().as_uri()
                self._id = self._client.create_experiment(
                    self.experiment, artifact_location=artifacts
                )
            else:
                self._id = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    self._client.restore_experiment(self._id)
        except (MlflowException, OSError) as error:
            raise ExperimentError(
                f"MLflow's store {self.uri} cannot be used ({error}): check MLFLOW_TRACKING_URI"
            ) from error

    def start(
        self,
        algorithm: str,
        seed: int,
        settings: Mapping[str, Any],
        history: Sequence[Epoch],
        earlier: str | None,
    ) -> str:
        """Start the run of one algorithm and seed, or continue an earlier one, and return its id.

        Epochs of `history` that the earlier run lacks are added.
        """
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        if earlier is not None:
            # Where it is gone, or in another store, a new run gets the whole history.
            with contextlib.suppress(MlflowException):
                self._client.update_run(earlier, status="RUNNING")
                known = {
                    point.step for point in self._client.get_metric_history(earlier, "test_loss")
                }
                self.log(earlier, [epoch for epoch in history if epoch.epoch not in known])
                return earlier
        tags = {"algorithm": algorithm, "seed": str(seed)}
        run_id = str(
            self._client.create_run(
                self._id, run_name=f"{algorithm}-seed{seed}", tags=tags
            ).info.run_id
        )
        self._client.log_batch(
            run_id, params=[Param(key, str(value)) for key, value in flatten(settings)]
        )
        self.log(run_id, history)
        return run_id

    def log(self, run_id: str, epochs: Sequence[Epoch], points: Sequence[Point] = ()) -> None:
        """Record the metrics of epochs by epoch, and those of single steps by step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, epoch.epoch)
            for epoch in epochs
            for key, value in {**epoch.metrics, "seconds": epoch.seconds}.items()
        ]
        metrics += [
            Metric(f"step/{key}", value, now, point.step)
            for point in points
            for key, value in point.metrics.items()
        ]
        self._unsent += [
            partial(self._client.log_batch, run_id, metrics[i : i + MAX_METRICS])
            for i in range(0, len(metrics), MAX_METRICS)
        ]
        self._send()

    def end(self, run_id: str, status: str) -> None:
        """End a run as "finished", "diverged" or "interrupted"."""
        self._unsent.append(partial(self._client.set_terminated, run_id, STATUS[status]))
        self._send()

    def _send(self) -> None:
        """Send what is unsent, in order; warn where the store fails."""
        from mlflow.exceptions import MlflowException

        try:
            while self._unsent:
                self._unsent[0]()
                del self._unsent[0]
        except (MlflowException, OSError) as error:
            warnings.warn(
                "MLflow's store fails; training continues, and the missing metrics are sent with "
                f"the next epoch: {error}",
                stacklevel=3,
            )

    @contextlib.contextmanager
    def recording(self, run_id: str) -> Iterator[None]:
        """End the run as interrupted where the body raises."""
        try:
            yield
        except BaseException:
            self.end(run_id, "interrupted")
            raise

    def how_to_open(self, python: str) -> str:
        """Return the command, or the address, that shows the runs."""
        if self.uri.startswith("http"):
            return self.uri
        return f"{python} -m mlflow ui --backend-store-uri {self.uri}"


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

    def recording(self, run_id: str) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()
