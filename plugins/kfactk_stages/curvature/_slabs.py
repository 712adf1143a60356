"""The input factor of a convolution of any stride, unfolded in all dimensions but one.

The remaining dimension is outermost, with one array for each phase of the stride. What a tap sees
there is a slab of consecutive rows, a view. The block of the moment for a pair of taps is the
product of two slabs.

By symmetry half of the pairs are enough. Two pairs that are a stride apart are equal, except for
rows at the ends. Products contain nothing that no patch sees, so nothing is subtracted, also where
inputs are small.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property, lru_cache
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk_stages.curvature._unfold import CALLED, Window, moment_of

SPLIT = 128
"""Columns from which a symmetric product has three parts, which skip most of one triangle."""


@attrs.frozen
class Slabs:
    """Which rows the taps along one dimension see.

    Args:
        window: Where the patches lie, zeros beyond the input.
        sizes: Spatial shape of the input.
        dim: The dimension along which the input is not unfolded.
    """

    window: Window
    sizes: tuple[int, ...]
    dim: int

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Positions of the output, dimension by dimension."""
        return self.window.positions(self.sizes)

    @cached_property
    def others(self) -> tuple[int, ...]:
        """The dimensions that are unfolded."""
        return tuple(dim for dim in range(len(self.sizes)) if dim != self.dim)

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Phase of each tap, and the first row that it sees there."""
        stride, dilation = self.window.stride[self.dim], self.window.dilation[self.dim]
        return tuple(
            (tap * dilation % stride, tap * dilation // stride)
            for tap in range(self.window.kernel[self.dim])
        )

    @cached_property
    def phases(self) -> dict[int, int]:
        """Number of rows of each phase of the stride that a tap is in."""
        return {phase: row + self.positions[self.dim] for phase, row in sorted(self.places)}

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Columns for each channel, and positions for each row and example."""
        taps, positions = self.window.kernel, self.positions
        return math.prod(taps[dim] for dim in self.others), math.prod(
            positions[dim] for dim in self.others
        )

    @cached_property
    def pairs(self) -> dict[tuple[int, int], tuple[int, int, int] | None]:
        """Pairs of taps, each once, with the nearest pair that sees almost the same rows.

        Next to that pair is the number of rows, at the ends, that differ. The value is `None` where
        there is no such pair, or where too many rows differ.
        """
        stride, dilation, reach = (
            each[self.dim] for each in (self.window.stride, self.window.dilation, self.window.reach)
        )
        steps = stride // math.gcd(stride, dilation)
        rows, most = steps * dilation // stride, max(self.window.padding[self.dim])
        wide = (
            self.sizes[self.dim] >= 2 * reach
            and most <= reach
            and self.positions[self.dim] >= 4 * rows
        )
        pairs = itertools.combinations_with_replacement(range(self.window.kernel[self.dim]), 2)
        return {
            (one, other): (one - steps, other - steps, rows) if wide and one >= steps else None
            for one, other in pairs
        }

    @cached_property
    def summands(self) -> list[tuple[tuple[int, int], tuple[int, int], slice, int]]:
        """Products of slabs that sum to the blocks.

        Each has a pair of taps, the taps whose rows are multiplied, the positions at which both see
        the input, and a sign. The rows are all that two taps see, or the difference from an earlier
        pair.
        """
        last = self.positions[self.dim]
        found: list[tuple[tuple[int, int], tuple[int, int], slice, int]] = []
        for pair, earlier in self.pairs.items():
            if earlier is None:
                found.append((pair, pair, self._seen(pair, 0, last), 1))
            else:
                found.append((pair, pair, self._seen(pair, last - earlier[2], last), 1))
                found.append((pair, earlier[:2], self._seen(earlier[:2], 0, earlier[2]), -1))
        return [term for term in found if term[2].start < term[2].stop]

    def _seen(self, taps: tuple[int, int], low: int, high: int) -> slice:
        """Return the positions from `low` to `high` at which both taps see the input."""
        for phase, row in (self.places[tap] for tap in taps):
            first = phase - self.window.padding[self.dim][0]
            rows = _within(
                self.phases[phase], first, self.window.stride[self.dim], self.sizes[self.dim]
            )[0]
            low, high = max(low, rows.start - row), min(high, rows.stop - row)
        return slice(low, high)

    @cached_property
    def copies(self) -> dict[int, list[tuple[tuple[Any, ...], tuple[slice, ...]]]]:
        """For each phase, which part of its array is which part of the input.

        The array is `[groups, *other taps, channels, rows, N, *other positions]`.
        """
        window, positions = self.window, self.positions
        found: dict[int, list[tuple[tuple[Any, ...], tuple[slice, ...]]]] = {}
        for phase, count in self.phases.items():
            first = phase - window.padding[self.dim][0]
            rows = _within(count, first, window.stride[self.dim], self.sizes[self.dim])
            found[phase] = []
            for taps in itertools.product(*(range(window.kernel[dim]) for dim in self.others)):
                target, source = [rows[0], slice(None)], [slice(None)] * (3 + len(self.sizes))
                source[3 + self.dim] = rows[1]
                for dim, tap in zip(self.others, taps, strict=True):
                    first = tap * window.dilation[dim] - window.padding[dim][0]
                    to, source[3 + dim] = _within(
                        positions[dim], first, window.stride[dim], self.sizes[dim]
                    )
                    target.append(to)
                found[phase].append(((slice(None), *taps, slice(None), *target), tuple(source)))
        return found

    @property
    def numbers(self) -> int:
        """Numbers that are copied for each channel of an example."""
        return sum(self.phases.values()) * math.prod(self.widths)

    @property
    def products(self) -> int:
        """Multiplications for each pair of channels of an example."""
        columns, positions = self.widths
        rows = sum(seen.stop - seen.start for _, _, seen, _ in self.summands)
        return int(rows) * positions * columns**2


