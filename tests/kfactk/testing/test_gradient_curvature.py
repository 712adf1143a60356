"""The laws of curvatures of gradients: stages that break one are caught; other stages obey them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from kfactk import GradientCurvature, Layer, OptionError, Statistic, Tensors
from kfactk.testing import GradientCurvatureLaws
from kfactk_stages.curvature.gradient import Gradient
from tests.kfactk.testing.broken import caught, laws_of


@attrs.frozen
class Second(GradientCurvature):
    """The square of each entry, of matrices alone: an author's curvature with other names."""

    provides: ClassVar = frozenset({"square"})

    def unsupported(self, module: nn.Module) -> str | None:
        weight = module._parameters.get("weight")
        return None if weight is not None and weight.ndim == 2 else "it has no matrix"

    def parts(self, module: nn.Module) -> dict[str, tuple[str, ...]]:
        return {"": ("weight",)}

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        return tensors["weight"]

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        return {"weight": matrix}

    def factors_of_gradient(
        self, layer: Layer, gradient: Tensor, names: Collection[str] | None = None
    ) -> dict[str, Statistic]:
        wanted = names is None or "square" in names
        return {"square": Statistic(gradient.square(), 1.0)} if wanted else {}


class TestSecond(GradientCurvatureLaws):
    stage = Second


def with_factors(change: Any, **options: Any) -> Any:
    """A stage whose factors went through a function of their name, statistic and gradient."""

    def factors(self: Any, layer: Any, gradient: Any, names: Any = None) -> Any:
        found = Gradient.factors_of_gradient(self, layer, gradient, names)
        return {name: change(name, each, gradient) for name, each in found.items()}

    return type("Broken", (Gradient,), {"factors_of_gradient": factors})(**options)


def stage(**members: Any) -> Any:
    return type("Broken", (Gradient,), members)()


def total(change: Any) -> Any:
    return with_factors(lambda name, each, v: attrs.evolve(each, total=change(name, each.total, v)))


def weighed(each: Tensor) -> Tensor:
    """Return the numbers times another one in each row."""
    return (
        each * (1.0 + torch.arange(each.shape[-2], dtype=each.dtype, device=each.device))[:, None]
    )


def all_of_one(self: Any, layer: Any, gradient: Any, names: Any = None) -> Any:
    whole = Gradient.factors_of_gradient(self, layer, gradient)
    return {name: whole[name] for name in sorted(whole)[: 1 if names else None]}


def on_numbers(self: Any, layer: Any, gradient: Tensor, names: Any = None) -> Any:
    found = Gradient.factors_of_gradient(self, layer, gradient, names)
    size = 2 if gradient.is_meta else 0
    return {
        n: attrs.evolve(s, total=nn.functional.pad(s.total, (0, size))) for n, s in found.items()
    }


class Counting:
    calls = 0


def drifting(name: str, each: Tensor, v: Tensor) -> Tensor:
    Counting.calls += 1
    return each * (1 + Counting.calls)


def spoiled(name: str, each: Tensor, v: Tensor) -> Tensor:
    v[..., :1] += 1
    return each


def drawn(name: str, each: Tensor, v: Tensor) -> Tensor:
    torch.rand(1)
    return each


def lopsided(each: Tensor) -> Tensor:
    return each + each.triu(1)


