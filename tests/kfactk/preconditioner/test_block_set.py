"""Blocks belong to modules and parameters, and stand beside each other until a step adopts one."""

from __future__ import annotations

import torch
from torch import nn

import kfactk
from kfactk import Optimizer
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.block_set import BlockSet


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def bound(net: nn.Module) -> tuple[Optimizer, BlockSet]:
    optimizer = kfactk.build(lr=0.1, damping=0.1).bind(net)
    return optimizer, optimizer._preconditioner.blocks


def looked(optimizer: Optimizer) -> list[Block]:
    """The blocks after the optimizer has followed the model, as it does before each forward."""
    optimizer._follow_model()
    return optimizer._preconditioner.blocks.current()


def names(blocks: list[Block]) -> list[str]:
    return [block.name for block in blocks]


def test_the_same_layers_keep_their_blocks() -> None:
    _, blocks = bound(model())
    first = blocks.current()
    assert names(first) == ["0", "2"]
    assert blocks.current() == first == list(blocks)


def test_a_new_block_stands_beside_the_old_one_until_it_is_adopted() -> None:
    net = model()
    optimizer, blocks = bound(net)
    old = blocks.current()
    kept, net[2] = net[2], nn.Linear(4, 3)
    optimizer.add_param_group({"params": net[2].parameters()})
    new = looked(optimizer)
    assert new[0] is old[0]
    assert new[1] is not old[1]
    assert list(blocks) == old, "nothing is adopted by looking"
    net[2] = kept
    assert looked(optimizer) == old, "the layer came back before a step"
    net[2] = new[1].layer.module
    blocks.adopt(looked(optimizer))
    assert list(blocks) == [*old, looked(optimizer)[1]]
    blocks.prune()
    assert list(blocks) == looked(optimizer) != old


def test_a_frozen_layer_keeps_its_block_and_one_that_left_does_not() -> None:
    net = model()
    optimizer, blocks = bound(net)
    first, last = blocks.current()
    net[2].weight.requires_grad_(False)
    assert blocks.current() == [first]
    blocks.adopt([first])
    blocks.prune()
    assert list(blocks) == [first, last]
    net[2] = nn.Tanh()
    looked(optimizer)
    blocks.prune()
    assert list(blocks) == [first]


def test_a_layer_with_another_name_keeps_its_block() -> None:
    net = model()
    optimizer, blocks = bound(net)
    first, last = blocks.current()
    net.insert(1, nn.ReLU())
    assert looked(optimizer) == [first, last]
    assert names(blocks.current()) == ["0", "3"]


def test_within_a_step_nothing_is_looked_at_again() -> None:
    net = model()
    optimizer, blocks = bound(net)
    optimizer.param_groups[0]["damping"] = 0.7
    before = blocks.current()
    layers = [block.layer for block in before]
    with blocks.held(optimizer._groups.by_parameter):
        net[2].weight.requires_grad_(False)
        assert blocks.current() == before
        assert [block.damping for block in before] == [0.7, 0.7]
        assert before[0].layer.tensors() is before[0].layer.tensors()
    assert [block.layer for block in before] == layers
    assert blocks.current() == before[:1]


def test_one_rank_agrees_with_itself() -> None:
    net = model()
    optimizer, blocks = bound(net)
    blocks.check_ranks(blocks.current(), optimizer._preconditioner.communicator, ())
    assert torch.equal(net[0].weight, blocks.current()[0].layer.anchor)
