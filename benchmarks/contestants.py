"""Who takes part in the race at the reference point, and with which settings: each rival's best of a small grid, and kfactk's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import nn

import kfactk

Make = Callable[[nn.Module, int], Any]
"""Makes the optimiser of a model; the second argument is the run's seed."""

BASELINE = "SGD, momentum (torch)"

_SHORT: dict[str, Any] = {
    "basis": {"name": "ekfac", "scale": "running"},
    "fisher": "empirical",
    "clip": "none",  # with Adam a constant factor cancels, and at these learning rates it never bounds anything
    "lr": 0.005,
    "damping": 0.0001,
    "scale_every": 1,
    "update": {"name": "adam", "fused": True},
}
"""Nothing is measured twice: factors and scale come from the backward that a step makes anyway."""

_REDUCE = {"name": "conv_kfac", "spatial": "reduce"}

RECIPES: dict[str, dict[str, Any]] = {
    "kfactk, the study's": {"lr": 0.003, "damping": 0.001},
    "kfactk, the study's, basis every 10": {"lr": 0.003, "damping": 0.001, "basis_every": 10},
    "kfactk, short": {**_SHORT, "factor_decay": 0.6, "basis_every": kfactk.early},
    "kfactk, short, reduce": {
        **_SHORT,
        "curvature": _REDUCE,
        "lr": 0.008,
        "factor_decay": 0.6,
        "basis_every": kfactk.early,
    },
    "kfactk, short, every 5": {**_SHORT, "factor_decay": 0.8, "factor_every": 5, "basis_every": 5},
}
"""Arguments of `kfactk.build`, by name; what is left out has its default, the study's."""


@attrs.frozen
class Contestant:
    """One that takes part.

    Args:
        make: Makes its optimiser.
        settings: What it was made with, for records.
        recipe: kfactk's, or `None` for a rival.
    """

    make: Make
    settings: str
    recipe: kfactk.Recipe | None = None


def everyone() -> dict[str, Contestant]:
    """All contestants by name: the baseline, rivals that are installed, and kfactk's settings."""
    sgd = _rival(torch.optim.SGD, lr=0.02, momentum=0.9)
    return (
        {BASELINE: sgd, "AdamW (torch)": _rival(torch.optim.AdamW, lr=0.001)}
        | _installed()
        | {n: ours(r) for n, r in RECIPES.items()}
    )


def ours(arguments: Mapping[str, Any]) -> Contestant:
    """kfactk with these arguments; the run's seed sets the draws of its Fisher pass."""
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
    """Of so many steps, on how many factors, the scale and a layer's decomposition are due."""
    due = [recipe.schedule.due(step) for step in range(1, steps)]  # at the first all are
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
    """Optimisers of other packages, those that are installed."""
    found: dict[str, Contestant] = {}
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import SOAP

        found["SOAP, every 10 (pytorch_optimizer)"] = _rival(
            SOAP, lr=0.01, precondition_frequency=10
        )
    if importlib.util.find_spec("heavyball"):
        import heavyball

        heavyball.utils.compile_mode = None  # its autotuning takes minutes a shape on a CPU
        found["SOAP (heavyball)"] = _rival(heavyball.SOAP, lr=0.01, precondition_frequency=10)
        found["Muon (heavyball)"] = _rival(heavyball.Muon, lr=0.02)
    return found
