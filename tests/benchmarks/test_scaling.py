"""Networks grow in one dimension, exponents are slopes, and a mean step is a sum of stages."""

import pytest
import torch
from torch import nn

from benchmarks import scaling
from benchmarks.scaling import Shape


def test_networks_have_the_requested_size():
    layers = [
        module for module in Shape(width=6, depth=3).network() if isinstance(module, nn.Conv2d)
    ]
    assert [(layer.in_channels, layer.out_channels) for layer in layers] == [
        (3, 6),
        (6, 6),
        (6, 6),
        (6, 6),
    ]


def test_tables_show_exponents_and_the_mean_step():
    points = [
        {"sgd": size, "mean": 2 * size, "scale": size**2, "clip": 5.0} for size in (1.0, 2.0, 4.0)
    ]
    lines, exponents = scaling.table("width", [1, 2, 4], points)
    assert exponents == pytest.approx({"step of SGD": 1.0, "scale": 2.0, "clip": 0.0})
    assert lines[-1].split()[-3:] == ["2.00"] * 3


def test_stages_count_with_their_share():
    [found] = scaling.measure([Shape(2, 1, 2, 4)], "ekfac", 3, torch.device("cpu"))
    assert {"fisher", "factors", "scale", "basis", "precondition", "clip", "update", "rest"} < set(
        found
    )
    rare = (found["fisher"] + found["factors"] + found["scale"]) / 10 + found["basis"] / 100
    assert found["mean"] == pytest.approx(
        found["sgd"] + rare + found["precondition"] + found["clip"] + found["rest"]
    )
