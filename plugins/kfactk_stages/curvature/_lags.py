"""How taps of a kernel correlate where activations are stationary: by distance along each axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfactk.linalg import kron
from kfactk_stages.curvature._unfold import Window


def lag_sums(inputs: Tensor, window: Window, spacing: Sequence[int], groups: int) -> Tensor:
    """Return `sum_n sum_s <x_s, x_{s + k e}>` for each axis e of the image and k = 1, 2, ... taps.

    The sum is over pairs that lie within the image. Taps that are no whole number of pixels apart
    never see two pixels: their sum is zero.

    Args:
        inputs: `[N, groups * channels, *S]`.
        window: How many taps along each axis, and how far apart.
        spacing: How far apart pixels are along each axis.
        groups: Number of groups.

    Returns:
        `[(groups,) sum_i (taps_i - 1)]`, axis by axis.
    """
    images = inputs.view(len(inputs), groups, -1, *inputs.shape[2:])
    others = tuple(dim for dim in range(images.ndim) if dim != 1)
    sums = []
    for axis, (taps, dilation, pixel) in enumerate(
        zip(window.kernel, window.dilation, spacing, strict=True), start=3
    ):
        steps = range(dilation, taps * dilation, dilation)
        for step in steps:
            kept = 0 if step % pixel else max(images.shape[axis] - step // pixel, 0)
            sums.append(
                (
                    images.narrow(axis, 0, kept)
                    * images.narrow(axis, images.shape[axis] - kept, kept)
                ).sum(others)
            )
    found = torch.stack(sums, -1)
    return found.squeeze(0) if groups == 1 else found


def tap_correlation(lags: Tensor, mean_square: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return the Kronecker product over axes of `R[i, j] = r_{|i - j|} / r_0`, `[..., taps, taps]`.

    It is the identity where r_0 is 0.

    Args:
        lags: r_1, r_2, ... of each axis, `[..., sum_i (taps_i - 1)]`.
        mean_square: r_0, `[...]`.
        kernel: Taps along each axis.

    Example:
        >>> tap_correlation(torch.tensor([0.5]), torch.tensor(1.0), (2, 1))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    silent = (mean_square <= 0).unsqueeze(-1)
    relative = torch.where(silent, 0.0, lags / torch.where(silent, 1.0, mean_square.unsqueeze(-1)))
    found, start = lags.new_ones(*lags.shape[:-1], 1, 1), 0
    for taps in kernel:
        row = torch.cat(
            [torch.ones_like(relative[..., :1]), relative[..., start : start + taps - 1]], -1
        )
        index = torch.arange(taps, device=lags.device)
        found = kron(found, row[..., (index[:, None] - index).abs()])
        start += taps - 1
    return found
