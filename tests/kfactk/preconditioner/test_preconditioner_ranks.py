"""Layers that change between steps, on all ranks or on one alone; truth is one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CombinationError, Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk import surgery
from tests.kfactk.small import F64
from tests.kfactk.surgery import CHANGES, Change, net

pytestmark = pytest.mark.xdist_group("ranks")
PLACEMENTS: list[Any] = ["replicated", "comm_opt", "mem_opt"]
RECIPE: dict[str, Any] = {
    "fisher": "exact",
    "clip": "none",
    "update": "sgd",
    "lr": 0.1,
    "damping": 0.05,
    "factor_every": 1,
    "scale_every": 1,
    "basis_every": 2,
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 4, generator=generator, dtype=F64)
    return inputs, torch.randint(3, (8,), generator=generator)


def backward(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Leave the gradient of this rank's part of the batch."""
    rank, ranks = optimizer._preconditioner.communicator.rank, len_ranks()
    x, y = batch(step)
    optimizer.zero_grad()
    F.cross_entropy(model(x[rank::ranks]), y[rank::ranks]).backward()


def len_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    """Take a step on the gradient of all ranks."""
    backward(model, optimizer, number)
    if dist.is_initialized():
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= len_ranks()
    optimizer.step()


def trained(rank: int, changes: list[Change], recipe: dict[str, Any]) -> list[Any]:
    """For each change: the layers and the parameters of a model trained before and after it."""
    found = []
    for change in changes:
        model = net()
        optimizer = kfactk.build(**{**RECIPE, **recipe}).bind(model)
        for number in range(2):
            step(model, optimizer, number)
        change(model, optimizer)
        for number in range(2, 5):
            step(model, optimizer, number)
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        found.append((set(optimizer.layers), parameters))
    return found


@functools.cache
def truth() -> list[Any]:
    return trained(0, list(CHANGES), {})


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_layers_that_change_on_all_ranks_are_followed(placement: str) -> None:
    found = shared_workers().run(2, trained, list(CHANGES), {"placement": placement})
    for number, change in enumerate(CHANGES):
        layers, expected = truth()[number]
        assert layers == set(CHANGES[change]), change
        for each in found:
            names, parameters = each[number]
            assert names == layers, change
            for name, parameter in parameters.items():
                torch.testing.assert_close(
                    parameter,
                    expected[name],
                    rtol=1e-9,
                    atol=1e-10,
                    msg=lambda text, what=(change.__name__, name): f"{what}: {text}",
                )


# --------------------------------------------------------------------------------- one rank alone


ALONE: dict[Change, tuple[str, str, str]] = {
    surgery.freeze_a_bias: ("2", "weight, bias (measured)", "weight (new)"),
    surgery.freeze_a_layer: ("0", "weight, bias (measured)", "none"),
    surgery.replace_by_the_same_width: ("4", "weight, bias (measured)", "weight, bias (new)"),
    surgery.append: ("5", "none", "weight, bias (new)"),
    surgery.remove: ("2", "weight, bias (measured)", "none"),
    surgery.wrap: ("2", "weight, bias (measured)", "none"),
    surgery.tie: ("0", "weight, bias (measured)", "weight, bias of 2 modules (new)"),
}


def refused(rank: int, placement: str, before: int) -> dict[str, tuple[str, bool]]:
    """For each change on rank 1 alone, what the step says, and whether parameters stayed."""
    found = {}
    for change in ALONE:
        model = net()
        optimizer = kfactk.build(**RECIPE, placement=placement).bind(model)
        for number in range(before):
            step(model, optimizer, number)
        backward(model, optimizer, before)
        kept = list(model.parameters())
        if rank == 1:
            change(model, optimizer)
        values = [p.detach().clone() for p in kept]
        with pytest.raises(CombinationError) as error:
            optimizer.step()
        same = all(torch.equal(p, v) for p, v in zip(kept, values, strict=True))
        found[change.__name__] = str(error.value), same
    return found


@pytest.mark.parametrize("placement", ["replicated", "mem_opt"])
@pytest.mark.parametrize("before", [0, 2])
def test_layers_that_change_on_one_rank_alone_are_refused_on_all(
    placement: str, before: int
) -> None:
    found = shared_workers().run(2, refused, placement, before)
    for change, (layer, first, other) in ALONE.items():
        first = first if before else first.replace("measured", "not measured")
        for each in found:
            message, same = each[change.__name__]
            expected = f"of layer {layer!r}: {first} on rank 0, {other} on rank 1."
            assert expected in message, change
            assert "on all ranks before step()" in message
            assert same


def resumed(rank: int, placement: str) -> dict[str, Tensor]:
    """A run that goes on after a refused change was taken back."""
    model = net()
    optimizer = kfactk.build(**RECIPE, placement=placement).bind(model)
    for number in range(3):
        step(model, optimizer, number)
    backward(model, optimizer, 3)
    if rank == 1:
        model[2].bias.requires_grad_(False)
    with pytest.raises(CombinationError):
        optimizer.step()
    model[2].bias.requires_grad_(True)
    for number in range(3, 6):
        step(model, optimizer, number)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_refused_change_that_is_taken_back_leaves_no_trace(placement: str) -> None:
    expected = visited(0, {}, visits=False)
    for parameters in shared_workers().run(2, resumed, placement):
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------- for the time of one forward


