"""An experiment in several processes: they agree, share the work, and end and resume together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from experiments import data, ranks, settings
from experiments.__main__ import main
from experiments.errors import ExperimentError
from experiments.experiment import Options, _Conductor
from experiments.ranks import Communicator
from experiments.settings import Study
from experiments.training import Trainer
from kfactk.testing._support.ranks import shared_workers
from tests.experiments.studies import with_training
from tests.torchrun import Done, torchrun

pytestmark = pytest.mark.xdist_group("ranks")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def refused(message: str) -> Any:
    raise ExperimentError(message)


def told(work: Any, *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except ExperimentError as error:
        return f"error: {error}"


def agreements(rank: int, folder: str) -> dict[str, Any]:
    """What each of three processes on two machines gets; rank 2 is alone on its machine."""
    mine = Communicator(rank, 3, local=rank % 2)
    log = Path(folder) / "log"

    def note() -> int:
        with log.open("a") as file:
            file.write(str(rank))
        return rank

    return {
        "broadcast": mine.broadcast(lambda: f"of {rank}"),
        "broadcast fails": told(mine.broadcast, lambda: refused(f"on {rank}")),
        "on first": mine.on_first(lambda: f"of {rank}"),
        "on first fails": told(mine.on_first, lambda: refused(f"on {rank}")),
        "in order": mine.in_order(note),
        "in order fails": told(mine.in_order, lambda: refused("no images") if rank == 1 else None),
        "gather": mine.gather(10 * rank),
        "sum": mine.sum(torch.tensor([float(rank)])).item(),
        "log": log.read_text(),
    }


def test_rank_0_decides_and_all_raise_errors(tmp_path: Path):
    found = shared_workers().run(3, agreements, str(tmp_path))
    for rank, mine in enumerate(found):
        assert mine.pop("on first") == ("of 0" if rank == 0 else None)
        assert mine.pop("in order") == rank
    assert found[0] == found[1] == found[2]
    assert found[0] == {
        "broadcast": "of 0",
        "broadcast fails": "error: on 0",
        "on first fails": "error: on 0",
        "in order fails": "error: process 1: no images",
        "gather": [0, 10, 20],
        "sum": 3.0,
        "log": "021",
    }


def alone(work: str, *arguments: Any) -> Any:
    return told(getattr(Communicator(), work), *arguments)


def test_one_process_sends_nothing():
    assert not dist.is_initialized()
    assert (
        alone("broadcast", lambda: 1)
        == alone("on_first", lambda: 1)
        == alone("in_order", lambda: 1)
        == 1
    )
    assert (
        alone("broadcast", lambda: refused("so"))
        == alone("in_order", lambda: refused("so"))
        == "error: so"
    )
    assert alone("gather", 5) == [5]
    with ranks.join(CPU) as mine:
        assert mine == Communicator(0, 1, 0)
    assert not dist.is_initialized()


def tiny_study(path: str) -> tuple[Study, data.Dataset]:
    study = settings.read(Path(path))
    return study, data.load(study.data, None, Path(path).parent, print)


def epochs(
    rank: int, path: str, algorithm: str, changes: dict[str, Any], size: int = 2
) -> dict[str, Any]:
    """Two epochs: figures, weights, and the state that is kept."""
    study, dataset = tiny_study(path)
    trainer = Trainer(
        study,
        study.algorithms[algorithm].with_options(**changes),
        4,
        dataset,
        CPU,
        Communicator(rank, size, rank),
    )
    history = [trainer.run_epoch() for _ in range(2)]
    found = {"history": history, "state": trainer.state_dict()}
    found["weights"] = {
        name: value.detach().clone() for name, value in trainer.model.state_dict().items()
    }
    found["state"]["optimizer"] = {
        key: sorted(entry) for key, entry in found["state"]["optimizer"]["state"].items()
    }
    trainer.close()
    return found


def most_probable(output: torch.Tensor) -> torch.Tensor:
    """Return the most probable class of each term, in place of a drawn one."""
    return output.argmax(-1)


@pytest.mark.parametrize("algorithm", ["sgd", "ekfacadam"])
def test_two_processes_train_as_one(algorithm: str, tiny: Path):
    """They agree but for rounding, without draws: BatchNorm sees the whole batch."""
    fisher = {"name": "mc", "draw": most_probable}
    changes = {} if algorithm == "sgd" else {"fisher": fisher, "placement": "mem_opt"}
    one, other = shared_workers().run(2, epochs, str(tiny), algorithm, changes)
    alone = epochs(0, str(tiny), algorithm, changes, 1)
    assert one["weights"].keys() == other["weights"].keys() == alone["weights"].keys()
    for name, value in alone["weights"].items():
        assert torch.equal(one["weights"][name], other["weights"][name])
        torch.testing.assert_close(
            one["weights"][name], value, rtol=2e-3, atol=4e-3
        )  # Adam makes much of the rounding of small gradients
    for mine, theirs, wanted in zip(
        one["history"], other["history"], alone["history"], strict=True
    ):
        assert mine.metrics == theirs.metrics
        assert mine.steps == wanted.steps == 3
        for figure, value in wanted.metrics.items():
            assert mine.metrics[figure] == pytest.approx(value, rel=2e-3)


def test_state_of_all_processes_is_saved(tiny: Path):
    one, _ = shared_workers().run(2, epochs, str(tiny), "ekfacadam", {"placement": "mem_opt"})
    assert (
        one["state"]["optimizer"] == epochs(0, str(tiny), "ekfacadam", {}, 1)["state"]["optimizer"]
    )


@pytest.mark.parametrize(
    ("changes", "search", "words"),
    [
        ({}, None, "a batch of 50 examples cannot be shared equally by 3 processes"),
        ({"batch_size": 48}, "thesis", "--search runs in one process"),
    ],
)
def test_what_processes_cannot_share_is_told(
    study: Study, tmp_path: Path, changes: dict[str, Any], search: str | None, words: str
):
    options = Options(
        output=tmp_path, data_dir=None, device="cpu", resume=False, command="", search=search
    )
    conductor = _Conductor(
        with_training(study, **changes), options, CPU, Communicator(0, 3), Console(quiet=True)
    )
    with pytest.raises(ExperimentError, match=words):
        conductor.run()


def test_processes_have_their_own_devices():
    cuda = torch.device("cuda")
    assert [ranks.own_device(cuda, local, 2, 2) for local in range(2)] == [
        torch.device("cuda", 0),
        torch.device("cuda", 1),
    ]
    assert ranks.own_device(torch.device("cuda", 1), 0, 1, 2) == torch.device("cuda", 1)
    with pytest.raises(ExperimentError, match="3 processes cannot share 2 cuda device"):
        ranks.own_device(cuda, 0, 3, 2)
    with pytest.raises(
        ExperimentError, match="--device cuda:1 cannot be shared by 2 processes: give --device cuda"
    ):
        ranks.own_device(torch.device("cuda", 1), 0, 2, 2)


SABOTAGE = """
import os, signal, sys
from experiments import __main__, training
steps, step = [], training.Trainer._step
def struck(*args):
    steps.append(1)
    if len(steps) == 11:  # the second run's second epoch
        if sys.argv[1] == "killed" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "Ctrl-C" and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGINT)
    return step(*args)
