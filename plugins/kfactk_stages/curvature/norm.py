"""Curvature of normalisation layers: scale and shift of each unit form one exact block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Curvature, Layer, LayerCall, RowOrder, Samples, Statistic, Tensors, hookimpl
from kfactk.options import whole
from kfactk.samples import CACHED_BYTES, DEFAULT_CHUNK_BYTES, total_of, working_dtype
from kfactk_stages.curvature._calls import (
    CallSamples,
    check_examples,
    examples_first,
    scaled,
    unfolded,
)
from kfactk_stages.curvature._coverage import reason_against
from kfactk_stages.curvature._foreign_norms import stand_in

BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CHANNELS = (nn.GroupNorm, *BATCH, *INSTANCE)
"""Layers whose units are the channels, dimension 1 of their inputs."""
TRAILING = (nn.LayerNorm, nn.RMSNorm)
"""Layers whose units are the elements of the trailing dimensions of their inputs."""


@attrs.frozen(eq=False)
class NormCall:
    """One call of a normalisation layer, examples in dimension 0.

    Args:
        module: The layer.
        inputs: `[N, C, *S]`, or `[N, *S, *normalized_shape]`.
        gradient: The same shape.
        scale: What the gradient is to be multiplied by.
        statistics: Mean and `1 / sqrt(variance + eps)` of each channel, where all examples share
            them; both broadcast over `inputs`.
    """

    module: Any
    inputs: Tensor
    gradient: Tensor
    scale: Tensor | float
    statistics: tuple[Tensor, Tensor] | None

    @property
    def examples(self) -> int:
        """Return N."""
        return len(self.inputs)

    @property
    def dims(self) -> tuple[int, ...]:
        """Return the dimensions of S."""
        if isinstance(self.module, CHANNELS):
            return tuple(range(2, self.inputs.ndim))
        return tuple(range(1, self.inputs.ndim - len(self.module.normalized_shape)))

    @property
    def positions(self) -> int:
        """Return T, the number of elements of S."""
        return math.prod(self.inputs.shape[dim] for dim in self.dims)

    @property
    def units(self) -> int:
        """Return C, the number of units."""
        if isinstance(self.module, CHANNELS):
            return int(self.inputs.shape[1])
        return math.prod(self.module.normalized_shape)

    def normalised(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return x-hat of the examples `rows`, a new tensor of the shape of the inputs."""
        module, x = self.module, self.inputs[rows].to(dtype)
        if self.statistics is not None:
            mean, inverse_deviation = (each.to(dtype) for each in self.statistics)
            return (x - mean).mul_(inverse_deviation)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.RMSNorm):
            eps = default_eps(self.inputs.dtype) if module.eps is None else module.eps
            return F.rms_norm(x, module.normalized_shape, eps=eps)
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else module.num_features
        return torch.group_norm(x, groups, eps=module.eps)

    def unit_gradients(self, rows: slice, dtype: torch.dtype, *, shift: bool) -> list[Tensor]:
        """Return `sum_t g x_hat` and, with `shift`, `sum_t g` of each example, `[n, C]` each."""
        gradient = self.gradient[rows].to(dtype)
        found = [self.normalised(rows, dtype).mul_(gradient), *([gradient] if shift else [])]
        return [scaled(self._summed(each), self.scale) for each in found]

    def rows(self, tensor: Tensor) -> Tensor:
        """View a tensor shaped like the inputs of some examples as `[C, n, T]`."""
        n, t, c = len(tensor), self.positions, self.units
        if isinstance(self.module, CHANNELS):
            return tensor.reshape(n, c, t).transpose(0, 1)
        return tensor.reshape(n, t, c).permute(2, 0, 1)

    def _summed(self, tensor: Tensor) -> Tensor:
        found = tensor.sum(self.dims) if self.dims else tensor
        return found.reshape(len(found), self.units)


