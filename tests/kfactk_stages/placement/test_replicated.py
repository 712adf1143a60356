"""Replicated placement: sums over two processes against the sums of all data, whoever lacks what."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kfactk import OptionError, StateError, Statistic
from kfactk.testing import PlacementLaws
from kfactk_stages.placement.replicated import Replicated


class TestLaws(PlacementLaws):
    stage = "replicated"


def test_alone_everything_stays_as_it_is() -> None:
    statistics = {"b": Statistic(torch.ones(2), 3.0), "a": Statistic(None, torch.tensor(2.0))}
    reduced = Replicated().reduce(statistics)
    assert reduced == statistics
    assert list(reduced) == ["b", "a"]
    assert Replicated().rank == 0


def test_equality_is_over_the_group() -> None:
    assert Replicated() == Replicated(process_group=None)
    assert Replicated() != Replicated(process_group="other")


def rows(rank: int) -> torch.Tensor:
    return torch.randn(5 + rank, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def local(rank: int) -> dict[str, Statistic]:
    """What each rank saw: second moments of its rows, some names on one rank only, in an order of its own."""
    x = rows(rank)
    count = torch.tensor(float(len(x))) if rank else float(len(x))  # known on the host, or on the device only
    statistics = {
        "shared": Statistic(x.T @ x, count),
        "single": Statistic(x.float().sum(0), count),
        "wide on one": Statistic(x.sum(0) if rank else x.float().sum(0), 1.0),
        "no total anywhere": Statistic(None, 2.0),
        "total on one": Statistic(x.sum().reshape(()) if rank else None, 4.0),
        "large count": Statistic(torch.ones(1), float(2**30 + 1)),
    }
    if rank:
        statistics["on one"] = Statistic(x[:2].T.contiguous().T, 7.0)  # not contiguous
    return dict(reversed(statistics.items())) if rank else statistics


def two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    placement, saved = Replicated(), {}
    assert placement.rank == rank
    saved["full"] = placement.reduce(local(rank))
    saved["nothing on rank 0"] = placement.reduce(local(rank) if rank else {})
    saved["nothing"] = placement.reduce({})
    saved["counts"] = placement.reduce({"c": Statistic(None, rank + 1.0)})
    try:
        placement.reduce({"A": Statistic(torch.ones(2 + rank), 1.0)})
    except StateError as error:
        saved["error"] = str(error)
    groups = [dist.new_group([0]), dist.new_group([1])]
    saved["own group"] = Replicated(groups[rank]).reduce({"A": Statistic(torch.full((1,), float(rank)), 1.0)})
    try:
        Replicated(groups[1 - rank]).reduce({})
    except OptionError as error:
        saved["not in the group"] = str(error)
    texts = {name: value for name, value in saved.items() if isinstance(value, str)}
    figures = {name: {k: (s.total, s.count) for k, s in v.items()} for name, v in saved.items() if not isinstance(v, str)}
    torch.save((figures, texts), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """What each of two processes got."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(two_ranks, args=(str(folder),), nprocs=2, join=False)
    deadline = time.monotonic() + 90
    while not context.join(timeout=1):  # raises what a process raised; false while one still runs
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes did not end: a collective hangs")
    assert [process.exitcode for process in context.processes] == [0, 0]
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def test_sums_are_those_of_all_data(ranks: list[Any]) -> None:
    x = torch.cat([rows(0), rows(1)])
    for figures, _ in ranks:
        full = figures["full"]
        torch.testing.assert_close(full["shared"][0], x.T @ x, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(full["single"][0], x.sum(0).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(full["wide on one"][0].double(), x.sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(full["total on one"][0], rows(1).sum())
        assert torch.equal(full["on one"][0], rows(1)[:2])
        assert full["no total anywhere"][0] is None
        counts = {name: float(count) for name, (_, count) in full.items()}
        assert counts == {
            "shared": 11,
            "single": 11,
            "wide on one": 2,
            "no total anywhere": 4,
            "total on one": 8,
            "large count": 2**31 + 2,
            "on one": 7,
        }


def test_shapes_and_precisions_are_kept(ranks: list[Any]) -> None:
    for figures, _ in ranks:
        full = figures["full"]
        assert full["total on one"][0].shape == ()
        assert full["single"][0].dtype == torch.float32
        assert full["shared"][0].dtype == full["wide on one"][0].dtype == torch.float64


def test_a_rank_without_samples_gets_the_others(ranks: list[Any]) -> None:
    for figures, _ in ranks:
        reduced = figures["nothing on rank 0"]
        assert torch.equal(reduced["shared"][0], rows(1).T @ rows(1))
        assert float(reduced["shared"][1]) == 6
        assert figures["nothing"] == {}
        assert figures["counts"]["c"][0] is None
        assert float(figures["counts"]["c"][1]) == 3


def test_every_rank_gets_the_same_bits_in_the_same_order(ranks: list[Any]) -> None:
    (one, _), (other, _) = ranks
    for case in ("full", "nothing on rank 0"):
        assert list(one[case]) == list(other[case]) == sorted(one[case])
        for name in one[case]:
            mine, theirs = one[case][name], other[case][name]
            assert mine[0] is theirs[0] is None or torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1], theirs[1])


def test_ranks_that_disagree_are_told_so_on_every_rank(ranks: list[Any]) -> None:
    assert [texts["error"] for _, texts in ranks] == [ranks[0][1]["error"]] * 2
    assert "(2,)" in ranks[0][1]["error"]
    assert "(3,)" in ranks[0][1]["error"]
    assert "'A'" in ranks[0][1]["error"]


def test_process_groups(ranks: list[Any]) -> None:
    for rank, (figures, texts) in enumerate(ranks):
        assert figures["own group"]["A"][0].item() == rank
        assert "process_group" in texts["not in the group"]
