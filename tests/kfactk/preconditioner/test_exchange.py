"""Preconditioned gradients come from their workers to every rank, whichever has a gradient."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from kfactk import Share
from kfactk.distributed.communicator import Communicator
from kfactk.distributed.packing import TensorSpec, buckets
from kfactk.preconditioner import exchange
from kfactk.statistics import ReducedStatistic
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


class FakePlacement:
    """Shares; who receives from whom follows from `Share.source`."""

    def __init__(self, shares: dict[str, Share], ranks: int) -> None:
        self.shares, self.size = shares, ranks

    def share(self, layer: str) -> Share:
        return self.shares[layer]

    def receivers(self, share: Share, worker: int) -> tuple[int, ...]:
        return tuple(
            rank
            for rank in range(self.size)
            if rank == worker
            or (rank not in share.gradient_workers and share.source(rank) == worker)
        )


def gradient(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(ord(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def value(name: str) -> Tensor:
    """Return what the block of this name makes of its gradient."""
    return 2 * gradient(name)


@attrs.frozen(eq=False)
class FakeBlock:
    """Doubles its gradient, lays it out column by column, and notes that it was asked."""

    name: str
    asked: list[str]

    def solve(self, gradient: Tensor) -> Tensor:
        self.asked.append(self.name)
        return (2 * gradient).mT.contiguous().mT


def delivered(
    rank: int,
    gradient_workers: dict[str, tuple[int, ...]],
    lacking: tuple[str, ...],
    wire: str | None,
    limit: int,
) -> Any:
    ranks = Communicator(wire_dtype=wire)
    placement = FakePlacement(
        {name: Share({}, held) for name, held in gradient_workers.items()}, ranks.size
    )
    ranks.prepare(
        placement.receivers(share, gradient_worker)
        for share in placement.shares.values()
        for gradient_worker in share.gradient_workers
    )
    asked: list[str] = []

    blocks: list[Any] = [FakeBlock(name, asked) for name in gradient_workers]
    given = {name: gradient(name) for name in gradient_workers if name not in lacking}
    specs = {
        name: TensorSpec(SHAPES[name], torch.float32 if name == "e" else torch.float64)
        for name in gradient_workers
    }
    exchange.buckets = functools.partial(buckets, limit=limit)  # type: ignore[assignment]
    try:
        found = exchange.broadcast_gradients(
            blocks,
            specs,
            given,
            placement,  # type: ignore[arg-type]
            ranks,
            torch.device("cpu"),
        )
    finally:
        exchange.buckets = buckets
    return found, asked, ranks.moved.get("gradients", 0.0)


WORKERS: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"a": (0,), "b": (1,), "c": (1,), "d": (0,), "e": (1,), "f": (0,)},
    3: {"a": (0, 2), "b": (1,), "c": (0, 1, 2), "d": (2,), "e": (1, 2), "f": (2,)},
    4: {"a": (0, 2), "b": (1,), "c": (1, 3), "d": (3,), "e": (0, 1, 2), "f": (3,)},
}


@pytest.mark.parametrize("limit", [2**20, 40])
@pytest.mark.parametrize("lacking", [(), ("a", "f"), tuple(SHAPES)])
@pytest.mark.parametrize("ranks", WORKERS)
def test_every_rank_gets_what_a_worker_has(
    ranks: int, lacking: tuple[str, ...], limit: int
) -> None:
    """A gradient that its workers lack is missing on every rank, and no rank waits for it."""
    gradient_workers = WORKERS[ranks]
    for rank, (found, asked, _) in enumerate(
        shared_workers().run(ranks, delivered, gradient_workers, lacking, None, limit)
    ):
        assert set(found) == set(gradient_workers) - set(lacking)
        # Each once, and by its gradient workers alone.
        mine = (name for name, held in gradient_workers.items() if rank in held)
        assert sorted(asked) == sorted(set(mine) - set(lacking))
        for name, tensor in found.items():
            exact = tensor.dtype == torch.float64 or rank in gradient_workers[name]
            torch.testing.assert_close(
                tensor.double(), value(name), rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6
            )


def test_bytes_are_those_of_gradients_and_flags() -> None:
    """Each rank outside the workers receives each gradient once, with a flag: whether it exists."""
    gradient_workers = {name: held for name, held in WORKERS[4].items() if name != "e"}
    moved = sum(
        moved for *_, moved in shared_workers().run(4, delivered, gradient_workers, (), None, 2**20)
    )
    assert moved == sum(
        8 * (value(name).numel() + 1) * (4 - len(held)) for name, held in gradient_workers.items()
    )


def test_rounded_gradients_are_the_same_everywhere() -> None:
    """Their only worker rounds them too, so that parameters stay the same bit for bit."""
    gradient_workers = WORKERS[2]
    (one, *_), (other, *_) = shared_workers().run(
        2, delivered, gradient_workers, ("b",), "bfloat16", 2**20
    )
    assert set(one) == set(other) == set(gradient_workers) - {"b"}
    for name in one:
        assert torch.equal(one[name], other[name])
        assert torch.equal(
            one[name].double(), value(name).to(one[name].dtype).to(torch.bfloat16).double()
        )


def test_sums_of_forwards_before_and_in_the_step_add_up() -> None:
    def sums(**totals: float | None) -> dict[str, ReducedStatistic]:
        return {
            name: ReducedStatistic(None if total is None else torch.tensor(total), 2.0, True)
            for name, total in totals.items()
        }

    found = exchange.merged(sums(a=1.0, b=2.0, d=None), sums(b=3.0, c=4.0, d=None))
    totals = {n: None if s.total is None else float(s.total) for n, s in found.items()}
    assert totals == {"a": 1.0, "b": 5.0, "c": 4.0, "d": None}
    assert {name: each.count for name, each in found.items()} == {"a": 2, "b": 4, "c": 2, "d": 4}
