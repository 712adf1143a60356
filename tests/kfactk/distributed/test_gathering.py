"""States are gathered exactly on the ranks that ask, and loaded on all ranks or on none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfactk import OptionError
from kfactk.distributed.communicator import Communicator
from kfactk.distributed.gathering import LoadOnAllRanks, Progress, gather_state
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.small import bound
from tests.training_loops.loops import accumulate, images, mixed, part

pytestmark = pytest.mark.xdist_group("ranks")
CPU = torch.device("cpu")


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def everything() -> dict[str, dict[str, Tensor]]:
    """Return all parts of two layers, of several dtypes and shapes; one part is transposed."""
    return {
        "a|b.c": {
            "kfactk.factor.A": numbers(1, 3, 3).T,
            "kfactk.factor.A.weight": torch.tensor(0.1, dtype=torch.float64),
            "kfactk.factor.G": numbers(2, 2, 2, dtype=torch.float32),
            "kfactk.ready": torch.tensor(1),
        },
        "": {
            "kfactk.basis.A.order": torch.tensor([3, 1, 2]),
            "kfactk.factor.A": numbers(3, 5, 1),
            "kfactk.ready": torch.tensor(1),
        },
    }


def owners(ranks: int) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the ranks that have each part: one or two, and all for `kfactk.ready`."""
    keys = [(layer, key) for layer, flat in everything().items() for key in flat]
    some = {
        pair: tuple(sorted({number % ranks, number * 2 % ranks}))
        for number, pair in enumerate(keys)
    }
    return {
        pair: tuple(range(ranks)) if pair[1] == "kfactk.ready" else owned
        for pair, owned in some.items()
    }


def asked(
    rank: int, ranks: int, to: int | None, wire_dtype: str | None
) -> tuple[list[tuple[str, str]], dict[str, Any], dict[str, float]]:
    """Return what this rank had, what it received, and the bytes that it recorded."""
    whole = everything()
    mine: dict[str, dict[str, Tensor]] = {}
    for (layer, key), owned in owners(ranks).items():
        if rank in owned:
            mine.setdefault(layer, {})[key] = whole[layer][key]
    recipe = Communicator(None, wire_dtype)
    found = gather_state(mine, recipe, to, CPU)
    return [(layer, key) for layer, flat in mine.items() for key in flat], found, recipe.moved


@pytest.mark.parametrize(("ranks", "to"), [(2, 0), (3, 0), (3, 2), (3, None), (1, 0), (1, None)])
def test_gather_state_brings_exactly_what_a_rank_lacks(ranks: int, to: int | None) -> None:
    whole = everything()
    for rank, (had, found, moved) in enumerate(
        shared_workers().run(ranks, asked, ranks, to, "bfloat16")
    ):
        flat = {
            (layer, key): tensor for layer, parts in found.items() for key, tensor in parts.items()
        }
        expected = set(owners(ranks)) - set(had) if to in (None, rank) else set()
        assert set(flat) == expected
        for (layer, key), tensor in flat.items():
            assert tensor.dtype == whole[layer][key].dtype
            assert torch.equal(tensor, whole[layer][key]), "not rounded to the recipe's wire_dtype"
        assert not moved, "the record counts the bytes of steps only"


def test_gather_state_of_one_rank_is_empty() -> None:
    assert gather_state(everything(), Communicator(), 0, CPU) == {}


@pytest.mark.parametrize("to", [-1, 1, 7])
def test_gather_state_refuses_a_rank_that_does_not_exist(to: int) -> None:
    with pytest.raises(OptionError, match=f"to={to} is not a rank of .* a number from 0 to 0"):
        gather_state(everything(), Communicator(), to, CPU)


# --------------------------------------------------------------------------------------------- load


def loaded(
    rank: int, faulty: dict[int, str], steps: list[int], overdue: list[bool]
) -> tuple[str, bool, float]:
    """Return what was raised, whether the load became final, and a sum over ranks in step."""
    ranks, final, message = Communicator(), False, ""
    try:
        with LoadOnAllRanks(ranks) as load:
            if rank in faulty:
                raise ValueError(faulty[rank])
            layers = {"fc": (True, (overdue[rank], False, False, False), 0)}
            load.agree(Progress(steps[rank], layers))
            final = True
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    return message, final, ranks.total([1.0])[0]


