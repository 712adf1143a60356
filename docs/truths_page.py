"""Write `docs/truths.md`: what each stage is compared with, and how far it was from it.

    python -m docs.truths_page

It runs the tests of `truths.toml`, in minutes on one core, and notes their comparisons in float64.
The draws of Hypothesis are fixed.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import cattrs
import pytest

from docs.measuring import Comparison, ComparisonPlugin

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "truths.md"
ROWS = ROOT / "docs" / "truths.toml"
"""The rows of the page."""
FAMILIES = {
    "curvature": "Curvatures",
    "basis": "Bases",
    "fisher": "Fisher estimators",
    "likelihood": "Likelihoods",
    "link": "Links",
    "clip": "Clips",
    "update": "Update rules",
    "controller": "Controllers",
    "pace": "Paces, lag and running means",
}
"""The families of the page, in its order: a placement says who computes, a tracker nothing."""
HEAD = """\
# Table of truths

What each layer and each method is compared with, the tests that do it, and the largest deviation
that they saw. A truth comes from outside of kfactk: dense float64 algebra, autograd on one example
at a time, a loop written by hand, or another library.

Both sides are in float64, on the CPU. A deviation is `|found - expected| / |expected|`, norms over
all entries of a tensor; where zero is expected, it is `|found|`. *Allowed* is what the test lets
pass in that comparison, as the same ratio. Another processor or version of torch changes the digits
of what is near rounding. Zero means bit for bit. Placements say who computes, and have no row:
[the equivalence over ranks](testing.md#on-several-ranks) compares each with one process. Trackers
compute nothing.
"""
FOOT = """
This page is made by `python -m docs.truths_page`, which runs these tests and notes every comparison
that they make. A test checks that each named test exists, and that each stage has a row; it
measures nothing.
"""


@attrs.frozen
class Truth:
    """A row of the page.

    Args:
        family: Of the stage.
        stages: Registered names of the stages that it shows.
        what: What it shows of them, "" for all.
        truth: What they are compared with.
        file: The file of the tests.
        tests: Their names, perhaps after that of a class, perhaps with the id of parameters.
    """

    family: str
    stages: tuple[str, ...]
    what: str
    truth: str
    file: str
    tests: tuple[str, ...]

    def ids(self) -> list[str]:
        """Return the ids of its tests."""
        return [f"{self.file}::{test}" for test in self.tests]

    def cells(self) -> str:
        """Return the cells that are not measured."""
        names = ", ".join(f"`{stage}`" for stage in self.stages)
        what = ", ".join(filter(None, (names, self.what)))
        tests = ", ".join(f"`{test.replace('::', '.')}`" for test in self.tests)
        return f"| {what} | {self.truth} | `{self.file}`: {tests} |"


def truths() -> list[Truth]:
    """Return all rows, family by family."""
    rows = tomllib.loads(ROWS.read_text(encoding="utf-8"))["truth"]
    found = [cattrs.structure(row, Truth) for row in rows]
    return sorted(found, key=lambda truth: list(FAMILIES).index(truth.family))


def page(measured: Mapping[Truth, str]) -> str:
    """Return the page.

    Args:
        measured: The last two cells of each row.
    """
    lines = [HEAD]
    for family, title in FAMILIES.items():
        lines += [f"## {title}\n", "| what | truth | tests | largest deviation | allowed |"]
        lines += ["|---|---|---|---|---|"]
        mine = [truth for truth in truths() if truth.family == family]
        lines += [f"{truth.cells()} {measured[truth]} |" for truth in mine]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n" + FOOT


def run(ids: Sequence[str]) -> ComparisonPlugin:
    """Run tests with the plugin that notes their comparisons.

    Raises:
        RuntimeError: One of them did not pass.
    """
    plugin = ComparisonPlugin()
    os.environ["CI"] = "1"  # fixes what Hypothesis draws
    code = pytest.main(["-q", "-p", "no:cacheprovider", *ids], plugins=[plugin])
    others = {test: how for test, how in plugin.outcomes.items() if how != "passed"}
    if code or others:
        raise RuntimeError(f"these tests must pass first: {others or code}")
    return plugin


def cells(comparisons: Sequence[Comparison]) -> str:
    """Return the largest deviation, and what was allowed there."""
    largest = max(comparisons)
    return " | ".join(f"{x:.1e}" if x else "0" for x in (largest.deviation, largest.allowed))


def measure() -> dict[Truth, str]:
    """Return the measured cells of each row.

    Raises:
        RuntimeError: A test did not pass, or compared nothing in float64.
    """
    plugin, found = run(sorted({each for truth in truths() for each in truth.ids()})), {}
    for truth in truths():
        seen = []
        for name in truth.ids():
            mine = [
                each
                for test, comparisons in plugin.found.items()
                if test == name or test.startswith(f"{name}[")
                for each in comparisons
            ]
            if not mine:
                raise RuntimeError(f"{name} compares nothing in float64: name another test")
            seen += mine
        found[truth] = cells(seen)
    return found


if __name__ == "__main__":
    PAGE.write_text(page(measure()), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
