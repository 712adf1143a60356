"""Every hook a plugin can implement.

A plugin is a module or object whose functions, marked `@kfactk.hookimpl`, have the names below; it is found through an entry point of
the group `kfactk`. Stage hooks return names with factories: a class or function whose keyword arguments are the stage's options.

What is written here and in `kfactk.stages` is versioned. A plugin says which version it was written for with `kfactk_api = 1`; it is
loaded by every kfactk that speaks that version, and refused with a clear message by the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy
from torch.optim import Optimizer

from kfactk.stages import Basis, Clip, Curvature, Fisher, Likelihood, Placement, Tracker, Update

PROJECT = "kfactk"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

PLUGIN_API = 1
"""Version of the plugin API: hooks, the protocols in `kfactk.stages`, and the classes that pass through them. It grows when something
changes by which a sound plugin would stop working; additions that plugins need not know of leave it."""
SPOKEN = range(1, PLUGIN_API + 1)
"""Versions whose plugins work here. Ours declare none: they come in one wheel with the framework and cannot be of another version."""
UNDECLARED = 1
"""The version a plugin that declares none was written for, for good: the first, which asked for no declaration."""

STAGE_HOOKS: dict[str, str] = {
    "curvature": "kfactk_curvatures",
    "basis": "kfactk_bases",
    "fisher": "kfactk_fishers",
    "likelihood": "kfactk_likelihoods",
    "clip": "kfactk_clips",
    "update": "kfactk_updates",
    "placement": "kfactk_placements",
    "tracker": "kfactk_trackers",
}
"""Stage family (an argument of `kfactk.build`) to the hook that provides it."""


@hookspec
def kfactk_curvatures() -> Mapping[str, Callable[..., Curvature]]:
    """Curvatures by name.

    Example:
        >>> @hookimpl
        ... def kfactk_curvatures():
        ...     return {"diagonal": Diagonal}
    """


@hookspec
def kfactk_bases() -> Mapping[str, Callable[..., Basis]]:
    """Bases by name.

    Example:
        >>> @hookimpl
        ... def kfactk_bases():
        ...     return {"diagonal": DiagonalInverse}
    """


@hookspec
def kfactk_fishers() -> Mapping[str, Callable[..., Fisher]]:
    """Fisher estimators by name.

    Example:
        >>> @hookimpl
        ... def kfactk_fishers():
        ...     return {"mc": MonteCarlo}
    """


@hookspec
def kfactk_likelihoods() -> Mapping[str, Callable[..., Likelihood]]:
    """Likelihoods by name.

    Example:
        >>> @hookimpl
        ... def kfactk_likelihoods():
        ...     return {"poisson": Poisson}
    """


@hookspec
def kfactk_clips() -> Mapping[str, Callable[..., Clip]]:
    """Clips by name.

    Example:
        >>> @hookimpl
        ... def kfactk_clips():
        ...     return {"trust_ratio": TrustRatio}
    """


@hookspec
def kfactk_updates() -> Mapping[str, Callable[..., Update]]:
    """Update rules by name.

    Example:
        >>> @hookimpl
        ... def kfactk_updates():
        ...     return {"lion": Lion}
    """


@hookspec
def kfactk_placements() -> Mapping[str, Callable[..., Placement]]:
    """Placements by name.

    Example:
        >>> @hookimpl
        ... def kfactk_placements():
        ...     return {"round_robin": RoundRobin}
    """


@hookspec
def kfactk_trackers() -> Mapping[str, Callable[..., Tracker]]:
    """Trackers by name.

    Example:
        >>> @hookimpl
        ... def kfactk_trackers():
        ...     return {"csv": CsvTracker}
    """


@hookspec
def kfactk_bound(optimizer: Optimizer) -> None:
    """Called after `Recipe.bind` has made an optimizer.

    Example:
        >>> @hookimpl
        ... def kfactk_bound(optimizer):
        ...     print(optimizer.recipe)
    """


@hookspec
def kfactk_stepped(optimizer: Optimizer, step: int, metrics: Mapping[str, Any]) -> None:
    """Called at the end of every step, parameters updated.

    Args:
        optimizer: The optimizer that stepped.
        step: Index of the step just taken, from 0.
        metrics: What a tracker would record of it; empty on steps that are not recorded.

    Example:
        >>> @hookimpl
        ... def kfactk_stepped(optimizer, step, metrics):
        ...     print(step, optimizer.param_groups[0]["lr"])
    """
