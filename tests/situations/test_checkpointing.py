"""Activation checkpointing, in the ways that models write it.

Truth is EKFAC written again on the same model without checkpointing.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kfactk import CaptureError
from tests.situations.by_hand import RUNNING, Hand, assert_same, bound, categorical, draw, sgd, take

EXAMPLES, STEPS = 7, 3
LAYERS = ["blocks.0.0", "blocks.1.0", "blocks.2.0", "head"]


class Deep(nn.Module):
    """Three blocks and a head; `way` is how they are checkpointed."""

    def __init__(self, way: str, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout)) for _ in range(3))
        )
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(getattr(self, self.way)(x))  # type: ignore[no-any-return]

    def plain(self, x: Tensor) -> Any:
        return self.blocks(x)

    def each(self, x: Tensor, *, reentrant: bool = False) -> Any:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    def reentrant(self, x: Tensor) -> Any:
        return self.each(x, reentrant=True)

    def one(self, x: Tensor) -> Any:
        return self.blocks[2](checkpoint(self.blocks[:2], x, use_reentrant=False))

    def nested(self, x: Tensor) -> Any:
        return checkpoint(self.one, x, use_reentrant=False)

    def in_parts(self, x: Tensor) -> Any:
        return checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)

    def a_function(self, x: Tensor) -> Any:
        """Hold modules in a closure, as user code does."""

        def run(x: Tensor) -> Any:
            return self.blocks[1](self.blocks[0](x))

        return self.blocks[2](checkpoint(run, x, use_reentrant=False, determinism_check="none"))


def batch(step: int) -> tuple[Tensor, Tensor]:
    return draw(EXAMPLES, 4, seed=step), (torch.arange(EXAMPLES) + step) % 3


def one(model: nn.Module, fisher: str, x: Tensor, y: Tensor) -> list[Tensor]:
    logits = model(x[None])
    return categorical(logits) if fisher == "exact" else [F.cross_entropy(logits, y[None])]


def assert_as_by_hand(model: Deep, fisher: str, **options: Any) -> None:
    twin = copy.deepcopy(model)
    twin.way = "plain"
    if fisher == "running":
        options |= {"fisher": "empirical", "basis": RUNNING}
    optimizer, rule = bound(model, **{"fisher": fisher, **options}), sgd(twin)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        hand = Hand(twin, LAYERS)
        for row, label in zip(x, y, strict=True):
            hand.example(one, twin, fisher, row, label)
        how = "running" if fisher == "running" else "solve"
        take(rule, hand, F.cross_entropy(twin(x), y), how=how)
    assert_same(model, twin)


@pytest.mark.parametrize("way", ["each", "one", "nested", "in_parts", "a_function"])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "running"])
def test_not_reentrant(way: str, fisher: str) -> None:
    assert_as_by_hand(Deep(way), fisher)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_reentrant_is_refused_with_its_remedy(fisher: str) -> None:
    model = Deep("reentrant")
    optimizer = bound(model, fisher=fisher)

    def step() -> None:
        x, y = batch(0)
        F.cross_entropy(model(x.requires_grad_()), y).backward()
        optimizer.step()

    with pytest.raises(CaptureError, match="use_reentrant=False"):
        step()
    optimizer.close()


@pytest.mark.parametrize("way", ["each", "in_parts"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_dropout_draws_the_same_again(way: str, fisher: str) -> None:
    """A model that is not checkpointed, with the same random state, takes the same steps."""
    ends = []
    for each in ("plain", way):
        model = Deep(each, dropout=0.5)
        optimizer = bound(model, fisher=fisher)
        torch.manual_seed(1)
        for step in range(STEPS):
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        ends.append(model)
    assert_same(*ends)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_checkpointing_that_begins_after_some_steps(fisher: str) -> None:
    """As `gradient_checkpointing_enable` after bind."""
    model = Deep("plain")
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model, fisher=fisher), sgd(twin)
    for step in range(STEPS):
        model.way = "each" if step % 2 else "plain"
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        hand = Hand(twin, LAYERS)
        for row, label in zip(x, y, strict=True):
            hand.example(one, twin, fisher, row, label)
        take(rule, hand, F.cross_entropy(twin(x), y))
    assert_same(model, twin)
