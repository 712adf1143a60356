"""Messages and bytes by hand for small cases, in closed form for grids, and as ranks send them."""

import math
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

import kfactk
from benchmarks.ranks import least_bytes
from kfactk.assignment import Assignment, Share, Work, Workload, grid
from kfactk.costmodel.communication import (
    BUCKET_BYTES,
    Frequency,
    Message,
    Sizes,
    bytes_per_step,
    due_share,
    messages,
)
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.costmodel.hardware import H100
from kfactk.testing._support.ranks import shared_workers
from tests.covering import covering
from tests.kfactk.workloads import workloads

pytestmark = pytest.mark.xdist_group("ranks")

FC = Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3))
SHAPES = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3)])


def sizes(workload: Workload) -> dict[str, Sizes]:
    return {work.layer: Sizes.of(work, sampled=workload.sampled) for work in workload.works}


def found(workload: Workload, assignment: Assignment, ranks: int) -> list[Message]:
    return messages(workload, sizes(workload), assignment, ranks, workload.itemsize)


def test_sizes_of_triangles_eigenbases_and_diagonals() -> None:
    assert Sizes.of(FC, sampled=False) == Sizes({"A": 6, "G": 3}, {"A": 9, "G": 4}, 0)
    read = attrs.evolve(FC, indivisible=True, beside={"A_next": (3, 3)})  # all 9 travel
    assert Sizes.of(read, sampled=False) == Sizes({"": 18}, {"A": 9, "G": 4}, 0)
    grouped = Work("conv", {"A": (5, 3, 3), "G": (5, 2, 2), "d": (7,)}, (5, 2, 3), indivisible=True)
    assert Sizes.of(grouped, sampled=True) == Sizes(
        {"": 5 * 6 + 5 * 3 + 7}, {"A": 5 * 12, "G": 5 * 6, "d": 7}, 30
    )


@given(st.lists(st.integers(1, 8), min_size=1, max_size=3))
def test_due_share_equals_a_count_of_steps(periods: list[int]) -> None:
    cycle = math.prod(periods)
    assert math.isclose(
        due_share(*periods),
        sum(any(step % p == 0 for p in periods) for step in range(cycle)) / cycle,
    )


def test_frequency_follows_the_schedule() -> None:
    """Of steps 0 to 11, factors are due at 0 2 4 6 8 10, the scale at 0 3 6 9, the basis at 0 4 8.

    A refresh of the basis is one of the scale.
    """
    often = Frequency.of(Workload((), factor_every=2, scale_every=3, basis_every=4))
    assert often == Frequency(6 / 12, 6 / 12, 3 / 12, 3 / 12, 8 / 12)
    assert Frequency.of(Workload((), 2, 3, 4, sampled=False)) == Frequency(
        1 / 2, 0.0, 1 / 4, 0.0, 1 / 2
    )


def test_messages_of_a_layer_of_one_rank() -> None:
    """Numbers are 6 + 3 of sums, 12 + 6 of decompositions, 6 of moments and 6 of gradients."""
    everyone = (0, 1, 2)
    owned = Assignment("own", {"fc": Share({"A": (1,), "G": (1,)}, (1,))})
    assert sorted(map(str, found(Workload((FC,)), owned, 3))) == sorted(
        map(
            str,
            [
                Message("sums", "factors", "reduce", everyone, 36.0, 1),
                Message("decompositions", "basis", "broadcast", everyone, 72.0, 1),
                Message("moments", "scale", "reduce", everyone, 24.0, 1),
                Message("decompositions", "scale_alone", "broadcast", everyone, 72.0, 1),
                Message("gradients", "step", "broadcast", everyone, 24.0, 1),
            ],
        )
    )


def test_messages_of_a_layer_of_two_gradient_workers() -> None:
    """Each sends a decomposition to the other one, and gradients to one of the other two ranks."""
    held = Assignment("rows", {"fc": Share({"A": (2,), "G": (3,)}, (2, 3))})
    assert {str(message) for message in found(Workload((FC,), sampled=False), held, 4)} == {
        str(Message("sums", "factors", "reduce", (0, 1, 2, 3), 24.0, 2)),
        str(Message("sums", "factors", "reduce", (0, 1, 2, 3), 12.0, 3)),
        str(Message("decompositions", "basis", "broadcast", (2, 3), 36.0, 2)),
        str(Message("decompositions", "basis", "broadcast", (2, 3), 16.0, 3)),
        str(Message("gradients", "step", "broadcast", (0, 2), 24.0, 2)),
        str(Message("gradients", "step", "broadcast", (1, 3), 24.0, 3)),
    }


@given(workloads(), SHAPES)
def test_messages_of_grids_move_the_least_bytes(workload: Workload, shape: tuple[int, int]) -> None:
    ranks, width = shape
    moved = bytes_per_step(found(workload, grid(workload, ranks, width, "grid"), ranks), workload)
    assert moved == pytest.approx(least_bytes(workload, ranks, width), abs=1e-6)


