"""Modes of torch that surround the user's code and that curvature must not be computed under, or must know of."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Eagerness:
    """Makes what torch.compile has compiled run eagerly while anybody holds it: compiled code ignores hooks put on later.

    Example:
        >>> eagerness, gradient_worker = Eagerness(), object()
        >>> eagerness.hold(gradient_worker)
        >>> eagerness.release(gradient_worker)
    """

    def __init__(self) -> None:
        self._holders: set[object] = set()
        self._stance: Any = None

    def hold(self, gradient_worker: object) -> None:
        """From now on; a second hold of the same holder changes nothing."""
        if not self._holders:
            self._stance = torch.compiler.set_stance("force_eager")
        self._holders.add(gradient_worker)

    def release(self, gradient_worker: object) -> None:
        """Go back to the stance that was found, once the last holder releases."""
        if gradient_worker in self._holders:
            self._holders.remove(gradient_worker)
            if not self._holders:
                self._stance.__exit__(None, None, None)


EAGERNESS = Eagerness()
"""The process' own: the stance of the compiler is global."""


def opaque(function: Callable[..., None], why: str) -> Callable[..., None]:
    """The function as one that compiled code leaves for, here and in what it calls, without importing the compiler.

    Args:
        function: A method or function that returns nothing. It is told by `compiled=` whether what called it, and what is called after
            it returns, runs as compiled code.
        why: What a user of `fullgraph=True` is told.
    """

    def call(*args: Any) -> None:
        compiled = torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)
        run = torch._dynamo.disable(function) if "torch._dynamo" in sys.modules else function  # type: ignore[no-untyped-call]
        run(*args, compiled=compiled)

    call.__doc__ = function.__doc__
    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets
    call._torchdynamo_disable_msg = why  # type: ignore[attr-defined]
    return call


def leave_alone(function: Callable[..., None]) -> None:
    """Have the compiler skip the function's own frame, whatever calls it. Imports the compiler, which any torch optimizer has done."""
    import torch._dynamo

    torch._dynamo.decorators.skip(function)


def uncounted() -> bool:
    """Whether what runs now is not the user's forward: a functorch transform, or activation checkpointing's second one in a backward."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._current_graph_task_id() != -1
    )


def saved_as_is() -> contextlib.AbstractContextManager[Any]:
    """Keeps what autograd saves out of the sight of hooks around, such as those of a checkpoint around the whole model."""
    return torch.autograd.graph.saved_tensors_hooks(
        torch.Tensor.detach, _same
    )  # undetached, an output would hold its own node


def full_precision(device_types: Iterable[str]) -> contextlib.ExitStack:
    """Switches autocast off, where it is on.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(["cpu"]):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    stack = contextlib.ExitStack()
    for kind in sorted(set(device_types)):
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def _same(tensor: Tensor) -> Tensor:
    return tensor
