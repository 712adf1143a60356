"""What several ranks came to, held against what one process came to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from kfactk.testing._support.ranks import RankError, shared_workers
from tests.equivalence.product import Case
from tests.equivalence.training import Outcome, train, train_all

TOLERANCE = 1e-10
"""Largest deviation, relative to the largest number of the tensor."""


@attrs.frozen
class Verdict:
    """What became of one recipe under one placement, on one number of ranks.

    Args:
        deviation: The largest.
        where: Of what.
        faults: What is wrong besides.
    """

    deviation: float = 0.0
    where: str = ""
    faults: tuple[str, ...] = ()


class Truths:
    """What one process comes to, without a process group; worked out once a recipe."""

    def __init__(self) -> None:
        self._known: dict[str, Outcome] = {}

    def __getitem__(self, case: Case) -> Outcome:
        key = f"{case}, {case.taps}"
        if key not in self._known:
            self._known[key] = train(case.recipe, "replicated", case.taps, 0, 1)
        return self._known[key]

    def forget(self) -> None:
        """Make room."""
        self._known.clear()


def judged(cases: Sequence[Case], placement: Any, ranks: int, truths: Truths) -> list[Verdict]:
    """Run recipes one after the other as a single job on several ranks, and compare."""
    try:
        outcomes = shared_workers().run(
            ranks,
            train_all,
            ranks,
            [(case.recipe, case.taps) for case in cases],
            placement,
            patience=600.0,
        )
    except RankError as error:
        if len(cases) > 1:  # to find out which
            first, *others = [
                verdict for case in cases for verdict in judged([case], placement, ranks, truths)
            ]
            told = f"a job of {len(cases)} recipes, of which this is the first, failed: {error}"
            return [attrs.evolve(first, faults=(*first.faults, told)), *others]
        return [Verdict(math.inf, "a rank failed", (str(error),))]
    return [
        verdict(truths[case], [outcome[number] for outcome in outcomes])
        for number, case in enumerate(cases)
    ]


def verdict(truth: Outcome, outcomes: Sequence[Outcome]) -> Verdict:
    """One run on several ranks against that of one process."""
    faults = [*disagreements([outcome.bits for outcome in outcomes])]
    faults += [] if truth.layers else ["the model has no layer that this curvature takes"]
    faults += [
        f"rank {rank} counts {found.counters}"
        for rank, found in enumerate(outcomes)
        if found.counters != truth.counters
    ]
    seen = {name for outcome in outcomes for name in outcome.tensors}
    faults += [f"no rank has the {name}" for name in sorted(set(truth.tensors) - seen)]
    faults += [f"one process has no {name}" for name in sorted(seen - set(truth.tensors))]
    deviation, where = max(_deviations(truth, outcomes), default=(0.0, ""))
    return Verdict(deviation, where, tuple(faults))


def disagreements(bits: Sequence[Mapping[str, str]]) -> Iterable[str]:
    """What several ranks have, but not bit for bit the same."""
    for name in sorted({name for each in bits for name in each}):
        if len({each[name] for each in bits if name in each}) > 1:
            yield f"ranks have different bits in the {name}"


def _deviations(truth: Outcome, outcomes: Sequence[Outcome]) -> Iterable[tuple[float, str]]:
    for outcome in outcomes:
        for name, tensor in outcome.tensors.items():
            if name in truth.tensors:
                size = float(truth.tensors[name].abs().max())
                found = float((tensor - truth.tensors[name]).abs().max()) / (size or 1.0)
                yield (math.inf if math.isnan(found) else found), name
