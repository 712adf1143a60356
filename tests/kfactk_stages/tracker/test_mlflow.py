"""MLflow: read back from a store of its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kfactk import KfactkError, KfactkWarning, OptionError
from kfactk.testing import Recorded, TrackerLaws
from kfactk_stages.tracker.mlflow import Mlflow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store in a new folder, made MLflow's place for the tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        patch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
        mlflow = pytest.importorskip("mlflow")
        folder = tmp_path_factory.mktemp("mlflow")
        patch.chdir(folder)
        before = mlflow.get_tracking_uri()
        uri = f"sqlite:///{folder}/mlflow.db"
        mlflow.set_tracking_uri(uri)
        yield uri
        mlflow.set_tracking_uri(before)


def runs(uri: str, experiment: str) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    return (
        list(client.search_runs([found.experiment_id], order_by=["attributes.start_time"]))
        if found
        else []
    )


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    import mlflow

    return [
        (m.step, m.value)
        for m in mlflow.MlflowClient(tracking_uri=uri).get_metric_history(run_id, name)
    ]


@pytest.mark.usefixtures("store")
class TestMlflow(TrackerLaws):
    stage = "mlflow"

    def stage_in(self, folder: Path) -> Any:
        return {"name": "mlflow", "experiment": folder.name, "every": 2}

    def read(self, folder: Path) -> Recorded:
        import mlflow

        (run,) = runs(mlflow.get_tracking_uri(), folder.name)
        rows: dict[int, dict[str, float]] = {}
        for name in run.data.metrics:
            for step, value in history(mlflow.get_tracking_uri(), run.info.run_id, name):
                assert name.removeprefix("kfactk/") not in rows.setdefault(step, {})
                rows[step][name.removeprefix("kfactk/")] = value
        return Recorded(
            sorted(rows.items()),
            {name.removeprefix("kfactk/"): value for name, value in run.data.params.items()},
        )


def test_new_run_from_start_to_end(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    send = mlflow.MlflowClient.log_batch

    def within_the_server_limits(
        client: Any, run_id: str, metrics: Any = (), params: Any = ()
    ) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        assert all(len(param.value) <= 6000 for param in params)
        send(client, run_id, metrics=metrics, params=params)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", within_the_server_limits)
    tracker = Mlflow(experiment="own", run_name="first", tracking_uri=store, buffer=3)
    tracker.start(
        {
            "lr": 0.1,
            "clip": {"name": "kl"},
            "long": "x" * 10_000,
            "many": list(range(150)),
            "odd[name]": True,
        }
    )
    assert mlflow.active_run() is None  # nothing global is set
    (run,) = runs(store, "own")
    assert run.info.run_name == "first"
    assert run.info.status == "RUNNING"
    params = run.data.params
    assert params["kfactk/lr"] == "0.1"
    assert params["kfactk/clip.name"] == "kl"
    assert params["kfactk/long"] == "x" * 6000
    assert params["kfactk/many.149"] == "149"
    assert params["kfactk/odd_name_"] == "True"
    for step in (0, 10, 20, 30):
        tracker.record(step, {"loss": torch.tensor(1.0 / (step + 1)), "layer.0/condition": 3})
    assert len(history(store, run.info.run_id, "kfactk/loss")) == 3
    tracker.record(
        40, {"loss": torch.tensor(math.nan), **{f"figure {k}": float(k) for k in range(1100)}}
    )
    tracker.close()
    tracker.close()
    (run,) = runs(store, "own")
    assert run.info.status == "FINISHED"
    losses = history(store, run.info.run_id, "kfactk/loss")
    assert [step for step, _ in losses] == [0, 10, 20, 30, 40]
    assert [value for _, value in losses[:4]] == pytest.approx([1, 1 / 11, 1 / 21, 1 / 31])
    assert math.isnan(losses[4][1])
    assert history(store, run.info.run_id, "kfactk/layer.0/condition") == [
        (step, 3.0) for step in (0, 10, 20, 30)
    ]
    assert run.data.metrics["kfactk/figure 1099"] == 1099.0
    tracker.record(50, {"loss": 1.0})
    with pytest.raises(KfactkError, match="not started, or is closed"):
        tracker.flush()


def test_active_run_is_used_and_stays_active(store: str) -> None:
    import mlflow

    mlflow.set_experiment("shared")
    with mlflow.start_run() as active:
        mlflow.log_param("lr", 7)  # the user's own name, apart by the prefix
        tracker = Mlflow()
        tracker.start({"lr": 0.1})
        tracker.record(3, {"loss": 2.0})
        tracker.close()
        assert mlflow.active_run().info.run_id == active.info.run_id
        assert mlflow.MlflowClient().get_run(active.info.run_id).info.status == "RUNNING"
        again = Mlflow(experiment="elsewhere")  # a resumed run, with another recipe
        with pytest.warns(KfactkWarning) as warned:
            again.start({"lr": 0.2, "damping": 0.03})
        assert "experiment" in str(warned[0].message)
        assert "kfactk/lr" in str(warned[1].message)
        again.record(4, {"loss": 1.0})
        again.close()
    (run,) = runs(store, "shared")
    assert run.data.params == {"lr": "7", "kfactk/lr": "0.1", "kfactk/damping": "0.03"}
    assert history(store, run.info.run_id, "kfactk/loss") == [(3, 2.0), (4, 1.0)]
    assert runs(store, "elsewhere") == []


def test_settings_of_mlflow_apply_to_new_runs(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    tracker = Mlflow()
    tracker.start({})
    tracker.start({})  # starting again ends the run before
    assert [run.info.status for run in runs(store, "from the environment")] == [
        "FINISHED",
        "RUNNING",
    ]
    tracker.close()


def test_impossible_runs_are_refused_at_the_start(store: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot make a run at 'nonsense:"):
        Mlflow(tracking_uri=f"nonsense:{tmp_path}").start({})


def test_missing_mlflow_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(OptionError, match=r"pip install 'kfactk\[experiments\]'"):
        Mlflow().start({})


def test_close_without_start_does_nothing() -> None:
    tracker = Mlflow()
    assert tracker.close() is None
    assert tracker.flush() is None


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"buffer": -1}, {"prefix": None}, {"experiment": ""}, {"tracking_uri": 3}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Mlflow(**options)


def test_equality_is_over_options() -> None:
    assert Mlflow(every=5) == Mlflow(every=5)
    assert Mlflow(every=5) != Mlflow()
    assert hash(Mlflow()) == hash(Mlflow())
