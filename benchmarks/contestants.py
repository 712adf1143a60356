"""The optimizers at the reference point: rivals at the best of a small grid, and kfactk."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import nn

import kfactk
from kfactk.recipe import PRESETS

Make = Callable[[nn.Module, int], Any]
"""Makes the optimizer of a model; the second argument is the seed of the run."""

BASELINE = "SGD, momentum (torch)"

_SHORT: dict[str, Any] = {**PRESETS["short"], "update": {"name": "adam", "fused": True}}
"""Settings for short runs: factors and scale come from the user's own backward."""

_REDUCE = {"name": "conv_kfac", "spatial": "reduce"}

RECIPES: dict[str, dict[str, Any]] = {
    "kfactk, thesis": {"lr": 0.003, "damping": 0.001},
    "kfactk, thesis, basis every 10": {"lr": 0.003, "damping": 0.001, "basis_every": 10},
    "kfactk, short": _SHORT,
    "kfactk, short, reduce": {
        **_SHORT,
        "curvature": _REDUCE,
        "lr": 0.008,
    },
    "kfactk, short, every 5": {**_SHORT, "factor_decay": 0.8, "factor_every": 5, "basis_every": 5},
}
"""Arguments of `kfactk.build` by name; others have their defaults, those of the thesis."""


@attrs.frozen
class Contestant:
    """An optimizer with its settings.

    Args:
        make: Makes the optimizer.
        settings: Its settings as text, for records.
        recipe: The recipe of kfactk, or `None` for a rival.
    """

    make: Make
    settings: str
    recipe: kfactk.Recipe | None = None


def everyone() -> dict[str, Contestant]:
    """Return all contestants by name: the baseline, installed rivals, and settings of kfactk."""
    sgd = _rival(torch.optim.SGD, lr=0.02, momentum=0.9)
    return (
        {BASELINE: sgd, "AdamW (torch)": _rival(torch.optim.AdamW, lr=0.001)}
        | _installed()
        | {n: ours(r) for n, r in RECIPES.items()}
    )


def ours(arguments: Mapping[str, Any]) -> Contestant:
    """Return kfactk with these arguments; the seed of the run sets the draws of the Fisher pass."""
    recipe = kfactk.build(**arguments)

    def make(model: nn.Module, seed: int) -> kfactk.Optimizer:
        drawn = (
            recipe.evolve(fisher={"name": "mc", "seed": seed})
            if arguments.get("fisher", "mc") == "mc"
            else recipe
        )
        return drawn.bind(model)

    return Contestant(make, repr(recipe), recipe)


def due_steps(recipe: kfactk.Recipe, steps: int) -> dict[str, int]:
    """Return on how many steps factors, the scale and the decomposition of a layer are due."""
    due = [recipe.schedule.due(step) for step in range(1, steps)]  # all are at the first step
    return {
        what: 1 + sum(getattr(each, what) for each in due) for what in ("factors", "scale", "basis")
    }


def _rival(kind: Any, **settings: Any) -> Contestant:
    written = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return Contestant(
        lambda model, seed: kind(model.parameters(), **settings),
        f"{kind.__module__}.{kind.__name__}({written})",
    )


def _installed() -> dict[str, Contestant]:
    """Return the optimizers of other packages that are installed."""
    found: dict[str, Contestant] = {}
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import SOAP

        found["SOAP, every 10 (pytorch_optimizer)"] = _rival(
            SOAP, lr=0.01, precondition_frequency=10
        )
    if importlib.util.find_spec("heavyball"):
        import heavyball

        heavyball.utils.compile_mode = None  # autotuning takes minutes for each shape on a CPU
        found["SOAP (heavyball)"] = _rival(heavyball.SOAP, lr=0.01, precondition_frequency=10)
        found["Muon (heavyball)"] = _rival(heavyball.Muon, lr=0.02)
    return found
