"""The input factor of a convolution of stride 1 without unfolding its input.

Let `p_t` be the patch at position t. Over *all* positions at which a patch touches the input, the
entry of `sum_t p_t p_t^T` for taps i and j is the correlation of the input with itself at offset
j - i. There are 2k - 1 offsets a dimension, but k^2 pairs of taps.

A layer sees fewer positions than all. The others are a thin frame, where most taps lie beyond the
input. At one side of the frame, the rest of a patch lies in a strip of the input. These are the
patches of a convolution with one dimension less; their moment is subtracted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk_stages.curvature import _slabs, _spectral
from kfactk_stages.curvature._slabs import slab_blocks
from kfactk_stages.curvature._unfold import CALLED, MOVED, Window, moment_of

STRIP_BYTES = 2**22
"""Bytes of a strip beside the border that are copied at a time."""


def applies(window: Window) -> bool:
    """Return whether this way applies to a window.

    It needs stride 1, more than one tap, and no more zeros beyond the input than patches reach.
    """
    exceeded = window.mode == "constant" and any(
        max(pads) > most for pads, most in zip(window.padding, window.reach, strict=True)
    )
    return (
        all(step == 1 for step in window.stride) and math.prod(window.kernel) > 1 and not exceeded
    )


def wide(window: Window, sizes: Sequence[int]) -> bool:
    """Return whether every tap sees most of an input of these sizes.

    What is subtracted is then small beside the rest, and so is its rounding.
    """
    return all(size >= 2 * most for size, most in zip(sizes, window.reach, strict=True))


def cost(window: Window, sizes: tuple[int, ...], channels: int, examples: int) -> float:
    """Return the cost of `patch_moment`, in multiplications of a large product."""
    total = (
        _spectral.cost(window, sizes, channels, examples)
        + 60.0 * (channels * math.prod(window.kernel)) ** 2
    )
    for dim in range(len(sizes)):
        one = (*sizes[:dim], 1, *sizes[dim + 1 :])
        for cut, sides in _cuts(window, dim).items():
            kept, strips = channels * -(-cut // window.dilation[dim]), examples * cut * len(sides)
            total += (
                _slabs.cost(_along(window, dim), one, kept, strips)
                + MOVED * strips * kept * math.prod(one)
                + 20 * CALLED
            )
    return total


def patch_moment(inputs: Tensor, window: Window, groups: int) -> Tensor:
    """Return `sum_n sum_t p p^T` over patches, `[groups, columns, columns]`, without bias.

    Args:
        inputs: `[N, groups * channels, *S]`, in the precision wanted.
        window: Where the patches lie; `applies(window)` must hold.
        groups: Groups of the convolution.

    References:
        Grosse & Martens 2016, arXiv:1602.01407: A from autocovariances of the activations.
    """
    inputs, window = window.unpadded(inputs)
    channels, taps = inputs.shape[1] // groups, window.kernel
    blocks = _toeplitz(_spectral.autocorrelation(inputs, window, groups), taps)
    for dim, (k, dilation) in enumerate(zip(taps, window.dilation, strict=True)):
        for cut, sides in _cuts(window, dim).items():
            kept = -(-cut // dilation)
            strips = torch.cat(
                [_strip(inputs, dim, cut, dilation, groups, after=after) for after in sides], 1
            )
            found = slab_blocks(
                strips, _along(window, dim), groups * len(sides), inputs.dtype, STRIP_BYTES
            )
            found = found.select(len(taps) + dim, 0).select(dim, 0)
            found = found.view(
                *found.shape[:-3], len(sides), groups, kept, channels, kept, channels
            )
            for side, after in zip(found.unbind(-6), sides, strict=True):
                seen = [slice(None)] * len(taps)
                seen[dim] = slice(0, kept) if after else slice(k - kept, k)
                blocks[(*seen, *seen)] -= side.movedim((-4, -2), (dim, len(taps) + dim))
    return moment_of(blocks)


def patch_sum(inputs: Tensor, window: Window, groups: int) -> Tensor:
    """Return `sum_n sum_t p`, `[groups, columns]`."""
    patches = window.patches(inputs.sum(0, keepdim=True))
    dims = len(window.kernel)
    return patches.sum(tuple(range(2, 2 + dims))).reshape(groups, -1)


def gram_of(rows: Tensor) -> Tensor:
    """Return `rows^T rows`, `[groups, n, n]`.

    One group takes a plain product, which threads divide along the rows too.
    """
    if len(rows) > 1:
        return rows.transpose(-1, -2) @ rows
    return (rows[0].T @ rows[0])[None]


def pixel_gram(images: Tensor) -> Tensor:
    """Return `sum_n sum_t x x^T` over pixels, `[groups, channels, channels]`.

    Products image by image copy nothing. Pixels of all images are joined only where the product is
    not small beside its image.

    Args:
        images: `[N, groups, channels, *T]`.
    """
    channels, flat = images.shape[2], images.flatten(3)
    if flat.shape[3] >= 4 * channels:
        return (flat @ flat.mT).sum(0)
    return gram_of(flat.permute(1, 2, 0, 3).flatten(2).mT)


def _toeplitz(correlation: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Return `M[i, j] = correlation[j - i]` for taps i, j: `[*taps, *taps, groups, c, c]`."""
    blocks = correlation.new_empty(*taps, *taps, *correlation.shape[len(taps) :])
    for i in itertools.product(*map(range, taps)):
        blocks[i] = correlation[
            tuple(slice(k - 1 - first, 2 * k - 1 - first) for k, first in zip(taps, i, strict=True))
        ]
    return blocks


def _cuts(window: Window, dim: int) -> dict[int, list[bool]]:
    """Return how many positions a layer does not see along a dimension, and at which sides.

    Returns:
        Number of positions to a list with False for those before what it sees, True for after.
    """
    found: dict[int, list[bool]] = {}
    for after, pad in enumerate(window.padding[dim]):
        if window.reach[dim] > pad:
            found.setdefault(window.reach[dim] - pad, []).append(bool(after))
    return found


def _along(window: Window, dim: int) -> Window:
    """Return the window over a strip.

    It covers the positions that are seen in the dimensions before `dim`, and all in those after.
    """
    pads = [*window.padding[:dim], (0, 0), *((reach, reach) for reach in window.reach[dim + 1 :])]
    single = (*window.kernel[:dim], 1, *window.kernel[dim + 1 :])
    return Window(
        single,
        window.stride,
        window.dilation,
        tuple(pad for each in reversed(pads) for pad in each),
        "constant",
    )


def _strip(
    inputs: Tensor, dim: int, cut: int, dilation: int, groups: int, *, after: bool
) -> Tensor:
    """Return what taps see at the first, or the last, `cut` positions along a dimension.

    Taps that see nothing there are left out.

    Returns:
        `[N * cut, groups * taps * channels, *S]`, with the size 1 in the dimension.
    """
    size, reach = inputs.shape[2 + dim], (-(-cut // dilation) - 1) * dilation
    pads = [max(0, cut - size), reach] if after else [reach, max(0, cut - size)]
    strip = inputs.narrow(2 + dim, max(0, size - cut) if after else 0, min(cut, size))
    if any(pads):
        strip = F.pad(strip, (*[0, 0] * (inputs.ndim - 3 - dim), *pads))
    strip = strip.reshape(len(inputs), groups, -1, *strip.shape[2:]).unfold(3 + dim, reach + 1, 1)[
        ..., ::dilation
    ]
    return strip.movedim((3 + dim, -1), (1, 3)).flatten(2, 4).flatten(0, 1).unsqueeze(2 + dim)
