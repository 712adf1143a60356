"""Runs saved on some ranks resume on others: `python -m tests.training_loops.resume` prints all.

For each recipe and each moment of saving, the uninterrupted run on one process is the truth. A
resumed run equals it to a relative precision. With the same ranks and placement it equals the
uninterrupted run bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfactk import Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.small import F64, bound
from tests.training_loops.loops import PLACEMENTS, PRECISION, left

EXAMPLES = 12
"""In a global batch: divisible among 1 to 4 ranks."""
AFTER = 6
"""Steps after the interruption, in which each kind of refresh comes due again."""
PERIODS: dict[str, Any] = {"factor_every": 2, "scale_every": 3, "basis_every": 5}
RECIPES: dict[str, dict[str, Any]] = {
    "ekfac+adam": {"basis": "ekfac", "update": "adam", "lr": 0.01, "clip": "kl"},
    "kfac+momentum": {"basis": "kfac", "update": "momentum"},
    "running+adamw": {
        "basis": {"name": "ekfac", "scale": "running"},
        "update": "adamw",
        "lr": 0.01,
    },
}
MOMENTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "between refreshes": (8, ()),
    "after the scale alone": (4, ()),
    "something overdue": (6, (5,)),
}
"""Steps before saving, and steps without the branch; its basis is due at one of them."""


class Branched(nn.Module):
    """Convolutions, layers with and without bias, and a branch that some steps leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 4, 2, groups=2)
        self.hidden, self.side, self.norm, self.out = (
            nn.Linear(16, 6, bias=False),
            nn.Linear(16, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 3),
        )
        self.branching = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.conv(x)))).flatten(1)
        return self.out(
            torch.tanh(
                self.norm(self.hidden(x) + self.side(x) if self.branching else self.hidden(x))
            )
        )


@attrs.frozen
class Place:
    """Ranks and a placement."""

    ranks: int
    placement: str

    def __str__(self) -> str:
        return f"{self.ranks} {self.placement}" if self.ranks > 1 else "1"


@attrs.frozen
class Case:
    """What is trained, and when it is saved."""

    recipe: str
    moment: str

    @property
    def saved_at(self) -> int:
        """After how many steps."""
        return MOMENTS[self.moment][0]


SOURCES = [
    *(Place(ranks, placement) for ranks in (4, 2) for placement in PLACEMENTS),
    Place(1, "replicated"),
]
TARGETS = [
    Place(1, "replicated"),
    *(Place(ranks, placement) for ranks in (2, 3, 4) for placement in PLACEMENTS),
]
CASES = [Case(recipe, moment) for recipe in RECIPES for moment in MOMENTS]


def branched(seed: int = 3) -> Branched:
    torch.manual_seed(seed)
    return Branched().double()


def made(
    case: Case, place: Place, seed: int = 3, **changes: Any
) -> tuple[Optimizer, Branched, DistributedDataParallel]:
    """A model, wrapped, and its optimizer."""
    model = branched(seed)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    recipe = {
        "placement": PLACEMENTS[place.placement],
        **PERIODS,
        **RECIPES[case.recipe],
        **changes,
    }
    return bound(wrapped, **recipe), model, wrapped


def go(
    case: Case,
    optimizer: Optimizer,
    model: Branched,
    forward: nn.Module,
    steps: Iterable[int],
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Train on this rank's part of the global batches."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = (
            torch.randn(EXAMPLES, 2, 4, 4, generator=generator, dtype=F64),
            torch.randint(3, (EXAMPLES,), generator=generator),
        )
        model.branching = step not in MOMENTS[case.moment][1]
        optimizer.zero_grad()
        F.cross_entropy(forward(x[rank::ranks]), y[rank::ranks]).backward()
        optimizer.step()


def before(case: Case) -> range:
    return range(case.saved_at)


def after(case: Case) -> range:
    return range(case.saved_at, case.saved_at + AFTER)


def save(folder: Path, optimizer: Optimizer, model: nn.Module, options: StateDictOptions) -> None:
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(folder: Path, optimizer: Optimizer, model: nn.Module, options: StateDictOptions) -> None:
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options
    )


# ------------------------------------------------------------------------------------ on every rank


def uninterrupted(
    rank: int, cases: Sequence[tuple[Case, Path]], place: Place, flat: bool = False
) -> list[dict[str, Tensor]]:
    """Save each run at its moment, continue it, and return its results."""
    found = []
    for case, folder in cases:
        optimizer, model, wrapped = made(case, place)
        go(case, optimizer, model, wrapped, before(case), rank, place.ranks)
        save(folder, optimizer, wrapped, StateDictOptions(flatten_optimizer_state_dict=flat))
        go(case, optimizer, model, wrapped, after(case), rank, place.ranks)
        found.append(left(optimizer, model))
        optimizer.close()
    return found


