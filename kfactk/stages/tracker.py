"""Trackers: what records what happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Tracker(Protocol):
    """Records what happened, on rank 0 only.

    The framework batches nothing for it, and goes on, with a warning, when it raises. Only an
    `OptionError` of `start` is raised by `bind`. No method should wait for a store that does not
    answer. A tracker that keeps what it could not send in a file has the option `tracking_uri` and
    a method `import_records(path)`, which sends it and returns what was done: `python -m kfactk
    import-records` calls it.
    """

    @property
    def every(self) -> int:
        """Record one step in so many."""

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Begin a run; called once, at bind, with the recipe as text-safe nested mappings."""

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Take the metrics of one step; 0-dimensional tensors may still be on the device."""

    def flush(self) -> None:
        """Write what is held back, for readers before the end; the framework calls only `close`."""

    def close(self) -> None:
        """Flush and release resources; may be called twice."""
