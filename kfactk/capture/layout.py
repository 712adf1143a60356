"""Which example of the output each row of a layer belongs to.

Passes run on the output at random weights. In the first all examples weigh the same. In each of the
others an example weighs more, by the factor of one digit of its number. The gradient of a row that
acts on one example alone grows by its factors, so that they spell the number. That of a row that
acts on several, as behind BatchNorm or in a graph, does not: it belongs to none.
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
DIGITS = 3
"""Passes besides the first; the same on all ranks, whatever their precisions."""
NOBODY = -1
"""The owner of a row that acts on no example, or on several."""


@attrs.frozen
class Marks:
    """By how much examples weigh more, from 1 to 2.

    Args:
        base: Number of different factors.
        digits: Number of passes besides the first.
        tolerance: Relative size of rounding errors that is let pass: far less than `1 / base`.
    """

    base: int
    digits: int
    tolerance: float

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype]) -> Marks:
        """Return the marks for gradients of these precisions."""
        half = any(dtype.itemsize < 4 for dtype in dtypes)
        return cls(8, DIGITS, 0.015) if half else cls(32, DIGITS, 1e-4)

    def factors(self, examples: int, device: torch.device) -> list[Tensor]:
        """Return the factors of each pass, `[examples]`."""
        numbers = torch.arange(examples, device=device)
        powers = (self.base**digit for digit in range(self.digits))
        found = [1 + (numbers // power % self.base).float() / self.base for power in powers]
        return [torch.ones_like(numbers, dtype=torch.float32), *found]

    @property
    def most(self) -> int:
        """Largest number of examples that can be told apart."""
        return int(self.base**self.digits)


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
    samples_of: Callable[[LayerCall], Samples],
    calls: Sequence[LayerCall],
    examples: int,
    *,
    joined: bool = False,
) -> LayoutSketch:
    """Return the sketch of a layer's calls, each with its gradient.

    Args:
        samples_of: Returns a call of the layer as samples.
        calls: Its calls in one pass.
        examples: Number of examples of the output.
        joined: Whether the calls are those of a module that gets all rows in its first dimension,
            and the layer lies inside.
    """
    if joined:
        return LayoutSketch(tuple(_projected(call.gradient, 0) for call in calls), {})
    each = [samples_of(call) for call in calls]
    gradient = calls[0].gradient
    whole = gradient.shape[:-1].numel() == each[0].examples * each[0].positions
    dims = {
        dim: _projected(gradient, dim)
        for dim in range(1, gradient.ndim - 1)
        if whole and gradient.shape[dim] == examples and gradient.shape[0] > 1
    }
    return LayoutSketch(tuple(_projected(samples.call_gradients(), -3) for samples in each), dims)


@attrs.frozen
class RowFinding:
    """What the passes told of the rows of a layer.

    Args:
        fault: Why its examples are not those of the output; "" where they are, or where that is not
            known.
        interleaved: Where all examples have equally many rows, whether row r belongs to example
            `r % N` and not to `r // T`; `None` elsewhere.
        known: Whether any of its rows belongs to one example alone.
        rows: The number of rows of each of its calls.
        every: Whether each of its calls has a row that belongs to one example alone.
    """

    fault: str = ""
    interleaved: bool | None = None
    known: bool = False
    rows: tuple[int, ...] = ()
    every: bool = False


def row_finding(
    name: str, passes: Sequence[LayoutSketch], marks: Marks, examples: int
) -> RowFinding:
    """Return which rows of a layer belong to which examples of the output.

    A fault must show in two examples at least, or in more rows than there are examples; and most
    rows must belong to one example each.

    Args:
        name: The layer's name.
        passes: The sketches of the passes.
        marks: Their marks.
        examples: Number of examples of the output.
    """
    rows = tuple(len(each) for each in passes[0].rows)
    if not 1 < examples <= marks.most:
        return RowFinding(rows=rows)
    calls = [owners(each, marks) for each in zip(*(one.rows for one in passes), strict=True)]
    told = [bool((found != NOBODY).any()) for found in calls]
    known = any(told)
    orders, fault = set[bool](), looped_message(name, len(calls)) if _differ(calls) else ""
    for found in calls:
        order, counts = regular_order(found, examples), torch.bincount(found[found != NOBODY])
        if order is not None:
            orders.add(order)
        elif not fault and (int((counts > 1).sum()) > 1 or int(counts.sum()) > examples):
            fault = folded_message(name, int(counts.max()), len(found))
    if len(orders) > 1:
        fault = fault or looped_message(name, len(calls))
    if not known:
        fault = _transposed(name, passes, marks)
    interleaved = orders.pop() if orders and not fault else None
    return RowFinding(fault, interleaved, known, rows, all(told))


def _transposed(name: str, passes: Sequence[LayoutSketch], marks: Marks) -> str:
    """Return that another dimension of a layer counts the examples; "" where none does."""
    for dim in passes[0].dims:
        found = owners([one.dims[dim] for one in passes], marks)
        inside = found != NOBODY
        there = torch.arange(len(found), device=found.device)
        if int(inside.sum()) > 1 and bool((found == there)[inside].all()):
            return batch_dim_message(name, dim)
    return ""


def regular_order(found: Tensor, examples: int) -> bool | None:
    """Return whether rows of examples are interleaved; `None` where they are in no regular order.

    Each example must have equally many rows, more than one, and one that is known to be its own.

    Args:
        found: The example of each row, or `NOBODY`, `[rows]`.
        examples: N.

    Example:
        >>> regular_order(torch.tensor([0, 0, 1, NOBODY]), 2)
        False
        >>> regular_order(torch.tensor([0, 1, 0, 1]), 2), regular_order(torch.tensor([0, 1]), 2)
        (True, None)
    """
    known = found != NOBODY
    if len(found) <= examples or len(found) % examples:
        return None
    if len(torch.bincount(found[known]).nonzero()) < examples:
        return None
    there = torch.arange(len(found), device=found.device)
    for interleaved, expected in (
        (False, there // (len(found) // examples)),
        (True, there % examples),
    ):
        if bool((found == expected)[known].all()):
            return interleaved
    return None


def _differ(calls: Sequence[Tensor]) -> bool:
    """Return whether the same row belongs to other examples in another call of a layer."""
    first, *others = calls
    differ = 0
    for other in others:
        if len(other) == len(first):
            both = (other != NOBODY) & (first != NOBODY)
            differ += int(((other != first) & both).sum())
    return differ > 1


def owners(passes: Sequence[Tensor], marks: Marks) -> Tensor:
    """Return the example that each row belongs to, or `NOBODY`, `[rows]`.

    All are nobody's where fewer than half of the rows that have a gradient are somebody's: these
    few are chance.

    Args:
        passes: What is kept of the passes, `[rows, WIDTH]` each.
        marks: Their marks.

    Example:
        >>> marks = Marks(base=2, digits=2, tolerance=1e-3)
        >>> rows = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0], [1.0, 1.0]])
        >>> low, high = [[1.5], [1.0], [1.0], [1.2]], [[1.0], [1.0], [1.5], [1.3]]
        >>> owners([rows, rows * torch.tensor(low), rows * torch.tensor(high)], marks)
        tensor([ 1, -1,  2, -1])
    """
    plain, *marked = passes
    size = plain.square().sum(-1)
    good, number = size > 0, torch.zeros_like(size)
    for digit, found in enumerate(marked):
        ratio = (plain * found).sum(-1) / size
        off = (found - ratio.unsqueeze(-1) * plain).square().sum(-1)
        step = ((ratio - 1) * marks.base).round()
        good = good & (off <= marks.tolerance**2 * size) & (step >= 0) & (step < marks.base)
        good = good & ((ratio - 1 - step / marks.base).abs() <= marks.tolerance)
        number = number + step.nan_to_num(0.0, 0.0, 0.0) * marks.base**digit
    few = 2 * good.sum() < (size > 0).sum()
    return torch.where(good & ~few, number, NOBODY).long()


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
