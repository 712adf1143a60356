"""Bytes against known numbers: of temporary tensors, and of the factors of a layer."""

import torch
from torch import nn

import kfactk
from benchmarks import memory, settings
from benchmarks.settings import BASELINE

CPU = torch.device("cpu")


def test_peak_counts_tensors_that_live_together():
    def run() -> torch.Tensor:
        first = torch.empty(3000)
        second = torch.empty(5000)
        del first
        third = torch.empty(1000)
        return second.clone() if len(third) else third  # 4 x (5000 + 1000 + 5000)

    assert memory.peak(run, CPU) == 4 * 11000


def test_peak_counts_temporaries_of_operations():
    matrix = torch.eye(64)
    assert memory.peak(lambda: torch.linalg.eigh(matrix), CPU) > 4 * (
        64 * 64 + 64
    )  # LAPACK's workspace besides the result


def test_state_is_factors_bases_and_scale():
    model = nn.Linear(3, 2)
    optimizer = kfactk.build(curvature="kfac", basis="ekfac", update="adam").bind(model)
    nn.functional.cross_entropy(model(torch.randn(4, 3)), torch.randint(2, (4,))).backward()
    optimizer.step()
    kept = memory.StateBytes.of(optimizer)
    matrices, vectors, scale = 4 * 4 + 2 * 2, 4 + 2, 2 * 4
    assert (
        4 * (2 * matrices + vectors + scale)
        <= kept.curvature
        <= 4 * (2 * matrices + vectors + scale) + 256
    )  # and a few counters
    assert (
        4 * 2 * 8 <= kept.update <= 4 * 2 * 8 + 64
    )  # Adam's moments of eight numbers, and its step


def test_optimizers_take_at_least_their_state():
    name = "ekfac"
    chosen = {
        key: setting for key, setting in settings.settings().items() if key in (BASELINE, name)
    }
    found = memory.measure(chosen, 2, 2, CPU)
    assert found[BASELINE]["above"] == 0
    assert found[name]["above"] >= found[name]["least"] > 0
    assert found[name]["workspace"] > 0
    assert found[name]["layer"] in chosen[name].recipe().bind(settings.network(2)).layers
