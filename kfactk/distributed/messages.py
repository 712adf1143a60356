"""Messages under way between ranks, and what it means when one does not arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from kfactk.errors import KfactkError

IN_FLIGHT = 4
"""Messages under way at a time, which bounds the memory that their buffers take."""


class PendingMessage:
    """A message under way; `wait` gives what it brings to this rank."""

    def __init__(self, work: Any, finish: Callable[[], dict[str, Tensor]]) -> None:
        self._work, self._finish = work, finish

    def wait(self) -> dict[str, Tensor]:
        """Wait for the message, and return the tensors by name."""
        if self._work is not None:
            with explained():
                self._work.wait()
        return self._finish()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say what a failed collective most likely means.

    Raises:
        KfactkError: In place of the RuntimeError that torch raises.
    """
    try:
        yield
    except RuntimeError as error:
        what = str(error).partition("\n")[0].partition(" This is typically")[0]
        raise KfactkError(
            f"the ranks could not exchange curvature ({what}). Most likely another rank ended, failed, or did not call step(): look at its "
            "output first. Then start all ranks again from the last checkpoint."
        ) from error


def flowing(messages: Iterator[PendingMessage]) -> Iterator[dict[str, Tensor]]:
    """What messages bring, in their order, a few of them under way at a time."""
    waiting: list[PendingMessage] = []
    for message in messages:
        waiting.append(message)
        if len(waiting) >= IN_FLIGHT:
            yield waiting.pop(0).wait()
    for message in waiting:
        yield message.wait()
