"""Make torch optimizers from the settings of algorithms."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn

import kfactk
from experiments.collector import Collector
from experiments.config import Algorithm
from experiments.errors import ExperimentError, near_names

FIRST_ORDER = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
}


def make(
    algorithm: Algorithm, model: nn.Module, *, seed: int, collector: Collector
) -> torch.optim.Optimizer:
    """Make the optimizer of one run.

    Args:
        algorithm: Its settings.
        model: The model to train.
        seed: Seed of the Fisher pass.
        collector: Takes the metrics of a second-order algorithm.
    """
    settings = dict(algorithm.settings)
    if "optimizer" in settings:
        return FIRST_ORDER[settings.pop("optimizer")](model.parameters(), **settings)
    return recipe(algorithm, seed=seed).evolve(tracker=collector).bind(model)


def recipe(algorithm: Algorithm, *, seed: int) -> kfactk.Recipe:
    """Return the recipe of a second-order algorithm."""
    made = kfactk.Recipe.from_dict(algorithm.settings, trusted=algorithm.trusted)
    fisher = algorithm.settings.get("fisher", "mc")
    given = dict(fisher) if isinstance(fisher, Mapping) else {"name": fisher}
    return (
        made.evolve(fisher={"seed": seed, **given})
        if "seed" in attrs.fields_dict(type(made.fisher))
        else made
    )


def describe(algorithm: Algorithm, *, seed: int) -> dict[str, Any]:
    """Return all settings, with defaults, as nested plain values."""
    if "optimizer" in algorithm.settings:
        return dict(algorithm.settings)
    return recipe(algorithm, seed=seed).to_dict()


def full_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of the optimizer; on the first process, with the curvature of all processes.

    All processes must call it.
    """
    if isinstance(optimizer, kfactk.Optimizer):
        optimizer.consolidate_state_dict()
    return optimizer.state_dict()


def close(optimizer: torch.optim.Optimizer) -> None:
    """Remove the optimizer's hooks from its model, if it has any."""
    if hasattr(optimizer, "close"):
        optimizer.close()


def check(algorithm: Algorithm) -> None:
    """Check the settings of an algorithm, before any run starts.

    Raises:
        ExperimentError: They cannot work. The message names the algorithm.
    """
    name = algorithm.settings.get("optimizer")
    if name is not None and not (isinstance(name, str) and name in FIRST_ORDER):
        raise ExperimentError(
            f"algorithm {algorithm.name}: there is no first-order optimizer {name!r}."
            f"{near_names(str(name), FIRST_ORDER)} There are: {', '.join(FIRST_ORDER)}"
        )
    try:
        describe(algorithm, seed=0)
        _made_for_nothing(algorithm)
    # Classes of torch raise ValueErrors and TypeErrors for options that they refuse.
    except (kfactk.KfactkError, ValueError, TypeError, OverflowError) as error:
        raise ExperimentError(f"algorithm {algorithm.name}: {error}") from error


def _made_for_nothing(algorithm: Algorithm) -> None:
    """Make the optimizer of a small model: errors come now, and not after hours of other runs."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again by the run itself
        close(make(algorithm, model, seed=0, collector=Collector(1)))
