"""Who does what: literal partitions, the 4/3 of longest-first, and answers that are refused."""

import itertools
import math
from collections.abc import Sequence

import attrs
import pytest
from hypothesis import given, strategies as st

from kfactk.assignment import Assignment, Share, Work, Workload, balance, grid, late_layers
from kfactk.errors import PluginError
from tests.kfactk.workloads import workloads

# n^3 of A and G:            27, 8              64, 1              125, 8
FC1, FC2, FC3 = (
    Work("fc1", {"A": (3, 3), "G": (2, 2)}, (2, 3)),
    Work("fc2", {"A": (4, 4), "G": (1, 1)}, (1, 4)),
    Work("fc3", {"A": (5, 5), "G": (2, 2)}, (2, 5)),
)
THREE = Workload((FC1, FC2, FC3))


def test_costs_are_cubes_of_square_matrices_and_sizes_of_others() -> None:
    work = Work("conv", {"A": (2, 3, 3), "G": (2, 5, 5), "d": (7,), "s": (4, 6)}, (2, 5, 3))
    assert {name: work.flops(name) for name in work.matrices} == {
        "A": 54,
        "G": 250,
        "d": 7,
        "s": 24,
    }
    assert work.units() == {
        ("conv", "A"): 54.0,
        ("conv", "G"): 250.0,
        ("conv", "d"): 7.0,
        ("conv", "s"): 24.0,
    }
    assert attrs.evolve(work, together=True).units() == {("conv", ""): 335.0}


def test_balance_takes_the_longest_first_and_the_first_of_equals() -> None:
    costs = {"a": 2.0, "b": 7.0, "c": 5.0, "d": 3.0, "e": 5.0}
    assert balance(costs, range(2)) == {"b": 0, "c": 1, "e": 1, "d": 0, "a": 0}
    assert balance(costs, [4, 9, 5]) == {"b": 4, "c": 9, "e": 5, "d": 9, "a": 5}
    assert balance({"x": 1.0, "y": 1.0, "z": 1.0}, range(2)) == {"x": 0, "y": 1, "z": 0}
    assert balance(costs, [3]) == dict.fromkeys(costs, 3)
    assert balance({}, range(2)) == {}


def loads(costs: Sequence[float], placed: dict[int, int], bins: int) -> list[float]:
    return [
        sum(costs[piece] for piece, number in placed.items() if number == each)
        for each in range(bins)
    ]


@given(st.lists(st.integers(0, 30).map(float), min_size=1, max_size=7), st.integers(1, 3))
def test_balance_is_within_four_thirds_of_the_best_there_is(costs: list[float], bins: int) -> None:
    """Graham's bound, 4/3 - 1/(3 bins), against every division there is."""
    placed = balance(dict(enumerate(costs)), range(bins))
    best = min(
        max(loads(costs, dict(enumerate(choice)), bins))
        for choice in itertools.product(range(bins), repeat=len(costs))
    )
    assert max(loads(costs, placed, bins)) <= (4 / 3 - 1 / (3 * bins)) * best + 1e-9


def test_one_row_of_all_ranks_divides_matrices() -> None:
    """fc3.A 125 -> 0; fc2.A 64 -> 1; fc1.A 27 -> 1; fc1.G 8 -> 1; fc3.G 8 -> 1; fc2.G 1 -> 1: 125 and 108."""
    assert grid(THREE, ranks=2, width=2, strategy="one").shares == {
        "fc1": Share({"A": (1,), "G": (1,)}, (0, 1)),
        "fc2": Share({"A": (1,), "G": (1,)}, (0, 1)),
        "fc3": Share({"A": (0,), "G": (1,)}, (0, 1)),
    }


def test_rows_of_one_rank_own_layers() -> None:
    """Layers cost 35, 65, 133."""
    assert grid(THREE, ranks=2, width=1, strategy="own").shares == {
        "fc1": Share({"A": (1,), "G": (1,)}, (1,)),
        "fc2": Share({"A": (1,), "G": (1,)}, (1,)),
        "fc3": Share({"A": (0,), "G": (0,)}, (0,)),
    }


def test_rows_of_two_among_four() -> None:
    assert grid(THREE, ranks=4, width=2, strategy="rows", reason="why not").shares == {
        "fc1": Share({"A": (3,), "G": (3,)}, (2, 3)),
        "fc2": Share({"A": (2,), "G": (3,)}, (2, 3)),
        "fc3": Share({"A": (0,), "G": (1,)}, (0, 1)),
    }


def test_everyone_of_a_row_decomposes_where_asked() -> None:
    found = grid(Workload((FC1, FC3)), ranks=4, width=2, strategy="rows", everyone=True)
    assert found.shares == {
        "fc1": Share({"A": (2, 3), "G": (2, 3)}, (2, 3)),
        "fc3": Share({"A": (0, 1), "G": (0, 1)}, (0, 1)),
    }
    assert (found.strategy, found.reason) == ("rows", "")


