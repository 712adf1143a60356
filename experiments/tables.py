"""Tables of a study as text cells, for the terminal, the report and the documentation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from experiments import claims, statistics
from experiments.results import Results
from experiments.settings import LOSSES, METRICS
from experiments.statistics import FAILS, HOLDS, UNDECIDED, Spread, number
from experiments.store import flatten

SHORT = {metric: name.replace("accuracy", "acc. %") for metric, name in METRICS.items()}
NOT_REACHED = "not reached"
WORDS = {HOLDS: "better", FAILS: "worse", UNDECIDED: "undecided"}


@attrs.frozen
class Table:
    """Headings and rows of text; the first cell of a row is its name."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def summary(results: Results) -> Table:
    """Return final values, cost, and what it took to reach the target, a row an algorithm."""
    target, first = results.study.training.target, results.first.label
    headings = ["algorithm", *_metrics(results, SHORT), "s/epoch", f"vs {first}"]
    if target is not None:
        headings += [f"steps to loss {target:g}", f"s to loss {target:g}", "reached it"]
    rows = [_summary_row(results, each.name) for each in results.algorithms]
    return Table([*headings, "diverged"], rows)


def _metrics(results: Results, names: Mapping[str, str]) -> list[str]:
    """Return the names of what the runs measure."""
    return [names[metric] for metric in results.metrics]


def _summary_row(results: Results, name: str) -> list[str]:
    cells = [results.label(name), *_finals(results, name), *_cost(results, name)]
    if results.study.training.target is not None:
        cells += _target(results, name)
    bad, all_ = statistics.diverged_seeds(results, name)
    return [*cells, f"{bad} of {all_}"]


def _finals(results: Results, name: str, join: str = " ") -> list[str]:
    """Return the final metrics; `diverged` where half of the seeds did."""
    bad, all_ = statistics.diverged_seeds(results, name)
    if bad >= all_ / 2:
        return ["diverged"] * len(results.metrics)
    cells = []
    for metric in results.metrics:
        write = (_short if join == "\n" else number) if statistics.is_loss(metric) else _per_cent
        cells.append(_cell(statistics.final(results, name, metric), join, write))
    return cells


def _cell(found: Spread, join: str = " ", write: Callable[[float], str] = number) -> str:
    """Return median and range; the median alone where all are equal."""
    if found.low == found.high:
        return write(found.median)
    return f"{write(found.median)}{join}[{write(found.low)}, {write(found.high)}]"


def _short(value: float) -> str:
    return number(value, digits=2)


