"""The error of the experiments: something that the user can correct, in one line."""

from __future__ import annotations

from collections.abc import Iterable


class ExperimentError(Exception):
    """An error that is printed as one line on stderr, with exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def near_names(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known names closest to `name`, or nothing."""
    # Imported late: it loads torch, which --help does not need.
    from kfactk.errors import near_names as near

    return near(name, known)
