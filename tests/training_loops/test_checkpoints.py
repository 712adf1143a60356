"""Runs saved on some ranks resume on others, under other placements, by every way of torch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F

from kfactk import Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.covering import covering
from tests.kfactk.optim.test_optimizer_state import assert_same
from tests.training_loops import resume
from tests.training_loops.loops import PLACEMENTS, PRECISION, left
from tests.training_loops.resume import (
    AFTER,
    Branched,
    Case,
    Place,
    after,
    before,
    branched,
    deviation,
    go,
    identical,
    made,
    truth,
)

pytestmark = pytest.mark.xdist_group("ranks")

CASE = Case("ekfac+adam", "something overdue")
ALONE = Place(1, "replicated")
SAMPLE = [
    Case("ekfac+adam", "after the scale alone"),
    Case("kfac+momentum", "something overdue"),
    Case("running+adamw", "between refreshes"),
    CASE,
]
SOURCES = [Place(4, "comm_opt"), Place(4, "mem_opt"), Place(2, "hybrid")]
TARGETS = [ALONE, Place(2, "mem_opt"), Place(3, "hybrid"), Place(4, "mem_opt")]


# --------------------------------------------------------------------- torch.distributed.checkpoint


@covering(strength=1, case=SAMPLE, source=SOURCES, target=TARGETS, flat=[False, True])
def test_a_run_goes_on_from_its_checkpoint_on_other_ranks_under_another_placement(
    case: Case, source: Place, target: Place, flat: bool
) -> None:
    """`python -m tests.training_loops.resume` prints the whole matrix."""
    (outcome,) = resume.matrix([case], [source], [target], flat)
    assert outcome.good, outcome


def test_a_deviation_is_seen() -> None:
    """The comparison itself can fail."""
    case = Case("kfac+momentum", "something overdue")
    true = truth(case)
    off = {
        name: value + (1e-9 * value.abs().max() if name == "conv.weight kfactk.factor.A" else 0)
        for name, value in true.items()
    }
    assert deviation([true], true) == 0.0
    assert 1e-10 < deviation([off], true) < 1e-8
    assert not identical([true], [off])
    with pytest.raises(AssertionError, match=r"ranks differ in conv\.weight kfactk\.factor\.A"):
        deviation([true, off], true)
    assert not resume.Outcome(case, ALONE, ALONE, 0.0, identical=False).good
    assert not resume.Outcome(case, ALONE, Place(2, "mem_opt"), 2 * PRECISION, identical=True).good


Way = Callable[[Optimizer, nn.Module, Optimizer, nn.Module, Path], None]


def asynchronous(
    optimizer: Optimizer, model: nn.Module, resumed: Optimizer, fresh: nn.Module, folder: Path
) -> None:
    """Train on while the checkpoint is written, by messages in a group of their own."""
    weights, state = get_state_dict(model, optimizer)
    writing = dcp.async_save(
        {"model": weights, "optimizer": state},
        checkpoint_id=folder,
        process_group=dist.new_group(backend="gloo"),
    )
    assert isinstance(model.module, Branched)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    go(CASE, optimizer, model.module, model, range(CASE.saved_at, CASE.saved_at + 2), rank, ranks)
    writing.result()
    resume.load(folder, resumed, fresh, StateDictOptions())


def full_on_rank_0(
    optimizer: Optimizer, model: nn.Module, resumed: Optimizer, fresh: nn.Module, folder: Path
) -> None:
    """One file, written by rank 0 and read by rank 0, which tells the others."""
    optimizer.consolidate_state_dict()
    weights, state = get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": state}, folder)
    else:
        assert not state
    read = (
        torch.load(folder, weights_only=True)
        if dist.get_rank() == 0
        else {"model": {}, "optimizer": {}}
    )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, read["model"], options=options)
    set_optimizer_state_dict(fresh, resumed, read["optimizer"], options=options)


def one_file(
    optimizer: Optimizer, model: nn.Module, resumed: Optimizer, fresh: nn.Module, folder: Path
) -> None:
    """What everybody writes who knows nothing of `torch.distributed.checkpoint`."""
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder)
    dist.barrier()
    read = torch.load(folder, weights_only=True)
    fresh.load_state_dict(read["model"])
    resumed.load_state_dict(read["optimizer"])


def lightning(
    optimizer: Optimizer, model: nn.Module, resumed: Optimizer, fresh: nn.Module, folder: Path
) -> None:
    """As Lightning: `consolidate_state_dict()` on all ranks, then `state_dict()` on rank 0."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()
    box = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(box)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(box[0])


