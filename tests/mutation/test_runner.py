"""Runs of tests on mutants of a tiny project: verdicts, and that only a copy is changed and run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mutation.mutants import ROOT, Mutant
from mutation.runner import Bench, Verdict, run

SOURCE = "def double(x):\n    return 2 * x\n"
TESTS = """
from kfactk.statistics import double

def test_four():
    assert double(2) == 4

def test_six():
    assert double(3) == 6
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "mutation", root / "mutation")
    for name, text in {
        "kfactk/__init__.py": "",
        "kfactk/statistics.py": SOURCE,
        "plugins/kfactk_stages/__init__.py": "",
        "tests/few/test_sums.py": "def test_nothing():\n    pass\n",
        "tests/test_sums.py": TESTS,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def plain_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the inner pytest without installed plugins, which take long to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def mutant(source: str, *tests: str, hangs: bool = False) -> Mutant:
    return Mutant("it", "kfactk/statistics.py", source, tests or ("tests/test_sums.py",), hangs)


@pytest.mark.parametrize(
    ("source", "outcome", "by"),
    [
        (SOURCE.replace("2 * x", "x * x"), "killed", "tests/test_sums.py::test_six"),
        (SOURCE.replace("2 * x", "x + x"), "survived", ""),
        (
            SOURCE.replace("2 * x", "2 *"),
            "invalid",
            "kfactk.statistics cannot be imported: SyntaxError",
        ),
        (
            SOURCE + "raise OSError(3)",
            "invalid",
            "kfactk.statistics cannot be imported: OSError: 3",
        ),
        (SOURCE.replace("double", "twice"), "killed", "tests/test_sums.py (collected)"),
    ],
    ids=["other", "equal", "no Python", "raises", "renamed"],
)
def test_outcomes(project: Path, source: str, outcome: str, by: str) -> None:
    with Bench(project) as bench:
        verdict = bench.judge(mutant(source))
        assert (verdict.outcome, verdict.noticed) == (outcome, outcome == "killed")
        assert by in verdict.by
        assert (bench.folder / "kfactk/statistics.py").read_text() == SOURCE
    assert not bench.folder.exists()
    assert (project / "kfactk/statistics.py").read_text() == SOURCE


def test_paths_run_in_order_and_mutants_do_not_mix(project: Path) -> None:
    """Mutants of equal size within one second: a compiled file must not serve the next mutant."""
    broken, same = (
        mutant(SOURCE.replace("2 * x", new), "tests/few", "tests/test_sums.py")
        for new in ("3 * x", "x + x")
    )
    verdicts = list(run([broken, same, broken, same], 2, project))
    assert sorted(v.outcome for v in verdicts) == ["killed", "killed", "survived", "survived"]
    assert {v.by for v in verdicts if v.noticed} == {"tests/test_sums.py::test_four"}


def test_timeouts_count_only_where_stated(project: Path) -> None:
    endless = SOURCE.replace("return", "while True:\n        pass\n    return")
    with Bench(project, timeout=6.0) as bench:
        verdict = bench.judge(mutant(endless))
    assert (verdict.outcome, verdict.noticed) == ("timed out", False)
    assert Verdict(mutant(endless, hangs=True), "timed out", "", 6.0).noticed


def test_imports_from_elsewhere_are_broken_runs(project: Path, tmp_path: Path) -> None:
    """Without the package in the copy, the installed one would be tested."""
    shutil.copytree(project, tmp_path / "project")
    shutil.rmtree(tmp_path / "project/plugins")
    with Bench(tmp_path / "project") as bench:
        outcome, by = bench.run(["tests/test_sums.py"], "kfactk.statistics")
    assert outcome == "broken"
    assert "kfactk_stages was imported from" in by
