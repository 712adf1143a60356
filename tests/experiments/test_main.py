"""A tiny experiment from the command line: what it writes, interruption and resumption."""

import json
import os
import signal
import sqlite3
import sys
from pathlib import Path

import pytest
import torch

from experiments import tracking, training
from experiments.__main__ import main
from kfactk.testing._support.ranks import process_context
from tests.covering import widening

RUNS = ("sgd-seed0", "ekfacadam-seed0")


def experiment(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def history(output: Path, run: str) -> list[dict]:
    """A run's epochs without what a clock says."""
    epochs = json.loads((output / "runs" / run / "run.json").read_text())["history"]
    for epoch in epochs:
        epoch.pop("seconds")
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    """The output of an uninterrupted experiment."""
    root = tmp_path_factory.mktemp("whole")
    (root / "tiny.toml").write_text(tiny_text)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert (
            experiment("--config", root / "tiny.toml", "--output", root / "out", "--device", "cpu")
            == 0
        )
    return root / "out"


def test_experiment_writes_everything(whole: Path):
    assert (whole / "report.html").stat().st_size > 10_000
    assert len(list((whole / "figures").iterdir())) == 8
    for run in RUNS:
        assert json.loads((whole / "runs" / run / "run.json").read_text())["status"] == "finished"
        assert [epoch["epoch"] for epoch in history(whole, run)] == [1, 2, 3]
        assert sorted(path.name for path in (whole / "runs" / run).iterdir()) == [
            "model.pt",
            "run.json",
        ]


def test_mlflow_has_one_point_for_each_epoch(whole: Path):
    points = logged(whole)
    assert set(points) == {"sgd-seed0 FINISHED", "ekfacadam-seed0 FINISHED"}
    for recorded in points.values():
        for metric in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert [step for key, step in recorded if key == metric] == [1, 2, 3]
    assert ("step/damping", 0) in points["ekfacadam-seed0 FINISHED"]
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
    whole: Path, tiny: Path, tmp_path: Path, monkeypatch, capsys
):
    arguments = ("--config", tiny, "--output", tmp_path / "out", "--device", "cpu")
    steps, step = [], training.Trainer._step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 9 + 5:  # the second run's second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_step", interrupted)
        assert experiment(*arguments) == 130
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert told.endswith(f"python -m experiments {' '.join(map(str, arguments))} --resume")
    assert set(logged(tmp_path / "out")) == {"sgd-seed0 FINISHED", "ekfacadam-seed0 KILLED"}
    assert [epoch["epoch"] for epoch in history(tmp_path / "out", "ekfacadam-seed0")] == [1]
    assert experiment(*arguments, "--resume") == 0
    assert_same(tmp_path / "out", whole)


def struck(sign: int, arguments: list[str], stderr: str) -> None:
    """Run a study that gets a signal in its last epoch, and Ctrl-C while it records that."""
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
    steps, step, end = [], training.Trainer._step, tracking.Tracking.end

    def stopped(*args):
        steps.append(1)
        if len(steps) == 9 + 7:
            os.kill(os.getpid(), sign)
        return step(*args)

    def again(*args):
        if args[2] == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        return end(*args)

    training.Trainer._step, tracking.Tracking.end = stopped, again
    sys.exit(main(arguments))


@pytest.mark.parametrize("sign", widening([signal.SIGKILL, signal.SIGTERM], [signal.SIGKILL]))
def test_killed_experiment_resumes_after_its_last_epoch(
    whole: Path, tiny: Path, tmp_path: Path, sign: signal.Signals, monkeypatch
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
    before = history(whole, "sgd-seed0")
    assert experiment("--config", tiny, "--output", whole, "--device", "cpu", "--resume") == 0
    assert history(whole, "sgd-seed0") == before
    assert capsys.readouterr().out.count("finished earlier") == 2


def test_resume_refuses_other_settings(whole: Path, tiny: Path, capsys):
    tiny.write_text(tiny.read_text().replace("lr = 0.03", "lr = 0.02"))
    assert experiment("--config", tiny, "--output", whole, "--device", "cpu", "--resume") == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    for word in ("sgd-seed0", "algorithm.lr was 0.03, now 0.02", "--output"):
        assert word in told


def test_starting_again_keeps_earlier_runs(tiny: Path, tmp_path: Path, capsys):
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
    assert "stopped after 1 steps" in " ".join(told.split())
    kept = json.loads((tmp_path / "out" / "earlier" / "1" / "sgd-seed0" / "run.json").read_text())
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
        ("--seeds -1", "--seeds must be"),
        ("--seeds 0 0", "--seeds must be"),
        ("--epochs 0", "--epochs must be"),
        ("--epochs few", "--epochs"),
        ("--batch-size 1", "--batch-size must be"),
        ("--max-steps 0", "--max-steps must be"),
        ("--device nowhere", "--device nowhere cannot be used"),
        ("--epoch 3", "--epoch"),
        ("--config none.toml", "none.toml: cannot be read"),
        ("--preset digits --config none.toml", "give one of them"),
        ("--data-dir .", "leave --data-dir out"),
        ("--preset cifar10-small --data-dir DIR/file", "is a file"),
        ("--preset cifar10-small --data-dir DIR/wrong", "has no train and no test folder"),
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
