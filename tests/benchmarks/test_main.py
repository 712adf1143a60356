"""One entry for all parts: what each is given, what is kept, and what status is returned."""

import doctest
import importlib
from pathlib import Path

import pytest

from benchmarks import __main__ as entry

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


def test_every_part_is_a_module():
    assert set(entry.PARTS) <= set(MODULES)


@pytest.fixture
def ran(monkeypatch):
    """Record parts, with their arguments and folder, in place of running them; memory fails."""
    found = []
    monkeypatch.setattr(
        entry, "run", lambda *given: found.append(given) or (3 if given[0] == "memory" else 0)
    )
    return found


def test_all_parts_run_although_one_fails(ran):
    assert entry.main([]) == 3
    assert [part for part, *_ in ran] == list(entry.PARTS)
    assert {folder for *_, folder in ran} == {entry.FOLDER}


@pytest.mark.parametrize(
    "given",
    [
        ["--output", "there", "race", "--widths", "16"],
        ["race", "--widths", "16", "--output", "there"],
    ],
)
def test_one_part_runs_with_its_arguments(ran, given):
    assert entry.main(given) == 0
    assert ran == [("race", ["--widths", "16"], Path("there"))]


def test_output_of_a_part_is_saved_and_its_status_returned(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    assert entry.main(["--output", str(tmp_path / "new"), "plot"]) == 2  # there is nothing to plot
    assert "race.json" in capfd.readouterr().err
    assert entry.main(["race", "--help", "--output", str(tmp_path)]) == 0
    assert "--widths" in (tmp_path / "race.txt").read_text()
