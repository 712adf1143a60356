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

WORKSPACE = 2**24
"""Bytes that products at several frequencies may take at a time."""


def autocorrelation(inputs: Tensor, window: Window, groups: int) -> Tensor:
    """`sum_{n,q} x_c(q) x_c'(q + offset)`, `[groups * channels, channels, *(2 k - 1)]`, offsets in steps of the dilation.

    Args:
        inputs: `[N, groups * channels, *S]`, float32 or float64.
        window: Whose kernel and dilation give the offsets.
        groups: Channels are correlated within their group.
    """
    n, channels, dims = len(inputs), inputs.shape[1] // groups, len(window.kernel)
    sizes = tuple(fast_length(size + reach) for size, reach in zip(inputs.shape[2:], window.reach, strict=True))
    spectrum = torch.fft.rfftn(inputs, s=sizes, dim=tuple(range(2, 2 + dims)))
    spectrum = spectrum.view(n, groups, channels, -1).permute(3, 1, 2, 0).contiguous()
    back = _inverse(sizes, window.kernel, window.dilation, spectrum.dtype, spectrum.device)
    found = inputs.new_zeros(len(back), groups * channels * channels)
    step = max(1, WORKSPACE // max(1, spectrum.element_size() * groups * channels * channels))
    for start in range(0, len(spectrum), step):
        some = spectrum[start : start + step]
        found += (back[:, start : start + step] @ (some @ some.mH).flatten(1)).real
    half = found.view(len(back), groups, channels, channels)  # at no offset, and at those after it in lexicographic order
    whole = torch.cat([half[1:].flip(0).mT, half])
    return whole.permute(1, 2, 3, 0).reshape(groups * channels, channels, *(2 * taps - 1 for taps in window.kernel))


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
