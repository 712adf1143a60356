"""What reaches the parameters of a layer past its recorded calls, in the user's own backward.

The guard reads the graph of a forward, which ends at the model's output. A loss may use a layer
again after it: call a tied head, or read its weight. Only the backward knows that. In it the
gradient g of a parameter is the sum of what its parents in the graph give. Those inside recorded
calls are known, with their sum c. The remainder

    r = g - c

is zero but for rounding where the calls hold all. A penalty on the parameter w itself has a
remainder as well, and is no part of the curvature: r in the span of w and sign(w), as of L2 and L1,
is let pass.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Collection, Mapping, Sequence

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfactk.capture.forward import TracedCall
from kfactk.capture.guard import inner_nodes, parameter_nodes
from kfactk.capture.torch_modes import full_precision
from kfactk.stages import Layer

CAST = "ToCopyBackward0"
"""The node of a weight that autocast has cast, and keeps for all calls: also those of the loss."""
PENALTY = 0.01
"""Share of a remainder that is no multiple of w or sign(w), below which it is of a penalty."""


@attrs.define(eq=False)
class Point:
    """Where the gradient of one parameter arrives.

    Args:
        layer: Its layer.
        parameter: The parameter.
        task: The backward that `total` is of.
        number: How many gradients of recorded calls it has brought so far.
        total: Their sum; the gradient itself where it is one.
        size: The sum of their norms, where they are several.
    """

    layer: Layer
    parameter: Tensor
    task: int = -1
    number: int = 0
    total: Tensor | None = None
    size: Tensor | float = 0.0

    def add(self, gradient: Tensor) -> None:
        """Add what a recorded call gives, in the backward that runs now."""
        self._begin()
        self.number += 1
        if self.total is None:
            self.total = gradient
            return
        if self.number == 2:
            self.size = self.total.norm()
            self.total = self.total + gradient  # what autograd holds stays as it is
        else:
            self.total += gradient
        self.size = self.size + gradient.norm()

    def remainder(self, gradient: Tensor) -> Tensor | None:
        """Return the products that tell what else there was; `None` where there was nothing.

        Args:
            gradient: The whole gradient.
        """
        self._begin()
        known, size, number = self.total, self.size, self.number
        self._clear()
        if known is not None and number == 1 and _same_memory(known, gradient):
            return None
        parameter, wide = self.parameter.detach(), torch.promote_types(gradient.dtype, torch.float)
        whole = gradient.to(wide)
        rest = whole if known is None else whole - known.to(wide)
        if known is not None and number == 1:
            size = known.norm()
        there = parameter.shape == rest.shape and parameter.untyped_storage().size()
        w = parameter.to(wide) if there else torch.zeros_like(rest)
        s = w.sign()
        pairs = ((rest, rest), (rest, w), (rest, s), (w, w), (w, s), (s, s))
        noise = (whole.norm() + size) * (number + 1) * torch.finfo(gradient.dtype).eps
        return torch.stack([(a * b).sum() for a, b in pairs] + [noise]).float()

    def _begin(self) -> None:
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self._clear()
            self.task = task

    def _clear(self) -> None:
        self.number, self.total, self.size = 0, None, 0.0


class Remainders:
    """Compares the gradients of parameters with those of recorded calls, until it found one.

    Attributes:
        done: Whether a remainder was found, so that nothing is to be told any more.
    """

    def __init__(self) -> None:
        self.done = False
        self._points: dict[Node, Point] = {}
        self._found: list[tuple[Layer, Tensor]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(self, calls: Sequence[TracedCall]) -> None:
        """Wait for backwards over one forward.

        Args:
            calls: Its recorded calls.
        """
        if self.done:
            return
        tops = {node for call in calls for node in call.tops}
        parents: dict[Node, dict[int, Point]] = {}
        for call in calls:
            leaves = [p for p in call.parameters if p.requires_grad and p.grad_fn is None]
            ends = {node: p for p in leaves for node in parameter_nodes([p])}
            inner = inner_nodes(call, set(ends), tops) or set()
            casts = {
                node: ends[node.next_functions[0][0]]
                for node in inner
                if node.name() == CAST and node.next_functions[0][0] in ends
            }
            new = {n: p for n, p in {**ends, **casts}.items() if n not in self._points}
            for node, parameter in new.items():
                self._add(node, Point(call.record.layer, parameter))
            own = ends.keys() | casts.keys()
            for node in inner | set(call.tops):
                if node in casts and node not in new:
                    continue  # of an earlier forward too
                for place, (child, _) in enumerate(node.next_functions):
                    if child in own:  # a fused node has parameters of several layers
                        parents.setdefault(node, {})[place] = self._points[child]
        for node, given in parents.items():
            self._handles.append(node.register_hook(functools.partial(_give, given)))

    def forget(self, layers: Collection[Layer] | None = None) -> None:
        """Drop what was found of these layers (`None`: of all)."""
        self._found = [each for each in self._found if layers is not None and each[0] not in layers]

    def finish(self) -> list[Layer]:
        """End watching; return the layers with a remainder, in the order of their first calls."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        ran = dict.fromkeys(point.layer for point in self._points.values())
        self._points.clear()
        found, self._found = self._found, []
        if not found:
            return []
        device = found[0][1].device
        products = torch.stack([each.to(device) for _, each in found]).tolist()
        told = {layer for (layer, _), each in zip(found, products, strict=True) if _tells(*each)}
        self.done = bool(told)
        return [layer for layer in ran if layer in told]

    def take(self, point: Point, gradient: Tensor) -> None:
        """Take the whole gradient of a parameter, as it arrives."""
        if gradient.is_sparse or getattr(point.parameter, "_backward_hooks", None):
            return  # a hook of the user's may have changed it
        with torch.no_grad(), full_precision([gradient.device.type]):
            products = point.remainder(gradient.detach())
        if products is not None:
            self._found.append((point.layer, products))

    def _add(self, node: Node, point: Point) -> None:
        self._points[node] = point
        self._handles.append(node.register_prehook(_Arrival(self, point)))


class _Arrival:
    """Tells of the whole gradient of a parameter; it does not keep who is told alive."""

    def __init__(self, remainders: Remainders, point: Point) -> None:
        self._remainders, self._point = weakref.ref(remainders), point

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Run as a prehook of a node."""
        remainders, [gradient] = self._remainders(), gradients
        if remainders is not None and gradient is not None:
            remainders.take(self._point, gradient)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are one: nothing was added to it while it was held."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def _give(
    given: Mapping[int, Point],
    gradients: tuple[Tensor | None, ...],
    _: tuple[Tensor | None, ...],
) -> None:
    """Run as a hook of a node inside a recorded call, on what it gives to parameters."""
    for place, point in given.items():
        gradient = gradients[place]
        if gradient is not None:
            with torch.no_grad():
                point.add(gradient.detach())


def _tells(rr: float, rw: float, rs: float, ww: float, ws: float, ss: float, noise: float) -> bool:
    """Return whether a remainder is more than rounding, and not a multiple of w and sign(w).

    Args:
        rr, rw, rs, ww, ws, ss: Inner products of the remainder, w and sign(w).
        noise: The size of rounding errors.
    """
    if not 0 < rr < float("inf"):
        return False
    spans = [rw**2 / ww if ww else 0.0, rs**2 / ss if ss else 0.0]
    if (area := ww * ss - ws**2) > 1e-6 * ww * ss:
        spans.append((rw**2 * ss - 2 * rw * rs * ws + rs**2 * ww) / area)
    left = math.sqrt(max(0.0, rr - max(spans)))
    return left > max(noise, PENALTY * math.sqrt(rr))
