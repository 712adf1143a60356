"""Placement with the least memory: each layer belongs to one rank."""

from __future__ import annotations

import attrs

from kfactk import Assignment, Workload, grid, hookimpl
from kfactk_stages.placement._options import PlacementOptions


@attrs.frozen
class MemOpt(PlacementOptions):
    """Give each layer to one rank.

    That rank keeps the layer's factors, decomposes them, preconditions its gradient, and sends the
    result to all. The curvature of a layer exists once, whatever the number of ranks. Every step
    sends preconditioned gradients. For a basis that measures moments on samples (EKFAC), the
    decomposition visits every rank when its scale is refreshed, one layer at a time.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It
            cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for smaller messages; `None` for each tensor's own
            precision.

    Example:
        >>> from kfactk import Work
        >>> works = tuple(Work(name, {"A": (3, 3), "G": (2, 2)}, (2, 3)) for name in ("fc1", "fc2"))
        >>> shares = MemOpt().assign(Workload(works), ranks=2).shares
        >>> [share.gradient_workers for share in shares.values()]
        [(0,), (1,)]

    References:
        Pauloski et al. 2021, "KAISA: An adaptive second-order optimizer framework for deep neural
        networks", arXiv:2107.01739, MEM-OPT.
        Osawa et al. 2019, "Large-scale distributed second-order optimization using
        Kronecker-factored approximate curvature", arXiv:1811.12019.
    """

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Assign each layer to one rank."""
        return grid(workload, ranks, 1, "mem_opt", "each layer belongs to one rank")


@hookimpl
def kfactk_placements() -> dict[str, type[MemOpt]]:
    """Register the placement `mem_opt`."""
    return {"mem_opt": MemOpt}
