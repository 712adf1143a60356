import contextlib
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import mlflow
import pytest

from experiments import tracking as module
from experiments.algorithms import Point
from experiments.data import Dataset
from experiments.errors import ExperimentError
from experiments.runner import Job
from experiments.settings import Study
from experiments.tracking import Tracking
from kfactk_stages.tracker.mlflow_store import PARENT, TAG, import_file
from tests.experiments.studies import ended, epoch, job

EPOCHS = [epoch(i) for i in (1, 2, 3)]
TRIAL = {"stage": "search", "number": 4, "options": {"lr": 0.3}}


@contextlib.contextmanager
def caught() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the warnings of our own; MLflow's packages have theirs."""
    said: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as everything:
        warnings.simplefilter("always")
        yield said
    said += [each for each in everything if str(each.message).startswith("MLflow's store")]


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def output(tmp_path: Path, new_store: Path) -> Path:
    """A folder with a copy of it."""
    (tmp_path / "mlflow.db").write_bytes(new_store.read_bytes())
    return tmp_path


@pytest.fixture
def jobs(study: Study, dataset: Dataset) -> list[Job]:
    settings = {"lr": 0.1, "clip": {"name": "kl"}, "seeds": [0, 1], "uri": "http://me:hunter2@h"}
    return [
        job(study, dataset, "ekfacadam", 2, settings=settings),
        job(study, dataset, "sgd", 0, settings=settings),
        job(study, dataset, "sgd", 100, settings=settings, trial=TRIAL),
        job(study, dataset, "sgd", 100, settings=settings, trial={**TRIAL, "number": 5}),
    ]


def runs_of(where: str | Tracking) -> dict[str, Any]:
    """All runs by name; none twice."""
    client = mlflow.MlflowClient(where if isinstance(where, str) else where.uri)
    number = client.get_experiment_by_name("kfactk-test").experiment_id
    found = client.search_runs([number])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def recorded(where: str | Tracking, name: str, metric: str) -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(where if isinstance(where, str) else where.uri)
    history = client.get_metric_history(runs_of(where)[name].info.run_id, metric)
    return [(point.step, point.value) for point in history]


def test_parameters_are_flat_text_without_credentials(output: Path, jobs: list[Job]):
    tracking = Tracking("test", output)
    tracking.begin(jobs[0], [])
    tracking.close()
    data = runs_of(tracking)["ekfacadam-seed2"].data
    uri = data.params.pop("uri")
    assert data.params == {"lr": "0.1", "clip.name": "kl", "seeds": "[0, 1]"}
    assert "hunter2" not in uri
    assert (data.tags["algorithm"], data.tags["seed"]) == ("ekfacadam", "2")


def test_steps_and_epochs_have_their_own_names_and_axes(output: Path, jobs: list[Job]):
    tracking = Tracking("test", output)
    tracking.begin(jobs[0], [])
    points = [Point(step, {"damping": step / 10, "lr": 0.5}) for step in range(1100)]
    tracking.epoch(jobs[0], EPOCHS[0], points)
    tracking.epoch(jobs[0], EPOCHS[1], [])
    tracking.end(jobs[0], ended(jobs[0], EPOCHS[:2], "diverged"))
    tracking.close()
    name = "ekfacadam-seed2"
    assert recorded(tracking, name, "epoch/train_loss") == [(1, 1.0), (2, 0.5)]
    assert recorded(tracking, name, "step/damping") == [(i, i / 10) for i in range(1100)]
    run = runs_of(tracking)[name]
    assert run.info.status == "FAILED"
    assert set(run.data.metrics) == {  # a constant learning rate is none
        *("epoch/train_loss", "epoch/train_accuracy", "epoch/test_loss", "epoch/test_accuracy"),
        *("epoch/seconds", "step/damping"),
    }


def test_constants_are_not_recorded_until_they_change(output: Path, jobs: list[Job]):
    tracking = Tracking("test", output)
    for each in jobs[:2]:
        tracking.begin(each, [])
    for number, value in ((0, 1.0), (1, 1.0), (2, 3.0), (3, 3.0)):
        tracking.epoch(jobs[0], EPOCHS[0], [Point(number, {"x": value})])
        tracking.epoch(jobs[1], EPOCHS[0], [Point(number, {"x": 3.0})])
    tracking.close()
    assert recorded(tracking, "ekfacadam-seed2", "step/x") == [(0, 1), (1, 1), (2, 3), (3, 3)]
    assert recorded(tracking, "sgd-seed0", "step/x") == []


