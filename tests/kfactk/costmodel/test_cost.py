"""The cost model: literal figures for small cases, and what must hold for any."""

import attrs
import pytest
from hypothesis import given, strategies as st

from kfactk.assignment import Assignment, Share, Work, Workload, grid
from kfactk.costmodel.communication import Sizes
from kfactk.costmodel.cost import AVERAGING, Amount, Costs, Job, LayerCost, Memory, Part, cost
from kfactk.costmodel.hardware import H100, Curve, Link, Machine
from tests.kfactk.workloads import workloads

ONES = Machine(
    name="ones",
    kind="cpu",
    products={"float32": 1.0, "bfloat16": 2.0},
    convolutions=0.5,
    precision="float32",
    bandwidth=1.0,
    launch=1.0,
    solvers={"eigh": Curve(((1, 1.0), (10, 1000.0))), "cholesky": Curve(((1, 0.5), (10, 500.0)))},
    near=Link(1.0, 0.0),
    far=Link(1.0, 0.0),
    node=8,
    memory=1e12,
    overlaps=False,
)
"""A machine on which everything takes a second, a decomposition n^3, and messages no time but their bytes'."""
FC = Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3))
SHAPES = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 2)])


def rows(workload: Workload, ranks: int, width: int, **options: bool) -> Assignment:
    return grid(workload, ranks, width, "rows", **options)


def placed(
    workload: Workload, shape: tuple[int, int], machine: Machine = H100, **options: bool
) -> Costs:
    ranks, width = shape
    return cost(
        Job.of(workload, batch=4, forward=1e6),
        rows(workload, ranks, width, **options),
        ranks,
        machine,
    )


def test_seconds_of_an_amount() -> None:
    amount = Amount(products=6.0, convolutions=2.0, bytes=4.0, launches=3.0)
    assert amount.seconds(ONES) == 6 + 4 + 4 + 3
    assert amount.seconds(ONES, "bfloat16") == 3 + 2 + 2 + 3
    assert (amount + amount).times(0.5) == amount


def test_a_layer_by_hand() -> None:
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
        inverse.precondition.products,
        inverse.scale,
        inverse.transport,
        inverse.sizes.moments,
    ) == (2 * 6 * 5, Amount(), Amount(), 0)


def test_groups_multiply() -> None:
    grouped = Work("conv", {"A": (7, 3, 3), "G": (7, 2, 2)}, (7, 2, 3))
    one, seven = (
        LayerCost.of(work, Workload((work,)), positions=4, batch=5) for work in (FC, grouped)
    )
    assert seven.factors.products == 7 * one.factors.products
    assert seven.scale.products == 7 * one.scale.products
    assert seven.precondition.products == 7 * one.precondition.products
    assert (
        seven.decomposing((7, 3, 3), ONES)
        == pytest.approx(7 * one.decomposing((3, 3), ONES))
        == pytest.approx(7 * 27)
    )


def test_what_is_not_square_is_decomposed_at_no_cost() -> None:
    diagonal = Work("fc", {"d": (2, 3)}, (2, 3))
    found = LayerCost.of(diagonal, Workload((diagonal,)))
    assert found.decomposing((2, 3), ONES) == 0
    assert attrs.evolve(found, solver="").decomposing((3, 3), ONES) == 0


def bare(amount: Amount = Amount(), **changes: object) -> LayerCost:  # noqa: B008
    return attrs.evolve(
        LayerCost(
            amount, amount, amount, Sizes({"A": 6, "G": 3}, {"A": 9, "G": 4}, 0), 0.0, "eigh"
        ),
        **changes,
    )