def test_load_succeeds_on_all_ranks() -> None:
    assert shared_workers().run(3, loaded, {}, [4, 4, 4], [True] * 3) == [("", True, 3.0)] * 3


@pytest.mark.parametrize("faulty", [{0: "a"}, {2: "b"}, {0: "c", 1: "d"}, {0: "e", 1: "f", 2: "g"}])
def test_load_that_fails_on_one_rank_fails_on_all(faulty: dict[int, str]) -> None:
    first = min(faulty)
    for rank, (message, final, total) in enumerate(
        shared_workers().run(3, loaded, faulty, [4, 4, 4], [True] * 3)
    ):
        elsewhere = (
            f"StateError: rank {first} cannot load the saved state, and so no rank loads it: "
            f"ValueError: {faulty[first]}"
        )
        assert message == (f"ValueError: {faulty[rank]}" if rank in faulty else elsewhere)
        assert not final
        assert total == 3.0


@pytest.mark.parametrize(
    ("steps", "overdue"), [([4, 4, 7], [True] * 3), ([4] * 3, [True, True, False])]
)
def test_load_refuses_different_progress(steps: list[int], overdue: list[bool]) -> None:
    for message, final, total in shared_workers().run(3, loaded, {}, steps, overdue):
        assert message.startswith(
            "StateError: the ranks were given different states (rank 0 at step 4, rank 1 at step "
            f"4, rank 2 at step {steps[2]}; rank 2 differs from rank 0 in"
        )
        assert "Load the same checkpoint on every rank" in message
        assert not final
        assert total == 3.0


def test_load_of_one_rank_raises_the_error_of_its_body() -> None:
    with pytest.raises(KeyError, match="x"), LoadOnAllRanks(Communicator()):
        raise KeyError("x")
    with LoadOnAllRanks(Communicator()) as load:
        load.agree(Progress(3, {}))


def test_load_does_not_report_an_interruption() -> None:
    """The other ranks may be interrupted too, and would not listen."""
    with pytest.raises(KeyboardInterrupt), LoadOnAllRanks(Communicator()):
        raise KeyboardInterrupt


# --------------------------------------------------------------------------- consolidate_state_dict


def consolidated(rank: int, ranks: int, placement: str, to: int | None) -> dict[str, Any]:
    """Return the keys of the state before, while it is consolidated, and a step later."""
    model = mixed()
    optimizer = bound(model, placement=placement, basis="ekfac", update="adam")
    accumulate(optimizer, model, [part(images(0), rank, ranks)])

    def keys() -> set[str]:
        return {
            f"{number} {key}"
            for number, entry in optimizer.state_dict()["state"].items()
            for key in entry
        }

    before = keys()
    optimizer.consolidate_state_dict(to)
    whole = keys()
    devices = {
        value.device.type
        for entry in optimizer.state_dict()["state"].values()
        for value in entry.values()
    }
    accumulate(optimizer, model, [part(images(1), rank, ranks)])
    refused = ""
    try:
        optimizer.consolidate_state_dict(ranks)
    except OptionError as error:
        refused = str(error)
    return {
        "before": before,
        "whole": whole,
        "after": keys(),
        "devices": devices,
        "refused": refused,
    }


@pytest.mark.parametrize("to", [0, 1, None])
@pytest.mark.parametrize("placement", ["replicated", "comm_opt", "mem_opt"])
def test_consolidated_state_is_whole_until_the_next_step(placement: str, to: int | None) -> None:
    (alone,) = shared_workers().run(1, consolidated, 1, "replicated", 0)
    assert alone["before"] == alone["whole"] == alone["after"]
    for rank, found in enumerate(shared_workers().run(3, consolidated, 3, placement, to)):
        assert found["whole"] == (alone["whole"] if to in (None, rank) else found["before"])
        assert found["after"] == found["before"]
        assert (found["before"] == alone["before"]) == (placement == "replicated")
        assert found["devices"] == {"cpu"}
        assert "to=3 is not a rank of" in found["refused"]
        assert "a number from 0 to 2" in found["refused"]
