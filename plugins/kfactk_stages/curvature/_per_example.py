"""The weight gradient of every single example of a convolution, without unfolding its input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfactk_stages.curvature._unfold import Window


def weight_gradients(inputs: Tensor, gradient: Tensor, window: Window) -> Tensor:
    """`sum_t g_t p_t^T` example by example: the weight gradient of one convolution that has the examples, and their groups, for groups.

    Args:
        inputs: `[N, groups * channels, *S]`.
        gradient: Of the output, `[N, groups, outputs, *out]`.
        window: Where the patches p lie.

    Returns:
        `[N, groups, outputs, channels * taps]`.
    """
    inputs, window = window.evenly_padded(inputs)
    n, groups, outputs, *out = gradient.shape
    dims, channels = len(window.kernel), inputs.shape[1] // groups
    columns = channels * math.prod(window.kernel)
    if not n:
        return gradient.new_zeros(n, groups, outputs, columns)
    if math.prod(window.kernel) == 1 and math.prod(window.stride) == 1 and not any(window.pads):
        pixels = inputs.reshape(n, groups, channels, -1)
        return gradient.flatten(3) @ pixels.transpose(-1, -2)
    weight = inputs.new_empty(()).expand(n * groups * outputs, channels, *window.kernel)
    padding, zeros, mask = [before for before, _ in window.padding], [0] * dims, [False, True, False]
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
