"""What nngeometry makes of a problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM
from nngeometry.object import PVector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.peers.problems import Problem, problem

VARIANTS: dict[str, tuple[str, str, Any]] = {
    "classif_logits": ("softmax", "categorical", 2),
    "regression": ("mse", "gaussian", 3),
    "classif_binary_logits": ("bce", "bernoulli", 3),
}
"""Its names of likelihoods, our losses and likelihoods, and its backward passes for 3 outputs."""


def loader(case: Problem) -> DataLoader[tuple[Tensor, ...]]:
    """Return the whole batch as one."""
    return DataLoader(TensorDataset(case.inputs, case.targets), batch_size=len(case.inputs))


def likelihood_problem(model: str, variant: str) -> Problem:
    """Return a problem with the likelihood of one of its variants: it divides by examples."""
    loss, likelihood, _ = VARIANTS[variant]
    return attrs.evolve(problem(model, loss), likelihood=likelihood)


def collection(case: Problem, layers: Mapping[str, nn.Module]) -> LayerCollection:
    """Return its description of some layers."""
    found = LayerCollection()
    for module in layers.values():
        found.add_layer_from_model(case.model, module)
    return found


def fisher(
    case: Problem, representation: Any, variant: str, layers: Mapping[str, nn.Module] | None = None
) -> Any:
    """Return its Fisher matrix of some layers, by default of those with a matrix."""
    return FIM(
        model=case.model,
        loader=loader(case),
        representation=representation,
        variant=variant,
        layer_collection=collection(case, case.layers() if layers is None else layers),
    )


def vector(case: Problem, tensors: Mapping[str, Tensor]) -> PVector:
    """Return tensors by parameter name as its vector."""
    by_layer = {
        layer: tuple(tensors[f"{layer}.{name}"] for name, _ in module.named_parameters())
        for layer, module in case.layers().items()
    }
    return PVector(collection(case, case.layers()), dict_repr=by_layer)


def tensors(found: PVector) -> list[Tensor]:
    """Return the tensors of its vector in the order of parameters."""
    return [tensor for layer in found.to_dict().values() for tensor in layer]
