"""Collectives on 1 to 4 ranks equal sums and copies that are computed directly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kfactk import OptionError, StateError, Statistic
from kfactk.distributed import communicator as module
from kfactk.distributed.communicator import Communicator
from kfactk.distributed.packing import TensorSpec, buckets
from kfactk.testing._support.ranks import shared_workers
from tests.covering import covering

pytestmark = pytest.mark.xdist_group("ranks")
F64, BF16 = torch.float64, torch.bfloat16
some_ranks = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
several = pytest.mark.parametrize("ranks", [2, 3, 4])


def run(ranks: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    return shared_workers().run(ranks, job, *arguments)


def rows(rank: int) -> Tensor:
    return torch.randn(5 + rank, 3, generator=torch.Generator().manual_seed(rank), dtype=F64)


@attrs.frozen
class To:
    """A routing by a function of the name."""

    wanted: Callable[[str], tuple[int, ...]]


def everyone(ranks: int) -> To:
    return To(lambda name: tuple(range(ranks)))


# --------------------------------------------------------------------------------------------- sums


def local(rank: int) -> dict[str, Statistic]:
    """Return second moments of a rank's rows; odd ranks have other names, dtypes and order."""
    x, last = rows(rank), rank % 2 == 1
    count = torch.tensor(float(len(x))) if last else float(len(x))
    statistics = {
        "shared": Statistic(x.T @ x, count, symmetric=True),
        "half known": Statistic(x.T @ x, count, symmetric=last),
        "single": Statistic(x.float().sum(0), count),
        "wide on some": Statistic(x.sum(0) if last else x.float().sum(0), 1.0),
        "no total anywhere": Statistic(None, 2.0),
        "total on some": Statistic(x.sum().reshape(()) if last else None, 4.0),
        "large count": Statistic(torch.ones(1), float(2**30 + 1)),
        "empty": Statistic(torch.zeros(0, 2), 1.0),
    }
    if rank == 1:
        statistics["on one"] = Statistic(x[:2].T.contiguous().T, 7.0)  # not contiguous
    return dict(reversed(statistics.items())) if last else statistics


def reduced(
    rank: int, wanted: str, statistics: Callable[[int], Mapping[str, Statistic]] = local
) -> dict[str, tuple[Any, float, bool]]:
    talk = Communicator()
    size = talk.size
    routings = {
        "everyone": everyone(size),
        "one each": To(lambda name: (len(name) % size,)),
        "a pair": To(lambda name: tuple(sorted({len(name) % size, (len(name) + 1) % size}))),
    }
    routing = routings[wanted]
    talk.prepare(routing.wanted(name) for name in ("a", "bb", "ccc", "dddd"))
    found = talk.reduce(statistics(rank), routing, "sums")
    for name, each in found.items():
        here = size == 1 or rank in routing.wanted(name)
        assert (each.total is not None) == (each.exists and here), name
    return {name: (each.total, float(each.count), each.exists) for name, each in found.items()}


@some_ranks
@pytest.mark.parametrize("wanted", ["everyone", "one each", "a pair"])
def test_reduce_sums_the_data_of_all_ranks(ranks: int, wanted: str) -> None:
    x, odd = (
        torch.cat([rows(rank) for rank in range(ranks)]),
        [rank for rank in range(ranks) if rank % 2],
    )
    totals = {
        "shared": x.T @ x,
        "half known": x.T @ x,
        "single": x.sum(0),
        "wide on some": x.sum(0),
        "total on some": sum((rows(rank).sum() for rank in odd), torch.zeros((), dtype=F64)),
        "large count": torch.full((1,), float(ranks)),
        "empty": torch.zeros(0, 2),
        "on one": rows(1)[:2],
    }
    counts = {
        "shared": len(x),
        "half known": len(x),
        "single": len(x),
        "wide on some": ranks,
        "no total anywhere": 2 * ranks,
    }
    counts |= {"total on some": 4 * ranks, "large count": ranks * (2**30 + 1), "empty": ranks} | (
        {"on one": 7} if odd else {}
    )
    seen = set()
    for metrics in run(ranks, reduced, wanted):
        assert {name: count for name, (_, count, _) in metrics.items()} == counts
        assert {name for name, (_, _, exists) in metrics.items() if not exists} == {
            "no total anywhere"
        } | (set() if odd else {"total on some"})
        for name, (total, _, _) in metrics.items():
            if total is not None:
                seen.add(name)
                double = name in ("shared", "half known", "total on some", "on one") or (
                    name == "wide on some" and bool(odd)
                )
                assert total.dtype == (F64 if double else torch.float32)
                torch.testing.assert_close(
                    total.double(),
                    totals[name].double(),
                    rtol=1e-13 if double and name != "wide on some" else 1e-5,
                    atol=1e-5,
                )
    assert seen == {name for name in totals if odd or name not in ("total on some", "on one")}


