"""A damaged state is refused as a whole, or accepted and then trained on: nothing in between."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer, StateError
from kfactk.testing import effort
from tests.kfactk.mutations import Mutation, mutations

QUICK = 20
"""How many damages of each recipe the quick profile tries; the thorough one tries all."""
SAVED_AT = 3
RECIPES: dict[str, dict[str, Any]] = {
    "kfac": {"basis": "kfac", "update": "momentum"},
    "ekfac": {"basis": {"name": "ekfac", "scale_decay": 0.5}, "update": "adam"},
    "running": {"basis": {"name": "ekfac", "scale": "running"}, "update": "nag"},
    "blocks": {"curvature": ["kfac", "embedding", "norm"], "basis": "ekfac", "update": "radam"},
    "plain step": {"curvature": ["kfac", "embedding", "norm"], "basis": "kfac", "update": "sgd"},
    "adagrad": {"basis": "ekfac", "update": torch.optim.Adagrad},
}


class Words(nn.Module):
    """A layer of each kind, two of them alike."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.words(x))
        found: Tensor = self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return found


def made(kind: str, steps: int) -> tuple[Optimizer, Words]:
    torch.manual_seed(3)
    model = Words()
    periods = {"factor_every": 1, "scale_every": 1, "basis_every": 2}
    recipe = kfactk.build(**RECIPES[kind], lr=0.01, damping=0.05, fisher="exact", **periods)
    optimizer = recipe.bind(model)
    train(optimizer, model, 0, steps)
    return optimizer, model


def train(optimizer: Optimizer, model: Words, start: int, steps: int) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randint(n, (6,), generator=generator) for n in (5, 3))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def same(one: Any, other: Any) -> bool:
    """Return whether two states are equal, to the bit and to the type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@attrs.define(eq=False)
class Target:
    """An optimizer that damaged states are loaded into; made anew where one was accepted.

    Args:
        kind: Its recipe.
        steps: How many steps it has taken.
    """

    kind: str
    steps: int
    good: dict[str, Any] = attrs.field(init=False)
    optimizer: Optimizer = attrs.field(init=False)
    model: Words = attrs.field(init=False)
    before: Any = attrs.field(init=False)
    resumed: dict[str, Any] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.good = copy.deepcopy(made(self.kind, SAVED_AT)[0].state_dict())
        self.renew()
        self.optimizer.load_state_dict(copy.deepcopy(self.good))
        train(self.optimizer, self.model, SAVED_AT, 3)
        self.resumed = copy.deepcopy(self.model.state_dict())
        self.renew()

    def renew(self) -> None:
        self.optimizer, self.model = made(self.kind, self.steps)
        self.before = copy.deepcopy(self.seen())

    def seen(self) -> Any:
        optimizer = self.optimizer
        return (
            optimizer.state_dict(),
            optimizer.steps,
            optimizer.counters,
            [id(group) for group in optimizer.param_groups],
            [dict(group, params=[]) for group in optimizer.param_groups],
            self.model.state_dict(),
        )

    def outcome(self, mutation: Mutation) -> str:
        """Return what comes of a damaged state, in words."""
        state = mutation.of(self.good)
        try:
            self.optimizer.load_state_dict(state)
        except StateError as error:
            return self.refused(str(error))
        except ValueError as error:
            groups = "parameter group" in str(error) and type(error) is ValueError
            return self.refused("") if groups else f"raw: {type(error).__name__}: {error}"
        except Exception as error:
            self.renew()
            return f"raw: {type(error).__name__}: {error}"
        try:
            train(self.optimizer, self.model, SAVED_AT, 3)
            self.optimizer.state_dict()
            values = [*self.model.parameters(), *tensors_in(self.optimizer.state_dict())]
            if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
                return "not finite"
            if any(bool(torch.isnan(value).any()) for value in values):
                return "nan in the state"
            alike = same(self.resumed, self.model.state_dict())
            return "differs" if mutation.harmless and not alike else "accepted"
        except Exception as error:
            return f"breaks later: {type(error).__name__}: {error}"
        finally:
            self.renew()

    def refused(self, message: str) -> str:
        if not same(self.before, self.seen()):
            self.renew()
            return f"taken over in part: {message}"
        return "refused"


def tensors_in(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    values = nested.values() if isinstance(nested, dict) else nested
    if isinstance(nested, dict | list | tuple):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []


GOOD = {"refused", "accepted"}


@cache
def drawn(kind: str) -> Sequence[Mutation]:
    """Return the damages to try: a sample that differs from recipe to recipe, or all."""
    found = list(mutations(made(kind, SAVED_AT)[0].state_dict()))
    number = effort(QUICK)
    return found if effort(1) > 1 else random.Random(kind).sample(found, min(number, len(found)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", RECIPES)
def test_a_damaged_state_is_refused_whole_or_trains_on(kind: str, steps: int) -> None:
    target = Target(kind, steps)
    bad = {m.name: found for m in drawn(kind) if (found := target.outcome(m)) not in GOOD}
    assert not bad
