"""Laws of placements: all work has ranks, processes agree, and ranks do what one process does.

class TestMine(PlacementLaws):
    stage = "mine"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from kfactk.assignment import Assignment, Work, Workload
from kfactk.testing._support.division import Sent, equal_on_ranks, on_ranks
from kfactk.testing._support.laws import Laws, law
from kfactk.testing._support.ranks import shared_workers
from kfactk.testing._support.training import Training

MAX_RANKS = 9
"""Largest number of ranks in the laws."""


@st.composite
def works(draw: st.DrawFn, layer: str) -> Work:
    """Draw the work of one layer: Kronecker factors, also of groups, another matrix, or none."""
    d_out, d_in, groups = (
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([(), (), (3,)])),
    )
    gradient = (*groups, d_out, d_in)
    kronecker = {"A": (*groups, d_in, d_in), "G": (*groups, d_out, d_out)}
    channels = {"C": (*groups, 1, 1), "G": kronecker["G"], "K": (*groups, d_in, d_in)}
    matrices = draw(
        st.sampled_from(
            [kronecker, kronecker, channels, {"square": gradient}, {"A": kronecker["A"]}, {}]
        )
    )
    return Work(
        layer, matrices, gradient, indivisible=draw(st.booleans()), follows=draw(st.booleans())
    )


@st.composite
def some_work(draw: st.DrawFn, most: int = 7) -> Workload:
    """Draw the work of a few layers, sometimes all of one shape, and its periods."""
    names = [f"{number}.fc" for number in range(draw(st.integers(1, most)))]
    each = [draw(works(name)) for name in names]
    if draw(st.booleans()):
        each = [attrs.evolve(each[0], layer=name) for name in names]
    period, itemsize = st.sampled_from([1, 10, 100]), st.sampled_from([2, 4, 8])
    return Workload(
        tuple(each),
        factor_every=draw(period),
        scale_every=draw(period),
        basis_every=draw(period),
        sampled=draw(st.booleans()),
        itemsize=draw(itemsize),
        device="cpu",
    )


class PlacementLaws(Laws):
    """Laws of every placement: of its answers, and of runs on several ranks.

    Example:
        >>> class TestMine(PlacementLaws):
        ...     stage = "replicated"
        >>> TestMine().test_every_piece_has_ranks_that_exist()
    """

    family = "placement"

    def workloads(self) -> st.SearchStrategy[Workload]:
        """Return a strategy for workloads; replace it for a placement of some kinds of layers."""
        return some_work()

    def several(self) -> st.SearchStrategy[list[Workload]]:
        """Return a strategy for a few workloads."""
        return st.lists(self.workloads(), max_size=3)

    @law(workload="workloads", ranks=st.integers(1, MAX_RANKS))
    def test_every_piece_has_ranks_that_exist(self, workload: Workload, ranks: int) -> None:
        """Each layer has gradient workers, and each matrix inverse workers: ascending ranks."""
        found = self._answer(workload, ranks)
        wanted = {work.layer: set(work.matrices) for work in workload.works}
        assert set(found.shares) == set(wanted), (
            f"of the layers {sorted(wanted)} it divided {sorted(found.shares)}"
        )
        for layer, share in found.shares.items():
            assert set(share.inverse_workers) == wanted[layer], (
                f"{layer} has the matrices {wanted[layer]}, not {set(share.inverse_workers)}"
            )
            for what, group in (
                ("its gradient workers", share.gradient_workers),
                *share.inverse_workers.items(),
            ):
                good = (
                    isinstance(group, tuple)
                    and group
                    and list(group) == sorted(set(group))
                    and set(group) <= set(range(ranks))
                )
                assert good, (
                    f"{layer}: {what} are {group!r}, not a tuple of ascending ranks from 0 to "
                    f"{ranks - 1}"
                )

    @law(workload="workloads")
    def test_one_rank_alone_does_all(self, workload: Workload) -> None:
        """A single process does all the work."""
        for layer, share in self._answer(workload, 1).shares.items():
            groups = {share.gradient_workers, *share.inverse_workers.values()}
            assert groups == {(0,)}, (
                f"alone, rank 0 has to do all of {layer}, but its ranks are {sorted(groups)}"
            )

    @law(workload="workloads", ranks=st.integers(2, MAX_RANKS))
    def test_what_belongs_together_stays_together(self, workload: Workload, ranks: int) -> None:
        """Matrices that are made of common statistics have the same ranks."""
        shares = self._answer(workload, ranks).shares
        for work in workload.works:
            groups = set(shares[work.layer].inverse_workers.values())
            assert not work.indivisible or len(groups) <= 1, (
                f"the matrices of {work.layer}, made of common statistics, are on {sorted(groups)}"
            )

    @law(workload="workloads", ranks=st.integers(2, MAX_RANKS))
    def test_what_goes_on_from_the_last_decompositions_finds_them(
        self, workload: Workload, ranks: int
    ) -> None:
        """Inverse workers of such work are gradient workers too, which keep decompositions."""
        shares = self._answer(workload, ranks).shares
        for work in workload.works:
            share = shares[work.layer]
            elsewhere = {
                rank for group in share.inverse_workers.values() for rank in group
            }.difference(share.gradient_workers)
            assert not (work.follows and elsewhere), (
                f"the ranks {sorted(elsewhere)} decompose {work.layer} from its last "
                "decompositions, and do not keep these"
            )

    @law(workload="workloads", ranks=st.integers(1, MAX_RANKS), others="several")
    def test_the_answer_depends_on_the_arguments_alone(
        self, workload: Workload, ranks: int, others: list[Workload]
    ) -> None:
        """The answer depends on options and arguments alone, not on the object or other calls."""
        stage, before = self.subject(), repr(workload)
        first = stage.assign(workload, ranks)
        for other in others:
            stage.assign(other, ranks + 1)
        assert stage.assign(workload, ranks) == first, (
            "asked again, it divides the same work differently"
        )
        assert self.subject().assign(workload, ranks) == first, (
            "another object of the same options divides the same work differently"
        )
        assert repr(workload) == before, f"assign changes the workload, which was {before}"

    @law()
    def test_it_says_between_whom_what_travels(self) -> None:
        """It has `process_group` and `wire_dtype`, which is `None` or names a floating dtype."""
        stage = self.subject()
        name = stage.wire_dtype
        dtype = None if name is None else getattr(torch, str(name), None)
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        assert name is None or floating, (
            f"wire_dtype is {name!r}: it must name a floating dtype of torch, such as 'bfloat16', "
            "or be None"
        )
        assert stage.process_group is None or dist.is_initialized(), (
            f"process_group is {stage.process_group!r}, though there are no processes: it must be "
            "None, which stands for all ranks"
        )

    @law(examples=2, given="several")
    @on_ranks
    def test_every_process_gives_the_same_answer(self, given: list[Workload]) -> None:
        """Other processes give the same answer, whatever order their sets and hashes have."""
        self._without_group()
        mine = [_assignments(self.subject(), workload) for workload in given]
        for rank, theirs in enumerate(
            shared_workers().run(2, _assignments_on_rank, Sent.of((self.subject(), given)))
        ):
            assert theirs == mine, (
                f"process {rank} divides the same work differently: {theirs}, not {mine}"
            )

    @law()
    @on_ranks
    def test_ranks_are_one_process(self) -> None:
        """Two and three ranks train as one process does, and are bit-for-bit equal."""
        self._without_group()
        for ranks in (2, 3):
            equal_on_ranks(
                Training(),
                {"placement": self.subject()},
                ranks,
                rounded=self.subject().wire_dtype is not None,
            )

    def _answer(self, workload: Workload, ranks: int) -> Assignment:
        found = self.subject().assign(workload, ranks)
        assert isinstance(found, Assignment), (
            f"assign returned {found!r}, which is no kfactk.Assignment"
        )
        assert isinstance(found.strategy, str), (
            f"the strategy is {found.strategy!r}: it must be its name"
        )
        assert isinstance(found.reason, str), (
            f"the reason is {found.reason!r}: it must be a sentence"
        )
        return found

    def _without_group(self) -> None:
        if self.subject().process_group is not None:
            pytest.skip(
                f"{self.label()} is for one process group, which other processes do not have"
            )


def _assignments(stage: Any, workload: Workload) -> Sequence[Mapping[str, Any]]:
    return [attrs.asdict(stage.assign(workload, ranks)) for ranks in range(1, MAX_RANKS + 1)]


def _assignments_on_rank(rank: int, sent: Sent) -> list[Sequence[Mapping[str, Any]]]:
    stage, given = sent.unpacked()
    return [_assignments(stage, workload) for workload in given]
