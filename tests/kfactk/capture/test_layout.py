"""Which rows belong to which examples: told where they are not those of the output, else silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk.capture.layout import NOBODY, Marks, owners


class Model(nn.Module):
    """A layer in the middle that `use` runs in its own way."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        output: Tensor = self.head(torch.tanh(self.use(self.middle, hidden)))
        return output


def told(model: nn.Module, x: Tensor, *, half: bool = False, **recipe: Any) -> list[str]:
    """Return the warnings of a due forward."""
    optimizer = kfactk.build(**{"curvature": "kfac", **recipe}).bind(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(x)
    optimizer.close()
    return [str(each.message) for each in caught]


def by_tokens(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """Run the layer on some tokens of each example, none of two of the first one."""
    pairs = hidden.unflatten(0, (-1, 2))
    chosen = torch.cat([pairs[:1, 0], pairs[1:].flatten(0, 1)])
    made = layer(chosen)
    return torch.cat([made[:1], made[1:].unflatten(0, (-1, 2)).mean(1)]).repeat_interleave(2, 0)


SOUND: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "once": lambda layer, hidden: layer(hidden),
    "twice": lambda layer, hidden: layer(torch.tanh(layer(hidden))),
    "on half": lambda layer, hidden: torch.cat([layer(hidden[::2]), hidden[1::2]]),
    "mixed": lambda layer, hidden: layer(hidden) + layer(hidden).mean(0),
    "of the mean": lambda layer, hidden: hidden + layer(hidden.mean(0, keepdim=True)),
}
FAULTY: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], str]] = {
    "permuted": (lambda layer, hidden: layer(hidden) + layer(hidden.flip(0)).flip(0), "2 times"),
    "parts": (lambda layer, hidden: torch.cat([layer(x) for x in hidden.chunk(2)]), "2 times"),
    "tokens": (by_tokens, "2 of its 15 rows in dimension 0 belong to one example"),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("way", SOUND)
def test_sound_layers_are_silent(way: str, norm: bool, half: bool) -> None:
    assert told(Model(SOUND[way], norm), torch.randn(16, 4), half=half) == []


@pytest.mark.parametrize("examples", [300, 2])
def test_batches_of_any_size_are_silent(examples: int) -> None:
    assert told(Model(SOUND["twice"]), torch.randn(examples, 4)) == []


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("way", FAULTY)
def test_rows_of_other_examples_are_told(way: str, half: bool) -> None:
    use, words = FAULTY[way]
    model = Model(use)
    if way == "tokens":
        model = nn.Sequential(model, nn.Unflatten(0, (-1, 2)), Mean())
    [message] = told(model, torch.randn(16, 4), half=half)
    assert words in message
    assert message.count("middle") >= 1


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_owners_of_rows_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    marks = Marks.of([torch.float32])
    plain = torch.randn(200, 8, generator=generator)
    order = torch.randperm(200, generator=generator)
    factors = marks.factors(200, torch.device("cpu"))
    passes = [plain * each[order].unsqueeze(1) for each in factors]
    passes[1][7] += torch.randn(8, generator=generator)
    found = owners(passes, marks)
    order[7] = NOBODY
    assert torch.equal(found, order)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("examples", [2, 17, 64, 300, 700])
@pytest.mark.parametrize("way", ["mixup", "norm", "one unit", "neighbours"])
def test_rows_of_several_examples_are_silent(way: str, examples: int, half: bool) -> None:
    def use(layer: nn.Linear, hidden: Tensor) -> Tensor:
        order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(1))
        if way == "mixup":
            return layer(0.7 * hidden + 0.3 * hidden[order])
        if way == "neighbours":
            return layer(hidden) + hidden[order].roll(1, 0)
        mixed = layer(hidden)
        if way == "one unit":
            mixed = mixed[:, :1] + mixed.softmax(0)[:, 1:2]
        return (mixed - mixed.mean(0)).expand(-1, 6)

    for seed in range(3):
        torch.manual_seed(seed)
        assert told(Model(use, norm=way == "norm"), torch.randn(examples, 4), half=half) == []


def test_a_first_batch_of_one_example_does_not_hide_a_fault() -> None:
    model = Model(FAULTY["parts"][0])
    optimizer = kfactk.build(curvature="kfac").bind(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for examples in (1, 16):
            model(torch.randn(examples, 4))
    optimizer.close()
    assert len(caught) == 1
