"""What a link costs: truth is what torch counts and keeps in real steps."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import kfactk
from kfactk import Link, LinkedLayer, Prepared, Samples, Statistic, Tensors
from kfactk.assignment import grid
from kfactk.costmodel.cost import Amount, LinkCost, TrainingLoad, cost
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.costmodel.hardware import H100
from kfactk.costmodel.metering import Meter
from kfactk.preconditioner.footprint import link_footprint
from kfactk.preconditioner.memory import link_peak
from kfactk.testing._support.ranks import shared_workers
from kfactk_stages.link.block_tridiagonal import BlockTridiagonal
from kfactk_stages.link.two_level import TwoLevel
from tests.allocation import peak_bytes

RECIPES: dict[str, dict[str, Any]] = {
    "two_level": {"link": "two_level", "curvature": "kfac"},
    "block_tridiagonal": {"link": "block_tridiagonal", "curvature": "kfac", "basis": "kfac"},
}
CHAIN = {"curvature": "kfac", "basis": "kfac"}
N = 16


def net(width: int = 40) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 30, bias=False), nn.Tanh()),
        nn.Linear(30, 5),
    )


def loaded(recipe: dict[str, Any], width: int = 40) -> TrainingLoad:
    return training_load(net(width).to("meta"), kfactk.build(**recipe), meta_batch("20", N))


def after_steps(recipe: dict[str, Any], width: int = 40, steps: int = 1) -> kfactk.Optimizer:
    model = net(width)
    optimizer = kfactk.build(**recipe).bind(model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(N, 20)), torch.randint(5, (N,))).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_are_those_of_the_state_after_a_step(name: str) -> None:
    optimizer = after_steps(RECIPES[name])
    found = {
        key: tensor.nbytes
        for entry in optimizer.state.values()
        for key, tensor in entry.items()
        if key.startswith(("kfactk.link.", "kfactk.prepared."))
    }
    assert found
    prepared = sum(size for key, size in found.items() if "prepared" in key)
    statistics = sum(
        size for key, size in found.items() if "link." in key and not key.endswith("weight")
    )
    blocks = optimizer._preconditioner.blocks.current()
    link = optimizer.recipe.link
    assert link is not None
    footprint = link_footprint(link, blocks)
    assert (footprint.statistics, footprint.prepared) == (statistics, prepared)
    counted = loaded(RECIPES[name]).link
    assert counted is not None
    assert counted.kept == statistics + prepared
    assert counted.untold == ()
    assert f"{len(footprint.layers)} layers, " in str(optimizer.coverage())


class Watching:
    """Counts what a link does in a real step."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}
        self.metered: dict[str, Amount] = {}

    def of(self, name: str, call: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            call()
        with Meter() as meter:
            found = call()
        self.flops[name] = counter.get_total_flops()
        self.metered[name] = meter.amount
        return found


WATCH = Watching()


class WatchedTridiagonal(BlockTridiagonal):
    def prepare(self, *args: Any) -> Any:
        return WATCH.of("prepare", lambda: BlockTridiagonal.prepare(self, *args))

    def correct(self, *args: Any) -> Any:
        return WATCH.of("correct", lambda: BlockTridiagonal.correct(self, *args))

    def statistics(self, *args: Any) -> Any:
        return WATCH.of("statistics", lambda: BlockTridiagonal.statistics(self, *args))


class WatchedTwoLevel(TwoLevel):
    def correct(self, *args: Any) -> Any:
        return WATCH.of("correct", lambda: TwoLevel.correct(self, *args))

    def statistics(self, *args: Any) -> Any:
        return WATCH.of("statistics", lambda: TwoLevel.statistics(self, *args))


def test_a_preparation_takes_the_flops_that_it_tells() -> None:
    after_steps({**CHAIN, "link": WatchedTridiagonal()})
    counted = loaded(RECIPES["block_tridiagonal"]).link
    assert counted is not None
    real = WATCH.metered["prepare"]
    assert counted.prepare.products == 2 * real.products  # in double precision
    assert counted.prepare.triangular == 2 * real.triangular > 0
    n, m = {"A": (21, 41 - 1), "G": (40, 30)}, {"A": (40, 31), "G": (30, 5)}
    products = sum(2 * here * here * there for pair in (n, m) for here, there in pair.values())
    assert WATCH.flops["prepare"] == products  # torch counts no solves
    assert sorted(counted.decomposed["eigh"]) == sorted([21, 40, 40, 30])
    assert sorted(counted.decomposed["cholesky"]) == sorted([21, 40, 40, 30, 31, 5])


@pytest.mark.parametrize(
    ("stage", "name"),
    [(WatchedTridiagonal, "block_tridiagonal"), (WatchedTwoLevel, "two_level")],
)
def test_a_correction_takes_the_flops_of_a_real_one(stage: type[Link], name: str) -> None:
    after_steps({**RECIPES[name], "link": stage()})
    counted = loaded(RECIPES[name]).link
    assert counted is not None
    assert counted.correct.products == WATCH.metered["correct"].products
    assert counted.correct.bytes == WATCH.metered["correct"].bytes
    assert WATCH.flops["correct"] <= counted.correct.products
    if name == "block_tridiagonal":
        layers = [(40, 21), (30, 40), (5, 31)]
        own = sum(4 * o * i * (o + i) for o, i in layers)  # four products with K of each side
        pairs = itertools.pairwise(layers)
        crossing = sum(
            2 * (o * p * q + o * q * i) + 2 * (p * o * i + p * i * q) for (o, i), (p, q) in pairs
        )
        assert WATCH.flops["correct"] == own + crossing


def test_a_preparation_needs_about_the_workspace_that_it_tells() -> None:
    width = 400
    optimizer = after_steps({**CHAIN, "link": "block_tridiagonal"}, width)
    links = optimizer._preconditioner.links
    blocks = optimizer._preconditioner.blocks.current()
    told = link_footprint(BlockTridiagonal(), blocks)
    assert told.workspace is not None
    assert told.prepared is not None
    layers, statistics = links._layers(), links._statistics()
    measured = peak_bytes(lambda: BlockTridiagonal().prepare(layers, statistics))
    predicted = told.workspace + told.prepared
    assert 0.6 * measured <= predicted <= 1.6 * measured
    assert link_peak(told) >= predicted


def test_rows_wait_until_the_pass_ends() -> None:
    rows = loaded(RECIPES["block_tridiagonal"]).link, loaded(RECIPES["two_level"]).link
    assert rows[0] is not None
    assert rows[1] is not None
    assert rows[0].gathered == 4 * N * (21 + 40 + 40 + 30 + 31 + 5)
    assert rows[1].gathered == 4 * N * 3


def test_blocks_do_not_solve_where_the_link_does() -> None:
    found = []
    for link in (None, "block_tridiagonal"):
        load = loaded({**CHAIN, "link": link, "clip": "none"})
        costs = cost(load, grid(load.workload, 1, 1, "one"), 1, H100)
        found.append(costs.compute)
    alone, joined = found
    assert alone["preconditioning"].mean > 0 == joined["preconditioning"].mean
    assert "link correction" not in alone
    parts = {name: joined[f"link {name}"] for name in ("statistics", "preparation", "correction")}
    assert parts["statistics"].mean == pytest.approx(parts["statistics"].worst / 10)
    assert parts["preparation"].mean == pytest.approx(parts["preparation"].worst / 100)
    assert parts["correction"].mean == parts["correction"].worst > 0


def test_every_rank_keeps_what_a_link_has_and_sends_its_sums() -> None:
    load = loaded(RECIPES["two_level"])
    plain = attrs.evolve(load, link=None)
    assert load.link is not None
    assert load.link.sums == 8 * 3 * 4 // 2  # in double precision
    for width in (1, 2):
        assignment = grid(load.workload, 2, width, "rows")
        one, other = (cost(each, assignment, 2, H100) for each in (plain, load))
        added = [b - a for a, b in zip(one.held, other.held, strict=True)]
        assert added == [load.link.kept] * 2
        assert other.moved["sums"] - one.moved["sums"] == pytest.approx(2 * 8 * 6 / 10)
        assert bool(load.link.refused(assignment, 2)) == (width == 1)
    read = attrs.evolve(load.link, requires=frozenset("A"))
    assert "needs layer" in read.refused(grid(load.workload, 2, 2, "rows"), 2)
    assert not read.refused(grid(load.workload, 2, 2, "rows", everyone=True), 2)


def sums_moved(rank: int, link: str | None) -> float:
    """Bytes of sums that a rank sends and receives in a refresh of the factors."""
    model = net()
    recipe = {**RECIPES[link or "two_level"], "link": link, "factor_every": 1, "clip": "none"}
    optimizer = kfactk.build(**recipe).bind(model)
    for _ in range(2):
        before = optimizer.moved_bytes.get("sums", 0.0)
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(N, 20)), torch.randint(5, (N,))).backward()
        optimizer.step()
    return optimizer.moved_bytes["sums"] - before


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_send_the_sums_that_are_counted(name: str) -> None:
    linked, plain = (sum(shared_workers().run(2, sums_moved, each)) for each in (name, None))
    load = loaded({**RECIPES[name], "factor_every": 1})
    assignment = grid(load.workload, 2, 2, "rows", everyone=True)
    counted, without = (
        cost(each, assignment, 2, H100).moved["sums"]
        for each in (load, attrs.evolve(load, link=None))
    )
    assert linked - plain == pytest.approx(counted - without)


