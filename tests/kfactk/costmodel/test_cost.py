"""The cost model gives literal numbers for small cases, and obeys laws for all."""

import attrs
import pytest
from hypothesis import given, strategies as st

from kfactk.assignment import Assignment, Share, Work, Workload, grid
from kfactk.costmodel.communication import Sizes
from kfactk.costmodel.cost import (
    AVERAGING,
    Amount,
    Costs,
    LayerCost,
    Memory,
    Part,
    TrainingLoad,
    cost,
)
from kfactk.costmodel.hardware import H100, Curve, Link, Machine
from tests.kfactk.workloads import workloads

ONES = Machine(
    name="ones",
    kind="cpu",
    products={"float32": 1.0, "bfloat16": 2.0},
    convolutions=0.5,
    triangular=0.25,
    precision="float32",
    bandwidth=1.0,
    launch=1.0,
    solvers={"eigh": Curve(((1, 1.0), (10, 1000.0))), "cholesky": Curve(((1, 0.5), (10, 500.0)))},
    intra_node=Link(1.0, 0.0),
    inter_node=Link(1.0, 0.0),
    ranks_per_node=8,
    memory=1e12,
    overlaps=False,
)
"""A machine with rates of 1, decompositions of n^3 seconds, and messages without latency."""
FC = Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3))
SHAPES = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 2)])


def rows(workload: Workload, ranks: int, width: int, **options: bool) -> Assignment:
    return grid(workload, ranks, width, "rows", **options)


def costs_of(
    workload: Workload, shape: tuple[int, int], machine: Machine = H100, **options: bool
) -> Costs:
    ranks, width = shape
    return cost(
        TrainingLoad.of(workload, batch=4, forward=1e6),
        rows(workload, ranks, width, **options),
        ranks,
        machine,
    )


def test_amount_takes_seconds_at_the_rates_of_the_machine() -> None:
    amount = Amount(products=6.0, convolutions=2.0, bytes=4.0, launches=3.0, triangular=1.0)
    assert amount.seconds(ONES) == 6 + 4 + 4 + 3 + 4
    assert amount.seconds(ONES, "bfloat16") == 3 + 2 + 2 + 3 + 2
    assert (amount + amount).times(0.5) == amount


def test_layer_cost_follows_its_formulas() -> None:
    """N = 5 examples of T = 4 rows, o = 2, i = 3."""
    found = LayerCost.of(FC, Workload((FC,)), positions=4, batch=5)
    assert found.factors.products == 2 * 5 * 4 * (9 + 4)
    assert found.scale.products == 5 * (2 * 4 * 6 + 2 * 4 * 3 + 2 * 9 * 2)
    assert found.precondition.products == 4 * 6 * 5
    assert found.transport.products == 2 * (27 + 8) + 2 * 6 * 5
    assert found.retained == 5 * 4 * 5
    assert found.sizes == Sizes({"A": 6, "G": 3}, {"A": 12, "G": 6}, 6)
    inverse = LayerCost.of(
        FC, Workload((FC,), sampled=False), positions=4, batch=5, solver="cholesky"
    )
    assert (
        inverse.precondition.triangular,
        inverse.scale,
        inverse.transport,
        inverse.sizes.moments,
    ) == (2 * 6 * 5, Amount(), Amount(), 0)


def test_layer_cost_is_proportional_to_groups() -> None:
    grouped = Work("conv", {"A": (7, 3, 3), "G": (7, 2, 2)}, (7, 2, 3))
    one, seven = (
        LayerCost.of(work, Workload((work,)), positions=4, batch=5) for work in (FC, grouped)
    )
    assert seven.factors.products == 7 * one.factors.products
    assert seven.scale.products == 7 * one.scale.products
    assert seven.precondition.products == 7 * one.precondition.products
    assert (
        seven.decomposition_seconds((7, 3, 3), ONES)
        == pytest.approx(7 * one.decomposition_seconds((3, 3), ONES))
        == pytest.approx(7 * 27)
    )


def test_layer_cost_of_diagonals_has_no_decomposition() -> None:
    diagonal = Work("fc", {"d": (2, 3)}, (2, 3))
    found = LayerCost.of(diagonal, Workload((diagonal,)))
    assert found.decomposition_seconds((2, 3), ONES) == 0
    assert attrs.evolve(found, solver="").decomposition_seconds((3, 3), ONES) == 0