WAYS: dict[str, Way] = {
    "asynchronous": asynchronous,
    "full on rank 0": full_on_rank_0,
    "one file": one_file,
    "as Lightning": lightning,
}


def moved(
    rank: int, way: str, place: Place, other: Place, folder: Path
) -> tuple[dict[str, Tensor], bool]:
    """Return the results of a moved run, and whether the first run has the same."""
    optimizer, model, wrapped = made(CASE, place)
    go(CASE, optimizer, model, wrapped, before(CASE), rank, place.ranks)
    resumed, fresh, refreshed = made(CASE, other, seed=4)
    WAYS[way](optimizer, wrapped, resumed, refreshed, folder)
    assert resumed.steps == CASE.saved_at
    at = optimizer.steps
    go(CASE, optimizer, model, wrapped, range(at, CASE.saved_at + AFTER), rank, place.ranks)
    go(CASE, resumed, fresh, refreshed, after(CASE), rank, place.ranks)
    first, second = left(optimizer, model), left(resumed, fresh)
    return second, identical([first], [second])


@covering(strength=1, way=WAYS, other=["mem_opt", "hybrid"])
def test_every_way_of_torch_moves_a_state_that_ranks_share(
    way: str, other: str, tmp_path: Path
) -> None:
    ranks = shared_workers().run(
        3, moved, way, Place(3, "mem_opt"), Place(3, other), tmp_path / "saved"
    )
    assert deviation([found for found, _ in ranks], truth(CASE)) <= PRECISION
    assert all(same for _, same in ranks) or other != "mem_opt"


def with_options(rank: int, options: dict[str, Any], folder: Path) -> bool:
    place = Place(3, "mem_opt")
    optimizer, model, wrapped = made(CASE, place, **options)
    go(CASE, optimizer, model, wrapped, before(CASE), rank, 3)
    resume.save(folder, optimizer, wrapped, StateDictOptions())
    resumed, fresh, refreshed = made(CASE, place, seed=4, **options)
    resume.load(folder, resumed, refreshed, StateDictOptions())
    go(CASE, optimizer, model, wrapped, after(CASE), rank, 3)
    go(CASE, resumed, fresh, refreshed, after(CASE), rank, 3)
    return identical([left(optimizer, model)], [left(resumed, fresh)])


