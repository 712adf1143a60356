"""The device skips a batch that is not finite, and the host counts it when it reads.

A CPU stands in for the device; that nothing is read on it is in test_nonfinite_waiting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kfactk import KfactkWarning, Optimizer
from kfactk.distributed.communicator import Communicator
from kfactk.optim import nonfinite
from kfactk.optim.nonfinite import NonFiniteGuard
from kfactk_stages.clip.none import NoClip
from tests.kfactk.ordinary import UPDATES, batches, bound, everything, net, spoil, train
from tests.kfactk.small import assert_equal

KINDS = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "DEVICES", frozenset({"cpu"}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.usefixtures("deferring")
def test_a_batch_that_is_not_finite_might_as_well_not_have_been(
    update: str, kind: str, layer: int
) -> None:
    """Bit for bit, against a run that never saw it, in parameters with a block and without."""
    good = batches(6)
    model, other = net(), net()
    optimizer, twin = (bound(each, update=UPDATES[update]) for each in (model, other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, data in enumerate(good):
            if step in (3, 4):
                buffers = [buffer.clone() for buffer in model.buffers()]
                train(optimizer, model, good[0], spoil(KINDS[kind], layer))
                for buffer, kept in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(kept)  # running statistics of BatchNorm are the model's own
                assert not bool(torch.isfinite(model[layer].weight.grad).all()), (
                    "the user's gradient is as it was"
                )
            train(optimizer, model, data)
            train(twin, other, data)
    assert_equal(everything(optimizer, model), everything(twin, other))
    assert (optimizer.steps, twin.steps) == (8, 6)
    with pytest.warns(
        KfactkWarning, match="a batch gave NaN or inf in its gradient, and its step was not taken"
    ):
        assert optimizer.counters == {"skipped_batches": 2, "failed_decompositions": 0}
    assert optimizer.counters["skipped_batches"] == 2
    assert twin.counters["skipped_batches"] == 0


@pytest.mark.parametrize("update", UPDATES)
def test_good_batches_are_taken_as_they_are_when_the_host_waits(
    update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(nonfinite, "DEVICES", frozenset(devices))
        model = net()
        optimizer = bound(
            model, update=UPDATES[update], clip="norm", factor_every=2, scale_every=2, basis_every=4
        )
        for data in batches(7):
            train(optimizer, model, data)
        found.append(everything(optimizer, model))
    assert_equal(*found)


class Exploding(NoClip):
    """Without bounds while `on`."""

    on = False

    def clip(self, pairs: Any, dot: Any) -> Any:
        return [
            pair.preconditioned * (float("inf") if type(self).on else 1.0) for pair in pairs
        ], torch.ones(())


@pytest.mark.usefixtures("deferring")
def test_a_direction_that_is_not_finite_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net(), batches(4)
    optimizer = bound(model, clip=Exploding())
    train(optimizer, model, data[0])
    before = [each.clone() for each in everything(optimizer, model)]
    monkeypatch.setattr(Exploding, "on", True)
    train(optimizer, model, data[1])
    train(optimizer, model, data[2])
    assert_equal(before, everything(optimizer, model))
    with pytest.warns(KfactkWarning) as said:
        assert optimizer.counters["skipped_batches"] == 2
    assert [
        "the gradient is finite, and its preconditioned" in str(each.message) for each in said
    ] == [True]
    train(optimizer, model, data[3], spoil(float("nan")))
    with pytest.warns(KfactkWarning) as said:
        assert optimizer.counters["skipped_batches"] == 3
    assert ["NaN or inf in its gradient" in str(each.message) for each in said] == [True]


READERS: dict[str, Callable[[Optimizer], object]] = {
    "counters": lambda optimizer: optimizer.counters,
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "close": lambda optimizer: optimizer.close(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.usefixtures("deferring")
def test_it_is_told_when_somebody_asks(reader: str) -> None:
    model, data = net(), batches(3)
    optimizer = bound(model)
    train(optimizer, model, data[0])
    train(optimizer, model, data[1], spoil(float("nan")))
    with pytest.warns(KfactkWarning, match="NaN or inf in its gradient"):
        READERS[reader](optimizer)
    assert optimizer.counters["skipped_batches"] == 1


@pytest.mark.usefixtures("deferring")
def test_it_is_told_at_the_next_step_that_has_something_due() -> None:
    model, data = net(), batches(6)
    optimizer = bound(model, factor_every=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, model, data[0])
        for each in data[1:4]:
            train(optimizer, model, each, spoil(float("nan")))
    with pytest.warns(KfactkWarning, match="NaN or inf in its gradient"):
        train(optimizer, model, data[4])
    assert optimizer.counters["skipped_batches"] == 3


@pytest.mark.usefixtures("deferring")
def test_all_that_was_skipped_is_counted_where_warnings_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = net(), batches(3)
    optimizer = bound(model, clip=Exploding())
    train(optimizer, model, data[0])
    train(optimizer, model, data[1], spoil(float("nan")))
    monkeypatch.setattr(Exploding, "on", True)
    train(optimizer, model, data[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KfactkWarning):
            optimizer.close()
    assert optimizer.counters["skipped_batches"] == 2


@pytest.mark.usefixtures("deferring")
def test_a_state_that_is_made_in_a_bad_step_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A momentum buffer that the fused kernel did not fill holds whatever was in memory."""
    model, other = net(), net()
    found = []
    for each, spoilt in ((model, True), (other, False)):
        groups = [
            {"params": [p for i in (0, 3, 5) for p in each[i].parameters()]},
            {"params": list(each[1].parameters())},
        ]
        optimizer = bound(each, groups, update=UPDATES["momentum"])
        each[1].requires_grad_(False)
        for data in batches(2):
            train(optimizer, each, data)
        each[1].requires_grad_(True)
        buffers = [buffer.clone() for buffer in each.buffers()]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, 1e30))
            if spoilt:
                with pytest.warns(KfactkWarning, match="NaN or inf in its gradient"):
                    train(optimizer, each, batches(1)[0], spoil(float("nan"), layer=1))
                for buffer, kept in zip(each.buffers(), buffers, strict=True):
                    buffer.copy_(kept)
            for data in batches(2):
                train(optimizer, each, data)
        found.append(everything(optimizer, each))
    assert_equal(*found)


