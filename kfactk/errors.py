"""Exceptions and warnings of kfactk. A message says what happened, likely causes, the next step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from kfactk.masking import mask


class KfactkError(Exception):
    """Base class of every error that kfactk raises.

    Credentials in its message are masked.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(mask(arg) if isinstance(arg, str) else arg for arg in args))


class PluginError(KfactkError):
    """A plugin cannot be loaded, a name is claimed twice, or a stage broke its protocol."""


class UnknownStageError(KfactkError):
    """No plugin provides a stage of this name."""


class OptionError(KfactkError, ValueError):
    """An option of a recipe or stage is unknown or has a value that cannot work."""


class CombinationError(KfactkError):
    """Stages, model and ranks do not work together; for example, no layer is supported."""


class CaptureError(KfactkError):
    """The inputs and gradients of a layer could not be captured, or are wrong."""


class DecompositionError(KfactkError):
    """A factor could not be decomposed, and every fallback failed too."""


class StateError(KfactkError):
    """A saved state does not fit this optimizer."""


class MemoryExhaustedError(KfactkError, RuntimeError):
    """Memory ran out, or would.

    torch's own error, where it has a class for that, is raised instead.
    """


class KfactkWarning(UserWarning):
    """A problem that training survives. Each is issued once.

    Credentials in its message are masked.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(mask(arg) if isinstance(arg, str) else arg for arg in args))


MEMORY = re.compile(
    r"out of memory|not enough memory|allocate memory|bad_alloc|ALLOC_FAILED", re.IGNORECASE
)
"""What allocators say when there is no memory; most of them have no class of error."""
LOWER_MEMORY = (
    "Lower the batch size or the curvature's chunk_bytes, leave layers with a long side (such as a "
    "large vocabulary) out with exclude=, or choose a curvature or basis with smaller matrices. "
    "python -m kfactk plan shows what each layer needs"
)
"""What to do when memory runs out."""


def memory_ran_out(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device.

    Example:
        >>> memory_ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
        >>> memory_ran_out(RuntimeError("sizes do not match"))
        False
    """
    runtime = isinstance(error, RuntimeError) and MEMORY.search(str(error)) is not None
    return runtime or isinstance(error, MemoryError)


def memory_message(error: BaseException, where: str) -> str:
    """Return the message of an error that says that memory ran out.

    Args:
        error: The error.
        where: Who asked for the memory, in words that follow "memory ran out in".

    Example:
        >>> error = MemoryError("you tried to allocate 2147483648 bytes")
        >>> memory_message(error, "it").split(".")[0]
        'memory ran out in it, which asked for 2 GiB'
    """
    found = re.search(r"allocate (\d+) bytes", str(error))
    size = f", which asked for {int(found[1]) / 2**30:.3g} GiB" if found else ""
    return f"memory ran out in {where}{size}. {LOWER_MEMORY} ({type(error).__name__}: {error})."


def near_names(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'a' or 'b'?`` for the known names closest to `name`, or "".

    Example:
        >>> near_names("ekfca", ["kfac", "ekfac", "adam"])
        " Did you mean 'ekfac' or 'kfac'?"
        >>> near_names("zzz", ["kfac"])
        ''
    """
    close = nearest(name, known)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that are close to `name`, the closest first.

    Example:
        >>> nearest("ekfca", ["kfac", "ekfac", "adam"])
        ['ekfac', 'kfac']
    """
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.5)
    return [by_lower[each] for each in close]