@given(workloads(), st.integers(1, 6))
def test_messages_of_replicated_work_are_sums_only(workload: Workload, ranks: int) -> None:
    moved = bytes_per_step(
        found(workload, grid(workload, ranks, ranks, "all", everyone=True), ranks), workload
    )
    assert moved["gradients"] == moved["decompositions"] == 0
    assert moved == pytest.approx(least_bytes(workload, ranks, ranks, ranks))


@given(workloads(), SHAPES)
def test_least_bytes_grow_with_ranks_and_with_sizes(
    workload: Workload, shape: tuple[int, int]
) -> None:
    ranks, width = shape
    less, more = (sum(least_bytes(workload, n, min(n, width)).values()) for n in (ranks, ranks + 1))
    assert less <= more
    assert 2 * less == pytest.approx(sum(least_bytes(workload, ranks, width, itemsize=8).values()))


def test_message_seconds_are_those_of_pipelines_rings_trees_and_packing() -> None:
    """A pipeline takes x / bandwidth, a ring 2 (g-1)/g of it, a tree its depth of latencies.

    Packing takes ten launches, and four times the bytes in memory, for each bucket.
    """
    near, far = H100.intra_node, H100.inter_node

    def packing(size: float, buckets: int = 1) -> float:
        return 4 * size / H100.bandwidth + buckets * 10 * H100.launch

    one = Message("sums", "step", "broadcast", (0, 1, 2), 1e6).seconds(H100)
    assert one == pytest.approx(packing(1e6) + 1e6 / near.bandwidth + 2 * near.latency)
    ring = Message("sums", "step", "all-reduce", tuple(range(16)), 1e6).seconds(H100)
    assert ring == pytest.approx(packing(1e6) + 2 * 15 / 16 * 1e6 / far.bandwidth + 8 * far.latency)
    three = Message("sums", "step", "reduce", (7, 8), 2.5 * BUCKET_BYTES).seconds(H100)
    assert three == pytest.approx(
        packing(2.5 * BUCKET_BYTES, 3) + 2.5 * BUCKET_BYTES / far.bandwidth + 3 * far.latency
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 3), nn.Linear(12, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(images)).flatten(1))


class Unclearable(dict[str, float]):
    """A record of bytes that the end of a step does not clear."""

    def clear(self) -> None:
        pass


def moved_by(
    rank: int, placement: Any, basis: str, wire: str | None
) -> tuple[dict[str, float], Assignment]:
    """Return the bytes of this rank in one cycle after the first step, without agreements."""
    torch.manual_seed(0)
    model = Net()
    recipe = kfactk.build(
        basis=basis,
        placement=placement | {"wire_dtype": wire},
        factor_every=2,
        scale_every=3,
        basis_every=6,
    )
    optimizer = recipe.bind(model)
    totals: dict[str, float] = {}
    moved = optimizer._preconditioner.communicator.moved = Unclearable()
    for step in range(7):
        before = dict(moved)
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, 2, 4, 4)), torch.arange(4)).backward()
        optimizer.step()
        if step:
            totals = {
                kind: totals.get(kind, 0.0) + moved[kind] - before.get(kind, 0.0)
                for kind in moved
                if kind != "agreements"
            }
    return totals, optimizer.placement


@covering(
    basis=["kfac", "ekfac"],
    placement=[{"name": name} for name in ("replicated", "comm_opt", "hybrid", "mem_opt")],
    ranks=[2, 4],
)
def test_ranks_send_the_bytes_of_the_cost_model(
    basis: str, placement: dict[str, Any], ranks: int
) -> None:
    """Besides, gradient workers send a flag for each layer and step: whether it has a gradient."""
    wire = "bfloat16" if ranks == 4 else None
    answers = shared_workers().run(ranks, moved_by, placement, basis, wire)
    measured = sum(sum(totals.values()) for totals, _ in answers)
    recipe = kfactk.build(basis=basis, factor_every=2, scale_every=3, basis_every=6)
    workload = training_load(Net().to("meta"), recipe, meta_batch("2x4x4", 4)).workload
    assignment = answers[0][1]
    itemsize = 2 if wire else 4
    expected = messages(workload, sizes(workload), assignment, ranks, itemsize)
    flags = (
        6 * sum(len(m.members) - 1 for m in _one_a_layer(workload, assignment, ranks)) * itemsize
    )
    assert measured == pytest.approx(
        6 * sum(bytes_per_step(expected, workload).values()) + flags, abs=1e-6
    )


def _one_a_layer(workload: Workload, assignment: Assignment, ranks: int) -> list[Message]:
    """Return the messages of gradients, for each layer on its own."""
    out = []
    for work in workload.works:
        alone = Workload((work,), sampled=False)
        out += [
            m for m in messages(alone, sizes(alone), assignment, ranks, 1) if m.kind == "gradients"
        ]
    return out
