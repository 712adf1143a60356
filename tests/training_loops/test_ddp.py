"""Under DistributedDataParallel, ranks with parts of a batch equal one process with the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kfactk import CaptureError, Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.covering import covering
from tests.kfactk.small import bound
from tests.training_loops.loops import (
    EACH,
    PLACEMENTS,
    Mixed,
    accumulate,
    assert_moved,
    assert_near,
    assert_same,
    images,
    left,
    loss_of,
    mixed,
    one_process,
    part,
    several,
)

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
    "many buckets": {
        "static_graph": True,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": 1e-4,
        "broadcast_buffers": False,
    },
}
RECIPES: dict[str, dict[str, Any]] = {
    "EKFAC": {"basis": "ekfac", "update": "adam", "lr": 0.01},
    "K-FAC": {"basis": "kfac", "update": "momentum"},
    "running scale": {"basis": {"name": "ekfac", "scale": "running"}, "update": "sgd"},
    "empirical": {"fisher": "empirical", "update": "sgd"},
}


def wrap(
    model: nn.Module, when: str, options: dict[str, Any], recipe: dict[str, Any]
) -> tuple[DistributedDataParallel, Optimizer]:
    """Bound before it is wrapped, or after."""
    if when == "before":
        optimizer = bound(model, **EACH, **recipe)
        return DistributedDataParallel(model, **options), optimizer
    wrapped = DistributedDataParallel(model, **options)
    return wrapped, bound(wrapped, **EACH, **recipe)


def check(ranks: list[dict[str, Tensor]], truth: tuple[Optimizer, Mixed], placement: str) -> None:
    """Ranks agree bit for bit, and with one process to a stated precision."""
    for other in ranks[1:]:
        assert_same(several(ranks[0], placement), several(other, placement))
    optimizer, model = truth
    expected = several(left(optimizer, model, decompositions=False), placement)
    assert_moved(mixed(), expected)
    assert_near({name: ranks[0][name] for name in expected}, expected)


# ----------------------------------------------------------------------------------------- wrappers


def wrapped_run(
    rank: int, when: str, options: dict[str, Any], recipe: dict[str, Any]
) -> dict[str, Tensor]:
    model = mixed()
    wrapped, optimizer = wrap(model, when, options, recipe)
    assert list(optimizer.layers) == ["conv", "grouped", "hidden", "out"], (
        "names are those of the wrapped model"
    )
    for step in range(STEPS):
        accumulate(optimizer, wrapped, [part(images(step), rank)])
    return left(optimizer, model)


@covering(name=RECIPES, when=["before", "after"], placement=PLACEMENTS, options=OPTIONS)
def test_half_batches_equal_one_process_with_the_whole(
    name: str, when: str, placement: str, options: str
) -> None:
    recipe = {**RECIPES[name], "placement": PLACEMENTS[placement]}
    ranks = shared_workers().run(2, wrapped_run, when, OPTIONS[options], recipe)
    truth = one_process(([images(step)] for step in range(STEPS)), **EACH, **RECIPES[name])
    check(ranks, truth, placement)


def accumulated_runs(
    rank: int, options: dict[str, Any], recipe: dict[str, Any]
) -> dict[str, Tensor]:
    model = mixed()
    wrapped, optimizer = wrap(model, "after", options, recipe)
    for step in range(STEPS):
        accumulate(
            optimizer, wrapped, [part(images(3 * step + number), rank) for number in range(3)]
        )
    return left(optimizer, model)


@covering(strength=1, options=["plain", "bucket view", "find unused"], placement=PLACEMENTS)
def test_accumulation_without_synchronisation_counts_all_micro_batches(
    options: str, placement: str
) -> None:
    recipe = {"basis": "ekfac", "update": "momentum"}
    ranks = shared_workers().run(
        2, accumulated_runs, OPTIONS[options], {**recipe, "placement": PLACEMENTS[placement]}
    )
    truth = one_process(
        ([images(3 * step + number) for number in range(3)] for step in range(STEPS)),
        **EACH,
        **recipe,
    )
    check(ranks, truth, placement)


def compressed_run(
    rank: int, compressed: bool, placement: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the first step, and what one and three steps leave behind."""
    model = mixed()
    wrapped, optimizer = wrap(model, "after", {}, {"update": "adam", "placement": placement})
    if compressed:
        wrapped.register_comm_hook(dist.group.WORLD, default_hooks.bf16_compress_hook)
    accumulate(optimizer, wrapped, [part(images(0), rank)])
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    first = left(optimizer, model)
    for step in (1, 2):
        accumulate(optimizer, wrapped, [part(images(step), rank)])
    return gradients, first, left(optimizer, model)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_communication_hook_changes_gradients_and_nothing_else(placement: str) -> None:
    with_hook = shared_workers().run(2, compressed_run, True, PLACEMENTS[placement])
    without = shared_workers().run(2, compressed_run, False, PLACEMENTS[placement])
    gradients, first, _ = with_hook[0]
    for (_, ours, _), (_, plain, _) in zip(with_hook, without, strict=True):
        curvature = {name for name in ours if " kfactk." in name}
        assert curvature
        assert_same(
            {name: ours[name] for name in curvature}, {name: plain[name] for name in curvature}
        )
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradient.bfloat16().double()), "the hook was in use"
        assert not torch.equal(gradient, without[0][0][name])
    assert_same(several(with_hook[0][2], placement), several(with_hook[1][2], placement))

    model = mixed()
    optimizer = bound(model, update="adam", **EACH)
    loss_of(model, images(0)).backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name]
    optimizer.step()
    expected = several(left(optimizer, model, decompositions=False), placement)
    assert_near({name: first[name] for name in expected}, expected)


