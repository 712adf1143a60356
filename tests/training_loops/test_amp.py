"""Mixed precision on ranks: scales are undone; all skip a step that overflows on one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kfactk
from kfactk import Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.covering import covering
from tests.training_loops.loops import (
    EACH,
    PLACEMENTS,
    assert_moved,
    assert_near,
    assert_same,
    images,
    left,
    loss_of,
    mixed,
    part,
    several,
)

pytestmark = pytest.mark.xdist_group("ranks")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = 6
FISHERS: dict[str, Any] = {
    "exact": {"fisher": "exact"},
    "mc": {"fisher": {"name": "mc", "draw": lambda view: view.argmin(-1)}},
    "empirical": {"fisher": "empirical"},
}
BASES = {"EKFAC": "ekfac", "K-FAC": "kfac", "running scale": {"name": "ekfac", "scale": "running"}}


def bind(model: nn.Module, scaler: Any, fisher: str, **recipe: Any) -> Optimizer:
    """Bind a recipe with deterministic draws and no clip; pass the scaler where it is needed."""
    options: dict[str, Any] = {"clip": "none", "update": "momentum", "lr": 0.05, "damping": 0.05}
    return kfactk.build(**options | EACH | FISHERS[fisher] | recipe).bind(
        model, scaler=scaler if fisher == "empirical" else None
    )


# ------------------------------------------------------------------------------------- loss scaling


def scaled_run(
    rank: int, fisher: str, bad: Sequence[int], recipe: dict[str, Any]
) -> tuple[dict[str, Tensor], list[float], list[bool]]:
    """Train with a scaler in float64, where powers of two change no digit.

    The loss of rank 1 is infinite in the steps `bad`.

    Returns:
        The results, the scale before each step, and which steps changed nothing.
    """
    model = mixed()
    called = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    optimizer = bind(called, scaler, fisher, **recipe)
    scales, kept = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        before = left(optimizer, model)
        loss = loss_of(called, part(images(step), rank)) * (
            float("inf") if rank == 1 and step in bad else 1.0
        )
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = left(optimizer, model)
        kept.append(all(torch.equal(value, after[name]) for name, value in before.items()))
    return left(optimizer, model), scales, kept


def unscaled_run(fisher: str, bad: Sequence[int], recipe: dict[str, Any]) -> dict[str, Tensor]:
    """Train one process without a scaler that takes no step when rank 1 is bad.

    The next step counts the forward's curvature. `empirical` reads the user's backward, to which
    rank 1 contributes nothing.
    """
    model = mixed()
    optimizer = bind(model, None, fisher, **recipe)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = part(images(step), 0) if step in bad and fisher == "empirical" else images(step)
        loss_of(model, batch).backward()
        if step not in bad:
            optimizer.step()
    return left(optimizer, model, decompositions=False)


@covering(fisher=FISHERS, bad=[[0], [2, 3]], placement=PLACEMENTS)
def test_a_step_that_overflows_on_one_rank_is_left_out_on_all(
    fisher: str, bad: list[int], placement: str
) -> None:
    ranks = shared_workers().run(2, scaled_run, fisher, bad, {"placement": PLACEMENTS[placement]})
    truth = several(unscaled_run(fisher, bad, {}), placement)
    assert_moved(mixed(), truth)
    scale, clean, scales = 2.0**12, 0, []
    for step in range(STEPS):
        scales.append(scale)
        clean = 0 if step in bad else clean + 1
        scale *= 0.5 if step in bad else 2.0 if clean % 2 == 0 else 1.0
    for found, seen, kept in ranks:
        assert seen == scales
        assert kept == [step in bad for step in range(STEPS)]
        assert_same(several(found, placement), several(ranks[0][0], placement))
    assert_near({name: ranks[0][0][name] for name in truth}, truth)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("fisher", FISHERS)
def test_in_every_basis(fisher: str, basis: str) -> None:
    ranks = shared_workers().run(
        2, scaled_run, fisher, [1, 4] if basis != "running scale" else [], {"basis": BASES[basis]}
    )
    truth = unscaled_run(
        fisher, [1, 4] if basis != "running scale" else [], {"basis": BASES[basis]}
    )
    assert_same(ranks[0][0], ranks[1][0])
    assert_near({name: ranks[0][0][name] for name in truth}, truth)


# ----------------------------------------------------------------------------------------- autocast


def autocast_run(
    rank: int,
    ranks: int,
    device: str,
    dtype: torch.dtype,
    fisher: str,
    huge: Sequence[int],
    placement: Any,
) -> tuple[dict[str, Tensor], list[float], list[str]]:
    """Train with autocast; inputs of rank 1 exceed the range of float16 in the steps `huge`."""
    model = mixed(torch.float32).to(device)
    called = DistributedDataParallel(model) if ranks > 1 else model
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8, enabled=dtype == torch.float16)
    optimizer = bind(called, scaler, fisher, placement=placement)
    scales, dtypes = [], set()
    model.out.register_forward_hook(lambda module, args, output: dtypes.add(str(output.dtype)))
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = part(images(step, 32, torch.float32), rank, ranks)
        x = x * (1e30 if rank == 1 and step in huge else 1.0)
        with torch.autocast(device, dtype):
            loss = loss_of(called, (x.to(device), y.to(device)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return (
        {name: value.cpu() for name, value in left(optimizer, model).items()},
        scales,
        sorted(dtypes),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fisher", FISHERS)
def test_autocast_on_ranks_equals_one_process_to_its_precision(
    fisher: str, dtype: torch.dtype, device: str
) -> None:
    """Sums are float32: ranks add no error to that of rounding whole or half batches."""
    ranks = shared_workers().run(2, autocast_run, 2, device, dtype, fisher, [], "replicated")
    truth, scales, dtypes = autocast_run(0, 1, device, dtype, fisher, [], "replicated")
    assert dtypes == [str(dtype)]
    for found, seen, each in ranks:
        assert (seen, each) == (scales, dtypes)
        assert_same(found, ranks[0][0])
    kept = {
        name: value
        for name, value in truth.items()
        if not name.partition(" ")[2].startswith(("kfactk.basis.", "kfactk.moment."))
    }
    assert all(
        value.dtype == torch.float32
        for name, value in kept.items()
        if name.endswith((".factor.A", ".factor.G"))
    )
    assert_moved(mixed(torch.float32), kept)
    assert_near({name: ranks[0][0][name] for name in kept}, kept, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
@covering(
    dtype=[torch.float16, torch.bfloat16], fisher=["exact", "empirical"], placement=PLACEMENTS
)
@pytest.mark.filterwarnings("ignore::kfactk.KfactkWarning")
def test_inputs_out_of_range_on_one_rank(
    dtype: torch.dtype, fisher: str, placement: str, device: str
) -> None:
    """The scaler or the optimizer skips the step; the run goes on, equal on all ranks."""
    ranks = shared_workers().run(
        2, autocast_run, 2, device, dtype, fisher, [0, 3], PLACEMENTS[placement]
    )
    for found, scales, _ in ranks:
        assert scales == ranks[0][1]
        assert_same(several(found, placement), several(ranks[0][0], placement))
        assert all(bool(value.isfinite().all()) for value in found.values())
    assert ranks[0][1] == ([2.0**7] * 3 + [2.0**6] * 3 if dtype == torch.float16 else [1.0] * STEPS)
    assert_moved(mixed(torch.float32), ranks[0][0])
