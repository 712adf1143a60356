"""Placement that sends the least in ordinary steps: decompositions are divided among ranks, and held by all of them."""

from __future__ import annotations

import attrs

from kfactk import Assignment, Workload, grid, hookimpl
from kfactk_stages.placement._options import Travelling


@attrs.frozen
class CommOpt(Travelling):
    """Divide the matrices among ranks to be kept and decomposed, longest first, A and G apart; let every rank precondition.

    A factor's sums go to the one rank that keeps it, decompositions go from there to all, and in steps without a refresh nothing is
    sent. Each rank holds all decompositions, and its part of the factors.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for what travels; `None` for its own precision.

    Example:
        >>> from kfactk import Work
        >>> CommOpt().assign(Workload((Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3)),)), ranks=2).shares["fc"]
        Share(decomposers={'A': (0,), 'G': (1,)}, holders=(0, 1))

    References:
        Pauloski et al. 2021, "KAISA", arXiv:2107.01739, COMM-OPT; Pauloski et al. 2020, arXiv:2007.00784.
    """

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """One row of all ranks."""
        return grid(
            workload,
            ranks,
            ranks,
            "comm_opt",
            "decompositions divided among ranks, gradients preconditioned by all",
        )


@hookimpl
def kfactk_placements() -> dict[str, type[CommOpt]]:
    """The placement `comm_opt`."""
    return {"comm_opt": CommOpt}