def visited(rank: int, recipe: dict[str, Any], visits: bool) -> dict[str, Tensor]:
    """Steps before which rank 0 runs forwards of its own with other layers."""
    model = net()
    optimizer = kfactk.build(**{**RECIPE, **recipe}).bind(model)
    for number in range(6):
        if visits and rank == 0:
            frozen_forwards(model, number)
        step(model, optimizer, number)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def frozen_forwards(model: nn.Sequential, number: int) -> None:
    """Forwards whose backward never comes, through other layers than those of the step."""
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    model.requires_grad_(False)
    model(x).sum().backward()  # a saliency map
    model.requires_grad_(True)
    if number % 2:
        model[2].bias.requires_grad_(False)
        model(x)
        model[2].bias.requires_grad_(True)
        head, model[4] = model[4], nn.Identity()
        with torch.no_grad():
            model(x)
        model[4] = head


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_forwards_of_one_rank_through_frozen_layers_keep_nobody_waiting(placement: str) -> None:
    recipe = {"placement": placement}
    expected = visited(0, {"fisher": "empirical"}, visits=False)
    found = shared_workers().run(2, visited, {**recipe, "fisher": "empirical"}, True)
    for parameters in found:
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-10)


# -------------------------------------------------------------------- loading into other layers


def loaded(rank: int, placement: str) -> dict[str, Tensor]:
    """A run that is resumed after a bias was frozen, between bind and load."""
    model = net()
    optimizer = kfactk.build(**RECIPE, placement=placement).bind(model)
    model[2].bias.requires_grad_(False)
    for number in range(3):
        step(model, optimizer, number)
    optimizer.consolidate_state_dict(to=None)
    states = model.state_dict(), optimizer.state_dict()
    other = net()
    resuming = kfactk.build(**RECIPE, placement=placement).bind(other)
    other[2].bias.requires_grad_(False)
    other.load_state_dict(states[0])
    resuming.load_state_dict(states[1])
    for number in range(3, 6):
        step(model, optimizer, number)
        step(other, resuming, number)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    return {name: p.detach().clone() for name, p in other.named_parameters()}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_state_is_loaded_into_the_layers_as_they_are(placement: str) -> None:
    expected = loaded(0, "replicated")
    for parameters in shared_workers().run(2, loaded, placement):
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-10)


# --------------------------------------------------------------------- several bases in one model


def mixed() -> dict[str, Any]:
    """K-FAC for one layer, EKFAC for another, unitwise blocks for the norm."""
    head = kfactk.block("kfac", basis="kfac", layers=["4"])
    return {**RECIPE, "curvature": [head, "conv_kfac", "norm"], "basis": "ekfac"}


def with_norm() -> nn.Sequential:
    model = net()
    model[3] = nn.Sequential(nn.Tanh(), nn.LayerNorm(4)).double()
    return model


def trained_by_three(rank: int, placement: Any, then: Any) -> tuple[dict[str, str], Any]:
    """Train with three bases, save in the middle, and go on under another placement."""
    model = with_norm()
    optimizer = kfactk.build(**mixed(), placement=placement).bind(model)
    for number in range(3):
        step(model, optimizer, number)
    optimizer.consolidate_state_dict(to=None)
    state = optimizer.state_dict()
    resumed = kfactk.build(**mixed(), placement=then).bind(model)
    resumed.load_state_dict(state)
    optimizer.close()
    for number in range(3, 6):
        step(model, resumed, number)
    stages = {row.block or "": row.stages for row in resumed.coverage()}
    return stages, {name: p.detach().clone() for name, p in model.named_parameters()}


HALVES = {"name": "hybrid", "fraction": 0.5}


@pytest.mark.parametrize(
    ("ranks", "placement", "then"),
    [(2, "comm_opt", "mem_opt"), (2, "mem_opt", "replicated"), (4, HALVES, "comm_opt")],
    ids=str,
)
def test_several_bases_on_several_ranks_equal_one_process(
    ranks: int, placement: Any, then: Any
) -> None:
    stages, expected = trained_by_three(0, "replicated", "replicated")
    assert stages == {
        "0": "conv_kfac, ekfac",
        "2": "conv_kfac, ekfac",
        "3.1": "norm, unitwise",
        "4": "kfac, kfac",
    }
    for its, parameters in shared_workers().run(ranks, trained_by_three, placement, then):
        assert its == stages
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-10)


# -------------------------------------------------------------------------------- time on one rank


def out_of_time(rank: int, which: str, placement: str) -> str:
    """What the step says where a period, or the number of steps, is another one on rank 1."""
    seen = [1]
    periods = {} if which == "step" else {which: lambda step: seen[0]}
    model = net()
    optimizer = kfactk.build(**{**RECIPE, **periods}, placement=placement).bind(model)
    for number in range(3):
        step(model, optimizer, number)
    if rank == 1 and which == "step":
        optimizer._run.step += 1
    if rank == 1:
        seen[0] = 2
    backward(model, optimizer, 3)
    with pytest.raises(CombinationError) as error:
        optimizer.step()
    return str(error.value)


@pytest.mark.parametrize("placement", ["replicated", "mem_opt"])
@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("factor_every", "factor_every is 1 on rank 0 and 2 on rank 1"),
        ("scale_every", "scale_every is 1 on rank 0 and 2 on rank 1"),
        ("basis_every", "basis_every is 1 on rank 0 and 2 on rank 1"),
        ("damping", "damping is 1 on rank 0 and 2 on rank 1"),
        ("step", "the number of steps taken is 3 on rank 0 and 4 on rank 1"),
    ],
)
def test_periods_and_steps_that_differ_on_one_rank_are_refused_on_all(
    which: str, told: str, placement: str
) -> None:
    for said in shared_workers().run(2, out_of_time, which, placement):
        assert f"ranks are not at the same point: {told}" in said