def bare(amount: Amount = Amount(), **changes: object) -> LayerCost:  # noqa: B008
    return attrs.evolve(
        LayerCost(
            amount, amount, amount, Sizes({"A": 6, "G": 3}, {"A": 9, "G": 4}, 0), 0.0, "eigh"
        ),
        **changes,
    )


def test_cost_of_a_step_on_two_ranks_by_hand() -> None:
    """Rank 0 decomposes A (27 s), rank 1 G (8 s); rank 0 preconditions (5 s), sends 24 bytes."""
    workload = Workload((FC,), factor_every=2, basis_every=4, sampled=False)
    layer = bare(precondition=Amount(5.0), factors=Amount(8.0))
    load = TrainingLoad(
        workload,
        {"fc": layer},
        forward_backward=Amount(10.0),
        fisher_pass=Amount(4.0),
        parameters=6,
        state=1.0,
    )
    share = Assignment("by hand", {"fc": Share({"A": (0,), "G": (1,)}, (0,))})
    found = cost(load, share, 2, ONES)
    assert found.compute == {
        "forward and backward": Part(10.0, 10.0),
        "Fisher pass": Part(2.0, 4.0),
        "factors": Part(4.0, 8.0),
        "scale": Part(0.0, 0.0),
        "update": Part(4 * 6 * 6 + 4, 4 * 6 * 6 + 4),
        "decomposition": Part(pytest.approx(27 / 4), pytest.approx(27)),
        "preconditioning": Part(5.0, 5.0),
    }
    # Bytes: sums of A 24, of G 12; decomposition of G 16; gradient 24; averaging 24; and packing.
    assert found.communication == {
        "sums": Part(18.0 + 82, 36.0 + 164),
        "decompositions": Part(4.0 + 18.5, 16.0 + 74),
        "moments": Part(0.0, 0.0),
        "gradients": Part(24.0 + 106, 24.0 + 106),
        AVERAGING: Part(24.0 + 106, 24.0 + 106),
    }
    assert found.moved == {"sums": 18.0, "decompositions": 4.0, "moments": 0.0, "gradients": 24.0}
    assert found.worst_moved == {
        "sums": 36.0,
        "decompositions": 16.0,
        "moments": 0.0,
        "gradients": 24.0,
    }
    assert found.held == (4 * 9 + 4 * 13, 4 * 4)
    assert found.refresh_seconds == pytest.approx((27, 8))
    assert found.memory == Memory(model=4 * 6 * 3, activations=0.0, curvature=88, temporary=4 * 13)
    assert found.memory.total == 72 + 88 + 52
    assert found.seconds == pytest.approx(10 + 2 + 4 + 148 + 27 / 4 + 5 + 100 + 22.5 + 130 + 130)


def test_cost_is_proportional_to_passes() -> None:
    workload = Workload((FC,), factor_every=1, sampled=False)
    load = TrainingLoad(
        workload, {"fc": bare(factors=Amount(8.0))}, fisher_pass=Amount(4.0), passes=3
    )
    found = cost(load, rows(workload, 1, 1), 1, ONES).compute
    assert (found["Fisher pass"], found["factors"]) == (Part(12.0, 12.0), Part(24.0, 24.0))
    assert cost(attrs.evolve(load, passes=0), rows(workload, 1, 1), 1, ONES).compute[
        "Fisher pass"
    ] == Part(0.0, 0.0)


def test_cost_of_transport_is_borne_by_gradient_workers() -> None:
    """Two ranks decompose for 27 and 8 seconds; transport takes the gradient worker 9 more."""
    workload = Workload((FC,), basis_every=4, sampled=False)
    share = Assignment("by hand", {"fc": Share({"A": (0,), "G": (1,)}, (1,))})
    found = cost(TrainingLoad(workload, {"fc": bare(transport=Amount(9.0))}), share, 2, ONES)
    assert found.refresh_seconds == pytest.approx((27, 17))


