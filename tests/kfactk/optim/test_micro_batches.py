"""The forwards that count in a step: each is measured once, and too many are told of."""

from __future__ import annotations

import warnings

import pytest

import kfactk.optim.micro_batches as module
from kfactk import CaptureError, KfactkWarning
from tests.kfactk.small import batch, bound, net, train


def test_an_optimizer_that_does_not_step_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY_FORWARDS", 5)
    model, (x, _) = net(), batch()
    optimizer = bound(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model(x)
    with pytest.warns(KfactkWarning, match=r"^5 forwards were counted since the last step\(\)"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            model(x)
        train(optimizer, model, batch())
        for _ in range(10):
            model(x)


def test_forwards_that_are_stepped_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY_FORWARDS", 5)
    model, data = net(), batch()
    optimizer = bound(model, factor_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            for _ in range(3):
                model(data[0])
            train(optimizer, model, data)


def test_forwards_are_numbered_until_the_step() -> None:
    model, data = net(), batch()
    optimizer = bound(model, factor_every=1)
    forwards = optimizer._micro_batches
    for number in range(1, 4):
        model(data[0])
        assert forwards.measured == number
    train(optimizer, model, data)
    assert forwards.measured == 0


def test_a_forward_waits_for_observe_and_counts_once() -> None:
    model, data = net(), batch()
    optimizer = bound(model, factor_every=1, observe="manual")
    model(data[0])
    assert optimizer._micro_batches.measured == 0
    optimizer.observe()
    assert optimizer._micro_batches.measured == 1
    with pytest.raises(CaptureError, match="no forward since the last step"):
        optimizer.observe()
