"""The correlation of an input with itself at small offsets, by Fourier transforms.

A convolution in space is, at each frequency, one small product over the examples: `X(f) X(f)^H`,
channels by channels. A kernel needs few offsets, so the inverse transform is a product with a few
of its rows. With as many frequencies as input length plus kernel reach, the circular correlation
equals the plain one.

Sizes are small, so the transform itself is a product with a matrix of cosines and sines, dimension
by dimension. Each product reads what the previous one wrote; nothing is copied, padded or
reordered. All numbers are real: for `X = R + i J` the product is

    R R^T + J J^T + i (J R^T - R J^T)

The real part is symmetric and the imaginary part antisymmetric. This takes three real products in
place of the four of a complex one.
"""

from __future__ import annotations

import functools
import itertools
import math

import attrs
import torch
from torch import Tensor

from kfactk_stages.curvature._unfold import CALLED, Window

WORKSPACE = 2**26
"""Bytes of transforms at several frequencies, or of their products, at a time."""
CACHED = 2**20
"""The same on a CPU, where they must stay in the cache until they are read."""
WRITTEN = 50
"""Multiplications of a large product that take as long as a small one per number it writes."""


@attrs.frozen
class Transform:
    """The transform of an input, and its inverse at the offsets between taps.

    Args:
        there: For each dimension, the last first: the transforms of the real and of the imaginary
            part, `[2 L, size]` each, with real and imaginary rows alternating. The last dimension
            has no imaginary part and half of the frequencies.
        even: From symmetric products to the offsets from zero on, in lexicographic order,
            `[offsets, frequencies]`.
        odd: The same from antisymmetric products.
    """

    there: tuple[tuple[Tensor, Tensor], ...]
    even: Tensor
    odd: Tensor