# ------------------------------------------------------------------------------------ checkpointing


class Checkpointed(Mixed):
    """Recomputes its middle in the backward pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        if self.how == "sequential":
            parts = nn.Sequential(
                self.grouped,
                self.norm,
                nn.Tanh(),
                nn.Flatten(),
                self.frozen,
                nn.Tanh(),
                self.hidden,
                nn.Tanh(),
                self.out,
            )
            return checkpoint_sequential(parts, 2, x, use_reentrant=False)
        return checkpoint(self.rest, x, use_reentrant=self.how == "reentrant")

    def rest(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.grouped(x)))
        return self.out(torch.tanh(self.hidden(torch.tanh(self.frozen(x.flatten(1))))))


def checkpointed(how: str) -> Checkpointed:
    model = Checkpointed(how).double()
    model.load_state_dict(mixed().state_dict())
    return model


def checkpointed_run(
    rank: int, how: str, options: dict[str, Any], recipe: dict[str, Any]
) -> dict[str, Tensor]:
    model = checkpointed(how)
    wrapped, optimizer = wrap(model, "after", options, recipe)
    for step in range(STEPS):
        accumulate(optimizer, wrapped, [part(images(step), rank)])
    return left(optimizer, model)


@covering(how=["not reentrant", "sequential"], fisher=["exact", "empirical"], options=OPTIONS)
def test_checkpointing_under_wrappers(how: str, fisher: str, options: str) -> None:
    ranks = shared_workers().run(2, checkpointed_run, how, OPTIONS[options], {"fisher": fisher})
    truth = one_process(([images(step)] for step in range(STEPS)), fisher=fisher, **EACH)
    check(ranks, truth, "replicated")


def refused_when_reentrant(rank: int, options: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """The message, and what training leaves behind once the remedy is taken."""
    model = checkpointed("reentrant")
    wrapped, optimizer = wrap(model, "after", options, {})
    with pytest.raises(CaptureError) as caught:
        loss_of(wrapped, part(images(0), rank))
    model.how = "not reentrant"
    optimizer.close()
    wrapped, optimizer = wrap(model, "after", options, {})
    for step in range(STEPS):
        accumulate(optimizer, wrapped, [part(images(step), rank)])
    return str(caught.value), left(optimizer, model)


@pytest.mark.parametrize("options", ["plain", "static graph"])
def test_reentrant_checkpointing_is_refused_on_every_rank_and_its_remedy_works(
    options: str,
) -> None:
    ranks = shared_workers().run(2, refused_when_reentrant, OPTIONS[options])
    assert all("use_reentrant=False" in message for message, _ in ranks)
    check(
        [found for _, found in ranks],
        one_process(([images(step)] for step in range(STEPS)), **EACH),
        "replicated",
    )


# ----------------------------------------------------------------------------------- several models


def two_models(rank: int, recipe: dict[str, Any]) -> dict[str, Tensor]:
    """Ranks 0 and 1 share one model, 2 and 3 another, with other data."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number, place = divmod(rank, 2)
    model = mixed()
    wrapped = DistributedDataParallel(model, process_group=pairs[number])
    optimizer = bound(
        wrapped, placement={"name": "replicated", "process_group": pairs[number]}, **EACH, **recipe
    )
    for step in range(STEPS - number):  # the pairs need not even keep step
        accumulate(optimizer, wrapped, [part(images(10 * number + step), place)])
    return left(optimizer, model)


def test_a_process_group_keeps_models_apart() -> None:
    ranks = shared_workers().run(4, two_models, {"update": "momentum"})
    for number in range(2):
        truth = one_process(
            ([images(10 * number + step)] for step in range(STEPS - number)),
            update="momentum",
            **EACH,
        )
        check(ranks[2 * number : 2 * number + 2], truth, "replicated")
