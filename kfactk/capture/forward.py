"""One followed forward, and the backward passes over it that stream each layer's gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from kfactk.capture.outputs import RecordedOutput
from kfactk.capture.replay import RecordedReplay
from kfactk.capture.torch_modes import full_precision
from kfactk.capture.user_hooks import UserHooks
from kfactk.errors import CaptureError
from kfactk.samples import LayerCall
from kfactk.stages import Layer
from kfactk.validation import input_modified_message

Sink = Callable[[Layer, list[LayerCall]], None]
"""Takes all calls of one layer in one forward, once the gradients of all of them have arrived."""

HALF_SCALE = 2.0**10
"""Factor of a Fisher loss where float16 gradients flow; it is divided out in float32."""


@attrs.frozen(eq=False)
class RecordedCall:
    """One call of a followed layer: its input, and what its outputs looked like.

    A record does not hold the edges of the outputs: a hook on a node that leads back to the node
    would never be freed.

    Args:
        layer: The layer.
        inputs: The module's input, detached.
        version: The version of the input at the call.
        outputs: The followed tensors of the output: one, but for modules whose calls run again.
        training: Whether the module was in training mode.
        module: Which of the layer's sites was called.
        arguments: The other tensors that it was given, by name, detached.
        argument_versions: Their versions at the call.
        replay: Runs the call again, where the layer lies inside the module; `None` elsewhere.
        folded: Where the input `[N T, d]` is a view of a tensor `[N, T, d]`, N; else 0.
        place: Its place in the order of the forward's followed calls.
        ones: Where the input is a jet, what the bias was multiplied by in each of its rows.
    """

    layer: Layer
    inputs: Tensor
    version: int
    outputs: tuple[RecordedOutput, ...]
    training: bool = True
    module: nn.Module | None = None
    arguments: Mapping[str, Tensor] = attrs.field(factory=dict)
    argument_versions: Sequence[int] = ()
    replay: RecordedReplay | None = None
    folded: int = 0
    place: int | None = None
    ones: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the output."""
        return self.outputs[0].dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the output."""
        return self.outputs[0].shape

    def without_gradient(self) -> list[LayerCall]:
        """Return the layer's calls with gradients of zeros."""
        self.check()
        zeros = torch.zeros((), dtype=self.dtype, device=self.inputs.device).expand(self.shape)
        return [self._call(zeros, 1.0)]

    def calls(self, gradients: Mapping[int, Tensor], scale: Tensor | float) -> list[LayerCall]:
        """Return the layer's calls with their gradients: one, or those inside the module's.

        Args:
            gradients: What arrived at the edges of the outputs, by their number.
            scale: What gradients are to be multiplied by.

        Raises:
            CaptureError: The input, or another argument, was modified in place since; or a call
                that runs again cannot, or gives something else.
        """
        gradients = {number: each.detach() for number, each in gradients.items()}
        if self.replay is None:
            return [self._call(self.outputs[0].read(gradients[0]), scale)]
        inside = self.replay.calls(self.layer.part, gradients)
        return [attrs.evolve(call, scale=scale, place=self.place) for call in inside]

    def check(self) -> None:
        """Check that the input, and other arguments, are those of the call.

        Raises:
            CaptureError: One was modified in place since.
        """
        if self.replay is not None:
            self.replay.check()
        elif versions((self.inputs, *self.arguments.values())) != [
            self.version,
            *self.argument_versions,
        ]:
            raise CaptureError(input_modified_message(self.layer.name))

    def _call(self, gradient: Tensor, scale: Tensor | float) -> LayerCall:
        return LayerCall(
            self.inputs,
            gradient,
            scale,
            self.training,
            self.module,
            self.arguments,
            place=self.place,
            ones=self.ones,
        )


@attrs.frozen(eq=False)
class TracedCall:
    """A recorded call and its place in the graph of the forward.

    Args:
        record: The call.
        edges: Where the gradients of its outputs arrive.
        sources: The nodes that made its inputs.
        parameters: The tensors that the module used as the layer's parameters.
    """

    record: RecordedCall
    edges: tuple[GradientEdge, ...]
    sources: frozenset[Node]
    parameters: tuple[Tensor, ...]

    @property
    def tops(self) -> dict[Node, dict[int, int]]:
        """The nodes of its outputs; for each, the outputs' numbers there, by those in the record.

        An output that is the same tensor as another is left out.
        """
        found: dict[Node, dict[int, int]] = {}
        for number, edge in enumerate(self.edges):
            here = found.setdefault(edge.node, {})
            if edge.output_nr not in here.values():
                here[number] = edge.output_nr
        return found


