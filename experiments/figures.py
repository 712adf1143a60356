"""The figures: metrics against epochs, and the training loss against steps and seconds.

A line is the median over seeds, a shade reaches from the smallest to the largest value, and a cross
shows where a seed diverged. A diverged seed counts as worst from there on.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import matplotlib
import numpy as np

from experiments import statistics
from experiments.results import Results
from experiments.settings import LOSSES, METRICS, Algorithm
from experiments.statistics import Array, number
from experiments.store import Run, write_atomically, write_text

matplotlib.use("Agg")
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

STYLES = {
    "sgd": ("#000000", "-", "o"),
    "kfac": ("#E69F00", "--", "s"),
    "ekfac": ("#56B4E9", "-.", "^"),
    "ekfacnag": ("#009E73", "--", "v"),
    "ekfacadam": ("#D55E00", "-", "D"),
    "ekfacradam": ("#CC79A7", "-.", "P"),
    "adamw": ("#0072B2", "--", "X"),
    "muon": ("#999999", ":", "*"),
    "soap": ("#7F3C8D", "-.", "h"),
    "short": ("#A52A2A", "-", "p"),
}
"""Colour, line and marker; distinct for colour-blind readers and in grey (Okabe and Ito)."""
OTHERS = (
    ("#332288", ":", "<"),
    ("#44AA99", "--", ">"),
    ("#AA4499", ":", "d"),
    ("#666633", "-.", "8"),
)
THESIS = dict(zip(METRICS, range(1, 5), strict=True))
"""The number of the thesis' figure of each metric."""
TITLES = {
    "train_loss": "Training loss against epochs",
    "train_accuracy": "Training error against epochs",
    "test_loss": "Test loss against epochs",
    "test_accuracy": "Test error against epochs",
    "steps": "Training loss against steps",
    "seconds": "Training loss against seconds",
}
"""The figures of a study; the first four are named after their metric."""
ROOM = 1.3
"""The factor by which the log axis reaches beyond the largest and the smallest value."""


@attrs.frozen
class Curve:
    """What a figure shows of one algorithm.

    Args:
        algorithm: The algorithm.
        x: Where, for each point.
        median: The line.
        low: Lower edge of the shade.
        high: Upper edge of the shade; infinite where a seed has diverged.
        ends: Where seeds diverged, the point before; or where the target was not reached.
        count: How many seeds diverged, and how many there are.
    """

    algorithm: Algorithm
    x: Array
    median: Array
    low: Array
    high: Array
    ends: Sequence[tuple[float, float]]
    count: tuple[int, int]

    @property
    def label(self) -> str:
        """The entry of the legend."""
        bad, all_ = self.count
        return self.algorithm.label + (f" ({bad} of {all_} diverged)" if bad else "")


@attrs.frozen
class Drawn:
    """A figure: its caption, the text of its SVG, and one sentence that says what it shows."""

    caption: str
    svg: str
    alt: str


def metric_curves(results: Results, metric: str) -> list[Curve]:
    """Return a metric against epochs: losses, and for accuracies the error in per cent."""
    found, x = [], np.arange(1.0, results.epochs + 1)
    for algorithm in results.algorithms:
        values = statistics.curves(results, algorithm.name, metric)
        values = values if statistics.is_loss(metric) else 100 - values
        runs = results.of(algorithm.name).values()
        ends = [_end(x, row, run) for row, run in zip(values, runs, strict=True)]
        found.append(_curve(results, algorithm, x, values, ends))
    return found


def _end(x: Array, row: Array, run: Run) -> tuple[float, float] | None:
    """Return the last point of a diverged run before it diverged, or its first one."""
    if not statistics.diverged(run):
        return None
    last = max(len(run.history) - 2, 0)
    return float(x[last]), float(row[last])


def course_curves(results: Results, against: str) -> list[Curve]:
    """Return the smoothed training loss against "steps" or "seconds".

    Seconds are the medians over seeds for the same number of steps.
    """
    found = []
    for algorithm in results.algorithms:
        runs = list(results.of(algorithm.name).values())
        courses = [statistics.course(run) for run in runs]
        grid = max((course.steps for course in courses), key=lambda steps: steps[-1])
        losses = np.stack([_on(grid, c.steps, c.losses, math.inf) for c in courses])
        seconds = np.stack([_on(grid, c.steps, c.seconds, math.nan) for c in courses])
        x = grid if against == "steps" else np.nanmedian(seconds, axis=0)
        first = max(run.history[0].steps for run in runs)
        whole = grid > first - 1e-6  # steps may be sums of fractions
        x, losses = x[whole], np.where(np.isfinite(losses), losses, math.inf)[:, whole]
        ends = [_course_end(x, row, run) for row, run in zip(losses, runs, strict=True)]
        found.append(_curve(results, algorithm, x, losses, ends))
    return found


