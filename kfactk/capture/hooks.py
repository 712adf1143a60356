"""Forward hooks: the calls of each followed layer in one forward, with their gradient edges.

Nothing is attached to a layer between forwards. Hooks are put on the layers that are due before a
forward, and taken off after it. Each call of a layer leaves its input and the autograd edge of its
output. Gradients are then read at these edges, layer by layer: in a backward pass of our own
(`Forward.run`) or in the user's (`Forward.listen`). Compiled code ignores hooks that come later, so
forwards that are expected to be due run eagerly.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfactk.capture.entries import FORWARD, EntryHandle, EntryMethod
from kfactk.capture.forward import Forward, RecordedCall, TracedCall, versions
from kfactk.capture.outputs import traced_outputs
from kfactk.capture.replay import (
    CallContext,
    FollowedOutput,
    RecordedReplay,
    recorded_arguments,
    tensors_of,
)
from kfactk.capture.support import check_engine, is_distributed, tensor_parallel
from kfactk.capture.torch_modes import (
    EAGERNESS,
    in_transform_or_backward,
    run_uncompiled,
    save_unchanged,
    skip_frame,
)
from kfactk.capture.user_hooks import UserHooks
from kfactk.errors import CombinationError
from kfactk.jets import Jet, rows_of
from kfactk.stages import Layer, parameter_at

Handle = torch.utils.hooks.RemovableHandle | EntryHandle
"""Takes off what was put on a module."""


class ForwardListener(Protocol):
    """Whoever wants to know of the forwards of a model."""

    def _begin_forward(self) -> Sequence[Layer] | None:
        """Return the layers to follow in a forward; `None` where it is of no interest."""

    def _end_forward(self, forward: Forward) -> None:
        """Take a followed forward right after it."""


class ModelHooks:
    """Hooks on the root of one model.

    Args:
        root: The module whose forwards count.
        listener: Told of its forwards; it is not kept alive.
        evaluation: Whether forwards in evaluation mode are followed too.
        entries: Names of the methods whose calls are forwards, "forward" for a call of the root.
    """

    def __init__(
        self,
        root: nn.Module,
        listener: ForwardListener,
        *,
        evaluation: bool,
        entries: Sequence[str] = (FORWARD,),
    ) -> None:
        self.root = root
        self._listener = weakref.ref(listener)
        self._forward: Callable[..., Any] | None = None
        self._evaluation = evaluation
        self._layers: Sequence[Layer] = ()
        self._calls: list[TracedCall] = []
        self._buffers: list[tuple[list[Tensor], list[int]]] = []
        self._layer_handles: list[torch.utils.hooks.RemovableHandle] = []
        self._user = UserHooks()
        self._depth, self._thread = 0, 0
        self._last_hook: int | None = None
        self._handled: BaseException | None = None
        self._token = object()
        skip_frame(RootHook.__call__)
        self._handles: list[Handle] = []
        if FORWARD in entries:
            before, after = RootHook(self, "before"), RootHook(self, "after")
            last = root.register_forward_hook(after, with_kwargs=True, always_call=True)
            self._last_hook = last.id
            self._handles += [root.register_forward_pre_hook(before, with_kwargs=True), last]
        methods = [EntryMethod(root, name, self) for name in entries if name != FORWARD]
        self._handles += map(EntryHandle, methods)
        self._finalizer = weakref.finalize(
            self, _release, self._token, self._handles, self._layer_handles
        )
        self._finalizer.atexit = False

    def close(self) -> None:
        """Remove every hook; may be called twice."""
        self.reset()
        self._finalizer()

    def expect(self, due: bool) -> None:
        """Say between forwards whether the next one is due; compiled code then runs eagerly."""
        if due and self._finalizer.alive:
            EAGERNESS.force(self._token)
        else:
            EAGERNESS.release(self._token)

    def reset(self) -> None:
        """Clean up after a forward that was interrupted: Ctrl-C runs no hook."""
        self._depth = 0
        self._user.stop()
        _remove(self._layer_handles)
        layers, self._layers = self._layers, ()
        for layer in layers:
            for site in layer.sites:
                _remove_unhandled(site, self._calls)
        self._calls = []

    def before_entry(self, compiled: bool) -> None:
        """Begin a call of an entry; see `kfactk.capture.entries.EntryListener`."""
        self.before(compiled)

    def after_entry(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """End a call of an entry, likewise."""
        self.after(method, args, kwargs, output)

    def before(self, compiled: bool) -> None:
        """Attach to the layers that are due, unless compiled code would trace the hooks."""
        if self._depth and self._thread != threading.get_ident():
            return
        if self._depth and self._is_nested() and self.root.forward == self._forward:
            self._depth += 1
            return
        if self._depth:
            # The last forward was interrupted; or another method stands in for the forward
            # (Lightning's training_step) and calls it.
            self.reset()
        self._stay_last()
        if not self._counts():
            return
        check_engine()
        listener = self._listener()
        layers = None if listener is None else listener._begin_forward()
        if layers is None or compiled:
            return
        self._depth, self._thread, self._forward = 1, threading.get_ident(), self.root.forward
        self._handled = sys.exception()
        self._layers, self._calls = layers, []
        self._buffers = [(own, versions(own)) for own in map(_buffers, self.root.modules()) if own]
        self._user = UserHooks()
        self._user.start()
        sites: dict[nn.Module, list[Layer]] = {}
        for layer in layers:
            for site in layer.sites:
                sites.setdefault(site, []).append(layer)
        for site, inside in sites.items():
            hook = LayerHook(self._calls, inside)
            self._layer_handles += hook.attach(site)
            if site is self.root:  # its pre-hooks run already
                hook.begin(site, (), {})

    def after(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Detach, and hand the forward on, unless it raised."""
        if not self._depth or self._thread != threading.get_ident():
            return
        self._depth -= 1
        if self._depth:
            return
        self._user.stop()
        _remove(self._layer_handles)
        calls, self._calls = self._calls, []
        layers, self._layers = self._layers, ()
        listener = self._listener()
        raised = output is None and sys.exception() is not self._handled
        if not raised and listener is not None:
            with save_unchanged():
                updated = [own for own, before in self._buffers if versions(own) != before]
                named = _named(function, args, kwargs)
                again = functools.partial(function, *args, **kwargs)
                forward = Forward(
                    output, named, calls, layers, updated, self._user, again, self.root
                )
                listener._end_forward(forward)

    def _stay_last(self) -> None:
        """Stay behind hooks that came later: they may change the output, or divide the model."""
        hooks, number = self.root._forward_hooks, self._last_hook
        if number in hooks and next(reversed(hooks)) != number:
            hooks[number] = hooks.pop(number)

    def _is_nested(self) -> bool:
        """Return whether a forward that begins is inside another one.

        If it is not, the forward that was followed was interrupted: Ctrl-C runs no hook.
        """
        calls, frame = 0, sys._getframe()
        while frame.f_back is not None and calls < 2:
            frame = frame.f_back
            if frame.f_code.co_name == "_call_impl":
                calls += frame.f_locals.get("self") is self.root
            elif frame.f_code is EntryMethod.__call__.__code__:
                calls += frame.f_locals["self"].tells(self)
        return calls >= 2

    def _counts(self) -> bool:
        """Return whether a forward that begins now counts."""
        mode = self.root.training or self._evaluation
        return torch.is_grad_enabled() and mode and not in_transform_or_backward()