class Forward:
    """One followed forward of the root.

    Args:
        output: What the root returned.
        batch: Its arguments by name.
        calls: Calls of followed layers, in order.
        layers: All followed layers, also those without a call.
        updated: For each module that the forward has written to, its buffers.
        user: What the user asked to see of gradients; `None` for nothing.
        again: Makes the same call of the root once more.
        root: The module that was called; `None` where nobody knows.
    """

    def __init__(
        self,
        output: Any,
        batch: Mapping[str, Any],
        calls: list[TracedCall],
        layers: Sequence[Layer],
        updated: Sequence[list[Tensor]] = (),
        user: UserHooks | None = None,
        again: Callable[[], Any] | None = None,
        root: nn.Module | None = None,
    ) -> None:
        self.output, self.batch = output, dict(batch)
        self.again, self.root = again, root
        self.calls, self.layers = calls, layers
        self.updated = updated
        self.user = UserHooks() if user is None else user

    @contextlib.contextmanager
    def unnoticed(self, outputs: Iterable[Tensor]) -> Iterator[None]:
        """Surround passes over the graph of `outputs`: the user sees nothing of them.

        Kept gradients stay as they are, hooks on gradients do not run, and buffers, which
        checkpointed parts write to when they run again, are restored.
        """
        for output in outputs:
            if output.retains_grad:
                self.user.retain(output)
        # Kernels of batch normalisation do not count their writes; its counter of batches does.
        before = [(own, versions(own), [each.clone() for each in own]) for own in self.updated]
        try:
            with self.user.left_alone():
                yield
        finally:
            with torch.no_grad():
                for own, counts, values in before:
                    if versions(own) != counts:
                        torch._foreach_copy_(own, values)

    def inputs(
        self, names: Set[str], starts: Sequence[Tensor] | None
    ) -> dict[Layer, list[LayerCall]]:
        """Return the calls of these layers that lead to one of `starts`, without gradients.

        Args:
            names: Names of the layers.
            starts: Tensors that the model made; `None` for all calls.
        """
        found: dict[Layer, list[LayerCall]] = {}
        reached = set().union(*map(nodes_behind, starts)) if names and starts else set()
        for call in self.calls:
            layer = call.record.layer
            leads = starts is None or not reached.isdisjoint(call.tops)
            if layer.name in names and leads:
                found.setdefault(layer, []).extend(call.record.without_gradient())
        return found

    def count_examples(self, examples: int, interleaved: Set[Layer] = frozenset()) -> None:
        """Tell calls that run again how many examples the output has.

        Args:
            examples: Their number.
            interleaved: The layers to whose modules row r of example `r % examples` is given.
        """
        for call in self.calls:
            if call.record.replay is not None:
                replay = call.record.replay
                replay.count_examples(examples, interleaved=call.record.layer in interleaved)

    def outside(self, layers: Set[Layer]) -> Forward:
        """Return the same forward in which gradients of these layers are those of their modules."""
        if not layers:
            return self
        calls = [
            attrs.evolve(call, record=attrs.evolve(call.record, replay=None))
            if call.record.layer in layers
            else call
            for call in self.calls
        ]
        return Forward(self.output, self.batch, calls, self.layers, self.updated, self.user)

    def leaving(self, layers: Sequence[Layer]) -> Forward:
        """Return the same forward as if these layers had never been followed."""
        calls = [call for call in self.calls if call.record.layer not in layers]
        rest = [layer for layer in self.layers if layer not in layers]
        return Forward(self.output, self.batch, calls, rest, self.updated, self.user)

    def without(self, names: Set[str]) -> Forward:
        """Return the same forward in which the calls of these layers are not followed."""
        kept = [call for call in self.calls if call.record.layer.name not in names]
        if len(kept) == len(self.calls):
            return self
        return Forward(self.output, self.batch, kept, self.layers, self.updated, self.user)

    @property
    def scale(self) -> float:
        """The factor of a loss that keeps float16 gradients from underflow: a power of two."""
        return HALF_SCALE if any(call.record.dtype == torch.float16 for call in self.calls) else 1.0

    def run(self, loss: Tensor, start: Tensor, sink: Sink) -> None:
        """Run one backward pass of our own.

        `.grad` is untouched and no weight gradient is computed. Only nodes on the way to followed
        edges run. Of these, autograd is asked by name only for those from which no other is
        reachable, so that it holds one layer's gradient at a time.

        Args:
            loss: The Fisher loss, which hangs on `start`.
            start: Part of the forward's graph.
            sink: Takes each layer as its gradients arrive.
        """
        arrivals = Arrivals(self.calls, sink, 1.0 / self.scale)
        tops = [(call, node) for call in self.calls for node in call.tops]
        ends = _leafmost(start, {node for _, node in tops})
        below = {top: _edge_below(*top) for top in tops if top[1] in ends}
        asked = [
            (call, number, GradientEdge(node, output))
            for (call, node), edge in below.items()
            if edge is None
            for number, output in call.tops[node].items()
        ]
        through = list(dict.fromkeys(edge for edge in below.values() if edge is not None))
        if not below:
            return
        handles = [arrivals.watch(*top) for top in tops if below.get(top, top) is not None]
        try:
            found = _grad(loss * self.scale, [*(edge for _, _, edge in asked), *through])
            with torch.no_grad():
                arrivals.complete_all(
                    (call.record, number, gradient)
                    for (call, number, _), gradient in zip(asked, found, strict=False)
                )
        finally:
            for handle in handles:
                handle.remove()


