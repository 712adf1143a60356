import pytest
import torch
from hypothesis import given, settings, strategies as st

from kfactk.statistics import RunningMean

decays = st.one_of(st.sampled_from([0.0, 1.0, 0.95]), st.floats(0, 1))
values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)


@settings(deadline=None)
@given(values=values, steps=st.data())
def test_it_is_the_explicit_weighted_mean_whatever_the_decay_of_each_step(
    values: list[float], steps: st.DataObject
) -> None:
    mean = RunningMean()
    used = [steps.draw(decays) for _ in values]
    for value, decay in zip(values, used, strict=True):
        mean.update(torch.tensor(value, dtype=torch.float64), decay)
    weights = [
        float(torch.tensor(used[k + 1 :], dtype=torch.float64).prod()) for k in range(len(values))
    ]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert mean.value is not None
    assert mean.value.item() == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert mean.weight == pytest.approx(sum(weights))


@settings(deadline=None)
@given(constant=st.floats(-(2.0**100), 2.0**100, width=32), decay=decays, steps=st.integers(1, 20))
def test_the_mean_of_a_constant_is_that_constant_from_the_first_step_on(
    constant: float, decay: float, steps: int
) -> None:
    mean = RunningMean()
    for _ in range(steps):
        mean.update(torch.full((2, 3), constant), decay)
        assert torch.equal(mean.value, torch.full((2, 3), constant))


def test_decay_zero_keeps_the_last_value_and_forgets_even_nan() -> None:
    mean = RunningMean()
    for value in (1.0, float("nan"), 7.0):
        mean.update(torch.tensor(value), 0.0)
    assert mean.value == 7.0
    assert mean.weight == 1.0


def test_decay_one_is_the_arithmetic_mean() -> None:
    mean = RunningMean()
    values = torch.linspace(0, 3, 11, dtype=torch.float64)
    for value in values:
        mean.update(value, 1.0)
    torch.testing.assert_close(mean.value, values.mean())
    assert mean.weight == 11


def test_the_mean_owns_its_memory_and_its_precision_and_holds_no_graph() -> None:
    source = torch.ones(3, dtype=torch.float64, requires_grad=True)
    mean = RunningMean()
    mean.update(source, 0.9)
    kept = mean.value
    with torch.no_grad():
        source.add_(1)
    assert torch.equal(kept, torch.ones(3, dtype=torch.float64))
    for decay in (0.9, 0.0):
        mean.update(source.float(), decay)
        assert mean.value.dtype == torch.float64
        assert not mean.value.requires_grad
    assert torch.equal(kept, torch.ones(3, dtype=torch.float64)), (
        "an update must not write into a value handed out before"
    )


def test_replace_keeps_the_weight() -> None:
    mean = RunningMean()
    mean.update(torch.tensor(1.0), 1.0)
    mean.replace(torch.tensor(4.0))
    mean.update(torch.tensor(6.0), 1.0)
    assert mean.value == 5.0
    assert mean.weight == 2.0


def test_a_mean_without_a_value_starts_anew_whatever_its_weight() -> None:
    mean = RunningMean(weight=9.0)
    mean.update(torch.tensor(1.0), 1.0)
    mean.update(torch.tensor(3.0), 1.0)
    assert mean.value == 2.0


def test_a_mean_that_has_seen_nothing_weighs_nothing() -> None:
    assert (RunningMean().value, RunningMean().weight) == (None, 0.0)
