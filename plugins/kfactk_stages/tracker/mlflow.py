"""Tracking to MLflow."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from kfactk import KfactkError, KfactkWarning, OptionError, hookimpl
from kfactk.options import text, whole
from kfactk_stages.tracker._buffer import Buffer, flattened

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_PARAMS, MAX_METRICS = 100, 1000
"""MLflow's limits on the entries of one request."""
MAX_VALUE, MAX_NAME = 6000, 250
"""MLflow's limits on the characters of a parameter's value and of a name."""


@attrs.define(eq=False)
class _Run:
    """The run that the tracker writes to, once started."""

    client: MlflowClient | None = None
    run_id: str = ""
    own: bool = False


@attrs.frozen
class Mlflow:
    """Record a run in MLflow: the recipe as parameters, each recorded step as metrics.

    If a run is active in this process at the start, the tracker uses it and leaves it active.
    Otherwise it makes a new run through MLflow's client, and `close` ends it. The active run,
    experiment and store of the process do not change. To continue an earlier run, make it active
    first (`mlflow.start_run(run_id=...)`). Non-finite metrics are sent as they are; each MLflow
    store keeps them in its own way.

    It needs `pip install "kfactk[experiments]"`. MLflow is imported at the start, not before.

    Args:
        experiment: Name of the experiment for a new run, made when missing; `None` for the one set
            in MLflow, or its default.
        run_name: Name of a new run; `None` lets MLflow choose one.
        tracking_uri: Where a new run is stored; `None` for the store set in MLflow.
        every: Record one step in so many.
        prefix: Prefix of the names of parameters and metrics.
        buffer: Number of recorded steps to collect before they are sent. Steps that could not be
            sent are not sent again.

    Raises:
        OptionError: An option has a value that cannot work. At the start: MLflow is not installed,
            or no run can be made.

    Example:
        >>> tracker = Mlflow(experiment="digits", every=5)
        >>> tracker.prefix, tracker.buffer
        ('kfactk/', 50)
    """

    experiment: str | None = attrs.field(default=None, validator=text(optional=True))
    run_name: str | None = attrs.field(default=None, validator=text(optional=True))
    tracking_uri: str | None = attrs.field(default=None, validator=text(optional=True))
    every: int = attrs.field(default=10, validator=whole())
    prefix: str = attrs.field(default="kfactk/", validator=text(empty=True))
    buffer: int = attrs.field(default=50, validator=whole())
    _pending: Buffer = attrs.field(factory=Buffer, init=False, eq=False, repr=False)
    _run: _Run = attrs.field(factory=_Run, init=False, eq=False, repr=False)

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Find or make the run, and write the recipe's parameters."""
        self.close()
        try:
            import mlflow
        except ImportError as error:
            raise OptionError(
                f"tracker 'mlflow' needs MLflow, which cannot be imported ({error}). Run: "
                "pip install 'kfactk[experiments]'"
            ) from error
        active = mlflow.active_run()
        if active is not None:
            self._warn_of_unused_options(active.info.run_name)
            client, run_id = mlflow.MlflowClient(), active.info.run_id
        else:
            try:
                client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
                run_id = client.create_run(
                    self._experiment_id(client), run_name=self.run_name
                ).info.run_id
            except mlflow.MlflowException as error:
                uri = self.tracking_uri or mlflow.get_tracking_uri()
                raise OptionError(
                    f"tracker 'mlflow' cannot make a run at {uri!r}: {error}. Check tracking_uri "
                    "and experiment, and that the server is up."
                ) from error
        self._run.client, self._run.run_id, self._run.own = client, run_id, active is None
        self._log_params(recipe)

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
        """Add the metrics of one step to the buffer; send when it is full."""
        self._pending.add(step, metrics)
        if len(self._pending) >= self.buffer:
            self.flush()

    def flush(self) -> None:
        """Send the buffer."""
        if not len(self._pending):
            return
        client, rows = self._client(), self._pending.take()
        from mlflow import MlflowException
        from mlflow.entities import Metric

        metrics = [
            Metric(self._key(name), float(value), row.milliseconds, row.step)
            for row in rows
            for name, value in row.metrics.items()
        ]
        try:
            for start in range(0, len(metrics), MAX_METRICS):
                client.log_batch(self._run.run_id, metrics=metrics[start : start + MAX_METRICS])
        except MlflowException as error:
            raise KfactkError(
                f"tracker 'mlflow' could not send the metrics of {len(rows)} steps up to step "
                f"{rows[-1].step}, which are lost: {error}. Check that the tracking server is up."
            ) from error

    def close(self) -> None:
        """Send the buffer, and end the run if this tracker made it."""
        client = self._run.client
        if client is None:
            return
        try:
            self.flush()
        finally:
            self._run.client = None
            if self._run.own:
                client.set_terminated(self._run.run_id)

    def _client(self) -> MlflowClient:
        if self._run.client is None:
            raise KfactkError(
                "tracker 'mlflow' has metrics but no run: it was not started, or is closed. Bind "
                "the recipe again."
            )
        return self._run.client

    def _experiment_id(self, client: MlflowClient) -> str:
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if name is None:
            return os.environ.get("MLFLOW_EXPERIMENT_ID", "0")  # mlflow.set_experiment sets it too
        known = client.get_experiment_by_name(name)
        return str(known.experiment_id if known is not None else client.create_experiment(name))

    def _key(self, name: str) -> str:
        return re.sub(r"[^\w\-./ ]", "_", self.prefix + name)[:MAX_NAME]

    def _log_params(self, recipe: Mapping[str, Any]) -> None:
        """Write the recipe's parameters; those of the run stay, as MLflow cannot change them."""
        from mlflow.entities import Param

        client = self._client()
        known: Mapping[str, str] = client.get_run(self._run.run_id).data.params
        wanted = {
            self._key(name): str(value)[:MAX_VALUE] for name, value in flattened(recipe).items()
        }
        changed = sorted(key for key, value in wanted.items() if known.get(key, value) != value)
        if changed:
            warnings.warn(
                f"the MLflow run already has other values for {', '.join(changed)}, and MLflow "
                "cannot change them: they keep the values of the earlier recipe. Start another run "
                "to record the new ones.",
                KfactkWarning,
                stacklevel=3,
            )
        params = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(params), MAX_PARAMS):
            client.log_batch(self._run.run_id, params=params[start : start + MAX_PARAMS])


@hookimpl
def kfactk_trackers() -> dict[str, type[Mlflow]]:
    """Register the tracker `mlflow`."""
    return {"mlflow": Mlflow}
