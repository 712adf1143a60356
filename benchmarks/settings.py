"""The settings of the race: kfactk, torch's optimizers, and installed second-order optimizers.

To add a setting to race, memory and plot, add a line to a table below.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import nn

import kfactk
from experiments.models import ResNet
from kfactk.recipe import PRESETS

BASELINE = "SGD, momentum (torch)"
ADAMW = "AdamW (torch)"
PERIODS = {"factor_every": 10, "scale_every": 10, "basis_every": 100}
"""The periods of the thesis, which a setting may replace."""

FUSED = {"name": "adam", "fused": True}
ROUNDED = {"name": "ekfac", "products": "bfloat16"}
FACTORED = {"name": "ekfac", "inputs": "channels+taps"}
STATIONARY = {"name": "conv_kfac", "spatial": "stationary"}
OWN_GRADIENT = {"update": FUSED, "stagger": True, "fisher": "empirical", "clip": "none"}
"""Statistics from the gradient of the loss itself, without a Fisher pass."""

RECIPES: dict[str, dict[str, Any]] = {
    "ekfac": {},
    "ekfac, a lag of 10": {"lag": 10},
    "ekfac, staggered": {"update": FUSED, "stagger": True},
    "ekfac, staggered, bfloat16": {"update": FUSED, "stagger": True, "basis": ROUNDED},
    "ekfac, staggered, bfloat16, iterated": {
        "update": FUSED,
        "stagger": True,
        "basis": {**ROUNDED, "iterate_from": 2048},
    },
    "ekfac of channels and taps, staggered": {
        "update": FUSED,
        "stagger": True,
        "basis": FACTORED,
        "curvature": STATIONARY,
    },
    "ekfac of channels and taps, running": {
        **OWN_GRADIENT,
        "basis": {**FACTORED, "scale": "running"},
        "curvature": STATIONARY,
    },
    "ekfac of channels, running": {**PRESETS["cheap"], "update": FUSED},
    "kfac, staggered": {"update": FUSED, "basis": "kfac", "stagger": True},
}
"""Settings of kfactk: arguments of `kfactk.build`, besides `PERIODS` and Adam. The default
curvature is `conv_kfac`."""
NOT_ON_THE_INDEX = ("kfac-pytorch",)
"""Related packages that the package index does not have."""


@attrs.frozen
class Setting:
    """One setting.

    Args:
        make: Makes the optimizer of a model.
        options: Arguments of `kfactk.build`, for a setting of kfactk.
        precision: Lowest precision of its matrix products.
    """

    make: Callable[[nn.Module], Any]
    options: dict[str, Any] | None = None
    precision: str = "float32"

    def recipe(self, **options: Any) -> kfactk.Recipe:
        """Return the recipe of a setting of kfactk, with changes."""
        assert self.options is not None
        return kfactk.build(**{**self.options, **options})


def ours(options: Mapping[str, Any], name: str) -> Setting:
    """Return a setting of kfactk: `options`, Adam, and the periods of the thesis."""
    options = {"update": "adam", **PERIODS, **options}
    return Setting(
        lambda model: kfactk.build(**options).bind(model),
        dict(options),
        "bfloat16" if "bfloat16" in name else "float32",
    )


def torch_settings() -> dict[str, Setting]:
    """Return settings of torch's optimizers."""
    found: dict[str, Setting] = {
        BASELINE: Setting(lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)),
        "Adam (torch)": Setting(lambda model: torch.optim.Adam(model.parameters(), lr=0.001)),
        ADAMW: Setting(lambda model: torch.optim.AdamW(model.parameters(), lr=0.001)),
    }
    if hasattr(torch.optim, "Muon"):
        found["Muon, kernels as matrices (torch)"] = Setting(Matrices)
    return found


class Matrices:
    """torch's Muon, which takes only matrices, on kernels viewed as `[outputs, rest]`.

    Vectors go to AdamW.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        self._pairs = [  # each pair shares its storage
            (parameter, nn.Parameter(parameter.detach().flatten(1))) for parameter in tensors
        ]
        self._muon = torch.optim.Muon([matrix for _, matrix in self._pairs], lr=0.01)
        self._rest = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.ndim == 1], lr=0.001
        )
        self._model = model

    def zero_grad(self) -> None:
        """Reset the model's gradients."""
        self._model.zero_grad()

    def step(self) -> None:
        """Take one step of both."""
        for parameter, matrix in self._pairs:
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        self._muon.step()
        self._rest.step()


def pytorch_optimizer_settings() -> dict[str, Setting]:
    """Return settings of the package pytorch-optimizer."""
    from pytorch_optimizer import SOAP

    return {
        "SOAP, every 10 (pytorch_optimizer)": Setting(
            lambda model: SOAP(model.parameters(), lr=0.003, precondition_frequency=10)
        )
    }


def heavyball_settings() -> dict[str, Setting]:
    """Return settings of the package heavyball.

    It is not compiled: its autotuning takes minutes for each shape on a CPU.
    """
    import heavyball

    heavyball.utils.compile_mode = None
    return {
        "SOAP, every 10 (heavyball)": Setting(
            lambda model: heavyball.SOAP(model.parameters(), lr=0.003, precondition_frequency=10)
        ),
        "Muon (heavyball)": Setting(lambda model: heavyball.Muon(model.parameters(), lr=0.02)),
    }


def singd_settings() -> dict[str, Setting]:
    """Return settings of the package singd."""
    from singd.optim.optimizer import SINGD

    return {
        "SINGD, every 10 (singd)": Setting(
            lambda model: SINGD(model, T=10, lr=0.01, momentum=0.9, warn_unsupported=False)
        )
    }


OTHERS: dict[str, Callable[[], dict[str, Setting]]] = {
    "pytorch_optimizer": pytorch_optimizer_settings,
    "heavyball": heavyball_settings,
    "singd": singd_settings,
}
"""Settings of other packages, by the module that must be installed."""


def missing() -> list[str]:
    """Return the modules of `OTHERS` that are not installed."""
    return [module for module in OTHERS if importlib.util.find_spec(module) is None]


def rivals(named: Iterable[str] | None = None) -> dict[str, Setting]:
    """Return the settings of torch and of other packages that are installed, by name.

    Args:
        named: Names of settings, which end with the name of their package; only these packages are
            imported. `None` for all packages.
    """
    every = torch_settings()
    for module, make in OTHERS.items():
        wanted = named is None or any(name.endswith(f"({module})") for name in named)
        if wanted and module not in missing():
            every |= make()
    return every


def settings(only: str = "") -> dict[str, Setting]:
    """Return the baseline, and all settings for images whose name contains `only`, by name."""
    every = rivals() | {name: ours(options, name) for name, options in RECIPES.items()}
    return {name: setting for name, setting in every.items() if name == BASELINE or only in name}


def network(width: int) -> nn.Module:
    """Return a ResNet-8 for images of 32 x 32."""
    torch.manual_seed(0)
    return ResNet(3, (width, 2 * width, 4 * width), 10)
