"""On ordinary steps the host does not wait for the device.

A CPU stands in for the device: the same code runs on it, and the test sees what the host reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfactk
from kfactk import Optimizer
from kfactk.optim import nonfinite
from kfactk_stages.clip.kl import KlClip
from tests.kfactk.ordinary import UPDATES, batches, bound, net, train
from tests.kfactk.small import values

BASES: dict[str, Any] = {
    "kfac": {"basis": "kfac"},
    "ekfac": {"basis": "ekfac"},
    "ekfac, bfloat16": {"basis": {"name": "ekfac", "products": "bfloat16"}},
    "ekfac, channels": {"basis": {"name": "ekfac", "inputs": "channels"}},
    "ekfac, stationary": {
        "basis": {"name": "ekfac", "inputs": "channels+taps"},
        "curvature": {"name": "conv_kfac", "spatial": "stationary"},
    },
    "ekfac, running": {"basis": {"name": "ekfac", "scale": "running"}, "fisher": "empirical"},
}
CLIPS = ("none", "value", "norm", "kl", "trust_region")


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "DEVICES", frozenset({"cpu"}))


class Reads(TorchDispatchMode):
    """Notes operations for which the host waits, and tensors made of the host's numbers.

    Args:
        on_host: A tensor that is the host's own, on whatever device the model is.
    """

    WAITING = frozenset(
        {
            "_local_scalar_dense",
            "is_nonzero",
            "item",
            "equal",
            "nonzero",
            "masked_select",
            "allclose",
            "_unique2",
        }
    )
    MADE = frozenset({"lift_fresh", "lift"})

    def __init__(self, on_host: Tensor) -> None:
        super().__init__()
        self._on_host, self.seen = on_host, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        own = (
            bool(args)
            and isinstance(args[0], Tensor)
            and args[0].data_ptr() == self._on_host.data_ptr()
        )
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(
            place is not None and place.dtype in (torch.bool, torch.uint8) for place in places
        )
        counted = name == "repeat_interleave" and isinstance(args[-1], Tensor)
        if (name in self.WAITING | self.MADE and not own) or masked or counted:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a CPU's tensor gives away without an operation is watched for by name."""
    with monkeypatch.context() as patch, Reads(optimizer._step) as reads:
        for name in ("tolist", "numpy"):
            patch.setattr(Tensor, name, _noting(reads.seen, name))
        yield reads.seen


def _noting(seen: list[str], name: str) -> Callable[..., Any]:
    original = getattr(Tensor, name)

    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return original(self, *args, **kwargs)

    return call


RECIPES = (
    {
        f"{update}, {clip}": {"update": UPDATES[update], "clip": clip}
        for update in UPDATES
        for clip in CLIPS
    }
    | {
        f"{name}, {clip}": {**BASES[name], "clip": clip}
        for name in BASES
        for clip in ("none", "kl")
    }
    | {
        "two learning rates": {"clip": "kl"},
        "decay at the gradient": {"weight_decay_at": "gradient"},
        "staggered": {"stagger": True},
        "adagrad": {"update": torch.optim.Adagrad, "options": {"fused": True}},
        "damping that moves": {"damping": lambda step: 0.1 / (1 + step)},
    }
)


def recipe_of(name: str) -> dict[str, Any]:
    recipe = dict(RECIPES[name])
    if options := recipe.pop("options", None):
        recipe["update"] = kfactk.TorchOptimizer(recipe["update"], options)
    return recipe


def groups_of(name: str, model: nn.Module) -> Any:
    if name != "two learning rates":
        return None
    return [
        {"params": list(model[:3].parameters())},
        {"params": list(model[3:].parameters()), "lr": 0.003},
    ]


@pytest.mark.usefixtures("deferring")
@pytest.mark.parametrize("name", RECIPES)
def test_an_ordinary_step_reads_nothing_of_the_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does its forward and backward pass; the first one after the refresh included."""
    model = net()
    optimizer = bound(model, groups_of(name, model), **recipe_of(name))
    warm = 2 if name == "staggered" else 1
    for data in batches(warm):
        train(optimizer, model, data)
    before = values(model)
    with watched(optimizer, monkeypatch) as seen:
        for data in batches(3):
            train(optimizer, model, data)
    assert not seen
    assert all(not torch.equal(old, new) for old, new in zip(before, values(model), strict=True))


@pytest.mark.usefixtures("deferring")
def test_what_the_host_reads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(KlClip):
        def clip(self, pairs: Any, dot: Any) -> Any:
            found, factor = super().clip(pairs, dot)
            return (found, factor) if float(factor) > 0 else ([], factor)

    cases: dict[str, dict[str, Any]] = {
        "a clip": {"clip": Reading()},
        "an update rule that cannot skip": {"update": "adam"},
        "statistics that are due": {"factor_every": 1},
    }
    for case, recipe in cases.items():
        model = net()
        optimizer = bound(model, **recipe)
        train(optimizer, model, batches(1)[0])
        with watched(optimizer, monkeypatch) as seen:
            train(optimizer, model, batches(1)[0])
        assert seen, case
    x = torch.tensor([1.0, 0.0])
    for read in (
        lambda: x.tolist(),
        lambda: bool(x.any()),
        lambda: x[x > 0],
        lambda: torch.tensor(1.0),
        lambda: torch.equal(x, x),
    ):
        with watched(optimizer, monkeypatch) as seen:
            read()
        assert seen


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_an_ordinary_step_does_not_wait_for_a_real_device(name: str) -> None:
    model = net().cuda()
    optimizer = bound(model, groups_of(name, model), **recipe_of(name))
    data = [(x.cuda(), y.cuda()) for x, y in batches(5)]
    warm = 2 if name == "staggered" else 1
    for each in data[:warm]:
        train(optimizer, model, each)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in data[warm:]:
            train(optimizer, model, each)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.counters["skipped_batches"] == 0
