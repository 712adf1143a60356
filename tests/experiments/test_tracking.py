from pathlib import Path

import pytest

from experiments.collector import Point
from experiments.results import Epoch
from experiments.tracking import Tracking

EPOCHS = [Epoch(i, 10, 0.5, 1.0 / i, 90.0, 2.0 / i, 80.0) for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Tracking("test", tmp_path_factory.mktemp("output"))


def recorded(tracking: Tracking, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [
        (point.step, point.value) for point in tracking._client.get_metric_history(run_id, metric)
    ]


def test_parameters_are_flat_text(tracking: Tracking):
    run_id = tracking.start(
        "ekfac", 2, {"lr": 0.1, "clip": {"name": "kl"}, "seeds": [0, 1]}, [], None
    )
    found = tracking._client.get_run(run_id).data
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
    assert tracking._client.get_run(run_id).info.status == "RUNNING"


def test_lost_runs_are_recorded_again(tracking: Tracking):
    run_id = tracking.start("ekfac", 0, {}, EPOCHS, "0" * 32)
    assert [step for step, _ in recorded(tracking, run_id, "test_loss")] == [1, 2, 3]


def test_failing_store_warns_and_catches_up(tracking: Tracking, monkeypatch: pytest.MonkeyPatch):
    from mlflow.exceptions import MlflowException

    down, log_batch = [True], tracking._client.log_batch

    def sometimes(*arguments: object, **options: object) -> None:
        if down:
            raise MlflowException("the server is away")
        log_batch(*arguments, **options)

    run_id = tracking.start("ekfac", 0, {}, [], None)
    monkeypatch.setattr(tracking._client, "log_batch", sometimes)
    with pytest.warns(UserWarning, match="the server is away"):
        tracking.log(run_id, EPOCHS[:2])
    down.clear()
    tracking.log(run_id, EPOCHS[2:])
    tracking.end(run_id, "finished")
    assert [step for step, _ in recorded(tracking, run_id, "test_loss")] == [1, 2, 3]
    assert tracking._client.get_run(run_id).info.status == "FINISHED"


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
