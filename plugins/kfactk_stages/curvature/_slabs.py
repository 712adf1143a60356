"""The input factor of a convolution of any stride, unfolded in all dimensions but one.

Along the dimension that is left the input lies outermost, one array for each phase of the stride, so that what a tap sees there is a slab
of consecutive rows: a view. A block of the moment, for a pair of taps, is the product of two slabs. By symmetry half of the pairs are
enough; of two pairs that are a stride apart one is the other, but for rows at the ends. Nothing is added that no patch holds, so that
there is nothing to take off again where inputs are small.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property, lru_cache
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk_stages.curvature._unfold import CALLED, MOVED, Window


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
        return tuple((tap * dilation % stride, tap * dilation // stride) for tap in range(self.window.kernel[self.dim]))

    @cached_property
    def phases(self) -> dict[int, int]:
        """Number of rows of each phase of the stride that a tap is in."""
        return {phase: row + self.positions[self.dim] for phase, row in sorted(self.places)}

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Columns for each channel, and positions for each row and example."""
        taps, positions = self.window.kernel, self.positions
        return math.prod(taps[dim] for dim in self.others), math.prod(positions[dim] for dim in self.others)

    @cached_property
    def pairs(self) -> dict[tuple[int, int], tuple[int, int, int] | None]:
        """Pairs of taps, each once: the nearest that sees the same rows but for some at the ends, and how many those are.

        `None` where there is no such pair, or where too many rows differ.
        """
        stride, dilation, reach = (each[self.dim] for each in (self.window.stride, self.window.dilation, self.window.reach))
        steps = stride // math.gcd(stride, dilation)
        rows, most = steps * dilation // stride, max(self.window.padding[self.dim])
        wide = self.sizes[self.dim] >= 2 * reach and most <= reach and self.positions[self.dim] >= 4 * rows
        pairs = itertools.combinations_with_replacement(range(self.window.kernel[self.dim]), 2)
        return {(one, other): (one - steps, other - steps, rows) if wide and one >= steps else None for one, other in pairs}

    @cached_property
    def copies(self) -> dict[int, list[tuple[tuple[Any, ...], tuple[slice, ...]]]]:
        """By phase, what of its array `[groups, channels, *other taps, rows, N, *other positions]` is what of the input."""
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
                    to, source[3 + dim] = _within(positions[dim], first, window.stride[dim], self.sizes[dim])
                    target.append(to)
                found[phase].append(((slice(None), slice(None), *taps, *target), tuple(source)))
        return found

    @property
    def numbers(self) -> int:
        """Numbers that are copied for each channel of an example."""
        return sum(self.phases.values()) * math.prod(self.widths)

    @property
    def products(self) -> int:
        """Multiplications for each pair of channels of an example."""
        columns, positions = self.widths
        return list(self.pairs.values()).count(None) * self.positions[self.dim] * positions * columns**2


@lru_cache(maxsize=256)
def slabs_of(window: Window, sizes: tuple[int, ...]) -> Slabs:
    """The slabs along the dimension of most taps, of an input of spatial shape `sizes` once it is padded if it is not with zeros."""
    window, sizes = window.zero_padded(sizes)
    return Slabs(window, sizes, max(range(len(sizes)), key=lambda dim: window.kernel[dim]))


def cost(window: Window, sizes: tuple[int, ...], channels: int, examples: int) -> float:
    """What `slab_moment` costs, in multiplications of the kind that `_autocorrelation.cost` counts."""
    slabs = slabs_of(window, sizes)
    return examples * channels * (1.3 * slabs.products * channels + MOVED * slabs.numbers) + (20 + 4 * len(slabs.pairs)) * CALLED


