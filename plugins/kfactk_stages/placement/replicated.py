"""Replicated placement: every rank does all the work, on sums over all ranks."""

from __future__ import annotations

import attrs

from kfactk import Assignment, Workload, grid, hookimpl
from kfactk_stages.placement._options import Travelling


@attrs.frozen
class Replicated(Travelling):
    """Let every rank decompose everything, and precondition everything, on statistics summed over ranks.

    Nothing but sums is ever sent; each rank holds all factors and decompositions, so that any rank alone can be saved, asked, and go on.
    For small models, and where a step's messages cost more than the work that they would save.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for what travels; `None` for its own precision.

    Example:
        >>> from kfactk import Work
        >>> Replicated().assign(Workload((Work("fc", {"A": (3, 3)}, (2, 3)),)), ranks=2).shares["fc"]
        Share(decomposers={'A': (0, 1)}, holders=(0, 1))
    """

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Everything to everybody."""
        return grid(workload, ranks, ranks, "replicated", "every rank does all", everyone=True)


@hookimpl
def kfactk_placements() -> dict[str, type[Replicated]]:
    """The placement `replicated`."""
    return {"replicated": Replicated}
