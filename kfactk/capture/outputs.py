"""Tensors that a module returned: what is kept of them, and where their gradients arrive."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@attrs.frozen
class OutputView:
    """How an output that is a view lies in the tensor it is a view of.

    An in-place operation on a view gives it another node, past which no gradient comes any more.
    Gradients are then read at the tensor below, which keeps its node.

    Args:
        size: Size of the tensor below.
        stride: Its strides.
        view_size: Size of the view.
        view_stride: Strides of the view.
        offset: Where the view begins, in elements.
    """

    size: torch.Size
    stride: tuple[int, ...]
    view_size: torch.Size
    view_stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, base: Tensor) -> OutputView:
        """Return how `view` lies in `base`."""
        offset = int(view.storage_offset() - base.storage_offset())
        return cls(base.size(), base.stride(), view.size(), view.stride(), offset)

    def read(self, gradient: Tensor) -> Tensor:
        """Return the part of the gradient of the tensor below that is the view's."""
        if gradient.stride() != self.stride:
            laid = torch.empty_strided(
                self.size, self.stride, dtype=gradient.dtype, device=gradient.device
            )
            gradient = laid.copy_(gradient)
        start = gradient.storage_offset() + self.offset
        return gradient.as_strided(self.view_size, self.view_stride, start)


@attrs.frozen
class RecordedOutput:
    """What one tensor that a module returned looked like.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        view: How it lies in the tensor whose gradient is read; `None` where that is itself.
        whole: Whether what arrives there holds also what comes through the module's other outputs,
            because one of them was computed from this one.
    """

    dtype: torch.dtype
    shape: torch.Size
    view: OutputView | None = None
    whole: bool = False

    def read(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the output from what arrived."""
        return gradient if self.view is None else self.view.read(gradient)


def traced_outputs(
    outputs: Sequence[Tensor], sources: Collection[Node]
) -> tuple[tuple[RecordedOutput, ...], tuple[GradientEdge, ...]]:
    """Return what is kept of the outputs of a call, and the edges at which gradients arrive.

    Args:
        outputs: They require gradients.
        sources: The nodes that made the inputs of the call.
    """
    bases = [each._base if each._is_view() else None for each in outputs]
    bases = [None if base is None or base.grad_fn is None else base for base in bases]
    pairs = list(zip(outputs, bases, strict=True))
    edges = tuple(get_gradient_edge(each if base is None else base) for each, base in pairs)
    below = _below(edges, sources) if len(edges) > 1 else set()
    records = tuple(
        RecordedOutput(
            each.dtype,
            each.shape,
            None if base is None else OutputView.of(each, base),
            (edge.node, edge.output_nr) in below,
        )
        for (each, base), edge in zip(pairs, edges, strict=True)
    )
    return records, edges


def _below(
    edges: Sequence[GradientEdge], sources: Collection[Node]
) -> set[tuple[Node | None, int]]:
    """Return the edges that lead into a node, inside the call, from one of its outputs."""
    found: set[tuple[Node | None, int]] = set()
    opened = {edge.node for edge in edges}
    stack = list(opened)
    while stack:
        for child, number in stack.pop().next_functions:
            if child is None or child in sources:
                continue
            found.add((child, number))
            if child not in opened:
                opened.add(child)
                stack.append(child)
    return found