@several
def test_reduce_gives_the_same_bits_in_the_same_order(ranks: int) -> None:
    for wanted in ("everyone", "a pair"):
        found = run(ranks, reduced, wanted)
        assert all(list(metrics) == sorted(found[0]) for metrics in found)
        for name in found[0]:
            totals = [metrics[name][0] for metrics in found if metrics[name][0] is not None]
            assert all(torch.equal(total, totals[0]) for total in totals)
            assert len(totals) in (0, ranks if wanted == "everyone" else 2)


def only_the_last(rank: int) -> dict[str, Statistic]:
    return local(rank) if rank == dist.get_world_size() - 1 else {}


def nothing(rank: int) -> dict[str, Statistic]:
    return {}


@several
def test_reduce_serves_ranks_without_samples(ranks: int) -> None:
    for metrics in run(ranks, reduced, "everyone", only_the_last):
        torch.testing.assert_close(
            metrics["shared"][0], rows(ranks - 1).T @ rows(ranks - 1), rtol=1e-14, atol=1e-14
        )
        assert metrics["shared"][1] == 5 + ranks - 1
    assert run(ranks, reduced, "everyone", nothing) == [{}] * ranks


def test_communicator_of_one_rank_changes_nothing() -> None:
    statistics = {"b": Statistic(torch.ones(2), 3.0), "a": Statistic(None, torch.tensor(2.0))}
    talk = Communicator()
    found = talk.reduce(statistics, everyone(1), "sums")
    assert [(name, each.total, each.count, each.exists) for name, each in found.items()] == [
        ("b", statistics["b"].total, 3.0, True),
        ("a", None, statistics["a"].count, False),
    ]
    assert (talk.rank, talk.size, talk.everyone, talk.moved) == (0, 1, (0,), {})
    assert talk.total([1.5]) == [1.5]
    assert [talk.any(True), talk.any(False)] == [True, False]
    assert talk.gathered("x") == ["x"]
    assert talk.same("x")


def unlike_shapes(rank: int) -> str:
    with pytest.raises(StateError) as refused:
        Communicator().reduce(
            {"A": Statistic(torch.ones(2 + (rank == 1)), 1.0)},
            everyone(dist.get_world_size()),
            "sums",
        )
    return str(refused.value)


@several
def test_reduce_refuses_different_shapes_on_every_rank(ranks: int) -> None:
    messages = run(ranks, unlike_shapes)
    assert set(messages) == {messages[0]}
    assert "ranks disagree on the shape of 'A': (2,) and (3,)" in messages[0]


def in_small_messages(rank: int) -> dict[str, Tensor]:
    """Send more messages than may be under way at once, of two dtypes."""
    module.buckets = functools.partial(buckets, limit=16)  # type: ignore[assignment]
    try:
        mine = {
            f"{n:02}": Statistic(
                torch.full((n % 5,), float(rank + n), dtype=F64 if n % 2 else torch.float32), 1.0
            )
            for n in range(24)
        }
        found = Communicator().reduce(
            mine, To(lambda name: (int(name) % 2,) if int(name) % 3 else (0, 1, 2)), "sums"
        )
    finally:
        module.buckets = buckets
    return {name: each.total for name, each in found.items() if each.total is not None}


def test_reduce_keeps_many_messages_apart() -> None:
    found = run(3, in_small_messages)
    for n in range(24):
        have = [rank for rank, totals in enumerate(found) if f"{n:02}" in totals]
        assert have == ([n % 2] if n % 3 else [0, 1, 2])
        for rank in have:
            assert torch.equal(
                found[rank][f"{n:02}"].double(), torch.full((n % 5,), float(3 * n + 3), dtype=F64)
            )


# ------------------------------------------------------------------------------------------- copies


def copied(rank: int, source: int, members: tuple[int, ...], wire: str | None) -> Any:
    talk = Communicator(wire_dtype=wire)
    talk.prepare([members])
    values = {
        "a": rows(7).T,
        "b": torch.arange(4),
        "c": torch.tensor(0.1),
        "d": rows(8).float(),
        "e": torch.zeros(0),
    }
    specs = {name: TensorSpec.of(tensor) for name, tensor in values.items()}
    if rank not in members:
        return None
    sent = talk.send(
        values if rank == source else {}, specs, source, members, "copies", torch.device("cpu")
    )
    found: dict[str, Tensor] = {}
    for message in sent:
        found |= message.wait()
    strides = {name: tensor.stride() for name, tensor in found.items()}
    return found, strides, talk.moved.get("copies", 0.0)