def _steps(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else NOT_REACHED


def _per_cent(value: float) -> str:
    return f"{value:.1f}"


def _cost(results: Results, name: str) -> list[str]:
    ratio = statistics.relative_seconds(results, name)
    seconds = float(np.median(list(statistics.seconds(results, name).values())))
    return [number(seconds), "-" if ratio is None else f"{ratio:.2f}x"]


def sizes(by_size: Mapping[int, Results]) -> Table:
    """Return steps and seconds to the target by batch size, a row for each algorithm."""
    ordered = sorted(by_size)
    first = by_size[ordered[0]]
    rows = []
    for name in (each.name for each in first.algorithms):
        cells = [first.label(name)]
        for size in ordered:
            steps, seconds = (
                _cell(statistics.to_target(by_size[size], name, what), write=write)
                for what, write in (("steps", _steps), ("seconds", number))
            )
            cells.append(steps if steps == NOT_REACHED else f"{steps} steps, {seconds} s")
        rows.append(cells)
    return Table(["algorithm", *(f"batches of {size}" for size in ordered)], rows)


def _target(results: Results, name: str) -> list[str]:
    found = statistics.reached(results, name)
    count = sum(each is not None for each in found)
    steps, seconds = (statistics.to_target(results, name, what) for what in ("steps", "seconds"))
    return [
        _cell(steps, write=lambda n: f"{n:,.0f}" if math.isfinite(n) else NOT_REACHED),
        _cell(seconds, write=lambda n: number(n, NOT_REACHED)),
        f"{count} of {len(found)}",
    ]


def caption(results: Results) -> str:
    """Say what the numbers of the summary are."""
    epochs, training = results.epochs, results.study.training
    counts = sorted({len(results.of(each.name)) for each in results.algorithms})
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seeds"
    text = (
        f"After {epochs} epoch{'s' * (epochs > 1)}: median [smallest, largest] over "
        f"{seeds if counts != [1] else 'one seed'}. Training metrics are means over the steps of "
        f"the last epoch. A diverged seed counts as worst: infinite loss"
        f"{', accuracy 0' if results.classifies else ''}."
    )
    if not results.classifies:
        text += (
            f" Losses are the {LOSSES[training.loss]}, summed over its pixels; training minimises "
            "their cross entropy."
        )
    if training.target is not None:
        text += (
            f" The target is a training loss of {training.target:g}, as the mean over one epoch's "
            "steps."
        )
    if training.max_steps:
        text += f" Every run was stopped after {training.max_steps} steps: nothing is decided."
    return text


def equal_time(results: Results) -> Table | None:
    """Return the losses after the same seconds; `None` for one algorithm."""
    found = statistics.at_equal_time(results)
    rows = [[results.label(name), *map(_cell, losses)] for name, losses in found.items()]
    return Table(["algorithm", SHORT["train_loss"], SHORT["test_loss"]], rows) if rows[1:] else None


def comparisons(results: Results) -> Iterator[Table]:
    """Yield the paired comparisons with SGD, or with the first algorithm, and with each rival.

    A pair is in one table only.
    """
    names = [each.name for each in results.algorithms]
    known: set[str] = set()
    for other in (results.first.name, *results.study.training.rivals):
        if other not in names or other in known:
            continue
        known.add(other)
        rows = [_compared(results, name, other) for name in names if name not in known]
        if rows:
            metrics = _metrics(results, METRICS)
            headings = [f"against {results.label(other)}", *metrics, "common seeds"]
            yield Table(headings, rows)


def _compared(results: Results, name: str, other: str) -> list[str]:
    found = [statistics.compare(results, name, other, metric)[0] for metric in results.metrics]
    cells = [f"{each.text}: {WORDS[each.verdict]}" for each in found]
    return [results.label(name), *cells, str(found[0].seeds)]


def distances(results: Results) -> Table | None:
    """Return our final accuracies beside those that the thesis prints; `None` without any."""
    rows = [
        [
            found.label,
            found.metric,
            f"{found.thesis:g}",
            _cell(found.ours, write=lambda n: f"{n:.2f}"),
            f"{found.difference:+.2f}",
        ]
        for found in claims.distances(results)
    ]
    headings = ["algorithm", "metric", "thesis, %", "ours, %", "difference, points"]
    return Table(headings, rows) if rows else None


def searches(results: Results) -> Iterator[tuple[str, str, Table]]:
    """Yield each search of settings: its protocol, its criterion, and what it chose."""
    for protocol, search in results.searches.items():
        rows = []
        for algorithm in results.algorithms:
            chosen = search.get("chosen", {}).get(algorithm.name)
            trials = [t for t in search.get("trials", ()) if t["algorithm"] == algorithm.name]
            if chosen is None and not trials:
                continue
            bad = sum(trial["value"] is None for trial in trials)
            minutes = sum(trial["seconds"] for trial in trials) / 60
            row = [str(len(trials)), str(bad), f"{minutes:.1f}", options(chosen or {})]
            rows.append([algorithm.label, *row])
        headings = ["algorithm", "trials", "diverged", "minutes", "chosen"]
        yield protocol, str(search.get("criterion", "")), Table(headings, rows)


def options(values: Mapping[str, Any]) -> str:
    """Return settings on one line.

    Example:
        >>> options({"lr": 0.1, "clip": {"name": "kl"}})
        'lr=0.1, clip.name=kl'
    """
    return ", ".join(f"{key}={value}" for key, value in flatten(values))


def given(results: Results) -> tuple[str, Table]:
    """Return what the study sets for all algorithms of kfactk, and for each algorithm."""
    flat = {each.name: dict(flatten(each.options)) for each in results.algorithms}
    ours = [set(flat[each.name].items()) for each in results.algorithms if each.second_order]
    shared = set.intersection(*ours) if len(ours) > 1 else set()
    rows = []
    for each in results.algorithms:
        common = shared if each.second_order else set()
        own = {key: value for key, value in flat[each.name].items() if (key, value) not in common}
        rows.append([each.label, each.optimizer, options(own)])
    return options(dict(sorted(shared))), Table(["algorithm", "optimizer", "settings"], rows)


def settings(results: Results) -> tuple[Table, Table]:
    """Return all settings, defaults included: those of all runs, and those that differ."""
    columns = []
    for algorithm in results.algorithms:
        run = next(iter(results.of(algorithm.name).values()))
        columns.append({k: v for k, v in flatten(run.settings) if k != "seed"})
    keys = list(dict.fromkeys(key for each in columns for key in each))
    rows = [[key, *(str(each.get(key, "")) for each in columns)] for key in keys]
    training = flatten({"training": attrs.asdict(results.study.training)})
    shared = {row[0]: row[1] for row in rows if len(set(row[1:])) == 1}
    shared |= {key: str(value) for key, value in training if key not in keys}
    return (
        Table(["all runs", ""], list(shared.items())),
        Table(
            ["setting", *(each.label for each in results.algorithms)],
            [row for row in rows if len(set(row[1:])) > 1],
        ),
    )


def environment(results: Results) -> Table:
    """Return commit, versions and hardware; what differs among the runs with its number of runs."""
    found: dict[str, Counter[str]] = {}
    for run in results.runs:
        for key, value in flatten(run.environment):
            found.setdefault(key, Counter())[str(value)] += 1
    rows = [["device", results.device]]
    for key, counts in found.items():
        several = [f"{value} ({count} runs)" for value, count in sorted(counts.items())]
        rows.append([key, next(iter(counts)) if len(counts) == 1 else "; ".join(several)])
    return Table(["made with", ""], rows)


def for_terminal(results: Results) -> Group:
    """Return the summary for rich, at most 80 columns wide."""
    name, target = results.first.label, results.study.training.target
    rows = []
    for each in results.algorithms:
        rows.append(
            [each.label, *_finals(results, each.name, "\n"), *_cost(results, each.name)],
        )
    headings = ["algorithm", *_metrics(results, SHORT), "s/\nepoch", f"vs\n{name}"]
    parts: list[RichTable | Text] = [_rich(results.study.title, headings, rows)]
    if target is not None:
        reached = [[each.label, *_target(results, each.name)] for each in results.algorithms]
        parts.append(_rich("", ["target", "steps", "seconds", "reached"], reached))
    for each in results.algorithms:
        bad, all_ = statistics.diverged_seeds(results, each.name)
        if bad:
            parts.append(Text(f"{each.label}: {bad} of {all_} seeds diverged", style="bold"))
    return Group(*parts, Text(caption(results), style="dim"))


def _rich(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    table = RichTable(title=Text(title) if title else None, box=SIMPLE_HEAD, show_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(
            Text(heading.replace(" ", "\n", 1)),
            justify="right" if i else "left",
            overflow="fold",
            max_width=None if i else 20,
        )
    table.padding = (0, 0, 0, 0)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
