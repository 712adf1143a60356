"""MLflow: read back from a store of its own."""

from __future__ import annotations

import http.server
import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kfactk
from kfactk import KfactkError, KfactkWarning, OptionError
from kfactk.testing import Recorded, TrackerLaws
from kfactk_stages.tracker import delivery
from kfactk_stages.tracker.mlflow import Mlflow
from kfactk_stages.tracker.mlflow_store import import_file

pytestmark = pytest.mark.xdist_group("mlflow")  # one worker, so that it is imported once


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
        mlflow.MlflowClient().search_experiments()  # makes the database
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
    until = time.monotonic() + 30
    while len(history(store, run.info.run_id, "kfactk/loss")) < 3 and time.monotonic() < until:
        time.sleep(0.01)  # the thread sends the full buffer
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
    with pytest.raises(OptionError, match="pip install mlflow"):
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


ABOUT_TWO_SECONDS = 6.0
"""On a busy machine; without the deadline it takes MLflow from 13 seconds up to an hour."""


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://me:hunter2@127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://me:hunter2@127.0.0.1:{server.getsockname()[1]}"


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers that the server is overloaded, upon which MLflow tries again and again."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def overloaded() -> Iterator[str]:
    """The address of a server that answers with 503."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://me:hunter2@127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def locked(store: str) -> Iterator[str]:
    """A database that another process has locked."""
    with sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None) as database:
        database.execute("begin exclusive")
        yield store
        database.execute("rollback")
    database.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PATIENCE", 0.3)


def seconds_of(call: Any) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def train(tracker: dict[str, Any], steps: int = 6) -> list[float]:
    """Train, and return the seconds of bind, each step, and close."""
    model, made = torch.nn.Linear(4, 3), []
    kfactk.build(update="sgd").bind(torch.nn.Linear(4, 3))  # imports what the first bind needs
    recipe = kfactk.build(tracker={"name": "mlflow", "every": 1, "buffer": 2, **tracker})
    seconds = [seconds_of(lambda: made.append(recipe.bind(model)))]
    (optimizer,) = made
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            model(torch.randn(8, 4)), torch.randint(3, (8,))
        ).backward()
        seconds.append(seconds_of(optimizer.step))
    return [*seconds, seconds_of(optimizer.close)]


@pytest.mark.parametrize("fault", ["silent", "closed", "locked", "overloaded"])
def test_nobody_waits_for_a_store_and_its_records_are_kept(
    fault: str, store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri, path = request.getfixturevalue(fault), tmp_path / "unsent.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        if fault != "silent":  # one of them waits as long as users do
            patch.setattr(delivery, "PATIENCE", 0.5)
        with pytest.warns(KfactkWarning) as said:
            seconds = train({"tracking_uri": uri, "unsent": str(path), "experiment": fault})
    assert max(seconds) < ABOUT_TWO_SECONDS, seconds
    assert max(seconds[1:-1]) < 2.0, seconds
    (told,) = [str(each.message) for each in said]
    assert f"go to {path}" in told
    assert "python -m kfactk import-records" in told
    assert "hunter2" not in told + path.read_text()
    other = f"sqlite:///{tmp_path}/other.db"
    for _ in range(2):  # importing again adds nothing
        import_file(path, other)
        (run,) = runs(other, fault)
        assert run.info.status == "FINISHED"
        assert [step for step, _ in history(other, run.info.run_id, "kfactk/clip_factor")] == [
            *range(6)
        ]
        assert run.data.params["kfactk/basis.name"] == "ekfac"
        assert "hunter2" not in str(run.data.params)


def test_store_that_fails_midway_has_one_run_after_the_import(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    path, down = tmp_path / "unsent.jsonl", threading.Event()
    send = mlflow.MlflowClient.log_batch

    def sometimes(*arguments: Any, **options: Any) -> None:
        if down.is_set():
            raise mlflow.MlflowException("the server is away")
        send(*arguments, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", sometimes)
    tracker = Mlflow(experiment="midway", tracking_uri=store, buffer=1, unsent=str(path))
    tracker.start({"lr": 0.1})
    tracker.record(0, {"loss": 1.0, "other": math.nan})
    tracker.flush()
    down.set()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tracker.record(1, {"loss": 0.5, "other": math.inf})
        tracker.flush()
        tracker.record(2, {"loss": 0.25})
        tracker.close()
    assert ["the server is away" in str(each.message) for each in said] == [True]
    down.clear()
    import_file(path, store)
    import_file(path, store)
    (run,) = runs(store, "midway")
    assert run.info.status == "FINISHED"
    assert history(store, run.info.run_id, "kfactk/loss") == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert [step for step, _ in history(store, run.info.run_id, "kfactk/other")] == [0, 1]


def test_trackers_fail_apart(
    store: str, closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "unsent.jsonl"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    good = Mlflow(experiment="apart", tracking_uri=store)
    bad = [Mlflow(tracking_uri=closed, unsent=str(path)) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KfactkWarning)
        for tracker in (good, *bad):
            tracker.start({})
            tracker.record(0, {"loss": 1.0})
        for tracker in (*bad, good):
            tracker.close()
    (run,) = runs(store, "apart")
    assert history(store, run.info.run_id, "kfactk/loss") == [(0, 1.0)]
    lines = [entry for _, entry in delivery.read(path)]
    kept = {
        run: [entry for entry in lines if entry["run"] == run] for run in [e["run"] for e in lines]
    }
    assert len(kept) == 2
    for entries in kept.values():
        kinds = ["start", "params", "metrics", "end"]
        assert [kind for entry in entries for kind in kinds if kind in entry] == kinds


def test_records_that_nothing_takes_are_told(closed: str, tmp_path: Path, hasty: None) -> None:
    tracker = Mlflow(tracking_uri=closed, unsent=str(tmp_path))  # a folder
    tracker.start({})
    with pytest.raises(KfactkError, match=r"neither send .* nor write them to .* unsent="):
        tracker.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_neither_send_nor_end_what_is_the_parents(store: str) -> None:
    tracker = Mlflow(experiment="forked", tracking_uri=store)
    tracker.start({})
    tracker.record(0, {"loss": 1.0})
    for records in (False, True):
        if (child := os.fork()) == 0:
            if records:
                tracker.record(1, {"loss": 0.5})
            tracker.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    (run,) = runs(store, "forked")
    assert run.info.status == "RUNNING"
    assert history(store, run.info.run_id, "kfactk/loss") == [(1, 0.5)]
    tracker.close()
    (run,) = runs(store, "forked")
    assert run.info.status == "FINISHED"
    assert sorted(history(store, run.info.run_id, "kfactk/loss")) == [(0, 1.0), (1, 0.5)]


@pytest.mark.usefixtures("unmeasured")
def test_process_that_never_closes_ends_soon_and_keeps_records(silent: str, tmp_path: Path) -> None:
    path = tmp_path / "unsent.jsonl"
    spec = {"name": "mlflow", "tracking_uri": silent, "unsent": str(path), "every": 1}
    program = f"""
