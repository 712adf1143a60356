"""An error of a faulty stage names the stage, the layer and what was expected."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

import kfactk
from kfactk import CurvatureOperator, KfactkError, PluginError
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.clip.norm import NormClip
from kfactk_stages.curvature.kfac import Kfac
from tests.kfactk.small import assert_equal, batch, net, train, values


class Silent(Kfac):
    def input_factors(self, layer: Any, samples: Any) -> Any:
        return {}

    gradient_factors = input_factors


class Bare(Kfac):
    def input_factors(self, layer: Any, samples: Any) -> Any:
        return {"A": torch.eye(5)}


class Misnamed(Kfac):
    def assemble(self, layer: Any, factors: Any) -> Any:
        return {"a": factors["A"], "G": factors["G"]}


class Oblong(Kfac):
    def assemble(self, layer: Any, factors: Any) -> Any:
        return {"A": factors["A"][:2], "G": factors["G"]}


class Lookup(Kfac):
    def assemble(self, layer: Any, factors: Any) -> Any:
        return {"A": factors["wrong"]}


class Deaf(Kfac):
    def samples(self, layer: Any, calls: Any) -> Any:  # type: ignore[override]
        raise AssertionError


class TransposingOperator(CurvatureOperator):
    def solve(self, v: Tensor) -> Tensor:
        return v.T

    def multiply(self, v: Tensor) -> Tensor:
        return v

    def condition(self) -> Tensor:
        return torch.ones(())


class Reshaping(Ekfac):
    def operator(
        self, decomposition: Any, moments: Any, damping: float, matrices: Any
    ) -> CurvatureOperator:
        return TransposingOperator()


class Unmeasured(Ekfac):
    def moments(self, decomposition: Any, samples: Any) -> Any:
        return {"scale": torch.ones(())}


class Short(NormClip):
    def clip(self, pairs: Any, dot: Any) -> Any:
        clipped, factor = super().clip(pairs, dot)
        return clipped[1:], factor


class Lone(NormClip):
    def clip(self, pairs: Any, dot: Any) -> Any:
        return super().clip(pairs, dot)[0]


class Broken(NormClip):
    def clip(self, pairs: Any, dot: Any) -> Any:
        return [pair.preconditoned for pair in pairs], 1.0


FAULTS = {
    Silent: ("curvature", "gave nothing on layer"),
    Bare: ("curvature", "'A': 'Tensor'"),
    Misnamed: ("curvature", "assembled G, a on layer '0'; the basis requires A, G"),
    Oblong: ("curvature", r"last two dimensions equal, not \{'A': "),
    Lookup: ("curvature", "KeyError: 'wrong'"),
    Deaf: ("curvature", "unexpected keyword argument"),
    Reshaping: ("basis", r"solve gave the shape \(5, 6\) for \(6, 5\)"),
    Unmeasured: ("basis", "'scale': 'Tensor'"),
    Short: ("clip", "a list of 4 tensors"),
    Lone: ("clip", "gave list; it must give a pair"),
    Broken: ("clip", "no attribute 'preconditoned'"),
}


@pytest.mark.parametrize("stage", FAULTS, ids=lambda stage: stage.__name__)
def test_error_of_a_faulty_stage_names_family_and_fault(stage: type) -> None:
    family, message = FAULTS[stage]
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    optimizer = kfactk.build(**{family: stage()}).bind(model)
    before = values(model)
    with pytest.raises(PluginError, match=message) as caught:
        train(optimizer, model, batch())
    assert f"{family} {stage.__module__}:{stage.__name__}" in str(caught.value)
    assert_equal(before, values(model))


def test_kfactk_error_passes_through_a_stage_unchanged() -> None:
    class Refusing(Kfac):
        def gradient_factors(self, layer: Any, samples: Any) -> Any:
            raise KfactkError("as it is")

    model = net()
    with pytest.raises(KfactkError, match=r"^as it is$"):
        train(kfactk.build(curvature=Refusing()).bind(model), model, batch())


@pytest.mark.parametrize(
    ("trait", "value"), [("provides", ["A", "G"]), ("provides", "AG"), ("provides", {1})]
)
def test_build_refuses_traits_of_the_wrong_type(trait: str, value: Any) -> None:
    stage = type("Odd", (Kfac,), {trait: value})
    with pytest.raises(PluginError, match=f"has {trait}=.*must be a frozenset of names"):
        kfactk.build(curvature=stage)


def test_build_refuses_an_unknown_source_of_moments() -> None:
    @attrs.frozen
    class Typo(Ekfac):
        @property
        def moments_from(self) -> str | None:
            return "sample"

    with pytest.raises(
        PluginError, match="moments_from='sample', which must be 'samples', 'gradient' or None"
    ):
        kfactk.build(basis=Typo())


class Scalars(NormClip):
    def clip(self, pairs: Any, dot: Any) -> Any:
        return [torch.ones(()) for _ in pairs], torch.ones(())


class Turned(Kfac):
    def tensors(self, layer: Any, matrix: Tensor) -> Any:
        return {"weight": matrix[:, :-1].T, "bias": matrix[:, -1]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"clip": Scalars()},
            r"clip .*Scalars changed the shape of a gradient: torch.Size\(\[\]\) for",
        ),
        (
            {"curvature": Turned()},
            r"curvature .*Turned failed on layer .*`tensors` gave the shapes",
        ),
    ],
)
def test_error_of_wrong_shapes_names_the_stage(options: dict[str, Any], message: str) -> None:
    model = net()
    optimizer = kfactk.build(**options).bind(model)
    with pytest.raises(PluginError, match=message):
        train(optimizer, model, batch())
