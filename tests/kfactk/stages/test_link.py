"""What the base class of links gives their authors, and what a link sees of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kfactk.stages import Layer, Link, LinkedLayer, Prepared


class Least(Link):
    """A link with its abstract members alone."""

    def rows(self, layer: LinkedLayer, samples: Any) -> Any:
        raise NotImplementedError

    def statistics(self, layers: Any, rows: Any, num_terms: Any) -> Any:
        raise NotImplementedError

    def correct(self, layers: Any, gradients: Any, preconditioned: Any, statistics: Any) -> Any:
        raise NotImplementedError


def test_a_link_joins_all_layers_and_prepares_nothing_by_default() -> None:
    link, layers = (
        Least(),
        [LinkedLayer(Layer(name, nn.Linear(2, 3), ("weight",)), (3, 2), 0.1) for name in "ba"],
    )
    assert link.order(layers) is layers
    assert link.remark(layers, {}, {}) is None
    prepared = link.prepare(layers, {"S": torch.ones(1)})
    assert isinstance(prepared, Prepared)
    assert (dict(prepared.tensors), tuple(prepared.failures)) == ({}, ())


def test_a_linked_layer_has_no_rows_of_itself() -> None:
    layer = LinkedLayer(Layer("body.fc", nn.Linear(2, 3), ("weight",)), (3, 2), 0.1)
    samples: Any = None
    assert not layer.has_rows
    with pytest.raises(NotImplementedError, match=r"'body\.fc' has no rows"):
        layer.factor_rows(samples)
