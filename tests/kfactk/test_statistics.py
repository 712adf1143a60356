"""Running means, and sums that are named, added, dropped and divided."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kfactk.samples import Statistic
from kfactk.statistics import (
    ReducedStatistic,
    RunningMean,
    add_prefix,
    add_sums,
    drop_nonfinite,
    join_key,
    local_means,
    means,
    split_key,
)

decays = st.one_of(st.sampled_from([0.0, 1.0, 0.95]), st.floats(0, 1))
values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)


@settings(deadline=None)
@given(values=values, steps=st.data())
def test_running_mean_equals_the_explicit_weighted_mean(
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
def test_running_mean_of_a_constant_is_that_constant_at_every_step(
    constant: float, decay: float, steps: int
) -> None:
    mean = RunningMean()
    for _ in range(steps):
        mean.update(torch.full((2, 3), constant), decay)
        assert torch.equal(mean.value, torch.full((2, 3), constant))


def test_running_mean_with_decay_zero_forgets_even_nan() -> None:
    mean = RunningMean()
    for value in (1.0, float("nan"), 7.0):
        mean.update(torch.tensor(value), 0.0)
    assert mean.value == 7.0
    assert mean.weight == 1.0


def test_running_mean_with_decay_one_is_the_arithmetic_mean() -> None:
    mean = RunningMean()
    values = torch.linspace(0, 3, 11, dtype=torch.float64)
    for value in values:
        mean.update(value, 1.0)
    torch.testing.assert_close(mean.value, values.mean())
    assert mean.weight == 11


def test_running_mean_owns_its_memory_and_precision_and_holds_no_graph() -> None:
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
        "an update must not write into an earlier value"
    )


def test_running_mean_replace_keeps_the_weight() -> None:
    mean = RunningMean()
    mean.update(torch.tensor(1.0), 1.0)
    mean.replace(torch.tensor(4.0))
    mean.update(torch.tensor(6.0), 1.0)
    assert mean.value == 5.0
    assert mean.weight == 2.0


def test_running_mean_without_a_value_ignores_its_weight() -> None:
    mean = RunningMean(weight=9.0)
    mean.update(torch.tensor(1.0), 1.0)
    mean.update(torch.tensor(3.0), 1.0)
    assert mean.value == 2.0


def test_running_mean_starts_with_weight_zero() -> None:
    assert (RunningMean().value, RunningMean().weight) == (None, 0.0)


@given(layer=st.text(), key=st.text().filter(lambda text: "|" not in text))
def test_split_key_inverts_join_key(layer: str, key: str) -> None:
    assert split_key(join_key(layer, key)) == (layer, key)


def test_add_prefix_joins_names_with_a_dot() -> None:
    statistic = Statistic(torch.ones(1), 1.0)
    assert add_prefix("moment", {"scale": statistic}) == {"moment.scale": statistic}


def test_add_sums_adds_totals_and_counts_by_name() -> None:
    into = {"A": Statistic(torch.tensor([1.0]), 2.0)}
    add_sums(into, {"A": Statistic(torch.tensor([3.0]), 4.0), "G": Statistic(torch.ones(1), 1.0)})
    assert (into["A"].total, into["A"].count) == (4.0, 6.0)
    assert into["G"].total == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_drop_nonfinite_drops_all_sums_of_the_batch(value: float) -> None:
    flags: list[torch.Tensor] = []
    sums = {"A": Statistic(torch.tensor([1.0]), 2.0), "G": Statistic(torch.tensor([value]), 2.0)}
    found = drop_nonfinite(sums, flags)
    assert {name: (float(s.total), float(s.count)) for name, s in found.items()} == {
        "A": (0.0, 0.0),
        "G": (0.0, 0.0),
    }
    assert flags == [torch.tensor(True)]


def test_drop_nonfinite_keeps_finite_and_empty_sums() -> None:
    flags: list[torch.Tensor] = []
    sums = {"A": Statistic(torch.tensor([1.0]), 2.0), "G": Statistic(None, 2.0)}
    assert drop_nonfinite(sums, flags) == sums
    assert flags == [torch.tensor(False)]
    assert drop_nonfinite({"G": sums["G"]}, flags) == {"G": sums["G"]}
    assert len(flags) == 1


def test_means_divides_and_leaves_out_what_counted_nothing() -> None:
    found = means(
        {
            "A": ReducedStatistic(torch.tensor([6.0]), torch.tensor(3.0), exists=True),
            "G": ReducedStatistic(None, 3.0, exists=True),
            "masked": ReducedStatistic(torch.zeros(1), 0.0, exists=True),
            "absent": ReducedStatistic(None, 3.0, exists=False),
        }
    )
    assert found == {"A": torch.tensor([2.0]), "G": None}
    assert means({}) == {}


def test_local_means_leaves_out_statistics_without_a_total() -> None:
    sums = {"A": Statistic(torch.tensor([6.0]), 3.0), "G": Statistic(None, 3.0)}
    assert local_means(sums) == {"A": torch.tensor([2.0])}
