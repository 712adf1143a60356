"""From an algorithm's settings to a torch optimiser: the one place that knows how."""

from __future__ import annotations

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
    """Make the optimiser of one run; `seed` sets the draws of its Fisher pass, `collector` gets its figures if it has any."""
    settings = dict(algorithm.settings)
    if "optimizer" in settings:
        return FIRST_ORDER[settings.pop("optimizer")](model.parameters(), **settings)
    return recipe(algorithm, seed=seed).evolve(tracker=collector).bind(model)


def recipe(algorithm: Algorithm, *, seed: int) -> kfactk.Recipe:
    """The recipe of a second-order algorithm."""
    made = kfactk.build(**algorithm.settings)
    fisher = algorithm.settings.get("fisher", "mc")
    given = dict(fisher) if isinstance(fisher, Mapping) else {"name": fisher}
    return (
        made.evolve(fisher={"seed": seed, **given})
        if "seed" in attrs.fields_dict(type(made.fisher))
        else made
    )


def described(algorithm: Algorithm, *, seed: int) -> dict[str, Any]:
    """All settings, defaults included, as nested plain values."""
    if "optimizer" in algorithm.settings:
        return dict(algorithm.settings)
    return recipe(algorithm, seed=seed).to_dict()


def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state, on the first process the whole of it: curvature may lie on several. All of them have to ask."""
    if isinstance(optimizer, kfactk.Optimizer):
        optimizer.consolidate_state_dict()
    return optimizer.state_dict()


def close(optimizer: torch.optim.Optimizer) -> None:
    """Take the optimiser's hooks off its model, if it has any."""
    if hasattr(optimizer, "close"):
        optimizer.close()


def check(algorithm: Algorithm) -> None:
    """Refuse settings that cannot work before any run starts.

    Raises:
        ExperimentError: Names the algorithm and what is wrong.
    """
    name = algorithm.settings.get("optimizer")
    if name is not None and name not in FIRST_ORDER:
        raise ExperimentError(
            f"algorithm {algorithm.name}: there is no first-order optimizer {name!r}.{near_names(name, FIRST_ORDER)}"
        )
    try:
        described(algorithm, seed=0)
    except kfactk.KfactkError as error:
        raise ExperimentError(f"algorithm {algorithm.name}: {error}") from error
