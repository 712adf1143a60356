"""The laws of recipes, for the thesis' algorithms and every accepted combination of our stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st

import kfactk
from kfactk import KfactkError
from kfactk.registry.registry import registry
from kfactk.testing import PipelineLaws
from kfactk.testing._support.training import Recipes

STUDY = {
    "curvature": "conv_kfac",
    "fisher": "mc",
    "clip": {"name": "kl", "limit": 0.01},
    "lr": 0.01,
    "damping": 0.003,
    "weight_decay": 1e-4,
}
SUA = {"name": "conv_kfac", "spatial": "sua"}
FAMILIES = ("curvature", "basis", "fisher", "link", "clip", "update")
OPTIONS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("curvature", "kfac"): [{"spatial": "reduce"}],
    ("curvature", "conv_kfac"): [
        {"spatial": "sua"},
        {"spatial": "reduce"},
        {"spatial": "stationary"},
    ],
    ("basis", "ekfac"): [
        {"inputs": "channels"},
        {"inputs": "channels+taps"},
        {"scale": "running"},
        {"scale_decay": 0.9},
    ],
    ("fisher", "mc"): [{"samples": 2, "seed": 3}],
    ("clip", "value"): [{"limit": 1e-3}],
    ("clip", "norm"): [{"limit": 1e-2}],
    ("clip", "kl"): [{"limit": 1e-6}],
    ("clip", "trust_region"): [{"radius": 1e-6}],
}
"""Options besides the default ones; limits that bind."""


class TestKfac(PipelineLaws):
    recipe: ClassVar[dict[str, Any]] = {**STUDY, "basis": "kfac", "update": "momentum"}


class TestEkfac(PipelineLaws):
    recipe: ClassVar[dict[str, Any]] = {**STUDY, "basis": "ekfac", "update": "momentum"}


class TestEkfacNag(PipelineLaws):
    recipe: ClassVar[dict[str, Any]] = {**STUDY, "basis": "ekfac", "update": "nag"}


class TestEkfacAdam(PipelineLaws):
    recipe: ClassVar[dict[str, Any]] = {**STUDY, "basis": "ekfac", "update": "adam"}


class TestEkfacRadam(PipelineLaws):
    recipe: ClassVar[dict[str, Any]] = {**STUDY, "basis": "ekfac", "update": "radam"}


def stages(family: str) -> list[Any]:
    """Every stage of ours that is registered, by name, and again with the options above."""
    ours = [info.name for info in registry().stages(family) if info.distribution == "kfactk"]
    return [
        *([None] if family == "link" else []),
        *ours,
        *(
            {"name": name, **options}
            for name in ours
            for options in OPTIONS.get((family, name), [])
        ),
    ]


def recipe_of(combination: tuple[Any, ...]) -> Mapping[str, Any]:
    return {**dict(zip(FAMILIES, combination, strict=True)), "lr": 0.01, "damping": 0.01}


def accepted(recipe: Mapping[str, Any]) -> bool:
    try:
        kfactk.build(**recipe)
    except KfactkError:
        return False
    return True


class TestEkfacOfChannelsAndTaps(PipelineLaws):
    recipe: ClassVar[dict[str, Any]] = {
        **STUDY,
        "curvature": {"name": "conv_kfac", "spatial": "stationary"},
        "basis": {"name": "ekfac", "inputs": "channels+taps"},
        "update": "adam",
    }


class TestEveryCombination(PipelineLaws):
    """Draws from all of them."""

    def recipes(self) -> Recipes:
        return (
            st.tuples(*(st.sampled_from(stages(family)) for family in FAMILIES))
            .map(recipe_of)
            .filter(accepted)
        )

    def steady(self) -> Recipes:
        # Under SUA A is Omega kron I: each eigenvalue occurs once for each tap, and EKFAC's scale
        # depends on the eigenvectors that the solver chose for it.
        return self.recipes().filter(
            lambda recipe: not (recipe["curvature"] == SUA and "ekfac" in str(recipe["basis"]))
        )


class TestOtherFields(PipelineLaws):
    """Fields of the recipe that are no stages, away from their defaults."""

    recipe: ClassVar[dict[str, Any]] = {
        "update": "adamw",
        "basis": {"name": "ekfac", "scale": "running"},
        "damping": lambda step: 0.1 / (1 + step),
        "weight_decay": 0.1,
        "weight_decay_at": "gradient",
        "factor_decay": 1.0,
        "factor_every": 1,
        "observe": "manual",
        "exclude": ["hidden"],
    }


def test_the_default_recipes_stages_are_among_them() -> None:
    defaults = kfactk.build().to_dict()
    assert all((defaults[f] and defaults[f]["name"]) in stages(f) for f in FAMILIES)
    assert accepted(recipe_of(tuple(stages(family)[-1] for family in FAMILIES)))
    assert not accepted({"basis": "no such basis"})


@pytest.mark.parametrize("family", FAMILIES)
def test_options_belong_to_stages_there_are(family: str) -> None:
    named = {name for of, name in OPTIONS if of == family}
    assert named <= {info.name for info in registry().stages(family)}
