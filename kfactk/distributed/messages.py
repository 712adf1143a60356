"""Messages under way between ranks, and what it means when one does not arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from kfactk.errors import KfactkError

IN_FLIGHT = 4
"""Messages under way at a time, which bounds the memory that their buffers take."""


class PendingMessage:
    """A message under way; `wait` returns what it brings to this rank.

    Args:
        work: What torch returned for the collective; `None` where nothing travels.
    """

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> dict[str, Tensor]:
        """Wait for the message, and return its tensors by name."""
        if self._work is not None:
            with explained():
                self._work.wait()
        return self.tensors()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a message that has arrived; a subclass knows them."""
        raise NotImplementedError


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
