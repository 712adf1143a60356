"""The error of the experiments: something that the user can correct, in one line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any


class ExperimentError(Exception):
    """An error that is printed as one line on stderr, with exit code 2.

    Credentials in its message are masked; what cannot be printed is escaped.
    """

    def __init__(self, message: str) -> None:
        text = printable(" ".join(message.split()))
        if "://" in text:
            # Imported late, as below: kfactk loads torch, which mistakes in options do not need.
            from kfactk.masking import mask

            text = mask(text)
        super().__init__(text)


def printable(text: str) -> str:
    """Return text that every file and terminal takes: no control characters, no lone surrogates.

    Names of files may hold any bytes.

    Example:
        >>> printable("a\\x1b[2Jb\\udcff")
        'a\\\\x1b[2Jb\\\\udcff'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def system_reason(error: BaseException) -> str:
    """Return what the operating system, or a library, says, without its traceback."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return said.splitlines()[0][:300]


def from_system(error: OSError) -> ExperimentError:
    """Return the error for what no one foresaw that the operating system refuses."""
    where = f"{error.filename}: " if error.filename else ""
    return ExperimentError(
        f"{where}{system_reason(error)}. Correct that, and run the same command with --resume"
    )


def near_names(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known names closest to `name`, or nothing."""
    # Imported late: it loads torch, which --help does not need.
    from kfactk.errors import near_names as near

    return near(name, known)


def named(setting: str, name: str, known: Mapping[str, Any], *, trusted: bool) -> Any:
    """Return what a name means: an entry of `known`, or what an import path leads to.

    Args:
        setting: The setting that has the name.
        name: The name, or `module:attribute`.
        known: The entries by name.
        trusted: Whether an import path may be imported, which runs code.

    Raises:
        ExperimentError: It means nothing, or may not be imported.
    """
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ExperimentError(
            f"{setting}: there is no {name!r}.{near_names(name, known)} Give one of "
            f"{', '.join(known)}, or an import path such as my_module:my_function"
        )
    if not trusted:
        raise ExperimentError(
            f"{setting}: to import {name} runs its code: add --trust-config if you trust that file"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # what is imported may raise anything
        raise ExperimentError(
            f"{setting}: {name} cannot be imported ({system_reason(error)})"
        ) from error
    if not callable(found):
        raise ExperimentError(f"{setting}: {name} is no class and no function")
    return found


def check_options(function: Any, options: Iterable[str], given: Iterable[str] = ()) -> None:
    """Check names of options against a signature; those that `**kwargs` takes are not known.

    Args:
        function: The class or function.
        options: The names.
        given: Names of arguments that have a value already.

    Raises:
        ExperimentError: It does not take one of them.
    """
    known = list(inspect.signature(function).parameters.values())
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known):
        return
    names = [each.name for each in known if each.name not in set(given)]
    for name in options:
        if name not in names:
            raise ExperimentError(
                f"there is no option {name!r}.{near_names(name, names)} Options: {', '.join(names)}"
            )
