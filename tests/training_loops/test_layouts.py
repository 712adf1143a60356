"""Layouts where a rank lacks whole or equal layers are refused with a remedy that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfactk import CaptureError, CombinationError, KfactkError, StateError
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.small import bound, hooks
from tests.training_loops.loops import (
    EACH,
    PLACEMENTS,
    assert_near,
    assert_same,
    images,
    left,
    loss_of,
    mixed,
    one_process,
    part,
)

pytestmark = pytest.mark.xdist_group("ranks")


class Block(nn.Module):
    """A norm between two layers, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.head = (
            nn.Linear(4, 8),
            nn.Linear(8, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.down(torch.tanh(self.up(x)))))
        return out


def block() -> Block:
    torch.manual_seed(2)
    return Block()


# ---------------------------------------------------------------------------------- tensor parallel


def columns_and_rows(model: Block) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def sequence(model: Block) -> None:
    """Only a layer without block is spread, but what the others see is a part of the sequence."""
    parallelize_module(
        model, init_device_mesh("cpu", (dist.get_world_size(),)), {"norm": SequenceParallel()}
    )


def spread_by_hand(model: Block) -> None:
    distribute_module(model.up, init_device_mesh("cpu", (dist.get_world_size(),)))


SPREAD: dict[str, tuple[Callable[[Block], None], str]] = {
    "columns and rows": (columns_and_rows, "'up'"),
    "sequence": (sequence, "'norm'"),
    "by hand": (spread_by_hand, "'up'"),
}


def message_of(kind: type[BaseException], function: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        function()
    return str(caught.value)


def bound_after(rank: int, way: str) -> tuple[str, int]:
    model = block()
    SPREAD[way][0](model)
    before = hooks(model)
    return message_of(CombinationError, lambda: bound(model)), hooks(model) - before


@pytest.mark.parametrize("way", SPREAD)
def test_tensor_parallel_models_are_refused_when_bound(way: str) -> None:
    for message, left_over in shared_workers().run(2, bound_after, way):
        assert f"layer {SPREAD[way][1]} is spread over ranks" in message
        assert "fully_shard" in message
        assert left_over == 0


def spread_after(rank: int) -> tuple[str, int, bool]:
    model = block()
    optimizer = bound(model)
    columns_and_rows(model)
    before = [parameter.detach().clone() for parameter in model.head.parameters()]
    message = message_of(CombinationError, lambda: model(torch.ones(2, 4)))
    return (
        message,
        optimizer.steps,
        all(torch.equal(*pair) for pair in zip(before, model.head.parameters(), strict=True)),
    )


def test_a_model_that_is_spread_after_it_was_bound_is_refused_in_its_forward() -> None:
    for message, steps, same in shared_workers().run(2, spread_after):
        assert "'up' is spread over ranks" in message
        assert (steps, same) == (0, True)


def remedied(rank: int, remedy: str) -> list[Tensor]:
    """The same model as the messages say to have it."""
    model: nn.Module = block()
    called: nn.Module = DistributedDataParallel(model) if remedy == "ddp" else model
    if remedy == "fully_shard":
        fully_shard(model)
    optimizer = bound(called)
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    F.cross_entropy(called(x[rank::2]), y[rank::2]).backward()
    optimizer.step()
    return [view.factors[name] for view in optimizer.layers.values() for name in ("A", "G")]


@pytest.mark.parametrize("remedy", ["ddp", "fully_shard"])
def test_the_remedies_are_not_refused_and_measure_the_whole_batch(remedy: str) -> None:
    ranks = shared_workers().run(2, remedied, remedy)
    model = block()
    optimizer = bound(model)
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    truth = [view.factors[name] for view in optimizer.layers.values() for name in ("A", "G")]
    for found in ranks:
        torch.testing.assert_close(found, truth)


# ---------------------------------------------------------------------------------- flat and copied


def flat(rank: int, whole: bool) -> str:
    """The wrapper itself, or a model one part of which it wraps."""
    inner = FullyShardedDataParallel(block(), device_id=torch.device("cpu"), use_orig_params=True)
    return message_of(
        CombinationError, lambda: bound(inner if whole else nn.Sequential(inner, nn.Linear(3, 3)))
    )


@pytest.mark.parametrize("whole", [True, False])
def test_flat_shards_are_refused(whole: bool) -> None:
    assert all("fully_shard" in message for message in shared_workers().run(2, flat, whole))


def test_a_part_that_is_copied_over_devices_is_refused() -> None:
    model = nn.Sequential(nn.DataParallel(nn.Linear(4, 4)), nn.Linear(4, 3))
    with pytest.raises(CombinationError, match="DistributedDataParallel"):
        bound(model)
    assert hooks(model) == 0


# ---------------------------------------------------------------------------------------- pipelines


def pipelined(rank: int) -> tuple[str, int]:
    """Run a pipeline of one stage, so that no other stage waits for the refused one."""
    model = block()
    optimizer = bound(model)
    schedule = ScheduleGPipe(
        PipelineStage(model, 0, 1, torch.device("cpu")), 2, loss_fn=F.cross_entropy
    )
    message = message_of(
        CombinationError, lambda: schedule.step(torch.randn(4, 4), target=torch.arange(4) % 3)
    )
    return message, optimizer.steps


def test_a_stage_of_a_pipeline_is_refused_in_its_forward() -> None:
    [(message, steps)] = shared_workers().run(1, pipelined)
    assert "the model runs as a stage of a pipeline" in message
    assert steps == 0


def stage_module(rank: int) -> nn.Module:
    return (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh()) if rank == 0 else nn.Sequential(nn.Linear(3, 3))
    )