@lru_cache(maxsize=256)
def slabs_of(window: Window, sizes: tuple[int, ...]) -> Slabs:
    """Return the slabs along the dimension of most taps.

    Padding other than zeros counts as part of the input, whose spatial shape is `sizes` without it.
    """
    window, sizes = window.zero_padded(sizes)
    return Slabs(window, sizes, max(range(len(sizes)), key=lambda dim: window.kernel[dim]))


def cost(window: Window, sizes: tuple[int, ...], channels: int, examples: int) -> float:
    """Return the cost of `slab_moment`, in multiplications as `_autocorrelation.cost` counts."""
    slabs = slabs_of(window, sizes)
    columns = channels * slabs.widths[0]
    thin = 1 + 45 / (columns + 1.5)  # products of few columns are bound by what they read
    products = examples * channels**2 * slabs.products * thin
    return (
        products
        + 250.0 * (columns * window.kernel[slabs.dim]) ** 2
        + 10 * max(1, len(slabs.summands)) * CALLED
    )


def slab_moment(
    inputs: Tensor, window: Window, groups: int, dtype: torch.dtype, chunk_bytes: int
) -> Tensor:
    """Return `sum_n sum_t p p^T` over patches, `[groups, columns, columns]`, without bias.

    `slab_blocks` describes the arguments.
    """
    return moment_of(slab_blocks(inputs, window, groups, dtype, chunk_bytes))


