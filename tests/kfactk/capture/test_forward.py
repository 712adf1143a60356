"""Backward passes over a followed forward: what they reach, and what counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import CaptureError
from tests.kfactk.small import assert_equal, batch, bound, factors, net, train, values


class Refusal(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("no gradient on Sundays")


class Wall(torch.autograd.Function):
    """The identity, whose backward lets nothing through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


class Through(nn.Module):
    """A body, a function of its output, and a head."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.body, self.head, self.function = nn.Linear(4, 4), nn.Linear(4, 3), function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.function.apply(self.body(x)))


def test_an_error_of_the_models_own_backward_reaches_the_user_as_it_is() -> None:
    model = Through(Refusal)
    optimizer = bound(model)
    with pytest.raises(RuntimeError, match="no gradient on Sundays") as raised:
        model(batch()[0])
    optimizer.close()
    assert not isinstance(raised.value, CaptureError)


def test_a_layer_that_no_gradient_reaches_is_left_alone() -> None:
    model = Through(Wall)
    optimizer = bound(model)
    before = values(model)
    train(optimizer, model, batch())
    assert_equal(values(model.body), before[:2])
    assert optimizer.layers["body"].factors == {}
    assert sorted(optimizer.layers["head"].factors) == ["A", "G"]


class Aside(nn.Module):
    """A layer beside the output that the likelihood sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale, self.layer(x)


def test_layers_none_of_which_leads_to_the_output_are_an_error_when_they_train() -> None:
    model, (x, y) = Aside(), batch()
    optimizer = bound(model)
    logits, aside = model(x)
    (F.cross_entropy(logits, y) + aside.square().mean()).backward()
    before = values(model)
    with pytest.raises(CaptureError, match="layer 'layer' has a gradient but gave no sample"):
        optimizer.step()
    assert_equal(values(model), before)


def test_a_second_backward_through_the_same_graph_counts_once() -> None:
    measured = []
    for times in (1, 2):
        torch.manual_seed(0)
        model, (x, y) = net(), batch()
        optimizer = bound(model, fisher="empirical")
        loss = F.cross_entropy(model(x), y)
        for _ in range(times):
            loss.backward(retain_graph=True)
        optimizer.step()
        measured.append(factors(optimizer))
    assert_equal(*measured)
