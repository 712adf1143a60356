import contextlib
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from experiments.collector import Point
from experiments.errors import ExperimentError
from experiments.results import Epoch
from experiments.tracking import Tracking
from kfactk_stages.tracker.mlflow_store import import_file

EPOCHS = [Epoch(i, 10, 0.5, 1.0 / i, 90.0, 2.0 / i, 80.0) for i in (1, 2, 3)]


@contextlib.contextmanager
def caught() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the warnings of our own; MLflow's packages have theirs."""
    said: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as everything:
        warnings.simplefilter("always")
        yield said
    said += [each for each in everything if str(each.message).startswith("MLflow's store")]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Tracking("test", tmp_path_factory.mktemp("output"))


def recorded(tracking: Tracking, run_id: str, metric: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient(tracking.uri).get_metric_history(run_id, metric)
    return [(point.step, point.value) for point in history]


def run_of(tracking: Tracking, run_id: str):
    return mlflow.MlflowClient(tracking.uri).get_run(run_id)


def test_parameters_are_flat_text(tracking: Tracking):
    run_id = tracking.start(
        "ekfac", 2, {"lr": 0.1, "clip": {"name": "kl"}, "seeds": [0, 1]}, [], None
    )
    found = run_of(tracking, run_id).data
    assert found.params == {"lr": "0.1", "clip.name": "kl", "seeds": "[0, 1]"}
    assert (found.tags["algorithm"], found.tags["seed"]) == ("ekfac", "2")


def test_steps_and_epochs_have_their_own_axes(tracking: Tracking):
    run_id = tracking.start("ekfac", 0, {}, [], None)
    tracking.log(run_id, EPOCHS[:2], [Point(step, {"damping": step / 10}) for step in range(1100)])
    assert recorded(tracking, run_id, "train_loss") == [(1, 1.0), (2, 0.5)]
    assert recorded(tracking, run_id, "step/damping") == [(step, step / 10) for step in range(1100)]


def test_resuming_adds_missing_epochs(tracking: Tracking):
    run_id = tracking.start("ekfac", 0, {}, [], None)
    tracking.log(run_id, EPOCHS[:1])
    tracking.end(run_id, "interrupted")
    assert tracking.start("ekfac", 0, {}, EPOCHS, run_id) == run_id
    assert [step for step, _ in recorded(tracking, run_id, "test_loss")] == [1, 2, 3]
    assert run_of(tracking, run_id).info.status == "RUNNING"


def test_lost_runs_are_recorded_again(tracking: Tracking):
    run_id = tracking.start("ekfac", 0, {}, EPOCHS, "0" * 32)
    assert [step for step, _ in recorded(tracking, run_id, "test_loss")] == [1, 2, 3]


def test_failing_store_keeps_records_for_an_import(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = Tracking("test", tmp_path)
    log_batch = mlflow.MlflowClient.log_batch
    run_id = tracking.start("ekfac", 0, {"lr": 0.1}, EPOCHS[:1], None)

    def fail(*_: object, **__: object) -> None:
        raise mlflow.MlflowException("the server is away")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fail)
    with caught() as said:
        tracking.log(run_id, EPOCHS[1:2])
        tracking.log(run_id, EPOCHS[2:], [Point(7, {"damping": 0.5})])
        other = tracking.start("sgd", 1, {"lr": 0.2}, [], None)
        tracking.log(other, EPOCHS)
        for each in (run_id, other):
            tracking.end(each, "finished")
        tracking.close()
    (told,) = map(str, said)
    assert "the server is away" in told
    assert str(tracking.unsent) in told
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    for _ in range(2):
        import_file(tracking.unsent, tracking.uri)
    assert recorded(tracking, run_id, "test_loss") == [(1, 2.0), (2, 1.0), (3, 2 / 3)]
    assert recorded(tracking, run_id, "step/damping") == [(7, 0.5)]
    client = mlflow.MlflowClient(tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name("kfactk-test").experiment_id])
    assert {(run.info.run_name, run.info.status) for run in runs} == {
        ("ekfac-seed0", "FINISHED"),
        ("sgd-seed1", "FINISHED"),
    }


def test_study_that_resumes_after_an_outage_has_one_run(tmp_path: Path, monkeypatch):
    """Its run has no id yet: it is found by its name, and the import adds what is missing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://me:hunter2@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with caught() as said:
            began = time.monotonic()
            tracking = Tracking("test", tmp_path)
            name = tracking.start("sgd", 0, {"uri": address}, [], None)
            tracking.log(name, EPOCHS[:2], [Point(7, {"damping": 0.5})])
            tracking.end(name, "interrupted")
            waited = time.monotonic() - began
            tracking.close()
    assert waited < 8.0  # two seconds, MLflow's imports, and a busy machine
    assert time.monotonic() - began < waited + 6.0
    assert len(said) == 1
    told = str(said[0]) + tracking.unsent.read_text() + tracking.how_to_open("python")
    assert "hunter2" not in told
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")
    again = Tracking("test", tmp_path)
    run_id = again.start("sgd", 0, {}, EPOCHS[:2], name)
    again.log(run_id, EPOCHS[2:])
    again.end(run_id, "finished")
    again.close()
    import_file(tracking.unsent, again.uri)
    assert [step for step, _ in recorded(again, run_id, "test_loss")] == [1, 2, 3]
    assert recorded(again, run_id, "step/damping") == [(7, 0.5)]
    client = mlflow.MlflowClient(again.uri)
    assert (
        len(client.search_runs([client.get_experiment_by_name("kfactk-test").experiment_id])) == 1
    )


def test_records_that_nothing_takes_cost_one_warning(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = Tracking("test", tmp_path)
    run_id = tracking.start("sgd", 0, {}, [], None)
    (tmp_path / "mlflow-unsent.jsonl").mkdir()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fail)
    with caught() as said:
        for epoch in EPOCHS:
            tracking.log(run_id, [epoch])
        tracking.close()
    (told,) = map(str, said)
    assert "Training goes on without them" in told


@pytest.mark.parametrize("fault", ["damaged", "nowhere", "driver"])
def test_stores_that_can_never_work_are_refused(fault: str, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if fault == "damaged":
        (tmp_path / "mlflow.db").write_bytes(bytes(range(256)) * 20)
    else:
        scheme = {"nowhere": "nonsense", "driver": "postgresql+nodriver"}[fault]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://me:hunter2@host/db")
    with pytest.raises(ExperimentError, match="cannot be used") as told:
        Tracking("test", tmp_path)
    assert "hunter2" not in str(told.value)
    assert "\n" not in str(told.value)


def test_how_to_open_names_the_store(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert (
        tracking.how_to_open("python") == f"python -m mlflow ui --backend-store-uri {tracking.uri}"
    )
    assert tracking.uri.startswith("sqlite:////")
    other = f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    assert Tracking("test", tmp_path).uri == other
    assert (tmp_path / "other.db").exists()
    assert not (tmp_path / "mlflow.db").exists()
