"""Every hook that a plugin can implement.

A plugin is a module or object with functions of these names, marked `@kfactk.hookimpl`. It is found
through an entry point of the group `kfactk`. Stage hooks return factories by name: classes or
functions whose keyword arguments are the options of the stage.

The hooks and `kfactk.stages` have a version. A plugin declares the version it was written for with
`kfactk_api = 1`. A kfactk that supports this version loads the plugin; others refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy
from torch.optim import Optimizer

from kfactk.stages import (
    Basis,
    Clip,
    Controller,
    Curvature,
    Fisher,
    Likelihood,
    Link,
    Pace,
    Placement,
    Tracker,
    Update,
)

PROJECT = "kfactk"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

PLUGIN_API = 1
"""Version of the plugin API: hooks, the protocols in `kfactk.stages`, and the classes that pass
through them. It grows with a change that breaks a correct plugin, not with additions."""
SUPPORTED_APIS = range(1, PLUGIN_API + 1)
"""Versions whose plugins work here."""
UNDECLARED_API = 1
"""Version of a plugin that declares none; it stays the first one. Plugins in kfactk's own wheel
declare none, since they always have the version of the framework."""

STAGE_HOOKS: dict[str, str] = {
    "curvature": "kfactk_curvatures",
    "basis": "kfactk_bases",
    "fisher": "kfactk_fishers",
    "likelihood": "kfactk_likelihoods",
    "link": "kfactk_links",
    "clip": "kfactk_clips",
    "update": "kfactk_updates",
    "controller": "kfactk_controllers",
    "pace": "kfactk_paces",
    "placement": "kfactk_placements",
    "tracker": "kfactk_trackers",
}
"""The hook that provides each stage family, by the family's argument of `kfactk.build`."""


@hookspec
def kfactk_curvatures() -> Mapping[str, Callable[..., Curvature]]:
    """Return curvatures by name.

    Example:
        >>> @hookimpl
        ... def kfactk_curvatures():
        ...     return {"diagonal": Diagonal}
    """


@hookspec
def kfactk_bases() -> Mapping[str, Callable[..., Basis]]:
    """Return bases by name.

    Example:
        >>> @hookimpl
        ... def kfactk_bases():
        ...     return {"diagonal": DiagonalInverse}
    """


@hookspec
def kfactk_fishers() -> Mapping[str, Callable[..., Fisher]]:
    """Return Fisher estimators by name.

    Example:
        >>> @hookimpl
        ... def kfactk_fishers():
        ...     return {"mc": MonteCarlo}
    """


@hookspec
def kfactk_likelihoods() -> Mapping[str, Callable[..., Likelihood]]:
    """Return likelihoods by name.

    Example:
        >>> @hookimpl
        ... def kfactk_likelihoods():
        ...     return {"poisson": Poisson}
    """


@hookspec
def kfactk_links() -> Mapping[str, Callable[..., Link]]:
    """Return links by name.

    Example:
        >>> @hookimpl
        ... def kfactk_links():
        ...     return {"two_level": TwoLevel}
    """


@hookspec
def kfactk_clips() -> Mapping[str, Callable[..., Clip]]:
    """Return clips by name.

    Example:
        >>> @hookimpl
        ... def kfactk_clips():
        ...     return {"trust_ratio": TrustRatio}
    """


@hookspec
def kfactk_updates() -> Mapping[str, Callable[..., Update]]:
    """Return update rules by name.

    Example:
        >>> @hookimpl
        ... def kfactk_updates():
        ...     return {"lion": Lion}
    """


@hookspec
def kfactk_controllers() -> Mapping[str, Callable[..., Controller]]:
    """Return controllers by name.

    Example:
        >>> @hookimpl
        ... def kfactk_controllers():
        ...     return {"quadratic": Quadratic}
    """


@hookspec
def kfactk_paces() -> Mapping[str, Callable[..., Pace]]:
    """Return paces by name.

    Example:
        >>> @hookimpl
        ... def kfactk_paces():
        ...     return {"similar": Similar}
    """


@hookspec
def kfactk_placements() -> Mapping[str, Callable[..., Placement]]:
    """Return placements by name.

    Example:
        >>> @hookimpl
        ... def kfactk_placements():
        ...     return {"round_robin": RoundRobin}
    """


@hookspec
def kfactk_trackers() -> Mapping[str, Callable[..., Tracker]]:
    """Return trackers by name.

    Example:
        >>> @hookimpl
        ... def kfactk_trackers():
        ...     return {"csv": CsvTracker}
    """


@hookspec
def kfactk_bound(optimizer: Optimizer) -> None:
    """Take note that `Recipe.bind` has made an optimizer.

    Example:
        >>> @hookimpl
        ... def kfactk_bound(optimizer):
        ...     print(optimizer.recipe)
    """


@hookspec
def kfactk_stepped(optimizer: Optimizer, step: int, metrics: Mapping[str, Any]) -> None:
    """Take note of the end of a step, after parameters were updated.

    Args:
        optimizer: The optimizer that took the step.
        step: Index of the step, from 0.
        metrics: The metrics that trackers record; empty on steps that are not recorded.


    Example:
        >>> @hookimpl
        ... def kfactk_stepped(optimizer, step, metrics):
        ...     print(step, optimizer.param_groups[0]["lr"])
    """
