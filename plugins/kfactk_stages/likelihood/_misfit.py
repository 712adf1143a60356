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

SPREAD = 0.2
"""Relative spread of probabilities from which smoothed labels and a factor are told apart."""
RESOLVED = 1e3
"""Multiple of the rounding of a number from which its change is told to a thousandth."""
STEEPER = 0.02
"""Relative deviation from 1 of the inverse of a temperature that is told."""
CURVED = 1e-3
"""Share of logarithms of gradients that may be left where they are multiples of logits."""
BETTER = 0.01
"""Share of what fits of another kind leave, below which a temperature is certain."""
LEAST_ROWS = 16
"""Rows that are looked at, at least, where a row has many entries."""
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


def single_term(gradient: Tensor) -> bool:
    """Return whether one term at most has a gradient: its weight looks like a factor of the loss.

    Args:
        gradient: The gradient at the output, `[N, S, C]`.

    Example:
        >>> single_term(torch.zeros(1, 1, 3)), single_term(torch.ones(2, 1, 3))
        (True, False)
    """
    return int((gradient != 0).any(-1).sum()) < 2


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


def certain_factor(probabilities: Tensor, gradient: Tensor) -> float | None:
    """Return c with `gradient = c (p - y)` for labels of 0 and 1, where nothing else is like it.

    Where all p are nearly equal, smoothed labels are: they make the gradient smaller.

    Args:
        probabilities: p, of the shape of the gradient.
        gradient: The gradient at the logits.
    """
    k, there = factor_between(probabilities, gradient), gradient != 0
    if not k:
        return None
    every = -(-gradient.numel() // MOST)
    p = probabilities[there].flatten()[::every].float()
    low, middle, high = p.quantile(p.new_tensor([0.05, 0.5, 0.95])).tolist()
    return 1 / k if high - low > SPREAD * middle else None


def slope_between(means: Sequence[Tensor], gradients: Sequence[Tensor]) -> float | None:
    """Return c with `gradient = c (mean - y)`, by two of each with the same y, where there is one.

    So the gradient moves by c times what the mean does, whatever y is. Entries that move by hardly
    more than rounding tell nothing, nor do those without a gradient.

    Args:
        means: The mean of the likelihood, before a step and after it.
        gradients: The gradients, of the same shape.

    Example:
        >>> one, other, y = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3)
        >>> f"{slope_between((one, other), (4 * (one - y), 4 * (other - y))):.4f}"
        '4.0000'
    """
    every = -(-gradients[0].numel() // MOST)
    rounding = max(torch.finfo(each.dtype).eps for each in (*means, *gradients))
    (m, n), (g, h) = ([e.flatten()[::every].double() for e in each] for each in (means, gradients))
    moved, turned = n - m, h - g
    there = (g != 0) | (h != 0)
    least = torch.maximum(
        torch.maximum(m.abs(), n.abs()) * RESOLVED * rounding, TOLD * moved.abs().max()
    )
    there &= moved.abs() > least
    shown = turned.abs() > RESOLVED * rounding * torch.maximum(g.abs(), h.abs())
    found = (turned / moved)[there & shown]
    if 2 * len(found) <= int(there.sum()):
        return None
    low, middle, high = found.quantile(found.new_tensor([0.05, 0.5, 0.95])).tolist()
    return middle if middle > 0 and high - low <= EQUAL * middle else None


def temperature(logits: Tensor, gradient: Tensor) -> float | None:
    """Return T where the gradient is that of a cross entropy of `logits / T`, and T is not 1.

    With one label, the gradient at each other class is `r softmax(logits / T)` with a factor r of
    the row, whatever function of the label's probability the loss is. So its logarithm is a line in
    the logits, of slope 1 / T, with the same slope in all rows. With smoothed labels the gradient
    is a line in `softmax(logits)`, and with a bonus for the entropy it is `softmax(logits)` times
    such a line in the logits. For logits near each other all are nearly the same, and nothing is
    told. Nothing is told either where another class has a gradient of the label's sign.

    Args:
        logits: The logits, `[..., C]`.
        gradient: The gradient at them.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 3.0, 0.5], [2.0, 0.0, 1.0, -1.0]])
        >>> labels = torch.nn.functional.one_hot(torch.tensor([0, 0]), 4)
        >>> f"{temperature(logits, (logits / 2).softmax(-1) - labels):.4f}"
        '2.0000'
        >>> temperature(logits, logits.softmax(-1) - labels)
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    z, g = (each.reshape(-1, each.shape[-1]).to(wide) for each in (logits, gradient))
    every = -(-len(z) // max(LEAST_ROWS, MOST // z.shape[-1]))
    z, g = z[::every], g[::every]
    g = g * torch.where((g > 0).sum(-1) > (g < 0).sum(-1), 1.0, -1.0).unsqueeze(-1)
    ran, single = g.abs().amax(-1) > 0, (g < 0).sum(-1) == 1
    others = (g > TOLD * g.amax(-1, keepdim=True)) & single.unsqueeze(-1)
    others = others & z.isfinite() & (others.sum(-1, keepdim=True) > 2)
    if 2 * others.any(-1).sum() <= ran.sum():
        return None
    z = _centred(z.where(others, 0.0), others)
    logs = _centred(g.where(others, 1.0).log(), others)
    size, along = logs.square().sum(), (z * logs).sum()
    slope = float(along / z.square().sum())
    if not slope > 0 or abs(slope - 1) <= STEEPER:
        return None
    left = (logs - slope * z).where(others, 0.0).square().sum() / size
    u = (g.where(others, 0.0) / (g * others).sum(-1, keepdim=True)).nan_to_num(0.0)
    u = _centred(u * others.sum(-1, keepdim=True), others)
    ratio = _centred((logs - z).exp(), others)
    other = min(_off_lines(z.exp(), u, others), _off_lines(z, ratio, others)) / size
    return 1 / slope if left <= CURVED and left <= BETTER * other else None


def _off_lines(x: Tensor, y: Tensor, there: Tensor) -> Tensor:
    """Return the sum of squares of what a line in x, one for each row, leaves of a centred y."""
    x = _centred(x, there)
    slope = (x * y).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True).clamp(min=1e-30)
    return (y - slope * x).square().sum()


def _centred(tensor: Tensor, there: Tensor) -> Tensor:
    """Return what entries deviate from the mean of their row, 0 for those that are not there."""
    kept = tensor.where(there, 0.0)
    mean = kept.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return (kept - mean).where(there, 0.0)


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
