"""Placement between memory and messages: each layer belongs to a group of ranks."""

from __future__ import annotations

import attrs

from kfactk import Assignment, Workload, grid, hookimpl
from kfactk.options import number
from kfactk_stages.placement._options import PlacementOptions


@attrs.frozen
class Hybrid(PlacementOptions):
    """Give each layer to a group of neighbouring ranks, its gradient workers.

    Each gradient worker sends the preconditioned gradient to its part of the other ranks. A group
    has `fraction` of the ranks, rounded down to a divisor of their number. A fraction of 1 is
    `comm_opt`; a fraction of less than 2 ranks is `mem_opt`. Groups of the size of a node keep the
    large messages, those of decompositions, within nodes.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It
            cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for smaller messages; `None` for each tensor's own
            precision.
        fraction: Gradient-worker fraction, in (0, 1].

    Example:
        >>> from kfactk import Work
        >>> works = tuple(Work(name, {"A": (3, 3), "G": (2, 2)}, (2, 3)) for name in ("fc1", "fc2"))
        >>> shares = Hybrid(fraction=0.5).assign(Workload(works), ranks=4).shares
        >>> [share.gradient_workers for share in shares.values()]
        [(0, 1), (2, 3)]

    References:
        Pauloski et al. 2021, "KAISA: An adaptive second-order optimizer framework for deep neural
        networks", arXiv:2107.01739, HYBRID-OPT.
    """

    fraction: float = attrs.field(
        default=0.5,
        validator=number(low=0, high=1, low_open=True, hint=", the part of the ranks in a group"),
    )

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Assign each layer to a group of `fraction * ranks` ranks."""
        wanted = max(1, int(self.fraction * ranks + 1e-9))
        width = max(divisor for divisor in range(1, wanted + 1) if ranks % divisor == 0)
        return grid(
            workload,
            ranks,
            width,
            "hybrid",
            f"each layer belongs to {width} of {ranks} ranks (fraction {self.fraction:g})",
        )


@hookimpl
def kfactk_placements() -> dict[str, type[Hybrid]]:
    """Register the placement `hybrid`."""
    return {"hybrid": Hybrid}
