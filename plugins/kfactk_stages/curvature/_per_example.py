"""The weight gradient of every single example of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfactk_stages.curvature._unfold import Window


def unfolds(kernel: Sequence[int], channels: int, outputs: int, positions: int) -> bool:
    """Return whether unfolding is cheaper than a convolution.

    It is for one tap, for few positions, and for few channels, with which convolutions are slow.
    One channel in and out, as in depthwise convolutions, has a fast kernel.
    """
    return (
        math.prod(kernel) == 1 or positions < outputs or (channels < 8 and channels * outputs > 1)
    )


def weight_gradients(inputs: Tensor, gradient: Tensor, window: Window) -> Tensor:
    """Return `sum_t g_t p_t^T` of each example.

    Where unfolding is not cheaper, it is the weight gradient of one convolution whose groups are
    the groups of all examples.

    Args:
        inputs: `[N, groups * channels, *S]`.
        gradient: Of the output, `[N, groups, outputs, *out]`.
        window: Where the patches p lie.

    Returns:
        `[N, groups, outputs, channels * taps]`.
    """
    n, groups, outputs, *out = gradient.shape
    dims, channels = len(window.kernel), inputs.shape[1] // groups
    columns = channels * math.prod(window.kernel)
    if not n:
        return gradient.new_zeros(n, groups, outputs, columns)
    if unfolds(window.kernel, channels, outputs, math.prod(out)):
        taps_first = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        patches = window.patches(inputs).permute(taps_first).reshape(n, groups, columns, -1)
        return gradient.flatten(3) @ patches.transpose(-1, -2)
    inputs, window = window.evenly_padded(inputs)
    weight = inputs.new_empty(()).expand(n * groups * outputs, channels, *window.kernel)
    padding, zeros, mask = (
        [before for before, _ in window.padding],
        [0] * dims,
        [False, True, False],
    )
    found = torch.ops.aten.convolution_backward(
        gradient.reshape(1, n * groups * outputs, *out),
        inputs.reshape(1, n * groups * channels, *inputs.shape[2:]),
        weight,
        None,
        list(window.stride),
        padding,
        list(window.dilation),
        False,
        zeros,
        n * groups,
        mask,
    )
    result: Tensor = found[1]
    return result.view(n, groups, outputs, columns)
