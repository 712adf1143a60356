"""Placements that break a law, and which."""

from __future__ import annotations

import re
from typing import Any

import attrs
import pytest
import torch.distributed as dist

from kfactk import Assignment, Share, Workload, grid
from kfactk.testing import PlacementLaws
from tests.kfactk.testing.broken import caught, laws_of

pytestmark = pytest.mark.xdist_group("ranks")
PIECES = "test_every_piece_has_ranks_that_exist"
ALONE = "test_one_rank_alone_does_all"
TOGETHER = "test_what_belongs_together_stays_together"
ARGUMENTS = "test_the_answer_depends_on_the_arguments_alone"
TRAVELS = "test_it_says_between_whom_what_travels"
FINDS = "test_what_goes_on_from_the_last_decompositions_finds_them"
EVERYWHERE = "test_every_process_gives_the_same_answer"
TRAINING = "test_ranks_are_one_process"


class Right:
    """Layers in rows of one rank."""

    process_group: Any = None
    wire_dtype: str | None = None

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        found = grid(workload, ranks, 1, "right", "one rank a layer")
        return attrs.evolve(
            found,
            shares={
                layer: self.share(layer, share, ranks) for layer, share in found.shares.items()
            },
        )

    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return share


class Forgetful(Right):
    def assign(self, workload: Workload, ranks: int) -> Assignment:
        found = super().assign(workload, ranks)
        return attrs.evolve(found, shares=dict(list(found.shares.items())[1:]))


class Inventive(Right):
    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(share, inverse_workers={**share.inverse_workers, "C": (0,)})


class Beyond(Right):
    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(share, gradient_workers=(ranks,))


class Nobody(Right):
    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(share, inverse_workers=dict.fromkeys(share.inverse_workers, ()))


class Unsorted(Right):
    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(share, gradient_workers=tuple(reversed(range(ranks))))


class Listing(Right):
    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(share, gradient_workers=[0])


class Mapped(Right):
    def assign(self, workload: Workload, ranks: int) -> Any:
        return super().assign(workload, ranks).shares


class Unnamed(Right):
    def assign(self, workload: Workload, ranks: int) -> Assignment:
        return attrs.evolve(super().assign(workload, ranks), strategy=None)


class Silent(Right):
    def assign(self, workload: Workload, ranks: int) -> Assignment:
        return attrs.evolve(super().assign(workload, ranks), reason=None)


class NeverAlone(Right):
    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(share, gradient_workers=(1,)) if ranks == 1 else share


class Parting(Right):
    """Each matrix to the next rank, whatever it is made of."""

    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(
            share,
            inverse_workers={
                name: (number % ranks,) for number, name in enumerate(share.inverse_workers)
            },
        )


class Sending(Right):
    """Decomposes on rank 0 what the next rank preconditions."""

    def share(self, layer: str, share: Share, ranks: int) -> Share:
        inverse = dict.fromkeys(share.inverse_workers, (0,))
        return attrs.evolve(share, inverse_workers=inverse, gradient_workers=(1 % ranks,))


class Turning(Right):
    """Begins where it ended the last time."""

    def __init__(self) -> None:
        self.calls = 0

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        self.calls += 1
        return super().assign(workload, ranks)

    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(share, gradient_workers=(self.calls % ranks,))


