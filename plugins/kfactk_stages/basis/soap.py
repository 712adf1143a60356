"""The basis of SOAP: Adam in the eigenbasis of the gradients' second moments."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import (
    Basis,
    CurvatureOperator,
    Decomposition,
    FactorContext,
    Statistic,
    Tensors,
    hookimpl,
    linalg,
    project,
)
from kfactk.options import choice, number
from kfactk.sides import names_of
from kfactk_stages.basis._operators import operator_in
from kfactk_stages.basis._sides import as_column, check_column, is_whole
from kfactk_stages.basis._wide import (
    Directions,
    SidesOperator,
    directions_of,
    pool_side,
    turned,
)


@attrs.frozen
class Soap(Basis):
    """Adam's second moment of the gradient in Shampoo's eigenbasis, and the step that it makes.

        L = U_L S_L U_L^T,   R = U_R S_R U_R^T,   s = mean of (U_L^T V U_R)^2
        P V = U_L [(U_L^T V U_R) / (s + eps^(1/p))^p] U_R^T,    p = power

    With `power=0.5` this is SOAP, up to where eps stands: Adam divides by `sqrt(s) + eps`. The mean
    of s is weighted, as if Adam's were corrected for its bias. A recipe's `first_moment` is Adam's.

    At a refresh, directions follow the old ones by one step of orthogonal iteration, and each keeps
    its s. A side of which there is the diagonal alone keeps its coordinates. Where blocks stand for
    a side that is too wide, U_L is block-diagonal, and each block follows its own. The eigensolver
    chooses at will within the numerical null space of L or R: those directions share their mean of
    s.

    Args:
        power: p, in (0, 1]: 0.5 as in Adam, 1 for the inverse.
        decay: Decay of the running mean of s, in [0, 1].
        eps: What is added, in the units of `s^p`; `None` for the recipe's damping in place of
            `eps^(1/p)`. The damping has no other effect.
        refresh: "iterate": as above. "eigh": decompose anew, and carry the mean of s into the new
            basis, as the diagonal of the same operator there.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> basis = Soap(eps=0.0)
        >>> context = FactorContext(damping=0.0, mean_diagonal={})
        >>> sides = {"L": torch.eye(1), "R": torch.diag(torch.tensor([1.0, 4.0]))}
        >>> parts = {name: basis.decompose(name, m, context) for name, m in sides.items()}
        >>> operator = basis.operator(parts, {"square": torch.tensor([[4.0, 16.0]])}, 0.0, sides)
        >>> operator.solve(torch.tensor([[1.0, 1.0]]))
        tensor([[0.5000, 0.2500]])

    References:
        Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321,
        algorithm 3.
        George et al. 2018, arXiv:1806.03884, section 4.2, for the carried mean.
    """

    takes_stand_ins: ClassVar[bool] = True

    requires = frozenset({"L", "R"})
    laws = frozenset({"null-space-independent"})
    waives = frozenset({"damped-inverse"})
    moments_from = "gradient"
    forms = MappingProxyType(
        {"eigenvalues": "eigenvalues", "eigenvectors": "eigenvectors", "square": "diagonal"}
    )

    power: float = attrs.field(default=0.5, validator=number(0, 1, low_open=True))
    decay: float = attrs.field(default=0.95, validator=number(0, 1))
    eps: float | None = attrs.field(default=1e-8, validator=number(0, optional=True))
    refresh: str = attrs.field(default="iterate", validator=choice("iterate", "eigh"))

    @property
    def damped_at(self) -> str:
        """Where the recipe's damping takes the place of eps, it acts at once."""
        return "solve" if self.eps is None else "never"

    @property
    def moment_decay(self) -> float:
        """Decay of the running mean of s."""
        return self.decay

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return eigenvalues, eigenvectors in columns, and whether these follow the last ones.

        They are `[..., n]`, `[..., n, n]` and `[1]`. Of a diagonal there are eigenvalues only, of
        its shape.

        Raises:
            DecompositionError: The matrix holds NaN or inf, or cannot be decomposed.
        """
        if not is_whole(name, matrix):
            return {"eigenvalues": check_column(matrix)}
        last = context.previous
        follows = (
            self.refresh == "iterate"
            and last is not None
            and last["eigenvectors"].shape == matrix.shape
        )
        if follows and last is not None:
            found = linalg.followed(matrix, last["eigenvectors"], last["eigenvalues"])
        else:
            found = None
        values, vectors = linalg.eigh(matrix) if found is None else found
        flag = torch.full((1,), float(found is not None), dtype=matrix.dtype, device=matrix.device)
        return {"eigenvalues": values, "eigenvectors": vectors, "follows": flag}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return `U diag(s) U^T`, with the power of its step.

        Before any gradient was measured, s is the same everywhere, the mean square of gradients.
        """
        left, right = _vectors(decomposition)
        spectrum = moments["square"] if "square" in moments else _even(decomposition)
        added = damping if self.eps is None else self.eps ** (1 / self.power)
        if isinstance(left, tuple) or isinstance(right, tuple):
            return SidesOperator(spectrum, added, left, right, power=self.power)
        return operator_in(left, right, None, spectrum=spectrum, damping=added, power=self.power)

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        """Return `{"square": (U_L^T V U_R)^2}` of the gradient V as it is."""
        rotated = _rotated(gradient, *_vectors(decomposition))
        return self.coordinate_moments(decomposition, rotated, num_terms)

    def coordinates(self, decomposition: Decomposition, v: Tensor) -> Tensor | None:
        """Return U_L^T V U_R; `None` where both sides keep their coordinates."""
        left, right = _vectors(decomposition)
        return None if left is None and right is None else _rotated(v, left, right)

    def coordinate_moments(
        self, decomposition: Decomposition, coordinates: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        """Return `gradient_moments` of a gradient that is turned already."""
        return {"square": Statistic(_pooled(coordinates.square(), decomposition), 1.0)}

    def transport(
        self, moments: Tensors, old: Decomposition, new: Decomposition
    ) -> dict[str, Tensor]:
        """Return s as it is along directions that follow old ones, else carried into new ones."""
        if "square" not in moments:
            return {}
        left, right = (_overlap(old, new, side) for side in ("L", "R"))
        return {"square": _pooled(_rotated(moments["square"], left, right), new)}


def _rotated(matrix: Tensor, left: Directions, right: Directions) -> Tensor:
    """Return `U_L^T M U_R`."""
    if isinstance(left, tuple) or isinstance(right, tuple):
        return turned(matrix, left, right, None)
    return project(matrix, left, right)


def _overlap(old: Decomposition, new: Decomposition, side: str) -> Directions:
    """Return the squared cosines of old and new directions; `None` where all new ones follow.

    On the meta device that is not known.
    """
    names = names_of(side, new)
    if not any(_anew(new[name]) for name in names):
        return None
    found = tuple(
        (old[name]["eigenvectors"].mT @ new[name]["eigenvectors"]).square()
        if _anew(new[name])
        else torch.diag_embed(torch.ones_like(new[name]["eigenvalues"]))
        for name in names
    )
    return found if isinstance(directions_of(side, new), tuple) else found[0]


def _anew(parts: Tensors) -> bool:
    """Return whether directions do not follow old ones."""
    return "eigenvectors" in parts and (parts["follows"].is_meta or not bool(parts["follows"]))


def _vectors(decomposition: Decomposition) -> tuple[Directions, Directions]:
    return directions_of("L", decomposition), directions_of("R", decomposition)


def _even(decomposition: Decomposition) -> Tensor:
    """Return `tr L / (d_out d_in)` everywhere, `[..., d_out, d_in]`."""
    left, right = (_values(side, decomposition) for side in ("L", "R"))
    mean = left.mean(-1)[..., None, None] / right.shape[-1]
    return mean.expand(*left.shape, right.shape[-1]).contiguous()


def _values(side: str, decomposition: Decomposition) -> Tensor:
    """Return the eigenvalues of a side, `[..., n]`."""
    found = []
    for name in names_of(side, decomposition):
        parts = decomposition[name]
        values = parts["eigenvalues"]
        found.append(values if "eigenvectors" in parts else as_column(name, values).squeeze(-1))
    return torch.cat(found, -1)


def _pooled(square: Tensor, decomposition: Decomposition) -> Tensor:
    """Give directions among which the eigensolver chose at will their mean."""
    for side in ("L", "R"):
        square = pool_side(square, side, decomposition)
    return square


@hookimpl
def kfactk_bases() -> dict[str, type[Soap]]:
    """Provide `soap`."""
    return {"soap": Soap}
