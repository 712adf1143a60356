"""Transposed convolutions: a row is what the output at one position sees of the input.

The input position j reaches the outputs `j stride - padding + tap dilation`. So the output at t
sees the input through those taps alone for which `t + padding - tap dilation` is a multiple of the
stride. Taps that see the input at the same outputs are a *phase*: with its taps, these outputs are
an ordinary convolution of stride 1. Taps of different phases never meet in a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk_stages.curvature._per_example import weight_gradients
from kfactk_stages.curvature._rows import ConvRows, ImageRows, JoinedSamples, bordered
from kfactk_stages.curvature._unfold import Window, each_dim


def window_of(
    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> Window:
    """Return where the outputs lie that each input position reaches.

    Args:
        module: The layer.
        inputs: Spatial shape of the input.
        outputs: Spatial shape of the output, whether made by `output_padding` or `output_size`.

    Example:
        >>> window_of(nn.ConvTranspose1d(1, 1, 3, stride=2, padding=1), [4], [7]).padding
        ((1, 1),)
        >>> window_of(nn.ConvTranspose1d(1, 1, 3, stride=2, padding=1), [4], [8]).padding
        ((1, 0),)
    """
    kernel = tuple(module.weight.shape[2:])
    assert not isinstance(module.padding, str)
    stride, dilation, padding = (
        each_dim(value, len(kernel)) for value in (module.stride, module.dilation, module.padding)
    )
    pads: tuple[int, ...] = ()
    for dim, (size, out) in enumerate(zip(inputs, outputs, strict=True)):
        reach = dilation[dim] * (kernel[dim] - 1)
        after = (size - 1) * stride[dim] + reach + 1 - out - padding[dim]
        pads = (padding[dim], after, *pads)
    return Window(kernel, stride, dilation, pads, "constant")


def smallest(module: nn.ConvTranspose2d) -> tuple[list[int], list[int]]:
    """Return the smallest spatial shape of an input that has an output, and that of the output."""
    kernel = module.weight.shape[2:]
    assert not isinstance(module.padding, str)
    stride, dilation, padding, more = (
        each_dim(value, len(kernel))
        for value in (module.stride, module.dilation, module.padding, module.output_padding)
    )
    alone = [
        dilation[dim] * (taps - 1) + 1 + more[dim] - 2 * padding[dim]
        for dim, taps in enumerate(kernel)
    ]
    sizes = [1 + max(0, -((size - 1) // step)) for size, step in zip(alone, stride, strict=True)]
    outs = [
        size + (number - 1) * step for size, number, step in zip(alone, sizes, stride, strict=True)
    ]
    return sizes, outs


@attrs.frozen
class Phase:
    """Taps along one dimension that see the input at the same outputs.

    Args:
        taps: The taps, in the order of the pixels they see.
        outputs: The outputs.
        inputs: The pixels that any of them sees.
        pads: Zeros before and after these pixels.
        dilation: Pixels from one tap to the next.
    """

    taps: tuple[int, ...]
    outputs: slice
    inputs: slice
    pads: tuple[int, int]
    dilation: int

    @property
    def ascending(self) -> slice:
        """The taps in ascending order."""
        first, *more = reversed(self.taps)
        return slice(first, self.taps[0] + 1, more[0] - first if more else 1)


def phases(window: Window, dim: int, size: int, out: int) -> Iterator[Phase]:
    """Yield the phases along a dimension that see anything.

    Args:
        window: Where the outputs lie that an input position reaches.
        dim: The dimension.
        size: Size of the input.
        out: Size of the output.

    Example:
        >>> window = window_of(nn.ConvTranspose1d(1, 1, 3, stride=2), [4], [9])
        >>> [phase.taps for phase in phases(window, 0, 4, 9)]
        [(2, 0), (1,)]
    """
    kernel, stride, step = window.kernel[dim], window.stride[dim], window.dilation[dim]
    padding, common = window.padding[dim][0], math.gcd(stride, step)
    between, dilation = stride // common, step // common
    for tap in range(min(between, kernel)):
        taps = tuple(reversed(range(tap, kernel, between)))
        first = (tap * step - padding) % stride
        count = -(-(out - first) // stride)
        # what the last tap sees at the first output: pixels before 0 are zeros
        start = (first + padding - tap * step) // stride - dilation * (len(taps) - 1)
        stop = start + count + dilation * (len(taps) - 1)
        seen = slice(max(start, 0), min(stop, size))
        if count > 0 and seen.start < seen.stop:
            pads = (max(0, -start), max(0, stop - size))
            yield Phase(taps, slice(first, None, stride), seen, pads, dilation)


class TransposedRows(ImageRows):
    """A call of a transposed convolution.

    Its `window` says where the outputs lie that each input position reaches.
    """

    @property
    def numbers(self) -> int:
        """A group's output channels times padded positions."""
        return self.outputs * self.window.padded_positions(self.gradient.shape[2:])

    @property
    def visits(self) -> float:
        """Each tap sees each pixel once."""
        return 1.0

    @property
    def spacing(self) -> tuple[int, ...]:
        """Between pixels are the zeros of the stride."""
        return self.window.stride

    def moments(self, samples: JoinedSamples) -> Iterator[Tensor]:
        """Yield parts of `sum_n sum_t a a^T`, `[(groups,) d_in, d_in]`, phase by phase."""
        taps = math.prod(self.window.kernel)
        found = self.inputs.new_zeros(self.groups, self.columns, self.columns, dtype=samples.dtype)
        channels = torch.arange(self.channels, device=found.device).unsqueeze(-1) * taps
        for call, its_taps in self._phases():
            moment = JoinedSamples(
                [call],
                bias=False,
                num_terms=0.0,
                first=True,
                chunk_bytes=samples.chunk_bytes,
            ).input_moment()
            if moment.total is None:
                return
            columns = (channels + its_taps).flatten()
            found[:, columns.unsqueeze(-1), columns] = moment.total
        if samples.bias:
            total = attrs.evolve(self, inputs=self.inputs.sum(0, True, dtype=samples.dtype))
            sums = total.input_sums(slice(None), samples.dtype).reshape(self.groups, -1)
            found = bordered(found, sums, self.examples * self.positions)
        yield self._ungrouped(found)

    def _phases(self) -> Iterator[tuple[ConvRows, Tensor]]:
        """Yield the convolutions that the phases are, each with its taps, as numbers."""
        kernel = self.window.kernel
        sizes = zip(self.inputs.shape[2:], self.gradient.shape[2:], strict=True)
        along = [phases(self.window, dim, *both) for dim, both in enumerate(sizes)]
        numbers = torch.arange(math.prod(kernel), device=self.inputs.device).view(kernel)
        for combined in itertools.product(*along):
            images = (slice(None), slice(None))
            seen = numbers[tuple(phase.ascending for phase in combined)]
            seen = seen.flip(tuple(range(len(kernel))))
            window = Window(
                tuple(len(phase.taps) for phase in combined),
                (1,) * len(kernel),
                tuple(phase.dilation for phase in combined),
                tuple(pad for phase in reversed(combined) for pad in phase.pads),
                "constant",
            )
            yield (
                ConvRows(
                    self.inputs[(*images, *(phase.inputs for phase in combined))],
                    self.gradient[(*images, *(phase.outputs for phase in combined))],
                    self.scale,
                    self.groups,
                    window,
                ),
                seen.flatten(),
            )

    def rotation(
        self, right: Tensor, dtype: torch.dtype, *, bias: bool
    ) -> Callable[[slice], Tensor]:
        """Return a function from a slice of examples to `a right`, `[(groups,) n, T, k_in]`.

        It is a transposed convolution: its filters are the columns of `right`.
        """
        window, rotation = self.window, right.reshape(self.groups, self.columns + bias, -1)
        width, offset = rotation.shape[-1], rotation[:, -1].reshape(-1) if bias else None
        filters = rotation[:, : self.columns].reshape(-1, math.prod(window.kernel), width)
        weight = filters.transpose(1, 2).reshape(-1, width, *window.kernel)
        padding = [before for before, _ in window.padding]
        more = [before - after for before, after in window.padding]
        dims = len(window.kernel)
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]

        def rotated(rows: slice) -> Tensor:
            inputs = self.inputs[rows].to(right.dtype)
            found = convolve(
                inputs, weight, offset, window.stride, padding, more, self.groups, window.dilation
            )
            return self._ungrouped(
                self._grouped(found.to(dtype), width).flatten(3).permute(1, 0, 3, 2)
            )

        return rotated

    def input_sums(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return `sum_t a` without the bias column: the pixels whose output a tap reaches."""
        dims = len(self.window.kernel)
        reached = self.window.patches(
            torch.ones(1, 1, *self.gradient.shape[2:], dtype=dtype, device=self.inputs.device)
        )
        reached = reached.flatten(2 + dims).flatten(0, 1 + dims)
        images = self._grouped(self.inputs[rows].to(dtype), self.channels).flatten(3)
        return self._ungrouped((images @ reached).flatten(2).transpose(0, 1))

    def input_view(self, rows: slice) -> Tensor:
        """Return `[(groups,) n, *out, channels, *kernel]`, zeros where a tap sees no pixel."""
        window, dims, inputs = self.window, len(self.window.kernel), self.inputs[rows]
        sizes = [
            (size - 1) * step + 1
            for size, step in zip(inputs.shape[2:], window.stride, strict=True)
        ]
        spread = inputs.new_zeros(*inputs.shape[:2], *sizes)
        every = tuple(slice(None, None, step) for step in window.stride)
        spread[(slice(None), slice(None), *every)] = inputs
        pads: tuple[int, ...] = ()
        for reach, (before, after) in zip(window.reach, window.padding, strict=True):
            pads = (reach - before, reach - after, *pads)
        plain = attrs.evolve(window, stride=(1,) * dims, pads=pads)
        patches = self._grouped(plain.patches(spread), self.channels)
        patches = patches.flip(tuple(range(3 + dims, 3 + 2 * dims)))
        order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
        return self._ungrouped(patches.permute(order))

    def weight_gradients(self, rows: slice, image: Tensor) -> Tensor:
        """Return `sum_t g_t a_t^T` of each example.

        It is the weight gradient of the convolution that maps outputs to inputs.
        """
        inputs = self._grouped(self.inputs[rows].to(image.dtype), self.channels)
        found = weight_gradients(image.flatten(1, 2), inputs, self.window)
        split = (*found.shape[:3], image.shape[2], math.prod(self.window.kernel))
        return found.view(split).transpose(2, 3).flatten(3)
