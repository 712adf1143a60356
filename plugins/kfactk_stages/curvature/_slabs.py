"""The input factor of a convolution of any stride, unfolded in all dimensions but one.

Along the dimension that is left the input lies outermost, one array for each phase of the stride, so that what a tap sees there is a slab
of consecutive rows: a view. A block of the moment, for a pair of taps, is the product of two slabs. By symmetry half of the pairs are
enough; of two pairs that are a stride apart one is the other, but for rows at the ends. Nothing is added that no patch holds, so that
there is nothing to take off again where inputs are small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

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

    @classmethod
    def of(cls, window: Window, sizes: Sequence[int]) -> Slabs:
        """Along the dimension of most taps."""
        return cls(window, tuple(sizes), max(range(len(sizes)), key=lambda dim: window.kernel[dim]))

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions of the output, dimension by dimension."""
        return self.window.positions(self.sizes)

    @property
    def others(self) -> tuple[int, ...]:
        """The dimensions that are unfolded."""
        return tuple(dim for dim in range(len(self.sizes)) if dim != self.dim)

    @property
    def phases(self) -> dict[int, int]:
        """Number of rows of each phase of the stride that a tap is in."""
        return {phase: row + self.positions[self.dim] for phase, row in sorted(map(self.place, range(self.window.kernel[self.dim])))}

    @property
    def widths(self) -> tuple[int, int]:
        """Columns for each channel, and positions for each row and example."""
        taps, positions = self.window.kernel, self.positions
        return math.prod(taps[dim] for dim in self.others), math.prod(positions[dim] for dim in self.others)

    @property
    def numbers(self) -> int:
        """Numbers that are copied for each channel of an example."""
        return sum(self.phases.values()) * math.prod(self.widths)

    @property
    def products(self) -> int:
        """Multiplications for each pair of channels of an example."""
        columns, positions = self.widths
        pairs = [self.earlier(*pair) is None for pair in self.pairs]
        return sum(pairs) * self.positions[self.dim] * positions * columns**2

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of taps, each once."""
        return list(itertools.combinations_with_replacement(range(self.window.kernel[self.dim]), 2))

    def place(self, tap: int) -> tuple[int, int]:
        """Phase of a tap, and the first row that it sees there."""
        row, phase = divmod(tap * self.window.dilation[self.dim], self.window.stride[self.dim])
        return phase, row

    def earlier(self, one: int, other: int) -> tuple[int, int, int] | None:
        """The nearest pair that sees the same rows but for some at the ends, and how many those are; `None` where they are too many."""
        stride, dilation, reach = (each[self.dim] for each in (self.window.stride, self.window.dilation, self.window.reach))
        steps = stride // math.gcd(stride, dilation)
        rows, size, pads = steps * dilation // stride, self.sizes[self.dim], self.window.padding[self.dim]
        wide = size >= 2 * reach and max(pads) <= reach and self.positions[self.dim] >= 4 * rows
        return (one - steps, other - steps, rows) if wide and one >= steps else None


def cost(window: Window, sizes: Sequence[int], channels: int, examples: int) -> float:
    """What `slab_moment` costs a group, in multiplications of the kind that `_autocorrelation.cost` counts."""
    slabs = Slabs.of(*window.zero_padded(sizes))
    return examples * channels * (1.3 * slabs.products * channels + MOVED * slabs.numbers) + len(slabs.pairs) * CALLED / 4


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
    slabs = Slabs.of(*window.zero_padded(inputs.shape[2:]))
    columns, taps = channels * slabs.widths[0], slabs.window.kernel
    found = {pair: inputs.new_zeros(groups, columns, columns, dtype=dtype) for pair in slabs.pairs}
    step = max(1, chunk_bytes // max(1, groups * channels * slabs.numbers * dtype.itemsize))
    arrays: dict[int, Tensor] = {}
    for start in range(0, len(inputs), step):
        piece = window.unpadded(inputs[start : start + step])[0].unflatten(1, (groups, channels))
        arrays = _filled(piece, slabs, dtype, arrays if start + step <= len(inputs) else {})
        _add(found, slabs, arrays)
    moment = inputs.new_empty(groups, channels, *taps, channels, *taps, dtype=dtype)
    for one, other in slabs.pairs:
        if earlier := slabs.earlier(one, other):
            found[one, other] += found[earlier[:2]]
        sides = [moment.narrow(2 + slabs.dim, i, 1).narrow(3 + len(taps) + slabs.dim, j, 1) for i, j in ((one, other), (other, one))]
        block = found[one, other]
        for side, value in zip(sides, (block, block.transpose(-1, -2)) if one != other else (block,), strict=False):
            side.copy_(value.reshape(side.shape))
    return moment.view(groups, channels * math.prod(taps), -1)


def _filled(inputs: Tensor, slabs: Slabs, dtype: torch.dtype, arrays: dict[int, Tensor]) -> dict[int, Tensor]:
    """By phase `[groups, channels, *other taps, rows, N, *other positions]`; what `arrays` holds beyond the input stays zero."""
    n, groups, channels = inputs.shape[:3]
    window, positions, others = slabs.window, slabs.positions, slabs.others
    shape = [window.kernel[dim] for dim in others], [positions[dim] for dim in others]
    arrays = arrays or {
        phase: inputs.new_zeros(groups, channels, *shape[0], rows, n, *shape[1], dtype=dtype) for phase, rows in slabs.phases.items()
    }
    order = (1, 2, 3 + slabs.dim, 0, *(3 + dim for dim in others))
    for phase, array in arrays.items():
        rows = _within(slabs.phases[phase], phase - window.padding[slabs.dim][0], window.stride[slabs.dim], slabs.sizes[slabs.dim])
        for taps in itertools.product(*map(range, shape[0])):
            target, source = [rows[0], slice(None)], [slice(None)] * inputs.ndim
            source[3 + slabs.dim] = rows[1]
            for dim, tap in zip(others, taps, strict=True):
                first = tap * window.dilation[dim] - window.padding[dim][0]
                to, source[3 + dim] = _within(positions[dim], first, window.stride[dim], slabs.sizes[dim])
                target.append(to)
            array[(slice(None), slice(None), *taps, *target)].copy_(inputs[tuple(source)].permute(order))
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
        phase, row = slabs.place(tap)
        return flat[phase][:, :, row + start : row + stop].flatten(2)

    for (one, other), total in found.items():
        earlier = slabs.earlier(one, other)
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
