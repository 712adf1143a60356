"""Convert option values to JSON and back, and functions and classes to import paths and back.

A function is written as `{"callable": "package.module:name"}`, which no plain string can be
mistaken for. Other tagged forms are `{"dtype": "float64"}`, `{"device": "cuda:0"}`, and
`{"float": "inf"}` for numbers that strict JSON lacks.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
import os
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kfactk.errors import OptionError, near_names


def callable_path(function: Any) -> str:
    """Return the import path `"package.module:qualified.name"` of a function or class.

    It is the outermost package that has the object under the same name, since public names outlive
    private modules. `import_path` is the inverse.

    Args:
        function: Defined at the top level of a module, or an attribute of such a class.

    Raises:
        OptionError: It is a lambda, a partial, defined inside a function, bound to an object, or
            its path leads to something else.

    Example:
        >>> callable_path(torch.optim.Adagrad)
        'torch.optim:Adagrad'
        >>> callable_path(lambda step: 0.1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        kfactk.errors.OptionError: <function <lambda>> cannot be written as an import path: ...
    """
    module: Any = getattr(function, "__module__", None)
    qualname: Any = getattr(function, "__qualname__", None)
    named = isinstance(module, str) and isinstance(qualname, str)
    if isinstance(function, functools.partial):
        why = "it is a functools.partial, whose bound arguments a path cannot hold"
    elif not named or not callable(function):
        why = "it is not a function or class of a module"
    elif "<lambda>" in qualname:
        why = "it is a lambda"
    elif "<locals>" in qualname:
        why = "it is defined inside a function"
    else:
        for package in itertools.accumulate(module.split("."), "{}.{}".format):
            found = sys.modules.get(package)
            for part in qualname.split("."):
                found = getattr(found, part, None)
            if found is function or (inspect.ismethod(found) and found == function):
                return f"{package}:{qualname}"
        why = f"{module}:{qualname} leads elsewhere (it is bound to an object, replaced or removed)"
    plain = inspect.isfunction(function)
    shown = f"<function {function.__qualname__}>" if plain else reprlib.repr(function)
    raise OptionError(
        f"{shown} cannot be written as an import path: {why}. Define it with `def` or `class` at "
        "the top level of an importable module and pass that, or pass a number."
    )


def import_path(path: str) -> Any:
    """Return the object of an import path such as `"torch.optim:Adagrad"`.

    The import runs the module's code, so take paths from trusted files only.

    Args:
        path: `"package.module:name"`; there may be dots after the colon.

    Raises:
        OptionError: It is no such path, its module cannot be imported, or has no such name.

    Example:
        >>> import_path("math:sqrt")
        <built-in function sqrt>
    """
    module, _, qualname = path.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *qualname.split(".")]):
        raise OptionError(
            f"{path!r} is not an import path. Write it as 'package.module:Name', with a colon "
            "before the name."
        )
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise OptionError(
            f"The module of the import path {path!r} cannot be imported: {explain(error)}. "
            "Install its package, or put the module's folder on PYTHONPATH."
        ) from error
    for part in qualname.split("."):
        if not hasattr(found, part):
            near = near_names(part, [name for name in dir(found) if not name.startswith("_")])
            script = " It was defined in the script that wrote the path; move it into a module."
            raise OptionError(
                f"The import path {path!r} names nothing: {found!r} has no {part!r}."
                f"{near or ' Check the name.'}{script if module == '__main__' else ''}"
            )
        found = getattr(found, part)
    return found


def to_json(value: Any, what: str = "the value") -> Any:
    """Return the value in JSON's types; tuples become lists, sets become sorted lists.

    Args:
        value: The value of an option.
        what: Its name in errors, such as `"option 'decay' of basis 'ekfac'"`.

    Raises:
        OptionError: It has no JSON form.

    Example:
        >>> to_json((1, 0.5, torch.float64, math.inf))
        [1, 0.5, {'dtype': 'float64'}, {'float': 'inf'}]
    """
    if value is None or isinstance(value, bool):
        return value
    for plain, convert in _PLAIN:
        if isinstance(value, plain):
            return convert(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise OptionError(
                f"Cannot write {what}: it is NaN, which never equals what is read back. Give a "
                "number."
            )
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Mapping):
        return _mapping_to_json(value, what)
    if isinstance(value, list | tuple):
        return [to_json(item, what) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_json(item, what) for item in value), key=repr)
    if callable(value):
        try:
            return {"callable": callable_path(value)}
        except OptionError as error:
            raise OptionError(f"Cannot write {what}: {error}") from error
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise OptionError(
        f"Cannot write {what}: {reprlib.repr(value)} is of type {kind}, which has no JSON form. "
        "Pass plain numbers, text, lists or dicts (a tensor's `.item()` or `.tolist()`), "
        "or a module-level function."
    )


def untrusted(path: str) -> OptionError:
    """Return the error for an import path in data that is not trusted."""
    return OptionError(
        f"The recipe holds the import path {path!r}. To import it runs code, so a recipe that is "
        "read from data may hold the names of stages and of torch.optim classes only. If you "
        "trust where it comes from, give trusted=True to Recipe.from_dict (on a command line, "
        "--trust-config)."
    )


def from_json(value: Any, *, trusted: bool = True) -> Any:
    """Return the Python value of a JSON form, the inverse of `to_json`; lists stay lists.

    Python values are returned unchanged.

    Args:
        value: The JSON form.
        trusted: Whether import paths in it may be imported, which runs code.

    Raises:
        OptionError: An import path in it names nothing or is not trusted, or a tagged form is
            malformed.

    Example:
        >>> from_json({"rate": {"callable": "math:sqrt"}, "limit": {"float": "inf"}})
        {'rate': <built-in function sqrt>, 'limit': inf}
    """
    if type(value) is list:
        return [from_json(item, trusted=trusted) for item in value]
    if type(value) is not dict:
        return value
    if len(value) == 1:
        ((tag, text),) = value.items()
        if tag in _TAGS and isinstance(text, str):
            if tag == "callable" and not trusted:
                raise untrusted(text)
            try:
                return _TAGS[tag](text)
            except OptionError:
                raise
            except (AttributeError, RuntimeError, ValueError) as error:
                raise OptionError(f"{value!r} is not a {tag}. Check its spelling.") from error
    return {key: from_json(item, trusted=trusted) for key, item in value.items()}


def explain(error: BaseException) -> str:
    """Return an error as one line: its type and message.

    Example:
        >>> explain(KeyError("a"))
        "KeyError: 'a'"
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _dtype(name: str) -> torch.dtype:
    dtype = vars(torch).get(name)  # getattr would import modules
    if not isinstance(dtype, torch.dtype):
        raise ValueError(name)
    return dtype


_PLAIN: list[tuple[type[Any], Callable[[Any], Any]]] = [
    (int, int),
    (str, str.__str__),
    (os.PathLike, os.fspath),
    (torch.dtype, lambda dtype: {"dtype": str(dtype).removeprefix("torch.")}),
    (torch.device, lambda device: {"device": str(device)}),
]
_TAGS: dict[str, Callable[[str], Any]] = {
    "callable": import_path,
    "dtype": _dtype,
    "device": torch.device,
    "float": float,
}


def _mapping_to_json(value: Mapping[Any, Any], what: str) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in value):
        raise OptionError(
            f"Cannot write {what}: the keys {list(value)!r} are not all text, as JSON requires. "
            "Use text as keys."
        )
    if len(value) == 1 and next(iter(value)) in _TAGS:
        raise OptionError(
            f"Cannot write {what}: a dict whose only key is {next(iter(value))!r} would be read as "
            "a tagged form. Rename the key."
        )
    return {key: to_json(item, what) for key, item in value.items()}
