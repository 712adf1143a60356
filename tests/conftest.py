"""Settings that all tests share."""

import os

import hypothesis
import pytest
import torch

from kfactk.testing._support.ranks import shared_workers

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


def pytest_sessionfinish() -> None:
    """Ranks end within the session: pytest-xdist gives its processes ten seconds to exit, and then kills them, their coverage unwritten."""
    shared_workers().close()
