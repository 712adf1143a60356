"""What the gradient of a loss at the output says of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NONE = 0.01
"""Share of the gradient up to which its sum is zero but for rounding, also in bfloat16."""
SOME = 0.1
"""Share from which it is not zero, also where a small penalty is added to the loss."""
NORMALISED = 0.05
"""Logarithm of the sum of exponentials up to which logits are logarithms of probabilities."""
FACTOR = 1.3
"""Factors below it are let pass: those of smoothed labels and of weights of classes."""
EQUAL = 0.03
"""Relative deviation of numbers that are equal but for rounding, also in bfloat16."""
TOLD = 1e-3
"""Entries below this share of the largest one are rounding errors, perhaps."""

MOST = 2**16
"""Most entries that are looked at one by one."""


def summed_share(gradient: Tensor, dim: int) -> float:
    """Return the norm of the sum over a dimension, relative to that of the gradient.

    Shifting all logits changes no softmax, so that its losses have 0. Of entries that do not
    cancel, it is about 1, whatever the number of classes.

    Example:
        >>> summed_share(torch.tensor([[1.0, -1.0], [0.5, -0.5]]), 1)
        0.0
    """
    return float(gradient.sum(dim).norm() / gradient.norm())


def softmax_axes(gradient: Tensor) -> list[int]:
    """Return the dimensions over which a gradient sums to zero, but for the first."""
    long = (dim for dim in range(1, gradient.ndim) if gradient.shape[dim] > 1)
    return [dim for dim in long if summed_share(gradient, dim) < NONE]


def factor_between(probabilities: Tensor, gradient: Tensor) -> float | None:
    """Return k with `gradient = (p - y) / k` for labels y of 0 and 1, where there is one.

    Entries with a positive gradient have y = 0, the others y = 1. So each tells k, and all must
    agree; with soft labels, or weights, they do not.

    Args:
        probabilities: p, of the shape of the gradient.
        gradient: The gradient at the logits.
    """
    least, every = TOLD * gradient.abs().max(), -(-gradient.numel() // MOST)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    p, g = (each.flatten()[::every].to(wide) for each in (probabilities, gradient))
    large = g.abs() > least
    p, g = p[large], g[large]
    if not len(g):
        return None
    found = torch.where(g > 0, p / g, (p - 1) / g)
    low, middle, high = found.quantile(found.new_tensor([0.05, 0.5, 0.95])).tolist()
    return middle if high - low <= EQUAL * middle else None


def scale_fault(k: float | None, loss: str, shape: Sequence[int], entries: int) -> str | None:
    """Return what is wrong with a loss whose gradient is 1/k of that of the summed loss.

    Args:
        k: What `factor_between` found.
        loss: Name of the summed loss.
        shape: Shape of the output.
        entries: Number of entries of a term that a mean may divide by too; 1 for none.
    """
    if k is None or 1 / FACTOR < k < FACTOR:
        return None
    start = (
        f"the gradient of your loss at the output (shape {list(shape)}) is {1 / k:.3g} times that "
        f"of {loss} summed over its terms. Curvature is measured on this gradient, and is "
        f"{1 / k**2:.3g} times what it should be. "
    )
    if entries > 1 and abs(k / entries - 1) <= EQUAL:
        return (
            f"{start}Your loss is a mean over all entries, not over terms: give the likelihood "
            "divisor='entries'"
        )
    return (
        f"{start}Give reduction='sum' or reduction='mean', as your loss reduces. Where terms are "
        "masked, name the labels by the likelihood's targets=. Where you divide the loss by k "
        "micro-batches, use fisher='mc', or divide the damping by k^2"
    )