training.Trainer._step = struck
sys.exit(__main__.main(sys.argv[2:]))
"""


def conducted(*arguments: object, script: Path = ROOT / "experiments" / "__main__.py") -> Done:
    """The study on two processes, whose variables are not those of this session."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "NOX_CURRENT_SESSION"):
            patch.delenv(name, raising=False)
        return torchrun(script, *arguments, folder=ROOT)


def histories(output: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for path in sorted((output / "runs").iterdir()):
        found[path.name] = json.loads((path / "run.json").read_text())["history"]
        for epoch in found[path.name]:
            del epoch["seconds"], epoch["times"], epoch["curvature"]
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> tuple[Path, Path, str]:
    """An uninterrupted experiment of two processes: its settings, its folder, what it printed."""
    folder = tmp_path_factory.mktemp("shared")
    written = folder / "tiny.toml"
    written.write_text(
        tiny_text.replace(
            'curvature = "conv_kfac"', 'curvature = "conv_kfac"\nplacement = "mem_opt"'
        )
    )
    done = conducted("--config", written, "--output", folder / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return written, folder / "out", done.stdout


def test_torchrun_runs_the_experiment_and_one_process_prints(shared: tuple[Path, Path, str]):
    _, output, printed = shared
    assert printed.count("2 algorithms x 1 seeds, 3 epochs") == printed.count("report   ") == 1
    assert "on 2 cpu processes" in printed
    command = json.loads((output / "results" / "study.json").read_text())["command"]
    assert command.startswith("torchrun --standalone --nproc-per-node 2 -m experiments --config")
    assert {run: len(epochs) for run, epochs in histories(output).items()} == {
        "ekfacadam-seed0": 3,
        "sgd-seed0": 3,
    }


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["killed", "Ctrl-C"])
def test_all_processes_end_and_the_experiment_resumes(
    what: str, shared: tuple[Path, Path, str], tmp_path: Path
):
    written, whole, _ = shared
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    arguments = ("--config", written, "--output", tmp_path / "out", "--device", "cpu")
    done = conducted(what, *arguments, script=tmp_path / "sabotage.py")
    assert done.returncode != 0
    if what == "Ctrl-C":
        assert (
            done.stderr.count(
                "interrupted: finished epochs are kept; to continue, run: torchrun --standalone "
                "--nproc-per-node 2"
            )
            == 1
        )
    begun = {run: len(epochs) for run, epochs in histories(tmp_path / "out").items()}
    assert begun == {"ekfacadam-seed0": 1, "sgd-seed0": 2}
    assert main([*map(str, arguments), "--resume"]) == 2  # one process is something else
    done = conducted(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    for number in (1, 2):
        assert done.stdout.count(f"continues after epoch {number}") == 1
    assert histories(tmp_path / "out") == histories(whole)