def test_cost_of_averaging_overlaps_with_the_backward() -> None:
    workload = Workload((FC,))
    load = TrainingLoad(workload, {"fc": bare()}, forward_backward=Amount(30.0), parameters=6)
    for overlaps, left in ((False, 130.0), (True, 110.0)):
        found = cost(load, rows(workload, 2, 2), 2, attrs.evolve(ONES, overlaps=overlaps))
        assert found.communication[AVERAGING] == Part(left, left)


def test_cost_of_the_worst_step_is_that_of_one_slot() -> None:
    """Two equal layers in two slots: half of the decompositions in a step, the same mean."""
    workload = Workload((FC, attrs.evolve(FC, layer="fc2")), sampled=False)
    load = TrainingLoad(workload, {"fc": bare(), "fc2": bare()})
    one, two = (cost(attrs.evolve(load, slots=n), rows(workload, 1, 1), 1, ONES) for n in (1, 2))
    assert one.compute["decomposition"] == Part(pytest.approx(0.70), pytest.approx(70))
    assert two.compute["decomposition"] == Part(pytest.approx(0.70), pytest.approx(35))
    shared = cost(attrs.evolve(load, slots=2), rows(workload, 2, 2), 2, ONES)
    assert shared.worst_moved["decompositions"] == 4 * 13
    assert shared.moved == cost(load, rows(workload, 2, 2), 2, ONES).moved


def test_cost_with_more_slots_than_layers_is_that_of_a_layer() -> None:
    workload = Workload((FC,))
    load = TrainingLoad(workload, {"fc": bare()}, slots=5)
    assert cost(load, rows(workload, 2, 1), 2, ONES).compute[
        "decomposition"
    ].worst == pytest.approx(35)


@given(workloads(), st.integers(1, 6))
def test_memory_with_one_rank_for_each_layer_falls_with_ranks(
    workload: Workload, ranks: int
) -> None:
    """The bytes of all ranks stay the same, so no rank keeps more than a single one would."""
    alone, divided = costs_of(workload, (1, 1)), costs_of(workload, (ranks, 1))
    assert sum(divided.held) == pytest.approx(sum(alone.held))
    assert max(divided.held) <= alone.held[0] * (1 + 1e-9)
    assert divided.memory.curvature == max(divided.held)


def test_memory_of_equal_layers_is_divided_evenly_among_ranks() -> None:
    workload = Workload(tuple(attrs.evolve(FC, layer=str(n)) for n in range(12)))
    held = [max(costs_of(workload, (ranks, 1)).held) for ranks in (1, 2, 3, 4, 6, 12)]
    assert held == [held[0] / ranks for ranks in (1, 2, 3, 4, 6, 12)]


@given(workloads(), st.integers(2, 6))
def test_cost_has_no_gradients_where_all_ranks_are_gradient_workers(
    workload: Workload, ranks: int
) -> None:
    for everyone in (False, True):
        found = costs_of(workload, (ranks, ranks), everyone=everyone)
        assert found.moved["gradients"] == 0
        assert found.communication["gradients"] == Part(0.0, 0.0)


@given(workloads(), SHAPES)
def test_cost_of_wider_rows_is_more_memory_and_fewer_gradients(
    workload: Workload, shape: tuple[int, int]
) -> None:
    ranks, _ = shape
    narrow, wide = costs_of(workload, (ranks, 1)), costs_of(workload, shape)
    assert sum(narrow.held) <= sum(wide.held) * (1 + 1e-9)
    assert narrow.moved["gradients"] >= wide.moved["gradients"]


@given(workloads(), SHAPES, st.integers(0, 5))
def test_cost_grows_with_layers(workload: Workload, shape: tuple[int, int], which: int) -> None:
    """In seconds of computation, bytes kept and bytes moved, for one assignment."""
    ranks, width = shape
    assignment = rows(workload, ranks, width)
    work = workload.works[which % len(workload.works)]
    (*lead, o, i) = work.gradient
    wider = attrs.evolve(
        work,
        matrices={"A": (*lead, i + 3, i + 3), "G": (*lead, o + 2, o + 2)},
        gradient=(*lead, o + 2, i + 3),
    )
    larger = attrs.evolve(
        workload, works=tuple(wider if each is work else each for each in workload.works)
    )
    less, more = (
        cost(TrainingLoad.of(each, batch=4, forward=1e6), assignment, ranks, H100)
        for each in (workload, larger)
    )
    for part, seconds in less.compute.items():
        assert seconds.mean <= more.compute[part].mean
        assert seconds.worst <= more.compute[part].worst
    assert all(least <= most for least, most in zip(less.held, more.held, strict=True))
    assert all(less.moved[kind] <= more.moved[kind] for kind in less.moved)
    assert less.memory.total < more.memory.total


