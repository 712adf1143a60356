"""Gradients of layers inside a module, by the Fisher pass and by autograd, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from kfactk import Curvature, Layer, LayerCall
from kfactk.capture.forward import Forward
from kfactk.capture.hooks import ModelHooks
from kfactk.preconditioner.coverage import ModelSurvey
from kfactk.preconditioner.rules import BlockRule
from kfactk.testing import PipelineLaws
from kfactk.testing._support.division import equal_on_ranks
from kfactk.testing._support.training import STEPS, identical, outcome, through_file
from kfactk_stages.basis.ekfac import Ekfac
from tests import deviations

MOST = 3
"""Longest side that is whole, where another form is named."""
WIDE = (None, "diagonal", "blocks", "identity")
"""What stands for a longer side; `None` where all are whole."""

SPREAD = (("diagonal", "mem_opt"), ("blocks", "comm_opt"))
"""Forms, each with a placement of their matrices on ranks."""


def limited(name: str, wide: str | None) -> dict[str, Any]:
    """Return a curvature with sides of this form."""
    return {"name": name} if wide is None else {"name": name, "max_side": MOST, "wide": wide}


@attrs.define(eq=False)
class Listener:
    """Takes the calls of followed layers with the gradient of `(output * cotangent).sum()`."""

    layers: Sequence[Layer]
    cotangent: Tensor
    found: dict[str, list[LayerCall]] = attrs.Factory(dict)

    def _begin_forward(self) -> Sequence[Layer]:
        return self.layers

    def _end_forward(self, forward: Forward) -> None:
        output = forward.output
        forward.count_examples(len(output))
        forward.run((output * self.cotangent).sum(), output, self._take)

    def _take(self, layer: Layer, calls: list[LayerCall]) -> None:
        self.found[layer.name] = calls


@attrs.frozen
class Inside:
    """The layers of a curvature inside the modules of a model.

    Args:
        curvature: The curvature.
    """

    curvature: Curvature

    def layers_of(self, model: nn.Module) -> list[Layer]:
        """Return the layers of a model."""
        survey = ModelSurvey(model, [BlockRule(self.curvature, Ekfac())])
        return [layer for layer, _ in survey.layers({id(p) for p in model.parameters()})]

    def gradients(self, model: nn.Module, args: Sequence[Any], cotangent: Tensor) -> dict[str, Any]:
        """Return D of each layer by the Fisher pass."""
        layers = self.layers_of(model)
        listener = Listener(layers, cotangent)
        hooks = ModelHooks(model, listener, evaluation=True)
        torch.manual_seed(7)
        model(*args)
        hooks.close()
        return {
            layer.name: self.curvature.samples(
                layer, listener.found[layer.name], num_terms=1.0, first=True
            ).per_example_gradients()
            for layer in layers
        }

    def autograds(self, model: nn.Module, args: Sequence[Any], cotangent: Tensor) -> dict[str, Any]:
        """Return D of each layer by one backward for each example."""
        torch.manual_seed(7)
        output, found = model(*args), {}
        for layer in self.layers_of(model):
            own, matrices = layer.tensors(), []
            for n in range(len(output)):
                alone = (output[n] * cotangent[n]).sum()
                grads = torch.autograd.grad(alone, list(own.values()), retain_graph=True)
                matrices.append(self.curvature.matrix(layer, dict(zip(own, grads, strict=True))))
            found[layer.name] = torch.stack(matrices, -3)
        return found


def check_resumes(laws: PipelineLaws, curvature: Sequence[Any]) -> None:
    """Assert that a run that goes on from a file does what an uninterrupted one does, to the bit.

    Args:
        laws: What is trained.
        curvature: The curvature.
    """
    recipe = laws.build({**laws.recipe, "curvature": curvature})
    model, optimizer = laws.run(recipe)
    other = laws.fresh()
    other.load_state_dict(model.state_dict())
    resumed = recipe.bind(other)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for number in range(STEPS, 2 * STEPS):
        laws.step(optimizer, model, number)
        laws.step(resumed, other, number)
    identical(outcome(model, optimizer), outcome(other, resumed), "a resumed run goes on otherwise")


def check_ranks(laws: PipelineLaws, curvature: Sequence[Any], placement: str) -> None:
    """Assert that two ranks do what one process does."""
    equal_on_ranks(laws, {**laws.recipe, "curvature": curvature, "placement": placement})


def deviation(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative deviation of any layer."""
    assert found.keys() == expected.keys()
    assert found
    return max(deviations.deviation(found[k], expected[k]) for k in expected)


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
