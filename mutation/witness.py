"""A pytest plugin that runs beside the tests of a mutant: are they run on the copy, can the mutant be imported, which test failed first?"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import hypothesis
import pytest

FOLDER, MODULE, REPORT = "MUTANT_FOLDER", "MUTANT_MODULE", "MUTANT_REPORT"
"""Environment variables: the copy of the checkout, the module with the mistake, and the file the findings go to."""
INVALID, ELSEWHERE = 90, 91
"""Exit codes: the mutant cannot be imported; what is imported is not the copy."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Look before any test is collected."""
    hypothesis.settings.register_profile(  # the same examples every time, and no time spent on finding the smallest that fails
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
    """Note a file of tests that could not be collected."""
    if report.failed:
        _note(f"{report.nodeid} (collected)")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that failed."""
    if report.failed:
        _note(report.nodeid)


def _note(test: str) -> None:
    path = Path(os.environ[REPORT])
    if not path.exists():
        path.write_text(json.dumps(test))