import atexit, time, torch, kfactk
model = torch.nn.Linear(4, 3)
optimizer = kfactk.build(tracker={spec!r}).bind(model)
model(torch.randn(8, 4)).logsumexp(1).sum().backward()
optimizer.step()
print(time.time(), flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert time.time() - float(done.stdout) < ABOUT_TWO_SECONDS + 2
    assert done.returncode == 0, done.stderr
    assert "hunter2" not in done.stderr
    assert [next(iter(entry.keys() - {"run"})) for _, entry in delivery.read(path)][:3] == [
        *("start", "params", "metrics")
    ]


def test_new_database_is_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/new.db"
    tracker = Mlflow(experiment="new", tracking_uri=uri)
    tracker.start({})
    tracker.record(0, {"loss": 1.0})
    tracker.close()  # MLflow may take seconds to make it
    (run,) = runs(uri, "new")
    assert history(uri, run.info.run_id, "kfactk/loss") == [(0, 1.0)]


def test_bind_without_mlflow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(OptionError, match="pip install"):
        kfactk.build(tracker="mlflow").bind(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_addresses_are_masked_in_the_store(store: str) -> None:
    tracker = Mlflow(experiment="masked", tracking_uri=store)
    tracker.start({"tracker": {"tracking_uri": "http://me:hunter2@host", "token": "hunter2"}})
    tracker.close()
    (run,) = runs(store, "masked")
    assert run.data.params["kfactk/tracker.tracking_uri"] == "http://***@host"
    assert "hunter2" not in json.dumps(run.data.params)
