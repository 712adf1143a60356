"""Machine profiles: curves, links, names, and the measuring of this machine."""

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


def test_curves_go_through_their_points_and_on() -> None:
    curve = Curve(((16, 0.5), (64, 8.0), (256, 512.0)))
    assert [curve(n) for n in (16, 64, 256)] == pytest.approx([0.5, 8.0, 512.0])
    assert curve(32) == pytest.approx(2.0)  # half way in logarithms
    assert curve(8) == pytest.approx(0.25)
    assert curve(512) == pytest.approx(8 * 512.0)


@given(st.integers(1, 10000), st.integers(1, 10000))
def test_larger_matrices_take_longer(one: int, other: int) -> None:
    for machine in MACHINES.values():
        for curve in machine.solvers.values():
            assert curve(min(one, other)) <= curve(max(one, other))


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_cholesky_takes_less_than_eigenvectors_and_far_is_slower(machine: Machine) -> None:
    assert all(
        machine.solvers["cholesky"](n) < machine.solvers["eigh"](n) for n in (8, 64, 1000, 5000)
    )
    assert machine.far.bandwidth < machine.near.bandwidth
    assert machine.far.latency >= machine.near.latency
    assert machine.precision in machine.products


def test_shares_of_the_data_sheets_peaks() -> None:
    """NVIDIA's data sheets: float32, TF32 and bfloat16 (dense) TFLOP/s, memory bandwidth and size, NVLink one way, one network port."""
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
        assert 0.6 < machine.near.bandwidth / 1e9 / near < 0.9
        assert 0.6 < machine.far.bandwidth / 1e9 / far < 0.9


def test_the_network_of_ranks_is_the_slowest_between_them() -> None:
    assert [H100.link(members) for members in ((0, 7), (7, 8), (8, 9, 15), (0, 1023))] == [
        H100.near,
        H100.far,
        H100.near,
        H100.far,
    ]


def test_profiles_have_names() -> None:
    assert [machine_named(name) for name in ("h100", "a100", "cpu")] == [H100, A100, CPU]
    assert [machine_named(None, kind) for kind in ("cpu", "cuda", "xpu")] == [CPU, H100, H100]
    with pytest.raises(
        OptionError,
        match=r"no machine profile 'h10'\. Did you mean 'h100'.*Use one of: h100, a100, cpu; .*--calibrate",
    ):
        machine_named("h10")


def test_a_precision_that_a_machine_lacks() -> None:
    assert H100.rate("bfloat16") == H100.products["bfloat16"]
    with pytest.raises(
        OptionError,
        match=r"'cpu' has no rate for the precision 'float16'\. Did you mean 'float32'.*Choose one of float32",
    ):
        CPU.rate("float16")


def test_figures_are_what_was_done_in_the_seconds_it_took() -> None:
    """By a clock on which everything takes a second."""
    machine = calibrate(repeats=1, clock=map(float, itertools.count()).__next__)
    assert machine.products == {"float32": 2.0 * 512**3}
    convolutions = 3 * 2 * 8 * 9 * (32 * 32 * 3 * 32 + 16 * 16 * 32 * 64 + 8 * 8 * 64 * 64)
    assert machine.convolutions * machine.products["float32"] == pytest.approx(convolutions / 3)
    assert machine.bandwidth == 3 * 4 * 2**24
    assert machine.launch == pytest.approx(1 / 20 / 80)
    assert (
        dict(machine.solvers["eigh"].points)
        == dict(machine.solvers["cholesky"].points)
        == {32: 1 / 4, 128: 1.0, 384: 1.0}
    )
    assert (machine.name, machine.kind, machine.near, machine.far) == (
        "this machine",
        "cpu",
        CPU.near,
        CPU.far,
    )
    assert machine.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_measured() -> None:
    machine = calibrate("cuda", repeats=2)
    assert machine.kind == "cuda"
    assert machine.memory == torch.cuda.mem_get_info()[1]
    assert machine.products["bfloat16"] > machine.products["float32"] > 1e11


def measured(rank: int) -> dict[str, object]:
    return attrs.asdict(calibrate(repeats=3))


def test_ranks_measure_together_and_agree() -> None:
    one, other = shared_workers().run(2, measured)
    assert one == other
    assert one["near"] == one["far"]
    near = Link(**one["near"])  # type: ignore[arg-type]
    assert near.bandwidth > 0
    assert math.isfinite(near.latency)
    assert one["node"] == 2
    assert one["memory"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
