"""What operators share whose step multiplies by an inverse root on each side."""

from __future__ import annotations

import attrs
from torch import Tensor

from kfactk import CurvatureOperator, Decomposition, Tensors
from kfactk_stages.basis._sides import from_both_sides, is_column


@attrs.define(eq=False)
class RootOperator(CurvatureOperator):
    """A step of inverse roots; what F is, a subclass says by `multiply` and `condition`.

    Args:
        decomposition: For L and R "root", the inverse root, and "eigenvalues"; `solve` reads roots.
        matrices: L and R; `multiply` reads them.
    """

    decomposition: Decomposition
    matrices: Tensors

    def solve(self, v: Tensor) -> Tensor:
        """Return v between the inverse roots of both sides."""
        left, right = (self.decomposition[name]["root"].to(v.dtype) for name in ("L", "R"))
        return from_both_sides(left, v, right)

    def spread(self) -> Tensor:
        """Return the largest eigenvalue of `R kron L` over the smallest, `[...]`."""
        ratios = []
        for parts in self.decomposition.values():
            values = parts["eigenvalues"]
            values = values.squeeze(-1) if is_column(parts["root"]) else values
            ratios.append(values.amax(-1) / values.amin(-1))
        return ratios[0] * ratios[1]