def _on(grid: Array, steps: Array, values: Array, beyond: float) -> Array:
    """Return values at other steps, between those that are known."""
    with np.errstate(invalid="ignore"):
        return np.interp(grid, steps, values, right=beyond)


def _course_end(x: Array, row: Array, run: Run) -> tuple[float, float] | None:
    if not statistics.diverged(run):
        return None
    last = max(int(np.isfinite(row).sum()) - 1, 0)
    return float(x[last]), float(row[last])


def _curve(
    results: Results,
    algorithm: Algorithm,
    x: Array,
    values: Array,
    ends: Iterable[tuple[float, float] | None],
) -> Curve:
    return Curve(
        algorithm,
        x,
        np.median(values, axis=0),
        values.min(0),
        values.max(0),
        [end for end in ends if end is not None],
        statistics.diverged_seeds(results, algorithm.name),
    )


def curves(results: Results, name: str) -> list[Curve]:
    """Return what the figure of this name shows."""
    return metric_curves(results, name) if name in METRICS else course_curves(results, name)


def names(results: Results) -> list[str]:
    """Return the names of the figures of a study: keys of `TITLES`."""
    return [name for name in TITLES if name not in METRICS or name in results.metrics]


def draw(results: Results, name: str) -> Figure:
    """Draw one figure; `name` is a key of `TITLES`."""
    figure, axes = _figure((6.4, 4.4))
    _draw_curves(axes, curves(results, name))
    _label_axes(axes, name, results)
    return figure


def overview(results: Results, names: Iterable[str]) -> Figure:
    """Draw the training loss of a few algorithms against seconds, wide and in large letters."""
    with matplotlib.rc_context({"font.size": 14, "legend.fontsize": 13}):
        figure, axes = _figure((7.2, 3.8))
        chosen = set(names)
        shown = [c for c in course_curves(results, "seconds") if c.algorithm.name in chosen]
        _draw_curves(axes, shown, width=2.5)
        _label_axes(axes, "seconds", results)
    return figure