def differing(rank: int, how: str) -> str:
    model: nn.Module
    if how == "stages":
        model = stage_module(rank)
    elif how == "names":
        model = (
            nn.Sequential(nn.Linear(4, 3)) if rank == 0 else nn.ModuleDict({"fc": nn.Linear(4, 3)})
        )
    elif how == "shapes":
        model = nn.Sequential(nn.Linear(4, 3 + rank))
    else:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        model[0].requires_grad_(rank == 0)
    return message_of(StateError, lambda: bound(model))


@pytest.mark.parametrize("how", ["stages", "names", "shapes", "trained"])
def test_ranks_with_different_layers_are_told_so(how: str) -> None:
    assert all(
        "ranks disagree on the layers of the model" in message
        for message in shared_workers().run(2, differing, how)
    )


# ---------------------------------------------------------------------------------- parts and joins


class Around(nn.Module):
    """A model one part of which is wrapped."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * 1.0
        return out


def part_wrapped(rank: int, options: dict[str, Any], late: bool) -> dict[str, Tensor] | str:
    model = mixed()
    whole = Around(model if late else DistributedDataParallel(model, **options))
    optimizer = bound(whole, update="momentum", **EACH)
    if late:
        whole.inner = DistributedDataParallel(model, **options)
    try:
        for step in range(4):
            optimizer.zero_grad()
            loss_of(whole, part(images(step), rank)).backward()
            optimizer.step()
    except CaptureError as error:
        return str(error)
    return left(optimizer, model)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}], ids=str
)
def test_a_model_of_which_a_part_is_wrapped(options: dict[str, Any], late: bool) -> None:
    ranks = shared_workers().run(2, part_wrapped, options, late)
    truth = left(
        *one_process(([images(step)] for step in range(4)), update="momentum", **EACH),
        decompositions=False,
    )
    assert_same(ranks[0], ranks[1])
    assert_near({name: ranks[0][name] for name in truth}, truth)


@pytest.mark.parametrize("late", [False, True])
def test_a_static_graph_inside_the_model_is_refused(late: bool) -> None:
    for found in shared_workers().run(2, part_wrapped, {"static_graph": True}, late):
        assert isinstance(found, str)
        assert "static_graph=True" in found


def joined(
    rank: int, early: bool, batches: int, placement: Any
) -> tuple[str, int, dict[str, Tensor]]:
    """Rank 1 has fewer batches."""
    model = mixed()
    wrapped = DistributedDataParallel(model)
    optimizer = bound(wrapped, placement=placement, **EACH)
    said = ""
    try:
        with wrapped.join(throw_on_early_termination=early):
            for step in range(batches - rank):
                optimizer.zero_grad()
                loss_of(wrapped, part(images(step), rank)).backward()
                optimizer.step()
    except (KfactkError, RuntimeError) as error:
        said = str(error)
    return said, optimizer.steps, left(optimizer, model)


def test_join_is_refused_before_anybody_waits() -> None:
    for said, steps, _ in shared_workers().run(2, joined, False, 3, "replicated"):
        assert "the model runs under join()" in said
        assert steps == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_joins_remedy_ends_all_ranks_together(placement: str) -> None:
    ranks = shared_workers().run(2, joined, True, 4, PLACEMENTS[placement])
    truth = left(*one_process(([images(step)] for step in range(3)), **EACH), decompositions=False)
    for said, steps, found in ranks:
        assert "exhausted" in said
        assert steps == 3
        assert_near(
            {name: found[name] for name in mixed().state_dict()},
            {name: truth[name] for name in mixed().state_dict()},
        )
