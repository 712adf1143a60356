"""The form of a layer's state in a checkpoint, and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, strategies as st

from kfactk import RunningMean, StateError, Statistic
from kfactk.preconditioner.damage import Damage
from kfactk.preconditioner.schedule import NOTHING, DueWork
from kfactk.preconditioner.state import OVERDUE, PREFIX, READY, BlockState

READY_KEY, OVERDUE_KEY = PREFIX + READY, PREFIX + OVERDUE
NAMES = st.text(st.sampled_from("AGxy_0"), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def tensors(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@st.composite
def states(draw: st.DrawFn) -> BlockState:
    dtype = draw(DTYPES)
    means = st.builds(
        lambda n, seed, weight: RunningMean(tensors((n, n), dtype, seed), weight),
        st.integers(1, 3),
        st.integers(0, 99),
        st.floats(0, 1e6),
    )
    parts = st.dictionaries(
        NAMES,
        st.builds(lambda seed: tensors((2, 2), dtype, seed), st.integers(0, 99)),
        min_size=1,
        max_size=2,
    )
    return BlockState(
        draw(st.dictionaries(NAMES, means, max_size=3)),
        draw(st.dictionaries(NAMES, parts, max_size=2)),
        draw(st.dictionaries(NAMES, means, max_size=2)),
        ready=draw(st.booleans()),
        overdue=draw(st.builds(DueWork, *[st.booleans()] * 4)),
    )


@given(states())
def test_flat_and_back_is_the_same_bit_for_bit(state: BlockState) -> None:
    flat = state.flat()
    assert all(
        key.startswith(PREFIX) and isinstance(value, torch.Tensor) for key, value in flat.items()
    )
    back = BlockState.from_flat(flat, torch.device("cpu"))
    for ours, theirs in ((back.factors, state.factors), (back.moments, state.moments)):
        assert set(ours) == set(theirs)
        for name, mean in theirs.items():
            assert ours[name].weight == mean.weight
            assert torch.equal(ours[name].value, mean.value)
            assert ours[name].value.dtype == mean.value.dtype
            assert ours[name].value is not mean.value
    assert (back.ready, back.overdue, back.missed) == (
        state.ready,
        state.overdue,
        state.overdue != NOTHING,
    )
    assert {n: set(parts) for n, parts in back.decomposition.items()} == {
        n: set(parts) for n, parts in state.decomposition.items()
    }
    for name, parts in state.decomposition.items():
        assert all(
            torch.equal(back.decomposition[name][part], value) for part, value in parts.items()
        )


def test_a_flat_state_holds_the_tensors_themselves() -> None:
    value = torch.ones(2, 2)
    state = BlockState({"A": RunningMean(value, 3.0)}, {"A": {"cholesky": value}})
    flat = state.flat()
    assert flat["kfactk.factor.A"] is flat["kfactk.basis.A.cholesky"] is value
    assert float(flat["kfactk.factor.A.weight"]) == 3.0
    assert set(flat) == {
        "kfactk.factor.A",
        "kfactk.factor.A.weight",
        "kfactk.basis.A.cholesky",
        "kfactk.overdue",
        "kfactk.ready",
    }


@pytest.mark.parametrize("key", ["kfactk.core.A", "kfactk.basis.A", "kfactk."])
def test_an_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(StateError, match="newer kfactk"):
        BlockState.from_flat({key: torch.ones(1), READY_KEY: torch.ones(())}, torch.device("cpu"))


def test_a_rank_that_has_nothing_of_a_layer_still_tells_how_it_stands() -> None:
    state = BlockState(ready=True, overdue=DueWork(True, False, False, False))
    flat = state.flat()
    assert {key: value.tolist() for key, value in flat.items()} == {READY_KEY: 1, OVERDUE_KEY: 1}
    assert {key: value.tolist() for key, value in BlockState().flat().items()} == {
        READY_KEY: 0,
        OVERDUE_KEY: 0,
    }


@pytest.mark.parametrize(
    "overdue", [DueWork(*flags) for flags in itertools.product((False, True), repeat=4)]
)
def test_everything_overdue_comes_back(overdue: DueWork) -> None:
    flat = BlockState(overdue=overdue).flat()
    assert (
        int(flat[OVERDUE_KEY])
        == 1 * overdue.factors + 2 * overdue.scale + 4 * overdue.basis + 8 * overdue.inputs
    )
    assert all(value.ndim == 0 for value in flat.values())
    assert BlockState.from_flat(flat, torch.device("cpu")).overdue == overdue


@pytest.mark.parametrize("code", [torch.tensor(16), torch.tensor(-1), torch.ones(3)])
def test_an_overdue_code_out_of_range_is_refused(code: torch.Tensor) -> None:
    with pytest.raises(StateError, match=OVERDUE_KEY):
        BlockState.from_flat({READY_KEY: torch.ones(()), OVERDUE_KEY: code}, torch.device("cpu"))


def test_curvature_without_the_word_whether_it_is_ready_is_damaged() -> None:
    flat = BlockState({"A": RunningMean(torch.ones(2, 2), 3.0)}).flat()
    del flat[READY_KEY]
    with pytest.raises(StateError, match=f"damaged: it has curvature, but not '{READY_KEY}'"):
        BlockState.from_flat(flat, torch.device("cpu"))


def test_measured_wants_data_and_allocated_does_not() -> None:
    state = BlockState()
    assert not state.measured
    assert not state.allocated
    state.factors = {
        "A": RunningMean(torch.zeros(1, 1), 0.0),
        "G": RunningMean(torch.ones(1, 1), 1.0),
    }
    state.decomposition = {"A": {"cholesky": torch.ones(1, 1)}}
    assert state.allocated
    assert not state.measured
    state.factors["A"].update(torch.ones(1, 1), 0.9)
    assert state.measured
    state.moments = {"scale": RunningMean(torch.ones(1), 0.0)}
    assert state.moment_values() == {}
    state.moments["scale"].update(torch.ones(1), 0.0)
    assert set(state.moment_values()) == {"scale"}


def test_the_end_of_a_step_forgets_what_was_pending_only() -> None:
    state = BlockState({"A": RunningMean(torch.ones(1), 1.0)})
    state.pending["factor.A"] = Statistic(torch.ones(1), 1.0)
    state.seen = 2
    state.nonfinite.append(torch.tensor(True))
    state.clear_pending()
    assert (state.pending, state.retained, state.seen, state.nonfinite) == ({}, [], 0, [])
    assert set(state.factors) == {"A"}


FACTOR = "kfactk.factor.A"
DAMAGED: dict[str, dict[str, object]] = {
    rf"{FACTOR} is no tensor, but a list": {FACTOR: [1]},
    rf"{FACTOR} is a tensor without data": {FACTOR: torch.ones(2, 2, device="meta")},
    rf"{FACTOR} is no dense tensor": {FACTOR: torch.eye(2).to_sparse()},
    rf"{FACTOR} has the dtype torch.complex64": {FACTOR: torch.eye(2) * 1j},
    rf"{FACTOR} has the dtype torch.int64": {FACTOR: torch.eye(2).long()},
    rf"{FACTOR} holds NaN or inf": {FACTOR: torch.full((2, 2), float("inf"))},
    rf"{FACTOR}.weight is no single number in \[0": {f"{FACTOR}.weight": torch.tensor(-1.0)},
    r"weight is no single number in \[0, 9": {f"{FACTOR}.weight": torch.tensor(1e30)},
    rf"{READY_KEY} is no single whole number in \[0, 1\]": {READY_KEY: torch.tensor(2)},
    rf"{OVERDUE_KEY} is no single whole number in \[0, 15\]": {OVERDUE_KEY: torch.tensor(0.5)},
    "has not both its value and its weight": {"kfactk.moment.scale": torch.ones(2)},
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_entry_is_refused_by_name(message: str) -> None:
    flat = BlockState({"A": RunningMean(torch.eye(2), 3.0)}).flat()
    with pytest.raises(StateError, match=message):
        BlockState.from_flat({**flat, **DAMAGED[message]}, torch.device("cpu"))  # type: ignore[dict-item]


def test_what_is_wrong_with_values_can_be_gathered() -> None:
    flat = BlockState({"A": RunningMean(torch.full((2, 2), float("nan")), 3.0)}).flat()
    damage = Damage()
    assert BlockState.from_flat(flat, torch.device("cpu"), damage=damage).factors["A"].weight == 3
    with pytest.raises(StateError, match=f"{FACTOR} holds NaN"):
        damage.refuse()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.bfloat16])
def test_parts_of_a_basis_may_be_of_any_kind(dtype: torch.dtype) -> None:
    order = torch.tensor([1, 0]).to(dtype)
    flat = BlockState(decomposition={"A": {"order": order}}).flat()
    back = BlockState.from_flat(flat, torch.device("cpu"))
    assert torch.equal(back.decomposition["A"]["order"], order)
