"""What curvatures of several kinds of layers do with the calls of one layer in one forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import attrs
import torch
from torch import Tensor

from kfactk import CaptureError, Layer, LayerCall, RowOrder, Samples
from kfactk.samples import working_dtype

Call = TypeVar("Call")


class CallSamples(Samples, Generic[Call]):
    """Samples that read their numbers from the calls of a layer when they are asked for them.

    Args:
        calls: The calls.
        tensors: Inputs and gradients of the calls, for their precision and their device.
        shape: `[*groups, N, T]`.
        d_in: Number of columns of the inputs.
        d_out: Number of columns of the gradients.
        num_terms, first, chunk_bytes: See `kfactk.Samples`.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        tensors: Sequence[Tensor],
        shape: Sequence[int],
        d_in: int,
        d_out: int,
        *,
        num_terms: Tensor | float,
        first: bool,
        chunk_bytes: int,
    ) -> None:
        dtype = working_dtype(*(tensor.dtype for tensor in tensors))
        super().__init__(
            torch.empty(*shape, d_in, dtype=dtype, device="meta"),
            torch.empty(*shape, d_out, dtype=dtype, device="meta"),
            num_terms=num_terms,
            first=first,
            chunk_bytes=chunk_bytes,
        )
        self.calls, self._device = tuple(calls), tensors[0].device

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self._device


def examples_first(layer: Layer, tensor: Tensor, features: int, batch_dim: int) -> Tensor:
    """Return the tensor with its examples in dimension 0.

    Args:
        layer: The layer, for the message.
        tensor: Inputs or gradients `[*, *features]`. Without `*` they are one example.
        features: Number of trailing dimensions of one row.
        batch_dim: Which dimension of `*` counts the examples, where there is more than one.

    Raises:
        CaptureError: `batch_dim` is not among the dimensions of `*`.
    """
    lead = tensor.ndim - features
    if lead == 0:
        return tensor.unsqueeze(0)
    if lead == 1:
        return tensor
    if batch_dim >= lead:
        raise CaptureError(
            f"batch_dim={batch_dim} points at the features of layer '{layer.name}', whose input "
            f"has shape {tuple(tensor.shape)}. Give the curvature a batch_dim that counts the "
            "examples."
        )
    return tensor.movedim(batch_dim, 0)


def unfolded(
    layer: Layer, call: LayerCall, order: RowOrder, features: int, batch_dim: int
) -> list[LayerCall]:
    """Return a call with its rows as `[N, T, *]`; its examples are then in `batch_dim`.

    Args:
        layer: The layer, for a message.
        call: Inputs and gradient have the same dimensions before their features.
        order: Which rows are whose.
        features: Number of trailing dimensions of one row.
        batch_dim: As for `examples_first`.
    """
    first = (examples_first(layer, x, features, batch_dim) for x in (call.inputs, call.gradient))
    inputs, gradient = (order.unfold(each).movedim(0, batch_dim) for each in first)
    return [attrs.evolve(call, inputs=inputs, gradient=gradient)]


def check_examples(layer: Layer, examples: Iterable[int]) -> None:
    """Check that all calls of a layer have the same number of examples.

    Raises:
        CaptureError: They have not.
    """
    sizes = sorted(set(examples))
    if len(sizes) > 1:
        raise CaptureError(
            f"layer '{layer.name}' was called several times in one forward, with different "
            f"numbers of examples {sizes}, so kfactk cannot tell which rows belong to one "
            "example. Call it with the examples in the same dimension each time, or train it by "
            f"its plain gradient: exclude=[{layer.path!r}]."
        )


def scaled(tensor: Tensor, scale: Tensor | float) -> Tensor:
    """Return the tensor times the scale of its call; itself where that is 1."""
    return tensor if isinstance(scale, float) and scale == 1 else tensor * scale