def slab_blocks(
    inputs: Tensor, window: Window, groups: int, dtype: torch.dtype, chunk_bytes: int
) -> Tensor:
    """Return the moment tap by tap, `[*taps, *taps, groups, channels, channels]`.

    Args:
        inputs: `[N, groups * channels, *S]`.
        window: Where the patches lie.
        groups: Groups of the convolution.
        dtype: The precision wanted.
        chunk_bytes: Bound on what is unfolded at a time, in bytes. One example is always unfolded
            whole.
    """
    channels, taps = inputs.shape[1] // groups, window.kernel
    slabs = slabs_of(window, tuple(inputs.shape[2:]))
    columns, k = channels * slabs.widths[0], taps[slabs.dim]
    made = [
        pair
        for pair, earlier in slabs.pairs.items()
        if earlier is None or any(pair == each[0] for each in slabs.summands)
    ]
    found = {pair: inputs.new_zeros(groups, columns, columns, dtype=dtype) for pair in made}
    step = max(1, chunk_bytes // max(1, groups * channels * slabs.numbers * dtype.itemsize))
    arrays: dict[int, Tensor] = {}
    for start in range(0, len(inputs), step):
        piece = window.unpadded(inputs[start : start + step])[0]
        piece = piece.reshape(len(piece), groups, channels, *piece.shape[2:])
        arrays = _filled(piece, slabs, dtype, arrays if start + step <= len(inputs) else {})
        _add(found, slabs, arrays)
    for pair, earlier in slabs.pairs.items():
        if pair in found and pair[0] == pair[1] and columns >= SPLIT:
            found[pair] = found[pair].triu() + found[pair].triu(1).mT
        if earlier:
            found[pair] = (
                found[pair].add_(found[earlier[:2]]) if pair in found else found[earlier[:2]]
            )
    pairs = itertools.product(range(k), range(k))
    blocks = torch.stack([found[i, j] if i <= j else found[j, i].mT for i, j in pairs])
    others = *(taps[dim] for dim in slabs.others), channels
    blocks = blocks.view(k, k, groups, *others, *others)
    first, second = (list(range(start, start + len(taps) - 1)) for start in (3, 3 + len(taps)))
    first.insert(slabs.dim, 0)
    second.insert(slabs.dim, 1)
    return blocks.permute(*first, *second, 2, 2 + len(taps), 2 + 2 * len(taps))


def _filled(
    inputs: Tensor, slabs: Slabs, dtype: torch.dtype, arrays: dict[int, Tensor]
) -> dict[int, Tensor]:
    """Return for each phase `[groups, *other taps, channels, rows, N, *other positions]`.

    Arrays that are given are filled again; what they hold beyond the input stays zero.
    """
    n, groups, channels = inputs.shape[:3]
    others = slabs.others
    shape = [slabs.window.kernel[dim] for dim in others], [slabs.positions[dim] for dim in others]
    arrays = arrays or {
        phase: inputs.new_zeros(groups, *shape[0], channels, rows, n, *shape[1], dtype=dtype)
        for phase, rows in slabs.phases.items()
    }
    order = (1, 2, 3 + slabs.dim, 0, *(3 + dim for dim in others))
    for phase, pieces in slabs.copies.items():
        for target, source in pieces:
            arrays[phase][target].copy_(inputs[source].permute(order))
    return arrays


def _within(count: int, first: int, step: int, size: int) -> tuple[slice, slice]:
    """Return which indices `first + step * r`, r below `count`, are on an input of that size.

    Returns:
        The values of r, and the indices.
    """
    low = max(0, -(first // step))
    high = max(low, min(count, (size - 1 - first) // step + 1))
    start = first + step * low
    return slice(low, high), slice(
        start, start + step * (high - low), step
    ) if high > low else slice(0, 0)


def _add(found: dict[tuple[int, int], Tensor], slabs: Slabs, arrays: dict[int, Tensor]) -> None:
    """Add products of slabs, in place.

    One group takes a plain product, which threads divide along the rows too.
    """
    flat = {
        phase: array.flatten(1, 1 + len(slabs.others)).flatten(3) for phase, array in arrays.items()
    }  # [groups, columns, rows, ...]
    for pair, taps, rows, sign in slabs.summands:
        places = (slabs.places[tap] for tap in taps)
        left, right = (
            flat[phase][:, :, row + rows.start : row + rows.stop].flatten(2)
            for phase, row in places
        )
        columns, symmetric = left.shape[1], taps[0] == taps[1]
        step = -(-columns // 3) if symmetric and columns >= SPLIT else columns
        for first in range(0, columns, step):
            total, beside = found[pair][:, first : first + step], first if symmetric else 0
            if len(left) > 1:
                total[:, :, beside:].baddbmm_(
                    left[:, first : first + step], right[:, beside:].mT, alpha=sign
                )
            else:
                total[0, :, beside:].addmm_(
                    left[0, first : first + step], right[0, beside:].T, alpha=sign
                )
