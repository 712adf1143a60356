"""Preconditioned gradients come from their holders to everybody, whoever has a gradient."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from kfactk import Share, delivery
from kfactk.delivery import deliver
from kfactk.packing import Form, buckets
from kfactk.ranks import Ranks
from kfactk.testing.ranks import shared_workers

pytestmark = pytest.mark.xdist_group("ranks")
SHAPES: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (4, 1), "c": (2, 2, 2), "d": (1, 1), "e": (3, 3), "f": (5, 5)}


class Places:
    """Shares, and who hears from whom, by the rule of `Share.source`."""

    def __init__(self, shares: dict[str, Share], ranks: int) -> None:
        self.shares, self.size = shares, ranks

    def share(self, layer: str) -> Share:
        return self.shares[layer]

    def audience(self, share: Share, holder: int) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.size) if rank == holder or (rank not in share.holders and share.source(rank) == holder))


def value(name: str) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(ord(name)), dtype=torch.float64)


def delivered(rank: int, holders: dict[str, tuple[int, ...]], lacking: tuple[str, ...], wire: str | None, limit: int) -> Any:
    ranks = Ranks(wire_dtype=wire)
    places = Places({name: Share({}, held) for name, held in holders.items()}, ranks.size)
    ranks.prepare(places.audience(share, holder) for share in places.shares.values() for holder in share.holders)
    asked: list[str] = []

    def precondition(name: str) -> Tensor | None:
        asked.append(name)
        return None if name in lacking else value(name).mT.contiguous().mT

    forms = {name: Form(SHAPES[name], torch.float32 if name == "e" else torch.float64) for name in holders}
    delivery.buckets = functools.partial(buckets, limit=limit)  # type: ignore[assignment]
    try:
        found = deliver(list(holders), forms, precondition, places, ranks, torch.device("cpu"))  # type: ignore[arg-type]
    finally:
        delivery.buckets = buckets
    return found, asked, ranks.moved.get("gradients", 0.0)


HOLDERS: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"a": (0,), "b": (1,), "c": (1,), "d": (0,), "e": (1,), "f": (0,)},
    3: {"a": (0, 2), "b": (1,), "c": (0, 1, 2), "d": (2,), "e": (1, 2), "f": (2,)},
    4: {"a": (0, 2), "b": (1,), "c": (1, 3), "d": (3,), "e": (0, 1, 2), "f": (3,)},
}


@pytest.mark.parametrize("limit", [2**20, 40])
@pytest.mark.parametrize("lacking", [(), ("a", "f"), tuple(SHAPES)])
@pytest.mark.parametrize("ranks", HOLDERS)
def test_everybody_gets_what_a_holder_has(ranks: int, lacking: tuple[str, ...], limit: int) -> None:
    """A gradient that its holders lack is missing everywhere, and keeps nobody waiting."""
    holders = HOLDERS[ranks]
    for rank, (found, asked, _) in enumerate(shared_workers().run(ranks, delivered, holders, lacking, None, limit)):
        assert set(found) == set(holders) - set(lacking)
        assert sorted(asked) == sorted(name for name, held in holders.items() if rank in held)  # each once, by holders alone
        for name, tensor in found.items():
            exact = tensor.dtype == torch.float64 or rank in holders[name]
            torch.testing.assert_close(tensor.double(), value(name), rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)


def test_bytes_are_those_of_gradients_and_flags() -> None:
    """Each of g ranks outside the holders receives each gradient once, and a number for each that tells whether it is there."""
    holders = {name: held for name, held in HOLDERS[4].items() if name != "e"}
    moved = sum(moved for *_, moved in shared_workers().run(4, delivered, holders, (), None, 2**20))
    assert moved == sum(8 * (value(name).numel() + 1) * (4 - len(held)) for name, held in holders.items())


def test_rounded_gradients_are_the_same_everywhere() -> None:
    """On their only holder too, so that parameters stay the same bit for bit."""
    holders = HOLDERS[2]
    (one, *_), (other, *_) = shared_workers().run(2, delivered, holders, ("b",), "bfloat16", 2**20)
    assert set(one) == set(other) == set(holders) - {"b"}
    for name in one:
        assert torch.equal(one[name], other[name])
        assert torch.equal(one[name].double(), value(name).to(one[name].dtype).to(torch.bfloat16).double())
