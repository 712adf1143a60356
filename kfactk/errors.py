"""Exceptions and warnings of kfactk. A message says what happened, likely causes, the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KfactkError(Exception):
    """Base class of every error that kfactk raises."""


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


class KfactkWarning(UserWarning):
    """A problem that training survives. Each is issued once."""


def near_names(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'a' or 'b'?`` for the known names closest to `name`, or "".

    Example:
        >>> near_names("ekfca", ["kfac", "ekfac", "adam"])
        " Did you mean 'ekfac' or 'kfac'?"
        >>> near_names("zzz", ["kfac"])
        ''
    """
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(by_lower[each]) for each in close)}?" if close else ""