OPTIONS: dict[str, dict[str, Any]] = {
    "wire_dtype": {"placement": {"name": "mem_opt", "wire_dtype": "bfloat16"}},
    "turns": {"stagger": True, "basis_every": 12, "placement": "comm_opt"},
    "sampled": {"fisher": "mc", "placement": "hybrid"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_on_the_same_ranks_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    assert shared_workers().run(3, with_options, OPTIONS[name], tmp_path) == [True] * 3


# ------------------------------------------------------------------------------------------ refused


def one_part(rank: int, ranks: int, placement: str) -> dict[str, Any]:
    """What rank 0 saves by itself."""
    optimizer, model, wrapped = made(CASE, Place(ranks, placement))
    go(CASE, optimizer, model, wrapped, before(CASE), rank, ranks)
    return {"state": copy.deepcopy(optimizer.state_dict()), "model": model.state_dict()}


def given(
    rank: int, place: Place, states: dict[int, dict[str, Any]], changes: dict[str, Any], width: int
) -> tuple[str, str, bool]:
    """Return the error of loading a state, and whether training then goes on unchanged."""
    runs = (
        [made(CASE, place, **changes), made(CASE, place, **changes)]
        if width == 6
        else [wide(place, width), wide(place, width)]
    )
    for optimizer, model, wrapped in runs:
        go(CASE, optimizer, model, wrapped, range(2), rank, place.ranks)
    (optimizer, model, wrapped), (twin, other, rewrapped) = runs
    before_, groups = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups
    kind = text = ""
    try:
        optimizer.load_state_dict(copy.deepcopy(states[rank]))
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    assert_same(before_, optimizer.state_dict())
    assert optimizer.param_groups is groups
    go(CASE, optimizer, model, wrapped, range(2, 4), rank, place.ranks)
    go(CASE, twin, other, rewrapped, range(2, 4), rank, place.ranks)
    return kind, text, identical([left(optimizer, model)], [left(twin, other)])


def wide(place: Place, width: int) -> tuple[Optimizer, Branched, nn.Module]:
    """The model with a layer of another width."""
    model = branched()
    model.hidden, model.side = (
        nn.Linear(16, width, bias=False).double(),
        nn.Linear(16, width).double(),
    )
    model.norm, model.out = nn.LayerNorm(width).double(), nn.Linear(width, 3).double()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return (
        resume.bound(
            wrapped,
            placement=PLACEMENTS[place.placement],
            **resume.PERIODS,
            **resume.RECIPES[CASE.recipe],
        ),
        model,
        wrapped,
    )


def whole_state(rank: int, place: Place) -> dict[str, Any]:
    optimizer, model, wrapped = made(CASE, place)
    go(CASE, optimizer, model, wrapped, before(CASE), rank, place.ranks)
    optimizer.consolidate_state_dict()
    return copy.deepcopy(optimizer.state_dict())


def refusals(ranks: int, *arguments: Any) -> tuple[list[str], list[str]]:
    """Kinds and texts of what the ranks raised, once it is sure that nothing was changed on any."""
    found = shared_workers().run(ranks, given, *arguments)
    assert all(untouched for *_, untouched in found)
    return [kind for kind, *_ in found], [text for _, text, _ in found]


@covering(
    strength=1,
    placement=["comm_opt", "mem_opt", "hybrid"],
    target=[ALONE, Place(3, "replicated"), Place(3, "mem_opt")],
)
def test_one_ranks_part_alone_is_refused_with_the_remedy(placement: str, target: Place) -> None:
    part = shared_workers().run(2, one_part, 2, placement)[0]["state"]
    kinds, texts = refusals(target.ranks, target, dict.fromkeys(range(target.ranks), part), {}, 6)
    assert set(kinds) == {"StateError"}
    first = next(
        text for text in texts if text.startswith("the saved state lacks curvature of layer")
    )
    assert "it is one rank's part of a state that several ranks shared" in first
    assert "consolidate_state_dict()" in first
    assert all("it is one rank's part" in text for text in texts), (
        "those that lack nothing say which rank does"
    )


@pytest.mark.parametrize("damaged", [0, 2])
def test_a_state_damaged_on_one_rank_is_refused_by_all(damaged: int) -> None:
    place = Place(3, "mem_opt")
    whole = shared_workers().run(3, whole_state, place)[0]
    bad = copy.deepcopy(whole)
    for entry in bad["state"].values():
        for key, value in entry.items():
            if key.startswith("kfactk.factor.") and not key.endswith("weight"):
                value.fill_(float("nan"))
    kinds, texts = refusals(
        3, place, {rank: bad if rank == damaged else whole for rank in range(3)}, {}, 6
    )
    assert kinds == ["StateError"] * 3
    assert texts[damaged].startswith("the saved state is damaged: kfactk.factor.A")
    for rank in {0, 1, 2} - {damaged}:
        assert texts[rank].startswith(
            f"rank {damaged} cannot load the saved state, and so no rank loads it: StateError: "
            f"{texts[damaged]}"
        )


OTHERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "another basis": ({"basis": "kfac"}, 6, "does not fit"),
    "another update rule": ({"update": "nag"}, 6, "another update rule's"),
    "another curvature": (
        {"curvature": {"name": "conv_kfac", "spatial": "sua"}},
        6,
        "does not fit",
    ),
    "another width": ({}, 5, "does not fit"),
}


@covering(strength=1, name=OTHERS, placement=["comm_opt", "mem_opt"])
def test_a_state_of_something_else_is_refused_by_all(name: str, placement: str) -> None:
    changes, width, message = OTHERS[name]
    whole = shared_workers().run(3, whole_state, Place(3, "mem_opt"))[0]
    kinds, texts = refusals(3, Place(3, placement), dict.fromkeys(range(3), whole), changes, width)
    assert kinds == ["StateError"] * 3
    assert all(message in text for text in texts)


def test_different_checkpoints_on_different_ranks_are_refused() -> None:
    place = Place(2, "mem_opt")
    whole = shared_workers().run(2, whole_state, place)[0]
    earlier = copy.deepcopy(whole)
    for entry in earlier["state"].values():
        entry["kfactk.step"] = torch.tensor(3)
    kinds, texts = refusals(2, place, {0: whole, 1: earlier}, {}, 6)
    assert kinds == ["StateError"] * 2
    assert all(f"rank 0 at step {CASE.saved_at}, rank 1 at step 3" in text for text in texts)


def other_recipe_from_files(rank: int, folder: Path, changes: dict[str, Any]) -> tuple[str, bool]:
    """Load with another recipe: return the error and whether training goes on unchanged."""
    place = Place(2, "mem_opt")
    optimizer, model, wrapped = made(CASE, place)
    go(CASE, optimizer, model, wrapped, before(CASE), rank, 2)
    resume.save(folder, optimizer, wrapped, StateDictOptions())
    (resumed, fresh, refreshed), (twin, other, rewrapped) = (
        made(CASE, place, **changes),
        made(CASE, place, **changes),
    )
    said = ""
    try:
        resume.load(folder, resumed, refreshed, StateDictOptions())
    except CheckpointException as error:
        said = str(error)
    assert resumed.steps == 0
    go(CASE, resumed, fresh, refreshed, range(2), rank, 2)
    go(CASE, twin, other, rewrapped, range(2), rank, 2)
    return said, identical([left(resumed, fresh)], [left(twin, other)])


def test_files_of_another_recipe_are_refused_by_torch_on_all_ranks(tmp_path: Path) -> None:
    """It finds keys missing, before there is anything for kfactk to look at."""
    for said, untouched in shared_workers().run(
        2, other_recipe_from_files, tmp_path, {"basis": "kfac", "update": "momentum"}
    ):
        assert "Missing key in checkpoint state_dict" in said
        assert "kfactk.basis" in said or "momentum_buffer" in said
        assert untouched


# ------------------------------------------------------------------------------------------ welcome


def from_adam(
    rank: int, place: Place, state: dict[str, Any], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Go on with what plain Adam has left."""
    case = Case("ekfac+adam", "between refreshes")
    optimizer, model, wrapped = made(case, place, seed=4)
    model.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(state))
    assert optimizer.steps == 0
    go(case, optimizer, model, wrapped, range(AFTER), rank, place.ranks)
    return left(optimizer, model)


def test_a_checkpoint_of_plain_adam_is_welcome_on_any_ranks() -> None:
    model = branched()
    plain = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x, y = (
            torch.randn(12, 2, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (12,), generator=generator),
        )
        plain.zero_grad()
        F.cross_entropy(model(x), y).backward()
        plain.step()
    buffer = io.BytesIO()
    torch.save((plain.state_dict(), model.state_dict()), buffer)
    buffer.seek(0)
    state, weights = torch.load(buffer, weights_only=True)
    (alone,) = shared_workers().run(1, from_adam, ALONE, state, weights)
    assert float(alone["out.weight step"]) == 4 + AFTER
    ranks = shared_workers().run(3, from_adam, Place(3, "mem_opt"), state, weights)
    assert (
        deviation(
            ranks,
            {
                name: value
                for name, value in alone.items()
                if ".basis." not in name and ".moment." not in name
            },
        )
        <= PRECISION
    )


def never_ran(rank: int, place: Place) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save in one file before a branch ever ran: results of the run and of the resumed one."""
    case = Case("ekfac+adam", "something overdue")

    def steps(
        optimizer: Optimizer, model: Branched, wrapped: nn.Module, numbers: range, branching: bool
    ) -> None:
        for step in numbers:
            generator = torch.Generator().manual_seed(step)
            x, y = (
                torch.randn(12, 2, 4, 4, generator=generator, dtype=torch.float64),
                torch.randint(3, (12,), generator=generator),
            )
            model.branching = branching
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x[rank :: place.ranks]), y[rank :: place.ranks]).backward()
            optimizer.step()

    (optimizer, model, wrapped), (resumed, fresh, refreshed) = (
        made(case, place),
        made(case, place, seed=4),
    )
    steps(optimizer, model, wrapped, range(3), False)
    optimizer.consolidate_state_dict(None)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh.load_state_dict(model.state_dict())
    for run in ((optimizer, model, wrapped), (resumed, fresh, refreshed)):
        steps(*run, range(3, 4), False)
        steps(*run, range(4, 7), True)
    return left(optimizer, model), left(resumed, fresh)


@pytest.mark.parametrize("place", [ALONE, Place(3, "mem_opt")], ids=str)
def test_a_layer_that_has_not_run_yet_is_waited_for_in_the_resumed_run_too(place: Place) -> None:
    found = shared_workers().run(place.ranks, never_ran, place)
    assert any("side.weight kfactk.factor.A" in first for first, _ in found)
    assert identical([first for first, _ in found], [second for _, second in found])
