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
from kfactk_stages.tracker._buffer import Buffer, any_text, at_least_one, flattened, text

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARAMS_A_BATCH, METRICS_A_BATCH, LONGEST_VALUE, LONGEST_KEY = 100, 1000, 6000, 250
"""MLflow's limits: entries of one request, characters of a parameter's value and of a name."""


@attrs.define(eq=False)
class _Run:
    """The run that is written to, once started."""

    client: MlflowClient | None = None
    run_id: str = ""
    own: bool = False


@attrs.frozen
class Mlflow:
    """Record a run in MLflow: the recipe as parameters, the figures of each recorded step as metrics.

    The run that is active in this process at the start is used, and stays active. Otherwise a new run is made through MLflow's client,
    without making it, its experiment or its store the process' active ones, and ended by `close`. To go on with an earlier run, make it
    active first (`mlflow.start_run(run_id=...)`). Figures that are not finite are handed over as they are; MLflow's stores keep them
    in their own ways.

    Needs `pip install "kfactk[experiments]"`; MLflow is imported at the start, not before.

    Args:
        experiment: Name of the experiment of an own run, made when missing; `None` for the one set in MLflow, or its default.
        run_name: Name of an own run; `None` lets MLflow make one up.
        tracking_uri: Where an own run is stored; `None` for the place set in MLflow.
        every: Record one step in so many.
        prefix: What names of parameters and metrics begin with.
        buffer: Recorded steps held back before they are sent. Steps that could not be sent are not sent again.

    Raises:
        OptionError: An option is not of its kind, or, at the start, MLflow is not installed or no run can be made.

    Example:
        >>> Mlflow(experiment="digits", every=5)
        Mlflow(experiment='digits', run_name=None, tracking_uri=None, every=5, prefix='kfactk/', buffer=50)
    """

    experiment: str | None = attrs.field(default=None, validator=text)
    run_name: str | None = attrs.field(default=None, validator=text)
    tracking_uri: str | None = attrs.field(default=None, validator=text)
    every: int = attrs.field(default=10, validator=at_least_one)
    prefix: str = attrs.field(default="kfactk/", validator=any_text)
    buffer: int = attrs.field(default=50, validator=at_least_one)
    _held: Buffer = attrs.field(factory=Buffer, init=False, eq=False, repr=False)
    _run: _Run = attrs.field(factory=_Run, init=False, eq=False, repr=False)

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Find or make the run, and write the recipe's parameters."""
        self.close()
        try:
            import mlflow
        except ImportError as error:
            raise OptionError(
                f"tracker 'mlflow' needs MLflow, which cannot be imported ({error}). Run: pip install 'kfactk[experiments]'"
            ) from error
        active = mlflow.active_run()
        if active is not None:
            unused = [
                name
                for name in ("experiment", "run_name", "tracking_uri")
                if getattr(self, name) is not None
            ]
            if unused:
                warnings.warn(
                    f"tracker 'mlflow' writes to the active run {active.info.run_name!r}; {' and '.join(unused)} are for runs of its "
                    "own and do nothing here. End the active run first if a new one is wanted.",
                    KfactkWarning,
                    stacklevel=2,
                )
            self._run.client, self._run.run_id, self._run.own = (
                mlflow.MlflowClient(),
                active.info.run_id,
                False,
            )
        else:
            try:
                client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
                run = client.create_run(self._experiment_id(client), run_name=self.run_name)
            except mlflow.MlflowException as error:
                raise OptionError(
                    f"tracker 'mlflow' cannot make a run at {self.tracking_uri or mlflow.get_tracking_uri()!r}: {error}. "
                    "Check tracking_uri and experiment, and that the server is up."
                ) from error
            self._run.client, self._run.run_id, self._run.own = client, run.info.run_id, True
        self._log_params(recipe)

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Hold the figures of one step back; send when enough are held."""
        self._held.add(step, metrics)
        if len(self._held) >= self.buffer:
            self.flush()

    def flush(self) -> None:
        """Send what is held back."""
        if not len(self._held):
            return
        client, rows = self._client(), self._held.take()
        from mlflow import MlflowException
        from mlflow.entities import Metric

        metrics = [
            Metric(self._key(name), float(value), row.milliseconds, row.step)
            for row in rows
            for name, value in row.metrics.items()
        ]
        try:
            for start in range(0, len(metrics), METRICS_A_BATCH):
                client.log_batch(self._run.run_id, metrics=metrics[start : start + METRICS_A_BATCH])
        except MlflowException as error:
            raise KfactkError(
                f"tracker 'mlflow' could not send the figures of {len(rows)} steps up to step {rows[-1].step}, which are lost: {error}. "
                "Check that the tracking server is up."
            ) from error

    def close(self) -> None:
        """Send what is held back, and end the run if it is an own one."""
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
                "tracker 'mlflow' has figures but no run: it was not started, or is closed. Bind the recipe again."
            )
        return self._run.client

    def _experiment_id(self, client: MlflowClient) -> str:
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if name is None:
            return os.environ.get("MLFLOW_EXPERIMENT_ID", "0")  # mlflow.set_experiment sets it too
        known = client.get_experiment_by_name(name)
        return str(known.experiment_id if known is not None else client.create_experiment(name))

    def _key(self, name: str) -> str:
        return re.sub(r"[^\w\-./ ]", "_", self.prefix + name)[:LONGEST_KEY]

    def _log_params(self, recipe: Mapping[str, Any]) -> None:
        """Write the recipe; MLflow never changes a parameter, so those that the run has already stay."""
        from mlflow.entities import Param

        client = self._client()
        known: Mapping[str, str] = client.get_run(self._run.run_id).data.params
        wanted = {
            self._key(name): str(value)[:LONGEST_VALUE] for name, value in flattened(recipe).items()
        }
        changed = sorted(key for key, value in wanted.items() if known.get(key, value) != value)
        if changed:
            warnings.warn(
                f"the MLflow run has other values already for {', '.join(changed)}, and MLflow cannot change them: "
                "they keep the values of the earlier recipe.",
                KfactkWarning,
                stacklevel=3,
            )
        params = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(params), PARAMS_A_BATCH):
            client.log_batch(self._run.run_id, params=params[start : start + PARAMS_A_BATCH])


@hookimpl
def kfactk_trackers() -> dict[str, type[Mlflow]]:
    """The tracker `mlflow`."""
    return {"mlflow": Mlflow}