def test_matrices_of_common_statistics_stay_together() -> None:
    """conv costs 16, so fc1.A 27 goes first, then conv to the other rank, then fc1.G 8 to the one with 16."""
    conv = Work("conv", {"A": (2, 2), "G": (2, 2)}, (2, 2), together=True)
    assert grid(Workload((FC1, conv)), ranks=2, width=2, strategy="one").shares == {
        "fc1": Share({"A": (0,), "G": (1,)}, (0, 1)),
        "conv": Share({"A": (1,), "G": (1,)}, (0, 1)),
    }


@given(
    workloads(),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (6, 3), (5, 5)]),
    st.booleans(),
)
def test_grids_keep_every_promise(
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
def test_no_rank_bears_more_than_four_thirds_of_its_part(workload: Workload, ranks: int) -> None:
    """The least possible is at least the mean, and at least the largest piece; longest-first stays within 4/3 of the best, and within
    the mean and one piece."""
    found = grid(workload, ranks, ranks, "one")
    units = [cost for work in workload.works for cost in work.units().values()]
    borne = [0.0] * ranks
    for work in workload.works:
        for name, (rank,) in found.shares[work.layer].inverse_workers.items():
            borne[rank] += work.flops(name)
    assert math.isclose(sum(borne), sum(units))
    assert max(borne) <= sum(units) / ranks + max(units) * (1 - 1 / ranks) + 1e-6


def test_a_holder_is_its_own_source_and_the_others_are_divided_among_holders() -> None:
    share = Share({"A": (1,)}, (1, 4, 5))
    assert [share.source(rank) for rank in range(7)] == [1, 1, 5, 1, 4, 5, 1]


GOOD = grid(THREE, ranks=2, width=2, strategy="mine")


def changed(share: Share) -> Assignment:
    return attrs.evolve(GOOD, shares={**GOOD.shares, "fc2": share})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            attrs.evolve(GOOD, shares={name: GOOD.shares[name] for name in ("fc1", "fc3")}),
            r"work of layer 'fc2' to nobody: None.* A, G",
        ),
        (
            changed(Share({"A": (0,)}, (0, 1))),
            r"'mine' left work of layer 'fc2' to nobody: .*, where its matrices are A, G\. Report",
        ),
        (
            changed(Share({"A": (0,), "G": (0,), "H": (0,)}, (0,))),
            "left work of layer 'fc2' to nobody",
        ),
        (
            changed(Share({"A": (0,), "G": ()}, (0,))),
            r"gave work of layer 'fc2' to the ranks \(\); .*between 0 and 1",
        ),
        (changed(Share({"A": (0,), "G": (0,)}, ())), r"gave work of layer 'fc2' to the ranks \(\)"),
        (changed(Share({"A": (0,), "G": (2,)}, (0,))), r"to the ranks \(2,\)"),
        (changed(Share({"A": (0,), "G": (0,)}, (-1, 0))), r"to the ranks \(-1, 0\)"),
        (
            changed(Share({"A": (0,), "G": (0,)}, (1, 0))),
            r"to the ranks \(1, 0\); they must ascend",
        ),
        (changed(Share({"A": (0,), "G": (0,)}, (1, 1))), r"to the ranks \(1, 1\)"),
    ],
)
def test_answers_that_cannot_be_are_refused(wrong: Assignment, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        wrong.check(THREE, 2)


def test_common_statistics_are_not_divided() -> None:
    workload = Workload((attrs.evolve(FC2, together=True),))
    with pytest.raises(
        PluginError,
        match="divided the matrices of layer 'fc2', which are made of common statistics",
    ):
        Assignment("mine", {"fc2": Share({"A": (0,), "G": (1,)}, (0, 1))}).check(workload, 2)
    Assignment("mine", {"fc2": Share({"A": (1,), "G": (1,)}, (0, 1))}).check(workload, 2)


@given(shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8))
def test_the_late_part_is_the_least_end_of_the_model_with_nine_tenths_of_the_work(
    shapes: list[tuple[int, int]],
) -> None:
    works = [Work(str(place), {}, shape) for place, shape in enumerate(shapes)]
    costs = [o * i * (o + i) for o, i in shapes]
    late = sorted(map(int, late_layers(works)))
    assert late == list(range(len(shapes) - len(late), len(shapes))), "the end of the model"
    assert len(late) < len(shapes), "never all"
    if 0 < len(late) < len(shapes) - 1:
        assert (
            10 * sum(costs[place] for place in late)
            >= 9 * sum(costs)
            > 10 * sum(costs[place] for place in late[1:])
        )
