"""What the user asked to see of gradients: passes of our own leave it as it is.

Inside a forward a user may ask for the gradient of a tensor (`retain_grad`) or hang a function on
it (`register_hook`); modules have backward hooks. All of these would see our passes too. Autograd
has no list of them, so they are noted as they are asked for, in forwards that are followed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import _CachingTorchDispatchMode

NEEDED = ("torch.distributed.", "torch.nn.parallel.")
"""Modules whose hooks must run in our passes too: they gather the parameters that a pass reads."""
COLLECTIVES = "torch.distributed.distributed_c10d."
"""Where functions are that users hang on tensors themselves."""

Hook = Callable[..., Any]


class UserHooks:
    """The gradients and hooks that the user asked for in one forward.

    Attributes:
        thread: The thread that runs the forward.
        single_backward: Whether torch allows a single backward through a part of it.

    Example:
        >>> import torch
        >>> hooks, seen = UserHooks(), []
        >>> x = torch.ones(2, requires_grad=True)
        >>> hooks.start()
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
        self.thread, self.single_backward = 0, False
        self._retained: list[weakref.ref[Tensor]] = []
        self._passing = False

    def start(self) -> None:
        """Note what this thread asks for from now on."""
        self.thread = threading.get_ident()
        PATCHES.add(self)

    def stop(self) -> None:
        """Note no more; may be called twice."""
        PATCHES.discard(self)

    def retain(self, tensor: Tensor) -> None:
        """Note a tensor whose gradient is kept."""
        self._retained.append(weakref.ref(tensor))

    def quiet(self, hook: Hook) -> Hook:
        """Return the hook such that it does nothing while a pass of our own runs."""
        place = _place(hook)
        if place.startswith(NEEDED) and place != COLLECTIVES:
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


class Patch:
    """One name of torch's that is replaced for a while.

    Args:
        owner: The class or module that has it.
        name: The name.
        make: Returns what takes the place of the original.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._owner, self._name, self._make = owner, name, make
        self._own = self._before = self._ours = None

    def install(self) -> None:
        """Replace it, unless it is."""
        own = vars(self._owner).get(self._name)
        if self._ours is None or own is not self._ours:
            before = getattr(self._owner, self._name)
            self._own, self._before, self._ours = own, before, self._make(before)
            setattr(self._owner, self._name, self._ours)

    def remove(self) -> None:
        """Restore it, unless somebody else has replaced it since."""
        if self._ours is not None and vars(self._owner).get(self._name) is self._ours:
            if self._own is None:
                delattr(self._owner, self._name)  # it is inherited
            else:
                setattr(self._owner, self._name, self._own)
        self._own = self._before = self._ours = None


class Patches:
    """What is replaced in torch while anyone notes what is asked for.

    A mode of torch could intercept methods of tensors as well. But an interrupted forward would
    leave it behind, and a mode of the user's would then end ours in place of itself.
    """

    def __init__(self) -> None:
        self._noting: tuple[weakref.ref[UserHooks], ...] = ()
        self._lock = threading.RLock()
        self._patches = (
            Patch(Tensor, "retain_grad", self._retain_grad),
            Patch(Tensor, "register_hook", self._register_hook),
            Patch(torch_module, "BackwardHook", self._backward_hook),
            Patch(torch_module, "_WrappedHook", self._wrapped_hook),
            Patch(_CachingTorchDispatchMode, "__init__", self._selective),
        )

    def add(self, hooks: UserHooks) -> None:
        """Let these hooks note what is asked for."""
        with self._lock:
            self._noting += (weakref.ref(hooks, lambda _: self.discard(None)),)
            for patch in self._patches:
                patch.install()

    def discard(self, hooks: UserHooks | None) -> None:
        """Let them, and those that are gone, note no more; the last restores what was replaced."""
        with self._lock:
            kept = (each for each in self._noting if each() not in (None, hooks))
            self._noting = tuple(kept)
            for patch in () if self._noting else self._patches:
                patch.remove()

    def _here(self) -> list[UserHooks]:
        """Return the hooks that note what this thread asks for."""
        thread = threading.get_ident()
        found = (ref() for ref in self._noting)
        return [hooks for hooks in found if hooks is not None and hooks.thread == thread]

    def _quiet(self, hook: Hook) -> Hook:
        for hooks in self._here():
            hook = hooks.quiet(hook)
        return hook

    def _retain_grad(self, original: Hook) -> Hook:
        @functools.wraps(original)
        def retain_grad(tensor: Tensor) -> None:
            original(tensor)
            for hooks in self._here():
                hooks.retain(tensor)

        return retain_grad

    def _register_hook(self, original: Hook) -> Hook:
        @functools.wraps(original)
        def register_hook(tensor: Tensor, hook: Hook) -> Any:
            return original(tensor, self._quiet(hook))

        return register_hook

    def _backward_hook(self, original: Any) -> Hook:
        def make(module: Any, hooks: list[Hook], pre_hooks: list[Hook]) -> Any:
            """Return what calls the backward hooks of a module, in one call of it."""
            quiet = self._quiet
            return original(module, [quiet(each) for each in hooks], [quiet(h) for h in pre_hooks])

        return make

    def _selective(self, original: Hook) -> Hook:
        @functools.wraps(original)
        def __init__(mode: Any, *args: Any, **options: Any) -> None:
            original(mode, *args, **options)
            for hooks in self._here():
                hooks.single_backward = True

        return __init__

    def _wrapped_hook(self, original: Any) -> Hook:
        def make(hook: Hook, module: Any = None) -> Any:
            """Return a backward hook of the old kind, bound to its module."""
            return original(self._quiet(hook), module)

        return make


PATCHES = Patches()
"""The one of this process: what it replaces is global."""


def _place(hook: Hook) -> str:
    """Return the name of the module in which a hook was written."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return f"{getattr(hook, '__module__', None) or type(hook).__module__}."
