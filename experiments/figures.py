"""The four figures: one metric against the epoch, a line for each algorithm, on a log axis.

The line is the mean over seeds; the shade reaches from the smallest to the largest value.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np

from experiments.files import write_atomically, write_text
from experiments.results import METRICS, Results

matplotlib.use("Agg")
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = {
    "sgd": ("#000000", "-", "o"),
    "kfac": ("#E69F00", "--", "s"),
    "ekfac": ("#56B4E9", "-.", "^"),
    "ekfacnag": ("#009E73", "--", "v"),
    "ekfacadam": ("#D55E00", "-", "D"),
    "ekfacradam": ("#CC79A7", "-.", "P"),
}
"""Colour, line and marker; distinct for colour-blind readers and in grey (Okabe and Ito)."""
OTHERS = (("#0072B2", ":", "X"), ("#999999", ":", "*"), ("#7F3C8D", ":", "h"))


def draw(results: Results, metric: str) -> Figure:
    """Draw one figure.

    Args:
        results: The runs.
        metric: A key of `METRICS`.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    epochs = np.arange(1, results.epochs + 1)
    others = iter(OTHERS * len(results.algorithms))
    for algorithm in results.algorithms:
        curves = results.curves(algorithm.name, metric)
        known = np.isfinite(curves).all(0)
        colour, line, marker = STYLES.get(algorithm.name) or next(others)
        mean, low, high = (reduce(curves[:, known], axis=0) for reduce in (np.mean, np.min, np.max))
        every = max(1, results.epochs // 10)
        axes.plot(
            epochs[known],
            mean,
            label=f" {algorithm.label}" if algorithm.label.startswith("_") else algorithm.label,
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=4,
            markevery=every,
            lw=1.5,
        )
        axes.fill_between(epochs[known], low, high, color=colour, alpha=0.15, lw=0)
    _finish(axes, metric)
    return figure


def _finish(axes: Axes, metric: str) -> None:
    accuracy = metric.endswith("accuracy")
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel(METRICS[metric] + (" (%)" if accuracy else " (nats)"))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    if accuracy or high / low < 30:
        plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(which="major", alpha=0.3)
    legend = axes.legend(
        frameon=False, ncols=2, fontsize="small", loc="lower right" if accuracy else "upper right"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label is plain text, also with $


def save_all(results: Results, folder: Path) -> dict[str, str]:
    """Save the four figures as PNG and SVG, and return the text of the SVG by metric."""
    drawn = {}
    for metric in METRICS:
        figure, text = draw(results, metric), io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": metric, "svg.fonttype": "path"}):
            figure.savefig(text, format="svg", metadata={"Date": None})
        drawn[metric] = text.getvalue()
        write_text(folder / f"{metric}.svg", drawn[metric])
        write_atomically(folder / f"{metric}.png", partial(figure.savefig, format="png", dpi=150))
    return drawn
