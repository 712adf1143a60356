"""The placement `auto`: clear choices, their reasons, and dependence on the arguments alone."""

import re
from typing import Any

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from kfactk import OptionError, Work, Workload, grid
from kfactk.costmodel.cost import TrainingLoad, cost
from kfactk.costmodel.hardware import H100, MACHINES
from kfactk.testing import PlacementLaws
from kfactk_stages.placement.auto import Auto
from tests.kfactk.workloads import workloads


class TestAuto(PlacementLaws):
    stage = Auto()


def layers(count: int, side: int, **periods: Any) -> Workload:
    works = tuple(
        Work(f"fc{n}", {"A": (side, side), "G": (side, side)}, (side, side)) for n in range(count)
    )
    return Workload(works, device="cuda", **periods)


def test_one_rank_does_everything() -> None:
    found = Auto().assign(layers(2, 64), 1)
    assert found.shares == grid(layers(2, 64), 1, 1, "", everyone=True).shares
    assert (found.strategy, found.reason) == ("replicated", "auto: one rank does everything")


def test_small_layers_are_replicated() -> None:
    """A message over Ethernet takes longer than all the work on layers of side 4."""
    found = Auto(machine="cpu").assign(layers(3, 4, basis_every=1000), 4)
    assert found.shares == grid(layers(3, 4), 4, 4, "", everyone=True).shares
    assert found.strategy == "replicated"


def test_large_layers_with_short_periods_are_divided() -> None:
    """Eight layers of side 4096: milliseconds of messages save seconds of decomposition."""
    found = Auto().assign(layers(8, 4096, basis_every=1), 8)
    assert found.strategy in ("comm_opt", "hybrid", "mem_opt")
    assert all(
        len(ranks) == 1
        for share in found.shares.values()
        for ranks in share.inverse_workers.values()
    )


def test_little_memory_chooses_the_smallest() -> None:
    """The least on eight ranks is one layer: A, G, eigenvectors, eigenvalues and the scale."""
    workload = layers(8, 64, basis_every=1000)
    least = 4 * (2 * 64**2 + 2 * (64**2 + 64) + 64**2)
    assert Auto(memory=least).assign(workload, 8).shares == grid(workload, 8, 1, "").shares
    nothing = Auto(memory=1.0).assign(workload, 8)
    assert nothing.shares == grid(workload, 8, 1, "").shares
    assert "the smallest, since none fits into" in nothing.reason
    assert Auto(memory=1e12, machine="cpu").assign(workload, 8).strategy == "replicated"


def test_memory_bounds_the_fullest_rank() -> None:
    """The rank of the larger layer does not, though that of the other would."""
    large, small = layers(1, 64).works[0], Work("small", {"A": (4, 4), "G": (4, 4)}, (4, 4))
    found = Auto(memory=60000).assign(Workload((large, small), device="cuda"), 2)
    assert "the smallest, since none fits into" in found.reason


def test_reason_names_the_choice_with_numbers() -> None:
    found = Auto(memory=2e9).assign(layers(8, 2048), 8)
    assert found.reason.startswith(
        "auto: the fastest within 2 GB of curvature on each rank, by the profile 'h100': "
        + found.strategy
    )
    assert len(re.findall(r"\([\d.]+ ms a step, [\d.e+]+ MB\)", found.reason)) >= 3
    others = {"replicated", "comm_opt", "mem_opt"} - {found.strategy}
    assert all(name in found.reason.partition("; the others: ")[2] for name in others)


def test_reason_names_the_width_of_groups() -> None:
    """Where a hybrid wins, a layer belongs to 2 or 4 of 8 ranks."""
    found = [
        Auto(machine=name).assign(layers(16, side), 8)
        for name in MACHINES
        for side in (64, 512, 1024, 4096)
    ]
    hybrids = [each for each in found if each.strategy == "hybrid"]
    for each in hybrids:
        width = len(next(iter(each.shares.values())).gradient_workers)
        assert f"hybrid groups of {width} (" in each.reason


@given(
    workloads(),
    st.integers(2, 6),
    st.sampled_from([None, *MACHINES]),
    st.sampled_from([None, "bfloat16"]),
)
@settings(max_examples=25)
def test_no_candidate_is_faster(
    workload: Workload, ranks: int, machine: str | None, wire: str | None
) -> None:
    workload = attrs.evolve(workload, device="cuda")
    stage = Auto(machine=machine, wire_dtype=wire)
    found = stage.assign(workload, ranks)
    assert stage.assign(workload, ranks) == found
    profile, job, itemsize = (
        MACHINES[machine] if machine else H100,
        TrainingLoad.of(workload),
        2.0 if wire else None,
    )
    mine = cost(job, found, ranks, profile, wire=itemsize).seconds
    for width in (width for width in range(1, ranks + 1) if ranks % width == 0):
        for everyone in (False, width == ranks):
            other = grid(workload, ranks, width, "other", everyone=everyone)
            assert mine <= cost(job, other, ranks, profile, wire=itemsize).seconds


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"machine": "h10"},
            r"machine='h10' .* 'h100', 'a100', 'cpu', None, .*Did you mean 'h100'",
        ),
        (
            {"memory": 0},
            "memory=0 .* a finite number greater than 0, in bytes, such as 4e9, or None",
        ),
        ({"memory": float("inf")}, "memory=inf "),
        ({"memory": "4G"}, "memory='4G' "),
        ({"memory": True}, "memory=True "),
        ({"wire_dtype": "float16"}, "wire_dtype='float16' "),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Auto(**options)
