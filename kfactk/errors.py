"""The errors kfactk raises: one root, a few kinds, each with what happened, why, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KfactkError(Exception):
    """Root of every error kfactk raises; catch this to catch them all."""


class PluginError(KfactkError):
    """A plugin could not be imported, misspelt a hook, or claims a name another plugin has."""


class UnknownStageError(KfactkError):
    """No plugin provides a stage of this name."""


class OptionError(KfactkError, ValueError):
    """A stage or recipe option is unknown or has a value that cannot work."""


class CombinationError(KfactkError):
    """Stages that cannot work together, or a model none of whose layers they support."""


class CaptureError(KfactkError):
    """What flowed through the model could not be captured, or was captured wrongly."""


class DecompositionError(KfactkError):
    """A factor could not be decomposed, whatever was tried."""


class StateError(KfactkError):
    """A saved state does not fit this optimizer."""


class KfactkWarning(UserWarning):
    """Something went wrong that training can go on with; said once."""


def near_names(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'a' or 'b'?`` for the names closest to `name`, or nothing.

    Args:
        name: What was asked for.
        known: The names there are.

    Example:
        >>> near_names("ekfca", ["kfac", "ekfac", "adam"])
        " Did you mean 'ekfac' or 'kfac'?"
        >>> near_names("zzz", ["kfac"])
        ''
    """
    names = {each.lower(): each for each in known}
    close = [
        names[each]
        for each in difflib.get_close_matches(name.lower(), list(names), n=3, cutoff=0.5)
    ]
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