def versus(results_by_size: Mapping[int, Results]) -> Figure:
    """Draw steps and seconds to the target against the batch size, a line for each algorithm."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    for axes, what in zip(panels, ("steps", "seconds"), strict=True):
        sizes = sorted(results_by_size)
        shown = [_against_size(results_by_size, a, what) for a in _algorithms(results_by_size)]
        _draw_curves(axes, shown)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("batch size")
        axes.set_ylabel(f"{what} to the target")
    return figure


def _algorithms(results_by_size: Mapping[int, Results]) -> list[Algorithm]:
    found: dict[str, Algorithm] = {}
    for results in results_by_size.values():
        found |= {each.name: each for each in results.algorithms if each.name not in found}
    return list(found.values())


def _against_size(results_by_size: Mapping[int, Results], algorithm: Algorithm, what: str) -> Curve:
    sizes = [s for s in sorted(results_by_size) if results_by_size[s].of(algorithm.name)]
    spreads = [statistics.to_target(results_by_size[s], algorithm.name, what) for s in sizes]
    counts = [statistics.diverged_seeds(results_by_size[s], algorithm.name) for s in sizes]
    median, low, high = np.array([attrs.astuple(each) for each in spreads]).T
    bad, all_ = np.sum(counts, axis=0)
    x, reached = np.array(sizes, dtype=float), np.isfinite(median)
    low, high = (np.where(reached, each, np.nan) for each in (low, high))
    missed = [(size, np.inf) for size in x[~reached]]
    return Curve(algorithm, x, median, low, high, ends=missed, count=(int(bad), int(all_)))


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def _draw_curves(axes: Axes, shown: Sequence[Curve], width: float = 1.5) -> None:
    """Draw the curves on a log axis: zero at its lower edge, infinity at the upper one."""
    low, high = _limits(shown)
    handles = []
    for curve, style in zip(shown, _styles(shown), strict=True):
        line = np.where(np.isfinite(curve.median), curve.median.clip(low), np.nan)
        every = max(1, len(curve.x) // 10)
        handles += axes.plot(
            curve.x, line, **style, markersize=4 * width / 1.5, markevery=every, lw=width
        )
        axes.fill_between(
            curve.x,
            curve.low.clip(low, high),
            curve.high.clip(low, high),
            color=style["color"],
            alpha=0.15,
            lw=0,
        )
        for x, y in curve.ends:
            axes.plot(
                x, np.clip(y, low, high), "x", ms=10, mew=2.5, color=style["color"], clip_on=False
            )
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    _mark_axis(axes, low, high)
    axes.grid(which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes, handles, [curve.label for curve in shown])


def _limits(shown: Sequence[Curve]) -> tuple[float, float]:
    """Return the ends of the log axis, from all that can be drawn on it."""
    rows = [row for curve in shown for row in (curve.median, curve.low, curve.high)]
    values = np.concatenate(rows) if rows else np.ones(1)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return 0.1, 10.0  # nothing is finite
    return float(values.min()) / ROOM, float(values.max()) * ROOM


def _styles(shown: Sequence[Curve]) -> Iterator[dict[str, Any]]:
    others = iter(OTHERS * len(shown))
    for curve in shown:
        colour, line, marker = STYLES.get(curve.algorithm.name) or next(others)
        yield {"color": colour, "linestyle": line, "marker": marker}


def _mark_axis(axes: Axes, low: float, high: float) -> None:
    """Write plain numbers beside the log axis, not too many."""
    if high / low < 8:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    else:
        subs = (1, 2, 5) if high / low < 300 else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _legend(axes: Axes, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """Add a legend whose entries are plain text, also with `$` or a `_` in front."""
    columns = 2 if sum(map(len, labels)) < 100 else 1
    legend = axes.legend(handles, ["entry"] * len(handles), frameon=False, ncols=columns)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
        text.set_parse_math(False)


def _label_axes(axes: Axes, name: str, results: Results) -> None:
    axes.set_ylabel(_quantity(name, LOSSES[results.study.training.loss]))
    axes.set_xlabel("epoch" if name in METRICS else name)
    if name in METRICS:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    target = results.study.training.target
    if target and name not in METRICS and axes.get_ylim()[0] < target < axes.get_ylim()[1]:
        axes.axhline(target, color="#777777", lw=1, ls=(0, (1, 2)))


def _quantity(name: str, unit: str) -> str:
    if name.endswith("accuracy"):
        return f"{METRICS[name].replace('accuracy', 'error')} (%, log axis)"
    return f"{METRICS.get(name, METRICS['train_loss'])} ({unit}, log axis)"


NAMED = 3
"""How many of the lowest an alt text names, besides the highest, where there are more."""


def alt(results: Results, name: str) -> str:
    """Say what a figure shows: medians at the end, and what diverged; the table has all numbers."""
    unit = " %" if name.endswith("accuracy") else ""
    parts = []
    for curve in curves(results, name):
        last = float(curve.median[-1])
        words = number(last) + (unit if math.isfinite(last) else "")
        if name == "seconds":
            words += f" after {number(curve.x[-1])} s"
        parts.append((last, f"{curve.label} {words}"))
    if len(parts) <= NAMED + 1:
        said = ", ".join(words for _, words in parts)
    else:
        *lowest, highest = (words for _, words in sorted(parts, key=lambda part: part[0]))
        said = f"lowest {', '.join(lowest[:NAMED])}; highest {highest}"
    return f"{TITLES[name]}. Medians over seeds at the end: {said}."


def versus_alt(results_by_size: Mapping[int, Results]) -> str:
    """Say in one sentence what the figure of a batch-size study shows."""
    parts = []
    for algorithm in _algorithms(results_by_size):
        curve = _against_size(results_by_size, algorithm, "steps")
        steps = [f"{s:,.0f}" if math.isfinite(s) else "not reached" for s in curve.median]
        each = [f"{steps[i]} at {int(size)}" for i, size in enumerate(curve.x)]
        parts.append(f"{algorithm.label} {', '.join(each)}")
    return f"Steps to the target against batch size, medians over seeds: {'; '.join(parts)}."


def svg_text(figure: Figure, name: str) -> str:
    """Return a figure as SVG; the same figure gives the same text, without dates."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def save(figure: Figure, folder: Path, name: str) -> str:
    """Save a figure as `name.svg` and `name.png`, and return the text of the SVG."""
    text = svg_text(figure, name)
    write_text(folder / f"{name}.svg", text)
    write_atomically(folder / f"{name}.png", partial(figure.savefig, format="png", dpi=150))
    return text


def _caption(results: Results, name: str) -> str:
    as_there = name in THESIS and results.classifies
    return TITLES[name] + (f", as figure {THESIS[name]} of the thesis" if as_there else "")


def drawn(results: Results, name: str) -> Drawn:
    """Draw one figure of a study, without saving it."""
    svg = svg_text(draw(results, name), name)
    return Drawn(_caption(results, name), svg, alt(results, name))


def save_all(results: Results, folder: Path) -> dict[str, Drawn]:
    """Save the figures of a study, and return them by name."""
    found = {}
    for name in names(results):
        svg = save(draw(results, name), folder, name)
        found[name] = Drawn(_caption(results, name), svg, alt(results, name))
    return found
