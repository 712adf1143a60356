"""Which dimension of an output holds the classes, where only one can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor, nn

from kfactk.capture.forward import Forward, TracedCall
from kfactk.capture.guard import graph_edges, parameter_nodes
from kfactk.capture.outputs import OutputView

COPIES = {"AliasBackward0", "CloneBackward0", "ToCopyBackward0"}
"""Nodes between the last layer and the output that change neither values nor shapes."""


@attrs.frozen
class ClassAxis:
    """Where the classes are, and what tells.

    Args:
        axis: The dimension: 1, 2, ..., or -1 for the last.
        teller: What tells, in words.
    """

    axis: int
    teller: str


def find_class_axis(
    likelihood: Any, output: Tensor, batch: Mapping[str, Any], forward: Forward
) -> ClassAxis | None:
    """Return the one dimension in which the classes can be; `None` where that cannot be told.

    In this order:

    1. The argument that the likelihood names as `targets` or `weights` has the shape of the output
       without its classes.
    2. The layer that made the output. A convolution has its channels in dimension 1. A linear layer
       has its outputs last; but it may have been applied along time, so integer arguments of the
       forward (tokens, labels) must have the shape of the output without its last dimension.
    3. All of these that say anything say the same, and a linear layer that made the output does not
       say otherwise: integer arguments of the shape of the output without one dimension, which hold
       a class of that dimension each; the `logits` of an object, in three dimensions, which have
       their classes last; the vocabulary of the model, where it has a head of that size.

    Args:
        likelihood: A likelihood stage.
        output: Its output.
        batch: The arguments of the forward, and what the likelihood may ask for besides.
        forward: The forward.
    """
    if output.ndim < 3 or not attrs.has(type(likelihood)):
        return None
    names = (getattr(likelihood, option, None) for option in ("targets", "weights"))
    for name in names:
        given = batch.get(name) if isinstance(name, str) else None
        if isinstance(given, Tensor) and (axis := _left_out(output, given)) is not None:
            return ClassAxis(_written(axis, output), f"the shape of {name!r} tells")
    made = next((call for call in forward.calls if _made(call, output)), None)
    linear = made is not None and made.record.layer.anchor.ndim == 2
    if made is not None and not linear:
        return ClassAxis(1, "the last layer tells")
    last, integers = output.ndim - 1, _integers(batch)
    if linear and any(each.shape == output.shape[:-1] for each in integers.values()):
        return ClassAxis(-1, "the last layer tells")
    found = label_axes(likelihood, output, batch)
    if output.ndim == 3 and _is_logits(output, forward.output):
        found["the three dimensions of `.logits` tell"] = last
    if (axis := _vocabulary_axis(output, forward.root)) is not None:
        found["the vocabulary of the model tells"] = axis
    axes = set(found.values()) | ({last} if linear else set())
    if not found or len(axes) > 1:
        return None
    return ClassAxis(_written(axes.pop(), output), next(iter(found)))


def likely_class_axis(output: Tensor) -> int:
    """Return the dimension to try where nothing tells: that of language models, or of images.

    Example:
        >>> import torch
        >>> [likely_class_axis(torch.ones(*shape)) for shape in ([2, 7, 5], [2, 5, 7, 7])]
        [-1, 1]
    """
    return -1 if output.ndim == 3 else 1


def _written(axis: int, output: Tensor) -> int:
    return -1 if axis == output.ndim - 1 else axis


def _left_out(output: Tensor, terms: Tensor) -> int | None:
    """Return the one dimension that an output has more than its terms; `None` for none, several."""
    shape = [*output.shape]
    fits = [
        axis for axis in range(1, output.ndim) if shape[:axis] + shape[axis + 1 :] == [*terms.shape]
    ]
    return fits[0] if len(fits) == 1 else None


def _integers(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    }


def label_axes(likelihood: Any, output: Tensor, batch: Mapping[str, Any]) -> dict[str, int]:
    """Return the dimensions in which labels have the classes of an output, each by what tells.

    Labels are integer arguments of the shape of the output without that dimension, all of which are
    classes. Zeros and ones may be a mask, and tell nothing.

    Example:
        >>> import torch
        >>> given = {"y": torch.tensor([[0, 2]]), "mask": torch.tensor([[1, 0]])}
        >>> label_axes(None, torch.ones(1, 2, 3), given)
        {"the shape of 'y' tells": 2}
    """
    found, ignored = {}, getattr(likelihood, "ignore_index", None)
    for name, value in _integers(batch).items():
        axis = _left_out(output, value) if output.ndim > 2 else None
        if axis is None:
            continue
        labels = value[value >= 0]
        labels = labels[labels != ignored] if isinstance(ignored, int) else labels
        largest = int(labels.max()) if labels.numel() else 0
        if 1 < largest < output.shape[axis]:
            found[f"the shape of {name!r} tells"] = axis
    return found


def _is_logits(output: Tensor, returned: Any) -> bool:
    """Return whether an output is what an object that a model returned has as `logits`."""
    return not isinstance(returned, Tensor) and getattr(returned, "logits", None) is output


def _vocabulary_axis(output: Tensor, root: nn.Module | None) -> int | None:
    """Return the one dimension that is as long as a vocabulary with a head of that size.

    The head is a linear layer, or the table of the embedding itself.
    """
    modules = [] if root is None else list(root.modules())
    tables = [each for each in modules if isinstance(each, nn.Embedding)]
    widths = {each.out_features for each in modules if isinstance(each, nn.Linear)}
    sizes = {table.num_embeddings for table in tables}
    axes = [axis for axis in range(1, output.ndim) if output.shape[axis] in sizes]
    if len(axes) != 1:
        return None
    size = output.shape[axes[0]]
    there = size in widths or any(
        _multiplies(table.weight, output) for table in tables if table.num_embeddings == size
    )
    return axes[0] if there else None


def _multiplies(table: Tensor, output: Tensor) -> bool:
    """Return whether an output was made from a table otherwise than by looking it up."""
    ends = parameter_nodes([table])
    return any(
        child in ends and not parent.name().startswith("Embedding")
        for parent, child in graph_edges([output])
    )


def _made(call: TracedCall, output: Tensor) -> bool:
    """Return whether an output is that of a call, as it is, or a copy of it."""
    recorded, nodes = call.record.outputs[0], {edge.node for edge in call.edges}
    if recorded.shape != output.shape:
        return False
    base = output._base if output._is_view() else None
    if base is not None and base.grad_fn is not None:
        return base.grad_fn in nodes and recorded.view == OutputView.of(output, base)
    node = output.grad_fn
    while node is not None and node.name() in COPIES:
        node = node.next_functions[0][0]
    return node in nodes and recorded.view is None
