"""Entries of a model: the methods whose calls are forwards, such as `policy.evaluate_actions`.

A call of the model itself runs hooks. A call of another method runs none, so an `EntryMethod`
stands in for the method of this one module while hooks are on it.
"""

from __future__ import annotations

import copy
import inspect
import operator
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from kfactk.capture.torch_modes import run_uncompiled, skip_frame
from kfactk.errors import OptionError, near_names

FORWARD = "forward"
"""The entry that is a call of the model itself."""


class EntryListener(Protocol):
    """Whoever is told of calls of entries."""

    def before_entry(self, compiled: bool) -> None:
        """Note that a call begins, perhaps inside another forward."""

    def after_entry(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note that it ended; with `None` while the exception that it raised is handled."""


def entry_names(model: nn.Module, entry: Any) -> tuple[str, ...]:
    """Return the names of a model's entries.

    Raises:
        OptionError: It is no name or list of names, or the model has no such method.

    Example:
        >>> entry_names(nn.Linear(2, 3), "forward")
        ('forward',)
    """
    names = (entry,) if isinstance(entry, str) else entry
    listed = isinstance(names, list | tuple) and len(names) > 0
    if not listed or not all(isinstance(name, str) for name in names):
        raise OptionError(
            f"entry is {entry!r}; give the name of a method of the model, such as "
            "'evaluate_actions', or a list of names."
        )
    for name in names:
        if name.startswith("__"):
            raise OptionError(
                f"entry has {name!r}, which Python looks up on the class, so that nothing can "
                f"stand in for it on one model. Give entry={FORWARD!r} for calls of the model."
            )
        found = vars(model).get(name, inspect.getattr_static(type(model), name, None))
        if not callable(found) and not isinstance(found, staticmethod | classmethod):
            raise OptionError(
                f"entry has {name!r}, and {type(model).__name__} has no such method."
                f"{_remedy(model, name)}"
            )
    return tuple(dict.fromkeys(names))


def _remedy(model: nn.Module, name: str) -> str:
    """Return what to do where a model has no method of its own of this name."""
    owner = getattr(getattr(model, name, None), "__self__", None)
    for path, module in model.named_modules():
        if path and module is owner:  # as torch.compile's wrapper hands on what it has not
            return (
                f" It is a method of the module {path!r} inside. Bind that one: "
                f"recipe.bind(model.get_submodule({path!r}), entry={name!r})."
            )
    methods = [n for n in dir(type(model)) if callable(getattr(type(model), n, None))]
    return (
        f"{near_names(name, methods)} Name a method of the module that you bind, such as "
        "'evaluate_actions'."
    )


class EntryMethod:
    """Stands in for a method of one module, and tells a listener of its calls.

    A copy or a pickle of the module has the plain method.

    Args:
        root: The module.
        name: The name of the method.
        listener: Told of calls; it is not kept alive.
    """

    def __init__(self, root: nn.Module, name: str, listener: EntryListener) -> None:
        skip_frame(EntryMethod.__call__)
        self._root, self._name = root, name
        self._own = vars(root).get(name)
        self._listener: Callable[[], EntryListener | None] | None = weakref.ref(listener)
        self.__name__, self.__doc__ = name, self.__wrapped__.__doc__
        vars(root)[name] = self

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method itself."""
        method: Callable[..., Any] | None = self._own
        return _method(self._root, self._name) if method is None else method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        method, listener = self.__wrapped__, self._listener and self._listener()
        if listener is None:
            return method(*args, **kwargs)
        self._begin(listener)
        output = None
        try:
            output = method(*args, **kwargs)
        except BaseException:
            self._end(listener, method, args, kwargs, None)
            raise
        self._end(listener, method, args, kwargs, output)
        return output

    def tells(self, listener: EntryListener) -> bool:
        """Return whether it tells this listener of calls."""
        return self._listener is not None and self._listener() is listener

    def _before(self, listener: EntryListener, *, compiled: bool) -> None:
        """Tell of a beginning."""
        listener.before_entry(compiled)

    def _after(self, listener: EntryListener, *call: Any, compiled: bool) -> None:
        """Tell of an end."""
        listener.after_entry(*call)

    _UNBROKEN = (
        "kfactk follows a method of the model, which breaks the graph. Compile without "
        "fullgraph=True."
    )
    _begin = run_uncompiled(_before, _UNBROKEN)
    _end = run_uncompiled(_after, _UNBROKEN)

    def remove(self) -> None:
        """Put the method back; where something else stands in for this by now, only fall silent."""
        self._listener = None
        found = top = vars(self._root).get(self._name)
        while isinstance(top, EntryMethod) and top._listener is None:
            top = top._own
        if top is None:
            vars(self._root).pop(self._name, None)
        elif top is not found:
            vars(self._root)[self._name] = top

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        return _method(copy.deepcopy(self._root, memo), self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._own is not None:  # as it is
            return operator.getitem, ((self._own,), 0)
        return getattr, (self._root, self._name)


class EntryHandle:
    """Takes an entry off, as a torch hook's handle does; it keeps no module alive."""

    def __init__(self, method: EntryMethod) -> None:
        self._method = weakref.ref(method)

    def remove(self) -> None:
        """Put the method back; may be called twice."""
        method = self._method()
        if method is not None:
            method.remove()


def _method(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return the method that the class of a module gives it."""
    found: Any = inspect.getattr_static(type(module), name)
    method: Callable[..., Any] = found
    if hasattr(found, "__get__"):
        method = found.__get__(module, type(module))
    return method