class Numbered(Right):
    """Its objects differ."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.number = self.made

    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(share, gradient_workers=(self.number % ranks,))


class Sorting(Right):
    """Changes what it was given."""

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        found = super().assign(workload, ranks)
        object.__setattr__(workload, "works", workload.works[::-1] + workload.works[:1])
        return found


class Half(Right):
    wire_dtype = "half precision"


class Whole(Right):
    wire_dtype = "int32"


class Grouped(Right):
    process_group = "mine"


class Hashing(Right):
    """By hashes of text, which each process has of its own."""

    def share(self, layer: str, share: Share, ranks: int) -> Share:
        return attrs.evolve(share, gradient_workers=(hash(layer) % 1009 % ranks,))


@pytest.mark.parametrize(
    ("stage", "law", "says"),
    [
        (Forgetful, PIECES, r"of the layers \['0\.fc'\] it divided \[\]"),
        (Inventive, PIECES, r"0\.fc has the matrices .*, not .*'C'"),
        (
            Beyond,
            PIECES,
            r"0\.fc: its gradient workers are \(\d,\), not a tuple of ascending ranks from 0 to \d",
        ),
        (Nobody, PIECES, r"0\.fc: [\w ]+ are \(\), not"),
        (
            Unsorted,
            PIECES,
            r"its gradient workers are \(1, 0\)|its gradient workers are \(\d(, \d)*, 0\)",
        ),
        (Listing, PIECES, r"its gradient workers are \[0\]"),
        (Mapped, PIECES, r"assign returned \{.*\}, which is no kfactk.Assignment"),
        (Unnamed, PIECES, "the strategy is None: it must be its name"),
        (Silent, PIECES, "the reason is None: it must be a sentence"),
        (NeverAlone, ALONE, r"alone, rank 0 has to do all of 0\.fc, but its ranks are \[.*\(1,\)"),
        (
            Parting,
            TOGETHER,
            r"the matrices of \d\.fc, made of common statistics, are on \[\(0,\), \(1,\)",
        ),
        (Sending, FINDS, r"the ranks \[0\] decompose \d\.fc from its last decompositions"),
        (
            Turning(),
            ARGUMENTS,
            "(asked again, it|another object of the same options) "
            "divides the same work differently",
        ),
        (
            Numbered,
            ARGUMENTS,
            "another object of the same options divides the same work differently",
        ),
        (
            Sorting,
            ARGUMENTS,
            "asked again, it divides|assign changes the workload, which was Workload",
        ),
        (Half, TRAVELS, "wire_dtype is 'half precision': it must name a floating dtype"),
        (Whole, TRAVELS, "wire_dtype is 'int32'"),
        (Grouped, TRAVELS, "process_group is 'mine', though there are no processes"),
        (Hashing, EVERYWHERE, r"process \d divides the same work differently"),
    ],
)
def test_a_broken_placement_is_caught(stage: Any, law: str, says: str) -> None:
    found = caught(PlacementLaws, stage, law)
    assert list(found) == [law]
    assert re.search(says, found[law]), found[law]


def test_a_right_placement_obeys() -> None:
    assert caught(PlacementLaws, Right) == {}


def test_every_law_is_tried() -> None:
    mark = next(
        mark for mark in test_a_broken_placement_is_caught.pytestmark if mark.name == "parametrize"
    )
    assert {case[1] for case in mark.args[1]} | {TRAINING} == set(laws_of(PlacementLaws))


@pytest.mark.parametrize("law", [EVERYWHERE, TRAINING])
def test_a_group_of_this_process_is_not_sent_to_others(law: str) -> None:
    with pytest.raises(
        pytest.skip.Exception, match="is for one process group, which other processes do not have"
    ):
        getattr(type("TestGrouped", (PlacementLaws,), {"stage": Grouped})(), law)()


@attrs.frozen
class Rounding:
    """What travels is rounded, so that ranks only have to agree."""

    process_group: Any = None
    wire_dtype: str | None = "bfloat16"

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        return grid(workload, ranks, 1, "rounding")


def test_rounded_runs_are_compared_among_ranks_only() -> None:
    assert caught(PlacementLaws, Rounding, TRAINING) == {}


class Disagreeing(Right):
    """Divides work by who asks."""

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        mine = dist.get_rank() if dist.is_initialized() else 0
        return grid(workload, ranks, ranks if mine else 1, "disagreeing")


def test_ranks_whose_answers_differ_all_say_so() -> None:
    said = caught(PlacementLaws, Disagreeing(), TRAINING)[TRAINING]
    assert "rank 0 of 2: Traceback" in said
    assert "rank 1 of 2: Traceback" in said
    assert said.count("Disagreeing divided the same work differently on another rank") == 2
