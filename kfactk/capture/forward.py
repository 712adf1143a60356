"""One followed forward, and the backward passes over it that stream each layer's gradient as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from kfactk.capture.torch_modes import full_precision
from kfactk.errors import CaptureError
from kfactk.samples import LayerCall
from kfactk.stages import Layer
from kfactk.validation import input_modified_message

Sink = Callable[[Layer, list[LayerCall]], None]
"""Takes all uses of one layer in one forward, once the gradients of all of them have arrived."""

HALF_SCALE = 2.0**10
"""What a Fisher loss is multiplied by where float16 gradients flow; taken out again in float32."""


@attrs.frozen(eq=False)
class RecordedCall:
    """One call of a followed layer: its input (detached, and its version then), and the dtype and shape of its output.

    It must not hold the edge: a hook on a node that leads back to the node would never be freed.
    """

    layer: Layer
    inputs: Tensor
    version: int
    dtype: torch.dtype
    shape: torch.Size

    def input(self) -> LayerCall:
        """This call without the gradient of its output: with zeros that take no memory."""
        if self.inputs._version != self.version:
            raise CaptureError(input_modified_message(self.layer.name))
        return LayerCall(
            self.inputs,
            torch.zeros((), dtype=self.dtype, device=self.inputs.device).expand(self.shape),
        )

    def call(self, gradient: Tensor, scale: Tensor | float) -> LayerCall:
        """This call with the gradient of its output."""
        if self.inputs._version != self.version:
            raise CaptureError(input_modified_message(self.layer.name))
        return LayerCall(self.inputs, gradient.detach(), scale)


class Forward:
    """One followed forward of the root.

    Args:
        output: What the root returned.
        batch: Its arguments by name.
        calls: Calls of followed layers, in order, each with the autograd edge of its output.
    """

    def __init__(
        self, output: Any, batch: Mapping[str, Any], calls: list[tuple[RecordedCall, GradientEdge]]
    ) -> None:
        self.output, self.batch = output, dict(batch)
        self.calls = calls

    def inputs(self, names: Set[str], start: Tensor) -> dict[Layer, list[LayerCall]]:
        """The calls of these layers that lead to `start`, without gradients."""
        found: dict[Layer, list[LayerCall]] = {}
        reached = _reachable(start) if names else set()
        for record, edge in self.calls:
            if record.layer.name in names and edge.node in reached:
                found.setdefault(record.layer, []).append(record.input())
        return found

    def without(self, names: Set[str]) -> Forward:
        """The same forward, these layers not followed."""
        kept = [call for call in self.calls if call[0].layer.name not in names]
        return self if len(kept) == len(self.calls) else Forward(self.output, self.batch, kept)

    @property
    def scale(self) -> float:
        """What a loss should be multiplied by to keep float16 gradients from underflow; a power of two."""
        return HALF_SCALE if any(record.dtype == torch.float16 for record, _ in self.calls) else 1.0

    def run(self, loss: Tensor, start: Tensor, sink: Sink) -> None:
        """One backward pass of our own over `loss`, which hangs on `start`, itself part of the forward's graph.

        `.grad` is untouched and no weight gradient is computed: only nodes on the way to followed edges run, and of these only the
        ones from which no other is reachable are asked for by name, so that autograd holds one layer's gradient at a time.
        """
        arrivals = _Arrivals(self.calls, sink, 1.0 / self.scale)
        ends = _leafmost(start, {edge.node for _, edge in self.calls})
        last = [(record, edge) for record, edge in self.calls if edge.node in ends]
        if not last:
            return
        handles = [
            arrivals.watch(record, edge) for record, edge in self.calls if edge.node not in ends
        ]
        try:
            gradients = _grad(loss * self.scale, [edge for _, edge in last])
            with torch.no_grad():
                for (record, _), gradient in zip(last, gradients, strict=True):
                    if gradient is not None:
                        arrivals.arrived(record, gradient)
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            arrivals.finish()

    def listen(self, sink: Sink, scale: Callable[[], Tensor | float]) -> Callable[[], None]:
        """Read the same gradients from the user's own backward, whenever it runs; `scale()` is asked then.

        Returns:
            To be called once that backward is over: hands on the layers some of whose uses it did not reach.
        """
        arrivals = _Arrivals(self.calls, sink, scale)
        for record, edge in self.calls:
            arrivals.watch(record, edge)
        return arrivals.finish


class _Arrivals:
    """Collects gradients of one pass and hands a layer on when the last of its uses has come."""

    def __init__(
        self,
        calls: Sequence[tuple[RecordedCall, GradientEdge]],
        sink: Sink,
        scale: float | Callable[[], Tensor | float],
    ) -> None:
        self._sink, self._scale = sink, scale
        self._waiting: dict[str, int] = {}
        for record, _ in calls:
            self._waiting[record.layer.name] = self._waiting.get(record.layer.name, 0) + 1
        self._here: dict[str, list[LayerCall]] = {}
        self._layers = {record.layer.name: record.layer for record, _ in calls}

    def watch(self, record: RecordedCall, edge: GradientEdge) -> torch.utils.hooks.RemovableHandle:
        number = edge.output_nr

        def prehook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[number]
            if gradient is not None:
                with torch.no_grad(), full_precision([gradient.device.type]):
                    self.arrived(record, gradient)

        return edge.node.register_prehook(prehook)

    def arrived(self, record: RecordedCall, gradient: Tensor) -> None:
        name = record.layer.name
        if self._waiting.get(name, 0) == 0:  # a second backward through the same graph
            return
        scale = self._scale() if callable(self._scale) else self._scale
        self._here.setdefault(name, []).append(record.call(gradient, scale))
        self._waiting[name] -= 1
        if self._waiting[name] == 0:
            self._sink(record.layer, self._here.pop(name))

    def finish(self) -> None:
        """Hand on the layers some of whose uses do not reach the loss: those uses have zero gradient and add nothing."""
        for name, calls in list(self._here.items()):
            self._waiting[name] = 0
            self._sink(self._layers[name], calls)
        self._here.clear()


def _reachable(start: Tensor) -> set[Node]:
    """The nodes that `start` was made by."""
    found: set[Node] = set()
    stack = [start.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack.extend(child for child, _ in node.next_functions)
    return found


def _leafmost(start: Tensor, followed: set[Node]) -> set[Node]:
    """The followed nodes reachable from `start` below which (towards the leaves) there is no other followed node."""
    holds: dict[Node, bool] = {}
    ends: set[Node] = set()
    opened: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(start.grad_fn, False)] if start.grad_fn is not None else []
    while stack:
        node, done = stack.pop()
        _check_node(node)
        children = [child for child, _ in node.next_functions if child is not None]
        if done:
            below = any(holds[child] for child in children)
            if node in followed and not below:
                ends.add(node)
            holds[node] = below or node in followed
        elif node not in opened:
            opened.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child in children if child not in opened)
    return ends


def _check_node(node: Node) -> None:
    """Refuse what must not run in a pass of ours.

    Raises:
        CaptureError: It is the node with which DistributedDataParallel marks the first backward pass of a static graph.
    """
    wrapper = getattr(node, "ddp_weakref", None)
    if wrapper is not None and getattr(wrapper(), "static_graph", False):
        raise CaptureError(
            "a part of the bound model is wrapped in DistributedDataParallel with static_graph=True, whose first backward pass must be "
            "your own. Wrap the bound model instead of a part of it, bind the module that is wrapped, or leave static_graph out."
        )


def _grad(loss: Tensor, edges: list[GradientEdge]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "through the graph a second time" in str(error):
            raise CaptureError(
                "the forward's graph is gone, because its backward ran already: call optimizer.observe() between forward and backward."
            ) from error
        if "use_reentrant=True" not in str(error):
            raise
        raise CaptureError(
            "the model uses reentrant activation checkpointing, which cannot give gradients of layers: call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        ) from error
