"""The input factor of a convolution of stride 1 without unfolding its input.

Let `p_t` be the patch at position t. Over *all* positions at which a patch touches the input, `sum_t p_t p_t^T` holds for taps i and j
nothing but the correlation of the input with itself at offset j - i: a convolution's weight gradient with its own input as the output's
gradient, of (2k - 1) offsets a dimension where k^2 pairs of taps would be. A layer sees fewer positions than all; the patches at the
others, a thin frame in which most taps are off the input, are unfolded and taken off again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kfactk_stages.curvature._unfold import CALLED, MOVED, Window


def applies(window: Window) -> bool:
    """Whether the moment can be had this way: stride 1, more than one tap, and zeros beyond the input that no patch exceeds."""
    exceeded = window.mode == "constant" and any(max(pads) > most for pads, most in zip(window.padding, window.reach, strict=True))
    return all(step == 1 for step in window.stride) and math.prod(window.kernel) > 1 and not exceeded


def wide(window: Window, sizes: Sequence[int]) -> bool:
    """Whether every tap sees most of an input of these sizes: what is taken off again is then small beside what is left, and so is its
    rounding."""
    return all(size >= 2 * most for size, most in zip(sizes, window.reach, strict=True))


def offsets(window: Window) -> int:
    """Number of offsets between taps."""
    return math.prod(2 * taps - 1 for taps in window.kernel)


def cost(window: Window, sizes: tuple[int, ...], channels: int, examples: int) -> float:
    """What `patch_moment` costs, in multiplications: oneDNN has blocks of 16 channels, and small work still has its calls."""
    padded = -(-channels // 16) * 16
    total = offsets(window) * math.prod(sizes) * padded**2
    calls = 10
    for dim, (k, dilation, most) in enumerate(zip(window.kernel, window.dilation, window.reach, strict=True)):
        for cut in (most - pad for pad in window.padding[dim]):
            if cut > 0:
                numbers = cut * math.prod(sizes) // sizes[dim]
                columns = channels * -(-cut // dilation) * math.prod(window.kernel) // k
                total += numbers * columns * (columns + MOVED)
                calls += 20
    return examples * total + calls * CALLED


def patch_moment(inputs: Tensor, window: Window, groups: int) -> Tensor:
    """`sum_n sum_t p p^T` over the patches of a convolution, `[groups, columns, columns]`, without bias.

    Args:
        inputs: `[N, groups * channels, *S]`, in the precision wanted.
        window: Where the patches lie; `applies(window)` must hold.
        groups: Groups of the convolution.

    References:
        Grosse & Martens 2016, arXiv:1602.01407, where A is made of the activations' autocovariances.
    """
    inputs, window = window.unpadded(inputs)
    channels, taps = inputs.shape[1] // groups, window.kernel
    moment = _toeplitz(_autocorrelation(inputs, window, groups), channels, groups, taps)
    for tap_slices, patches in _frame(inputs, window):
        kept = [part.stop - part.start for part in tap_slices]
        rows = patches.reshape(len(patches), groups, channels, *patches.shape[2:]).movedim(1, 0)  # [groups, N, channels, ...]
        dims = len(taps)
        rows = rows.permute(0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)).reshape(groups, -1, channels * math.prod(kept))
        gram = gram_of(rows).view(groups, channels, *kept, channels, *kept)
        moment[(slice(None), slice(None), *tap_slices, slice(None), *tap_slices)] -= gram
    columns = channels * math.prod(taps)
    return moment.view(groups, columns, columns)


def patch_sum(inputs: Tensor, window: Window, groups: int) -> Tensor:
    """`sum_n sum_t p`, `[groups, columns]`."""
    patches = window.patches(inputs.sum(0, keepdim=True))
    dims = len(window.kernel)
    return patches.sum(tuple(range(2, 2 + dims))).reshape(groups, -1)


def _autocorrelation(inputs: Tensor, window: Window, groups: int) -> Tensor:
    """`sum_{n,q} x_c(q) x_c'(q + offset)`, `[groups * channels, channels, *(2 k - 1)]`, offsets in steps of the dilation."""
    dims, channels = len(window.kernel), inputs.shape[1] // groups
    offsets = [2 * taps - 1 for taps in window.kernel]
    weight = inputs.new_empty(()).expand(inputs.shape[1], channels, *offsets)
    ones, zeros = [1] * dims, [0] * dims
    mask = [False, True, False]
    found = torch.ops.aten.convolution_backward(
        inputs, inputs, weight, None, ones, list(window.reach), list(window.dilation), False, zeros, groups, mask
    )
    result: Tensor = found[1]
    return result


def gram_of(rows: Tensor) -> Tensor:
    """`rows^T rows`, `[groups, n, n]`; of one group by a plain product, which is divided among threads along the rows too."""
    if len(rows) > 1:
        return rows.transpose(-1, -2) @ rows
    return (rows[0].T @ rows[0])[None]


def _toeplitz(correlation: Tensor, channels: int, groups: int, taps: tuple[int, ...]) -> Tensor:
    """`M[c, i, c', j] = correlation[c, c', j - i]` for taps i and j, `[groups, channels, *taps, channels, *taps]`."""
    correlation = correlation.view(groups, channels, *correlation.shape[1:])
    moment = correlation.new_empty(groups, channels, *taps, channels, *taps)
    for i in itertools.product(*map(range, taps)):
        window = tuple(slice(k - 1 - first, 2 * k - 1 - first) for k, first in zip(taps, i, strict=True))
        block: tuple[slice | int, ...] = (slice(None), slice(None), *i)
        moment[block] = correlation[(slice(None), slice(None), slice(None), *window)]
    return moment


def _frame(inputs: Tensor, window: Window) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """The patches that touch the input and that the layer does not see, in pieces `[N, C, *positions, *taps]`, without the taps that
    are off the input all over a piece; and which taps are left.

    A piece is a strip along one dimension, before or after what is seen there: of positions that are seen in the dimensions before, and
    of all in those that follow.
    """
    for dim, (k, dilation, most) in enumerate(zip(window.kernel, window.dilation, window.reach, strict=True)):
        size, (before, after) = inputs.shape[2 + dim], window.padding[dim]
        pads = [*window.padding[:dim], (0, 0), *((reach, reach) for reach in window.reach[dim + 1 :])]
        every = tuple(slice(0, taps) for taps in window.kernel)
        if cut := most - before:  # the last of these positions has the tap i on the input from i = first on
            taps = (*every[:dim], slice(k - -(-cut // dilation), k), *every[dim + 1 :])
            pads[dim] = most, max(0, cut - size)
            yield taps, _patches(inputs.narrow(2 + dim, 0, min(cut, size)), window, pads, taps)
        if cut := most - after:
            taps = (*every[:dim], slice(0, -(-cut // dilation)), *every[dim + 1 :])
            pads[dim] = max(0, cut - size), most
            yield taps, _patches(inputs.narrow(2 + dim, max(0, size - cut), min(cut, size)), window, pads, taps)


def _patches(inputs: Tensor, window: Window, pads: Sequence[tuple[int, int]], taps: tuple[slice, ...]) -> Tensor:
    """All patches of a padded input, of some of their taps."""
    flat = tuple(pad for each in reversed(pads) for pad in each)
    every = (slice(None),) * (2 + len(pads))
    return Window(window.kernel, window.stride, window.dilation, flat, "constant").patches(inputs)[(*every, *taps)]
