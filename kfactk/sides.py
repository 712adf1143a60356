"""The two sides of a layer's curvature, and the matrices that stand for one that is wide.

A layer's matrix `[..., d_out, d_in]` has an input side of n = d_in and an output side of n = d_out.
A side is kept in one of three forms, which the names of its matrices tell:

    A, G            whole, `[..., n, n]`
    a, g            its diagonal, `[..., n]`
    A0, A1, ...     blocks along its diagonal, in order; for outputs G0, G1, ...

Second moments of a gradient have the names R (columns: the input side) and L (rows: the output
side), with r and l, R0 and L0 likewise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

KRONECKER = ("A", "G")
"""The sides of Kronecker factors, which are always square where they are whole."""
SIDES = {"A": "input", "G": "output", "R": "input", "L": "output"}
"""What each side is called."""
DIAGONALS = {"A": "a", "G": "g", "R": "r", "L": "l"}
"""The name of the diagonal of each side."""
AUTO = "auto"
"""The longest side that is kept whole follows from the sides of the layer."""
SHORT, LONG = 2048, 8192
"""Sides that are whole whatever the other side is, and the longest that is.

While a side of n is decomposed, the factor, its sums and means, old and new eigenvectors and the
solver's own arrays are up to 7 n^2 numbers: 1.9 GB at 8192.
"""
PAYS = 2**16
"""Largest n^2 over the other side of a longer one that is whole.

A decomposition takes the time of about 8.5 n^3 multiplications and additions of large products on a
core of a CPU (13 s were measured at 4096), and the products of forward and backward take 6 n m for
each row, with m the other side. So a decomposition costs as much as 1.4 n^2 / m rows: at this bound
as the 100 steps between two of them, of 1000 rows each.
"""
_WHOLE = {diagonal: side for side, diagonal in DIAGONALS.items()}
_BLOCK = re.compile(r"([AGRL])([0-9]+)")


def side_of(name: str) -> str:
    """Return the side that a matrix stands for; the name itself where it is another matrix.

    Example:
        >>> side_of("a"), side_of("G12"), side_of("C")
        ('A', 'G', 'C')
    """
    block = _BLOCK.fullmatch(name)
    return block[1] if block else _WHOLE.get(name, name)


def is_diagonal(name: str) -> bool:
    """Return whether a matrix is the diagonal of a side."""
    return name in _WHOLE


def names_of(side: str, names: Iterable[str]) -> list[str]:
    """Return which of `names` stand for a side, blocks in their order.

    Example:
        >>> names_of("A", {"A10", "A2", "G"}), names_of("A", ["a", "G"]), names_of("A", ["A", "K"])
        (['A2', 'A10'], ['a'], ['A'])
    """
    return sorted((name for name in names if side_of(name) == side), key=lambda n: (len(n), n))


def block_slices(n: int, most: int) -> dict[str, slice]:
    """Return the fewest blocks of at most `most` that divide n, as equal as can be.

    Returns:
        The slice of each block by its number.

    Example:
        >>> block_slices(7, 3)
        {'0': slice(0, 3, None), '1': slice(3, 5, None), '2': slice(5, 7, None)}
    """
    count = -(-n // most)
    sizes = [n // count + (number < n % count) for number in range(count)]
    return {str(number): each for number, each in enumerate(slices_of(sizes))}


def longest_whole(other: int, max_side: int | str | None) -> int | None:
    """Return the longest side that is kept whole; `None` for no limit.

    It follows from sizes alone, so that it is the same on all ranks, machines, and after a resume.

    Args:
        other: The other side of the layer.
        max_side: The limit, `None` for none, or "auto".

    Example:
        >>> [longest_whole(m, "auto") for m in (10, 64, 512, 768, 4096)]
        [2048, 2048, 5792, 7094, 8192]
        >>> longest_whole(64, 100), longest_whole(64, None)
        (100, None)
    """
    if max_side != AUTO:
        assert not isinstance(max_side, str)
        return max_side
    return min(LONG, max(SHORT, math.isqrt(PAYS * other)))


def slices_of(sizes: Iterable[int]) -> list[slice]:
    """Return consecutive slices of these sizes."""
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return found


def groups_of_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the leading dimensions of a square matrix or a diagonal; `None` for other tensors."""
    if is_diagonal(name):
        return shape[:-1]
    return shape[:-2] if len(shape) >= 2 and shape[-1] == shape[-2] else None


def mean_of(name: str, matrix: Tensor) -> Tensor:
    """Return `trace / dimension` of a square matrix, or of the one with this diagonal."""
    return (matrix if is_diagonal(name) else matrix.diagonal(dim1=-2, dim2=-1)).mean(-1)


def with_sides(means: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the mean diagonals of matrices, and of each side that they stand for together.

    Args:
        means: Mean diagonal of each matrix.
        sizes: Dimension of each.

    Example:
        >>> import torch
        >>> with_sides({"A0": torch.tensor(1.0), "A1": torch.tensor(4.0)}, {"A0": 2, "A1": 1})["A"]
        tensor(2.)
    """
    found = dict(means)
    for side in SIDES:
        names = names_of(side, means)
        if names and side not in means:
            weights = {name: sizes[name] / sum(sizes[n] for n in names) for name in names}
            parts = [means[name] * weight for name, weight in weights.items()]
            found[side] = sum(parts[1:], parts[0])
    return found
