"""The form of a block's state in a checkpoint, and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, strategies as st

from kfactk import RunningMean, StateError, Statistic
from kfactk.preconditioner.schedule import NOTHING, DueWork
from kfactk.preconditioner.state import PREFIX, BlockState
from kfactk.samples import Samples

CPU = torch.device("cpu")
READY, OVERDUE = "kfactk.ready", "kfactk.overdue"
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
    back = BlockState.from_flat(flat, CPU)
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
        BlockState.from_flat({key: torch.ones(1), READY: torch.ones(())}, CPU)


def test_a_rank_without_tensors_of_a_layer_still_saves_how_it_stands() -> None:
    state = BlockState(ready=True, overdue=DueWork(True, False, False, False))
    flat = state.flat()
    assert {key: value.tolist() for key, value in flat.items()} == {READY: 1, OVERDUE: 1}
    assert {key: value.tolist() for key, value in BlockState().flat().items()} == {
        READY: 0,
        OVERDUE: 0,
    }


@pytest.mark.parametrize(
    "overdue", [DueWork(*flags) for flags in itertools.product((False, True), repeat=4)]
)
def test_all_that_is_overdue_comes_back(overdue: DueWork) -> None:
    flat = BlockState(overdue=overdue).flat()
    assert (
        int(flat[OVERDUE])
        == 1 * overdue.factors + 2 * overdue.scale + 4 * overdue.basis + 8 * overdue.inputs
    )
    assert all(value.ndim == 0 for value in flat.values())
    assert BlockState.from_flat(flat, CPU).overdue == overdue


@pytest.mark.parametrize("overdue", [torch.tensor(16), torch.tensor(-1), torch.ones(3)])
def test_an_overdue_that_cannot_be_is_refused(overdue: torch.Tensor) -> None:
    with pytest.raises(StateError, match=OVERDUE):
        BlockState.from_flat({READY: torch.ones(()), OVERDUE: overdue}, CPU)


def test_curvature_that_does_not_say_whether_it_is_ready_is_damaged() -> None:
    flat = BlockState({"A": RunningMean(torch.ones(2, 2), 3.0)}).flat()
    del flat[READY]
    with pytest.raises(StateError, match=f"damaged: it has curvature, but not '{READY}'"):
        BlockState.from_flat(flat, CPU)


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


def test_clearing_what_is_pending_leaves_what_lasts() -> None:
    state = BlockState({"A": RunningMean(torch.ones(1), 1.0)})
    state.pending["factor.A"] = Statistic(torch.ones(1), 1.0)
    state.seen = 2
    state.nonfinite.append(torch.tensor(True))
    state.clear_pending()
    assert (state.pending, state.retained, state.seen, state.nonfinite) == ({}, [], 0, [])
    assert set(state.factors) == {"A"}


def test_a_mean_that_has_seen_nothing_leaves_nothing() -> None:
    state = BlockState(factors={"A": RunningMean(torch.ones(2), 1.0), "positions": RunningMean()})
    assert sorted(state.flat()) == [
        "kfactk.factor.A",
        "kfactk.factor.A.weight",
        "kfactk.overdue",
        "kfactk.ready",
    ]
    assert sorted(state.factor_values()) == ["A"]


# ------------------------------------------------------------------------------ parts of a module


@given(states(), states())
def test_two_parts_of_one_module_share_an_entry(one: BlockState, other: BlockState) -> None:
    flat = {**one.flat(), **other.flat("query")}
    assert all(key.startswith("kfactk.[query].") for key in other.flat("query"))
    assert BlockState.from_flat(flat, CPU).flat().keys() == one.flat().keys()
    back = BlockState.from_flat(flat, CPU, "query")
    for key, tensor in back.flat("query").items():
        assert torch.equal(tensor, flat[key])


# ---------------------------------------------------------------------- within one forward or step


def samples(first: bool = True) -> Samples:
    rows = torch.ones(1, 1, 1)
    return Samples(rows, rows, num_terms=1.0, first=first)


def sums(value: float) -> dict[str, Statistic]:
    return {"factor.A": Statistic(torch.tensor([value]), 1.0)}


def test_a_forward_counts_whole_or_not_at_all() -> None:
    state = BlockState(staged=sums(1.0))
    state.commit()
    state.staged = {**sums(float("nan")), "factor.G": Statistic(torch.ones(1), 1.0)}
    state.commit()
    state.staged = sums(2.0)
    state.commit()
    found = {key: (float(s.total), float(s.count)) for key, s in state.pending.items()}
    assert found == {"factor.A": (3.0, 2.0), "factor.G": (0.0, 0.0)}
    assert [bool(flag) for flag in state.nonfinite] == [False, True, False]


def test_a_rollback_drops_what_came_after_the_savepoint() -> None:
    state = BlockState(staged=sums(1.0))
    savepoint = state.savepoint()
    assert float(state.pending["factor.A"].total) == 1.0
    state.staged, state.seen = sums(5.0), 3
    state.retained.append(samples())
    state.input_versions.append((torch.ones(1), 0))
    state.rollback(savepoint)
    assert (state.staged, state.retained, state.input_versions, state.seen) == ({}, [], [], 0)
    assert float(state.pending["factor.A"].total) == 1.0


def test_a_snapshot_restores_the_decomposition_with_its_moments() -> None:
    parts = {"A": {"cholesky": torch.ones(1, 1)}}
    state = BlockState(decomposition=parts, moments={"scale": RunningMean(torch.ones(1), 2.0)})
    snapshot = state.snapshot()
    state.moments["scale"].update(torch.full((1,), 9.0), 0.5)
    state.decomposition, state.ready = {}, True
    state.restore(snapshot)
    assert (state.ready, state.decomposition) == (False, parts)
    assert (float(state.moments["scale"].value), state.moments["scale"].weight) == (1.0, 2.0)


def test_a_ready_block_with_nothing_overdue_is_settled() -> None:
    assert BlockState(ready=True).settled
    assert not BlockState().settled
    assert not BlockState(ready=True, overdue=DueWork(False, True, False, False)).settled
