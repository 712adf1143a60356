"""Placement that holds the least: each layer belongs to one rank."""

from __future__ import annotations

import attrs

from kfactk import Assignment, Workload, grid, hookimpl
from kfactk_stages.placement._options import Travelling


@attrs.frozen
class MemOpt(Travelling):
    """Give each layer to one rank, which keeps its factors, decomposes them, preconditions its gradient, and sends that to all.

    Curvature is held once in all, whatever the number of ranks. Preconditioned gradients travel in every step; a basis that measures
    moments on samples (EKFAC) visits every rank when its scale is refreshed, one layer at a time.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for what travels; `None` for its own precision.

    Example:
        >>> from kfactk import Work
        >>> works = tuple(Work(name, {"A": (3, 3), "G": (2, 2)}, (2, 3)) for name in ("fc1", "fc2"))
        >>> [share.gradient_workers for share in MemOpt().assign(Workload(works), ranks=2).shares.values()]
        [(0,), (1,)]

    References:
        Pauloski et al. 2021, "KAISA", arXiv:2107.01739, MEM-OPT; Osawa et al. 2019, arXiv:1811.12019.
    """

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """As many rows as ranks."""
        return grid(workload, ranks, 1, "mem_opt", "each layer belongs to one rank")


@hookimpl
def kfactk_placements() -> dict[str, type[MemOpt]]:
    """The placement `mem_opt`."""
    return {"mem_opt": MemOpt}
