"""`python -m mutation`: run the tests on mutants, and print the verdicts."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mutation import runner, sampled
from mutation.mutants import ROOT, Mutant, MutantError, listed
from mutation.runner import Verdict


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutants, and run nothing")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run only mutants whose name contains this; repeatable",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=120,
        metavar="N",
        help="number of mutants that cosmic-ray makes (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of that sample (default: %(default)s)",
    )
    parser.add_argument(
        "--explained", action="store_true", help="also run explained mutants of the sample"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(os.cpu_count() or 1, 8),
        metavar="N",
        help="number of parallel runs",
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run and print; the exit code is 0 where the tests noticed all mutants."""
    options = arguments(given)
    try:
        ours, reasons = listed(root), sampled.explained(root)
        made = sampled.sample(options.sample, options.seed, root)
    except MutantError as error:
        print(error, file=sys.stderr)
        return 2
    ours, made = (
        [m for m in each if not options.only or any(text in m.name for text in options.only)]
        for each in (ours, made)
    )
    if options.list:
        print(
            "\n".join(
                f"{mutant.name}  [{mutant.path}]" if mutant in ours else mutant.name
                for mutant in [*ours, *made]
            )
        )
        return 0
    start = time.monotonic()
    skipped = [mutant for mutant in made if mutant.name in reasons and not options.explained]
    running = [*ours, *(mutant for mutant in made if mutant not in skipped)]
    if not passes_unchanged(running, options.jobs, root):
        return 2
    verdicts = {}
    for verdict in runner.run(running, options.jobs, root):
        verdicts[verdict.mutant.name] = verdict
        print(
            f"[{len(verdicts)}/{len(running)}] {verdict.outcome}: {verdict.mutant.name}",
            file=sys.stderr,
            flush=True,
        )
    for mutant in skipped:
        verdicts[mutant.name] = Verdict(mutant, "explained", reasons[mutant.name], 0.0)
    failures = report(
        "the committed list", [verdicts[mutant.name] for mutant in ours], {}, strict=True
    )
    failures += report(
        f"{len(made)} mutants made by cosmic-ray, seed {options.seed}",
        [verdicts[m.name] for m in made],
        reasons,
        strict=False,
    )
    print(f"\n{time.monotonic() - start:.0f} s, {options.jobs} at a time")
    return 1 if failures else 0


def passes_unchanged(mutants: Sequence[Mutant], jobs: int, root: Path) -> bool:
    """Return whether the tests pass without mutants; otherwise every mutant would seem killed."""
    paths = sorted({path for mutant in mutants for path in mutant.tests})
    wanted = [
        path
        for path in paths
        if not any(other != path and Path(path).is_relative_to(other) for other in paths)
    ]
    if not wanted:
        return True
    with runner.Bench(root) as bench:
        try:
            outcome, by = bench.run(wanted, "kfactk", ["-n", str(jobs), "--dist", "loadgroup"])
        finally:
            bench.stop()
    if outcome != "survived":
        print(f"the tests fail without any mutant ({outcome}): {by}", file=sys.stderr)
    return outcome == "survived"


def report(
    title: str, verdicts: Sequence[Verdict], reasons: dict[str, str], *, strict: bool
) -> int:
    """Print a table of verdicts.

    Args:
        title: Its title.
        verdicts: Its rows.
        reasons: Why some mutants survive, by name.
        strict: Whether a mutant that cannot be imported is a failure. cosmic-ray makes some; the
            committed list must not contain any.

    Returns:
        The number of mutants that the tests did not notice and that are not explained.
    """
    if not verdicts:
        return 0
    print(f"\n{title}\n")
    print(f"{'outcome':<10} {'s':>6}  mutant\n{'':<10} {'':>6}    by")
    failures, counts = 0, dict[str, int]()
    for verdict in verdicts:
        mutant, outcome = verdict.mutant, verdict.outcome
        excused = mutant.name in reasons or (outcome == "invalid" and not strict)
        wrong = outcome == "broken" or (not verdict.noticed and not excused)
        failures += wrong
        counts[outcome] = counts.get(outcome, 0) + 1
        name = mutant.name if mutant.path in mutant.name else f"{mutant.name}  [{mutant.path}]"
        print(f"{outcome.upper() if wrong else outcome:<10} {verdict.seconds:6.1f}  {name}")
        if verdict.by:
            print(f"{'':<17}    {verdict.by}")
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"\n{len(verdicts)} mutants: {summary}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
