"""Scripts of docs/examples: a page shows each, each runs, and its loss falls."""

import ast
import contextlib
import functools
import io
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))

each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@each
def test_example_is_included_in_a_page(example: Path) -> None:
    shown = f'```py title="{example.name}"\n--8<-- "docs/examples/{example.name}"\n```'
    assert any(shown in page.read_text() for page in (ROOT / "docs").glob("*.md")), (
        f"no page of docs/ includes {example.name}"
    )


@each
def test_example_does_not_shadow_its_imports(example: Path) -> None:
    """The folder of a script is first on the path: a script lightning.py would import itself."""
    nodes = list(ast.walk(ast.parse(example.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {path.stem for path in EXAMPLES}


def run(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Run the script in a temporary folder and return its output."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "docs" / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def printed_by() -> Callable[[str], str]:
    """Return a function that runs a script, once, and returns its output."""

    @functools.cache
    def output(name: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_path(str(ROOT / "docs" / "examples" / f"{name}.py"), run_name="__main__")
        return out.getvalue()

    return output


def numbers(what: str, printed: str) -> list[float]:
    return [float(number) for number in re.findall(rf"{what} '?([\d.]+)", printed)]


def test_lightning_run_resumes_with_equal_accuracy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = numbers("accuracy", run("lightning_module", capsys, tmp_path, monkeypatch))
    assert whole > 0.9
    assert resumed == whole


def test_accelerate_loop_learns_and_saves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = numbers("loss", run("accelerate_loop", capsys, tmp_path, monkeypatch))
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "checkpoint" / "optimizer.bin").exists()


def test_huggingface_loop_learns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run("huggingface_loop", capsys, tmp_path, monkeypatch)
    losses = numbers("loss", printed)
    assert len(losses) == 3
    assert losses[-1] < 0.25 * losses[0]
    assert "8 of 12 parameters preconditioned" in printed


def test_huggingface_trainer_resumes_with_equal_loss(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run("huggingface_trainer", capsys, tmp_path, monkeypatch)
    *whole, before_last, last = numbers("'loss':", printed)
    assert [before_last, last] == whole[2:], "the resumed epochs differ from those of the whole run"
    assert numbers("accuracy", printed)[0] > 0.9


@pytest.mark.parametrize(
    ("recipe", "what", "share"),
    [
        ("gan", "distance", 0.6),
        ("vae", "loss", 0.6),
        ("autoencoder", "entropy", 0.3),
        ("autoencoder", "squares", 0.3),
        ("contrastive", "loss", 0.6),
        ("detection", "classes", 0.2),
        ("detection", "boxes", 0.2),
        ("segmentation", "out", 0.3),
        ("segmentation", "aux", 0.6),
        ("multi_task", "kind", 0.2),
        ("multi_task", "size", 0.2),
        ("pinn", "loss", 0.01),
        ("pinn", "error", 0.1),
        ("poisson", "kfactk.* error", 0.05),
        ("gcn", "loss", 0.5),
        ("language_model", "loss", 0.2),
        ("regression", "error", 0.3),
    ],
)
@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_recipe_learns(
    recipe: str,
    what: str,
    share: float,
    printed_by: Callable[[str], str],
) -> None:
    """What it prints falls to a share of its first value at most."""
    found = numbers(what, printed_by(recipe))
    assert len(found) >= 3
    assert found[-1] < share * found[0]


@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_poles_stay_up_longer(printed_by: Callable[[str], str]) -> None:
    steps = numbers("once in", printed_by("actor_critic"))
    assert len(steps) == 3
    assert steps[-1] > 1.5 * steps[0]


@pytest.mark.parametrize("task", ["cartpole", "pendulum"])
@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_acktr_writes_its_curves(
    task: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gymnasium")
    names, steps = ["acktr", "adam", "rmsprop"], {"cartpole": "5120", "pendulum": "3840"}[task]
    given = ["--task", task, "--optimizer", *names, "--steps", steps, "--json", "acktr.json"]
    monkeypatch.setattr("sys.argv", ["acktr.py", *given])
    printed = run("acktr", capsys, tmp_path, monkeypatch)
    assert all(re.search(f"^{name}: median ", printed, re.MULTILINE) for name in names)
    written = json.loads((tmp_path / "acktr.json").read_text())
    assert [found["optimizer"] for found in written["runs"]] == names
    for found in written["runs"]:
        at, last = found["curve"][-1]
        assert str(at) == steps
        assert last > {"cartpole": 15, "pendulum": -1800}[task]
    assert written["runs"][0]["curve"][-1][1] > {"cartpole": 30, "pendulum": -1800}[task]


@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_agent_of_stable_baselines_learns(printed_by: Callable[[str], str]) -> None:
    pytest.importorskip("stable_baselines3")
    returns = numbers("return", printed_by("stable_baselines"))
    assert len(returns) == 3
    assert max(returns) > 150  # a random policy has 20


def test_race_names_a_winner(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["race.py", "0.1"])
    printed = run("race", capsys, tmp_path, monkeypatch)
    losses = numbers("held-out loss", printed)
    assert len(losses) == 10
    assert re.search(r"^best: (AdamW|kfactk)", printed, re.MULTILINE)
