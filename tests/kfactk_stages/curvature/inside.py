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
from kfactk_stages.basis.ekfac import Ekfac
from tests import deviations


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


def deviation(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative deviation of any layer."""
    assert found.keys() == expected.keys()
    assert found
    return max(deviations.deviation(found[k], expected[k]) for k in expected)


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
