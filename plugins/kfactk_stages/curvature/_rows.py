"""The calls of a layer as rows, read a chunk of examples at a time.

Reading casts, scales and unfolds them, joins them along T and appends their bias column.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk import Samples, Statistic, project_channels
from kfactk.samples import add_squares, product, total_of
from kfactk_stages.curvature import _spectral
from kfactk_stages.curvature._autocorrelation import gram_of, patch_moment, patch_sum, pixel_gram
from kfactk_stages.curvature._calls import CallSamples
from kfactk_stages.curvature._per_example import weight_gradients
from kfactk_stages.curvature._plan import cheapest
from kfactk_stages.curvature._slabs import slab_moment
from kfactk_stages.curvature._unfold import Window

SLAB_BYTES = 4 * 2**20
"""Bytes that are unfolded at a time for the moment, on a CPU."""


@attrs.frozen(eq=False)
class LinearRows:
    """A call of a linear layer.

    Args:
        inputs: `[N, *, d_in]`, at least one dimension in `*`.
        gradient: `[N, *, d_out]`.
        scale: What the gradient is to be multiplied by.
    """

    inputs: Tensor
    gradient: Tensor
    scale: Tensor | float
    groups: int = 1

    @property
    def examples(self) -> int:
        """N."""
        return int(self.inputs.shape[0])

    @property
    def positions(self) -> int:
        """T: the product of the dimensions between examples and features."""
        return math.prod(self.inputs.shape[1:-1])

    @property
    def columns(self) -> int:
        """d_in without bias."""
        return int(self.inputs.shape[-1])

    @property
    def outputs(self) -> int:
        """d_out."""
        return int(self.gradient.shape[-1])

    @property
    def numbers(self) -> int:
        """T d_in."""
        return self.positions * self.columns

    def input_view(self, rows: slice) -> Tensor:
        """Return `[n, T, d_in]`."""
        return self.inputs[rows].flatten(1, -2)

    def gradient_view(self, rows: slice) -> Tensor:
        """Return `[n, T, d_out]`."""
        return self.gradient[rows].flatten(1, -2)

    def moments(self, samples: JoinedSamples) -> Iterator[Tensor]:
        """Yield parts of `sum_n sum_t a a^T`, `[d_in, d_in]`.

        The column of ones is not appended: its products are a border of the moment.
        """
        for rows in Samples.chunks(samples, self.numbers):
            flat = self.inputs[rows].flatten(0, -2).to(samples.dtype)
            moment = flat.T @ flat
            yield bordered(moment, flat.sum(0), len(flat)) if samples.bias else moment

    def rotation(
        self, right: Tensor, dtype: torch.dtype, *, bias: bool
    ) -> Callable[[slice], Tensor]:
        """Return a function from a slice of examples to `a right`, `[n, T, k_in]`.

        The product is in the precision of `right`, the result in `dtype`.
        """
        return lambda rows: rotated_rows(self.input_view(rows), right, dtype, bias=bias)


@attrs.frozen(eq=False)
class ImageRows(abc.ABC):
    """A call of a layer on images: a row is what the output at one position sees.

    Columns are in the order of a weight `[d_out, channels, *taps]`.

    Args:
        inputs: `[N, C, *S]`.
        gradient: `[N, d_out, *out]`.
        scale: What the gradient is to be multiplied by.
        groups: Number of groups; more than one give the views a leading dimension.
        window: Where the taps lie.
    """

    inputs: Tensor
    gradient: Tensor
    scale: Tensor | float
    groups: int
    window: Window

    @property
    def examples(self) -> int:
        """N."""
        return int(self.inputs.shape[0])

    @property
    def positions(self) -> int:
        """T: output positions."""
        return math.prod(self.gradient.shape[2:])

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        return int(self.inputs.shape[1]) // self.groups

    @property
    def columns(self) -> int:
        """Channels of a group times taps."""
        return self.channels * math.prod(self.window.kernel)

    @property
    def outputs(self) -> int:
        """Output channels of a group."""
        return int(self.gradient.shape[1]) // self.groups

    @property
    @abc.abstractmethod
    def numbers(self) -> int:
        """Numbers of one example's padded images, of a group."""

    @property
    @abc.abstractmethod
    def visits(self) -> float:
        """How often one tap sees a pixel, on average, where borders are left aside."""

    @property
    @abc.abstractmethod
    def spacing(self) -> tuple[int, ...]:
        """How far apart neighbouring pixels are where taps are one `dilation` apart."""

    @abc.abstractmethod
    def moments(self, samples: JoinedSamples) -> Iterator[Tensor]:
        """Yield parts of `sum_n sum_t a a^T`, `[(groups,) d_in, d_in]`, the cheapest way."""

    @abc.abstractmethod
    def rotation(
        self, right: Tensor, dtype: torch.dtype, *, bias: bool
    ) -> Callable[[slice], Tensor]:
        """Return a function from a slice of examples to `a right`, `[(groups,) n, T, k_in]`.

        The product is in the precision of `right`, the result in `dtype`.
        """

    @abc.abstractmethod
    def input_sums(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return `sum_t a` without the bias column, `[(groups,) n, columns]`."""

    @abc.abstractmethod
    def input_view(self, rows: slice) -> Tensor:
        """Return `[(groups,) n, *out, channels, *kernel]`."""

    @abc.abstractmethod
    def weight_gradients(self, rows: slice, image: Tensor) -> Tensor:
        """Return `sum_t g_t a_t^T` of each example without the bias column.

        Args:
            rows: The examples.
            image: Their output gradients, `[n, groups, outputs, *out]`.

        Returns:
            `[n, groups, outputs, columns]`.
        """

    def grad_moment(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return `sum_n sum_t g g^T`, `[(groups,) d_out, d_out]`."""
        moment = pixel_gram(self._grouped(self.gradient[rows], self.outputs).to(dtype))
        return self._ungrouped(
            moment
            if isinstance(self.scale, float) and self.scale == 1.0
            else moment * self.scale**2
        )

    def per_example_gradients(
        self,
        rows: slice,
        dtype: torch.dtype,
        left: Tensor | None,
        precision: torch.dtype | None,
        *,
        bias: bool,
    ) -> Tensor:
        """Return `left^T D_n` of this call, `[(groups,) n, d_out, d_in]`."""
        gradient = self._grouped(self.gradient[rows], self.outputs).to(dtype).flatten(3)
        if not isinstance(self.scale, float) or self.scale != 1.0:
            gradient = gradient * self.scale
        if left is not None:
            gradient = product(left.transpose(-1, -2), gradient, dtype, precision)
        image = gradient.reshape(*gradient.shape[:3], *self.gradient.shape[2:])
        found = self.weight_gradients(rows, image)
        if bias:
            found = torch.cat([found, gradient.sum(-1, keepdim=True)], -1)
        return self._ungrouped(found.transpose(0, 1))

    def turned(self, rows: slice, right: Tensor, dtype: torch.dtype) -> ImageRows:
        """Return the call on the examples `rows` with its channels rotated.

        Padding of every mode commutes with the rotation.

        Args:
            rows: The examples.
            right: `[(groups,) channels, k]`.
            dtype: Precision of the result.
        """
        inputs = self._grouped(self.inputs[rows].to(dtype), self.channels).flatten(3)
        turned = (right.to(dtype).transpose(-1, -2) @ inputs).reshape(
            len(inputs), -1, *self.inputs.shape[2:]
        )
        return attrs.evolve(self, inputs=turned, gradient=self.gradient[rows])

    def gradient_view(self, rows: slice) -> Tensor:
        """Return `[(groups,) n, T, outputs]`."""
        gradient = self._grouped(self.gradient[rows], self.outputs).flatten(3)
        return self._ungrouped(gradient.permute(1, 0, 3, 2))

    def pixel_moment(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return `sum_n sum_s x x^T` of unpadded inputs, `[(groups,) channels, channels]`."""
        return self._ungrouped(
            pixel_gram(self._grouped(self.inputs[rows], self.channels).to(dtype))
        )

    def _grouped(self, tensor: Tensor, channels: int) -> Tensor:
        return tensor.view(len(tensor), self.groups, channels, *tensor.shape[2:])

    def _ungrouped(self, tensor: Tensor) -> Tensor:
        return tensor.squeeze(0) if self.groups == 1 else tensor


class ConvRows(ImageRows):
    """A call of a convolution; a row is a patch of its input, and `window` says where it lies."""

    @property
    def numbers(self) -> int:
        """A group's channels times padded positions."""
        return self.channels * self.window.padded_positions(self.inputs.shape[2:])

    @property
    def visits(self) -> float:
        """T over the number of pixels."""
        return self.positions / max(1, math.prod(self.inputs.shape[2:]))

    @property
    def spacing(self) -> tuple[int, ...]:
        """Pixels are next to each other."""
        return (1,) * len(self.window.kernel)

    def moments(self, samples: JoinedSamples) -> Iterator[Tensor]:
        """Yield parts of `sum_n sum_t a a^T`, `[(groups,) d_in, d_in]`, the cheapest way."""
        way = self._way(samples)
        if way == "pixels":
            seen = (
                slice(None),
                slice(None),
                slice(None),
                *(slice(None, None, step) for step in self.window.stride),
            )
            for rows in Samples.chunks(samples, self.numbers):
                pixels = self._grouped(self.inputs[rows], self.channels)[seen].to(samples.dtype)
                yield self._bordered(pixel_gram(pixels), self.inputs[rows], bias=samples.bias)
            return
        if way == "slabs":
            within = (
                min(samples.chunk_bytes, SLAB_BYTES)
                if samples.device.type == "cpu"
                else samples.chunk_bytes
            )
            moment = slab_moment(self.inputs, self.window, self.groups, samples.dtype, within)
            yield self._bordered(moment, self.inputs, bias=samples.bias)
            return
        for rows in Samples.chunks(
            samples,
            8 * self.numbers
            if way == "correlation"
            else max(self.numbers, self.positions * self.columns),
        ):
            if way == "correlation":
                moment = patch_moment(self.inputs[rows].to(samples.dtype), self.window, self.groups)
            else:
                moment = gram_of(
                    self.input_view(rows).reshape(self.groups, -1, self.columns).to(samples.dtype)
                )
            yield self._bordered(moment, self.inputs[rows], bias=samples.bias)

    def _way(self, samples: JoinedSamples) -> str:
        """Return the cheapest way to the moment among those that fit in `chunk_bytes`."""
        sizes = tuple(self.inputs.shape[2:])
        way = cheapest(self.window, sizes, self.channels, self.examples * self.groups)
        needed = (
            _spectral.workspace(self.window, sizes, self.channels, self.groups, samples.dtype)
            if way == "correlation"
            else 0
        )
        return way if needed <= samples.chunk_bytes else "slabs"

    def _bordered(self, moment: Tensor, inputs: Tensor, *, bias: bool) -> Tensor:
        if bias:
            sums = patch_sum(
                inputs.sum(0, keepdim=True, dtype=moment.dtype), self.window, self.groups
            )
            moment = bordered(moment, sums, len(inputs) * self.positions)
        return self._ungrouped(moment)

    def rotation(
        self, right: Tensor, dtype: torch.dtype, *, bias: bool
    ) -> Callable[[slice], Tensor]:
        """Return a function from a slice of examples to `a right`, `[(groups,) n, T, k_in]`.

        The product is in the precision of `right`, the result in `dtype`. For more than one tap it
        is a convolution: its filters are the columns of `right`, its bias is their last row.
        """
        if math.prod(self.window.kernel) == 1:

            def pixels(rows: slice) -> Tensor:
                view = self.input_view(rows).flatten(-1 - len(self.window.kernel))
                lead = view.shape[: -1 - len(self.window.kernel)]
                return rotated_rows(
                    view.reshape(*lead, self.positions, self.channels), right, dtype, bias=bias
                )

            return pixels
        filters = right.reshape(self.groups, self.columns + bias, -1).transpose(-1, -2)
        weight = filters[..., : self.columns].reshape(-1, self.channels, *self.window.kernel)
        offset = filters[..., -1].reshape(-1) if bias else None

        def rotated(rows: slice) -> Tensor:
            inputs, window = self.window.evenly_padded(self.inputs[rows].to(right.dtype))
            padding = [before for before, _ in window.padding]
            convolve = (F.conv1d, F.conv2d, F.conv3d)[len(padding) - 1]
            found = convolve(
                inputs, weight, offset, window.stride, padding, window.dilation, self.groups
            ).to(dtype)
            return self._ungrouped(
                self._grouped(found, filters.shape[1]).flatten(3).permute(1, 0, 3, 2)
            )

        return rotated

    def input_sums(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return `sum_t a` without the bias column, `[(groups,) n, columns]`.

        It sums what each tap sees, without copying patches.
        """
        dims = len(self.window.kernel)
        sums = self.window.patches(self.inputs[rows].to(dtype)).sum(tuple(range(2, 2 + dims)))
        return self._ungrouped(sums.reshape(len(sums), self.groups, self.columns).transpose(0, 1))

    def input_view(self, rows: slice) -> Tensor:
        """Return `[(groups,) n, *out, channels, *kernel]`."""
        patches = self._grouped(self.window.patches(self.inputs[rows]), self.channels)
        dims = len(self.window.kernel)
        order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
        return self._ungrouped(patches.permute(order))

    def weight_gradients(self, rows: slice, image: Tensor) -> Tensor:
        """Return `sum_t g_t a_t^T` of each example, unfolding where it is cheaper."""
        return weight_gradients(self.inputs[rows].to(image.dtype), image, self.window)


def rotated_rows(rows: Tensor, right: Tensor, dtype: torch.dtype, *, bias: bool) -> Tensor:
    """Return `[..., n, t, d]` times `right`, rounded once and then given in `dtype`.

    With `bias`, `right` has one row more, for a column of ones that `rows` lacks.
    """
    flat = rows.flatten(-3, -2).to(right.dtype)
    if bias:
        add = torch.baddbmm if flat.ndim == 3 else torch.addmm
        found = add(right[..., -1:, :], flat, right[..., :-1, :])
    else:
        found = flat @ right
    return found.to(dtype).view(*rows.shape[:-1], right.shape[-1])


def bordered(moment: Tensor, sums: Tensor, count: float) -> Tensor:
    """Return the moment of rows with a column of ones appended, `[..., d + 1, d + 1]`.

    Args:
        moment: Moment of the rows without it, `[..., d, d]`.
        sums: Sum of the rows, `[..., d]`.
        count: Number of rows.
    """
    moment = F.pad(moment, (0, 1, 0, 1))
    moment[..., -1, :-1] = moment[..., :-1, -1] = sums
    moment[..., -1, -1] = float(count)
    return moment


Rows = LinearRows | ImageRows
"""One call of a layer: T rows for each of N examples."""


class JoinedSamples(CallSamples[Rows]):
    """Samples of all calls of a layer, joined along T.

    Args:
        calls: The calls; all have the same number of examples, columns, outputs and groups.
        bias: Whether the inputs get a last column of ones.
        num_terms: See `kfactk.Samples`.
        first: See `kfactk.Samples`.
        chunk_bytes: See `kfactk.Samples`.
    """

    def __init__(
        self,
        calls: Sequence[Rows],
        *,
        bias: bool,
        num_terms: Tensor | float,
        first: bool,
        chunk_bytes: int,
    ) -> None:
        one = calls[0]
        lead = (one.groups,) if one.groups > 1 else ()
        shape = (*lead, one.examples, sum(call.positions for call in calls))
        super().__init__(
            calls,
            [tensor for call in calls for tensor in (call.inputs, call.gradient)],
            shape,
            one.columns + bias,
            one.outputs,
            num_terms=num_terms,
            first=first,
            chunk_bytes=chunk_bytes,
        )
        self.bias, self._shape = bias, shape
        self._numbers = max(call.numbers for call in calls)

    def chunks(self, numbers_per_example: int, most: int | None = None) -> Iterator[slice]:
        """Yield slices of examples such that their numbers, and one call's padded input, fit."""
        return super().chunks(max(numbers_per_example, self._numbers), most)

    def input_moment(self) -> Statistic:
        """Return `sum_n sum_t a a^T`, call by call; no column of ones is appended."""
        if not self.first:
            return Statistic(None, 0.0)
        parts = (part for call in self.calls for part in call.moments(self))
        return Statistic(total_of(parts), float(self.examples), symmetric=True)

    def input_sums(self, rows: slice = slice(None)) -> Tensor:
        """Return `sum_t a` of the examples `rows`, `[..., n, d_in]`."""
        images = [call for call in self.calls if isinstance(call, ImageRows)]
        if len(images) < len(self.calls):
            return super().input_sums(rows)
        sums = total_of(call.input_sums(rows, self.dtype) for call in images)
        assert sums is not None
        return F.pad(sums, (0, 1), value=float(self.positions)) if self.bias else sums

    def grad_moment(self) -> Statistic:
        """Return `sum_n sum_t g g^T`, call by call."""
        images = [call for call in self.calls if isinstance(call, ImageRows)]
        if len(images) < len(self.calls):
            return super().grad_moment()
        chunks = [
            (call, rows)
            for call in images
            for rows in super(JoinedSamples, self).chunks(call.positions * call.outputs)
        ]
        return Statistic(
            total_of(call.grad_moment(rows, self.dtype) for call, rows in chunks),
            self.num_terms,
            symmetric=True,
        )

    def per_example_gradients(
        self,
        rows: slice = slice(None),
        left: Tensor | None = None,
        *,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Return `left^T D_n` of the examples `rows`; images unfold where it is cheaper."""
        images = [call for call in self.calls if isinstance(call, ImageRows)]
        if len(images) < len(self.calls):
            return super().per_example_gradients(rows, left, precision=precision)
        found = total_of(
            call.per_example_gradients(rows, self.dtype, left, precision, bias=self.bias)
            for call in images
        )
        assert found is not None
        return found

    def _squared_channels(
        self,
        rows: slice,
        total: Tensor | None,
        left: Tensor | None,
        right: Tensor,
        taps: Tensor | None,
    ) -> Tensor:
        """Rotate channels in the images or in the D_n, whichever takes fewer operations.

        They are S c^2 an example in images, d_out taps c^2 in D_n.
        """
        images = [call for call in self.calls if isinstance(call, ImageRows)]
        pixels = sum(math.prod(call.inputs.shape[2:]) for call in images)
        columns = self.d_in - self.bias
        if len(images) < len(self.calls) or pixels * right.shape[-2] > self.d_out * columns:
            return super()._squared_channels(rows, total, left, right, taps)
        turned = [call.turned(rows, right, self.dtype) for call in images]
        samples = JoinedSamples(
            turned,
            bias=self.bias,
            num_terms=self.num_terms,
            first=self.first,
            chunk_bytes=self.chunk_bytes,
        )
        early, late = (left, None) if self.positions <= columns else (None, left)
        found = samples.per_example_gradients(slice(None), early)
        return add_squares(project_channels(found, late, None, taps, per_example=True), total)

    def input_rotation(
        self, right: Tensor, precision: torch.dtype | None = None
    ) -> Callable[[slice], Tensor]:
        """Return a function from a slice of examples to `a right`, without unfolding."""
        right = right.to(precision or self.dtype)
        ways = [call.rotation(right, self.dtype, bias=self.bias) for call in self.calls]
        return (
            ways[0] if len(ways) == 1 else lambda rows: torch.cat([way(rows) for way in ways], -2)
        )

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Return the inputs of the examples `rows`, `[..., n, T, d_in]`."""
        views = [call.input_view(rows) for call in self.calls]
        if len(views) == 1 and views[0].ndim == 3 and not self.bias:
            return views[0].to(self.dtype)
        lead, n = self._shape[:-2], len(range(*rows.indices(self.examples)))
        out = views[0].new_ones((*lead, n, self.positions, self.d_in), dtype=self.dtype)
        start, columns = 0, self.d_in - self.bias
        for call, view in zip(self.calls, views, strict=True):
            out[..., start : start + call.positions, :columns].view(view.shape).copy_(view)
            start += call.positions
        return out

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Return the output gradients of the examples `rows`, `[..., n, T, d_out]`."""
        parts = [call.gradient_view(rows).to(self.dtype) for call in self.calls]
        scaled = [
            part if isinstance(call.scale, float) and call.scale == 1.0 else part * call.scale
            for call, part in zip(self.calls, parts, strict=True)
        ]
        return scaled[0] if len(scaled) == 1 else torch.cat(scaled, -2)
