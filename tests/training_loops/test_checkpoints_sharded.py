"""Checkpoints of models that `fully_shard` divides hold shards, and the curvature with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kfactk import Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.covering import covering, widening
from tests.kfactk.small import bound
from tests.training_loops import resume
from tests.training_loops.loops import PLACEMENTS, PRECISION, left
from tests.training_loops.resume import (
    Branched,
    Case,
    Place,
    after,
    before,
    branched,
    deviation,
    go,
    identical,
    truth,
)

pytestmark = pytest.mark.xdist_group("ranks")

CASES = [Case("ekfac+adam", "after the scale alone"), Case("kfac+momentum", "between refreshes")]
SOURCE = Place(2, "mem_opt")
TARGETS = [
    pytest.param([(SOURCE, True), (Place(3, "mem_opt"), False)], id="same or more"),
    pytest.param([(Place(3, "comm_opt"), True), (Place(1, "replicated"), False)], id="other"),
]
"""Places, and whether the model is sharded there too."""
Run = tuple[Optimizer, Branched, nn.Module]


def sharded(case: Case, place: Place, seed: int = 3) -> Run:
    """A model in shards, some of which are of uneven sizes, and its optimizer."""
    model = branched(seed)
    mesh = init_device_mesh("cpu", (place.ranks,))
    for module in (model.conv, model.hidden, model.side):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    recipe: dict[str, Any] = {
        "placement": PLACEMENTS[place.placement],
        **resume.PERIODS,
        **resume.RECIPES[case.recipe],
    }
    return bound(model, **recipe), model, model


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without shards; a collective call."""
    return {
        name: found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
        for name in sorted(found)
    }


def saved(rank: int, cases: list[tuple[Case, Path]], place: Place) -> list[dict[str, Tensor]]:
    """Save each run where it is to be saved, and go on."""
    found = []
    for case, folder in cases:
        optimizer, model, _ = sharded(case, place)
        go(case, optimizer, model, model, before(case), rank, place.ranks)
        resume.save(folder, optimizer, model, StateDictOptions())
        go(case, optimizer, model, model, after(case), rank, place.ranks)
        found.append(whole(left(optimizer, model)))
    return found


def gone_on_with(
    rank: int, cases: list[tuple[Case, Path]], place: Place, divided: bool
) -> list[dict[str, Tensor]]:
    """Go on with each, in shards or with DistributedDataParallel."""
    found = []
    for case, folder in cases:
        optimizer, model, wrapped = (
            sharded(case, place, seed=4) if divided else resume.made(case, place, seed=4)
        )
        resume.load(folder, optimizer, wrapped, StateDictOptions())
        assert optimizer.steps == case.saved_at
        go(case, optimizer, model, wrapped, after(case), rank, place.ranks)
        found.append(whole(left(optimizer, model)))
    return found


def in_one_file(rank: int, case: Case, place: Place, folder: Path) -> bool:
    """The whole state, written by rank 0 and read by rank 0, which tells the others their parts."""
    optimizer, model, _ = sharded(case, place)
    go(case, optimizer, model, model, before(case), rank, place.ranks)
    optimizer.consolidate_state_dict()
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parts = (
        get_model_state_dict(model, options=full),
        get_optimizer_state_dict(model, optimizer, options=full),
    )
    if rank == 0:
        assert not any(
            isinstance(value, DTensor)
            for entry in parts[1]["state"].values()
            for value in entry.values()
        )
        torch.save(parts, folder)
    weights, state = torch.load(folder, weights_only=True) if rank == 0 else ({}, {})
    resumed, fresh, _ = sharded(case, place, seed=4)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, weights, options=options)
    set_optimizer_state_dict(fresh, resumed, state, options=options)
    for run in ((optimizer, model), (resumed, fresh)):
        go(case, *run, run[1], after(case), rank, place.ranks)
    return identical([whole(left(optimizer, model))], [whole(left(resumed, fresh))])


@covering(strength=1, case=CASES, targets=TARGETS)
def test_a_sharded_run_goes_on_on_other_ranks_and_unsharded(
    case: Case, targets: list[tuple[Place, bool]], tmp_path: Path
) -> None:
    cases = [(case, tmp_path / "saved")]
    went_on = shared_workers().run(2, saved, cases, SOURCE)
    true = truth(case)
    for target, divided in targets:
        ranks = shared_workers().run(target.ranks, gone_on_with, cases, target, divided)
        found = [each[0] for each in ranks]
        assert deviation(found, true) <= PRECISION, (target, divided)
        if target == SOURCE:
            assert identical(found, [each[0] for each in went_on])


@pytest.mark.parametrize("placement", widening(["mem_opt", "hybrid"], quick=["mem_opt"]))
def test_a_sharded_run_in_one_file(placement: str, tmp_path: Path) -> None:
    place = Place(2, placement)
    assert shared_workers().run(2, in_one_file, CASES[0], place, tmp_path / "saved") == [True, True]