class Arrivals:
    """Collects the gradients of one pass, and hands on a layer when its last one has come.

    Args:
        calls: The calls that the pass may reach.
        sink: Takes the layers, each with its calls in the order of the forward.
        scale: What gradients are multiplied by.
    """

    def __init__(self, calls: Sequence[TracedCall], sink: Sink, scale: float) -> None:
        self._sink, self._scale = sink, scale
        self._waiting: dict[Layer, int] = {}
        self._numbers = {call.record: number for number, call in enumerate(calls)}
        for call in calls:
            layer = call.record.layer
            self._waiting[layer] = self._waiting.get(layer, 0) + 1
        self._gradients: dict[RecordedCall, dict[int, Tensor]] = {}
        self._nodes: dict[RecordedCall, set[Node]] = {}
        self._here: dict[Layer, dict[int, list[LayerCall]]] = {}

    def watch(self, call: TracedCall, node: Node) -> torch.utils.hooks.RemovableHandle:
        """Read the gradients of one call that arrive at a node, as autograd reaches it."""
        record, nodes, numbers = call.record, frozenset(call.tops), call.tops[node]

        def prehook(gradients: tuple[Tensor | None, ...]) -> None:
            found = {number: gradients[output] for number, output in numbers.items()}
            self._take(record, found)
            if len(nodes) > 1 and record not in self._nodes:
                self._nodes[record] = set(filter(torch._C._will_engine_execute_node, nodes))
            waiting = self._nodes.get(record, {node})
            waiting.discard(node)
            if not waiting:
                devices = {each.device.type for each in found.values() if each is not None}
                with torch.no_grad(), full_precision(devices):
                    self._complete(record)

        return node.register_prehook(prehook)

    def complete_all(self, gradients: Iterable[tuple[RecordedCall, int, Tensor | None]]) -> None:
        """Take what autograd returned after the pass, and hand on the rest of the layers.

        Calls without a gradient add nothing.

        Args:
            gradients: For an output of a call, by its number, its gradient if it has one.
        """
        for record, number, gradient in gradients:
            self._take(record, {number: gradient})
        for record in list(self._gradients):
            self._complete(record)
        for layer in list(self._here):
            self._hand_on(layer)

    def _take(self, record: RecordedCall, gradients: Mapping[int, Tensor | None]) -> None:
        there = {number: each for number, each in gradients.items() if each is not None}
        if there:
            record.check()
            self._gradients.setdefault(record, {}).update(there)

    def _complete(self, record: RecordedCall) -> None:
        """Read a call of which all gradients have come."""
        gradients, layer = self._gradients.pop(record, {}), record.layer
        if gradients:
            calls = record.calls(gradients, self._scale)
            self._here.setdefault(layer, {})[self._numbers[record]] = calls
        self._waiting[layer] -= 1
        if self._waiting[layer] == 0 and layer in self._here:
            self._hand_on(layer)

    def _hand_on(self, layer: Layer) -> None:
        calls = self._here.pop(layer)
        self._sink(layer, [each for number in sorted(calls) for each in calls[number]])


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """Return how often each tensor was written to."""
    return [tensor._version for tensor in tensors]


def nodes_behind(start: Tensor) -> set[Node]:
    """Return the nodes that `start` was made by."""
    found: set[Node] = set()
    stack = [start.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack.extend(child for child, _ in node.next_functions)
    return found


def leads_to(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    """Return whether one of the others was made from a tensor."""
    node = tensor.grad_fn
    return any(node in nodes_behind(other) for other in others if other.grad_fn is not node)


def _leafmost(start: Tensor, followed: set[Node]) -> set[Node]:
    """Return the followed nodes reachable from `start` from which no other one is reachable."""
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


def _edge_below(call: TracedCall, top: Node) -> GradientEdge | None:
    """Return an edge that autograd is asked for, so that it runs a node of a call.

    A call that runs again needs its parameters, and `fully_shard` has them gathered only while the
    backward runs. So its gradient is read when its node runs, also where it is the last one.

    Returns:
        `None` where autograd is asked for the gradient of the call itself.
    """
    if call.record.replay is None:
        return None
    for node, number in top.next_functions:
        if node is not None and "AccumulateGrad" not in node.name():
            return GradientEdge(node, number)
    return None


def _check_node(node: Node) -> None:
    """Refuse a node that must not run in a pass of our own.

    Raises:
        CaptureError: It is the node by which DistributedDataParallel marks the first backward of a
            static graph.
    """
    wrapper = getattr(node, "ddp_weakref", None)
    if wrapper is not None and getattr(wrapper(), "static_graph", False):
        raise CaptureError(
            "a part of the bound model is wrapped in DistributedDataParallel with "
            "static_graph=True, whose first backward must be your own. Wrap the bound model "
            "instead of a part of it, bind the wrapped module, or leave static_graph out."
        )


def _grad(loss: Tensor, edges: list[GradientEdge]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "through the graph a second time" in str(error):
            raise CaptureError(
                "the forward's graph is gone, because its backward ran already. Call "
                "optimizer.observe() between forward and backward."
            ) from error
        if "use_reentrant=True" not in str(error):
            raise
        raise CaptureError(
            "the model uses reentrant activation checkpointing, which cannot give gradients of "
            "layers. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        ) from error
