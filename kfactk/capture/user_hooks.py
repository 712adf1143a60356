"""What the user asked to see of gradients: passes of our own leave it as it is.

Inside a forward a user may ask for the gradient of a tensor (`retain_grad`) or hang a function on
it (`register_hook`); modules have backward hooks. All of these would see our passes too. Autograd
has no list of them, so they are noted as they are asked for, in forwards that are followed.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

NEEDED = ("torch.distributed.", "torch.nn.parallel.")
"""Modules whose hooks must run in our passes too: they gather the parameters that a pass reads."""

Hook = Callable[..., Any]


class UserHooks:
    """The gradients and hooks that the user asked for in one forward.

    Example:
        >>> import torch
        >>> hooks, seen = UserHooks(), []
        >>> x = torch.ones(2, requires_grad=True)
        >>> hooks.start([])
        >>> y = x * 3
        >>> y.retain_grad()
        >>> handle = y.register_hook(seen.append)
        >>> hooks.stop()
        >>> with hooks.left_alone():
        ...     _ = torch.autograd.grad(y.sum(), x, retain_graph=True)
        >>> y.grad, seen
        (None, [])
    """

    def __init__(self) -> None:
        self._retained: list[weakref.ref[Tensor]] = []
        self._passing = False
        self._stack = contextlib.ExitStack()

    def start(self, modules: Iterable[nn.Module]) -> None:
        """Note what is asked for from now on, and the backward hooks of these modules."""
        PATCHES.add(self)
        own = [(each._backward_hooks, each._backward_pre_hooks) for each in modules]
        shared = (torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks)
        for hooks in (found for pair in (*own, shared) for found in pair if found):
            self._stack.callback(_restore, hooks, self._replace(hooks))

    def stop(self) -> None:
        """Note no more; may be called twice."""
        PATCHES.discard(self)
        self._stack.close()

    def retain(self, tensor: Tensor) -> None:
        """Note a tensor whose gradient is kept."""
        self._retained.append(weakref.ref(tensor))

    def quiet(self, hook: Hook) -> Hook:
        """Return the hook such that it does nothing while a pass of our own runs."""
        if _place(hook).startswith(NEEDED):
            return hook

        def call(*args: Any) -> Any:
            return None if self._passing else hook(*args)

        return functools.update_wrapper(call, hook) if hasattr(hook, "__name__") else call

    @contextlib.contextmanager
    def left_alone(self) -> Iterator[None]:
        """Surround passes of our own: no hook runs, and kept gradients stay as they are."""
        tensors = [tensor for tensor in (ref() for ref in self._retained) if tensor is not None]
        before = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = None  # a gradient that is there would be added to in place
        self._passing = True
        try:
            yield
        finally:
            self._passing = False
            for tensor, gradient in zip(tensors, before, strict=True):
                tensor.grad = gradient

    def _replace(self, hooks: MutableMapping[int, Hook]) -> dict[int, tuple[Hook, Hook]]:
        """Put quiet hooks in place of these, and return both by their number."""
        both = {number: (hook, self.quiet(hook)) for number, hook in hooks.items()}
        hooks.update({number: quiet for number, (_, quiet) in both.items()})
        return both


class Patches:
    """Two methods of tensors, replaced while anyone notes what is asked for.

    A mode of torch could intercept them as well. But an interrupted forward would leave it behind,
    and a mode of the user's would then end ours in place of itself.
    """

    def __init__(self) -> None:
        self._noting: weakref.WeakSet[UserHooks] = weakref.WeakSet()
        self._register: Any = None

    def add(self, hooks: UserHooks) -> None:
        """Let these hooks note what is asked for."""
        self._noting.add(hooks)
        if self._register is None:
            self._register = Tensor.register_hook
            Tensor.retain_grad = self._retain_grad()  # type: ignore[method-assign]
            Tensor.register_hook = self._register_hook()  # type: ignore[method-assign]

    def discard(self, hooks: UserHooks) -> None:
        """Let them note no more; the last one restores the methods."""
        self._noting.discard(hooks)
        if not self._noting and self._register is not None:
            if "retain_grad" in vars(Tensor):
                del Tensor.retain_grad  # the class below has it
            Tensor.register_hook = self._register  # type: ignore[method-assign]
            self._register = None

    def _retain_grad(self) -> Hook:
        original = Tensor.retain_grad

        @functools.wraps(original)
        def retain_grad(tensor: Tensor) -> None:
            original(tensor)
            for hooks in self._noting:
                hooks.retain(tensor)

        return retain_grad

    def _register_hook(self) -> Hook:
        original = self._register

        @functools.wraps(original)
        def register_hook(tensor: Tensor, hook: Hook) -> Any:
            for hooks in self._noting:
                hook = hooks.quiet(hook)
            return original(tensor, hook)

        return register_hook


PATCHES = Patches()
"""The one of this process: the methods are global."""


def _restore(hooks: MutableMapping[int, Hook], replaced: dict[int, tuple[Hook, Hook]]) -> None:
    """Put the user's hooks back where ours still stand."""
    for number, (hook, quiet) in replaced.items():
        if hooks.get(number) is quiet:
            hooks[number] = hook


def _place(hook: Hook) -> str:
    """Return the name of the module in which a hook was written."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', None) or type(hook).__module__}."
