"""Ranks with unequal data do not hang, stay equal, and equal one process with all of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfactk import Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.covering import covering
from tests.kfactk.small import F64, bound
from tests.training_loops.loops import (
    EACH,
    PLACEMENTS,
    Batch,
    accumulate,
    assert_moved,
    assert_near,
    assert_same,
    averaged,
    images,
    left,
    loss_of,
    mixed,
    part,
    several,
)

pytestmark = pytest.mark.xdist_group("ranks")

Step = Sequence[Sequence[Batch]]
"""For each rank its micro-batches."""
NOTHING: Batch = images(0, 0)
STEPS = 6
BASES = {"EKFAC": "ekfac", "K-FAC": "kfac", "running scale": {"name": "ekfac", "scale": "running"}}


def even(step: int) -> Step:
    return [[part(images(step), rank)] for rank in range(2)]


def smaller(step: int) -> Step:
    x, y = images(step)
    return [[(x[:5], y[:5])], [(x[5:], y[5:])]]


def empty(step: int) -> Step:
    return [[images(step)], [NOTHING]]


def additional(step: int) -> Step:
    x, y = images(step)
    return [[(x[:2], y[:2])], [(x[2:5], y[2:5]), (x[5:], y[5:])]]


def absent(step: int) -> Step:
    return [[], [images(step)]]


UNEVEN: dict[str, Callable[[int], Step]] = {
    "a smaller batch": smaller,
    "an empty batch": empty,
    "an additional micro-batch": additional,
    "no forward at all": absent,
}


def step_once(
    optimizer: Optimizer, called: nn.Module, batches: Sequence[Batch], weight: float
) -> None:
    """One step of one rank; `weight` times the sum over its examples is its loss."""
    optimizer.zero_grad()
    wrapped = isinstance(called, DistributedDataParallel)
    for number, (x, y) in enumerate(batches, start=1):
        with called.no_sync() if wrapped and number < len(batches) else contextlib.nullcontext():
            (F.cross_entropy(called(x), y, reduction="sum") * weight).backward()
    if not wrapped and dist.is_initialized():
        averaged(called)
    optimizer.step()


def uneven_run(
    rank: int, plan: Sequence[Step], wrapped: bool, recipe: dict[str, Any]
) -> dict[str, Tensor]:
    model = mixed()
    called = DistributedDataParallel(model) if wrapped else model
    optimizer = bound(called, **EACH, **recipe)
    for step in plan:
        total = sum(len(y) for batches in step for _, y in batches)
        step_once(optimizer, called, step[rank], 2 / total)
    return left(optimizer, model)


def whole(plan: Sequence[Step], recipe: dict[str, Any]) -> dict[str, Tensor]:
    """One process with the examples of all ranks in one batch."""
    model = mixed()
    optimizer = bound(model, **EACH, **recipe)
    for step in plan:
        x, y = (torch.cat([batch[k] for batches in step for batch in batches]) for k in (0, 1))
        step_once(optimizer, model, [(x, y)], 1 / len(y))
    return left(optimizer, model, decompositions=False)


def check(ranks: Sequence[dict[str, Tensor]], truth: dict[str, Tensor], placement: str) -> None:
    for other in ranks[1:]:
        assert_same(several(ranks[0], placement), several(other, placement))
    truth = several(truth, placement)
    assert_moved(mixed(), truth)
    assert_near({name: ranks[0][name] for name in truth}, truth)


@covering(
    strength=1,
    allowed=lambda name, basis, placement, wrapped: name != "no forward at all" or not wrapped,
    name=UNEVEN,
    basis=BASES,
    placement=PLACEMENTS,
    wrapped=[True, False],
)
def test_uneven_batches_equal_one_process_with_all_of_them(
    name: str, basis: str, placement: str, wrapped: bool
) -> None:
    """Wrapped or with gradients averaged by hand; DDP needs a forward of every rank."""
    recipe = {"basis": BASES[basis], "update": "adam", "lr": 0.01}
    plan = [(UNEVEN[name] if step in (0, 2, 3) else even)(step) for step in range(STEPS)]
    ranks = shared_workers().run(
        2, uneven_run, plan, wrapped, {**recipe, "placement": PLACEMENTS[placement]}
    )
    check(ranks, whole(plan, recipe), placement)


# ------------------------------------------------------------------------------------- masked terms


class Weighted(nn.Module):
    """A model that is told which examples count."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mixed()

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


