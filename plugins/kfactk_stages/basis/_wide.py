"""Bases of sides that may be diagonals or blocks, and the operator in such a basis.

The directions of a side are a matrix U, `[..., n, n]`; blocks along its diagonal, as a tuple; or
`None` for the coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch
from torch import Tensor

from kfactk import Decomposition, Samples, SpectralOperator, Statistic, linalg, project_channels
from kfactk.samples import working_dtype
from kfactk.sides import SIDES, names_of, slices_of

Directions = Tensor | tuple[Tensor, ...] | None
"""The directions of a side."""


def directions_of(side: str, decomposition: Decomposition) -> Directions:
    """Return the directions of a side, such as "A", that was decomposed into eigenvectors."""
    names = names_of(side, decomposition)
    if "eigenvectors" not in decomposition[names[0]]:
        return None
    blocks = tuple(decomposition[name]["eigenvectors"] for name in names)
    return blocks[0] if names == [side] else blocks


def eigenvalues_of(side: str, decomposition: Decomposition) -> Tensor:
    """Return the eigenvalues of a side, `[..., n]`, block by block."""
    names = names_of(side, decomposition)
    values = [decomposition[name]["eigenvalues"] for name in names]
    return values[0] if len(values) == 1 else torch.cat(values, -1)


def null_of(side: str, decomposition: Decomposition) -> Iterator[tuple[slice, Tensor]]:
    """Yield the slice of each decomposed matrix of a side with its null directions.

    Coordinates have none: nothing was chosen there.
    """
    names = names_of(side, decomposition)
    if not names or "eigenvectors" not in decomposition[names[0]]:
        return
    values = [decomposition[name]["eigenvalues"] for name in names]
    for slots, each in zip(slices_of(v.shape[-1] for v in values), values, strict=True):
        yield slots, linalg.null_mask(each)


def pool_side(scale: Tensor, side: str, decomposition: Decomposition) -> Tensor:
    """Give null directions of a side their mean scale, block by block.

    Args:
        scale: `[..., d_out, d_in]`.
        side: "A" or "G", "R" or "L".
        decomposition: What was made of each matrix.
    """
    dim = -1 if SIDES[side] == "input" else -2
    for slots, null in null_of(side, decomposition):
        if null.device.type == "cpu" and not bool(null.any()):  # elsewhere the host would wait
            continue
        if null.shape[-1] == scale.shape[dim]:
            return linalg.pool_null(scale, null, dim)
        where = (..., slots) if dim == -1 else (..., slots, slice(None))
        scale = scale.clone()
        scale[where] = linalg.pool_null(scale[where], null, dim)
    return scale


def turned_columns(matrix: Tensor, right: Directions) -> Tensor:
    """Return `M U`, in the precision of M.

    Args:
        matrix: `[..., d_out, d_in]`.
        right: Directions of inputs.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> turned_columns(torch.tensor([[1.0, 2.0, 3.0]]), (swap, torch.ones(1, 1)))
        tensor([[2., 1., 3.]])
    """
    if right is None:
        return matrix
    if isinstance(right, Tensor):
        return matrix @ right.to(matrix.dtype)
    slices = slices_of(block.shape[-1] for block in right)
    parts = [matrix[..., s] @ u.to(matrix.dtype) for s, u in zip(slices, right, strict=True)]
    return torch.cat(parts, -1)


def turned_rows(matrix: Tensor, left: Directions) -> Tensor:
    """Return `U^T M`, in the precision of M, for directions of outputs."""
    return (
        turned_columns(matrix.mT, left).mT
        if isinstance(left, tuple)
        else (matrix if left is None else left.to(matrix.dtype).mT @ matrix)
    )


def each_direction(directions: Directions, f: Callable[[Tensor], Tensor]) -> Directions:
    """Return what a function makes of the directions, block by block."""
    if isinstance(directions, tuple):
        return tuple(f(each) for each in directions)
    return None if directions is None else f(directions)


def transposed(directions: Directions) -> Directions:
    """Return `U^T`."""
    return each_direction(directions, lambda u: u.mT)


@attrs.define(eq=False)
class SidesOperator(SpectralOperator):
    """`F = U diag(s) U^T` with `U^T V = U_G^T V U_A`, for sides of any form.

    Args:
        spectrum: s, `[..., d_out, d_in]`.
        damping: tau.
        left: U_G.
        right: U_A; or U_C, `[..., channels, channels]`, of fewer columns than there are.
        taps: U_K, `[..., taps, taps]`, beside U_C; `None` for the identity.
        power: p of `solve`, `(F + damping I)^-p`.
    """

    left: Directions
    right: Directions
    taps: Tensor | None = None
    weights: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.weights = self._weights()

    def solve(self, v: Tensor) -> Tensor:
        """Return `U [(U^T v) / (s + damping)^p]`."""
        return self.from_basis(self.to_basis(v) * self.weights)

    def to_basis(self, v: Tensor) -> Tensor:
        """Return `U_G^T v U_A`."""
        return turned(v, self.left, self.right, self.taps)

    def from_basis(self, coefficients: Tensor) -> Tensor:
        """Return `U_G c U_A^T`."""
        taps = None if self.taps is None else self.taps.mT
        return turned(coefficients, transposed(self.left), transposed(self.right), taps)


def turned(matrix: Tensor, left: Directions, right: Directions, taps: Tensor | None) -> Tensor:
    """Return `U_G^T M U_A`; with U_C in place of U_A, `U_G^T M blockdiag(U_C kron U_K, 1)`."""
    if isinstance(right, Tensor) and right.shape[-1] < matrix.shape[-1]:
        matrix = project_channels(matrix, None, right, taps)
    else:
        matrix = turned_columns(matrix, right)
    return turned_rows(matrix, left)


class Part(Samples):
    """Samples of some rows and columns of a layer's matrix.

    Args:
        whole: All samples.
        outputs: The rows.
        inputs: The columns.
    """

    def __init__(self, whole: Samples, outputs: slice, inputs: slice) -> None:
        lead = (whole.groups, whole.examples, whole.positions)
        sizes = (
            len(range(*s.indices(n))) for s, n in ((outputs, whole.d_out), (inputs, whole.d_in))
        )
        d_out, d_in = sizes
        super().__init__(
            torch.empty(*lead, d_in, dtype=working_dtype(whole.dtype), device="meta"),
            torch.empty(*lead, d_out, dtype=working_dtype(whole.dtype), device="meta"),
            num_terms=whole.num_terms,
            chunk_bytes=whole.chunk_bytes,
        )
        self.whole, self._slices = whole, (outputs, inputs)

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Return these columns of the inputs."""
        return self.whole.inputs(rows)[..., self._slices[1]]

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Return these columns of the gradients."""
        return self.whole.gradients(rows)[..., self._slices[0]]

    @property
    def device(self) -> torch.device:
        """Device of the samples."""
        return self.whole.device


def square_in_parts(
    samples: Samples, left: Directions, right: Directions, taps: Tensor | None
) -> Statistic:
    """Return `sum_n (U_G^T D_n U_A)^2`, `[..., d_out, d_in]`, block by block.

    Args:
        samples: The samples.
        left, right, taps: The directions, as for `SidesOperator`.
    """
    found = []
    for outputs, one in _blocks(left):
        line = []
        for inputs, other in _blocks(right):
            part = samples
            if outputs != slice(None) or inputs != slice(None):
                part = Part(samples, outputs, inputs)
            if other is not None and other.shape[-1] < part.d_in:
                line.append(part.projected_square_of_channels(one, other, taps).total)
            else:
                line.append(part.projected_square(one, other).total)
        found.append(line)
    if any(total is None for line in found for total in line):
        return Statistic(None, samples.num_terms)
    rows = [torch.cat([t for t in line if t is not None], -1) for line in found]
    return Statistic(torch.cat(rows, -2), samples.num_terms)


def _blocks(directions: Directions) -> Iterator[tuple[slice, Tensor | None]]:
    if isinstance(directions, tuple):
        yield from zip(slices_of(u.shape[-1] for u in directions), directions, strict=True)
    else:
        yield slice(None), directions
