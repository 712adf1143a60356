"""The correlation of an input with itself at small offsets, by Fourier transforms.

What is convolution in space is, at each frequency, one small product over the examples: `X(f) X(f)^H`, channels by channels. The offsets
a kernel asks for are few, so that the way back is a product with a few rows of the inverse transform. Padded by the kernel's reach the
circular correlation is the plain one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfactk_stages.curvature._unfold import CALLED, MOVED, Window

WORKSPACE = 2**26
"""Bytes that products at several frequencies may take at a time."""
CACHED = 2**22
"""Bytes of transforms that stay in the cache of a CPU until they are multiplied."""
LEAST = 16
"""Examples that are multiplied at a time at least: of fewer the products, not the examples, are what is read and written."""


def autocorrelation(inputs: Tensor, window: Window, groups: int) -> Tensor:
    """`sum_{n,q} x_c(q) x_c'(q + offset)`, `[groups * channels, channels, *(2 k - 1)]`, offsets in steps of the dilation.

    Args:
        inputs: `[N, groups * channels, *S]`, float32 or float64.
        window: Whose kernel and dilation give the offsets.
        groups: Channels are correlated within their group.
    """
    channels = inputs.shape[1] // groups
    sizes = tuple(fast_length(size + reach) for size, reach in zip(inputs.shape[2:], window.reach, strict=True))
    frequencies = _frequencies(sizes)
    dtype = torch.complex128 if inputs.dtype == torch.float64 else torch.complex64
    back = _inverse(sizes, window.kernel, window.dilation, dtype, inputs.device)
    found = inputs.new_zeros(len(back), groups * channels * channels)
    count, square = math.prod(frequencies), groups * channels * channels * dtype.itemsize
    if count * square <= WORKSPACE:  # all frequencies at a time, and examples piece by piece, so that their transforms stay in cache
        products = torch.zeros(count * groups, channels, channels, dtype=dtype, device=inputs.device)
        step = max(LEAST, CACHED // max(1, count * inputs.shape[1] * dtype.itemsize))
        for start in range(0, len(inputs), step):
            some = _transformed(inputs[start : start + step], sizes, groups)
            torch.baddbmm(products, some, some.mH, out=products)
        found += (back @ products.view(count, -1)).real
    elif len(inputs):
        spectrum = _transformed(inputs, sizes, groups).view(count, groups, channels, -1)
        step = max(1, WORKSPACE // max(1, square))
        for start in range(0, count, step):
            some = spectrum[start : start + step]
            found += (back[:, start : start + step] @ (some @ some.mH).flatten(1)).real
    half = found.view(len(back), groups, channels, channels)  # at no offset, and at those after it in lexicographic order
    whole = torch.cat([half[1:].flip(0).mT, half])
    return whole.permute(1, 2, 3, 0).reshape(groups * channels, channels, *(2 * taps - 1 for taps in window.kernel))


def _transformed(inputs: Tensor, sizes: tuple[int, ...], groups: int) -> Tensor:
    """The spectrum, `[frequencies * groups, channels, N]`."""
    dims, channels = len(sizes), inputs.shape[1] // groups
    spectrum: Tensor = torch.fft.rfftn(inputs, s=sizes, dim=tuple(range(2, 2 + dims)))
    found: Tensor = spectrum.reshape(len(inputs), groups, channels, -1).permute(3, 1, 2, 0).flatten(0, 1)
    return found.contiguous()


def cost(window: Window, sizes: tuple[int, ...], channels: int, examples: int) -> float:
    """What `autocorrelation` costs, in multiplications of a large product: transforms are bound by the copying of numbers."""
    there, back, numbers = work(window, sizes, channels, examples)
    return 1.3 * there + back + 3 * MOVED * numbers + 10 * CALLED


def work(window: Window, sizes: tuple[int, ...], channels: int, examples: int) -> tuple[float, float, float]:
    """Multiplications of the products at all frequencies, and of the way back; and numbers that the transforms give."""
    padded = tuple(fast_length(size + reach) for size, reach in zip(sizes, window.reach, strict=True))
    frequencies, offsets = math.prod(_frequencies(padded)), math.prod(2 * taps - 1 for taps in window.kernel) // 2 + 1
    products = 4.0 * frequencies * channels**2
    return examples * products, offsets * products, 2.0 * examples * channels * frequencies


def workspace(window: Window, sizes: tuple[int, ...], channels: int, groups: int, dtype: torch.dtype) -> int:
    """Bytes that products and transforms take at least, at a time, for inputs of a dtype."""
    padded = tuple(fast_length(size + reach) for size, reach in zip(sizes, window.reach, strict=True))
    numbers = math.prod(_frequencies(padded)) * channels * groups
    return 2 * dtype.itemsize * max(min(numbers * channels, WORKSPACE), LEAST * numbers)


def fast_length(size: int) -> int:
    """The least length of at least `size` without prime factors above 5.

    Example:
        >>> fast_length(34)
        36
    """
    return next(length for length in itertools.count(size) if _rest(length) == 1)


def _rest(length: int) -> int:
    for prime in (2, 3, 5):
        while length % prime == 0:
            length //= prime
    return length


@functools.lru_cache(maxsize=128)
def _inverse(
    sizes: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The rows of the inverse transform for the later half of the offsets, `[offsets, frequencies]`.

    `X X^H` belongs to the opposite offset, and frequencies whose mirror image the real transform leaves out count twice.
    """
    spans = [range(-(taps - 1), taps) for taps in kernel]
    offsets = list(itertools.product(*spans))[math.prod(2 * taps - 1 for taps in kernel) // 2 :]
    angles = torch.zeros(len(offsets), *_frequencies(sizes), dtype=torch.float64)
    for dim, (size, step, count) in enumerate(zip(sizes, dilation, _frequencies(sizes), strict=True)):
        shifts = torch.tensor([offset[dim] * step for offset in offsets], dtype=torch.float64)
        turned = torch.outer(shifts, torch.arange(count, dtype=torch.float64)) * (-2 * math.pi / size)
        angles += turned.view(-1, *(count if other == dim else 1 for other in range(len(sizes))))
    last = torch.full((_frequencies(sizes)[-1],), 2.0, dtype=torch.float64)
    last[0] = 1.0
    if sizes[-1] % 2 == 0:
        last[-1] = 1.0
    weights = (last / math.prod(sizes)).expand(angles.shape)
    return torch.polar(weights.contiguous(), angles).flatten(1).to(device=device, dtype=dtype)


def _frequencies(sizes: Sequence[int]) -> tuple[int, ...]:
    return (*sizes[:-1], sizes[-1] // 2 + 1)