@pytest.mark.parametrize(
    ("ranks", "source", "members"),
    [
        (1, 0, (0,)),
        (2, 1, (0, 1)),
        (3, 1, (1,)),
        (3, 2, (0, 2)),
        (4, 1, (0, 1, 2, 3)),
        (4, 0, (0, 3)),
        (4, 2, (1, 2, 3)),
    ],
)
def test_send_copies_the_tensors_of_the_source(
    ranks: int, source: int, members: tuple[int, ...]
) -> None:
    found = run(ranks, copied, source, members, None)
    assert [each is not None for each in found] == [rank in members for rank in range(ranks)]
    size = rows(7).numel() * 8 + 4 * 8 + 4 + rows(8).numel() * 4
    for rank in members:
        tensors, strides, moved = found[rank]
        assert torch.equal(tensors["a"], rows(7).T)
        assert torch.equal(tensors["b"], torch.arange(4))
        assert torch.equal(tensors["c"], torch.tensor(0.1))
        assert torch.equal(tensors["d"], rows(8).float())
        assert tensors["e"].shape == (0,)
        assert strides == found[members[0]][1]  # so that what follows rounds alike
        assert moved == (0 if rank == source else size)


# --------------------------------------------------------------------------------------------- wire


@several
def test_send_with_wire_dtype_rounds_on_the_source_too(ranks: int) -> None:
    found = run(ranks, copied, 1, tuple(range(ranks)), "bfloat16")
    for rank, (tensors, _, moved) in enumerate(found):
        assert torch.equal(tensors["a"], rows(7).T.to(BF16).double())
        assert tensors["a"].dtype == F64
        assert torch.equal(tensors["d"], rows(8).to(torch.float32).to(BF16).float())
        assert torch.equal(
            tensors["b"], torch.arange(4)
        )  # no floating numbers: they keep their precision
        assert moved == (0 if rank == 1 else 2 * (rows(7).numel() + 1 + rows(8).numel()) + 4 * 8)


def rounded_sums(
    rank: int, wire: str | None, symmetric: bool, wanted: tuple[int, ...]
) -> tuple[Tensor | None, dict[str, float]]:
    talk = Communicator(wire_dtype=wire)
    talk.prepare([wanted])
    x = rows(rank)
    mine = {"A": Statistic(x.T @ x, 2.0**30 + 1, symmetric=symmetric)}
    found = talk.reduce(mine, To(lambda name: wanted), "sums")
    assert float(found["A"].count) == talk.size * (2.0**30 + 1)  # counts are never rounded
    return found["A"].total, talk.moved


@several
def test_reduce_with_wire_dtype_is_equal_on_all_ranks_and_close(ranks: int) -> None:
    exact = sum((rows(rank).T @ rows(rank) for rank in range(ranks)), torch.zeros(3, 3, dtype=F64))
    for wire, precision in (("float32", 1e-6), ("bfloat16", ranks * 2.0**-8)):
        for wanted in ((*range(ranks),), (0, ranks - 1)):
            found = [
                total
                for total, _ in run(ranks, rounded_sums, wire, True, wanted)
                if total is not None
            ]
            assert len(found) == len(wanted)
            assert all(torch.equal(total, found[0]) for total in found)
            assert found[0].dtype == F64
            assert not torch.equal(found[0], exact)
            torch.testing.assert_close(
                found[0], exact, rtol=0, atol=precision * float(exact.abs().max())
            )


def unrounded_sums(rank: int) -> dict[str, Tensor]:
    talk = Communicator(wire_dtype="bfloat16")
    each = torch.tensor([777.0, 777.0**2])
    mine = {"few": Statistic(each, 1.0, unrounded=True), "many": Statistic(each, 1.0)}
    both = {name: each + Statistic(torch.zeros(2), 0.0) for name, each in mine.items()}
    found = talk.reduce(both, To(lambda name: (0, 1)), "sums")
    return {name: reduced.total for name, reduced in found.items() if reduced.total is not None}


def test_what_is_marked_so_is_not_rounded_on_its_way() -> None:
    exact = 2 * torch.tensor([777.0, 777.0**2])
    for found in run(2, unrounded_sums):
        assert torch.equal(found["few"], exact)
        assert not torch.equal(found["many"], exact)


