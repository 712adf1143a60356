"""The runs in MLflow: one experiment a preset, one run an algorithm and seed, and one point an epoch."""

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
from experiments.store import flat

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

AT_ONCE = 1000
"""Points that MLflow takes in one request."""
STATUS = {"finished": "FINISHED", "diverged": "FAILED", "interrupted": "KILLED"}


class Tracking:
    """An experiment in MLflow.

    Args:
        preset: The study's preset.
        output: Its folder; the database is put there unless `MLFLOW_TRACKING_URI` names another store.

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
        """Open the run of one algorithm and seed, or go on with an earlier one; what it lacks of `history` is added.

        Returns:
            The run's id.
        """
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        if earlier is not None:
            with contextlib.suppress(
                MlflowException
            ):  # it is gone, or in another store: a new one gets the whole history
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
            run_id, params=[Param(key, str(value)) for key, value in flat(settings)]
        )
        self.log(run_id, history)
        return run_id

    def log(self, run_id: str, epochs: Sequence[Epoch], points: Sequence[Point] = ()) -> None:
        """Record epochs against their number, and single steps' figures against theirs."""
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
            partial(self._client.log_batch, run_id, metrics[i : i + AT_ONCE])
            for i in range(0, len(metrics), AT_ONCE)
        ]
        self._send()

    def end(self, run_id: str, status: str) -> None:
        """Close a run as "finished", "diverged" or "interrupted"."""
        self._unsent.append(partial(self._client.set_terminated, run_id, STATUS[status]))
        self._send()

    def _send(self) -> None:
        """Send what is to be sent, in order; a store that fails in the middle of training costs a warning, not the training."""
        from mlflow.exceptions import MlflowException

        try:
            while self._unsent:
                self._unsent[0]()
                del self._unsent[0]
        except (MlflowException, OSError) as error:
            warnings.warn(
                f"MLflow's store fails; training goes on, and what it lacks is sent with the next epoch: {error}",
                stacklevel=3,
            )

    @contextlib.contextmanager
    def recording(self, run_id: str) -> Iterator[None]:
        """Close the run as interrupted when what happens inside does not come to its end."""
        try:
            yield
        except BaseException:
            self.end(run_id, "interrupted")
            raise

    def how_to_open(self, python: str) -> str:
        """What to type, or where to look, to see the runs."""
        if self.uri.startswith("http"):
            return self.uri
        return f"{python} -m mlflow ui --backend-store-uri {self.uri}"


class Untracked:
    """Where processes besides the first one record: nowhere."""

    def start(
        self,
        algorithm: str,
        seed: int,
        settings: Mapping[str, Any],
        history: Sequence[Epoch],
        earlier: str | None,
    ) -> str:
        """Give an id that means nothing."""
        return ""

    def log(self, run_id: str, epochs: Sequence[Epoch], points: Sequence[Point] = ()) -> None:
        """Leave it to the first process."""

    def end(self, run_id: str, status: str) -> None:
        """Leave it to the first process."""

    def recording(self, run_id: str) -> contextlib.AbstractContextManager[None]:
        """Nothing is open."""
        return contextlib.nullcontext()
