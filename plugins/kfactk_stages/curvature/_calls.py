"""What curvatures of several kinds of layers do with the calls of one layer in one forward."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kfactk import CaptureError, Layer


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
            f"has shape {tuple(tensor.shape)}; give the curvature a batch_dim that counts its "
            "examples"
        )
    return tensor.movedim(batch_dim, 0)


def check_examples(layer: Layer, examples: Iterable[int]) -> None:
    """Check that all calls of a layer have the same number of examples.

    Raises:
        CaptureError: They have not.
    """
    sizes = sorted(set(examples))
    if len(sizes) > 1:
        raise CaptureError(
            f"layer '{layer.name}' was called several times in one forward with different numbers "
            f"of examples {sizes}, so it cannot be told which rows belong to one example; call it "
            "with the examples in the same dimension each time, or leave it out of `params`"
        )


def scaled(tensor: Tensor, scale: Tensor | float) -> Tensor:
    """Return the tensor times the scale of its call; itself where that is 1."""
    return tensor if isinstance(scale, float) and scale == 1 else tensor * scale
