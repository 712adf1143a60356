"""Entries become runs of MLflow, also when they are sent twice or to another store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kfactk import OptionError
from kfactk_stages.tracker.delivery import append
from kfactk_stages.tracker.mlflow_store import PARENT, TAG, Store, import_file, is_mistake

pytestmark = pytest.mark.xdist_group("mlflow")
START = {"experiment": "e", "name": "first", "tags": {"a": "b"}, "time": 5000}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        pytest.importorskip("mlflow")
        yield f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def entries(run: str, **start: Any) -> list[dict[str, Any]]:
    return [
        {"run": run, "start": {**START, **start}},
        {"run": run, "params": {"lr": "0.1"}},
        {"run": run, "metrics": [["loss", 1.0, 1000, 0], ["loss", "nan", 2000, 1]]},
        {"run": run, "metrics": [["loss", 0.5, 3000, 2]]},
        {"run": run, "end": "FINISHED", "time": 4000},
    ]


def found(uri: str, run: str) -> tuple[Any, list[int]]:
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    (one,) = client.search_runs(experiments, f"tags.`{TAG}` = '{run}'")
    return one, [point.step for point in client.get_metric_history(one.info.run_id, "loss")]


def test_runs_are_as_the_entries_say(uri: str) -> None:
    store = Store(uri)
    for entry in entries("one"):
        store.send(entry)
    run, steps = found(uri, "one")
    assert steps == [0, 1, 2]
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (5000, 4000)
    assert (run.data.params, run.data.tags["a"]) == ({"lr": "0.1"}, "b")


@pytest.mark.parametrize("sent", [1, 2, 3, 4])
def test_files_complete_what_was_sent(uri: str, tmp_path: Path, sent: int) -> None:
    """A store may have got some entries without confirming them, also that of the start."""
    store, run = Store(uri), f"partly {sent}"
    for entry in entries(run)[:sent]:
        store.send(entry)
    append(tmp_path / "file", entries(run))
    assert "5 lines on 1 runs" in import_file(tmp_path / "file", uri)
    assert found(uri, run)[1] == [0, 1, 2]
    import_file(tmp_path / "file", uri)
    one, steps = found(uri, run)
    assert steps == [0, 1, 2]
    assert one.info.status == "FINISHED"


def files_of(uri: str, run: str) -> list[str]:
    import mlflow

    one, _ = found(uri, run)
    return [each.path for each in mlflow.MlflowClient(uri).list_artifacts(one.info.run_id)]


def test_files_are_attached_and_missing_ones_left_out(uri: str, tmp_path: Path) -> None:
    """Artifacts lie where the experiment says."""
    (tmp_path / "report.html").write_text("x")
    where = {"experiment": "with files", "artifacts": (tmp_path / "artifacts").as_uri()}
    paths = [str(tmp_path / "report.html"), str(tmp_path / "gone.html")]
    start, *others = entries("with files", **where)
    store, lines = Store(uri), [start, {"run": "with files", "files": paths}, *others]
    for entry in lines:
        store.send(entry)
    assert files_of(uri, "with files") == ["report.html"]
    assert list((tmp_path / "artifacts").rglob("report.html"))
    append(tmp_path / "file", [{**each, "run": "imported files"} for each in lines])
    assert "6 lines on 1 runs" in import_file(tmp_path / "file", uri)
    assert files_of(uri, "imported files") == ["report.html"]


@pytest.mark.parametrize("known", [True, False])
def test_runs_are_nested_under_their_parents(uri: str, tmp_path: Path, known: bool) -> None:
    """Also where another process has made the parent, as before an outage."""
    store, parent, child = Store(uri), f"parent {known}", f"child {known}"
    for entry in entries(parent):
        store.send(entry)
    lines = entries(child, parent=parent)
    if known:
        for entry in lines:
            store.send(entry)
    else:
        append(tmp_path / "file", lines)
        import_file(tmp_path / "file", uri)
    assert found(uri, child)[0].data.tags[PARENT] == found(uri, parent)[0].info.run_id
    assert PARENT not in found(uri, parent)[0].data.tags


def test_runs_without_their_parents_are_runs(uri: str) -> None:
    store = Store(uri)
    for entry in entries("orphan", parent="nobody"):
        store.send(entry)
    assert PARENT not in found(uri, "orphan")[0].data.tags


@pytest.mark.parametrize("resumed", [True, False])
def test_resumed_starts_continue_the_run_of_their_name(uri: str, resumed: bool) -> None:
    """Those that are not resumed are runs of their own."""
    import mlflow

    run = f"again {resumed}"
    for _ in range(2):
        store = Store(uri)  # another process
        start, params, metrics, *_ = entries(run, resumed=resumed)
        for entry in (start, params, {**metrics, "resumed": True}):
            store.send(entry)
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([store.experiments["e"]], f"tags.`{TAG}` = '{run}'")
    assert len(runs) == (1 if resumed else 2)
    for each in runs:
        assert each.info.status == "RUNNING"
        points = client.get_metric_history(each.info.run_id, "loss")
        assert [point.step for point in points] == [0, 1]


@pytest.mark.parametrize("gone", ["0" * 32, "not an id", None])
def test_runs_of_another_store_are_made_anew(uri: str, tmp_path: Path, gone: str | None) -> None:
    append(tmp_path / "file", entries(f"elsewhere {gone}", run_id=gone, active=True))
    import_file(tmp_path / "file", uri)
    assert found(uri, f"elsewhere {gone}")[1] == [0, 1, 2]


def test_deleted_experiments_are_restored(uri: str) -> None:
    import mlflow

    store = Store(uri)
    for entry in entries("before", experiment="deleted"):
        store.send(entry)
    client = mlflow.MlflowClient(uri)
    client.delete_experiment(client.get_experiment_by_name("deleted").experiment_id)
    for entry in entries("after", experiment="deleted"):
        store.send(entry)
    assert found(uri, "after")[1] == [0, 1, 2]


def test_damaged_lines_are_left_out(uri: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    append(path, entries("damaged")[:3])
    with path.open("ab") as file:
        file.write(b'\xff\n[]\n7\n{"run": 3}\n{"run": "other", "end": "FINISHED"}\n{"cut')
    append(path, entries("damaged")[3:])
    assert "6 damaged lines were left out" in import_file(path, uri)
    assert found(uri, "damaged")[1] == [0, 1, 2]


@pytest.mark.parametrize(
    "content", [None, "", "no records\n", '{"run": "a", "start": null}\n', '{"recipe": {}}\n']
)
def test_files_without_records_are_refused(tmp_path: Path, content: str | None, uri: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match="Give the file that the warning named") as told:
        import_file(path, uri)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"run": "a", "start": {"experiment": 3}},
        {"run": "a", "experiment": 7},
    ],
)
def test_lines_that_cannot_be_sent_are_named(uri: str, tmp_path: Path, entry: Any) -> None:
    append(tmp_path / "file", [entry])
    with pytest.raises(OptionError, match=r"line 1 of .* cannot be sent") as told:
        import_file(tmp_path / "file", uri)
    assert "\n" not in str(told.value)


def test_stores_that_can_never_be_are_mistakes(tmp_path: Path) -> None:
    for uri, mistake in (("nonsense://x", True), ("http://127.0.0.1:1", False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            with pytest.raises(Exception, match=r".") as raised:
                Store(uri).send(entries("x")[0])
        assert is_mistake(raised.value) == mistake