class NormSamples(CallSamples[NormCall]):
    """Samples of all calls of a normalisation layer: units are groups, `a = (x_hat, 1)`.

    Args:
        calls: The calls; all of the same number of examples.
        shift: Whether the layer has a trained shift.
        num_terms, first, chunk_bytes: See `kfactk.Samples`.
    """

    def __init__(
        self,
        calls: Sequence[NormCall],
        *,
        shift: bool,
        num_terms: Tensor | float,
        first: bool,
        chunk_bytes: int,
    ) -> None:
        one = calls[0]
        super().__init__(
            calls,
            [tensor for call in calls for tensor in (call.inputs, call.gradient)],
            (one.units, one.examples, sum(call.positions for call in calls)),
            1 + shift,
            1,
            num_terms=num_terms,
            first=first,
            chunk_bytes=chunk_bytes,
        )
        self.shift = shift

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Return `(x_hat, 1)` of the examples `rows`, `[C, n, T, 2]` or `[C, n, T, 1]`."""
        parts = [call.rows(call.normalised(rows, self.dtype)) for call in self.calls]
        normalised = torch.cat(parts, -1)
        both = (normalised, torch.ones_like(normalised)) if self.shift else (normalised,)
        return torch.stack(both, -1)

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Return the output gradients of the examples `rows`, `[C, n, T, 1]`."""
        parts = (scaled(call.gradient[rows].to(self.dtype), call.scale) for call in self.calls)
        views = [call.rows(part) for call, part in zip(self.calls, parts, strict=True)]
        return torch.cat(views, -1).unsqueeze(-1)

    def unit_gradients(self, rows: slice) -> list[Tensor]:
        """Return the parts of d of each example and unit, summed over the calls, `[n, C]` each."""
        calls = (call.unit_gradients(rows, self.dtype, shift=self.shift) for call in self.calls)
        return [sum(parts[1:], parts[0]) for parts in zip(*calls, strict=True)]

    def per_example_gradients(
        self,
        rows: slice = slice(None),
        left: Tensor | None = None,
        *,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Return `left^T D_n` of the examples `rows`, `[C, n, 1, 2]` or `[C, n, 1, 1]`."""
        if left is not None:
            return super().per_example_gradients(rows, left, precision=precision)
        return torch.stack(self.unit_gradients(rows), -1).transpose(0, 1).unsqueeze(-2)

    def unit_moment(self) -> Statistic:
        """Return `sum_n d_n d_n^T`, `[C, 2, 2]` or `[C, 1, 1]`, counted by likelihood terms."""
        numbers, most = 3 * self.positions + 8, None
        if self.device.type == "cpu":
            most = max(1, CACHED_BYTES // max(1, numbers * self.groups * self.dtype.itemsize))
        chunks = self.chunks(numbers, most)
        total = total_of(_moment(self.unit_gradients(rows)) for rows in chunks)
        return Statistic(total, self.num_terms, symmetric=True)


def _moment(d: Sequence[Tensor]) -> Tensor:
    """Return `sum_n d d^T`, `[C, k, k]`, of the k parts of d, `[n, C]` each."""
    products = [(one * other).sum(0) for one in d for other in d]
    return torch.stack(products, -1).view(-1, len(d), len(d))


@attrs.frozen(kw_only=True)
class Norm(Curvature):
    """Exact curvature of each unit of a normalisation layer.

    The layer computes `y = weight * x_hat + bias` for each unit: a channel, or an element of
    `normalized_shape`. For example n, with g the gradient of y and T positions,

        d_n = (sum_t g x_hat, sum_t g),    U = (1/M) sum_n d_n d_n^T

    The matrix is `[C, 1, 2]`: each of the C units is a group whose columns are scale and shift.
    Without a trained bias it is `[C, 1, 1]`. U is the Fisher block of each unit. Correlations
    between units are left out.

    `x_hat` is computed from the inputs, so that a weight of zero loses nothing. It uses the
    statistics that the module uses: those of the batch for batch normalisation in training mode,
    running ones in evaluation mode. Batch statistics count as constants: d_n is what flows through
    the rows of example n. Running statistics are read and never written.

    Covers `nn.LayerNorm`, `nn.RMSNorm`, `nn.GroupNorm`, `nn.BatchNorm1d` to `3d` and
    `nn.InstanceNorm1d` to `3d`; and any module that normalises its last dimension as one of the
    first two does, such as the RMSNorm classes of transformers: it is tried out on random numbers.

    Args:
        batch_dim: Which dimension counts the examples, from the front, where inputs of
            `nn.LayerNorm` and `nn.RMSNorm` have several before `normalized_shape`: 1 for
            sequence-first models.
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> layer = Layer("norm", nn.LayerNorm(3), ("weight", "bias"))
        >>> call = LayerCall(torch.randn(5, 3), torch.ones(5, 3))
        >>> curvature = Norm()
        >>> samples = curvature.samples(layer, [call], num_terms=5, first=True)
        >>> curvature.factors(layer, samples)["U"].total.shape
        torch.Size([3, 2, 2])

    References:
        Ollivier 2015, "Riemannian metrics for neural networks I: feedforward networks",
        arXiv:1303.0818, the unitwise Fisher metric.
        Osawa et al. 2020, "Scalable and Practical Natural Gradient for Large-Scale Deep Learning",
        arXiv:2002.06015, the blocks of batch normalisation.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"U"})
    default_basis: ClassVar[str | Mapping[str, Any] | None] = "unitwise"

    batch_dim: int = attrs.field(default=0, validator=whole(0))
    chunk_bytes: int = attrs.field(default=DEFAULT_CHUNK_BYTES, validator=whole(1))

    def unsupported(self, module: nn.Module) -> str | None:
        """Return why this module cannot be preconditioned exactly, or `None` when it can."""
        if isinstance(module, nn.SyncBatchNorm):
            return (
                "SyncBatchNorm normalises by statistics of all ranks, which one rank cannot see; "
                "use nn.BatchNorm, whose statistics are those of one rank, or nn.GroupNorm"
            )
        reason = reason_against(module, (*TRAILING, *CHANNELS))
        return None if reason is not None and stand_in(module) is not None else reason

    def same_call(self, module: nn.Module, other: nn.Module) -> bool:
        """Return whether two modules compute the same, their running statistics included."""
        names = ("running_mean", "running_var")
        shared = all(module._buffers.get(name) is other._buffers.get(name) for name in names)
        alike = repr(_of_torch(module)) == repr(_of_torch(other))  # a stranger may not show its eps
        return shared and alike and super().same_call(module, other)

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Join scale and shift into `[C, 1, 2]`, or the scale alone into `[C, 1, 1]`."""
        columns = [tensors[name].reshape(-1, 1) for name in layer.parameters]
        return torch.stack(columns, -1)

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        columns = zip(layer.tensors().items(), matrix.unbind(-1), strict=True)
        return {name: column.reshape(like.shape) for (name, like), column in columns}

    def blank(self, layer: Layer) -> LayerCall:
        """Return a call on zeros: one example of two positions where the layer has positions."""
        module, weight = _of_torch(layer.module), layer.tensors()["weight"]
        shape = tuple(weight.shape)
        if isinstance(module, CHANNELS):
            shape = (*shape, *[1] * (_axes(module) - 1), 2)
        zeros = torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)
        return LayerCall(zeros, torch.zeros_like(zeros))

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """View the calls as samples, a group for each unit; several calls concatenate along T.

        Raises:
            CaptureError: The calls do not have the same number of examples, or an input has no
                dimension `batch_dim` to spare.
        """
        found = [self._call(layer, call) for call in calls]
        check_examples(layer, (call.examples for call in found))
        return NormSamples(
            found,
            shift=layer.bias,
            num_terms=num_terms,
            first=first,
            chunk_bytes=self.chunk_bytes,
        )

    def unfold(self, layer: Layer, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return the call by example; none for batch normalisation, whose statistics are of all."""
        module: Any = _of_torch(layer.module)
        if isinstance(module, TRAILING):
            return unfolded(layer, call, order, len(module.normalized_shape), self.batch_dim)
        return () if isinstance(module, BATCH) else order.parts(call)

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sum and count of U."""
        assert isinstance(samples, NormSamples)
        return {"U": samples.unit_moment()}

    def _call(self, layer: Layer, call: LayerCall) -> NormCall:
        module: Any = _of_torch(layer.module)
        inputs, gradient = (self._batched(layer, each) for each in (call.inputs, call.gradient))
        training = layer.module.training if call.training is None else call.training
        statistics = None
        if isinstance(module, (*BATCH, *INSTANCE)):
            dtype = working_dtype(inputs.dtype, gradient.dtype)
            running = _running(module, inputs, dtype, training=training)
            if running is not None:
                statistics = running
            elif isinstance(module, BATCH):
                statistics = self._batch_statistics(inputs, dtype, module.eps)
        return NormCall(module, inputs, gradient, call.scale, statistics)

    def _batched(self, layer: Layer, tensor: Tensor) -> Tensor:
        module: Any = _of_torch(layer.module)
        if isinstance(module, TRAILING):
            return examples_first(layer, tensor, len(module.normalized_shape), self.batch_dim)
        unbatched = isinstance(module, INSTANCE) and tensor.ndim == _axes(module) + 1
        return tensor.unsqueeze(0) if unbatched else tensor

    def _batch_statistics(
        self, inputs: Tensor, dtype: torch.dtype, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return mean and inverse deviation of each channel over all examples and positions."""
        dims = (0, *range(2, inputs.ndim))
        mean = variance = torch.zeros((), dtype=dtype, device=inputs.device)
        seen = 0
        for part in self._parts(inputs, dtype):
            its_variance, its_mean = torch.var_mean(part, dims, correction=0, keepdim=True)
            seen += len(part)
            share, step = len(part) / seen, its_mean - mean
            variance = variance + (its_variance - variance) * share
            variance = variance + step.square() * (share * (1 - share))
            mean = mean + step * share
        return mean, (variance + eps).rsqrt()

    def _parts(self, inputs: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the inputs in the precision `dtype`, at once where they have it already."""
        size = max(1, math.prod(inputs.shape[1:]) * dtype.itemsize)
        step = max(1, len(inputs) if inputs.dtype == dtype else self.chunk_bytes // size)
        for start in range(0, len(inputs), step):
            yield inputs[start : start + step].to(dtype)


def _of_torch(module: nn.Module) -> nn.Module:
    """Return the module, or the layer of torch that normalises as it does.

    A subclass with a forward of its own may normalise otherwise than its base.
    """
    covered = (*TRAILING, *CHANNELS)
    if type(module) in covered or reason_against(module, covered) is None:
        return module
    found = stand_in(module)
    return module if found is None else found


def _axes(module: nn.Module) -> int:
    """Return how many axes the images of a layer have; one where any number will do."""
    classes = zip(BATCH, INSTANCE, strict=True)
    return next((axes for axes, each in enumerate(classes, 1) if isinstance(module, each)), 1)


def _running(
    module: Any, inputs: Tensor, dtype: torch.dtype, *, training: bool
) -> tuple[Tensor, Tensor] | None:
    """Return running mean and inverse deviation where the call normalised by these."""
    tracked = isinstance(module, BATCH) or module.track_running_stats
    if training or not tracked or module.running_mean is None:
        return None
    shape = (-1, *[1] * (inputs.ndim - 2))
    variance = module.running_var.detach().to(dtype)
    inverse = (variance + module.eps).rsqrt().view(shape)
    return module.running_mean.detach().to(dtype, copy=True).view(shape), inverse


@lru_cache
def default_eps(dtype: torch.dtype) -> float:
    """Return what torch adds to the mean square of `nn.RMSNorm` without eps, for this input.

    For half precision, versions of torch differ between its own epsilon and that of float32. So the
    layer is asked: one number x becomes `x / sqrt(x^2 + eps)`.
    """
    x = torch.tensor([2.0**-14], dtype=dtype, device="cpu")
    y = F.rms_norm(x, (1,))
    found = float((x.double() / y.double()).square() - x.double().square())
    candidates = (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return min(candidates, key=lambda eps: abs(math.log(eps / found)))


@hookimpl
def kfactk_curvatures() -> dict[str, type[Norm]]:
    """Provide `norm`."""
    return {"norm": Norm}