@covering(ranks=[2, 3, 4], wire=[None, "float32", "bfloat16"], symmetric=[True, False], strength=1)
def test_reduce_records_the_bytes_it_moves(ranks: int, wire: str | None, symmetric: bool) -> None:
    """x bytes move 2 (g - 1) x times to all g ranks, (g - 1) x to one, and x more to a second."""
    x = {None: 8, "float32": 4, "bfloat16": 2}[wire] * (6 if symmetric else 9)
    for wanted, total in (((*range(ranks),), 2 * (ranks - 1) * x), ((1,), (ranks - 1) * x)):
        moved = [moved for _, moved in run(ranks, rounded_sums, wire, symmetric, wanted)]
        assert sum(each.get("sums", 0.0) for each in moved) == pytest.approx(total)
        assert all(each["agreements"] > 0 for each in moved)
    if ranks > 2:
        moved = [moved for _, moved in run(ranks, rounded_sums, wire, symmetric, (0, 1))]
        assert sum(each.get("sums", 0.0) for each in moved) == pytest.approx((ranks - 1) * x + x)


@pytest.mark.parametrize("wire", ["int32", "brain", "Tensor"])
def test_communicator_refuses_wire_dtypes_that_are_not_floating(wire: str) -> None:
    with pytest.raises(OptionError, match=f"wire_dtype is '{wire}'; it must name a floating dtype"):
        Communicator(wire_dtype=wire)


# ------------------------------------------------------------------------------- agreements, groups


def agreements(rank: int) -> tuple[Any, ...]:
    talk = Communicator()
    return (
        talk.total([1.0, rank, 2.0**40 + rank]),
        talk.any(rank == 1),
        talk.any(False),
        talk.gathered({"rank": rank}),
        talk.same("text"),
        talk.same(f"text {min(rank, 1)}"),
    )


@some_ranks
def test_total_any_gathered_same_agree(ranks: int) -> None:
    turns = sum(range(ranks))
    expected = (
        [ranks, turns, ranks * 2.0**40 + turns],
        ranks > 1,
        False,
        [{"rank": r} for r in range(ranks)],
        True,
        ranks == 1,
    )
    assert run(ranks, agreements) == [expected] * ranks


def in_groups(rank: int) -> dict[str, Any]:
    """Use two groups of the ranks 0, 2 and 1, 3, each on its own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    talk = Communicator(groups[rank % 2])
    talk.prepare([(0, 1)])
    mine = {"A": Statistic(torch.full((1,), float(rank)), 1.0)}
    found: dict[str, Any] = {"place": (talk.rank, talk.size)}
    for name, wanted in {"all": (0, 1), "last": (1,)}.items():
        joined = talk.reduce(mine, To({"A": wanted}.__getitem__), "sums")["A"]
        found[name] = None if joined.total is None else joined.total.item()
    form = {"x": TensorSpec((1,), torch.float32)}
    [message] = talk.send(
        {"x": torch.full((1,), float(rank))} if talk.rank == 1 else {},
        form,
        1,
        (0, 1),
        "copies",
        torch.device("cpu"),
    )
    found["copy"] = message.wait()["x"].item()
    with pytest.raises(OptionError, match="not in the placement's process_group"):
        _ = Communicator(groups[1 - rank % 2]).rank
    return found


def test_communicator_stays_within_its_process_group() -> None:
    found = run(4, in_groups)
    assert [each["place"] for each in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [each["all"] for each in found] == [2.0, 4.0, 2.0, 4.0]
    assert [each["last"] for each in found] == [None, None, 2.0, 4.0]
    assert [each["copy"] for each in found] == [2.0, 3.0, 2.0, 3.0]


def overlapping(rank: int) -> float:
    """Make groups that share ranks, some of them in a second call."""
    talk, size = Communicator(), dist.get_world_size()
    pairs = [(a, b) for a in range(size) for b in range(a + 1, size)]
    talk.prepare([*pairs, (0,), tuple(range(size))])
    talk.prepare([*pairs, (0, 1, 2)])
    heard = 0.0
    for pair in [*pairs, (0, 1, 2)]:
        if rank in pair:
            [message] = talk.send(
                {"x": torch.ones(1)} if rank == pair[0] else {},
                {"x": TensorSpec((1,), torch.float32)},
                pair[0],
                pair,
                "x",
                torch.device("cpu"),
            )
            heard += message.wait()["x"].item()
    return heard


def test_prepare_makes_groups_that_share_ranks() -> None:
    assert run(4, overlapping) == [4.0, 4.0, 4.0, 3.0]


def patience(rank: int) -> list[timedelta]:
    """How long the groups wait that are made within a group with a time-out of its own."""
    own = dist.new_group([0, 1, 2], timeout=timedelta(seconds=7))
    communicator = Communicator(own)
    communicator.prepare([(0, 1)])
    communicator.stand_aside()
    groups = [communicator._group((0, 1) if rank < 2 else (2,)), communicator._subgroups.aside]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_groups_of_our_own_wait_as_long_as_the_users() -> None:
    assert run(3, patience) == [[timedelta(seconds=7)] * 2] * 3
