"""A tiny experiment from the command line: what it writes, interruption and resumption."""

import json
import os
import shutil
import signal
import sqlite3
import sys
import time
import warnings
from pathlib import Path

import attrs
import pytest
import torch

from experiments import tracking, training
from experiments.__main__ import main
from experiments.experiment import Options, _workers
from kfactk.errors import KfactkError
from kfactk.testing._support.ranks import process_context
from tests.covering import widening
from tests.experiments.studies import with_training

RUNS = ("sgd-seed0", "ekfacadam-seed0")


def experiment(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def history(output: Path, run: str) -> list[dict]:
    """A run's epochs without what a clock says."""
    epochs = json.loads((output / "runs" / run / "run.json").read_text())["history"]
    for epoch in epochs:
        for key in ("seconds", "times"):
            epoch.pop(key)
        epoch["curvature"] = {
            key: value for key, value in epoch["curvature"].items() if not key.startswith("seconds")
        }
    return epochs


def assert_same(output: Path, whole: Path) -> None:
    """The same numbers, to the last bit, and in MLflow one point where there is one."""
    for run in RUNS:
        assert history(output, run) == history(whole, run)
        mine, other = (
            torch.load(folder / "runs" / run / "model.pt", weights_only=True)
            for folder in (output, whole)
        )
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert logged(output) == logged(whole)


def logged(output: Path) -> dict[str, list[tuple[str, int]]]:
    """For each MLflow run, named with its status, its points as (metric, step)."""
    with sqlite3.connect(output / "mlflow.db") as database:
        runs = database.execute("select run_uuid, name, status from runs").fetchall()
        assert len({name for _, name, _ in runs}) == len(runs)  # resuming makes no second run
        return {
            f"{name} {status}": sorted(
                database.execute("select key, step from metrics where run_uuid = ?", (uuid,))
            )
            for uuid, name, status in runs
        }


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("NOX_CURRENT_SESSION", raising=False)


@pytest.fixture
def output(tmp_path: Path, new_store: Path) -> Path:
    """A folder for outputs, which has a database of MLflow already: to make one takes seconds."""
    (tmp_path / "out").mkdir()
    shutil.copy(new_store, tmp_path / "out" / "mlflow.db")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_text: str, new_store: Path) -> Path:
    """The output of an uninterrupted experiment."""
    root = tmp_path_factory.mktemp("whole")
    (root / "out").mkdir()
    shutil.copy(new_store, root / "out" / "mlflow.db")
    (root / "tiny.toml").write_text(tiny_text)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert (
            experiment("--config", root / "tiny.toml", "--output", root / "out", "--device", "cpu")
            == 0
        )
    return root / "out"


def test_experiment_writes_everything(whole: Path):
    names = {"study.json", *(f"{run}.json" for run in RUNS)}
    assert {path.name for path in (whole / "results").iterdir()} == names
    for run in RUNS:
        assert json.loads((whole / "runs" / run / "run.json").read_text())["status"] == "finished"
        assert [epoch["epoch"] for epoch in history(whole, run)] == [1, 2, 3]
        assert sorted(path.name for path in (whole / "runs" / run).iterdir()) == [
            "model.pt",
            "run.json",
        ]


def test_a_reconstruction_has_no_accuracies_anywhere(output: Path, capsys):
    small = ("data.train=60", "data.test=30", "training.batch_size=20", "model.options.widths=[8]")
    changes = [word for change in small for word in ("--set", change)]
    chosen = ("--algorithms", "sgd,kfac", "--seeds", "0", "--epochs", "2", "--device", "cpu")
    assert experiment("--preset", "autoencoder", *changes, *chosen, "--output", output) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert [epoch["train_accuracy"] for epoch in history(output, "kfac-seed0")] == [None, None]
    metrics = {key for points in logged(output).values() for key, _ in points}
    assert {"epoch/train_loss", "epoch/test_loss", "report/kfac_test_loss"} <= metrics
    assert not [metric for metric in metrics if "accuracy" in metric]