BREAKS: dict[str, tuple[str, Any, str]] = {
    "tensors reversed": (
        "test_tensors_is_the_inverse_of_matrix",
        stage(
            tensors=lambda self, layer, matrix: Gradient.tensors(self, layer, matrix.flip(-1, -2))
        ),
        r"tensors\(matrix\(x\)\) differs from x",
    ),
    "no factor G": (
        "test_what_is_assembled",
        stage(
            assemble=lambda self, layer, factors: {
                n: m for n, m in Gradient.assemble(self, layer, factors).items() if n != "G"
            }
        ),
        r"assemble\(\) returns \['A', 'L', 'R'\], where `provides`",
    ),
    "a side too short": (
        "test_what_is_assembled",
        total(lambda name, each, v: each if name == "L" else each[..., 1:, 1:]),
        "the input side has the length",
    ),
    "not symmetric": (
        "test_moments_are_symmetric_and_positive",
        total(lambda name, each, v: lopsided(each) if name == "R" else each),
        "R is not symmetric",
    ),
    "negative": (
        "test_moments_are_symmetric_and_positive",
        total(lambda name, each, v: -each),
        "R is not positive semi-definite|L is not|L is a diagonal with numbers below zero",
    ),
    "another unit": (
        "test_l_and_r_are_second_moments",
        total(lambda name, each, v: each / 2),
        "is not the part of the second moment of (rows|columns) that it names",
    ),
    "the root": (
        "test_gradients_scale_the_factors",
        total(lambda name, each, v: each / each.norm().clamp(min=1e-30)),
        r"gradients times -?1 2\^-?\d+ do not multiply it by c\^2",
    ),
    "an absolute number": (
        "test_nothing_comes_of_nothing",
        total(lambda name, each, v: each + 1e-3),
        "of a gradient of zeros is",
    ),
    "rows that differ": (
        "test_rows_and_columns_have_no_order",
        with_factors(
            lambda name, each, v: attrs.evolve(
                each,
                total=weighed(each.total)
                if each.total.shape[-1] == 1
                else weighed(weighed(each.total).mT).mT,
            )
        ),
        "does not follow rows and columns that come in another order",
    ),
    "counted by size": (
        "test_steps_count_alike",
        with_factors(lambda name, each, v: attrs.evolve(each, count=float(v.norm()))),
        "is counted .* times, not once each",
    ),
    "deaf to names": (
        "test_factors_asked_for_are_those_of_all",
        stage(factors_of_gradient=all_of_one),
        "asked for R, it does not give",
    ),
    "another shape without numbers": (
        "test_shapes_need_no_numbers",
        stage(factors_of_gradient=on_numbers),
        "without numbers they are",
    ),
    "rounded": (
        "test_float32_stays_float32",
        total(lambda name, each, v: each if v.dtype == torch.float64 else each.bfloat16().float()),
        "of float32 is not what it is in float64",
    ),
    "float64 throughout": (
        "test_float32_stays_float32",
        total(lambda name, each, v: each.double()),
        "of float32 is torch.float64",
    ),
    "a memory": (
        "test_nothing_is_changed",
        total(drifting),
        "a second call with the same gradient gives another factor",
    ),
    "a gradient written over": (
        "test_nothing_is_changed",
        total(spoiled),
        "changed in place|another factor",
    ),
    "draws": ("test_nothing_is_changed", total(drawn), "draws from the global random numbers"),
    "factors that drift": (
        "test_factors_are_means_over_steps",
        with_factors(lambda name, each, v: attrs.evolve(each, total=drifting(name, each.total, v))),
        "it is not the running mean of those of the steps",
    ),
    "a memory that is not saved": (
        "test_a_resumed_run_goes_on",
        total(drifting),
        "it is another one after a load",
    ),
    "an error in place of a reason": (
        "test_unrelated_modules_are_refused_by_a_reason",
        stage(unsupported=lambda self, module: None if module.weight.ndim else "no"),
        r"unsupported\(\) raises AttributeError",
    ),
    "no parts": (
        "test_unrelated_modules_are_refused_by_a_reason",
        stage(unsupported=lambda self, module: None),
        r"unsupported\(\) accepts Tanh, and parts\(\) names no parameter",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_stage_that_breaks_a_law_is_caught(name: str) -> None:
    broken_law, broken, message = BREAKS[name]
    found = caught(GradientCurvatureLaws, broken, broken_law)
    assert broken_law in found, f"{broken_law} does not see it"
    assert re.search(message, found[broken_law]), found[broken_law]


def test_groups_that_mix_are_caught() -> None:
    mixing = with_factors(
        lambda name, each, v: attrs.evolve(
            each, total=each.total + (each.total.mean(0) if v.ndim > 2 else 0.0)
        ),
        dims="batch",
    )
    found = caught(GradientCurvatureLaws, mixing, "test_groups_do_not_mix")
    assert "changes with the gradients of others" in found["test_groups_do_not_mix"]


def test_each_law_is_broken_by_some_stage() -> None:
    seen = {law for law, _, _ in BREAKS.values()} | {"test_groups_do_not_mix"}
    assert set(laws_of(GradientCurvatureLaws)) - seen == {"test_two_ranks_are_one_process"}


def test_a_curvature_of_samples_is_sent_to_its_own_laws() -> None:
    laws = type("TestKfac", (GradientCurvatureLaws,), {"stage": "kfac"})()
    with pytest.raises(OptionError, match="use CurvatureLaws"):
        laws.cases()


def test_a_stage_that_refuses_all_modules_is_told() -> None:
    refusing = stage(unsupported=lambda self, module: "never")
    laws = type("TestRefusing", (GradientCurvatureLaws,), {"stage": refusing})()
    with pytest.raises(OptionError, match="write `modules`"):
        laws.cases()
