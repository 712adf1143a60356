"""A profile divides steps among stages without remainder; without a profile it costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import kfactk
from kfactk import KfactkError, Profile
from kfactk.optim.metrics import MetricsRecorder
from tests.kfactk.optim.test_metrics import Listener
from tests.kfactk.small import batch, bound, net, train

STAGES = {"fisher", "factors", "scale", "basis", "precondition", "clip", "update"}
PERIODS = {"factor_every": 2, "scale_every": 3, "basis_every": 6}


class Clock:
    """Moves only when told to, by whole seconds."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("kfactk.optim.profile.Profile.now", lambda self: found())
    return found


def profiled(steps: int, **recipe: Any) -> Profile:
    model = net()
    optimizer = bound(model, **recipe)
    with optimizer.profile() as profile:
        for _ in range(steps):
            train(optimizer, model, batch())
    return profile


def test_stages_count_in_the_steps_in_which_they_are_due() -> None:
    profile = profiled(8, basis="ekfac", **PERIODS)
    factors, scale, basis = {0, 2, 4, 6}, {0, 3, 6}, {0, 6}
    for number, step in enumerate(profile.steps):
        ran = set(step) - {"model", "rest"}
        due = {"precondition", "clip", "update"}
        due |= {"factors"} if number in factors else set()
        due |= {"scale"} if number in scale | basis else set()
        due |= {"basis"} if number in basis else set()
        due |= {"fisher"} if number in factors | scale | basis else set()
        assert ran == due, number
    every = dict.fromkeys(("precondition", "clip", "update", "model", "rest"), 8)
    assert profile.counts == {"fisher": 5, "factors": 4, "scale": 3, "basis": 2, **every}


def test_stages_stand_in_the_order_in_which_they_begin() -> None:
    found = list(profiled(2, basis="ekfac", **PERIODS).seconds)
    assert found == [
        "fisher",
        "factors",
        "basis",
        "scale",
        "precondition",
        "clip",
        "update",
        "model",
        "rest",
    ]


def test_a_basis_without_moments_has_no_scale() -> None:
    assert set(profiled(2, basis="kfac").seconds) == STAGES - {"scale"} | {"model", "rest"}


def test_steps_are_divided_without_remainder() -> None:
    profile = profiled(4, **PERIODS)
    assert all(taken >= 0 for step in profile.steps for taken in step.values())
    assert profile.whole == pytest.approx(sum(profile.seconds.values()))
    for stage, taken in profile.seconds.items():
        assert taken == pytest.approx(sum(step.get(stage, 0.0) for step in profile.steps))
        assert profile.worst[stage] == max(step.get(stage, 0.0) for step in profile.steps)


def test_seconds_are_those_of_the_clock(clock: Clock) -> None:
    recorder, optimizer = MetricsRecorder(None, dict), torch.optim.SGD(net().parameters())
    with recorder.profiled(optimizer) as profile:
        clock.time += 1  # forward
        with recorder.timed("fisher"):
            clock.time += 2
            with recorder.timed("factors"):
                clock.time += 4
        clock.time += 8  # backward
        optimizer.step()
        with recorder.timed("factors"):
            clock.time += 16
        clock.time += 32
        recorder.finish(0, dict)
    assert profile.steps == ({"fisher": 2.0, "factors": 20.0, "model": 9.0, "rest": 32.0},)
    assert profile.whole == clock.time


def nonzero(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: taken for stage, taken in seconds.items() if taken}


NESTED = st.recursive(
    st.just([]),
    lambda inner: st.lists(
        st.tuples(st.sampled_from(sorted(STAGES)), st.integers(0, 9), inner), max_size=3
    ),
)