def resumed(
    rank: int, cases: Sequence[tuple[Case, Path]], place: Place, flat: bool = False
) -> list[dict[str, Tensor]]:
    """Go on with each saved run, from a model that began elsewhere."""
    found = []
    for case, folder in cases:
        optimizer, model, wrapped = made(case, place, seed=4)
        load(folder, optimizer, wrapped, StateDictOptions(flatten_optimizer_state_dict=flat))
        assert optimizer.steps == case.saved_at
        go(case, optimizer, model, wrapped, after(case), rank, place.ranks)
        found.append(left(optimizer, model))
        optimizer.close()
    return found


# -------------------------------------------------------------------------------------- comparisons


def truth(case: Case) -> dict[str, Tensor]:
    """What the run of one process that was never interrupted leaves behind."""
    model = branched()
    optimizer = bound(model, **PERIODS, **RECIPES[case.recipe])
    go(case, optimizer, model, model, [*before(case), *after(case)])
    return left(optimizer, model, decompositions=False)


def united(ranks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks have between them.

    Raises:
        AssertionError: Two ranks have something else of the same name.
    """
    whole: dict[str, Tensor] = {}
    for found in ranks:
        for name, value in found.items():
            assert torch.equal(whole.setdefault(name, value), value), f"ranks differ in {name}"
    return whole


def identical(one: Sequence[dict[str, Tensor]], other: Sequence[dict[str, Tensor]]) -> bool:
    """Whether each rank has the same tensors bit for bit."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def deviation(ranks: Sequence[dict[str, Tensor]], true: dict[str, Tensor]) -> float:
    """The largest deviation over all tensors, relative to the largest element of each."""
    whole = united(ranks)
    scale = {name: float(value.double().abs().max()) or 1.0 for name, value in true.items()}
    return max(
        float((whole[name].double() - value.double()).abs().max()) / scale[name]
        for name, value in true.items()
    )


@attrs.frozen
class Outcome:
    """A resumed run: its deviation from the truth, and whether it equals the uninterrupted one."""

    case: Case
    source: Place
    target: Place
    deviation: float
    identical: bool

    @property
    def good(self) -> bool:
        """Whether it is as it should be."""
        return self.deviation <= PRECISION and (self.identical or self.source != self.target)


def matrix(
    cases: Sequence[Case], sources: Sequence[Place], targets: Sequence[Place], flat: bool = False
) -> list[Outcome]:
    """Save every case at every source and resume it at every target."""
    true = {case: truth(case) for case in cases}
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = {
            pair: Path(temporary) / str(number)
            for number, pair in enumerate(itertools.product(cases, sources))
        }
        went_on: dict[tuple[Case, Place], list[dict[str, Tensor]]] = {}
        for source in sources:
            asked = [(case, folders[case, source]) for case in cases]
            ranks = shared_workers().run(
                source.ranks, uninterrupted, asked, source, flat, patience=600.0
            )
            for number, case in enumerate(cases):
                went_on[case, source] = [found[number] for found in ranks]
                assert deviation(went_on[case, source], true[case]) <= PRECISION, (
                    f"{source}, not interrupted"
                )
        for target in targets:
            ranks = shared_workers().run(
                target.ranks,
                resumed,
                [(c, f) for (c, _), f in folders.items()],
                target,
                flat,
                patience=600.0,
            )
            for number, (case, source) in enumerate(folders):
                found = [each[number] for each in ranks]
                outcomes.append(
                    Outcome(
                        case,
                        source,
                        target,
                        deviation(found, true[case]),
                        identical(found, went_on[case, source]),
                    )
                )
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Tabulate largest deviations by source and target; "same" means equal bit for bit."""
    sources, targets = (
        list(dict.fromkeys(getattr(each, side) for each in outcomes))
        for side in ("source", "target")
    )
    lines = [["saved on", *map(str, targets)], ["---"] * (len(targets) + 1)]
    for source in sources:
        line = [str(source)]
        for target in targets:
            these = [each for each in outcomes if (each.source, each.target) == (source, target)]
            line.append(
                "same"
                if all(each.identical for each in these)
                else f"{max(each.deviation for each in these):.0e}"
            )
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Print the matrix; the exit code tells whether all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flat", action="store_true", help="with flatten_optimizer_state_dict")
    outcomes = matrix(CASES, SOURCES, TARGETS, parser.parse_args().flat)
    print(table(outcomes))
    good, same = (
        sum(each.good for each in outcomes),
        [each for each in outcomes if each.source == each.target],
    )
    largest = max(each.deviation for each in outcomes)
    print(f"\n{good} of {len(outcomes)} resumed runs within {PRECISION:g} of the uninterrupted one")
    print(f"largest deviation {largest:.1e}")
    equal = sum(each.identical for each in same)
    print(f"{equal} of {len(same)} equal bit for bit where ranks and placement are the same")
    return 0 if good == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