def test_mlflow_has_one_point_for_each_epoch(whole: Path):
    points = logged(whole)
    assert set(points) == {*("sgd-seed0 FINISHED", "ekfacadam-seed0 FINISHED", "report FINISHED")}
    for name in ("sgd-seed0 FINISHED", "ekfacadam-seed0 FINISHED"):
        for metric in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert [step for key, step in points[name] if key == f"epoch/{metric}"] == [1, 2, 3]
    assert list((whole / "mlartifacts").rglob("study.json"))
    with sqlite3.connect(whole / "mlflow.db") as database:
        assert database.execute(
            "select name from experiments where name like 'kfactk%'"
        ).fetchall() == [("kfactk-tiny",)]
        params = set(database.execute("select key, value from params"))
    assert {
        ("algorithm.damping", "0.03"),
        ("algorithm.update.name", "adam"),
        ("training.epochs", "3"),
    } <= params


def test_interrupted_experiment_resumes_bit_for_bit(
    whole: Path, tiny: Path, tmp_path: Path, output: Path, monkeypatch, capsys
):
    arguments = ("--config", tiny, "--output", tmp_path / "out", "--device", "cpu")
    steps, step = [], training.Trainer._step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 11:  # the second run's second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_step", interrupted)
        assert experiment(*arguments) == 130
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert told.endswith(f"python -m experiments {' '.join(map(str, arguments))} --resume")
    assert set(logged(tmp_path / "out")) == {"sgd-seed0 KILLED", "ekfacadam-seed0 KILLED"}
    assert [len(history(tmp_path / "out", run)) for run in RUNS] == [2, 1]
    assert experiment(*arguments, "--resume") == 0
    assert_same(tmp_path / "out", whole)


def struck(sign: int, arguments: list[str], stderr: str) -> None:
    """Run a study that gets a signal in its last epoch, and Ctrl-C while it records that."""
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
    steps, step, close = [], training.Trainer._step, tracking.Tracking.close

    def stopped(*args):
        steps.append(1)
        if len(steps) == 17:
            os.kill(os.getpid(), sign)
        return step(*args)

    def again(*args, interrupted):
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        return close(*args, interrupted=interrupted)

    training.Trainer._step, tracking.Tracking.close = stopped, again
    sys.exit(main(arguments))


@pytest.mark.parametrize("sign", widening([signal.SIGKILL, signal.SIGTERM], [signal.SIGKILL]))
def test_killed_experiment_resumes_after_its_last_epoch(
    whole: Path, tiny: Path, output: Path, tmp_path: Path, sign: signal.Signals, monkeypatch
):
    code = -sign if sign == signal.SIGKILL else 130  # it gets Ctrl-C besides SIGTERM
    arguments = ["--config", str(tiny), "--output", str(tmp_path / "out"), "--device", "cpu"]
    stderr = tmp_path / "stderr"
    process = process_context().Process(target=struck, args=(sign, arguments, str(stderr)))
    process.start()
    process.join()
    assert process.exitcode == code, stderr.read_text()
    assert "Traceback" not in stderr.read_text()
    assert len(history(tmp_path / "out", "ekfacadam-seed0")) == 2
    steps, step = [], training.Trainer._step
    monkeypatch.setattr(training.Trainer, "_step", lambda *args: steps.append(1) or step(*args))
    assert main([*arguments, "--resume"]) == 0
    assert len(steps) == 3  # one epoch was lost
    assert_same(tmp_path / "out", whole)


