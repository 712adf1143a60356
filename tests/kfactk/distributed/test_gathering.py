"""What ranks have between them, brought to those that ask; and states that all ranks take over or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfactk import OptionError
from kfactk.distributed.communicator import Communicator
from kfactk.distributed.gathering import Control, agreed_load, gathered_state
from kfactk.preconditioner.schedule import DueWork
from kfactk.preconditioner.state import BlockState
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
    """All parts of two layers, one of an awkward name, of several dtypes and shapes, one of them not laid out row by row."""
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
    """Who has what: each part on one rank or two, and what controls on all."""
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
    """What this rank had, what it was brought, and the bytes that its own record says."""
    whole = everything()
    mine: dict[str, dict[str, Tensor]] = {}
    for (layer, key), owned in owners(ranks).items():
        if rank in owned:
            mine.setdefault(layer, {})[key] = whole[layer][key]
    recipe = Communicator(None, wire_dtype)
    found = gathered_state(mine, recipe, to, CPU)
    return [(layer, key) for layer, flat in mine.items() for key in flat], found, recipe.moved


@pytest.mark.parametrize(("ranks", "to"), [(2, 0), (3, 0), (3, 2), (3, None), (1, 0), (1, None)])
def test_whoever_asks_is_brought_what_it_has_not_exactly(ranks: int, to: int | None) -> None:
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
        assert not moved, "the record of a step's bytes is of its steps"


def test_alone_there_is_nothing_to_bring() -> None:
    assert gathered_state(everything(), Communicator(), 0, CPU) == {}


@pytest.mark.parametrize("to", [-1, 1, 7])
def test_a_rank_that_there_is_not(to: int) -> None:
    with pytest.raises(OptionError, match=f"to={to} is no rank: give one of 0 to 0"):
        gathered_state(everything(), Communicator(), to, CPU)


# ---------------------------------------------------------------------------------------------------------------- together


def taken(
    rank: int, faulty: dict[int, str], steps: list[int], overdue: list[bool]
) -> tuple[str, bool, float]:
    """What was raised, whether the state was taken over, and a sum that only ranks in step arrive at."""
    ranks, final, said = Communicator(), False, ""
    try:
        with agreed_load(ranks) as agree:
            if rank in faulty:
                raise ValueError(faulty[rank])
            agree(
                Control.of(
                    steps[rank],
                    {
                        "fc": BlockState(
                            ("weight",),
                            ready=True,
                            overdue=DueWork(overdue[rank], False, False, False),
                        )
                    },
                )
            )
            final = True
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, final, ranks.total([1.0])[0]


def test_all_take_over() -> None:
    assert shared_workers().run(3, taken, {}, [4, 4, 4], [True] * 3) == [("", True, 3.0)] * 3


@pytest.mark.parametrize("faulty", [{0: "a"}, {2: "b"}, {0: "c", 1: "d"}, {0: "e", 1: "f", 2: "g"}])
def test_what_fails_on_one_rank_fails_on_all(faulty: dict[int, str]) -> None:
    first = min(faulty)
    for rank, (said, final, total) in enumerate(
        shared_workers().run(3, taken, faulty, [4, 4, 4], [True] * 3)
    ):
        told = f"StateError: rank {first} cannot take over the saved state, and so no rank does: ValueError: {faulty[first]}"
        assert said == (f"ValueError: {faulty[rank]}" if rank in faulty else told)
        assert not final
        assert total == 3.0


@pytest.mark.parametrize(
    ("steps", "overdue"), [([4, 4, 7], [True] * 3), ([4] * 3, [True, True, False])]
)
def test_ranks_that_would_go_on_from_different_states(
    steps: list[int], overdue: list[bool]
) -> None:
    for said, final, total in shared_workers().run(3, taken, {}, steps, overdue):
        assert said.startswith(
            f"StateError: the ranks were given different states (rank 0 at step 4, rank 1 at step 4, rank 2 at step {steps[2]}"
        )
        assert "Load the same checkpoint on every rank" in said
        assert not final
        assert total == 3.0


def test_alone_errors_are_those_of_the_body() -> None:
    with pytest.raises(KeyError, match="x"), agreed_load(Communicator()):
        raise KeyError("x")
    with agreed_load(Communicator()) as agree:
        agree(Control.of(3, {}))


def test_what_is_no_error_is_not_told() -> None:
    """An interruption is nothing that the other ranks could be told of: they may be interrupted too."""
    with pytest.raises(KeyboardInterrupt), agreed_load(Communicator()):
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------- consolidate_state_dict


def consolidated(rank: int, ranks: int, placement: str, to: int | None) -> dict[str, Any]:
    """Keys of the state before, while it is consolidated, and a step later."""
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
def test_the_state_is_whole_where_it_was_asked_for_until_the_next_step(
    placement: str, to: int | None
) -> None:
    (alone,) = shared_workers().run(1, consolidated, 1, "replicated", 0)
    assert alone["before"] == alone["whole"] == alone["after"]
    for rank, found in enumerate(shared_workers().run(3, consolidated, 3, placement, to)):
        assert found["whole"] == (alone["whole"] if to in (None, rank) else found["before"])
        assert found["after"] == found["before"]
        assert (found["before"] == alone["before"]) == (placement == "replicated")
        assert found["devices"] == {"cpu"}
        assert "to=3 is no rank: give one of 0 to 2" in found["refused"]
