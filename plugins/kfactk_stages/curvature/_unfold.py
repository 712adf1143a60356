"""Where the patches of a convolution lie, and the patches as views, in any dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
from torch import Tensor, nn
from torch.nn import functional as F

MOVED = 200
"""Multiplications of a large product that take as long as to copy a number, on a CPU."""
CALLED = 250_000
"""Multiplications of a large product that take as long as a call on small tensors."""


@attrs.frozen
class Window:
    """Geometry of a convolution, one number a dimension.

    Args:
        kernel: Taps.
        stride: Step between patches.
        dilation: Step between taps.
        pads: Padding in the order of `torch.nn.functional.pad`: last dimension first, before and
            after.
        mode: Padding mode, as `torch.nn.functional.pad` names it.

    Example:
        >>> import torch
        >>> window = Window.of(nn.Conv1d(1, 1, 2, padding=1))
        >>> window.patches(torch.tensor([[[5.0, 7.0]]])).tolist()
        [[[[0.0, 5.0], [5.0, 7.0], [7.0, 0.0]]]]
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Window:
        """Return the window of a convolution, as its forward uses it now."""
        kernel = tuple(module.weight.shape[2:])
        dilation = each_dim(module.dilation, len(kernel))
        stride = each_dim(module.stride, len(kernel))
        if module.padding_mode == "zeros":
            return cls(
                kernel, stride, dilation, _zero_pads(module.padding, kernel, dilation), "constant"
            )
        return cls(
            kernel,
            stride,
            dilation,
            tuple(module._reversed_padding_repeated_twice),
            module.padding_mode,
        )

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Padding before and after, dimension by dimension."""
        return tuple(
            (self.pads[i], self.pads[i + 1]) for i in reversed(range(0, len(self.pads), 2))
        )

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance from the first tap to the last, dimension by dimension."""
        return tuple(
            dilation * (taps - 1) for taps, dilation in zip(self.kernel, self.dilation, strict=True)
        )

    def unpadded(self, inputs: Tensor) -> tuple[Tensor, Window]:
        """Return input and window with the same patches, padded already where not with zeros."""
        if self.mode == "constant":
            return inputs, self
        return F.pad(inputs, self.pads, mode=self.mode), attrs.evolve(
            self, pads=(0,) * len(self.pads), mode="constant"
        )

    def zero_padded(self, sizes: Sequence[int]) -> tuple[Window, tuple[int, ...]]:
        """Return window and spatial shape that `unpadded` makes of an input of these sizes."""
        if self.mode == "constant":
            return self, tuple(sizes)
        padded = tuple(size + sum(pads) for size, pads in zip(sizes, self.padding, strict=True))
        return attrs.evolve(self, pads=(0,) * len(self.pads), mode="constant"), padded

    def positions(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the positions of the output for an input of these sizes, by dimension."""
        return tuple(
            (size + sum(pads) - reach - 1) // step + 1
            for size, pads, reach, step in zip(
                sizes, self.padding, self.reach, self.stride, strict=True
            )
        )

    def evenly_padded(self, inputs: Tensor) -> tuple[Tensor, Window]:
        """Return input and window with the same patches and equal zero padding at both sides.

        Torch's convolution can pad so itself.
        """
        even = self.mode == "constant" and all(before == after for before, after in self.padding)
        if even:
            return inputs, self
        return F.pad(inputs, self.pads, mode=self.mode), attrs.evolve(
            self, pads=(0,) * len(self.pads), mode="constant"
        )

    def padded_positions(self, sizes: Sequence[int]) -> int:
        """Return the number of positions of an input of these sizes, once padded."""
        dims = len(self.kernel)
        return math.prod(
            size + self.pads[2 * (dims - 1 - i)] + self.pads[2 * (dims - 1 - i) + 1]
            for i, size in enumerate(sizes)
        )

    def patches(self, inputs: Tensor) -> Tensor:
        """Return the patches of `[N, C, *S]`, once padded, as a view `[N, C, *out, *kernel]`."""
        padded = F.pad(inputs, self.pads, mode=self.mode) if any(self.pads) else inputs
        for i, (taps, step, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            padded = padded.unfold(2 + i, dilation * (taps - 1) + 1, step)[..., ::dilation]
        return padded


def moment_of(blocks: Tensor) -> Tensor:
    """Return a moment tap by tap as one matrix for each group.

    Args:
        blocks: `[*taps, *taps, groups, channels, channels]`.

    Returns:
        `[groups, channels * taps, channels * taps]`.
    """
    dims = (blocks.ndim - 3) // 2
    found = blocks.permute(
        2 * dims, 2 * dims + 1, *range(dims), 2 * dims + 2, *range(dims, 2 * dims)
    )
    columns = blocks.shape[-1] * math.prod(blocks.shape[:dims])
    return found.reshape(-1, columns, columns)


def _zero_pads(
    padding: str | int | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    if padding == "valid":
        return (0, 0) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(pad for total in reversed(totals) for pad in (total // 2, total - total // 2))
    assert not isinstance(padding, str)
    return tuple(pad for size in reversed(each_dim(padding, len(kernel))) for pad in (size, size))


def each_dim(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """Return one number for each dimension; an edited module may have a single number."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)