class Silent(TwoLevel):
    """Prepares something, and does not tell."""

    def prepare(self, layers: Any, statistics: Tensors) -> Prepared:
        return Prepared({"root": torch.linalg.cholesky(statistics["coarse"] + torch.eye(3))})


class Reading(TwoLevel):
    """Prepares nothing, and reads numbers in each step."""

    def correct(
        self,
        layers: Any,
        gradients: Tensors,
        preconditioned: Tensors,
        statistics: Tensors,
    ) -> dict[str, Tensor]:
        assert float(statistics["coarse"].sum()) > -1
        return super().correct(layers, gradients, preconditioned, statistics)


class Counting(TwoLevel):
    """Counts in its rows what it has seen."""

    def rows(self, layer: LinkedLayer, samples: Samples) -> Tensors:
        found = super().rows(layer, samples)
        assert len(found["sums"].tolist()) == N
        return found


class Wrong(TwoLevel):
    """Fails in its own way."""

    def statistics(self, layers: Any, rows: Any, num_terms: Any) -> dict[str, Statistic]:
        raise ZeroDivisionError("of its own")


@pytest.mark.parametrize(
    ("link", "untold"),
    [
        (Silent(), ["what it prepares", "its correction"]),
        (Reading(), ["its correction"]),
        (Counting(), ["what it measures"]),
        (TwoLevel(), []),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_a_link_does_not_tell_is_said(link: Link, untold: list[str]) -> None:
    load = loaded({"curvature": "kfac", "link": link})
    name = f"'{type(link).__qualname__}'"
    assert [each.partition(" of ")[0] for each in load.untold] == untold
    assert all(type(link).__qualname__ in each for each in load.untold), name
    lines = str(kfactk.build(curvature="kfac", link=link).coverage(net())).splitlines()
    if isinstance(link, Silent):
        assert "what it prepares and their seconds are not told" in lines[-1]
        assert "under 1 kB of statistics" in lines[-1]
    else:
        assert "3 layers, under 1 kB between steps" in lines[-1]


def test_a_link_that_fails_by_itself_is_named() -> None:
    with pytest.raises(kfactk.PluginError, match="of its own"):
        loaded({"curvature": "kfac", "link": Wrong()})


def test_a_link_that_joins_nothing_costs_nothing() -> None:
    with torch.device("meta"):
        model = nn.Linear(20, 5)
    load = training_load(model, kfactk.build(**RECIPES["block_tridiagonal"]), meta_batch("20", N))
    assert load.link == LinkCost(load.link.label, frozenset())  # type: ignore[union-attr]
