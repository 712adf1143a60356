"""Laws put to stages that break them: what is caught, and in which words."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from kfactk.testing import Laws


def laws_of(laws: type[Laws]) -> list[str]:
    """Names of the tests that a subclass gets."""
    return [name for name, _ in inspect.getmembers(laws, callable) if name.startswith("test_")]


def caught(laws: type[Laws], stage: Any, *names: str, **members: Any) -> dict[str, str]:
    """Run the laws `names` (all of them by default) on a stage.

    Args:
        laws: The class of laws.
        stage: The stage, as the class would name it.
        names: Names of the tests to run.
        members: Further members of the class that would be written.

    Returns:
        For each law that it breaks, all that is said, notes included.
    """
    made = type("TestBroken", (laws,), {"stage": stage, **members})()
    found = {}
    for name in names or laws_of(laws):
        try:
            getattr(made, name)()
        except pytest.skip.Exception:
            continue
        except Exception as error:
            found[name] = "\n".join([str(error), *getattr(error, "__notes__", ())])
    return found
