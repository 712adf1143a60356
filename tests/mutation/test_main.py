"""The tables, and which verdicts are failures."""

from __future__ import annotations

import pytest

from mutation.__main__ import main, report
from mutation.mutants import Mutant
from mutation.runner import Verdict

pytestmark = pytest.mark.xdist_group("mutants")


def verdict(name: str, outcome: str, by: str = "") -> Verdict:
    return Verdict(Mutant(name, "a.py", "", ()), outcome, by, 1.5)


@pytest.mark.parametrize(
    ("strict", "reasons", "failures"),
    [
        (True, {}, ["one", "two", "three", "five"]),
        (False, {}, ["one", "three", "five"]),
        (False, {"one": "equal"}, ["three", "five"]),
    ],
)
def test_unnoticed_mutants_are_failures(
    strict: bool, reasons: dict[str, str], failures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = {
        "one": "survived",
        "two": "invalid",
        "three": "timed out",
        "four": "killed",
        "five": "broken",
        "six": "explained",
    }
    found = report(
        "all of them",
        [verdict(name, outcome, f"by {name}") for name, outcome in outcomes.items()],
        {"six": "", **reasons},
        strict=strict,
    )
    printed = capsys.readouterr().out
    assert found == len(failures)
    assert [
        line.split()[-2]
        for line in printed.splitlines()
        if line.startswith(("SURVIVED", "INVALID", "TIMED OUT", "BROKEN"))
    ] == failures
    assert (
        "6 mutants: 1 broken, 1 explained, 1 invalid, 1 killed, 1 survived, 1 timed out" in printed
    )
    assert "by four" in printed


def test_list_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--sample", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "missing 1/T  [plugins/kfactk_stages/curvature/kfac.py]" in lines
    assert " => " in lines[-1]
    assert main(["--list", "--only", "missing min(1", "--sample", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
