"""Forward hooks and gradient edges: what flows through each followed layer in one forward, and the gradients that come back.

Nothing is attached to a layer between forwards. On a forward for which `due` names layers, hooks are put on them before it and taken off
after it; each call of a layer leaves its input and the autograd edge of its output. Gradients are then read at these edges, streamed
layer by layer, either in a backward pass of our own (`Forward.run`) or in the user's (`Forward.listen`). Code that torch.compile has
made ignores hooks put on later, so forwards that are expected to be due run eagerly.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfactk.capture.forward import Forward, RecordedCall
from kfactk.capture.support import check_engine, is_distributed, tensor_parallel
from kfactk.capture.torch_modes import (
    EAGERNESS,
    in_transform_or_backward,
    run_uncompiled,
    save_unchanged,
    skip_frame,
)
from kfactk.errors import CombinationError
from kfactk.stages import Layer


class ModelHooks:
    """Hooks on the root of one model.

    Args:
        root: The module whose forwards count.
        due: Asked at the start of each forward: the layers to follow; `None` when the forward is of no interest.
        completed: Called with a followed forward right after it.
        evaluation: Whether forwards in evaluation mode are followed too.
    """

    def __init__(
        self,
        root: nn.Module,
        due: Callable[[], Sequence[Layer] | None],
        completed: Callable[[Forward], None],
        *,
        evaluation: bool,
    ) -> None:
        self.root = root
        self._forward: Callable[..., Any] | None = None
        self._due, self._completed, self._evaluation = due, completed, evaluation
        self._calls: list[tuple[RecordedCall, GradientEdge]] = []
        self._layer_handles: list[torch.utils.hooks.RemovableHandle] = []
        self._depth, self._thread = 0, 0
        self._token = object()
        skip_frame(RootHook.__call__)
        before, after = RootHook(self, "before"), RootHook(self, "after")
        self._handles = [
            root.register_forward_pre_hook(before, with_kwargs=True),
            root.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        self._finalizer = weakref.finalize(
            self, _let_go, self._token, self._handles, self._layer_handles
        )
        self._finalizer.atexit = False

    def close(self) -> None:
        """Take every hook away; may be called twice."""
        self._finalizer()

    def expect(self, due: bool) -> None:
        """Between forwards: whether the next one is due. What is compiled runs eagerly from then on until it is told otherwise."""
        if due and self._finalizer.alive:
            EAGERNESS.force(self._token)
        else:
            EAGERNESS.release(self._token)

    def reset(self) -> None:
        """Between forwards: clean up after one that was interrupted (Ctrl-C runs no hook)."""
        self._depth = 0
        self._calls = []
        _remove(self._layer_handles)

    def before(self, compiled: bool) -> None:
        """Root pre-hook: attach to the layers that are due, unless they run as compiled code, which would trace the hooks."""
        if self._depth and self._thread != threading.get_ident():
            return
        if self._depth and _within(self.root) and self.root.forward == self._forward:
            self._depth += 1
            return
        if self._depth:  # that one was interrupted, or another method in the forward's place (Lightning's training_step) calls the forward
            self.reset()
        if not self._counts():
            return
        check_engine()
        layers = self._due()
        if layers is None or compiled:
            return
        self._depth, self._thread, self._forward = 1, threading.get_ident(), self.root.forward
        self._calls = []
        for layer in layers:
            hook = LayerHook(self._calls, layer)
            self._layer_handles.append(
                layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True)
            )

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Root hook: detach, and hand the forward on. `output` is None when the forward raised."""
        if not self._depth or self._thread != threading.get_ident():
            return
        self._depth -= 1
        if self._depth:
            return
        _remove(self._layer_handles)
        calls, self._calls = self._calls, []
        if output is not None:
            with save_unchanged():
                self._completed(Forward(output, _named(module, args, kwargs), calls))

    def _counts(self) -> bool:
        return (
            torch.is_grad_enabled() and (self.root.training or self._evaluation) and not in_transform_or_backward()
        )


class RootHook:
    """A bound hook that knows its capture weakly, and is inert once copied or pickled with the model."""

    def __init__(self, capture: ModelHooks | None, when: str) -> None:
        self._capture = None if capture is None else weakref.ref(capture)
        self._when = when

    def _run(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any = None,
        *,
        compiled: bool,
    ) -> None:
        """Run as a forward pre-hook or a forward hook."""
        capture = None if self._capture is None else self._capture()
        if capture is None or capture.root is not module:
            return
        if self._when == "before":
            capture.before(compiled)
        else:
            capture.after(module, args, kwargs, output)

    __call__ = run_uncompiled(
        _run,
        "kfactk's hooks on the model break the graph: bind the compiled model, or compile without fullgraph=True",
    )

    def __deepcopy__(self, memo: dict[int, Any]) -> RootHook:
        return RootHook(None, self._when)

    def __reduce__(self) -> tuple[Any, ...]:
        return RootHook, (None, self._when)


class LayerHook:
    """Leaves a record of each call of one layer; inert once copied or pickled."""

    def __init__(
        self, calls: list[tuple[RecordedCall, GradientEdge]] | None, layer: Layer | None
    ) -> None:
        self._calls, self._layer, self._thread = calls, layer, threading.get_ident()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Run as a forward hook."""
        if self._calls is None or self._layer is None or self._thread != threading.get_ident():
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        if any(map(is_distributed, (output, *module.parameters(recurse=False)))):
            raise CombinationError(tensor_parallel(self._layer.name))
        inputs = (args[0] if args else kwargs["input"]).detach()
        self._calls.append(
            (
                RecordedCall(self._layer, inputs, inputs._version, output.dtype, output.shape),
                get_gradient_edge(output),
            )
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHook:
        return LayerHook(None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerHook, (None, None)


def _within(root: nn.Module) -> bool:
    """Whether a call of the root is inside another one; if not, the one that was followed was interrupted (Ctrl-C runs no hook)."""
    calls, frame = 0, sys._getframe()
    while frame.f_back is not None and calls < 2:
        frame = frame.f_back
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is root
    return calls >= 2


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (
        TypeError,
        ValueError,
    ):  # a forward without a readable signature: names of keyword arguments only
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


def weakly(owner: weakref.ref[Any], method: str) -> Callable[..., Any]:
    """A call of the owner's method that does not keep it alive, and does nothing once it is gone."""

    def call(*args: Any) -> Any:
        alive = owner()
        return None if alive is None else getattr(alive, method)(*args)

    return call
