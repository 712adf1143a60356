"""Run laws on stages that break them: what is caught, and with which message."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings

from kfactk.testing import Laws


def laws_of(laws: type[Laws]) -> list[str]:
    """Names of the tests that a subclass gets."""
    return [name for name, _ in inspect.getmembers(laws, callable) if name.startswith("test_")]


def caught(laws: type[Laws], stage: Any, *names: str, **members: Any) -> dict[str, str]:
    """Run the laws `names` (all of them by default) on a stage.

    Each stops at the first example that fails, which is the same each time.

    Args:
        laws: The class of laws.
        stage: The stage, as the class would name it.
        names: Names of the tests to run.
        members: Further members of the class that would be written.

    Returns:
        For each law that it breaks, the whole message, notes included.
    """
    with _without_shrinking():
        made = type("TestBroken", (laws,), {"stage": stage, **members})()
    found = {}
    for name in names or laws_of(laws):
        try:
            getattr(made, name)()
        except pytest.skip.Exception:
            continue
        except Exception as error:
            found[name] = "\n".join(_said(error))
    return found


@contextlib.contextmanager
def _without_shrinking() -> Iterator[None]:
    """Tests that are defined in here report the first example that fails."""
    before = settings.get_current_profile_name()
    settings.register_profile(
        "unshrunk", settings.default, phases=[Phase.generate], derandomize=True, database=None
    )
    settings.load_profile("unshrunk")
    try:
        yield
    finally:
        settings.load_profile(before)


def _said(error: BaseException) -> list[str]:
    """Return the message and notes of an error, and those of all errors in a group."""
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return [
        str(error),
        *getattr(error, "__notes__", ()),
        *(line for each in inner for line in _said(each)),
    ]