MASKED: dict[str, Any] = {
    "likelihood": {"name": "categorical", "weights": "w"},
    "update": "momentum",
}


def masked_run(
    rank: int, ranks: int, at: Sequence[int], recipe: dict[str, Any]
) -> dict[str, Tensor]:
    """Mask the second half of the examples in the steps `at`; one process leaves that half out."""
    model = Weighted()
    called = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = bound(called, **EACH, **recipe)
    for step in range(STEPS):
        x, y = images(step)
        w = torch.ones(8, dtype=F64)
        if step in at:
            w[4:] = 0
        mine = slice(4 * rank, 4 * rank + 4) if ranks > 1 else slice(4 if step in at else 8)
        optimizer.zero_grad()
        (
            F.cross_entropy(called(x[mine], w[mine]), y[mine], reduction="none")
            @ w[mine]
            * ranks
            / float(w.sum())
        ).backward()
        optimizer.step()
    return {
        name.removeprefix("body."): value
        for name, value in left(optimizer, model, decompositions=ranks > 1).items()
    }


@covering(basis=["EKFAC", "K-FAC"], at=[[0], [1, 2]], placement=PLACEMENTS)
def test_a_rank_of_which_every_term_is_masked_adds_nothing(
    basis: str, at: list[int], placement: str
) -> None:
    recipe = {**MASKED, "basis": BASES[basis]}
    ranks = shared_workers().run(
        2, masked_run, 2, at, {**recipe, "placement": PLACEMENTS[placement]}
    )
    check(ranks, masked_run(0, 1, at, recipe), placement)


class Collective(torch.autograd.Function):
    """The identity with a collective backward, as in modules that are spread over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        dist.all_reduce(torch.zeros(()))
        return gradient


class Spread(Weighted):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = Collective.apply(self.body(x) * 1)
        return out


def passes_of_all(rank: int, fisher: Any, count: int) -> list[int]:
    """Train with a rank of masked terms or without examples, which must run all passes."""
    model = Spread()
    called = DistributedDataParallel(model)
    optimizer = bound(called, **EACH, **{**MASKED, "fisher": fisher})
    for step in range(3):
        x, y = (tensor[: count if rank == 1 else 4] for tensor in part(images(step), rank))
        w = torch.full((len(y),), float(rank == 0 or (step != 1 and count > 0)), dtype=F64)
        optimizer.zero_grad()
        (F.cross_entropy(called(x, w), y, reduction="none") @ w).backward()
        optimizer.step()
    return [optimizer.steps, optimizer.counters["skipped_batches"]]


@pytest.mark.parametrize("count", [4, 0])
@pytest.mark.parametrize(
    "fisher", ["exact", "mc", {"name": "mc", "samples": 3}, "empirical"], ids=str
)
def test_every_rank_runs_the_passes_whatever_its_data(fisher: Any, count: int) -> None:
    assert shared_workers().run(2, passes_of_all, fisher, count) == [[3, 0]] * 2


@covering(
    fisher=["exact", "mc", "empirical"],
    likelihood=["categorical", "gaussian", "bernoulli"],
    basis=BASES,
)
def test_no_examples_at_all_are_no_trouble_and_count_for_nothing(
    fisher: str, likelihood: str, basis: str
) -> None:
    """On one process: the passes run over nothing, before the first examples and after."""
    model = mixed()
    optimizer = bound(model, fisher=fisher, likelihood=likelihood, basis=BASES[basis], **EACH)
    for batch in (NOTHING, images(0), NOTHING):
        before = {
            (name, factor): value
            for name, view in optimizer.layers.items()
            for factor, value in view.factors.items()
        }
        optimizer.zero_grad()
        (model(batch[0]).square().sum() / 8).backward()
        optimizer.step()
        after = {
            (name, factor): value
            for name, view in optimizer.layers.items()
            for factor, value in view.factors.items()
        }
        assert len(after) == (8 if before or batch is not NOTHING else 0)
        assert batch is not NOTHING or all(
            torch.equal(value, after[key]) for key, value in before.items()
        )
    assert optimizer.counters == {"skipped_batches": 0, "failed_decompositions": 0}


# -------------------------------------------------------------------------------------- bad batches


def bad_run(
    rank: int, at: int, value: float, recipe: dict[str, Any]
) -> tuple[list[dict[str, Tensor]], dict[str, int], str]:
    """Train while rank 1 meets a nonfinite number; return the state before each step and after."""
    model = mixed()
    called = DistributedDataParallel(model)
    optimizer = bound(called, **EACH, **recipe)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            x, y = part(images(step), rank)
            if (rank, step) == (1, at):
                x = x.clone()
                x[1, 0, 2, 2] = value
            found.append(left(optimizer, model))
            accumulate(optimizer, called, [(x, y)])
    found.append(left(optimizer, model))
    return found, optimizer.counters, str([str(each.message) for each in caught])


def alone_run(at: int, recipe: dict[str, Any]) -> dict[str, Tensor]:
    """Train one process that counts the good half of that step's curvature and skips its step."""
    model = mixed()
    optimizer = bound(model, **EACH, **recipe)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, part(images(step), 0) if step == at else images(step)).backward()
        if step == at:
            model.out.bias.grad.fill_(float("nan"))
        optimizer.step()
    return left(optimizer, model, decompositions=False)


