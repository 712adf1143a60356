"""Preconditioned gradients come from their holders to everybody, whoever has a gradient."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from kfactk import Share
from kfactk.distributed.communicator import Communicator
from kfactk.distributed.packing import TensorSpec, buckets
from kfactk.preconditioner import exchange as delivery
from kfactk.preconditioner.exchange import broadcast_gradients
from kfactk.testing._support.ranks import shared_workers

pytestmark = pytest.mark.xdist_group("ranks")
SHAPES: dict[str, tuple[int, ...]] = {
    "a": (2, 3),
    "b": (4, 1),
    "c": (2, 2, 2),
    "d": (1, 1),
    "e": (3, 3),
    "f": (5, 5),
}


class BlockPlacement:
    """Shares, and who hears from whom, by the rule of `Share.source`."""

    def __init__(self, shares: dict[str, Share], ranks: int) -> None:
        self.shares, self.size = shares, ranks

    def share(self, layer: str) -> Share:
        return self.shares[layer]

    def receivers(self, share: Share, gradient_worker: int) -> tuple[int, ...]:
        return tuple(
            rank
            for rank in range(self.size)
            if rank == gradient_worker
            or (rank not in share.gradient_workers and share.source(rank) == gradient_worker)
        )


def value(name: str) -> Tensor:
    return torch.randn(
        SHAPES[name], generator=torch.Generator().manual_seed(ord(name)), dtype=torch.float64
    )


def delivered(
    rank: int,
    gradient_workers: dict[str, tuple[int, ...]],
    lacking: tuple[str, ...],
    wire: str | None,
    limit: int,
) -> Any:
    ranks = Communicator(wire_dtype=wire)
    places = BlockPlacement(
        {name: Share({}, held) for name, held in gradient_workers.items()}, ranks.size
    )
    ranks.prepare(
        places.receivers(share, gradient_worker)
        for share in places.shares.values()
        for gradient_worker in share.gradient_workers
    )
    asked: list[str] = []

    def precondition(name: str) -> Tensor | None:
        asked.append(name)
        return None if name in lacking else value(name).mT.contiguous().mT

    specs = {
        name: TensorSpec(SHAPES[name], torch.float32 if name == "e" else torch.float64)
        for name in gradient_workers
    }
    delivery.buckets = functools.partial(buckets, limit=limit)  # type: ignore[assignment]
    try:
        found = broadcast_gradients(
            list(gradient_workers), specs, precondition, places, ranks, torch.device("cpu")
        )  # type: ignore[arg-type]
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
    gradient_workers = HOLDERS[ranks]
    for rank, (found, asked, _) in enumerate(
        shared_workers().run(ranks, delivered, gradient_workers, lacking, None, limit)
    ):
        assert set(found) == set(gradient_workers) - set(lacking)
        assert sorted(asked) == sorted(
            name for name, held in gradient_workers.items() if rank in held
        )  # each once, by holders alone
        for name, tensor in found.items():
            exact = tensor.dtype == torch.float64 or rank in gradient_workers[name]
            torch.testing.assert_close(
                tensor.double(), value(name), rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6
            )


def test_bytes_are_those_of_gradients_and_flags() -> None:
    """Each of g ranks outside the holders receives each gradient once, and a number for each that tells whether it is there."""
    gradient_workers = {name: held for name, held in HOLDERS[4].items() if name != "e"}
    moved = sum(
        moved for *_, moved in shared_workers().run(4, delivered, gradient_workers, (), None, 2**20)
    )
    assert moved == sum(
        8 * (value(name).numel() + 1) * (4 - len(held)) for name, held in gradient_workers.items()
    )


def test_rounded_gradients_are_the_same_everywhere() -> None:
    """On their only holder too, so that parameters stay the same bit for bit."""
    gradient_workers = HOLDERS[2]
    (one, *_), (other, *_) = shared_workers().run(
        2, delivered, gradient_workers, ("b",), "bfloat16", 2**20
    )
    assert set(one) == set(other) == set(gradient_workers) - {"b"}
    for name in one:
        assert torch.equal(one[name], other[name])
        assert torch.equal(
            one[name].double(), value(name).to(one[name].dtype).to(torch.bfloat16).double()
        )