def test_a_step_of_two_ranks_by_hand() -> None:
    """fc is decomposed by 0 (A: 27 s) and 1 (G: 8 s), held by 0: which takes 5 s to precondition, and sends 6 numbers of 4 bytes."""
    workload = Workload((FC,), factor_every=2, basis_every=4, sampled=False)
    layer = bare(precondition=Amount(5.0), factors=Amount(8.0))
    job = Job(
        workload, {"fc": layer}, step=Amount(10.0), fisher=Amount(4.0), parameters=6, state=1.0
    )
    share = Assignment("by hand", {"fc": Share({"A": (0,), "G": (1,)}, (0,))})
    found = cost(job, share, 2, ONES)
    assert found.compute == {
        "forward and backward": Part(10.0, 10.0),
        "Fisher pass": Part(2.0, 4.0),
        "factors": Part(4.0, 8.0),
        "scale": Part(0.0, 0.0),
        "update": Part(4 * 6 * 6 + 4, 4 * 6 * 6 + 4),
        "decomposition": Part(pytest.approx(27 / 4), pytest.approx(27)),
        "preconditioning": Part(5.0, 5.0),
    }
    # sums: A 24 bytes and G 12; decompositions: G 16 bytes to rank 0; gradients: 24 bytes; averaging: a ring of 24. Each with packing.
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
    assert found.decomposing == pytest.approx((27, 8))
    assert found.memory == Memory(model=4 * 6 * 3, activations=0.0, curvature=88, passing=4 * 13)
    assert found.memory.total == 72 + 88 + 52
    assert found.seconds == pytest.approx(10 + 2 + 4 + 148 + 27 / 4 + 5 + 100 + 22.5 + 130 + 130)


def test_passes_multiply_what_they_repeat() -> None:
    workload = Workload((FC,), factor_every=1, sampled=False)
    job = Job(workload, {"fc": bare(factors=Amount(8.0))}, fisher=Amount(4.0), passes=3)
    found = cost(job, rows(workload, 1, 1), 1, ONES).compute
    assert (found["Fisher pass"], found["factors"]) == (Part(12.0, 12.0), Part(24.0, 24.0))
    assert cost(attrs.evolve(job, passes=0), rows(workload, 1, 1), 1, ONES).compute[
        "Fisher pass"
    ] == Part(0.0, 0.0)


def test_holders_carry_moments_over() -> None:
    """Of 27 and 8 seconds of decomposition on two ranks, and 9 of carrying on the one that holds the layer."""
    workload = Workload((FC,), basis_every=4, sampled=False)
    share = Assignment("by hand", {"fc": Share({"A": (0,), "G": (1,)}, (1,))})
    found = cost(Job(workload, {"fc": bare(transport=Amount(9.0))}), share, 2, ONES)
    assert found.decomposing == pytest.approx((27, 17))


def test_averaging_hides_behind_the_backward_where_messages_overlap() -> None:
    workload = Workload((FC,))
    job = Job(workload, {"fc": bare()}, step=Amount(30.0), parameters=6)
    for overlaps, left in ((False, 130.0), (True, 110.0)):
        found = cost(job, rows(workload, 2, 2), 2, attrs.evolve(ONES, overlaps=overlaps))
        assert found.communication[AVERAGING] == Part(left, left)


def test_in_turns_the_worst_step_bears_one_of_them() -> None:
    """Two equal layers in two turns: half of the decompositions in a step, the same in the mean of one rank."""
    workload = Workload((FC, attrs.evolve(FC, layer="fc2")), sampled=False)
    job = Job(workload, {"fc": bare(), "fc2": bare()})
    together, slots = (
        cost(attrs.evolve(job, slots=n), rows(workload, 1, 1), 1, ONES) for n in (1, 2)
    )
    assert together.compute["decomposition"] == Part(pytest.approx(0.70), pytest.approx(70))
    assert slots.compute["decomposition"] == Part(pytest.approx(0.70), pytest.approx(35))
    shared = cost(attrs.evolve(job, slots=2), rows(workload, 2, 2), 2, ONES)
    assert shared.worst_moved["decompositions"] == 4 * 13
    assert shared.moved == cost(job, rows(workload, 2, 2), 2, ONES).moved


