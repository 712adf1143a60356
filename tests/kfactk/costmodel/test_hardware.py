"""Machine profiles: curves, links, names, and the measurement of this machine."""

import itertools
import math
import os

import attrs
import pytest
import torch
from hypothesis import given, strategies as st

from kfactk.costmodel.hardware import (
    A100,
    CPU,
    H100,
    MACHINES,
    Curve,
    Link,
    Machine,
    calibrate,
    machine_named,
)
from kfactk.errors import OptionError
from kfactk.testing._support.ranks import shared_workers

pytestmark = pytest.mark.xdist_group("ranks")


def test_curve_interpolates_and_extrapolates() -> None:
    curve = Curve(((16, 0.5), (64, 8.0), (256, 512.0)))
    assert [curve(n) for n in (16, 64, 256)] == pytest.approx([0.5, 8.0, 512.0])
    assert curve(32) == pytest.approx(2.0)  # half way in logarithms
    assert curve(8) == pytest.approx(0.25)
    assert curve(512) == pytest.approx(8 * 512.0)


@given(st.integers(1, 10000), st.integers(1, 10000))
def test_curves_of_profiles_are_monotonic(one: int, other: int) -> None:
    for machine in MACHINES.values():
        for curve in machine.solvers.values():
            assert curve(min(one, other)) <= curve(max(one, other))


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_profile_has_fast_cholesky_and_slow_networks_between_nodes(machine: Machine) -> None:
    assert all(
        machine.solvers["cholesky"](n) < machine.solvers["eigh"](n) for n in (8, 64, 1000, 5000)
    )
    assert machine.inter_node.bandwidth < machine.intra_node.bandwidth
    assert machine.inter_node.latency >= machine.intra_node.latency
    assert machine.precision in machine.products


def test_profiles_reach_shares_of_the_data_sheets() -> None:
    """TFLOP/s in float32, TF32, bfloat16; memory TB/s and GB; NVLink and network GB/s."""
    sheets = {
        "h100": (67, 494.7, 989.4, 3.35, 80, 450, 50),
        "a100": (19.5, 156, 312, 2.039, 80, 300, 25),
    }
    for name, (single, tf32, half, bandwidth, memory, near, far) in sheets.items():
        machine = MACHINES[name]
        peaks = {"float32": single, "tf32": tf32, "bfloat16": half}
        assert all(
            0.6 < machine.products[precision] / 1e12 / peak < 0.8
            for precision, peak in peaks.items()
        )
        assert 0.7 < machine.bandwidth / 1e12 / bandwidth < 0.9
        assert machine.memory == memory * 1e9
        assert 0.6 < machine.intra_node.bandwidth / 1e9 / near < 0.9
        assert 0.6 < machine.inter_node.bandwidth / 1e9 / far < 0.9


def test_link_is_the_slowest_between_ranks() -> None:
    assert [H100.link(members) for members in ((0, 7), (7, 8), (8, 9, 15), (0, 1023))] == [
        H100.intra_node,
        H100.inter_node,
        H100.intra_node,
        H100.inter_node,
    ]


def test_machine_named_finds_profiles() -> None:
    assert [machine_named(name) for name in ("h100", "a100", "cpu")] == [H100, A100, CPU]
    assert [machine_named(None, kind) for kind in ("cpu", "cuda", "xpu")] == [CPU, H100, H100]
    with pytest.raises(
        OptionError,
        match=(
            r"no machine profile 'h10'\. Did you mean 'h100'.*"
            "Use one of: h100, a100, cpu; .*--calibrate"
        ),
    ):
        machine_named("h10")


def test_rate_refuses_an_unknown_precision() -> None:
    assert H100.rate("bfloat16") == H100.products["bfloat16"]
    with pytest.raises(
        OptionError,
        match=r"'cpu' has no rate for the precision 'float16'\. Did you mean 'float32'.*float32",
    ):
        CPU.rate("float16")


def test_calibrate_divides_operations_by_seconds() -> None:
    """On this clock everything takes a second."""
    machine = calibrate(repeats=1, clock=map(float, itertools.count()).__next__)
    assert machine.products == {"float32": 2.0 * 512**3}
    convolutions = 3 * 2 * 8 * 9 * (32 * 32 * 3 * 32 + 16 * 16 * 32 * 64 + 8 * 8 * 64 * 64)
    assert machine.convolutions * machine.products["float32"] == pytest.approx(convolutions / 3)
    triangular = 2 * (32**3 + 128**3 + 384**3)
    assert machine.triangular * machine.products["float32"] == pytest.approx(triangular / 3)
    assert machine.bandwidth == 3 * 4 * 2**24
    assert machine.launch == pytest.approx(1 / 20 / 80)
    assert (
        dict(machine.solvers["eigh"].points)
        == dict(machine.solvers["cholesky"].points)
        == {32: 1 / 4, 128: 1.0, 384: 1.0}
    )
    assert (machine.name, machine.kind, machine.intra_node, machine.inter_node) == (
        "this machine",
        "cpu",
        CPU.intra_node,
        CPU.inter_node,
    )
    assert machine.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.gpu
def test_calibrate_measures_a_gpu() -> None:
    machine = calibrate("cuda", repeats=2)
    assert machine.kind == "cuda"
    assert machine.memory == torch.cuda.mem_get_info()[1]
    assert machine.products["bfloat16"] > machine.products["float32"] > 1e11


def measured(rank: int) -> dict[str, object]:
    return attrs.asdict(calibrate(repeats=3))


def test_calibrate_gives_all_ranks_the_same() -> None:
    one, other = shared_workers().run(2, measured)
    assert one == other
    assert one["intra_node"] == one["inter_node"]
    link = Link(**one["intra_node"])  # type: ignore[arg-type]
    assert link.bandwidth > 0
    assert math.isfinite(link.latency)
    assert one["ranks_per_node"] == 2
    assert one["memory"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