class RootHook:
    """Hook on the root; a copy or pickle of the model gets one that does nothing."""

    def __init__(self, hooks: ModelHooks | None, when: str) -> None:
        self._hooks = None if hooks is None else weakref.ref(hooks)
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
        hooks = None if self._hooks is None else self._hooks()
        if hooks is None or hooks.root is not module:
            return
        if self._when == "before":
            hooks.before(compiled)
        else:
            hooks.after(module.forward, args, kwargs, output)

    __call__ = run_uncompiled(
        _run,
        "kfactk's hooks on the model break the graph. Bind the compiled model, or compile without "
        "fullgraph=True.",
    )

    def __deepcopy__(self, memo: dict[int, Any]) -> RootHook:
        return RootHook(None, self._when)

    def __reduce__(self) -> tuple[Any, ...]:
        return RootHook, (None, self._when)


class LayerHook:
    """Records each call of one module for the layers in it.

    A copy or pickle of the model gets one that does nothing.

    Args:
        calls: Where the records go.
        layers: The layers; several where they lie inside the module.
    """

    def __init__(self, calls: list[TracedCall] | None, layers: Sequence[Layer]) -> None:
        self._calls, self._layers, self._thread = calls, layers, threading.get_ident()
        self._replay = layers[0].replay if layers else None
        self._context: CallContext | None = None

    def attach(self, site: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Put it on a module, in front of the user's hooks that see the output."""
        handles = [site.register_forward_hook(self, with_kwargs=True, prepend=True)]
        if self._replay is not None:
            handles.append(site.register_forward_pre_hook(self.begin, with_kwargs=True))
        return handles

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run as a forward pre-hook of a module whose calls run again."""
        if self._replay is not None and self._thread == threading.get_ident():
            tensors = tensors_of(args, kwargs, list(module.parameters()))
            self._context = CallContext.now(tensors[0].device)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Run as a forward hook."""
        if self._calls is None or not self._layers or self._thread != threading.get_ident():
            return
        context, self._context = self._context, None
        inside = self._replay is not None
        ones, args, kwargs, output = with_rows(args, kwargs, output)
        outputs = (output,) if self._replay is None else self._replay.outputs(output)
        followed = {
            place: each
            for place, each in enumerate(outputs)
            if isinstance(each, Tensor) and each.requires_grad
        }
        if not followed or (inside and context is None):  # its beginning was not seen:
            return  # the guard finds the layers
        if any(map(is_distributed, (*followed.values(), *module.parameters(recurse=inside)))):
            raise CombinationError(tensor_parallel(self._layers[0].name))
        given = tensors_of(args, kwargs) if inside else _flat_tensors(args, kwargs)
        inputs, arguments = call_tensors(module, args, kwargs, inside=inside)
        sources = frozenset(each.grad_fn for each in given if each.grad_fn is not None)
        recorded, edges = traced_outputs(list(followed.values()), sources)
        replay = None
        if self._replay is not None and context is not None:
            replay = RecordedReplay(
                self._layers[0].path,
                recorded_arguments(module, args, kwargs),
                context,
                self._replay,
                [
                    FollowedOutput(place, each.detach(), its)
                    for (place, each), its in zip(followed.items(), recorded, strict=True)
                ],
                [layer.part for layer in self._layers],
            )
        for layer in self._layers:
            record = RecordedCall(
                layer,
                inputs,
                inputs._version,
                recorded,
                module.training,
                module,
                arguments,
                versions(arguments.values()),
                replay,
                0 if inside else folded_from(given[0]),
                len(self._calls),
                ones,
            )
            used = (parameter_at(module, name) for name in layer.parameters)
            present = tuple(parameter for parameter in used if parameter is not None)
            self._calls.append(TracedCall(record, edges, sources, present))

    def fills(self, calls: list[TracedCall]) -> bool:
        """Return whether its records go there."""
        return self._calls is calls

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHook:
        return LayerHook(None, ())

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerHook, (None, ())


def with_rows(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[Tensor | None, tuple[Any, ...], dict[str, Any], Any]:
    """Return what a module was given and returned with the rows of jets in place of jets.

    Returns:
        What the bias was multiplied by in each row of the input, where that is a jet, else `None`;
        the arguments, the keyword arguments and the output.

    Example:
        >>> from kfactk.jets import jet
        >>> x = jet(torch.ones(5, 2))
        >>> ones, (rows,), _, _ = with_rows((x,), {}, None)
        >>> ones, rows.shape
        (tensor([1., 0., 0., 0.]), torch.Size([5, 4, 2]))
    """
    given = [each for each in (*args, *kwargs.values()) if isinstance(each, Jet)]
    if not given:
        return None, args, kwargs, output
    named = {name: rows_of(each) for name, each in kwargs.items()}
    return given[0].ones, tuple(map(rows_of, args)), named, rows_of(output)


def call_tensors(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, inside: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the input of a module, and the other tensors it was given, by name; all detached.

    The input is the first tensor in the order of the forward's parameters.

    Args:
        module: The module.
        args: What it was called with.
        kwargs: Likewise.
        inside: Whether the call runs again, which keeps all that it was given.

    Example:
        >>> bag, offsets = nn.EmbeddingBag(3, 2), torch.tensor([0])
        >>> call_tensors(bag, (), {"offsets": offsets, "input": torch.tensor([1, 2])})
        (tensor([1, 2]), {'offsets': tensor([0])})
    """
    given = tensors_of(args, kwargs) if inside else _flat_tensors(args, kwargs)
    if inside or len(given) == 1:
        return given[0].detach(), {}
    named = {
        name: each.detach()
        for name, each in _named(module.forward, args, kwargs).items()
        if isinstance(each, Tensor)
    }
    if len(named) < len(given):  # some have no name
        return given[0].detach(), {}
    (_, inputs), *others = named.items()
    return inputs, dict(others)


def folded_from(inputs: Tensor) -> int:
    """Return N where an input `[N T, d]` is a view of a tensor `[N, T, d]`; else 0.

    Example:
        >>> hidden = torch.ones(2, 3, 4)
        >>> folded_from(hidden.view(-1, 4)), folded_from(hidden), folded_from(hidden[0])
        (2, 0, 0)
    """
    base = inputs._base if inputs._is_view() else None
    if base is None or inputs.ndim != 2 or base.ndim < 3:
        return 0
    whole = base.numel() == inputs.numel() and base.shape[-1] == inputs.shape[1]
    return len(base) if whole and base.is_contiguous() and inputs.is_contiguous() else 0


def _flat_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]


def _buffers(module: nn.Module) -> list[Tensor]:
    return [buffer for buffer in module._buffers.values() if buffer is not None]


def _named(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a forward by name."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):  # the signature is unreadable: keywords alone have names
        return dict(kwargs)
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


def _release(token: object, *handles: Iterable[Handle]) -> None:
    EAGERNESS.release(token)
    _remove(*handles)


def _remove_unhandled(site: nn.Module, calls: list[TracedCall]) -> None:
    """Remove hooks that fill `calls`, and whose handle an interruption has lost."""
    for number, hook in list(site._forward_hooks.items()):
        if isinstance(hook, LayerHook) and hook.fills(calls):
            del site._forward_hooks[number]
            site._forward_hooks_with_kwargs.pop(number, None)
    for number, hook in list(site._forward_pre_hooks.items()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, LayerHook) and owner.fills(calls):
            del site._forward_pre_hooks[number]
            site._forward_pre_hooks_with_kwargs.pop(number, None)


def _remove(*handles: Iterable[Handle]) -> None:
    for group in handles:
        for handle in group:
            handle.remove()
        if isinstance(group, list):
            group.clear()