@given(st.lists(st.tuples(st.integers(0, 9), NESTED, st.integers(0, 9), NESTED), max_size=4))
def test_the_sum_is_the_whole_however_stages_are_nested(steps: list[Any]) -> None:
    """Each second counts for the innermost open stage, for the loop, or for `step()`.

    The truth is an account that is kept beside.
    """
    clock, account = Clock(), dict.fromkeys([*STAGES, "model", "rest"], 0.0)

    def run(blocks: Any) -> None:
        for stage, seconds, inner in blocks:
            with recorder.timed(stage):
                clock.time += seconds
                account[stage] += seconds
                run(inner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfactk.optim.profile.Profile.now", lambda self: clock())
        recorder, optimizer = MetricsRecorder(None, dict), torch.optim.SGD(net().parameters())
        with recorder.profiled(optimizer) as profile:
            for number, (before, outside, within, inside) in enumerate(steps):
                clock.time += before
                run(outside)
                optimizer.step()
                clock.time += within
                run(inside)
                recorder.finish(number, dict)
                account["model"] += before
                account["rest"] += within
    assert profile.whole == clock.time
    assert nonzero(profile.seconds) == nonzero(account)


def test_a_profile_within_a_profile_is_refused() -> None:
    optimizer = bound(net())
    with (
        optimizer.profile(),
        pytest.raises(KfactkError, match="profiled already"),
        optimizer.profile(),
    ):
        pass
    with optimizer.profile() as profile:  # the first was left
        pass
    assert str(profile) == "no steps"


def test_profiles_end_with_their_block(clock: Clock) -> None:
    model = net()
    optimizer = bound(model)
    with pytest.raises(IndexError), optimizer.profile() as profile:  # noqa: PT012
        train(optimizer, model, batch())
        raise IndexError
    train(optimizer, model, batch())
    assert len(profile.steps) == 1
    assert not optimizer._optimizer_step_pre_hooks


def test_a_profile_may_begin_between_forward_and_step() -> None:
    model, (x, y) = net(), batch()
    optimizer = bound(model)
    loss = nn.functional.cross_entropy(model(x), y)
    with optimizer.profile() as profile:
        loss.backward()
        optimizer.step()
    assert "fisher" not in profile.seconds
    assert "basis" in profile.seconds


def test_a_failed_step_is_part_of_the_next(clock: Clock) -> None:
    recorder, optimizer = MetricsRecorder(None, dict), torch.optim.SGD(net().parameters())
    with recorder.profiled(optimizer) as profile:
        with pytest.raises(IndexError), recorder.timed("clip"):  # noqa: PT012
            clock.time += 2
            raise IndexError
        recorder.forget()
        clock.time += 1
        optimizer.step()
        recorder.finish(0, dict)
    assert profile.steps == ({"clip": 2.0, "model": 1.0, "rest": 0.0},)


def test_nothing_is_timed_without_a_profile_or_a_tracker() -> None:
    recorder = MetricsRecorder(None, dict)
    assert recorder.timed("clip") is recorder.timed("fisher")
    assert not bound(net())._optimizer_step_pre_hooks


@pytest.mark.parametrize("tracker", [None, Listener()])
def test_profiled_steps_are_the_same_steps(tracker: Any) -> None:
    model, twin, data = net(), net(), batch()
    twin.load_state_dict(model.state_dict())
    for one in (model, twin):
        optimizer = bound(one, fisher="mc", tracker=tracker)
        if one is twin:
            with optimizer.profile() as profile:
                for _ in range(3):
                    train(optimizer, one, data)
            assert len(profile.steps) == 3
        else:
            for _ in range(3):
                train(optimizer, one, data)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_the_table_tells_mean_share_count_and_worst(clock: Clock) -> None:
    recorder, optimizer = MetricsRecorder(None, dict), torch.optim.SGD(net().parameters())
    with recorder.profiled(optimizer) as profile:
        for number, seconds in enumerate((3, 0, 1)):
            if seconds:
                with recorder.timed("scale"):
                    clock.time += seconds
            optimizer.step()
            clock.time += 4
            recorder.finish(number, dict)
    table = {line.split()[0]: line.split()[1:] for line in str(profile).splitlines()[1:]}
    assert table["scale"] == ["1333.333", "25.0%", "2", "3000.000"]
    assert table["rest"] == ["4000.000", "75.0%", "3", "4000.000"]
    assert table["step"][:4] == ["5333.333", "100.0%", "3", "7000.000"]


def test_accelerators_are_waited_for_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(str(device)))
    devices = [
        torch.device("cuda:1"),
        torch.device("cpu"),
        torch.device("cuda:0"),
        torch.device("cuda:1"),
    ]
    profile = Profile(devices)
    waited.clear()
    profile.now()
    assert waited == ["cuda:0", "cuda:1"]
    recorder, optimizer = MetricsRecorder(None, dict), torch.optim.SGD(net().parameters())
    with recorder.profiled(optimizer):
        waited.clear()
        with recorder.timed("clip"):
            assert not waited  # parameters are on the CPU


def test_profile_is_public() -> None:
    assert isinstance(kfactk.Profile(), Profile)
