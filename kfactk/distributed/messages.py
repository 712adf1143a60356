"""Messages under way between ranks, and the error of one that does not arrive."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from kfactk.errors import KfactkError

MAX_IN_FLIGHT = 4
"""Largest number of messages under way at a time; it bounds the memory of their buffers."""


class PendingMessage(ABC):
    """A message under way; `wait` returns what it brings to this rank.

    Args:
        work: What torch returned for the collective; `None` where nothing travels.
    """

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> dict[str, Tensor]:
        """Wait for the message, and return its tensors by name."""
        if self._work is not None:
            with explain_failures():
                self._work.wait()
        return self.tensors()

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a message that has arrived."""


@contextlib.contextmanager
def explain_failures() -> Iterator[None]:
    """Explain the failure of a collective.

    Raises:
        KfactkError: In place of the RuntimeError that torch raises.
    """
    try:
        yield
    except RuntimeError as error:
        what = str(error).partition("\n")[0].partition(" This is typically")[0]
        raise KfactkError(
            f"the ranks could not exchange curvature ({what}). Most likely another rank ended, "
            "failed, or did not call step(): look at its output first. Then start all ranks again "
            "from the last checkpoint."
        ) from error


def receive_in_order(messages: Iterator[PendingMessage]) -> Iterator[dict[str, Tensor]]:
    """Yield what messages bring, in their order, with at most `MAX_IN_FLIGHT` under way."""
    waiting: list[PendingMessage] = []
    for message in messages:
        waiting.append(message)
        if len(waiting) >= MAX_IN_FLIGHT:
            yield waiting.pop(0).wait()
    for message in waiting:
        yield message.wait()
