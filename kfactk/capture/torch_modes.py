"""Modes of torch around the user's code: compilation, functorch, checkpointing, autocast."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class ForcedEagerness:
    """Runs compiled code eagerly while anyone asks for it: compiled code ignores later hooks.

    Example:
        >>> eagerness, token = ForcedEagerness(), object()
        >>> eagerness.force(token)
        >>> eagerness.release(token)
    """

    def __init__(self) -> None:
        self._tokens: set[object] = set()
        self._stance: Any = None

    def force(self, token: object) -> None:
        """Force eagerness until `token` is released; the same token counts once."""
        if not self._tokens:
            self._stance = torch.compiler.set_stance("force_eager")
        self._tokens.add(token)

    def release(self, token: object) -> None:
        """Restore the stance of before, once the last token is released."""
        if token in self._tokens:
            self._tokens.remove(token)
            if not self._tokens:
                self._stance.__exit__(None, None, None)


EAGERNESS = ForcedEagerness()
"""The one of this process: the stance of the compiler is global."""


def run_uncompiled(function: Callable[..., None], message: str) -> Callable[..., None]:
    """Return the function such that compiled code breaks its graph to call it.

    It and what it calls run uncompiled. The compiler is not imported.

    Args:
        function: Returns nothing, and takes `compiled=`: whether its caller runs as compiled code.
        message: What a user of `fullgraph=True` reads.
    """

    def call(*args: Any) -> None:
        compiled = torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)
        run = torch._dynamo.disable(function) if "torch._dynamo" in sys.modules else function  # type: ignore[no-untyped-call]
        run(*args, compiled=compiled)

    call.__doc__ = function.__doc__
    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets
    call._torchdynamo_disable_msg = message  # type: ignore[attr-defined]
    return call


def skip_frame(function: Callable[..., None]) -> None:
    """Make the compiler skip the function's own frame.

    This imports the compiler, as any torch optimizer does.
    """
    import torch._dynamo

    torch._dynamo.decorators.skip(function)


def in_transform_or_backward() -> bool:
    """Return whether this is a functorch transform, or the recomputation of a checkpoint."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._current_graph_task_id() != -1
    )


def save_unchanged() -> contextlib.AbstractContextManager[Any]:
    """Hide what autograd saves from outer hooks, such as those of a checkpoint around the model."""
    # Undetached, an output would hold its own node.
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _identity)


def full_precision(device_types: Iterable[str]) -> contextlib.ExitStack:
    """Switch autocast off where it is on.

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


def _identity(tensor: Tensor) -> Tensor:
    return tensor
