"""Fields without effect: truth is that training with another value ends at the same numbers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfactk
from kfactk import CombinationError, KfactkWarning, OptionError
from kfactk.optim.idle import idle_fields, idle_message

CHANGES: dict[str, Any] = {
    "damping": 0.07,
    "first_moment": 0.5,
    "factor_decay": 0.2,
    "factor_every": 3,
    "scale_every": 3,
    "basis_every": 3,
    "stagger": True,
    "reduction": "sum",
    "observe": "manual",
    "output": lambda returned: 2 * returned,
    "fisher": "exact",
    "likelihood": "bernoulli",
}
"""Another value of each field that a model alone cannot make idle."""
RECIPES: dict[str, dict[str, Any]] = {
    "kfac": {"curvature": "kfac", "basis": "kfac"},
    "ekfac": {"curvature": "kfac"},
    "running": {"curvature": "kfac", "basis": {"name": "ekfac", "scale": "running"}},
    "newton_muon": {"curvature": "kfac", "basis": "newton_muon"},
    "cg": {"curvature": "rows", "basis": "cg"},
    "soap": {"curvature": "gradient", "basis": "soap"},
    "soap with damping": {"curvature": "gradient", "basis": {"name": "soap", "eps": None}},
    "shampoo": {"curvature": "gradient", "basis": "shampoo"},
    "kl": {"curvature": "gradient", "basis": "kl"},
    "ekfac of gradients": {
        "curvature": "gradient",
        "basis": {"name": "ekfac", "scale": "running"},
    },
    "muon": {"curvature": {"name": "gradient", "vectors": False}, "basis": "muon"},
    "two blocks": {
        "curvature": [
            kfactk.block({"name": "gradient", "vectors": False}, basis="muon"),
            kfactk.block("gradient", basis="shampoo"),
        ]
    },
}
USUAL = {"update": "sgd", "clip": "none", "lr": 0.01} | dict.fromkeys(
    ("factor_every", "scale_every", "basis_every"), 2
)


def trained(recipe: kfactk.Recipe) -> torch.Tensor | str:
    """Return the parameters after some steps, or the error that ended them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = recipe.bind(model)
    draws = torch.Generator().manual_seed(1)
    try:
        for _ in range(7):
            x, y = torch.randn(6, 4, generator=draws), torch.randint(3, (6,), generator=draws)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    except kfactk.KfactkError as error:
        return str(error)
    return torch.cat([each.detach().flatten() for each in model.parameters()])