@given(workloads(), SHAPES)
def test_cost_of_a_mean_step_is_at_most_that_of_the_worst(
    workload: Workload, shape: tuple[int, int]
) -> None:
    found = costs_of(workload, shape)
    for part in (
        *found.compute.values(),
        *(found.communication[kind] for kind in ("sums", "moments", "gradients", AVERAGING)),
    ):
        assert 0 <= part.mean <= part.worst * (1 + 1e-9)
    assert found.seconds == pytest.approx(
        sum(part.mean for part in (*found.compute.values(), *found.communication.values()))
    )


@given(workloads(), SHAPES)
def test_cost_falls_with_longer_periods(workload: Workload, shape: tuple[int, int]) -> None:
    rarer = attrs.evolve(
        workload,
        factor_every=2 * workload.factor_every,
        scale_every=2 * workload.scale_every,
        basis_every=2 * workload.basis_every,
    )
    often, seldom = costs_of(workload, shape), costs_of(rarer, shape)
    assert seldom.seconds <= often.seconds
    assert sum(seldom.moved.values()) <= sum(often.moved.values()) * (1 + 1e-9)
    assert seldom.held == often.held


def lagging(lag: int, kind: str) -> dict[str, Part]:
    """Parts on a machine on which the decompositions take 35 s, and all else 6 s in each step."""
    workload = Workload((FC,), factor_every=1, basis_every=10, sampled=False)
    layer = bare(Amount(3.0))
    load = TrainingLoad(workload, {"fc": layer}, lag=lag)
    machine = attrs.evolve(ONES, kind=kind)
    return dict(cost(load, rows(workload, 1, 1), 1, machine).compute)


@pytest.mark.parametrize(
    ("lag", "kind", "mean", "worst"),
    [
        (0, "cpu", 3.5, 35.0),
        (2, "cpu", 3.5, 35 - 2 * 6.0),
        (5, "cpu", 3.5, 6.0),
        (9, "cpu", 3.5, 6.0),
        (0, "cuda", 3.5, 35.0),
        (2, "cuda", 2.3, 35 - 2 * 6.0),
        (9, "cuda", 0.0, 0.0),
    ],
)
def test_decompositions_run_beside_steps(lag: int, kind: str, mean: float, worst: float) -> None:
    """A processor does the same work beside; a step waits for what is left."""
    parts = lagging(lag, kind)
    found = parts["decomposition"]
    rest = sum(part.mean for name, part in parts.items() if name != "decomposition")
    assert rest == 6
    assert (found.mean, found.worst) == (pytest.approx(mean), pytest.approx(worst))


def test_a_lag_keeps_copies_and_results() -> None:
    workload = Workload((FC,), sampled=False)
    load = TrainingLoad(workload, {"fc": bare()})
    plain, lagged = (
        cost(each, rows(workload, 1, 1), 1, ONES).memory.temporary
        for each in (load, attrs.evolve(load, lag=3))
    )
    assert lagged - plain == 4 * (9 + 4) + 4 * (9 + 4)


def test_the_longest_intervals_of_a_pace_are_the_least_it_costs() -> None:
    workload = Workload((FC,), factor_every=2, scale_every=2, basis_every=2)
    load = TrainingLoad.of(workload, batch=4, forward=10.0)
    seldom = attrs.evolve(load, longest=8).at_longest_intervals()
    assert seldom.workload == attrs.evolve(
        workload, factor_every=16, scale_every=16, basis_every=16
    )
    one, other = (cost(each, rows(workload, 1, 1), 1, ONES) for each in (load, seldom))
    for name in ("factors", "scale", "decomposition", "Fisher pass"):
        assert other.compute[name].mean == pytest.approx(one.compute[name].mean / 8)
    assert other.worst == one.worst