def test_finished_experiment_is_not_repeated(whole: Path, tiny: Path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise AssertionError("a run was made")

    monkeypatch.setattr(training, "Trainer", refuse)
    before, points = history(whole, "sgd-seed0"), logged(whole)
    assert experiment("--config", tiny, "--output", whole, "--device", "cpu", "--resume") == 0
    assert history(whole, "sgd-seed0") == before
    assert logged(whole) == points
    told = capsys.readouterr().out
    assert told.count("epoch 3: training loss") == 2
    assert "continues after" not in told


def test_resume_refuses_other_settings(whole: Path, tiny: Path, capsys):
    tiny.write_text(tiny.read_text().replace("lr = 0.03", "lr = 0.02"))
    assert experiment("--config", tiny, "--output", whole, "--device", "cpu", "--resume") == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    for word in ("sgd-seed0", "algorithm.lr was 0.03, now 0.02", "--output"):
        assert word in told


def test_starting_again_keeps_earlier_runs(tiny: Path, tmp_path: Path, output: Path, capsys):
    arguments = (
        "--config",
        tiny,
        "--output",
        tmp_path / "out",
        "--algorithms",
        "sgd",
        "--max-steps",
        "1",
        "--device",
        "cpu",
    )
    assert experiment(*arguments) == 0
    assert "earlier runs" not in capsys.readouterr().out
    before = history(tmp_path / "out", "sgd-seed0")
    assert experiment(*arguments) == 0
    told = capsys.readouterr().out
    assert "earlier runs in" in told
    assert [epoch["steps"] for epoch in before] == [1]
    kept = tmp_path / "out" / "earlier" / "1" / "runs" / "sgd-seed0" / "run.json"
    kept = json.loads(kept.read_text())
    assert kept["history"][0]["train_loss"] == before[0]["train_loss"]
    assert f"report   {tmp_path / 'out' / 'report.html'}" in told
    assert f"-m mlflow ui --backend-store-uri sqlite:///{tmp_path / 'out' / 'mlflow.db'}" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--preset digts", "no preset 'digts'. Did you mean 'digits'?"),
        ("--algorithms ekfcadam", "no algorithm 'ekfcadam'. Did you mean 'ekfacadam'"),
        ("--algorithms sgd,nothing", "no algorithm 'nothing'"),
        ("--seeds one", "--seeds must be whole numbers"),
        ("--seeds -1", "seeds must be different whole numbers from 0"),
        ("--seeds 0 0", "seeds must be different"),
        ("--seeds ,", "seeds must be different"),
        ("--workers -1", "--workers must be"),
        ("--workers many", "--workers"),
        ("--search fiar", "--search"),
        ("--set training.epoch=3", "no setting training.epoch. Did you mean 'epochs'?"),
        ("--set algorithms.sgd.mometum=0", "no option 'mometum'. Did you mean 'momentum'?"),
        ("--preset digits --set model.name=signal_cnn --algorithms sgd", "model signal_cnn: "),
        ("--preset reference --search", "no [search.thesis]"),
        ("--import-records", "mlflow-unsent.jsonl cannot be read"),
        ("--epochs 0", "--epochs must be"),
        ("--epochs few", "--epochs"),
        ("--batch-size 1", "--batch-size must be"),
        ("--max-steps 0", "--max-steps must be"),
        ("--device nowhere", "--device nowhere cannot be used"),
        ("--epoch 3", "--epoch"),
        ("--config none.toml", "none.toml: cannot be read"),
        ("--preset digits --config none.toml", "give one of them"),
        ("--algorithms sgd --data-dir .", "leave --data-dir out"),
        ("--preset cifar10-small --algorithms sgd --data-dir DIR/file", "is a file"),
        (
            "--preset cifar10-small --algorithms sgd --data-dir DIR/wrong",
            "has no train and no test folder",
        ),
        ("--output DIR/file", "cannot be written to"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: str, words: str, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "wrong" / "something").mkdir(parents=True)
    assert main(arguments.replace("DIR", str(tmp_path)).split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("experiments: error: ")
    assert told.count("\n") == 1
    assert words in told


def test_unreachable_store_is_one_line(tmp_path: Path, tiny: Path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    assert experiment("--config", tiny, "--output", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "MLFLOW_TRACKING_URI" in told
    assert told.count("\n") == 1


def test_help_names_presets_and_options(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    for word in (
        *("mnist1d", "--set", "--search", "--workers", "--results", "--import-records"),
        "cifar10-small",
        "cifar10-resnet50",
        "--data-dir",
        "--algorithms",
        "--seeds",
        "--epochs",
        "--device",
        "--resume",
        "--output",
    ):
        assert word in told


def test_command_to_resume_is_the_typed_one(monkeypatch):
    from experiments.__main__ import _command

    assert _command(["--output", "my runs"]) == "python -m experiments --output 'my runs'"
    monkeypatch.setenv("NOX_CURRENT_SESSION", "experiments")
    assert _command(["--resume"]) == "nox -s experiments -- --resume"


def test_labels_and_titles_are_plain_text(tiny: Path, tmp_path: Path, output: Path, capsys):
    """Neither rich's markup nor emoji; the report is no matter of this test."""
    text = tiny.read_text().replace('title = "A tiny experiment"', 'title = "[/x] $ :smile:"')
    tiny.write_text(text.replace('label = "SGD"', 'label = "$x^$ [/b]"'))
    arguments = ("--config", tiny, "--output", tmp_path / "out", "--max-steps", 1)
    assert experiment(*arguments, "--device", "cpu") == 0
    told = capsys.readouterr().out
    for word in ("[/x] $ :smile:", "$x^$ [/b]"):
        assert word in told


def test_second_experiment_in_a_folder_is_refused(
    tiny: Path, tmp_path: Path, output: Path, capsys, monkeypatch
):
    """Its settings are others; without --resume it would take the first one's runs for its own."""
    arguments = ("--config", tiny, "--output", tmp_path / "out", "--device", "cpu")
    other = tmp_path / "other.toml"
    other.write_text(tiny.read_text().replace("lr = 0.03", "lr = 0.2"))
    codes, step = [], training.Trainer._step

    def begin_another(*args):
        if not codes:
            for more in ((), ("--resume",)):
                codes.append(experiment("--config", other, *arguments[2:], *more))
        return step(*args)

    monkeypatch.setattr(training.Trainer, "_step", begin_another)
    assert experiment(*arguments, "--algorithms", "sgd") == 0
    assert codes == [2, 2]
    told = capsys.readouterr().err
    assert told.count("in use by another experiment") == 2
    assert told.count("\n") == 2
    record = json.loads((tmp_path / "out" / "runs" / "sgd-seed0" / "run.json").read_text())
    assert record["settings"]["algorithm"]["lr"] == 0.03
    assert not (tmp_path / "out" / "earlier").exists()


def test_runs_with_other_settings_are_never_reported(
    tiny: Path, tmp_path: Path, whole: Path, capsys, monkeypatch
):
    """Also where they appear after the start, as on a file system without locks."""
    from experiments import store

    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(store, "move_earlier_runs", lambda output: None)
    tiny.write_text(tiny.read_text().replace("lr = 0.03", "lr = 0.2"))
    assert experiment("--config", tiny, "--output", tmp_path / "out", "--device", "cpu") == 2
    assert "algorithm.lr was 0.03, now 0.2" in capsys.readouterr().err


def test_store_that_is_locked_midway_costs_one_warning(
    tiny: Path, tmp_path: Path, output: Path, whole: Path, monkeypatch, capsys
):
    arguments = ("--config", tiny, "--output", tmp_path / "out", "--device", "cpu")
    path, locks, step = tmp_path / "out" / "mlflow.db", [], training.Trainer._step

    def lock(*args):
        if not locks:
            locks.append(sqlite3.connect(path, isolation_level=None, check_same_thread=False))
            locks[0].execute("begin exclusive")
        return step(*args)

    monkeypatch.setattr(training.Trainer, "_step", lock)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert experiment(*arguments) == 0
    seconds = time.monotonic() - began
    locks[0].execute("rollback")
    locks[0].close()
    ours = [str(each.message) for each in said if "MLflow's store" in str(each.message)]
    assert len(ours) == 1
    assert seconds < 30
    unsent = tmp_path / "out" / "mlflow-unsent.jsonl"
    assert f"import-records {unsent}" in ours[0]
    capsys.readouterr()
    assert experiment(*arguments, "--import-records") == 0
    assert "lines on 3 runs" in capsys.readouterr().out
    assert logged(tmp_path / "out") == logged(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("history"), "KeyError"),
        (lambda state: state["model"].popitem(), "RuntimeError"),
        (lambda state: state["optimizer"].clear(), "checkpoint.pt does not fit"),
        (lambda state: state.update(random={"torch": 3}), "checkpoint.pt does not fit"),
    ],
)
def test_damaged_checkpoints_are_one_line(
    change, words: str, tiny: Path, tmp_path: Path, output: Path, capsys, monkeypatch
):
    arguments = ("--config", tiny, "--output", tmp_path / "out", "--device", "cpu")
    arguments = (*arguments, "--algorithms", "ekfacadam")
    steps, step = [], training.Trainer._step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_step", interrupted)
        assert experiment(*arguments) == 130
    path = tmp_path / "out" / "runs" / "ekfacadam-seed0" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    capsys.readouterr()
    assert experiment(*arguments, "--resume") == 2
    told = capsys.readouterr().err
    assert words in told
    assert "delete it" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KfactkError("20 batches in a row"), "SGD, seed 0: 20 batches in a row"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "smaller --batch-size"),
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device"),
    ],
)
def test_what_stops_a_run_is_one_line(
    error: Exception, words: str, tiny: Path, tmp_path: Path, output: Path, capsys, monkeypatch
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(training.Trainer, "_step", fail)
    assert experiment("--config", tiny, "--output", tmp_path / "out", "--device", "cpu") == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("momentum = 0.9", "nesterov = true", "algorithm sgd: Nesterov"),
        ('optimizer = "SGD"', 'optimizer = "Adam"', "algorithm sgd: there is no option 'momentum'"),
        ('optimizer = "SGD"', 'optimizer = "x:y"', "algorithms.sgd.optimizer: "),
        ('optimizer = "SGD"', "optimizer = [1]", "algorithms.sgd.optimizer must be text"),
        ('basis = "ekfac"', "basis = 3", "algorithm ekfacadam: basis 3"),
        ('name = "digits_resnet"', 'name = "x:y"', "model.name: to import x:y runs its code"),
        ('source = "digits"', 'source = "x:y"', "data.source: to import x:y runs its code"),
        ("train = 150", "train = 9", "the number of classes = 10"),
        ("test = 60", "test = 3", "the number of classes = 10"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    old: str, new: str, words: str, tiny: Path, tmp_path: Path, capsys
):
    assert old in tiny.read_text()
    tiny.write_text(tiny.read_text().replace(old, new))
    assert experiment("--config", tiny, "--output", tmp_path / "out", "--device", "cpu") == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out" / "runs").exists()


def test_output_with_a_file_in_the_way_is_one_line(
    tiny: Path, tmp_path: Path, output: Path, capsys
):
    (tmp_path / "out" / "runs").touch()
    assert experiment("--config", tiny, "--output", tmp_path / "out", "--device", "cpu") == 2
    told = capsys.readouterr().err
    assert "run.json cannot be read" in told
    assert told.count("\n") == 1


def test_search_and_runs_with_what_it_chose(own: Path, tmp_path: Path, monkeypatch, capsys):
    """An interrupted one goes on; each trial is nested in MLflow, and none is done twice."""
    monkeypatch.chdir(tmp_path)
    arguments = ("--config", own, "--trust-config", "--device", "cpu", "--search", "fair")
    arguments = (*arguments, "--workers", 1)
    arguments = (*arguments, "--seeds", 0, "--results", tmp_path / "kept")
    epochs, run_epoch = [], training.Trainer.run_epoch

    def interrupted(*args):
        epochs.append(1)
        if len(epochs) == 11:
            raise KeyboardInterrupt
        return run_epoch(*args)

    monkeypatch.setattr(training.Trainer, "run_epoch", interrupted)
    assert experiment(*arguments) == 130
    assert experiment(*arguments, "--resume") == 0
    assert len(epochs) == 16 + 1 + 2 * 2  # one was lost
    output = tmp_path / "runs" / "own-fair"
    found = json.loads((output / "search" / "fair.json").read_text())
    assert len(found["trials"]) == 16
    for name, options in found["chosen"].items():
        run = json.loads((output / "runs" / f"{name}-seed0" / "run.json").read_text())
        assert options.items() <= run["settings"]["algorithm"].items()
    told = capsys.readouterr().out
    assert "chosen for AdamW: lr " in told
    study = json.loads((tmp_path / "kept" / "study.json").read_text())
    assert study["searches"]["fair"]["chosen"] == found["chosen"]
    runs = [name.split(" ")[0] for name in logged(output)]
    assert len([name for name in runs if "-search" in name]) == 8
    assert len([name for name in runs if "-confirm" in name]) == 8
    assert {"search", "confirm", "report", "adamw-seed0", "ekfac-seed0"} <= set(runs)
    with sqlite3.connect(output / "mlflow.db") as database:
        nested = "select count(*) from tags where key = 'mlflow.parentRunId'"
        assert database.execute(nested).fetchone() == (16,)
    assert [path.name for path in (output / "mlartifacts").rglob("fair.json")] == ["fair.json"] * 2
    assert experiment(*arguments, "--resume") == 0
    assert len(epochs) == 21


def test_workers_follow_from_cores_and_threads(study, tmp_path: Path, monkeypatch):
    options = Options(output=tmp_path, data_dir=None, device="cpu", resume=False, command="")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for threads, workers, kind, size, expected in (
        *((1, 0, "cpu", 1, 6), (2, 0, "cpu", 1, 3), (9, 0, "cpu", 1, 1), (0, 0, "cpu", 1, 1)),
        *((1, 3, "cpu", 1, 3), (1, 0, "cuda", 1, 1), (1, 3, "cpu", 2, 1), (0, 3, "cuda", 1, 3)),
    ):
        changed = with_training(study, threads=threads)
        given = attrs.evolve(options, workers=workers)
        assert _workers(changed, given, torch.device(kind), size) == expected
