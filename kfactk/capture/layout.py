"""Which example of the output each row of a layer belongs to.

Three passes run on the first examples of the output, at random weights. In the second and the third
each example weighs more, by factors of its own. The gradient of a row that acts on one example
alone grows by its factors. That of a row that acts on several, as behind BatchNorm or in a graph,
does not: it belongs to none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import attrs
import torch
from torch import Tensor

from kfactk.samples import LayerCall, Samples
from kfactk.validation import batch_dim_message, folded_message, looped_message

WIDTH = 8
"""Numbers that are kept of each row's gradient."""
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.03
NOBODY = -1
"""The owner of a row that acts on no example, or on several."""


@attrs.frozen(eq=False)
class Marks:
    """By how much the first examples weigh more, from 1 to 2.

    Args:
        factors: Of the second and of the third pass, `[2, k]`, each different for each example.
        tolerance: Relative size of rounding errors that is let pass.
    """

    factors: Tensor
    tolerance: float

    @classmethod
    def of(cls, examples: int, dtypes: Iterable[torch.dtype], device: torch.device) -> Marks:
        """Return the marks of an output.

        Args:
            examples: Number of examples of the output.
            dtypes: Of the gradients; half precisions tell fewer factors apart.
            device: Where.
        """
        half = any(dtype.itemsize < 4 for dtype in dtypes)
        count = min(examples, 16 if half else 256)
        generator = torch.Generator("cpu").manual_seed(0)
        order = torch.randperm(count, generator=generator, device="cpu")
        steps = torch.stack([torch.arange(count, device="cpu"), order]).to(device, torch.float32)
        return cls(1 + steps / max(count, 1), HALF_TOLERANCE if half else TOLERANCE)


@attrs.frozen(eq=False)
class LayoutSketch:
    """What is kept of a layer's gradients in one of the passes.

    Args:
        rows: For each call, `[rows, WIDTH]`.
        dims: By dimension of the first call's output that is as long as there are examples, and not
            the first, `[examples, WIDTH]`.
    """

    rows: tuple[Tensor, ...]
    dims: dict[int, Tensor]


def sketch(
    samples_of: Callable[[LayerCall], Samples], calls: Sequence[LayerCall], examples: int
) -> LayoutSketch:
    """Return the sketch of a layer's calls, each with its gradient.

    Args:
        samples_of: Returns a call of the layer as samples.
        calls: Its calls in one pass.
        examples: Number of examples of the output.
    """
    each = [samples_of(call) for call in calls]
    gradient = calls[0].gradient
    whole = gradient.shape[:-1].numel() == each[0].examples * each[0].positions
    dims = {
        dim: _projected(gradient, dim)
        for dim in range(1, gradient.ndim - 1)
        if whole and gradient.shape[dim] == examples
    }
    return LayoutSketch(tuple(_projected(samples.gradients(), -3) for samples in each), dims)


def layout_fault(name: str, passes: Sequence[LayoutSketch], marks: Marks) -> str:
    """Return why the examples of a layer are not those of the output; "" where they are.

    Args:
        name: The layer's name.
        passes: The sketches of the three passes.
        marks: The marks of the second and the third.
    """
    if marks.factors.shape[1] < 2:
        return ""
    calls = [owners(each, marks) for each in zip(*(one.rows for one in passes), strict=True)]
    first = calls[0]
    for other in calls[1:]:
        if len(other) == len(first):
            differ = (other != first) & (other != NOBODY) & (first != NOBODY)
            if bool(differ.any()):
                return looped_message(name, len(calls))
    for found in calls:
        known = found[found != NOBODY]
        if len(known) and (most := int(torch.bincount(known).max())) > 1:
            return folded_message(name, most, len(found))
    if bool((first != NOBODY).any()):
        return ""
    for dim in passes[0].dims:
        found = owners([one.dims[dim] for one in passes], marks)
        known = found != NOBODY
        there = torch.arange(len(found), device=found.device)
        if bool(known.any()) and bool((found == there)[known].all()):
            return batch_dim_message(name, dim)
    return ""


def owners(passes: Sequence[Tensor], marks: Marks) -> Tensor:
    """Return the example that each row belongs to, or `NOBODY`, `[rows]`.

    Args:
        passes: What is kept of the three passes, `[rows, WIDTH]` each.
        marks: The marks of the second and the third.

    Example:
        >>> marks = Marks(torch.tensor([[1.0, 1.5], [1.5, 1.0]]), 1e-3)
        >>> rows = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0], [1.0, 1.0]])
        >>> second = rows * torch.tensor([[1.5], [1.0], [1.0], [1.2]])
        >>> third = rows * torch.tensor([[1.0], [1.0], [1.5], [1.3]])
        >>> owners([rows, second, third], marks)
        tensor([ 1, -1,  0, -1])
    """
    plain, *marked = passes
    size = plain.square().sum(-1)
    good, numbers = size > 0, []
    for found, factors in zip(marked, marks.factors, strict=True):
        ratio = (plain * found).sum(-1) / size
        off = (found - ratio.unsqueeze(-1) * plain).square().sum(-1)
        distance, number = (ratio.unsqueeze(-1) - factors).abs().min(-1)
        good &= (off <= marks.tolerance**2 * size) & (distance <= marks.tolerance)
        numbers.append(number)
    return torch.where(good & (numbers[0] == numbers[1]), numbers[0], NOBODY)


def _projected(tensor: Tensor, dim: int) -> Tensor:
    """Return random products of what a tensor holds at each index of a dimension.

    Of a single number there is none: any two are parallel.
    """
    flat = tensor.movedim(dim, 0).flatten(1).float()
    if flat.shape[1] == 1:
        return flat.new_zeros(len(flat), WIDTH)
    generator = torch.Generator(flat.device).manual_seed(0)
    shape = flat.shape[1], WIDTH
    return flat @ torch.randn(shape, generator=generator, device=flat.device, dtype=flat.dtype)
