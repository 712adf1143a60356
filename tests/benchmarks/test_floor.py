"""The floor against FLOPs counted by hand, on a machine that does one of them a second."""

import math

import pytest
import torch
from torch import nn

from benchmarks import floor
from benchmarks.settings import PERIODS, Setting
from kfactk.costmodel.hardware import Curve

N, D, H, C = 16, 4, 5, 3  # examples, inputs, hidden units, classes
EIGH = Curve(((1, 1.0), (64, 64.0)))  # a matrix of side n takes n seconds


def found(**options):
    setting = Setting(
        lambda model: None, {"curvature": "kfac", "clip": "none", **PERIODS, **options}
    )
    model = nn.Sequential(nn.Linear(D, H, bias=False), nn.Tanh(), nn.Linear(H, C, bias=False))
    machine = floor.ideal(1.0, {"eigh": EIGH})
    return floor.floor_of(floor.job(setting, model, str(D), N), setting.recipe(), machine)


def test_floor_counts_matrix_products():
    layers = ((H, D), (C, H))
    mean = found(basis="ekfac").mean
    assert mean["fisher"] == pytest.approx(
        2 * N * C * H / 10
    )  # to the first layer's output, and to no weight
    assert mean["factors"] == pytest.approx(sum(2 * N * (o * o + i * i) for o, i in layers) / 10)
    assert mean["scale"] == pytest.approx(
        sum(2 * N * (o * i + o * o + i * i) for o, i in layers) / 10
    )
    assert mean["precondition"] == pytest.approx(sum(4 * o * i * (o + i) for o, i in layers))
    carried = sum(2 * (i**3 + o**3) + 2 * o * i * (o + i) for o, i in layers)
    assert mean["basis"] == pytest.approx((sum(o + i for o, i in layers) + carried) / 100)


def test_model_counts_three_products_without_the_gradient_of_the_data():
    assert found().model == pytest.approx(2 * N * (3 * H * D + 3 * C * H) - 2 * N * H * D)


def test_staggered_worst_step_is_the_largest_of_the_slots():
    together, apart = found(basis="ekfac"), found(basis="ekfac", stagger=True)
    assert together.worst == pytest.approx(
        together.mean["precondition"]
        + 100 * together.mean["basis"]
        + 10 * sum(together.mean[name] for name in ("fisher", "factors", "scale"))
    )
    assert apart.mean == pytest.approx(together.mean)
    scales = [
        2 * N * (o * i + o * o + i * i) for o, i in ((H, D), (C, H))
    ]  # each in a part of its own, of the same pass
    events = [
        10 * together.mean["factors"],
        10 * together.mean["fisher"] + max(scales),
        50 * together.mean["basis"],
    ]
    assert together.mean["precondition"] + max(events[:2]) <= apart.worst < together.worst


def test_ratio_adds_curvature_to_the_baseline():
    assert floor.Floor({"fisher": 1.0, "scale": 2.0}, math.inf, 0.0).ratio(6.0) == 1.5


def test_rate_is_that_of_the_median_product():
    product = floor.Product("float32", torch.device("cpu"))
    assert product.rate([1.0, 2.0, 100.0]) == product.side**3
    assert product.seconds() > 0


def test_sides_are_decomposed_once():
    setting = Setting(lambda model: None, {"curvature": "kfac", "basis": "ekfac", **PERIODS})
    jobs = [floor.job(setting, nn.Sequential(nn.Linear(D, H), nn.Linear(H, H)), str(D), N)] * 2
    assert floor.sides(jobs) == {"eigh": [H, H + 1]}  # with the bias: D + 1 = H
    [curve] = floor.solving(torch.device("cpu"), floor.sides(jobs)).values()
    assert [n for n, _ in curve.points] == [H, H + 1]
