"""Placement between memory and messages: each layer belongs to a group of ranks."""

from __future__ import annotations

import attrs

from kfactk import Assignment, OptionError, Workload, grid, hookimpl
from kfactk_stages.placement._options import Travelling


def _fraction(placement: Hybrid, attribute: attrs.Attribute[float], value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise OptionError(
            f"fraction is {value!r}; it is the part of the ranks that hold a layer, so it must be above 0 and at most 1."
        )


@attrs.frozen
class Hybrid(Travelling):
    """Give each layer to a group of neighbouring ranks that hold it; each of them sends preconditioned gradients to its part of the rest.

    The groups have `fraction` of the ranks, rounded down to a divisor of their number: 1 is `comm_opt`, and less than 2 ranks `mem_opt`.
    Groups of the size of a node keep decompositions, the large messages, within nodes.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for what travels; `None` for its own precision.
        fraction: Gradient-worker fraction, in (0, 1].

    Example:
        >>> from kfactk import Work
        >>> works = tuple(Work(name, {"A": (3, 3), "G": (2, 2)}, (2, 3)) for name in ("fc1", "fc2"))
        >>> [share.gradient_workers for share in Hybrid(fraction=0.5).assign(Workload(works), ranks=4).shares.values()]
        [(0, 1), (2, 3)]

    References:
        Pauloski et al. 2021, "KAISA", arXiv:2107.01739, HYBRID-OPT.
    """

    fraction: float = attrs.field(default=0.5, validator=_fraction)

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Rows of `fraction * ranks`."""
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
    """The placement `hybrid`."""
    return {"hybrid": Hybrid}
