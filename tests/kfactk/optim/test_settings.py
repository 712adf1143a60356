"""The fields of a recipe are checked before any model is seen."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import nn

import kfactk
from kfactk import CombinationError, OptionError
from kfactk.optim.settings import FIELDS, BlockSpec, name_of


def halved(step: int) -> float:
    return 0.5**step


NUMBER = {
    "lr": "at least 0",
    "damping": "at least 0",
    "weight_decay": "at least 0",
    "factor_decay": r"in \[0, 1\]",
}
BAD_NUMBERS = [-0.1, float("nan"), True, "0.1", None, [0.1], torch.tensor(0.1), 1j]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize("field", NUMBER)
def test_numbers_are_checked(field: str, value: Any) -> None:
    if field == "damping" and value is None:
        pytest.skip("the update rule's own")
    with pytest.raises(OptionError, match=f"^{field} is .*{NUMBER[field]}"):
        kfactk.build(**{field: value})


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        ("adam", 0.001),
        ("radam", 0.001),
        ("sgd", 0.01),
        ("momentum", 0.03),
        ("nag", 0.03),
        (torch.optim.Adagrad, 0.001),
        (torch.optim.SGD, 0.01),
        ({"name": "torch.optim:SGD", "momentum": 0.9}, 0.03),
    ],
)
def test_damping_without_a_value_is_the_update_rules_own(update: Any, expected: float) -> None:
    recipe = kfactk.build(update=update)
    assert recipe.damping == expected
    assert "damping" not in repr(recipe)
    assert kfactk.build(update=update, damping=None) == recipe
    assert kfactk.Recipe.from_dict({"update": recipe.to_dict()["update"]}) == recipe
    assert kfactk.build().evolve(update=update) == recipe
    assert kfactk.build(damping=0.5).evolve(update=update).damping == 0.5


def test_a_decay_above_one_is_refused() -> None:
    with pytest.raises(OptionError, match=r"factor_decay is 1\.1"):
        kfactk.build(factor_decay=1.1)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "10"], ids=repr)
@pytest.mark.parametrize("field", ["factor_every", "scale_every", "basis_every"])
def test_periods_are_checked(field: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{field} is .*whole number of at least 1"):
        kfactk.build(**{field: value})


@pytest.mark.parametrize("field", ["lr", "weight_decay", "factor_decay"])
def test_functions_where_numbers_belong_name_the_remedy(field: str) -> None:
    with pytest.raises(OptionError, match="lr_scheduler" if field == "lr" else "param_groups"):
        kfactk.build(**{field: halved})


def test_functions_of_the_step_are_checked_where_they_are_asked() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(OptionError, match="damping is -1 at step 0"):
        kfactk.build(damping=lambda step: -1).bind(model)
    with pytest.raises(OptionError, match="factor_every is 0 at step 0"):
        kfactk.build(factor_every=lambda step: 0).bind(model)


WORDS = [
    ("reduction", "means", "'mean'"),
    ("observe", "auto", "'automatic'"),
    ("weight_decay_at", "gradients", "'gradient'"),
]


@pytest.mark.parametrize(("field", "word", "near"), WORDS)
def test_words_are_checked(field: str, word: str, near: str) -> None:
    with pytest.raises(OptionError, match=f"{field}='{word}' cannot work.*Did you mean {near}"):
        kfactk.build(**{field: word})


def test_flags_are_checked() -> None:
    with pytest.raises(OptionError, match="strict='no' cannot work: it must be True or False"):
        kfactk.build(strict="no")  # type: ignore[arg-type]


def _unused(self: Any, *args: Any, **options: Any) -> Any:
    raise AssertionError


@attrs.frozen
class Other(kfactk.Curvature):
    """A curvature that provides something else."""

    provides = frozenset({"D"})
    unsupported = matrix = tensors = blank = samples = gradient_factors = _unused


def test_stages_that_cannot_work_together_are_refused() -> None:
    with pytest.raises(
        CombinationError, match=r"basis 'ekfac' needs A, G.*does not provide \(it provides D\)"
    ):
        kfactk.build(curvature=Other())


def test_a_block_without_a_basis_gets_the_default_of_its_curvature_where_the_recipes_misfits() -> (
    None
):
    recipe = kfactk.build(curvature=["conv_kfac", "norm"], basis="ekfac")
    assert [rule.label for rule in recipe.rules] == ["conv_kfac, ekfac", "norm, unitwise"]


def test_fields_are_the_arguments_of_build() -> None:
    recipe = kfactk.build()
    assert list(recipe.summary()) == ["kfactk", *FIELDS]
    assert all(recipe.summary()[field] == recipe.written(field) for field in FIELDS)


def test_what_ranks_compare_leaves_out_what_may_differ() -> None:
    one, other = kfactk.build(tracker=None), kfactk.build(output=lambda out: out)
    assert one.shared() == other.shared()
    assert one.shared() != kfactk.build(basis_every=7).shared()
    wires = [{"name": "mem_opt", "wire_dtype": dtype} for dtype in (None, "bfloat16")]
    told = [kfactk.build(placement=wire).shared() for wire in wires]
    assert [each["wire_dtype"] for each in told] == ["None", "'bfloat16'"]


def test_name_of_a_stage_without_a_name_is_that_of_its_class() -> None:
    assert name_of("curvature", BlockSpec(Other()).curvature).endswith("Other")
    assert name_of("curvature", kfactk.build().rules[0].curvature) == "conv_kfac"


CONTROLLED = {
    "curvature": "kfac",
    "basis": {"name": "kfac", "solver": "eigh"},
    "update": "velocity",
    "controller": "quadratic",
}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({**CONTROLLED, "lr": 0.1}, r"sets lr in each step, so lr=0\.1 .* no effect.*lr=0\.003"),
        (
            {**CONTROLLED, "update": {"name": "velocity", "momentum": 0.5}},
            r"momentum=0\.5 .* no effect\. Give update='velocity'",
        ),
        (
            {"curvature": "gradient", "basis": "muon", "lag": 3, "basis_every": 10},
            "lag=3 .* basis 'muon' decomposes nothing",
        ),
    ],
)
def test_numbers_without_effect_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(CombinationError, match=says):
        kfactk.build(**given)


def test_what_a_controller_does_not_set_may_be_given() -> None:
    made = kfactk.build(**CONTROLLED, damping=7.0)
    assert made.damping == 7.0
    assert kfactk.Recipe.from_dict(made.to_dict()) == made
    usual = kfactk.build(curvature="kfac", basis=CONTROLLED["basis"], update="velocity", lr=0.1)
    with pytest.raises(CombinationError, match=r"lr=0\.1"):
        usual.evolve(controller="quadratic")
    evolved = usual.evolve(controller="quadratic", lr=0.003)
    assert evolved == kfactk.build(**CONTROLLED)
    assert kfactk.build(curvature="gradient", basis="soap", lag=1).lag == 1
    short = kfactk.preset("short", **CONTROLLED)
    assert short.lr == kfactk.build().lr
