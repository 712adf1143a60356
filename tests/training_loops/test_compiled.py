"""Compiled models on ranks, wrapped before or after, train as one process without compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kfactk import Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.covering import widening
from tests.kfactk.small import bound
from tests.training_loops.loops import (
    PLACEMENTS,
    Mixed,
    accumulate,
    assert_moved,
    assert_near,
    assert_same,
    images,
    left,
    mixed,
    one_process,
    part,
    several,
)

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = 8
RECIPE: dict[str, Any] = {
    "factor_every": 3,
    "scale_every": 3,
    "basis_every": 6,
    "update": "adam",
    "lr": 0.01,
}
Bind = Callable[[nn.Module], Optimizer]
Compile = Callable[..., Any]
WAYS: dict[str, Callable[[nn.Module, Bind, Compile], tuple[Optimizer, nn.Module]]] = {}
"""From a model, what binds and what compiles: the optimizer, and what the loop calls."""


def way(function: Callable[[nn.Module, Bind, Compile], tuple[Optimizer, nn.Module]]) -> None:
    WAYS[function.__name__.replace("_", " ")] = function


@way
def compiled_then_wrapped_then_bound(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    wrapped = DistributedDataParallel(compiled(model))
    return bind(wrapped), wrapped


@way
def compiled_whole_then_wrapped_then_bound(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    wrapped = DistributedDataParallel(compiled(model, fullgraph=True))
    return bind(wrapped), wrapped


@way
def compiled_then_wrapped_and_what_was_compiled_bound(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    inner = compiled(model)
    wrapped = DistributedDataParallel(inner)
    return bind(inner), wrapped


@way
def compiled_then_wrapped_and_the_bare_model_bound(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    wrapped = DistributedDataParallel(compiled(model))
    return bind(model), wrapped


@way
def bound_then_compiled_then_wrapped(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    return bind(model), DistributedDataParallel(compiled(model), static_graph=True)


@way
def wrapped_then_compiled_then_bound(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    called = compiled(DistributedDataParallel(model))
    return bind(called), called


@way
def a_static_graph_wrapped_then_compiled_then_bound(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    called = compiled(DistributedDataParallel(model, static_graph=True))
    return bind(called), called


@way
def wrapped_then_compiled_and_the_wrapper_bound(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    return bind(wrapped), compiled(wrapped)


@way
def wrapped_then_bound_then_compiled(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    wrapped = DistributedDataParallel(model)
    return bind(wrapped), compiled(wrapped)


@way
def wrapped_then_compiled_in_place(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    wrapped = DistributedDataParallel(model)
    wrapped.compile(backend=compiled(None))
    return bind(wrapped), wrapped


@way
def compiled_in_place_then_wrapped(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    model.compile(backend=compiled(None))
    wrapped = DistributedDataParallel(model)
    return bind(wrapped), wrapped


@way
def compiled_after_some_steps(
    model: nn.Module, bind: Bind, compiled: Compile
) -> tuple[Optimizer, nn.Module]:
    """The code is made, and made to run, before anything is bound."""
    wrapped = DistributedDataParallel(model)
    called = compiled(wrapped)
    for _ in range(2):
        called(images(0)[0]).sum().backward()
    model.zero_grad()
    return bind(wrapped), called


class Graphs:
    """A compiler that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.ran = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.ran += 1
            return module(*args)

        return run


def run(rank: int, model: Mixed, name: str, placement: Any) -> tuple[dict[str, Tensor], list[bool]]:
    """What is left, and in which steps compiled code ran."""
    graphs = Graphs()

    def compiled(module: nn.Module | None, **options: Any) -> Any:
        return graphs if module is None else torch.compile(module, backend=graphs, **options)

    torch._dynamo.reset()
    optimizer, called = WAYS[name](
        model, lambda bare: bound(bare, **RECIPE, placement=placement), compiled
    )
    ran = []
    for step in range(STEPS):
        before = graphs.ran
        accumulate(optimizer, called, [part(images(step), rank)])
        ran.append(graphs.ran > before)
    optimizer.close()
    return left(optimizer, model), ran


def compiled_run(rank: int, name: str, placement: Any) -> tuple[dict[str, Tensor], list[bool]]:
    return run(rank, mixed(), name, placement)


def check(ranks: list[tuple[dict[str, Tensor], list[bool]]], placement: str) -> None:
    optimizer, model = one_process(([images(step)] for step in range(STEPS)), **RECIPE)
    truth = several(left(optimizer, model, decompositions=False), placement)
    assert_moved(mixed(), truth)
    assert_same(several(ranks[0][0], placement), several(ranks[1][0], placement))
    assert_near({name: ranks[0][0][name] for name in truth}, truth)
    for _, ran in ranks:
        assert ran == [step % 3 > 0 for step in range(STEPS)], (
            "compiled code runs on the steps that are not due, and on these only"
        )


@pytest.mark.parametrize(
    "name",
    widening(
        WAYS,
        quick=[
            "compiled whole then wrapped then bound",
            "bound then compiled then wrapped",
            "wrapped then compiled then bound",
            "wrapped then bound then compiled",
            "compiled in place then wrapped",
            "compiled after some steps",
        ],
    ),
)
def test_a_compiled_model_on_ranks_trains_as_the_bare_one_alone(name: str) -> None:
    check(shared_workers().run(2, compiled_run, name, "replicated"), "replicated")


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name != "replicated"])
def test_wherever_the_work_is_placed(placement: str) -> None:
    check(
        shared_workers().run(
            2, compiled_run, "wrapped then compiled then bound", PLACEMENTS[placement]
        ),
        placement,
    )


class Parts(Mixed):
    """Of which some layers are compiled, one in place, and one is checkpointed."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(
            self.norm(checkpoint(self.grouped, torch.tanh(self.conv(x)), use_reentrant=False))
        )
        return self.out(torch.tanh(self.hidden(torch.tanh(self.frozen(x.flatten(1))))))


@way
def parts_compiled(model: nn.Module, bind: Bind, compiled: Compile) -> tuple[Optimizer, nn.Module]:
    model.conv.compile(backend=compiled(None))
    model.grouped.compile(backend=compiled(None))
    model.hidden.compile(backend=compiled(None))
    wrapped = DistributedDataParallel(model)
    return bind(wrapped), wrapped


def compiled_parts(rank: int) -> tuple[dict[str, Tensor], list[bool]]:
    model = Parts().double()
    model.load_state_dict(mixed().state_dict())
    return run(rank, model, "parts compiled", "replicated")


def test_parts_compiled_and_checkpointed() -> None:
    check(shared_workers().run(2, compiled_parts), "replicated")


def names_of(rank: int) -> list[str]:
    """Of one model that is wrapped, and of one whose wrapper is compiled."""
    found = []
    for called in (
        DistributedDataParallel(mixed()),
        torch.compile(DistributedDataParallel(mixed()), backend="eager"),
    ):
        optimizer = bound(called)
        found.append(" ".join(optimizer.layers))
        optimizer.close()
    return found


def test_a_wrapper_that_is_compiled_is_seen_through() -> None:
    assert shared_workers().run(2, names_of) == [["conv grouped hidden out"] * 2] * 2
