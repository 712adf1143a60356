"""After a stated number of skipped batches in a row, skipping is an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfactk
from kfactk import KfactkError, Optimizer, OptionError
from kfactk.optim import nonfinite
from tests.kfactk.ordinary import batches, bound, net, spoil, train
from tests.kfactk.small import assert_equal, values

NAN = float("nan")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def steps_until_error(
    optimizer: Optimizer, model: nn.Module, pattern: str, match: str
) -> int | None:
    """Train on good (".") and bad ("x") batches; return after which one there is an error."""
    [data] = batches(1)
    for count, kind in enumerate(pattern, 1):
        if kind == ".":
            train(optimizer, model, data)
            continue
        before = values(model)
        try:
            train(optimizer, model, data, spoil(NAN))
        except KfactkError as error:
            assert_equal(before, values(model))
            with pytest.raises(KfactkError, match=match):
                raise error from None
            return count
    return None


PATTERNS: list[tuple[dict[str, Any], str, int | None]] = [
    ({}, "." + "x" * 300, 21),
    ({}, "x" * 300, 20),
    ({}, ("x" * 19 + ".") * 3, None),
    ({"max_skipped": 3}, ".xx.x.xx.xxx", 12),
    ({"max_skipped": 1}, "...x", 4),
    ({"max_skipped": None}, "x" * 60, None),
]


@pytest.mark.parametrize("often", [True, False])
@pytest.mark.parametrize(("recipe", "pattern", "expected"), PATTERNS)
def test_so_many_in_a_row(
    recipe: dict[str, Any], pattern: str, expected: int | None, often: bool
) -> None:
    model = net()
    optimizer = bound(model, **(recipe | ({"factor_every": 1} if often else {})))
    limit = recipe.get("max_skipped", 20)
    match = rf"^{limit} steps in a row were not taken, .*parameters are finite.*max_skipped={limit}"
    assert steps_until_error(optimizer, model, pattern, match) == expected
    assert optimizer.steps == (expected or len(pattern))
    assert optimizer.counters["skipped_batches"] == pattern[:expected].count("x")


def test_training_may_go_on_after_the_error() -> None:
    model, [data] = net(), batches(1)
    optimizer = bound(model, max_skipped=2)
    assert steps_until_error(optimizer, model, ".xx", "2 steps in a row") == 3
    assert steps_until_error(optimizer, model, "x", "3 steps in a row") == 1
    train(optimizer, model, data)
    assert steps_until_error(optimizer, model, ".x.xx", "2 steps in a row") == 5


def test_parameters_that_are_lost_are_told() -> None:
    model = net()
    optimizer = bound(model, max_skipped=2)
    train(optimizer, model, batches(1)[0])
    with torch.no_grad():
        model[5].bias[0] = NAN
    [data] = batches(1)
    train(optimizer, model, data)
    with pytest.raises(KfactkError, match=r"parameters hold NaN or inf themselves: load an earl"):
        train(optimizer, model, data)


@pytest.mark.parametrize("factor_every", [1, 3])
def test_curvature_that_is_skipped_each_time(factor_every: int) -> None:
    """Steps are taken, and only their statistics are bad: plain gradients for ever.

    What was skipped is due again in the next step.
    """
    model = nn.Linear(4, 3)
    optimizer = kfactk.build(
        max_skipped=5,
        factor_every=factor_every,
        basis="kfac",
        basis_every=factor_every,
        output=lambda logits: logits * NAN,
        lr=1e-3,
    ).bind(model)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    for _ in range(4):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(KfactkError, match="the curvature of 5 batches in a row was skipped"):
        optimizer.step()
    assert optimizer.steps == 5


@pytest.mark.parametrize(
    ("limit", "pattern", "latest"),
    [(4, ".." + "x" * 50, 10), (4, ".." + "xxx." * 20, None), (None, ".." + "x" * 50, None)],
)
def test_where_the_device_skips_by_itself(
    limit: int | None, pattern: str, latest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for it after so many steps at the latest."""
    monkeypatch.setattr(nonfinite, "DEVICES", frozenset({"cpu"}))
    model = net()
    optimizer = bound(model, max_skipped=limit)
    found = steps_until_error(optimizer, model, pattern, r"steps in a row were not taken")
    if latest is None:
        assert found is None
    else:
        assert found is not None
        assert 6 <= found <= latest


def test_what_a_gradient_scaler_skips_does_not_count() -> None:
    """It does not call `step` then."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = kfactk.build(max_skipped=3, lr=1e-3).bind(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1000)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = model(x)
        scaler.scale(F.cross_entropy(out.float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**40  # more than 20 were skipped
    assert 0 < optimizer.steps < 40
    assert optimizer.counters["skipped_batches"] == 0


@pytest.mark.parametrize("update", ["sgd", "adam"])
def test_a_direction_that_overflows_in_the_parameters_precision(update: str) -> None:
    """It is finite in float32, and inf in float16."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).half()
    optimizer = kfactk.build(
        likelihood="gaussian", update=update, clip="none", lr=1e-3, damping=1e-3
    ).bind(model)
    before = values(model)
    F.mse_loss(model(torch.rand(8, 4).half() * 0.02).float(), torch.full((8, 1), 1e4)).backward()
    assert model.weight.grad is not None
    assert bool(model.weight.grad.isfinite().all())
    optimizer.step()
    assert_equal(before, values(model))
    assert optimizer.counters["skipped_batches"] == 1


@pytest.mark.parametrize("given", [0, -1, 2.5, True, "many"])
def test_what_it_may_be(given: Any) -> None:
    with pytest.raises(OptionError, match=r"max_skipped=.* whole number of at least 1 or None"):
        kfactk.build(max_skipped=given)
