"""The scripts of docs/examples: each is shown in the documentation as it is, runs, and learns."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
LONGEST = 80

each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@each
def test_is_shown_in_a_page_as_it_is(example: Path) -> None:
    shown = f'```py title="{example.name}"\n--8<-- "docs/examples/{example.name}"\n```'
    assert any(shown in page.read_text() for page in (ROOT / "docs").glob("*.md")), (
        f"no page of docs/ includes {example.name}"
    )


@each
def test_is_small(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= LONGEST


@each
def test_does_not_hide_a_package_that_it_imports(example: Path) -> None:
    """A script's folder comes first on the path, so a script called lightning.py would import itself."""
    nodes = list(ast.walk(ast.parse(example.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {path.stem for path in EXAMPLES}


def run(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """What the script prints, run as a user would from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "docs" / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def numbers(what: str, printed: str) -> list[float]:
    return [float(number) for number in re.findall(rf"{what} '?([\d.]+)", printed)]


def test_lightning(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = numbers("accuracy", run("lightning_module", capsys, tmp_path, monkeypatch))
    assert whole > 0.9
    assert resumed == whole


def test_accelerate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = numbers("loss", run("accelerate_loop", capsys, tmp_path, monkeypatch))
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "checkpoint" / "optimizer.bin").exists()


def test_huggingface_loop(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run("huggingface_loop", capsys, tmp_path, monkeypatch)
    losses = numbers("loss", printed)
    assert len(losses) == 3
    assert losses[-1] < 0.25 * losses[0]
    assert "8 of 12 parameters preconditioned" in printed


def test_huggingface_trainer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run("huggingface_trainer", capsys, tmp_path, monkeypatch)
    *whole, before_last, last = numbers("'loss':", printed)
    assert [before_last, last] == whole[2:], "the resumed epochs are those of the whole run"
    assert numbers("accuracy", printed)[0] > 0.9
