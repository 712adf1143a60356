"""Preconditioned gradients travel from their workers to everyone, and sums leave before a step."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from kfactk import Layer, Share, Statistic
from kfactk.distributed.communicator import Communicator
from kfactk.distributed.packing import TensorSpec, buckets
from kfactk.preconditioner import exchange
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.exchange import OverlappedReduction, broadcast_gradients, merged
from kfactk.preconditioner.plan import BlockPlan
from kfactk.preconditioner.planner import StepPlan
from kfactk.statistics import ReducedStatistic
from kfactk.testing._support.ranks import shared_workers
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.kfac import Kfac

pytestmark = pytest.mark.xdist_group("ranks")
CPU, F64 = torch.device("cpu"), torch.float64
SHAPES: dict[str, tuple[int, ...]] = {
    "a": (2, 3),
    "b": (4, 1),
    "c": (2, 2, 2),
    "d": (1, 1),
    "e": (3, 3),
    "f": (5, 5),
}


@attrs.frozen
class Shares:
    """Stands for a `BlockPlacement`: shares, and the receivers by the rule of `Share.source`."""

    shares: dict[str, Share]
    size: int

    def share(self, layer: str) -> Share:
        return self.shares[layer]

    def receivers(self, share: Share, worker: int) -> tuple[int, ...]:
        outside = [r for r in range(self.size) if r not in share.gradient_workers]
        return tuple(sorted([worker, *(r for r in outside if share.source(r) == worker)]))


@attrs.frozen(eq=False)
class Counting:
    """Stands for a `Block`: its gradient is the answer, laid out column by column."""

    name: str
    asked: list[str]

    def solve(self, gradient: Tensor) -> Tensor:
        self.asked.append(self.name)
        return gradient.mT.contiguous().mT


def value(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(ord(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=F64)


def delivered(
    rank: int,
    workers: dict[str, tuple[int, ...]],
    lacking: tuple[str, ...],
    wire: str | None,
    limit: int,
) -> Any:
    """Return what a rank receives, which blocks it was asked for, and the bytes it moved."""
    communicator = Communicator(wire_dtype=wire)
    placement: Any = Shares({n: Share({}, held) for n, held in workers.items()}, communicator.size)
    communicator.prepare(
        placement.receivers(share, worker)
        for share in placement.shares.values()
        for worker in share.gradient_workers
    )
    asked: list[str] = []
    blocks: Any = [Counting(name, asked) for name in workers]
    specs = {n: TensorSpec(SHAPES[n], torch.float32 if n == "e" else F64) for n in workers}
    gradients = {name: value(name) for name in workers if name not in lacking}
    exchange.buckets = functools.partial(buckets, limit=limit)  # type: ignore[assignment]
    try:
        found = broadcast_gradients(blocks, specs, gradients, placement, communicator, CPU)
    finally:
        exchange.buckets = buckets
    return found, asked, communicator.moved.get("gradients", 0.0)


WORKERS: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"a": (0,), "b": (1,), "c": (1,), "d": (0,), "e": (1,), "f": (0,)},
    3: {"a": (0, 2), "b": (1,), "c": (0, 1, 2), "d": (2,), "e": (1, 2), "f": (2,)},
    4: {"a": (0, 2), "b": (1,), "c": (1, 3), "d": (3,), "e": (0, 1, 2), "f": (3,)},
}


@pytest.mark.parametrize("limit", [2**20, 40])
@pytest.mark.parametrize("lacking", [(), ("a", "f"), tuple(SHAPES)])
@pytest.mark.parametrize("ranks", WORKERS)
def test_everyone_gets_what_a_worker_has(ranks: int, lacking: tuple[str, ...], limit: int) -> None:
    """A gradient that its workers lack is missing everywhere, and no rank waits for it."""
    workers = WORKERS[ranks]
    answers = shared_workers().run(ranks, delivered, workers, lacking, None, limit)
    for rank, (found, asked, _) in enumerate(answers):
        assert set(found) == set(workers) - set(lacking)
        mine = [name for name, held in workers.items() if rank in held and name not in lacking]
        assert sorted(asked) == mine  # each once, by its workers alone
        for name, tensor in found.items():
            exact = tensor.dtype == F64 or rank in workers[name]
            tolerance = 0 if exact else 1e-6
            torch.testing.assert_close(tensor.double(), value(name), rtol=tolerance, atol=tolerance)


def test_bytes_are_those_of_gradients_and_flags() -> None:
    """Each rank outside the workers receives each gradient once, and one flag for each."""
    workers = {name: held for name, held in WORKERS[4].items() if name != "e"}
    answers = shared_workers().run(4, delivered, workers, (), None, 2**20)
    assert sum(moved for *_, moved in answers) == sum(
        8 * (value(name).numel() + 1) * (4 - len(held)) for name, held in workers.items()
    )


def test_rounded_gradients_are_the_same_everywhere() -> None:
    """Also on their only worker, so that parameters stay equal bit for bit."""
    workers = WORKERS[2]
    (one, *_), (other, *_) = shared_workers().run(2, delivered, workers, ("b",), "bfloat16", 2**20)
    assert set(one) == set(other) == set(workers) - {"b"}
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])
        rounded = value(name).to(tensor.dtype).to(torch.bfloat16)
        assert torch.equal(tensor.double(), rounded.double())


# -------------------------------------------------------------------------- sums that leave early


@attrs.frozen
class Everyone:
    """Stands for a `BlockPlacement` in which all ranks want all sums."""

    size: int

    def wanted(self, key: str) -> tuple[int, ...]:
        return tuple(range(self.size))


def blocks(*names: str) -> list[Block]:
    layers = [Layer(name, nn.Linear(2, 2).double(), ("weight", "bias")) for name in names]
    return [Block(layer, Kfac(), KfacInverse()) for layer in layers]


PLAN = BlockPlan(True, True, False, False)


def gathered(block: Block, number: float) -> None:
    """Take the sums of one forward."""
    block.state.staged = {
        "factor.A": Statistic(torch.full((3, 3), number, dtype=F64), 1.0, symmetric=True),
        "factor.G": Statistic(torch.full((2, 2), number, dtype=F64), 2.0, symmetric=True),
    }
    block.state.commit()


def overlapping(rank: int, case: str) -> Any:
    """Two blocks whose sums leave early, with a change between the plan and the step."""
    communicator = Communicator()
    placement: Any = Everyone(communicator.size)
    overlapped = OverlappedReduction(communicator, placement)
    one, other = blocks("one", "other")
    for block in (one, other):
        block.state.ready = True
    spec = {3: TensorSpec((3, 3), F64, True), 2: TensorSpec((2, 2), F64, True)}
    keys = {"factor.A|": spec[3], "factor.G|": spec[2]}
    learned = {key + name: each for name in ("one", "other") for key, each in keys.items()}
    if case != "unknown":
        overlapped.learn([one, other], learned, CPU)
    overlapped.expect_one_forward(True)
    plan = StepPlan({one: PLAN, other: PLAN}, False)
    overlapped.prepare(plan)
    current = [one, other]
    if rank == 1 and case == "renamed":
        one.layer = attrs.evolve(one.layer, name="two")
    if rank == 1 and case == "replaced":
        [one] = blocks("one")
        current[0] = one
    if not (rank == 1 and case == "no forward"):
        for block in current:
            gathered(block, 1.0 + rank)
    if not (rank == 1 and case == "another plan"):
        overlapped.begin(StepPlan(dict.fromkeys(current, PLAN), False))
    left = {block.name: sorted(block.state.pending) for block in current}
    arrived = overlapped.finish(set(current))
    found = {key: (float(each.total.sum()), float(each.count)) for key, each in arrived.items()}
    return left, found


BOTH = {
    f"factor.{factor}|{name}": (size * 3.0, 2.0 * count)
    for name in ("one", "other")
    for factor, size, count in (("A", 9, 1), ("G", 4, 2))
}
HALF = {key: (total / 3, count / 2) for key, (total, count) in BOTH.items()}
KEPT = {"one": ["factor.A", "factor.G"], "other": ["factor.A", "factor.G"]}
GONE: dict[str, list[str]] = {"one": [], "other": []}


@pytest.mark.parametrize(
    ("case", "left", "arrived"),
    [
        ("agreed", (GONE, GONE), (BOTH, BOTH)),
        ("another plan", (GONE, KEPT), (BOTH, BOTH)),
        ("no forward", (GONE, GONE), (HALF, HALF)),
        ("unknown", (KEPT, KEPT), ({}, {})),
    ],
)
def test_sums_leave_early_where_all_ranks_expect_the_same(
    case: str, left: Any, arrived: Any
) -> None:
    """A rank whose forward is another one, or is missing, sends its part in the step."""
    answers = shared_workers().run(2, overlapping, case)
    for rank, (mine, found) in enumerate(answers):
        assert mine == left[rank]
        assert found == arrived[rank]


def test_a_layer_renamed_on_one_rank_alone_does_not_change_the_message() -> None:
    one, other = shared_workers().run(2, overlapping, "renamed")
    assert one[1] == BOTH
    assert other[1] == {key.replace("one", "two"): each for key, each in BOTH.items()}


def test_sums_of_a_block_that_was_replaced_are_dropped() -> None:
    one, other = shared_workers().run(2, overlapping, "replaced")
    expected = {key: HALF[key] if key.endswith("one") else each for key, each in BOTH.items()}
    assert one[1] == expected
    assert other[1] == {key: each for key, each in BOTH.items() if key.endswith("other")}


def test_nothing_leaves_early_unless_each_rank_makes_one_forward() -> None:
    placement: Any = Everyone(1)
    overlapped = OverlappedReduction(Communicator(), placement)
    [block] = blocks("one")
    overlapped.prepare(StepPlan({block: PLAN}, False))
    gathered(block, 1.0)
    overlapped.begin(StepPlan({block: PLAN}, False))
    assert overlapped.finish({block}) == {}
    assert sorted(block.state.pending) == ["factor.A", "factor.G"]


def test_both_parts_of_a_sum_are_added() -> None:
    def reduced(total: float | None, count: float) -> ReducedStatistic:
        tensor = None if total is None else torch.full((2,), total)
        return ReducedStatistic(tensor, torch.tensor(count), total is not None)

    early = {"a": reduced(1.0, 1.0), "b": reduced(None, 2.0), "c": reduced(3.0, 1.0)}
    late = {"a": reduced(2.0, 3.0), "b": reduced(5.0, 1.0), "d": reduced(None, 1.0)}
    found = merged(early, late)
    totals = {k: None if s.total is None else s.total.tolist() for k, s in found.items()}
    assert totals == {"a": [3.0, 3.0], "b": [5.0, 5.0], "c": [3.0, 3.0], "d": None}
    assert {k: float(s.count) for k, s in found.items()} == {"a": 4, "b": 3, "c": 1, "d": 1}
    assert [found[key].exists for key in "abcd"] == [True, True, True, False]