def test_more_turns_than_layers_do_no_harm() -> None:
    workload = Workload((FC,))
    job = Job(workload, {"fc": bare()}, slots=5)
    assert cost(job, rows(workload, 2, 1), 2, ONES).compute["decomposition"].worst == pytest.approx(
        35
    )


@given(workloads(), st.integers(1, 6))
def test_memory_of_one_owner_each_falls_with_ranks(workload: Workload, ranks: int) -> None:
    """What is held in all stays the same, and so no rank holds more than alone; none holds more than its mean and one layer."""
    alone, divided = placed(workload, (1, 1)), placed(workload, (ranks, 1))
    assert sum(divided.held) == pytest.approx(sum(alone.held))
    assert max(divided.held) <= alone.held[0] * (1 + 1e-9)
    assert divided.memory.curvature == max(divided.held)


def test_memory_of_equal_layers_is_divided_evenly() -> None:
    workload = Workload(tuple(attrs.evolve(FC, layer=str(n)) for n in range(12)))
    held = [max(placed(workload, (ranks, 1)).held) for ranks in (1, 2, 3, 4, 6, 12)]
    assert held == [held[0] / ranks for ranks in (1, 2, 3, 4, 6, 12)]


@given(workloads(), st.integers(2, 6))
def test_holders_everywhere_get_no_gradients(workload: Workload, ranks: int) -> None:
    for everyone in (False, True):
        found = placed(workload, (ranks, ranks), everyone=everyone)
        assert found.moved["gradients"] == 0
        assert found.communication["gradients"] == Part(0.0, 0.0)


@given(workloads(), SHAPES)
def test_wider_rows_hold_more_and_send_fewer_gradients(
    workload: Workload, shape: tuple[int, int]
) -> None:
    ranks, _ = shape
    narrow, wide = placed(workload, (ranks, 1)), placed(workload, shape)
    assert sum(narrow.held) <= sum(wide.held) * (1 + 1e-9)
    assert narrow.moved["gradients"] >= wide.moved["gradients"]


@given(workloads(), SHAPES, st.integers(0, 5))
def test_larger_layers_cost_no_less(workload: Workload, shape: tuple[int, int], which: int) -> None:
    """In seconds of computation, bytes held and bytes moved of all ranks, for one assignment."""
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
        cost(Job.of(each, batch=4, forward=1e6), assignment, ranks, H100)
        for each in (workload, larger)
    )
    for part, seconds in less.compute.items():
        assert seconds.mean <= more.compute[part].mean
        assert seconds.worst <= more.compute[part].worst
    assert all(least <= most for least, most in zip(less.held, more.held, strict=True))
    assert all(less.moved[kind] <= more.moved[kind] for kind in less.moved)
    assert less.memory.total < more.memory.total


@given(workloads(), SHAPES)
def test_no_mean_exceeds_its_worst_but_where_the_worst_has_less_to_send(
    workload: Workload, shape: tuple[int, int]
) -> None:
    found = placed(workload, shape)
    for part in (
        *found.compute.values(),
        *(found.communication[kind] for kind in ("sums", "moments", "gradients", AVERAGING)),
    ):
        assert 0 <= part.mean <= part.worst * (1 + 1e-9)
    assert found.seconds == pytest.approx(
        sum(part.mean for part in (*found.compute.values(), *found.communication.values()))
    )


@given(workloads(), SHAPES)
def test_rarer_refreshes_cost_less(workload: Workload, shape: tuple[int, int]) -> None:
    rarer = attrs.evolve(
        workload,
        factor_every=2 * workload.factor_every,
        scale_every=2 * workload.scale_every,
        basis_every=2 * workload.basis_every,
    )
    often, seldom = placed(workload, shape), placed(rarer, shape)
    assert seldom.seconds <= often.seconds
    assert sum(seldom.moved.values()) <= sum(often.moved.values()) * (1 + 1e-9)
    assert seldom.held == often.held