def test_trials_are_nested_under_one_parent(output: Path, jobs: list[Job]):
    for resume in (False, True):
        tracking = Tracking("test", output, resume=resume)
        for each in jobs[1:]:
            tracking.begin(each, [])
            tracking.epoch(each, EPOCHS[0], [])
            tracking.end(each, ended(each, EPOCHS[:1]))
        (output / "fair.json").write_text("{}")
        tracking.finish("search", {"trials": 2.0}, [output / "fair.json"])
        tracking.finish("confirm", {"trials": 0.0})  # never begun
        tracking.close()
        runs = runs_of(tracking)
        assert set(runs) == {*("search", "sgd-search4-seed100", "sgd-search5-seed100", "sgd-seed0")}
        for name in ("sgd-search4-seed100", "sgd-search5-seed100"):
            assert runs[name].data.tags[PARENT] == runs["search"].info.run_id
            assert recorded(tracking, name, "epoch/test_loss")[0] == (1, 2.0)
        assert PARENT not in runs["sgd-seed0"].data.tags
        assert runs["search"].data.tags["kind"] == "search"
        assert runs["search"].data.metrics == {"trials": 2.0}
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        assert files(tracking, "search") == ["fair.json"]


def files(tracking: Tracking, name: str) -> list[str]:
    client = mlflow.MlflowClient(tracking.uri)
    return sorted(x.path for x in client.list_artifacts(runs_of(tracking)[name].info.run_id))


def test_report_and_its_files_are_a_run(output: Path):
    tracking = Tracking("test", output)
    for name in ("report.html", "study.json"):
        (output / name).write_text("x")
    tracking.open("report", {"kind": "report"})
    paths = [output / name for name in ("report.html", "study.json", "gone")]
    tracking.finish("report", {"sgd/test_loss": 0.5}, paths)
    tracking.close()
    assert files(tracking, "report") == ["report.html", "study.json"]
    run = runs_of(tracking)["report"]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"sgd/test_loss": 0.5})
    assert run.info.artifact_uri.startswith((output / "mlartifacts").as_uri())


def test_resuming_adds_missing_epochs_to_the_same_run(output: Path, jobs: list[Job]):
    first = Tracking("test", output)
    first.begin(jobs[0], [])
    first.epoch(jobs[0], EPOCHS[0], [])
    first.close(interrupted=True)
    assert runs_of(first)["ekfacadam-seed2"].info.status == "KILLED"
    again = Tracking("test", output, resume=True)
    again.begin(jobs[0], EPOCHS)
    assert runs_of(again)["ekfacadam-seed2"].info.status == "RUNNING"
    again.close()
    steps = [step for step, _ in recorded(again, "ekfacadam-seed2", "epoch/test_loss")]
    assert steps == [1, 2, 3]


def test_other_studies_in_a_store_have_runs_of_their_own(output: Path, jobs: list[Job]):
    for _ in range(2):
        tracking = Tracking("test", output)
        tracking.begin(jobs[0], [])
        tracking.close()
    client = mlflow.MlflowClient(tracking.uri)
    number = client.get_experiment_by_name("kfactk-test").experiment_id
    runs = client.search_runs([number])
    assert len({run.data.tags[TAG] for run in runs}) == len(runs) == 2


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a' or ''='", None])
def test_damaged_identities_are_made_again(output: Path, content: bytes | None, jobs: list[Job]):
    if content is not None:
        (output / module.IDENTITY).write_bytes(content)
    else:
        os.mkfifo(output / module.IDENTITY)
    tracking = Tracking("test", output, resume=True)
    tracking.begin(jobs[0], [])
    tracking.close()
    assert len(runs_of(tracking)) == 1
    assert tracking.unsent is None


def test_lost_runs_are_recorded_again(output: Path, jobs: list[Job], new_store: Path):
    first = Tracking("test", output)
    first.begin(jobs[0], [])
    first.close(interrupted=True)
    (output / "mlflow.db").write_bytes(new_store.read_bytes())
    again = Tracking("test", output, resume=True)
    again.begin(jobs[0], EPOCHS)
    again.close()
    steps = [step for step, _ in recorded(again, "ekfacadam-seed2", "epoch/test_loss")]
    assert steps == [1, 2, 3]