def autocorrelation(inputs: Tensor, window: Window, groups: int) -> Tensor:
    """Return `sum_{n,q} x_c(q) x_c'(q + offset)`, offsets in steps of the dilation.

    Args:
        inputs: `[N, groups * channels, *S]`, float32 or float64.
        window: Its kernel and dilation give the offsets.
        groups: Channels are correlated within their group.

    Returns:
        `[*(2 k - 1), groups, channels, channels]`.
    """
    n, channels, sizes = len(inputs), inputs.shape[1] // groups, tuple(inputs.shape[2:])
    transform = transform_of(sizes, window.kernel, window.dilation, inputs.dtype, inputs.device)
    first, count = transform.there[0][0], transform.even.shape[1]
    rows = first @ inputs.reshape(-1, sizes[-1]).T
    rows = rows.view(len(first) // 2, 2, -1)  # [frequencies, 2, N C *S] without the last dimension
    within = CACHED if inputs.device.type == "cpu" else WORKSPACE
    per = count // len(rows)  # frequencies of the other dimensions for each of the last
    step = max(1, within // max(1, 2 * per * inputs.shape[1] * n * inputs.itemsize))
    most = max(1, WORKSPACE // max(1, groups * channels**2 * inputs.itemsize))
    symmetric = inputs.new_zeros(len(transform.even), groups * channels**2)
    antisymmetric = torch.zeros_like(symmetric)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        pieces = _transformed(some, transform, sizes).view(per * len(some), 2 * n, groups, channels)
        for begin in range(0, len(pieces), most):
            some = pieces[begin : begin + most].transpose(1, 2)
            some = some.flatten(0, 1)  # [frequencies * groups, 2 N, channels]
            at = slice(start * per + begin, start * per + begin + len(some) // groups)
            symmetric.addmm_(transform.even[:, at], (some.mT @ some).view(-1, symmetric.shape[1]))
            antisymmetric.addmm_(
                transform.odd[:, at], (some[:, :n].mT @ some[:, n:]).view(-1, symmetric.shape[1])
            )
    turned = antisymmetric.view(-1, groups, channels, channels)
    half = symmetric.view_as(turned) + (turned.mT - turned)
    whole = torch.cat([half[1:].flip(0).mT, half])
    return whole.view(*(2 * taps - 1 for taps in window.kernel), groups, channels, channels)


def _transformed(rows: Tensor, transform: Transform, sizes: tuple[int, ...]) -> Tensor:
    """Transform the other dimensions: `[frequencies, 2, N C *S]` to `[frequencies, 2, N C]`."""
    for (first, second), size in zip(transform.there[1:], reversed(sizes[:-1]), strict=True):
        real, imaginary = (rows[:, part].view(len(rows), -1, size).mT for part in (0, 1))
        found = torch.bmm(first.expand(len(rows), -1, -1), real)
        rows = found.baddbmm_(second.expand(len(rows), -1, -1), imaginary).view(
            len(rows) * len(first) // 2, 2, -1
        )
    return rows


@functools.lru_cache(maxsize=128)
def transform_of(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Transform:
    """Return the transform for inputs of spatial shape `sizes`.

    Frequencies of the last dimension lie between those of the plain transform. So only the last of
    an odd number is its own mirror image, and the real transform leaves out half of all.
    """
    lengths = [
        size + step * (taps - 1) for size, taps, step in zip(sizes, kernel, dilation, strict=True)
    ]
    turns = [
        torch.arange(length, dtype=torch.float64, device="cpu") * (2 * math.pi / length)
        for length in lengths
    ]
    turns[-1] = (turns[-1] + math.pi / lengths[-1])[: -(-lengths[-1] // 2)]
    there = []
    for angles, size in zip(reversed(turns), reversed(sizes), strict=True):
        at = torch.outer(angles, torch.arange(size, dtype=torch.float64, device="cpu"))
        there.append(
            (
                torch.stack([at.cos(), -at.sin()], 1).flatten(0, 1),
                torch.stack([at.sin(), at.cos()], 1).flatten(0, 1),
            )
        )
    offsets = list(itertools.product(*(range(-(taps - 1), taps) for taps in kernel)))[
        math.prod(2 * taps - 1 for taps in kernel) // 2 :
    ]
    turned = torch.zeros(len(offsets), 1, dtype=torch.float64, device="cpu")
    for dim in reversed(range(len(sizes))):
        steps = torch.tensor(
            [offset[dim] * dilation[dim] for offset in offsets], dtype=torch.float64, device="cpu"
        )
        turned = (turned.unsqueeze(-1) + torch.outer(steps, turns[dim]).unsqueeze(1)).flatten(1)
    weights = torch.full(
        (len(turns[-1]),), 2.0 / math.prod(lengths), dtype=torch.float64, device="cpu"
    )
    if lengths[-1] % 2:
        weights[-1] /= 2
    weights = weights.repeat_interleave(turned.shape[1] // len(weights))
    placed = [(one.to(device, dtype), other.to(device, dtype)) for one, other in there]
    return Transform(
        tuple(placed),
        (turned.cos() * weights).to(device, dtype),
        (turned.sin() * weights).to(device, dtype),
    )


def _frequencies(window: Window, sizes: tuple[int, ...]) -> tuple[int, ...]:
    lengths = [size + reach for size, reach in zip(sizes, window.reach, strict=True)]
    return (*lengths[:-1], -(-lengths[-1] // 2))


def cost(window: Window, sizes: tuple[int, ...], channels: int, examples: int) -> float:
    """Return the cost of `autocorrelation`, in multiplications of a large product."""
    transforms, products, numbers = work(window, sizes, channels, examples)
    small = (
        1.6 * transforms
        + WRITTEN * numbers
        + 2 * math.prod(_frequencies(window, sizes)) * (WRITTEN * channels**2 + 5000)
    )
    return small + products + 40 * CALLED


def work(
    window: Window, sizes: tuple[int, ...], channels: int, examples: int
) -> tuple[float, float, float]:
    """Count operations of `autocorrelation`.

    Returns:
        Multiplications of the transforms, multiplications of the products at all frequencies and of
        the inverse transform, and numbers that transforms write.
    """
    frequencies, left, transforms, numbers = 1, math.prod(sizes), 0, 0
    for dim in reversed(range(len(sizes))):
        parts = 1 if dim == len(sizes) - 1 else 2
        frequencies *= _frequencies(window, sizes)[dim]
        transforms += 2 * parts * frequencies * left
        left //= sizes[dim]
        numbers += 2 * frequencies * left
    offsets = math.prod(2 * taps - 1 for taps in window.kernel) // 2 + 1
    products = frequencies * channels**2 * (3.0 * examples + 2 * offsets)
    return (
        float(examples * channels * transforms),
        products,
        float(examples * channels * (numbers + 2 * frequencies)),
    )


def workspace(
    window: Window, sizes: tuple[int, ...], channels: int, groups: int, dtype: torch.dtype
) -> int:
    """Return the least number of bytes that products take at a time."""
    square = dtype.itemsize * groups * channels**2
    return 2 * max(square, min(square * math.prod(_frequencies(window, sizes)), WORKSPACE))
