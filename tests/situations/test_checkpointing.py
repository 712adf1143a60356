"""Activation checkpointing, in the ways that models write it.

Truth is EKFAC written again on the same model without checkpointing.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

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

    def on_the_cpu(self, x: Tensor) -> Any:
        """Not checkpointed: what backward needs is kept elsewhere."""
        with torch.autograd.graph.save_on_cpu():
            return self.blocks(x)

    def selective(self, x: Tensor) -> Any:
        """Keep the results of some operations, compute the others again."""
        kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=kept)
        return x

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


def in_a_checkpoint(model: nn.Module, x: Tensor, rows: int) -> Tensor:
    """Checkpoint the model itself for some rows, and call it for the rest."""
    parts = [checkpoint(model, x[:rows], use_reentrant=False)]
    parts += [model(x[rows:])] if rows < len(x) else []
    return torch.cat(parts)


def assert_as_by_hand(model: Deep, fisher: str, *, outside: int = 0, **options: Any) -> None:
    """Train it and its twin, which has no checkpoints.

    Args:
        model: The model.
        fisher: Its Fisher stage, or "running".
        outside: For how many rows the loop checkpoints the model itself.
        **options: More of the recipe.
    """
    twin = copy.deepcopy(model)
    twin.way = "plain"
    if fisher == "running":
        options |= {"fisher": "empirical", "basis": RUNNING}
    optimizer, rule = bound(model, **{"fisher": fisher, **options}), sgd(twin)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        logits = in_a_checkpoint(model, x, outside) if outside else model(x)
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        hand = Hand(twin, LAYERS)
        for row, label in zip(x, y, strict=True):
            hand.example(one, twin, fisher, row, label)
        how = "running" if fisher == "running" else "solve"
        take(rule, hand, F.cross_entropy(twin(x), y), how=how)
    assert_same(model, twin)


@pytest.mark.parametrize("way", ["each", "one", "nested", "in_parts", "a_function", "on_the_cpu"])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "running"])
def test_not_reentrant(way: str, fisher: str) -> None:
    assert_as_by_hand(Deep(way), fisher)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("way", ["plain", "each"])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "running"])
def test_the_bound_model_itself_in_a_checkpoint(way: str, fisher: str, early: bool) -> None:
    """The forward of the recomputation is no second sample, whether it stops early or not."""
    with set_checkpoint_early_stop(early):
        assert_as_by_hand(Deep(way), fisher, outside=3 if fisher == "exact" else EXAMPLES)


@pytest.mark.parametrize("fisher", ["empirical", "running"])
def test_selective_with_the_users_own_backward(fisher: str) -> None:
    """torch allows one backward alone, so that there may be no Fisher pass."""
    assert_as_by_hand(Deep("selective"), fisher)


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


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("way", ["each", "in_parts"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_dropout_and_autocast_are_those_of_the_forward(way: str, fisher: str, half: bool) -> None:
    """A model that is not checkpointed, with the same random state, takes the same steps."""
    ends = []
    for each in ("plain", way):
        model = Deep(each, dropout=0.5).float()
        optimizer = bound(model, fisher=fisher)
        torch.manual_seed(1)
        for step in range(STEPS):
            x, y = batch(step)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                loss = F.cross_entropy(model(x.float()), y)
            loss.backward()
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


class Images(nn.Module):
    """Indices that are embedded, convolved and normalized, in one checkpoint."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.embedding, self.conv = nn.Embedding(10, 2), nn.Conv2d(2, 4, 3, padding=1)
        self.batch_norm, self.norm, self.head = nn.BatchNorm2d(4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.double()

    def body(self, x: Tensor) -> Tensor:
        planes = self.embedding(x).permute(0, 3, 1, 2)
        pooled: Tensor = self.batch_norm(self.conv(planes)).relu().mean((2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        found = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(self.norm(found))  # type: ignore[no-any-return]


def trained_on_images(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(10, (EXAMPLES, 4, 4), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), batch(step)[1]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_all_curvatures_in_a_checkpoint(fisher: str) -> None:
    """The same steps as without; running statistics are those that torch alone leaves."""
    options = {"fisher": fisher, "curvature": "all"}
    plain, found = (
        trained_on_images(model, bound(model, **options)) for model in (Images(False), Images(True))
    )
    assert_same(found, plain)
    model = Images(True)
    still = trained_on_images(model, bound(model, lr=1e-30, **options))
    model = Images(True)
    alone = trained_on_images(model, torch.optim.SGD(model.parameters(), lr=1e-30))
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(still.get_buffer(name), buffer)
