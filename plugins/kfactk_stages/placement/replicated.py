"""Replicated placement: every rank does all the work, on sums over all ranks."""

from __future__ import annotations

import attrs

from kfactk import Assignment, Workload, grid, hookimpl
from kfactk_stages.placement._options import PlacementOptions


@attrs.frozen
class Replicated(PlacementOptions):
    """Let every rank decompose and precondition everything, on statistics summed over ranks.

    Ranks send nothing but sums. Each rank holds all factors and decompositions, so any single rank
    can save the state or continue alone. Use it for small models, and where messages cost more than
    the work that they would save.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It
            cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for smaller messages; `None` for each tensor's own
            precision.

    Example:
        >>> from kfactk import Work
        >>> workload = Workload((Work("fc", {"A": (3, 3)}, (2, 3)),))
        >>> Replicated().assign(workload, ranks=2).shares["fc"]
        Share(inverse_workers={'A': (0, 1)}, gradient_workers=(0, 1))
    """

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Assign all work to all ranks."""
        return grid(workload, ranks, ranks, "replicated", "every rank does all", everyone=True)


@hookimpl
def kfactk_placements() -> dict[str, type[Replicated]]:
    """Register the placement `replicated`."""
    return {"replicated": Replicated}