@covering(
    strength=1,
    fisher=["exact", "empirical"],
    at=[0, 3],
    value=[float("nan"), float("inf")],
    placement=PLACEMENTS,
)
@pytest.mark.filterwarnings("ignore::kfactk.KfactkWarning")
def test_a_bad_batch_on_one_rank_is_skipped_by_all(
    fisher: str, at: int, value: float, placement: str
) -> None:
    """NaN spoils the curvature of all layers, inf that of the first: tanh turns it into 1."""
    recipe = {"fisher": fisher, "update": "adam", "lr": 0.01}
    ranks = shared_workers().run(
        2, bad_run, at, value, {**recipe, "placement": PLACEMENTS[placement]}
    )
    trained = [name for name, parameter in mixed().named_parameters() if parameter.requires_grad]
    for found, counters, said in ranks:
        assert counters["skipped_batches"] == 1
        assert "its step was not taken" in said
        for step, (before, after) in enumerate(pairwise(found)):
            kept = [
                name
                for name in before
                if name in trained or (" " in name and "kfactk." not in name)
            ]
            assert [torch.equal(before[name], after[name]) for name in kept] == [step == at] * len(
                kept
            ), step
    for one, other in zip(ranks[0][0], ranks[1][0], strict=True):
        assert_same(several(one, placement), several(other, placement))
    if value != value:
        truth = several(alone_run(at, recipe), placement)
        assert_near({name: ranks[0][0][-1][name] for name in truth}, truth)


