"""Placement with the fewest messages: ranks divide the decompositions, and all of them hold all."""

from __future__ import annotations

import attrs

from kfactk import Assignment, Workload, grid, hookimpl
from kfactk_stages.placement._options import PlacementOptions


@attrs.frozen
class CommOpt(PlacementOptions):
    """Divide the matrices among ranks, longest first, A and G apart; let every rank precondition.

    The sums of a factor go to the one rank that keeps and decomposes it. From there, the
    decomposition goes to all ranks. Steps without a refresh send nothing. Each rank holds all
    decompositions, and its part of the factors.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It
            cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for smaller messages; `None` for each tensor's own
            precision.

    Example:
        >>> from kfactk import Work
        >>> workload = Workload((Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3)),))
        >>> CommOpt().assign(workload, ranks=2).shares["fc"]
        Share(inverse_workers={'A': (0,), 'G': (1,)}, gradient_workers=(0, 1))

    References:
        Pauloski et al. 2021, "KAISA: An adaptive second-order optimizer framework for deep neural
        networks", arXiv:2107.01739, COMM-OPT.
        Pauloski et al. 2020, "Convolutional neural network training with distributed K-FAC",
        arXiv:2007.00784.
    """

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Divide the matrices among all ranks."""
        return grid(
            workload,
            ranks,
            ranks,
            "comm_opt",
            "decompositions divided among ranks, gradients preconditioned by all",
        )


@hookimpl
def kfactk_placements() -> dict[str, type[CommOpt]]:
    """Register the placement `comm_opt`."""
    return {"comm_opt": CommOpt}
