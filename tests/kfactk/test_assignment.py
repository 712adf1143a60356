"""Assignments: literal partitions, the 4/3 bound of longest-first, and refused assignments."""

import itertools
import math
from collections.abc import Sequence

import attrs
import pytest
from hypothesis import given, strategies as st

from kfactk.assignment import Assignment, Share, Work, Workload, balance, grid, layers_near_output
from kfactk.errors import PluginError
from tests.kfactk.workloads import workloads

# n^3 of A and G:            27, 8              64, 1              125, 8
FC1, FC2, FC3 = (
    Work("fc1", {"A": (3, 3), "G": (2, 2)}, (2, 3)),
    Work("fc2", {"A": (4, 4), "G": (1, 1)}, (1, 4)),
    Work("fc3", {"A": (5, 5), "G": (2, 2)}, (2, 5)),
)
THREE = Workload((FC1, FC2, FC3))


def test_work_costs_cubes_of_square_matrices_and_sizes_of_others() -> None:
    work = Work("conv", {"A": (2, 3, 3), "G": (2, 5, 5), "d": (7,), "s": (4, 6)}, (2, 5, 3))
    assert {name: work.flops(name) for name in work.matrices} == {
        "A": 54,
        "G": 250,
        "d": 7,
        "s": 24,
    }
    assert work.pieces() == {
        ("conv", "A"): 54.0,
        ("conv", "G"): 250.0,
        ("conv", "d"): 7.0,
        ("conv", "s"): 24.0,
    }
    assert attrs.evolve(work, indivisible=True).pieces() == {("conv", ""): 335.0}


def test_balance_takes_the_longest_first_and_the_first_of_equals() -> None:
    costs = {"a": 2.0, "b": 7.0, "c": 5.0, "d": 3.0, "e": 5.0}
    assert balance(costs, range(2)) == {"b": 0, "c": 1, "e": 1, "d": 0, "a": 0}
    assert balance(costs, [4, 9, 5]) == {"b": 4, "c": 9, "e": 5, "d": 9, "a": 5}
    assert balance({"x": 1.0, "y": 1.0, "z": 1.0}, range(2)) == {"x": 0, "y": 1, "z": 0}
    assert balance(costs, [3]) == dict.fromkeys(costs, 3)
    assert balance({}, range(2)) == {}


def loads(costs: Sequence[float], bin_of: dict[int, int], bins: int) -> list[float]:
    return [
        sum(costs[piece] for piece, other in bin_of.items() if other == number)
        for number in range(bins)
    ]


@given(st.lists(st.integers(0, 30).map(float), min_size=1, max_size=7), st.integers(1, 3))
def test_balance_is_within_four_thirds_of_the_optimum(costs: list[float], bins: int) -> None:
    """Graham's bound is 4/3 - 1/(3 bins); the optimum comes from all divisions."""
    found = balance(dict(enumerate(costs)), range(bins))
    best = min(
        max(loads(costs, dict(enumerate(choice)), bins))
        for choice in itertools.product(range(bins), repeat=len(costs))
    )
    assert max(loads(costs, found, bins)) <= (4 / 3 - 1 / (3 * bins)) * best + 1e-9


def test_grid_of_one_row_divides_matrices() -> None:
    """fc3.A 125 goes to rank 0; fc2.A 64, fc1.A 27, fc1.G 8, fc3.G 8, fc2.G 1 go to rank 1."""
    assert grid(THREE, ranks=2, width=2, strategy="one").shares == {
        "fc1": Share({"A": (1,), "G": (1,)}, (0, 1)),
        "fc2": Share({"A": (1,), "G": (1,)}, (0, 1)),
        "fc3": Share({"A": (0,), "G": (1,)}, (0, 1)),
    }


def test_grid_of_rows_of_one_rank_divides_layers() -> None:
    """Layers cost 35, 65, 133."""
    assert grid(THREE, ranks=2, width=1, strategy="own").shares == {
        "fc1": Share({"A": (1,), "G": (1,)}, (1,)),
        "fc2": Share({"A": (1,), "G": (1,)}, (1,)),
        "fc3": Share({"A": (0,), "G": (0,)}, (0,)),
    }


def test_grid_of_two_rows_divides_layers_and_matrices() -> None:
    assert grid(THREE, ranks=4, width=2, strategy="rows", reason="why not").shares == {
        "fc1": Share({"A": (3,), "G": (3,)}, (2, 3)),
        "fc2": Share({"A": (2,), "G": (3,)}, (2, 3)),
        "fc3": Share({"A": (0,), "G": (1,)}, (0, 1)),
    }


def test_grid_with_everyone_makes_the_row_inverse_workers() -> None:
    found = grid(Workload((FC1, FC3)), ranks=4, width=2, strategy="rows", everyone=True)
    assert found.shares == {
        "fc1": Share({"A": (2, 3), "G": (2, 3)}, (2, 3)),
        "fc3": Share({"A": (0, 1), "G": (0, 1)}, (0, 1)),
    }
    assert (found.strategy, found.reason) == ("rows", "")


def test_grid_keeps_indivisible_matrices_on_one_rank() -> None:
    """fc1.A 27 goes first, then conv 16 to the other rank, then fc1.G 8 to the one with 16."""
    conv = Work("conv", {"A": (2, 2), "G": (2, 2)}, (2, 2), indivisible=True)
    assert grid(Workload((FC1, conv)), ranks=2, width=2, strategy="one").shares == {
        "fc1": Share({"A": (0,), "G": (1,)}, (0, 1)),
        "conv": Share({"A": (1,), "G": (1,)}, (0, 1)),
    }


