"""Recipes: written, read back, changed, compared, refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import kfactk
from kfactk import CombinationError, KfactkError, OptionError, Recipe, UnknownStageError
from kfactk.registry.registry import Registry
from kfactk.testing import effort


def halved(step: int) -> float:
    return 0.5**step


def every(step: int) -> int:
    return 1 + step


def prediction(output: dict[str, Tensor]) -> Tensor:
    return output["prediction"]


class Outer:
    @attrs.frozen
    class Clip:
        """A stage without a name."""

        limit: float = 1.0

        def clip(self, pairs: Any, dot: Any) -> Any:
            return [pair.preconditioned for pair in pairs], torch.ones(())


def read_back(recipe: Recipe) -> list[Recipe]:
    """Through every form a recipe can be written in."""
    return [
        Recipe.from_dict(recipe.to_dict(), trusted=True),
        Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False)), trusted=True),
        eval(repr(recipe), {"kfactk": kfactk}),
    ]


def assert_reads_back(recipe: Recipe) -> None:
    for again in read_back(recipe):
        assert again == recipe
        assert repr(again) == repr(recipe)
        assert again.to_dict() == recipe.to_dict()


STAGES: dict[str, st.SearchStrategy[Any]] = {
    "curvature": st.sampled_from(
        [
            "kfac",
            "conv_kfac",
            {"name": "conv_kfac", "spatial": "sua"},
            {"name": "kfac", "batch_dim": 1},
        ]
    ),
    "basis": st.one_of(
        st.just("kfac"),
        st.builds(
            lambda scale, decay: {"name": "ekfac", "scale": scale, "scale_decay": decay},
            st.sampled_from(["exact", "running"]),
            st.none() | st.floats(0, 1),
        ),
    ),
    "update": st.one_of(
        st.sampled_from(["sgd", "momentum", "adamw", "radam"]),
        st.builds(
            lambda a, b: {"name": "adam", "betas": [a, b]}, st.floats(0, 0.99), st.floats(0, 0.99)
        ),
        st.builds(lambda m: {"name": "nag", "momentum": m}, st.floats(0, 0.99)),
        st.sampled_from([torch.optim.Adagrad, {"name": "torch.optim:RMSprop", "alpha": 0.9}]),
    ),
    "fisher": st.sampled_from(
        ["mc", "exact", "empirical", {"name": "mc", "samples": 3, "seed": 9}]
    ),
    "likelihood": st.sampled_from(
        [
            "categorical",
            "bernoulli",
            {"name": "gaussian", "variance": 0.5},
            {"name": "categorical", "class_axis": -1},
        ]
    ),
    "clip": st.just("none")
    | st.builds(
        lambda name, limit: {"name": name, "limit": limit},
        st.sampled_from(["kl", "norm", "value"]),
        st.floats(1e-9, 1e9),
    ),
    "controller": st.none(),  # few other stages go with it
    "pace": st.none(),  # drawn periods would contradict it
    "placement": st.just("replicated"),
    "tracker": st.sampled_from([None, {"name": "jsonl", "path": "runs/a.jsonl", "every": 3}]),
}
POSITIVE = st.floats(0, 1e6)
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "lr": POSITIVE,
    "damping": st.one_of(POSITIVE, st.just(halved), st.just(math.sqrt)),
    "weight_decay": POSITIVE,
    "weight_decay_at": st.sampled_from(["update", "gradient"]),
    "factor_decay": st.floats(0, 1),
    "factor_every": st.one_of(st.integers(1, 10**6), st.just(every)),
    "scale_every": st.integers(1, 10**6),
    "basis_every": st.integers(1, 10**6),
    "reduction": st.sampled_from(["mean", "sum"]),
    "observe": st.sampled_from(["automatic", "manual"]),
    "output": st.sampled_from([None, prediction]),
    "max_skipped": st.none() | st.integers(1, 10**6),
    "strict": st.booleans(),
}


@settings(max_examples=effort(60))
@given(st.fixed_dictionaries({}, optional=STAGES | NUMBERS))
def test_every_recipe_reads_back_from_what_is_written(arguments: dict[str, Any]) -> None:
    recipe = kfactk.build(**arguments)
    assert_reads_back(recipe)
    assert recipe == kfactk.build(**arguments)
    assert hash(recipe) == hash(kfactk.build(**arguments))
    assert recipe.evolve() == recipe


def test_the_repr_shows_what_differs_from_the_defaults() -> None:
    assert repr(kfactk.build()) == "kfactk.build()"
    assert repr(kfactk.build(lr=0.003, basis="ekfac")) == "kfactk.build()"
    shown = repr(
        kfactk.build(update="nag", clip={"name": "kl", "limit": 0.5}, lr=0.01, damping=halved)
    )
    assert shown.startswith(
        "kfactk.build(clip={'name': 'kl', 'limit': 0.5}, update='nag', lr=0.01, "
        "damping={'callable': '"
    )
    assert "lambda" in repr(kfactk.build(damping=lambda step: 0.1))


def test_equality_and_hashes() -> None:
    one, other = (
        kfactk.build(clip={"name": "kl", "limit": 0.5}),
        kfactk.build(clip={"name": "kl", "limit": 0.5}),
    )
    assert one == other
    assert len({one, other, kfactk.build()}) == 2
    assert one != kfactk.build()
    assert kfactk.build(update={"name": "torch.optim:SGD", "momentum": 0.5}) != kfactk.build(
        update={"name": "torch.optim:SGD", "momentum": 0.6}
    )


def test_a_recipe_is_frozen_and_evolves() -> None:
    recipe = kfactk.build(lr=0.1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        recipe.lr = 0.2  # type: ignore[misc]
    changed = recipe.evolve(update="sgd", basis={"name": "ekfac", "scale_decay": 0.5})
    assert changed == kfactk.build(
        lr=0.1, update="sgd", basis={"name": "ekfac", "scale_decay": 0.5}
    )
    assert recipe == kfactk.build(lr=0.1)
    with pytest.raises(
        OptionError, match=r"'dampening' is not an argument.*Did you mean 'damping'"
    ):
        recipe.evolve(dampening=0.1)
    with pytest.raises(OptionError, match="damping is -1"):
        recipe.evolve(damping=-1)


def test_what_is_left_out_of_a_written_recipe_has_its_default() -> None:
    assert Recipe.from_dict({}) == kfactk.build()
    assert Recipe.from_dict({"kfactk": "0.0.1", "lr": 0.5}) == kfactk.build(lr=0.5)
    assert kfactk.build().to_dict()["kfactk"] == kfactk.__version__
    with pytest.raises(OptionError, match="'learning_rate' is not an argument"):
        Recipe.from_dict({"learning_rate": 0.5})


def test_a_stage_of_ones_own_is_written_by_its_path() -> None:
    recipe = kfactk.build(clip=Outer.Clip(limit=2.0))
    assert recipe.to_dict()["clip"] == {"name": f"{__name__}:Outer.Clip", "limit": 2.0}


LOCAL: dict[str, Any] = {
    "damping": lambda step: 0.1,
    "factor_every": lambda step: 10,
    "output": lambda output: output[0],
    "fisher": {"name": "mc", "draw": lambda output: output},
}


@pytest.mark.parametrize("field", LOCAL)
def test_a_lambda_is_used_but_not_written(field: str) -> None:
    recipe = kfactk.build(**{field: LOCAL[field]})
    with pytest.raises(
        OptionError,
        match=f"{'draw' if field == 'fisher' else field}.*lambda.*top level of an importable",
    ):
        recipe.to_dict()
    assert "lambda" in str(recipe.summary()[field])
    json.dumps(recipe.summary())


def test_unknown_arguments_and_stages_name_near_ones() -> None:
    with pytest.raises(
        OptionError,
        match=r"'curvatures' is not an argument of kfactk\.build\. Did you mean 'curvature'",
    ):
        kfactk.build(curvatures="kfac")
    with pytest.raises(UnknownStageError, match="ekfac"):
        kfactk.build(basis="ekfca")
    with pytest.raises(OptionError, match="scale_decay"):
        kfactk.build(basis={"name": "ekfac", "scale_decai": 0.5})
    with pytest.raises(OptionError, match="basis is None"):
        kfactk.build(basis=None)
    with pytest.raises(OptionError, match="output='logits' cannot work: it must be a function"):
        kfactk.build(output="logits")


def test_every_refusal_is_a_kfactk_error() -> None:
    assert issubclass(OptionError, KfactkError)
    assert issubclass(OptionError, ValueError)
    assert issubclass(CombinationError, KfactkError)


def test_binding_prints_nothing_and_a_recipe_binds_many_models(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = kfactk.build()
    first, second = recipe.bind(nn.Linear(2, 2)), recipe.bind(nn.Linear(3, 3))
    assert first.recipe is second.recipe is recipe
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_coverage_prints_a_table() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3, bias=False)
    )
    text = str(kfactk.build().coverage(model))
    assert text.splitlines() == [
        "parameter  shape    preconditioned by",
        "0.weight   2x1x3x3  block 0 (conv_kfac, ekfac)",
        "0.bias     2        block 0 (conv_kfac, ekfac)",
        "1.weight   2        -: no curvature for BatchNorm2d",
        "1.bias     2        -: no curvature for BatchNorm2d",
        "3.weight   3x2      block 3 (conv_kfac, ekfac)",
        "3 of 5 parameters preconditioned (26 of 30 elements, 86.7%)",
    ]
    assert re.search(
        r"no curvature for Conv2d here; curvature='conv_kfac'",
        str(kfactk.build(curvature="kfac").coverage(model)),
    )


def test_a_recipe_can_be_shown_when_a_default_stage_it_does_not_use_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = Registry.load(disabled=["clip.kl"])
    monkeypatch.setattr("kfactk.recipe.registry", lambda: without)
    recipe = kfactk.build(clip="norm")
    assert repr(recipe) == "kfactk.build(clip='norm')"
    assert kfactk.Recipe.from_dict(recipe.to_dict()) == recipe