@pytest.mark.usefixtures("deferring")
def test_a_rule_that_fails_leaves_no_verdict_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net(), batches(3)
    optimizer = bound(model)
    train(optimizer, model, data[0])

    def fail() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._inner, "step", fail)
        with pytest.raises(MemoryError):
            train(optimizer, model, data[1], spoil(float("nan")))
    assert not hasattr(optimizer._inner, "found_inf")
    assert optimizer.counters["skipped_batches"] == 0
    train(optimizer, model, data[2])


@pytest.mark.gpu
@pytest.mark.parametrize("update", UPDATES)
def test_a_real_device_skips(update: str) -> None:
    model = net().cuda()
    optimizer = bound(model, update=UPDATES[update])
    data = [(x.cuda(), y.cuda()) for x, y in batches(4)]
    train(optimizer, model, data[0])
    train(optimizer, model, data[1])
    before = [each.clone() for each in everything(optimizer, model)]
    train(optimizer, model, data[2], spoil(float("nan")))
    assert_equal(before, everything(optimizer, model))
    with pytest.warns(KfactkWarning, match="its step was not taken"):
        assert optimizer.counters["skipped_batches"] == 1


# ------------------------------------------------------------------------ who is left to the device


class Own(torch.optim.SGD):
    """May do anything in its step."""


@attrs.define
class Counter:
    """What the guard asks of the preconditioner."""

    due: bool
    communicator: Communicator = attrs.Factory(Communicator)
    skipped: dict[str, int] = attrs.Factory(dict)

    def nonfinite(self) -> bool:
        return False

    def skip(self, faults: dict[str, int]) -> None:
        self.skipped |= faults


def judged(rule: torch.optim.Optimizer, *, reading: bool = False) -> bool:
    """Whether the device is left to judge."""
    gradients = [
        p.grad for group in rule.param_groups for p in group["params"] if p.grad is not None
    ]
    counter = Counter(due=reading)
    verdict = NonFiniteGuard(rule, counter).judge(gradients, [], recorded=True)
    assert (verdict.stepping, verdict.recorded, verdict.fault) == (True, True, "")
    assert not counter.skipped
    return not isinstance(verdict.around, nullcontext)


def with_gradient(tensor: Tensor, gradient: Tensor | None = None) -> nn.Parameter:
    parameter = nn.Parameter(tensor)
    parameter.grad = torch.ones_like(tensor) if gradient is None else gradient
    return parameter


@pytest.mark.usefixtures("deferring")
def test_only_what_can_skip_is_left_to_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parameter = with_gradient(torch.ones(2))
    fused = torch.optim.SGD([parameter], lr=0.1, fused=True)
    assert judged(fused)
    assert not judged(fused, reading=True)
    assert not judged(torch.optim.SGD([parameter], lr=0.1))
    assert not judged(Own([parameter], lr=0.1, fused=True))
    assert not judged(torch.optim.RAdam([parameter], lr=0.1))
    mixed = torch.optim.SGD(
        [{"params": [parameter]}, {"params": [with_gradient(torch.ones(2))], "fused": False}],
        lr=0.1,
        fused=True,
    )
    assert not judged(mixed)
    adam = torch.optim.Adam([parameter], lr=0.1, fused=True)
    assert not judged(adam), "its state is yet to be made"
    adam.step()
    assert judged(adam)
    assert not judged(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, fused=True)), (
        "nothing has a gradient"
    )
    assert not judged(torch.optim.SGD([with_gradient(torch.ones(0))], lr=0.1, fused=True))
    sparse = nn.Embedding(3, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    assert not judged(torch.optim.SGD(sparse.parameters(), lr=0.1, fused=True))
    elsewhere = with_gradient(torch.ones(2, device="meta"))
    assert not judged(torch.optim.SGD([parameter, elsewhere], lr=0.1, fused=True)), "two devices"
    monkeypatch.setattr(nonfinite, "DEVICES", frozenset({"cuda"}))
    assert not judged(fused), "this device waits for nobody"
    monkeypatch.setattr(nonfinite, "DEVICES", frozenset({"cpu"}))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shard, gradient = (distribute_tensor(torch.ones(2), mesh, [Shard(0)]) for _ in range(2))
        assert not judged(torch.optim.SGD([with_gradient(shard, gradient)], lr=0.1, fused=True))
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("deferring")
def test_a_loaded_state_decides_whether_the_rule_is_fused() -> None:
    model, data = net(), batches(3)
    plain = bound(model, update="adam")
    train(plain, model, data[0])
    other = net()
    optimizer = bound(other)
    optimizer.load_state_dict(plain.state_dict())
    assert not optimizer.param_groups[0]["fused"]
    for each in data[1:]:
        train(optimizer, other, each)
