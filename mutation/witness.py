"""A pytest plugin for the tests of a mutant.

It checks that the tests run on the copy and that the mutant can be imported, and records the first
test that fails.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import hypothesis
import pytest

FOLDER, MODULE, REPORT = "MUTANT_FOLDER", "MUTANT_MODULE", "MUTANT_REPORT"
"""Environment variables: the copy of the checkout, the module with the mistake, and the file for
the first failure."""
INVALID, ELSEWHERE = 90, 91
"""Exit codes: the mutant cannot be imported; the tests do not import the copy."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Check the imports, before any test is collected."""
    # The same examples every time, and no time spent on shrinking them.
    hypothesis.settings.register_profile(
        "mutants",
        deadline=None,
        derandomize=True,
        database=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )
    hypothesis.settings.load_profile("mutants")
    try:
        modules = [
            importlib.import_module(name)
            for name in ("kfactk", "kfactk_stages", os.environ[MODULE])
        ]
    except Exception as error:
        pytest.exit(
            f"{os.environ[MODULE]} cannot be imported: {type(error).__name__}: {error}",
            returncode=INVALID,
        )
    for module in modules:
        if not Path(str(module.__file__)).is_relative_to(os.environ[FOLDER]):
            pytest.exit(
                f"{module.__name__} was imported from {module.__file__}, not from the copy",
                returncode=ELSEWHERE,
            )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Record a file of tests that could not be collected."""
    if report.failed:
        _record(f"{report.nodeid} (collected)")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record a test that failed."""
    if report.failed:
        _record(report.nodeid)


def _record(test: str) -> None:
    path = Path(os.environ[REPORT])
    if not path.exists():
        path.write_text(json.dumps(test))
