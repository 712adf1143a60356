"""Choose the cheapest way to the input factor of a convolution."""

from __future__ import annotations

import math
from functools import lru_cache

from kfactk_stages.curvature import _autocorrelation, _slabs
from kfactk_stages.curvature._unfold import CALLED, MOVED, Window


@lru_cache(maxsize=1024)
def cheapest(window: Window, sizes: tuple[int, ...], channels: int, examples: int) -> str:
    """Return the cheapest way: "pixels", "correlation", "slabs" or "patches".

    Args:
        window: Where the patches lie.
        sizes: Spatial shape of the input.
        channels: Channels of a group.
        examples: Examples, times groups.
    """
    costs = costs_of(window, sizes, channels, examples)
    return min(costs, key=costs.__getitem__)


def costs_of(
    window: Window, sizes: tuple[int, ...], channels: int, examples: int
) -> dict[str, float]:
    """Return the cost of each way that applies, in multiplications of a large product."""
    columns = channels * math.prod(window.kernel)
    rows = examples * math.prod(window.positions(sizes))
    if columns == channels and not any(window.pads):
        return {"pixels": rows * columns * (columns + 40.0) + 4 * CALLED}
    costs = {
        "slabs": _slabs.cost(window, sizes, channels, examples),
        "patches": rows * columns * (columns + MOVED) + 40.0 * columns**2 + 8 * CALLED,
    }
    if _autocorrelation.applies(window) and _autocorrelation.wide(window, sizes):
        costs["correlation"] = _autocorrelation.cost(window, sizes, channels, examples)
    return costs
