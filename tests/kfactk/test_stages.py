"""What the base classes of stages and the value types give their users."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch import nn

from kfactk import Basis, Curvature
from kfactk.stages import Layer


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


class Least(Basis):
    """A basis with its abstract members alone."""

    requires = frozenset({"A"})

    def decompose(self, name: str, matrix: Any, context: Any) -> Any:
        raise NotImplementedError

    def operator(self, decomposition: Any, moments: Any, damping: float, matrices: Any) -> Any:
        raise NotImplementedError


def test_a_layer_reads_its_parameters_from_the_module() -> None:
    module = nn.Linear(2, 3)
    layer = Layer("body.fc[out]", module, ("bias", "weight"), part="out")
    assert (layer.path, layer.bias, layer.sites) == ("body.fc", True, (module,))
    assert layer.anchor is module.bias
    module.bias = nn.Parameter(torch.ones(3))
    assert layer.anchor is module.bias, "a parameter that was replaced"
    assert not Layer("fc", module, ("weight",)).bias
    assert layer != Layer("body.fc[out]", module, ("bias", "weight"), part="out")


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


def test_a_basis_claims_no_law_and_has_no_moments_by_default() -> None:
    basis, nothing = Least(), {"A": {}}
    assert (basis.laws, basis.moments_from, basis.moment_decay) == (frozenset(), None, 0.0)
    assert basis.moments(nothing, None) == {}  # type: ignore[arg-type]
    assert basis.gradient_moments(nothing, torch.ones(1, 1), 1.0) == {}
    assert basis.transport({"scale": torch.ones(1)}, nothing, nothing) == {}