def slab_moment(inputs: Tensor, window: Window, groups: int, dtype: torch.dtype, chunk_bytes: int) -> Tensor:
    """`sum_n sum_t p p^T` over the patches of a convolution, `[groups, columns, columns]`, without bias.

    Args:
        inputs: `[N, groups * channels, *S]`.
        window: Where the patches lie.
        groups: Groups of the convolution.
        dtype: The precision wanted.
        chunk_bytes: Bound on what is unfolded at a time, in bytes; one example is always unfolded whole.
    """
    channels = inputs.shape[1] // groups
    slabs = slabs_of(window, tuple(inputs.shape[2:]))
    columns, taps = channels * slabs.widths[0], slabs.window.kernel
    found = {pair: inputs.new_zeros(groups, columns, columns, dtype=dtype) for pair in slabs.pairs}
    step = max(1, chunk_bytes // max(1, groups * channels * slabs.numbers * dtype.itemsize))
    arrays: dict[int, Tensor] = {}
    for start in range(0, len(inputs), step):
        piece = window.unpadded(inputs[start : start + step])[0]
        piece = piece.reshape(len(piece), groups, channels, *piece.shape[2:])
        arrays = _filled(piece, slabs, dtype, arrays if start + step <= len(inputs) else {})
        _add(found, slabs, arrays)
    moment = inputs.new_empty(groups, channels, *taps, channels, *taps, dtype=dtype)
    for (one, other), earlier in slabs.pairs.items():
        if earlier:
            found[one, other] += found[earlier[:2]]
        block = found[one, other]
        for i, j, value in ((one, other, block), (other, one, block.transpose(-1, -2)))[: 1 + (one != other)]:
            side = moment.select(2 + slabs.dim, i).select(2 + len(taps) + slabs.dim, j)
            side.copy_(value.reshape(side.shape))
    return moment.view(groups, channels * math.prod(taps), -1)


def _filled(inputs: Tensor, slabs: Slabs, dtype: torch.dtype, arrays: dict[int, Tensor]) -> dict[int, Tensor]:
    """By phase `[groups, channels, *other taps, rows, N, *other positions]`; what `arrays` holds beyond the input stays zero."""
    n, groups, channels = inputs.shape[:3]
    others = slabs.others
    shape = [slabs.window.kernel[dim] for dim in others], [slabs.positions[dim] for dim in others]
    arrays = arrays or {
        phase: inputs.new_zeros(groups, channels, *shape[0], rows, n, *shape[1], dtype=dtype) for phase, rows in slabs.phases.items()
    }
    order = (1, 2, 3 + slabs.dim, 0, *(3 + dim for dim in others))
    for phase, pieces in slabs.copies.items():
        for target, source in pieces:
            arrays[phase][target].copy_(inputs[source].permute(order))
    return arrays


def _within(count: int, first: int, step: int, size: int) -> tuple[slice, slice]:
    """Which of the indices `first + step * r`, r below `count`, are on an input of that size: as r, and as they are."""
    low = max(0, -(first // step))
    high = max(low, min(count, (size - 1 - first) // step + 1))
    start = first + step * low
    return slice(low, high), slice(start, start + step * (high - low), step) if high > low else slice(0, 0)


def _add(found: dict[tuple[int, int], Tensor], slabs: Slabs, arrays: dict[int, Tensor]) -> None:
    """Add products of slabs: of all that two taps see, or of what two taps see more and less than an earlier pair."""
    flat = {phase: array.flatten(1, 1 + len(slabs.others)).flatten(3) for phase, array in arrays.items()}  # [groups, columns, rows, ...]
    positions = slabs.positions[slabs.dim]

    def slab(tap: int, start: int, stop: int) -> Tensor:
        phase, row = slabs.places[tap]
        return flat[phase][:, :, row + start : row + stop].flatten(2)

    for (one, other), total in found.items():
        earlier = slabs.pairs[one, other]
        if earlier is None:
            _add_product(total, slab(one, 0, positions), slab(other, 0, positions), 1)
        else:
            before, beside, rows = earlier
            _add_product(total, slab(one, positions - rows, positions), slab(other, positions - rows, positions), 1)
            _add_product(total, slab(before, 0, rows), slab(beside, 0, rows), -1)


def _add_product(total: Tensor, left: Tensor, right: Tensor, sign: int) -> None:
    """`total += sign * left right^T`, in place; of one group by a plain product, which is divided among threads along the rows too."""
    if len(total) > 1:
        total.baddbmm_(left, right.transpose(-1, -2), alpha=sign)
    else:
        total[0].addmm_(left[0], right[0].T, alpha=sign)
