"""The one error of the study: something the user can put right, told in one line."""

from __future__ import annotations

from collections.abc import Iterable


class ExperimentError(Exception):
    """Shown as one line on stderr, with exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def near_names(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known names closest to `name`, or nothing."""
    from kfactk.errors import (
        near_names as near,  # imported late: it loads torch, which --help need not wait for
    )

    return near(name, known)
