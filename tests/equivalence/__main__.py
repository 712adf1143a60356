"""Compare several ranks with one process for every recipe: `python -m tests.equivalence`."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from random import Random

import attrs
import torch

from tests.equivalence.judging import TOLERANCE, Truths, Verdict, judged
from tests.equivalence.product import RANKS, Case, cases, placements, possible, written

JOB = 24
"""Recipes that the ranks run in one job."""


@attrs.define
class Cell:
    """One placement on one number of ranks: runs, faulty runs, and the largest deviation."""

    runs: int = 0
    faulty: int = 0
    deviation: float = 0.0
    where: str = ""

    def add(self, case: Case, found: Verdict) -> None:
        """Count a run."""
        self.runs += 1
        self.faulty += bool(found.faults) or not found.deviation <= TOLERANCE
        if found.deviation >= self.deviation:
            self.deviation, self.where = found.deviation, f"{found.where}, {case}"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.equivalence", description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="N recipes at random, not all")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="which ones (default: %(default)s)"
    )
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="part I of N equal parts, for several machines or sittings",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=list(RANKS),
        metavar="R",
        help="numbers of ranks (default: 1 2 3 4)",
    )
    parser.add_argument(
        "--placement", nargs="+", metavar="NAME", help="placements by name (default: all)"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, and say by the exit code whether all runs are equal."""
    options = arguments(given)
    torch.set_num_threads(1)
    accepted, refused = cases()
    chosen = (
        accepted
        if options.sample is None
        else Random(options.seed).sample(accepted, min(options.sample, len(accepted)))
    )
    chosen = chosen[options.part[0] - 1 :: options.part[1]]
    places = [
        each
        for each in placements()
        if options.placement is None or each["name"] in options.placement
    ]
    counts = f"{len(accepted)} recipes are accepted, {len(refused)} refused"
    print(f"{counts}; {len(chosen)} run under {len(places)} placements", flush=True)
    table = {(written(place), ranks): Cell() for place in places for ranks in options.ranks}
    start, done = time.monotonic(), 0
    for job in _batched(chosen, JOB):
        truths = Truths()
        for place, ranks in itertools.product(places, options.ranks):
            taken = [case for case in job if possible(case, place)]
            for case, found in zip(taken, judged(taken, place, ranks, truths), strict=True):
                table[written(place), ranks].add(case, found)
                if found.faults or not found.deviation <= TOLERANCE:
                    told = "; ".join(
                        [f"off by {found.deviation:.1e} in the {found.where}", *found.faults]
                    )
                    print(f"{case} x {written(place)} on {ranks} ranks: {told}", flush=True)
        done += len(job)
        worst = max(cell.deviation for cell in table.values())
        seconds = time.monotonic() - start
        told = f"[{done}/{len(chosen)}] {seconds:.0f} s, largest deviation {worst:.1e}"
        print(told, file=sys.stderr, flush=True)
    report(table)
    return 1 if any(cell.faulty for cell in table.values()) or not chosen else 0


def report(table: dict[tuple[str, int], Cell]) -> None:
    """Print the table."""
    print(f"\n{'placement':<24}{'ranks':>6}{'runs':>8}{'unequal':>9}{'largest deviation':>19}  of")
    for (place, ranks), cell in table.items():
        found = f"{cell.runs:>8}{cell.faulty:>9}{cell.deviation:>19.1e}  {cell.where}"
        print(f"{place:<24}{ranks:>6}{found}")
    runs, faulty = (
        sum(getattr(cell, name) for cell in table.values()) for name in ("runs", "faulty")
    )
    worst = max(cell.deviation for cell in table.values())
    print(f"{'all':<24}{'':>6}{runs:>8}{faulty:>9}{worst:>19.1e}")


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: write 1/4 for the first of four")
    return int(number), int(parts)


def _batched(cases: Sequence[Case], size: int) -> list[Sequence[Case]]:
    return [cases[start : start + size] for start in range(0, len(cases), size)]


if __name__ == "__main__":
    sys.exit(main())