def test_failing_store_keeps_records_for_an_import(output: Path, jobs: list[Job], monkeypatch):
    tracking, (one, other, trial, _) = Tracking("test", output), jobs
    log_batch = mlflow.MlflowClient.log_batch
    tracking.begin(one, EPOCHS[:1])
    tracking.begin(trial, [])

    def fail(*_: object, **__: object) -> None:
        raise mlflow.MlflowException("the server is away")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fail)
    with caught() as said:
        tracking.epoch(one, EPOCHS[1], [])
        tracking.epoch(one, EPOCHS[2], [Point(7, {"damping": 0.5}), Point(8, {"damping": 0.6})])
        tracking.begin(other, [])
        for each in EPOCHS:
            tracking.epoch(other, each, [])
        for each in (one, other, trial):
            tracking.end(each, ended(each, EPOCHS))
        tracking.close()
    (told,) = map(str, said)
    assert "the server is away" in told
    assert str(tracking.unsent) in told
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    for _ in range(2):
        import_file(tracking.unsent, tracking.uri)
    name = "ekfacadam-seed2"
    assert recorded(tracking, name, "epoch/test_loss") == [(1, 2.0), (2, 1.0), (3, 2 / 3)]
    assert recorded(tracking, name, "step/damping") == [(7, 0.5), (8, 0.6)]
    runs = runs_of(tracking)
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ("ekfacadam-seed2", "sgd-seed0", "sgd-search4-seed100", "search"), "FINISHED"
    )
    assert runs["sgd-search4-seed100"].data.tags[PARENT] == runs["search"].info.run_id


def test_study_that_resumes_after_an_outage_has_one_run(
    output: Path, jobs: list[Job], new_store: Path, monkeypatch
):
    """Its run is found by its name, and the import adds what is missing."""
    (output / "new.db").write_bytes(new_store.read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://me:hunter2@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        one = attrs.evolve(jobs[1], settings={"uri": address})
        with caught() as said:
            began = time.monotonic()
            tracking = Tracking("test", output)
            tracking.begin(one, [])
            tracking.epoch(one, EPOCHS[0], [])
            points = [Point(7, {"damping": 0.5}), Point(8, {"damping": 0.6})]
            tracking.epoch(one, EPOCHS[1], points)
            waited = time.monotonic() - began
            tracking.close(interrupted=True)
    assert waited < 8.0  # two seconds, MLflow's imports, and a busy machine
    assert time.monotonic() - began < waited + 6.0
    assert len(said) == 1
    told = f"{said[0]}{tracking.unsent.read_text()}{tracking.how_to_open('python')}"
    assert "hunter2" not in told
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{output}/new.db")
    again = Tracking("test", output, resume=True)
    again.begin(one, EPOCHS[:2])
    again.epoch(one, EPOCHS[2], [])
    again.end(one, ended(one, EPOCHS))
    again.close()
    import_file(tracking.unsent, again.uri)
    steps = [step for step, _ in recorded(again, "sgd-seed0", "epoch/test_loss")]
    assert steps == [1, 2, 3]
    assert recorded(again, "sgd-seed0", "step/damping") == [(7, 0.5), (8, 0.6)]


def test_records_that_nothing_takes_cost_one_warning(output: Path, jobs: list[Job], monkeypatch):
    tracking = Tracking("test", output)
    tracking.begin(jobs[0], [])
    (output / "mlflow-unsent.jsonl").mkdir()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fail)
    with caught() as said:
        for each in EPOCHS:
            tracking.epoch(jobs[0], each, [])
        tracking.close()
    (told,) = map(str, said)
    assert "Training goes on without them" in told


@pytest.mark.parametrize("fault", ["damaged", "nowhere", "driver"])
def test_stores_that_can_never_work_are_refused(fault: str, tmp_path: Path, monkeypatch):
    if fault == "damaged":
        (tmp_path / "mlflow.db").write_bytes(bytes(range(256)) * 20)
    else:
        scheme = {"nowhere": "nonsense", "driver": "postgresql+nodriver"}[fault]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://me:hunter2@host/db")
    with pytest.raises(ExperimentError, match="cannot be used") as told:
        Tracking("test", tmp_path)
    assert "hunter2" not in str(told.value)
    assert "\n" not in str(told.value)


def test_how_to_open_names_the_store(output: Path, new_store: Path, monkeypatch):
    tracking = Tracking("test", output)
    start, address = tracking.how_to_open("python")
    tracking.close()
    assert start.endswith(f" python -m mlflow ui --backend-store-uri {tracking.uri}")
    number = mlflow.MlflowClient(tracking.uri).get_experiment_by_name("kfactk-test").experiment_id
    assert address.startswith(f"http://127.0.0.1:5000/#/experiments/{number}/runs")
    assert tracking.uri.startswith("sqlite:////")
    other = output / "other.db"
    other.write_bytes(new_store.read_bytes())
    (output / "mlflow.db").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    again = Tracking("test", output)
    again.close()
    assert again.uri == f"sqlite:///{other}"
    assert not (output / "mlflow.db").exists()
