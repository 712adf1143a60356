"""The memory of a step at its peak: truth is what torch allocates in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfactk
from benchmarks.memory import peak
from kfactk.preconditioner import memory
from kfactk.preconditioner.footprint import LinkFootprint, footprint_of
from kfactk.preconditioner.memory import free_bytes, link_peak, local_ranks, peak_bytes

CPU = torch.device("cpu")


def bound(basis: str, n: int) -> tuple[nn.Module, kfactk.Optimizer]:
    module = nn.Sequential(nn.Linear(3, n, bias=False), nn.Linear(n, 3, bias=False))
    recipe = kfactk.build(basis=basis, update="sgd", clip="none", basis_every=2, scale_every=2)
    return module, recipe.bind(module)


def predicted(optimizer: kfactk.Optimizer, slots: int = 1) -> int:
    found = [footprint_of(block) for block in optimizer._preconditioner.blocks.current()]
    return peak_bytes([each for each in found if each is not None], slots=slots)


@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_the_peak_is_near_what_a_refresh_allocates(basis: str) -> None:
    module, optimizer = bound(basis, 600)

    def run() -> None:
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(module(torch.randn(4, 3)), torch.tensor([0, 1, 2, step])).backward()
            optimizer.step()

    needed, measured = predicted(optimizer), peak(run, CPU)
    assert 0.7 * measured <= needed <= 1.4 * measured


def test_new_decompositions_stand_beside_the_old() -> None:
    _, optimizer = bound("kfac", 40)
    matrices, largest = 4 * 2 * (40**2 + 3**2), 4 * 40**2
    assert predicted(optimizer) == 5 * matrices + 4 * largest
    assert predicted(optimizer, slots=3) == 4 * matrices + matrices // 2 + 4 * largest


def test_links_and_lags_add_their_bytes() -> None:
    _, optimizer = bound("kfac", 40)
    found = [footprint_of(block) for block in optimizer._preconditioner.blocks.current()]
    known = [each for each in found if each is not None]
    copies = 4 * 2 * (40**2 + 3**2)
    assert peak_bytes(known, lags=True) - peak_bytes(known) == copies
    link = LinkFootprint(("0", "1"), 100, 30, 7, 0.1)
    assert peak_bytes(known, link=link) - peak_bytes(known) == link_peak(link) == 367
    assert link_peak(LinkFootprint(("0", "1"), 100, None, None, None)) == 300


def test_the_tightest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 9)
    monkeypatch.setattr(memory, "_within_group", lambda: None)
    monkeypatch.setattr(memory, "_within_limit", lambda: 7)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    assert free_bytes(CPU) == 7
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert free_bytes(CPU) is None
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no Linux")
def test_free_memory_is_less_than_there_is() -> None:
    free = free_bytes(CPU)
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert free is not None
    assert 2**20 < free <= 1024 * int(rows["MemTotal"].split()[0])


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_ranks() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_ranks() == 4