@given(
    workloads(),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (6, 3), (5, 5)]),
    st.booleans(),
)
def test_grid_assigns_all_work_within_rows(
    workload: Workload, shape: tuple[int, int], everyone: bool
) -> None:
    ranks, width = shape
    found = grid(workload, ranks, width, "any", everyone=everyone)
    assert found.check(workload, ranks) is found
    for share in found.shares.values():
        row = share.gradient_workers[0] // width
        assert share.gradient_workers == tuple(range(row * width, (row + 1) * width))
        for inverse_workers in share.inverse_workers.values():
            assert set(inverse_workers) <= set(share.gradient_workers)
            assert len(inverse_workers) == (width if everyone else 1)


@given(workloads(), st.sampled_from([2, 3, 4]))
def test_grid_loads_no_rank_with_more_than_the_mean_and_a_piece(
    workload: Workload, ranks: int
) -> None:
    found = grid(workload, ranks, ranks, "one")
    pieces = [cost for work in workload.works for cost in work.pieces().values()]
    loads = [0.0] * ranks
    for work in workload.works:
        for name, (rank,) in found.shares[work.layer].inverse_workers.items():
            loads[rank] += work.flops(name)
    assert math.isclose(sum(loads), sum(pieces))
    assert max(loads) <= sum(pieces) / ranks + max(pieces) * (1 - 1 / ranks) + 1e-6


def test_source_divides_other_ranks_among_gradient_workers() -> None:
    share = Share({"A": (1,)}, (1, 4, 5))
    assert [share.source(rank) for rank in range(7)] == [1, 1, 5, 1, 4, 5, 1]


GOOD = grid(THREE, ranks=2, width=2, strategy="mine")


def changed(share: Share) -> Assignment:
    return attrs.evolve(GOOD, shares={**GOOD.shares, "fc2": share})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            attrs.evolve(GOOD, shares={name: GOOD.shares[name] for name in ("fc1", "fc3")}),
            r"assigned nothing of layer 'fc2', which is part of the workload\. Report",
        ),
        (
            changed(Share({"A": (0,)}, (0, 1))),
            r"'mine' did not assign G of layer 'fc2': it gave Share\(.*Report",
        ),
        (
            changed(Share({"A": (0,), "G": (0,), "H": (0,)}, (0,))),
            "assigned H of layer 'fc2', whose matrices are A, G: it gave Share",
        ),
        (
            changed(Share({"A": (0,), "G": ()}, (0,))),
            r"assigned layer 'fc2' to the ranks \(\); .*between 0 and 1",
        ),
        (changed(Share({"A": (0,), "G": (0,)}, ())), r"assigned layer 'fc2' to the ranks \(\)"),
        (changed(Share({"A": (0,), "G": (2,)}, (0,))), r"to the ranks \(2,\)"),
        (changed(Share({"A": (0,), "G": (0,)}, (-1, 0))), r"to the ranks \(-1, 0\)"),
        (
            changed(Share({"A": (0,), "G": (0,)}, (1, 0))),
            r"to the ranks \(1, 0\); they must ascend",
        ),
        (changed(Share({"A": (0,), "G": (0,)}, (1, 1))), r"to the ranks \(1, 1\)"),
    ],
)
def test_check_refuses_missing_and_impossible_ranks(wrong: Assignment, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        wrong.check(THREE, 2)


def test_check_refuses_a_divided_indivisible_layer() -> None:
    """It says what joins its matrices: their statistics, or what the basis reads beside them."""
    joined = attrs.evolve(FC2, indivisible=True)
    reading = attrs.evolve(joined, beside={"A_next": (4, 4), "G_next": (1, 1)})
    for work, why in (
        (joined, "the curvature makes A, G of the same statistics"),
        (reading, "the basis reads A_next, G_next beside them, which are kept where all"),
    ):
        workload, divided = Workload((work,)), Share({"A": (0,), "G": (1,)}, (0, 1))
        says = rf"matrices of layer 'fc2' on different ranks \(A on 0, G on 1\), but {why}"
        with pytest.raises(PluginError, match=says):
            Assignment("mine", {"fc2": divided}).check(workload, 2)
        Assignment("mine", {"fc2": Share({"A": (1,), "G": (1,)}, (0, 1))}).check(workload, 2)
    assert not FC2.joined_by


def test_check_refuses_to_decompose_apart_from_what_is_gone_on_from() -> None:
    workload = Workload((attrs.evolve(FC2, follows=True),))
    with pytest.raises(PluginError, match=r"ranks \(1,\) and keeps the results on \(0,\)"):
        Assignment("mine", {"fc2": Share({"A": (1,), "G": (1,)}, (0,))}).check(workload, 2)
    Assignment("mine", {"fc2": Share({"A": (1,), "G": (1,)}, (0, 1))}).check(workload, 2)


@given(shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8))
def test_layers_near_output_are_the_fewest_with_nine_tenths_of_the_cost(
    shapes: list[tuple[int, int]],
) -> None:
    works = [Work(str(place), {}, shape) for place, shape in enumerate(shapes)]
    costs = [o * i * (o + i) for o, i in shapes]
    late = sorted(map(int, layers_near_output(works)))
    assert late == list(range(len(shapes) - len(late), len(shapes))), "the end of the model"
    assert len(late) < len(shapes), "never all"
    if 0 < len(late) < len(shapes) - 1:
        assert (
            10 * sum(costs[place] for place in late)
            >= 9 * sum(costs)
            > 10 * sum(costs[place] for place in late[1:])
        )
