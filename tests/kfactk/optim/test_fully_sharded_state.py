"""What the optimizer of a model divided by `fully_shard` shows, saves and loads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from kfactk.distributed.sharding import is_sharded
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.sharded import (
    F64,
    bound,
    data,
    deviation,
    found,
    full,
    in_part,
    line,
    net,
    part,
    root_only,
    train,
)

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = 3
Found = dict[str, Tensor]


def viewed(rank: int) -> dict[str, Found]:
    model = in_part(net(), line())
    optimizer = bound(model)
    train(optimizer, model, part(0))
    given = {
        name: torch.ones_like(p)
        for name, p in model.named_parameters()
        if name.startswith(("conv", "head"))
    }
    whole = {name: full(tensor) for name, tensor in given.items()}
    results = {}
    for product in ("fisher_product", "precondition"):
        ours, plain = getattr(optimizer, product)(given), getattr(optimizer, product)(whole)
        assert all(
            is_sharded(tensor) and tensor.placements == given[name].placements
            for name, tensor in ours.items()
        )
        assert not any(is_sharded(tensor) for tensor in plain.values())
        assert all(torch.equal(full(tensor), plain[name]) for name, tensor in ours.items())
        only = optimizer.layers["head"].fisher_product({"weight": given["head.weight"]})
        assert all(is_sharded(tensor) for tensor in only.values()), (
            "also what was left out, and counts as zero"
        )
        results[product] = plain
    return results


def test_views_take_and_give_shards() -> None:
    model = net()
    optimizer = bound(model)
    train(optimizer, model, data(0))
    given = {
        name: torch.ones_like(p)
        for name, p in model.named_parameters()
        if name.startswith(("conv", "head"))
    }
    for results in shared_workers().run(2, viewed):
        for product, ours in results.items():
            truth = getattr(optimizer, product)(given)
            assert all(
                torch.allclose(ours[name], truth[name], rtol=1e-10, atol=1e-12) for name in truth
            )


def saved_and_loaded(rank: int, whole: bool) -> tuple[Found, Found]:
    """Four steps, and two of them by another optimizer that took over."""
    model, other = in_part(net(), line()), root_only(net(), line())
    optimizer, heir = bound(model), bound(other)
    for step in range(2):
        train(optimizer, model, part(step))
    state = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=whole, cpu_offload=whole)
    )
    assert bool(state) == (rank == 0 or not whole)
    state = copy.deepcopy(state)  # torch's optimizers go on with the tensors they are given
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.to_local().copy_(theirs.to_local())
    set_optimizer_state_dict(
        other,
        heir,
        state,
        options=StateDictOptions(full_state_dict=whole, broadcast_from_rank0=whole),
    )
    for step in range(2, 4):
        train(optimizer, model, part(step))
        train(heir, other, part(step))
    return found(optimizer, model), found(heir, other)


@pytest.mark.parametrize("whole", [False, True])
def test_states_travel_through_torchs_own_functions(whole: bool) -> None:
    for ours, theirs in shared_workers().run(2, saved_and_loaded, whole):
        assert deviation(theirs, ours) == 0.0


def in_half(rank: int) -> tuple[Found, set[torch.dtype], float]:
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    model = net(torch.float32)
    for child in model.children():
        fully_shard(child, mesh=line(), mp_policy=policy)
    fully_shard(model, mesh=line(), mp_policy=policy)
    optimizer = bound(model, clip="none", update="sgd", lr=0.01)
    for step in range(STEPS):
        x, y = part(step)
        train(optimizer, model, (x.float(), y))
    tensors = found(optimizer, model)
    return (
        tensors,
        {tensor.dtype for tensor in tensors.values()},
        full(model.head.weight).sum().item(),
    )


def test_bfloat16_parameters_leave_curvature_and_step_in_float32() -> None:
    model = net()
    optimizer = bound(model, clip="none", update="sgd", lr=0.01)
    start = {name: full(parameter) for name, parameter in model.named_parameters()}
    for step in range(STEPS):
        train(optimizer, model, data(step))
    truth = found(optimizer, model)
    results = shared_workers().run(2, in_half)
    for ours, dtypes, _ in results:
        assert dtypes == {torch.float32}
        for name in truth:
            if name.endswith((" A", " G")):
                assert (
                    float((ours[name].to(F64) - truth[name]).norm() / truth[name].norm()) < 0.05
                ), name
        moved = [
            ((ours[name].to(F64) - start[name]).flatten(), (truth[name] - start[name]).flatten())
            for name in start
        ]
        here, there = (torch.cat(side) for side in zip(*moved, strict=True))
        assert float(torch.dot(here, there) / (here.norm() * there.norm())) > 0.98, (
            "the step goes where that in full precision goes"
        )
    assert all(torch.equal(tensor, results[1][0][name]) for name, tensor in results[0][0].items())
