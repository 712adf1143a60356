"""What the base classes of curvatures give their authors."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import nn

from kfactk.stages import Curvature, GradientCurvature, Layer


@attrs.frozen
class Plain(Curvature):
    """A curvature with its abstract methods alone."""

    provides = frozenset({"G", "A"})

    def unsupported(self, module: nn.Module) -> str | None:
        return None

    def matrix(self, layer: Layer, tensors: Any) -> Any:
        return tensors["weight"]

    def tensors(self, layer: Layer, matrix: Any) -> Any:
        return {"weight": matrix}

    def blank(self, layer: Layer) -> Any:
        raise NotImplementedError

    def samples(self, layer: Layer, calls: Any, *, num_terms: Any, first: bool) -> Any:
        raise NotImplementedError

    def gradient_factors(self, layer: Layer, samples: Any) -> Any:
        return {"G": "from gradients"}


class WithInputs(Plain):
    def input_factors(self, layer: Layer, samples: Any) -> Any:
        return {"A": "from inputs"}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (nn.Linear(2, 2), ("weight", "bias")),
        (nn.Linear(2, 2, bias=False), ("weight",)),
        (nn.Tanh(), ()),
    ],
)
def test_a_module_is_one_part_by_default(module: nn.Module, names: tuple[str, ...]) -> None:
    assert Plain().parts(module) == {"": names}


def test_tied_modules_compute_the_same_where_class_and_settings_agree() -> None:
    one, other = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    assert Plain().same_call(one, other)
    assert not Plain().same_call(one, nn.Conv2d(2, 2, 3, padding=0))
    assert not Plain().same_call(nn.Linear(2, 2), nn.Bilinear(2, 2, 2))


def test_factors_join_those_of_inputs_and_of_gradients() -> None:
    layer: Any = None
    assert Plain().factors(layer, None) == {"G": "from gradients"}
    assert WithInputs().factors(layer, None) == {"A": "from inputs", "G": "from gradients"}


def test_assembled_matrices_are_the_factors_that_are_there() -> None:
    a, g = torch.ones(1), torch.ones(2)
    layer: Any = None
    assert list(Plain().assemble(layer, {"other": a, "G": g})) == ["G"]
    assert list(Plain().assemble(layer, {"G": g, "A": a})) == ["A", "G"]


@attrs.frozen
class OfGradient(GradientCurvature):
    """A curvature of gradients with the members of its author alone."""

    provides = frozenset({"A"})

    def unsupported(self, module: nn.Module) -> str | None:
        return None

    def matrix(self, layer: Layer, tensors: Any) -> Any:
        return tensors["weight"]

    def tensors(self, layer: Layer, matrix: Any) -> Any:
        return {"weight": matrix}

    def factors_of_gradient(self, layer: Layer, gradient: Any, names: Any = None) -> Any:
        return {}


def test_a_curvature_of_gradients_has_no_samples() -> None:
    curvature, layer = OfGradient(), Layer("fc", nn.Linear(2, 2), ("weight",))
    assert curvature.same_call(nn.Linear(2, 2), nn.Conv2d(2, 2, 1)), "all uses are in the gradient"
    assert not curvature.counts_next
    with pytest.raises(NotImplementedError, match="follows no calls"):
        curvature.blank(layer)
    with pytest.raises(NotImplementedError, match="has no samples"):
        curvature.samples(layer, [], num_terms=1.0, first=True)
    nothing: Any = None
    with pytest.raises(NotImplementedError, match="has no samples"):
        curvature.gradient_factors(layer, nothing)