def bad_curvature_run(
    rank: int, at: Sequence[int], recipe: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The targets that rank 1 draws are not finite, its gradient is."""
    model = mixed()
    steps = iter(range(STEPS))

    def draw(view: Tensor) -> Tensor:
        return view + 1 + (float("nan") if next(steps) in at and rank == 1 else 0.0)

    called = DistributedDataParallel(model)
    optimizer = bound(
        called, **EACH, fisher={"name": "mc", "draw": draw}, likelihood="gaussian", **recipe
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(STEPS):
            accumulate(optimizer, called, [part(images(step), rank)])
    return left(optimizer, model), optimizer.counters


@covering(basis=["EKFAC", "K-FAC"], at=[[0], [2, 3]], placement=PLACEMENTS)
def test_a_batch_whose_curvature_is_bad_is_left_out_and_its_step_is_taken(
    basis: str, at: list[int], placement: str
) -> None:
    recipe = {"basis": BASES[basis], "update": "momentum"}
    ranks = shared_workers().run(
        2, bad_curvature_run, at, {**recipe, "placement": PLACEMENTS[placement]}
    )
    model = mixed()
    drawn = {"fisher": {"name": "mc", "draw": lambda view: view + 1}, "likelihood": "gaussian"}
    optimizer = bound(model, **EACH, **drawn, observe="manual", **recipe)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(part(images(step), 0)[0] if step in at else images(step)[0])
        optimizer.observe()
        loss_of(model, images(step)).backward()
        optimizer.step()
    check([found for found, _ in ranks], left(optimizer, model, decompositions=False), placement)
    assert [counters["skipped_batches"] for _, counters in ranks] == [len(at)] * 2, (
        "all ranks count alike"
    )


# ---------------------------------------------------------------------- layers that few ranks reach


class Branches(nn.Module):
    """Examples whose first number is positive take a way of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.rare, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        if bool((x[:, 0] > 0).any()):
            hidden = torch.tanh(self.rare(hidden)) + hidden
        out: Tensor = self.out(hidden)
        return out


def branches() -> Branches:
    torch.manual_seed(5)
    return Branches().double()


def branching_batch(step: int, rank: int, at: Sequence[int]) -> Batch:
    """Batch of one rank; `at` tells who takes the rare branch: 0, 1, both (2) or none (-1)."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(4, 4, generator=generator, dtype=F64)
    x[:, 0] = x[:, 0].abs() if at[step] in (rank, 2) else -x[:, 0].abs()
    return x, torch.randint(3, (4,), generator=generator)


def branching_run(rank: int, at: Sequence[int], recipe: dict[str, Any]) -> list[dict[str, Tensor]]:
    model = branches()
    called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = bound(called, **recipe)
    found = []
    for step in range(len(at)):
        accumulate(optimizer, called, [branching_batch(step, rank, at)])
        found.append(left(optimizer, model))
    return found


@covering(
    strength=1,
    every=[1, 4],
    at=[[0, 1, 0, 1], [-1, 1, -1, 0, 2, -1, 0], [2, -1, -1, -1, 1, 0]],
    placement=PLACEMENTS,
)
def test_a_layer_that_only_one_ranks_data_reach(every: int, at: list[int], placement: str) -> None:
    """One process sees the ranks' batches in turn; a layer counts what it saw."""
    recipe = {"factor_every": every, "scale_every": every, "basis_every": every, "update": "sgd"}
    ranks = shared_workers().run(
        2, branching_run, at, {**recipe, "placement": PLACEMENTS[placement]}
    )
    model = branches()
    optimizer = bound(model, **recipe)
    for step in range(len(at)):
        accumulate(optimizer, model, [branching_batch(step, rank, at) for rank in range(2)])
        truth = several(left(optimizer, model, decompositions=False), placement)
        assert_same(several(ranks[0][step], placement), several(ranks[1][step], placement))
        assert_near({name: ranks[0][step][name] for name in truth}, truth)


def without_gradients(rank: int, placement: Any) -> list[int]:
    """Rank 1 neither makes a forward nor is given a gradient in some steps; nobody waits for it."""
    model = mixed()
    optimizer = bound(model, placement=placement, **EACH)
    for step in range(STEPS):
        optimizer.zero_grad()
        if rank == 0 or step not in (1, 2):
            loss_of(model, images(step)).backward()
        optimizer.step()
    return [
        optimizer.steps,
        optimizer.counters["skipped_batches"],
        int(all(bool(p.isfinite().all()) for p in model.parameters())),
    ]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_rank_without_gradients_keeps_nobody_waiting(placement: str) -> None:
    assert shared_workers().run(2, without_gradients, PLACEMENTS[placement]) == [[STEPS, 0, 1]] * 2
