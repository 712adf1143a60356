"""Laws of placements: sums over ranks, of which there is one, this process, unless a class runs several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from kfactk.samples import Statistic
from kfactk.testing.laws import Laws, close, law
from kfactk.testing.strategies import seeds

Statistics = Mapping[str, Statistic]
DTYPES = (torch.float64, torch.float32)
NAMES = ("0.A", "0.G", "features.3.scale", "A", "")


@st.composite
def statistics(draw: st.DrawFn) -> dict[str, Statistic]:
    """Named sums of several shapes, precisions and memory layouts, some without a total, counts as numbers and as tensors."""
    found = {}
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True)):
        generator = torch.Generator().manual_seed(draw(seeds()))
        shape = draw(st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2), (0, 2)]))
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))
        total = draw(st.sampled_from([values, values.movedim(0, -1) if values.ndim else values, None]))
        count: float = draw(st.sampled_from([0.0, 4.0, 2.5, float(2**30 + 1)]))
        found[name] = Statistic(total, torch.tensor(count, dtype=torch.float64) if draw(st.booleans()) else count)
    return found


class PlacementLaws(Laws):
    """Laws of a placement. They run alone in this process; a class that overrides `reduced` and `shares` runs several ranks.

    Example:
        >>> class TestMine(PlacementLaws):
        ...     stage = "replicated"
        >>> TestMine().test_sums_and_counts_are_those_of_all_ranks()
    """

    family = "placement"

    def shares(self) -> st.SearchStrategy[list[dict[str, Statistic]]]:
        """What each rank has; alone, a list of one."""
        return st.tuples(statistics()).map(list)

    def reduced(self, shares: Sequence[Statistics]) -> list[dict[str, Statistic]]:
        """What each rank's `reduce` gives back, each being given its own share."""
        [alone] = shares
        return [self.subject().reduce(alone)]

    def ranks(self) -> list[int]:
        """What each rank calls itself."""
        return [self.subject().rank]

    @law()
    def test_ranks_count_from_zero(self) -> None:
        """Ranks are numbered from 0; a process alone is rank 0."""
        found = self.ranks()
        assert found == list(range(len(found))), f"{len(found)} ranks are numbered {found}: they must count from 0"

    @law(shares="shares")
    def test_sums_and_counts_are_those_of_all_ranks(self, shares: list[dict[str, Statistic]]) -> None:
        """Every rank gets all names, each with the sum of the ranks' totals and of their counts; no total anywhere stays none."""
        names = {name for share in shares for name in share}
        for rank, result in enumerate(self.reduced(shares)):
            assert set(result) == names, f"rank {rank} gets the names {sorted(result)}, not {sorted(names)}"
            for name, found in result.items():
                theirs = [share[name] for share in shares if name in share]
                totals = [each.total for each in theirs if each.total is not None]
                label = f"rank {rank}, {name!r}"
                expected = sum(float(each.count) for each in theirs)
                assert float(found.count) == expected, (
                    f"{label}: the count is {float(found.count)}, and the ranks' counts sum to {expected}"
                )
                assert (found.total is None) == (not totals), f"{label}: the total is {found.total}, and {len(totals)} ranks have one"
                if found.total is not None:
                    _same_sum(found.total, totals, label)

    @law(shares="shares")
    def test_what_is_given_is_not_changed(self, shares: list[dict[str, Statistic]]) -> None:
        """The statistics that are handed in, their names and their tensors stay as they are, and a second call gives the same."""
        before = [{name: (each.total, _copy(each.total), float(each.count)) for name, each in share.items()} for share in shares]
        first, second = self.reduced(shares), self.reduced(shares)
        for share, was in zip(shares, before, strict=True):
            assert list(share) == list(was), f"names that were given are changed, from {list(was)} to {list(share)}"
            for name, (total, copy, count) in was.items():
                kept = share[name].total is total and _equal(total, copy) and float(share[name].count) == count
                assert kept, f"{name!r}, which was given, is changed"
        _assert_same(first, second, "a second call gives something else")

    @law(shares="shares", data=st.data())
    def test_any_order_of_names_gives_the_same(self, shares: list[dict[str, Statistic]], data: st.DataObject) -> None:
        """In which order a rank has its names does not matter."""
        shuffled = [{name: share[name] for name in data.draw(st.permutations(list(share)), label="order")} for share in shares]
        _assert_same(self.reduced(shares), self.reduced(shuffled), "the result depends on the order of the names")


def _same_sum(found: Tensor, totals: list[Tensor], label: str) -> None:
    expected = sum((each.double() for each in totals[1:]), totals[0].double())
    assert found.shape == expected.shape, f"{label}: the total has shape {list(found.shape)}, not {list(expected.shape)}"
    dtype = totals[0].dtype
    for each in totals[1:]:
        dtype = torch.promote_types(dtype, each.dtype)
    assert found.dtype == dtype, f"{label}: the total is {found.dtype}, not {dtype}"
    rounding = 0.0 if len(totals) == 1 else len(totals) * torch.finfo(dtype).eps
    close(found.double(), expected, f"{label}: the total is not the sum of the ranks' totals", rtol=rounding, atol=rounding)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _assert_same(first: Sequence[Statistics], second: Sequence[Statistics], says: str) -> None:
    for one, other in zip(first, second, strict=True):
        assert set(one) == set(other), f"{says}: the names are {sorted(one)} and {sorted(other)}"
        for name, each in one.items():
            same = _equal(each.total, other[name].total) and float(each.count) == float(other[name].count)
            assert same, f"{says}: {name!r} is {each} and then {other[name]}"
