"""Settings that all tests share."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from kfactk.testing import effort
from kfactk.testing._support.ranks import shared_workers

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

if not torch.accelerator.is_available():
    # Each seed is kept for accelerators that might start later, with the stack of the call, whose
    # text takes milliseconds.
    for devices in (torch.cuda, torch.xpu, torch.mtia):
        devices.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def doubles() -> Iterator[None]:
    """Make new tensors in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure the coverage of processes: they would take twice as long to import torch.

    For those that run nothing that other tests do not measure, or die before they can tell.
    """
    for name in [name for name in os.environ if name.startswith("COV")]:
        monkeypatch.delenv(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU that is not there; deselect wider samples of a law.

    The wider samples run where the profile is thorough or `-m` asks for them.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if effort(1) > 1 or "thorough" in config.option.markexpr:
        return
    wider = [item for item in items if item.get_closest_marker("thorough")]
    items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=wider)


def pytest_collection_finish() -> None:
    """Exclude what exists now from garbage collections, which would otherwise walk all of torch."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """End the ranks before pytest-xdist kills its processes and loses their coverage."""
    shared_workers().close()