@pytest.mark.parametrize("name", RECIPES)
def test_fields_are_idle_where_another_value_changes_nothing(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KfactkWarning)
        usual = kfactk.build(**USUAL, **RECIPES[name])
        expected = trained(usual)
        same = set()
        for field, value in CHANGES.items():
            found = trained(usual.evolve(**{field: value}))
            if not isinstance(found, str) and torch.equal(found, expected):
                same.add(field)
    assert not isinstance(expected, str)
    assert same == set(idle_fields(usual)) & set(CHANGES)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"basis": "kfac", "scale_every": 3},
            r"^scale_every=3 has no effect: basis 'kfac' measures no scale\. Leave it out$",
        ),
        (
            {"curvature": "gradient", "basis": "soap", "fisher": "exact", "unseen": "plain"},
            "^fisher='exact' and unseen='plain' have no effect: curvature 'gradient' measures your "
            "own gradient, and follows no forward",
        ),
        ({"basis": "newton_muon", "likelihood": "gaussian"}, "likelihood='gaussian' has no effect"),
        (
            {"fisher": "empirical", "likelihood": {"name": "gaussian", "variance": 0.5}},
            "^variance of likelihood 'gaussian' has no effect: fisher 'empirical' measures the "
            "gradient of your own loss",
        ),
        (
            {"fisher": {"name": "empirical", "terms": 8}, "likelihood": "gaussian"},
            "likelihood='gaussian' has no effect: fisher 'empirical' has its terms",
        ),
        (
            {"likelihood": {"name": "categorical", "ignore_index": -1}},
            "^ignore_index of likelihood 'categorical' has no effect: it is looked for in the "
            "labels, and targets= does not name them",
        ),
        (
            {"curvature": {"name": "gradient", "max_side": 3, "squares": ["*"]}, "basis": "muon"},
            "^max_side of curvature 'gradient' has no effect: basis 'muon' measures nothing",
        ),
        ({"reduction": "sum"}, "reduction='sum' has no effect: fisher 'mc' measures passes"),
    ],
)
def test_what_is_given_without_effect_is_told_at_build(given: dict[str, Any], told: str) -> None:
    given = {"update": "sgd", **given}
    with pytest.warns(KfactkWarning, match=told) as caught:
        recipe = kfactk.build(**given)
    assert [each.filename for each in caught] == [__file__]
    assert recipe.without_effect()
    with pytest.warns(KfactkWarning, match=told):
        kfactk.Recipe.from_dict(recipe.to_dict())


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"basis": "kfac", "damping": 0.5, "factor_every": 3, "basis_every": 6},
        {
            "curvature": ["kfac", kfactk.block("gradient", basis="soap")],
            "basis": "kfac",
            "fisher": "exact",
            "scale_every": 3,
        },
        {"curvature": "gradient", "basis": {"name": "soap", "eps": None}, "damping": 0.5},
        {"basis": {"name": "ekfac", "scale": "running"}, "reduction": "sum"},
        {"fisher": "empirical", "reduction": "sum", "likelihood": "gaussian"},
        {"weight_decay_at": "gradient"},  # groups of parameters may have a weight decay
    ],
)
def test_what_acts_in_one_block_is_not_told(given: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", KfactkWarning)
        assert not kfactk.build(**given).without_effect()


@pytest.mark.parametrize("preset", ["thesis", "short", "cheap", "transformer"])
def test_presets_leave_out_what_has_no_effect_beside_changes(preset: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", KfactkWarning)
        recipe = kfactk.preset(preset)
        assert not recipe.without_effect()
        assert not recipe.evolve(lr=0.1).without_effect()
        if preset != "transformer":
            changed = kfactk.preset(preset, curvature="gradient", basis="soap", update="sgd")
            assert not changed.without_effect()
            assert changed.fisher == kfactk.build().fisher
    with pytest.warns(KfactkWarning, match="scale_every=7 has no effect"):
        kfactk.preset("short", basis="kfac", scale_every=7)


def test_evolving_tells_what_loses_its_effect_and_no_more() -> None:
    recipe = kfactk.build(scale_every=3)
    with pytest.warns(KfactkWarning, match="scale_every=3 has no effect"):
        inverse = recipe.evolve(basis="kfac")
    with warnings.catch_warnings():
        warnings.simplefilter("error", KfactkWarning)
        assert inverse.evolve(lr=0.1).without_effect()
        assert not inverse.evolve(scale_every=None).without_effect()


def test_one_sentence_tells_what_has_the_same_reason() -> None:
    why = {"a": "no basis reads it", "b": "no basis reads it", "c": "it rains"}
    told = idle_message({"a": 1, "b": "x", "c": None}, why)
    assert told == (
        "a=1 and b='x' have no effect: no basis reads it; c has no effect: it rains. Leave them out"
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"curvature": "norm", "basis": "kfac"}, "basis='kfac': it fits no curvature of"),
        (
            {"curvature": "embedding", "basis": {"name": "ekfac", "scale": "running"}},
            "no block uses basis=.*embedding, ekfac",
        ),
        (
            {"curvature": [kfactk.block("norm", basis="unitwise")], "basis": "kfac"},
            "no block uses basis='kfac': each names one of its own",
        ),
    ],
)
def test_a_basis_that_no_block_uses_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(CombinationError, match=told):
        kfactk.build(**given)


def test_a_block_whose_layers_are_all_taken_before_is_refused() -> None:
    head = kfactk.block("kfac", basis="kfac", layers=["head"])
    with pytest.raises(CombinationError, match=r"block 2 of .* never gets a layer"):
        kfactk.build(curvature=["kfac", head])
    with pytest.raises(CombinationError, match="block 3"):
        kfactk.build(curvature=[head, "kfac", kfactk.block("kfac", layers=["head"])])
    assert len(kfactk.build(curvature=[head, "kfac"]).rules) == 2
    assert len(kfactk.build(curvature=["kfac", {"name": "kfac", "spatial": "reduce"}]).rules) == 2
    matrices = kfactk.block("gradient", basis="muon")  # which takes no vectors
    assert len(kfactk.build(curvature=[matrices, "gradient"], update="sgd").rules) == 2


@pytest.mark.parametrize(
    ("family", "options", "told"),
    [
        ("update", {"name": "momentum", "momentum": 0.0, "dampening": 0.5}, "momentum=0, with"),
        ("basis", {"name": "singd", "block": 4}, "block=4 is the side of a block"),
        ("basis", {"name": "muon", "steps": 0, "precision": "full"}, "precision of Newton-Schulz"),
        (
            "basis",
            {"name": "newton_muon", "steps": 0, "coefficients": (1.0, 2.0, 3.0), "eps": 1.0},
            "coefficients and eps of Newton-Schulz steps cannot",
        ),
        ("curvature", {"name": "kfac", "max_side": None, "wide": "blocks"}, "wide='blocks' is for"),
        (
            "likelihood",
            {"name": "gaussian", "divisor": "entries", "class_axis": 1},
            "class_axis=1 plays no part",
        ),
        ("fisher", {"name": "mc", "draw": torch.zeros_like, "seed": 3}, "seed=3 cannot have"),
    ],
)
def test_an_option_that_another_one_makes_idle_is_refused(
    family: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(OptionError, match=told):
        kfactk.build(**{family: options})
