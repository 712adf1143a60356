"""What operators share whose step multiplies by an inverse root on each side."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from kfactk import CurvatureOperator, Decomposition, Tensors
from kfactk.sides import names_of
from kfactk_stages.basis._sides import as_column, from_both_sides, is_whole


@attrs.define(eq=False)
class RootOperator(CurvatureOperator):
    """A step of inverse roots; what F is, a subclass says by `multiply` and `condition`.

    Args:
        decomposition: For L and R, or each of what stands for them, "root", the inverse root, and
            "eigenvalues"; `solve` reads roots.
        matrices: L and R, or what stands for them; `multiply` reads them.
    """

    decomposition: Decomposition
    matrices: Tensors

    def solve(self, v: Tensor) -> Tensor:
        """Return v between the inverse roots of both sides."""
        return from_both_sides(roots_of(self.decomposition), v)

    def own_matrices(self) -> dict[str, Tensor]:
        """Return L and R, or what stands for them, from among the matrices."""
        names = (*names_of("L", self.matrices), *names_of("R", self.matrices))
        return {name: self.matrices[name] for name in names}

    def spread(self) -> Tensor:
        """Return the largest eigenvalue of `R kron L` over the smallest, `[...]`."""
        ratios = []
        for side in ("L", "R"):
            names = names_of(side, self.decomposition)
            values = torch.cat([_eigenvalues(name, self.decomposition[name]) for name in names], -1)
            ratios.append(values.amax(-1) / values.amin(-1))
        return ratios[0] * ratios[1]


def roots_of(decomposition: Decomposition, side: str | None = None) -> dict[str, Tensor]:
    """Return the inverse roots in a decomposition, of one side or of both."""
    names = decomposition if side is None else names_of(side, decomposition)
    return {name: decomposition[name]["root"] for name in names}


def _eigenvalues(name: str, parts: Tensors) -> Tensor:
    """Return eigenvalues, `[..., n]`."""
    values = parts["eigenvalues"]
    return values if is_whole(name, parts["root"]) else as_column(name, values).squeeze(-1)
