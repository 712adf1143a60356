"""How far results are from what they are compared with.

`docs/measuring.py` notes what `deviation` returns and which limit it is found to be below.
"""

from __future__ import annotations

from torch import Tensor


def deviation(found: Tensor, expected: Tensor) -> float:
    """Return `|found - expected| / |expected|`, norms over all entries."""
    return float((found - expected).norm() / expected.norm())
