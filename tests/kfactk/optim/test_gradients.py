"""Gradients are read, paired and swapped without a change to what the user sees."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfactk import GradientPair
from kfactk.optim import gradients
from kfactk.preconditioner.block import Block
from tests.kfactk.small import bound, net

LAYERS = ("0", "2")


def prepared() -> tuple[nn.Sequential, list[Block], list[dict[str, Any]], dict[int, Any]]:
    """Return a model with gradients, its blocks, and groups with weight decay 0 and 0.5."""
    model = net()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.1, "weight_decay": 0.0, "damping": 0.3},
        {"params": list(model[2].parameters()), "lr": 0.2, "weight_decay": 0.5, "damping": 0.4},
    ]
    by_id = {id(p): group for group in groups for p in group["params"]}
    return model, bound(model)._preconditioner.blocks.current(), groups, by_id


def given(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("decayed", [False, True])
def test_read_joins_the_gradients_of_each_layer(decayed: bool) -> None:
    model, blocks, _, groups = prepared()
    before = given(model)
    found = gradients.read(blocks, groups, decayed=blocks if decayed else ())
    for name in LAYERS:
        layer = model[int(name)]
        decay = 0.5 if decayed and name == "2" else 0.0
        expected = [
            layer.weight.grad + decay * layer.weight,
            (layer.bias.grad + decay * layer.bias).unsqueeze(1),
        ]
        torch.testing.assert_close(found.matrices[name], torch.cat(expected, 1))
        assert set(found.named[name]) == {"weight", "bias"}
    assert all(map(torch.equal, before, given(model)))


def test_read_leaves_out_layers_whose_anchor_has_no_gradient() -> None:
    model, blocks, _, groups = prepared()
    model[0].weight.grad = None
    model[2].bias.grad = None
    found = gradients.read(blocks, groups)
    assert list(found.matrices) == ["2"]
    assert list(found.named["2"]) == ["weight"]
    assert not found.matrices["2"][:, -1].any(), "a missing bias gradient counts as zero"


def test_paired_gives_each_parameter_its_part_and_its_learning_rate() -> None:
    model, blocks, _, groups = prepared()
    read = gradients.read(blocks, groups)
    parameters, pairs = gradients.paired(blocks, read, {"2": 2.0 * read.matrices["2"]}, groups)
    assert [id(p) for p in parameters] == [id(model[2].weight), id(model[2].bias)]
    for parameter, pair in zip(parameters, pairs, strict=True):
        torch.testing.assert_close(pair.gradient, parameter.grad)
        torch.testing.assert_close(pair.preconditioned, 2.0 * parameter.grad)
        assert (pair.lr, pair.damping) == (0.2, 0.4)
    assert gradients.local_parts(parameters, pairs) == pairs


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_swapped_restores_gradients_and_weight_decay(decayed: bool, fails: bool) -> None:
    model, _, groups, _ = prepared()
    weight, bias = model[2].weight, model[2].bias
    before = [parameter.grad for parameter in model.parameters()]
    new, plain = torch.ones_like(weight), bias.grad.clone()
    swapped = gradients.swapped(groups, [(weight, new)], decayed=decayed)
    with pytest.raises(MemoryError) if fails else contextlib.nullcontext(), swapped:
        assert torch.equal(weight.grad, new)
        torch.testing.assert_close(bias.grad, (plain + 0.5 * bias).detach() if decayed else plain)
        assert [group["weight_decay"] for group in groups] == [0.0, 0.0 if decayed else 0.5]
        if fails:
            raise MemoryError
    assert all(p.grad is old for p, old in zip(model.parameters(), before, strict=True))
    assert [group["weight_decay"] for group in groups] == [0.0, 0.5]


def test_local_parts_of_a_plain_parameter_is_the_pair_itself() -> None:
    parameter = nn.Parameter(torch.ones(2))
    pair = GradientPair(torch.ones(2), torch.zeros(2), 0.1)
    assert gradients.local_parts([parameter], [pair])[0] is pair
