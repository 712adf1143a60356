"""Placements: which rank does what."""

from __future__ import annotations

from typing import Any, Protocol

from kfactk.assignment import Assignment, Workload


class Placement(Protocol):
    """Which rank does what. A placement only answers; the framework moves tensors accordingly.

    Laws: every matrix and every gradient has a rank. The answer depends on the arguments alone, so
    that every rank gets the same.
    """

    process_group: Any
    """The ranks that share a model, a `torch.distributed` group; `None` for all."""
    wire_dtype: str | None
    """Precision of what travels, such as "bfloat16"; `None` for that of the tensors themselves."""

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Divide the work of a model among `ranks` ranks."""
