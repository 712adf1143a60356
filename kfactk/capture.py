"""Forward hooks and gradient edges: what flows through each followed layer in one forward, and the gradients that come back.

Nothing is attached to a layer between forwards. On a forward for which `due` names layers, hooks are put on them before it and taken off
after it; each call of a layer leaves its input and the autograd edge of its output. Gradients are then read at these edges, streamed
layer by layer, either in a backward pass of our own (`Forward.run`) or in the user's (`Forward.listen`). Code that torch.compile has
made ignores hooks put on later, so forwards that are expected to be due run eagerly.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kfactk.ambient import EAGERNESS, full_precision, leave_alone, opaque, saved_as_is, uncounted
from kfactk.errors import CaptureError, CombinationError, OptionError
from kfactk.samples import Use
from kfactk.stages import Layer

Sink = Callable[[Layer, list[Use]], None]
"""Takes all uses of one layer in one forward, once the gradients of all of them have arrived."""

HALF_SCALE = 2.0**10
"""What a Fisher loss is multiplied by where float16 gradients flow; taken out again in float32."""


@attrs.frozen(eq=False)
class Record:
    """One call of a followed layer: its input (detached, and its version then) and the dtype of its output.

    It must not hold the edge: a hook on a node that leads back to the node would never be freed.
    """

    layer: Layer
    inputs: Tensor
    version: int
    dtype: torch.dtype

    def use(self, gradient: Tensor, scale: Tensor | float) -> Use:
        """This call with the gradient of its output."""
        if self.inputs._version != self.version:
            raise CaptureError(overwritten(self.layer.name))
        return Use(self.inputs, gradient.detach(), scale)


class Forward:
    """One followed forward of the root.

    Args:
        output: What the root returned.
        batch: Its arguments by name.
        calls: Calls of followed layers, in order, each with the autograd edge of its output.
    """

    def __init__(self, output: Any, batch: Mapping[str, Any], calls: list[tuple[Record, GradientEdge]]) -> None:
        self.output, self.batch = output, dict(batch)
        self.calls = calls

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
        handles = [arrivals.watch(record, edge) for record, edge in self.calls if edge.node not in ends]
        try:
            with torch.autocast(start.device.type, enabled=False):
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

    def __init__(self, calls: Sequence[tuple[Record, GradientEdge]], sink: Sink, scale: float | Callable[[], Tensor | float]) -> None:
        self._sink, self._scale = sink, scale
        self._waiting: dict[str, int] = {}
        for record, _ in calls:
            self._waiting[record.layer.name] = self._waiting.get(record.layer.name, 0) + 1
        self._here: dict[str, list[Use]] = {}
        self._layers = {record.layer.name: record.layer for record, _ in calls}

    def watch(self, record: Record, edge: GradientEdge) -> torch.utils.hooks.RemovableHandle:
        number = edge.output_nr

        def prehook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[number]
            if gradient is not None:
                with torch.no_grad(), full_precision([gradient.device.type]):
                    self.arrived(record, gradient)

        return edge.node.register_prehook(prehook)

    def arrived(self, record: Record, gradient: Tensor) -> None:
        name = record.layer.name
        if self._waiting.get(name, 0) == 0:  # a second backward through the same graph
            return
        scale = self._scale() if callable(self._scale) else self._scale
        self._here.setdefault(name, []).append(record.use(gradient, scale))
        self._waiting[name] -= 1
        if self._waiting[name] == 0:
            self._sink(record.layer, self._here.pop(name))

    def finish(self) -> None:
        """Hand on the layers some of whose uses do not reach the loss: those uses have zero gradient and add nothing."""
        for name, uses in list(self._here.items()):
            self._waiting[name] = 0
            self._sink(self._layers[name], uses)
        self._here.clear()


def _leafmost(start: Tensor, followed: set[Node]) -> set[Node]:
    """The followed nodes reachable from `start` below which (towards the leaves) there is no other followed node."""
    holds: dict[Node, bool] = {}
    ends: set[Node] = set()
    opened: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(start.grad_fn, False)] if start.grad_fn is not None else []
    while stack:
        node, done = stack.pop()
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


class Capture:
    """Hooks on the root of one model.

    Args:
        root: The module whose forwards count.
        due: Asked at the start of each forward: the layers to follow; `None` when the forward is of no interest.
        completed: Called with a followed forward right after it.
        evaluation: Whether forwards in evaluation mode are followed too.
    """

    def __init__(
        self, root: nn.Module, due: Callable[[], Sequence[Layer] | None], completed: Callable[[Forward], None], *, evaluation: bool
    ) -> None:
        self.root = root
        self._due, self._completed, self._evaluation = due, completed, evaluation
        self._calls: list[tuple[Record, GradientEdge]] = []
        self._layer_handles: list[torch.utils.hooks.RemovableHandle] = []
        self._depth = 0
        self._token = object()
        leave_alone(RootHook.__call__)
        before, after = RootHook(self, "before"), RootHook(self, "after")
        self._handles = [
            root.register_forward_pre_hook(before, with_kwargs=True),
            root.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        self._finalizer = weakref.finalize(self, _let_go, self._token, self._handles, self._layer_handles)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Take every hook away; may be called twice."""
        self._finalizer()

    def expect(self, due: bool) -> None:
        """Between forwards: whether the next one is due. What is compiled runs eagerly from then on until it is told otherwise."""
        if due and self._finalizer.alive:
            EAGERNESS.hold(self._token)
        else:
            EAGERNESS.release(self._token)

    def reset(self) -> None:
        """Between forwards: clean up after one that was interrupted (Ctrl-C runs no hook)."""
        self._depth = 0
        self._calls = []
        _remove(self._layer_handles)

    def before(self, compiled: bool) -> None:
        """Root pre-hook: attach to the layers that are due, unless they run as compiled code, which would trace the hooks."""
        if self._depth or not self._counts():
            self._depth += bool(self._depth)
            return
        layers = self._due()
        if layers is None or compiled:
            return
        self._depth = 1
        self._calls = []
        for layer in layers:
            hook = LayerHook(self._calls, layer)
            self._layer_handles.append(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Root hook: detach, and hand the forward on. `output` is None when the forward raised."""
        if not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        _remove(self._layer_handles)
        calls, self._calls = self._calls, []
        if output is not None:
            with saved_as_is():
                self._completed(Forward(output, _named(module, args, kwargs), calls))

    def _counts(self) -> bool:
        return torch.is_grad_enabled() and (self.root.training or self._evaluation) and not uncounted()


class RootHook:
    """A bound hook that knows its capture weakly, and is inert once copied or pickled with the model."""

    def __init__(self, capture: Capture | None, when: str) -> None:
        self._capture = None if capture is None else weakref.ref(capture)
        self._when = when

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None, *, compiled: bool) -> None:
        """Run as a forward pre-hook or a forward hook."""
        capture = None if self._capture is None else self._capture()
        if capture is None or capture.root is not module:
            return
        if self._when == "before":
            capture.before(compiled)
        else:
            capture.after(module, args, kwargs, output)

    __call__ = opaque(_run, "kfactk's hooks on the model break the graph: bind the compiled model, or compile without fullgraph=True")

    def __deepcopy__(self, memo: dict[int, Any]) -> RootHook:
        return RootHook(None, self._when)

    def __reduce__(self) -> tuple[Any, ...]:
        return RootHook, (None, self._when)


class LayerHook:
    """Leaves a record of each call of one layer; inert once copied or pickled."""

    def __init__(self, calls: list[tuple[Record, GradientEdge]] | None, layer: Layer | None) -> None:
        self._calls, self._layer = calls, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Run as a forward hook."""
        if self._calls is None or self._layer is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        inputs = (args[0] if args else kwargs["input"]).detach()
        self._calls.append((Record(self._layer, inputs, inputs._version, output.dtype), get_gradient_edge(output)))

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHook:
        return LayerHook(None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerHook, (None, None)


def overwritten(layer: str) -> str:
    """What to tell a user whose code changed a layer's input while its statistics still had to be taken."""
    return (
        f"the input of layer {layer!r} was modified in place after its forward, so its statistics would be wrong. Refill input buffers "
        "only after step(), or hand the model a copy."
    )


def model_output(output: Any) -> Tensor:
    """The tensor that holds the likelihood's parameters: the output itself, its `.logits`, its "logits" item, or its first element.

    Raises:
        CaptureError: None of these; says what was returned and how to tell (`output=`).
    """
    if isinstance(output, Tensor):
        return output
    found: Any = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    elif found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise CaptureError(
        f"the model returned {type(output).__name__}{keys}, in which no logits were found. Say where they are: "
        "build(..., output=lambda out: out['prediction'])."
    )


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a forward without a readable signature: names of keyword arguments only
        return dict(kwargs)
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


def _let_go(token: object, *handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    EAGERNESS.release(token)
    _remove(*handles)


def _remove(*handles: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    for group in handles:
        for handle in group:
            handle.remove()
        if isinstance(group, list):
            group.clear()


def followable(model: nn.Module) -> nn.Module:
    """The module whose forwards can be followed: the model, or what DistributedDataParallel wraps.

    Raises:
        CombinationError: Its layers cannot be seen by hooks.
        OptionError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"bind() wants the model, a torch.nn.Module, and was given {type(model).__name__}; parameters go to params=.")
    if isinstance(model, nn.DataParallel):
        raise CombinationError("nn.DataParallel copies the model at each forward, so no hook sees its layers; use DistributedDataParallel.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CombinationError("a scripted or traced model has no hooks on its layers; bind the nn.Module it was made from.")
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert isinstance(inner, nn.Module)
    return inner


def weakly(owner: weakref.ref[Any], method: str) -> Callable[..., Any]:
    """A call of the owner's method that does not keep it alive, and does nothing once it is gone."""

    def call(*args: Any) -> Any:
        alive = owner()
        return None if alive is None else getattr(alive, method)(*args)

    return call
