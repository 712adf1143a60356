"""A wrapper around the model changes nothing of what is captured.

Alone in its group, a wrapped model trains as the bare one does, bit for bit.

Ranks that share a batch are in `tests/training_loops`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kfactk
from kfactk import Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.small import bound
from tests.training_loops.loops import accumulate, assert_same, images, left, mixed, part

pytestmark = pytest.mark.xdist_group("ranks")

Found = tuple[dict[str, Tensor], dict[str, Tensor], list[str], list[str]]


def both(rank: int, when: str, options: dict[str, Any], micro: int) -> Found:
    """What is left of the wrapped model and of the bare one, and the names of their layers."""
    plain, inner = mixed(), mixed()
    optimizer: Optimizer | None = bound(inner, update="adam") if when == "before" else None
    wrapped: nn.Module = DistributedDataParallel(inner, **options)
    optimizer = bound(wrapped, update="adam") if optimizer is None else optimizer
    other = bound(plain, update="adam")
    for step in range(3):
        accumulate(
            optimizer, wrapped, [part(images(step), number, micro) for number in range(micro)]
        )
        accumulate(other, plain, [part(images(step), number, micro) for number in range(micro)])
    return left(optimizer, inner), left(other, plain), list(optimizer.layers), list(other.layers)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapper_changes_nothing(when: str, options: dict[str, Any]) -> None:
    [(ours, truth, names, expected)] = shared_workers().run(1, both, when, options, 1)
    assert_same(ours, truth)
    assert names == expected == ["conv", "grouped", "hidden", "out"], (
        "names are those of the wrapped model"
    )


@pytest.mark.parametrize(
    "options", [each for each in OPTIONS if "static_graph" not in each], ids=str
)
def test_accumulation_without_synchronisation(options: dict[str, Any]) -> None:
    """static_graph does without: torch has its first step synchronise."""
    [(ours, truth, _, _)] = shared_workers().run(1, both, "after", options, 3)
    assert_same(ours, truth)


def copied(rank: int) -> list[int]:
    """Count what forwards of a copy, and of the wrapped module itself, attach."""
    inner = mixed()
    wrapped = DistributedDataParallel(inner)
    optimizer = bound(wrapped, factor_every=1)
    twin = copy.deepcopy(inner)
    F.cross_entropy(twin(images(0)[0]), images(0)[1]).backward()
    followed = [len(twin.conv._forward_hooks)]
    inner.conv.register_forward_pre_hook(
        lambda module, args: followed.append(len(module._forward_hooks))
    )
    accumulate(optimizer, wrapped, [images(0)])
    accumulate(optimizer, inner, [images(1)])
    return [*followed, optimizer.steps]


def test_only_the_bound_model_is_followed_called_through_the_wrapper_or_not() -> None:
    assert shared_workers().run(1, copied) == [[0, 1, 1, 2]]


def foretold(rank: int) -> tuple[str, str, str]:
    """The table of a recipe before binding, for the wrapped model, and of the bound optimizer."""
    wrapped = DistributedDataParallel(mixed())
    recipe = kfactk.build()
    return (
        str(recipe.coverage(wrapped)),
        str(recipe.coverage(wrapped.module)),
        str(recipe.bind(wrapped).coverage()),
    )


def test_coverage_before_binding_is_that_of_the_wrapped_model() -> None:
    [(wrapped, bare, afterwards)] = shared_workers().run(1, foretold)
    assert wrapped == bare == afterwards
    with pytest.raises(kfactk.CombinationError, match=r"nn\.DataParallel"):
        kfactk.build().coverage(nn.DataParallel(mixed()))
