"""Plots of step times, peak memory and scaling, as PNG and SVG beside the results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

MIB = 2**20
OURS, OTHERS, LEAST = "#1f77b4", "#9aa5b1", "#d62728"


def race(found: dict[str, Any]) -> Figure:
    """Plot mean steps as bars, with floor, median and worst step; one panel for each width."""
    races = found["races"]
    names = list(races[0]["settings"])
    figure, panels = plt.subplots(
        1,
        len(races),
        figsize=(5.5 * len(races) + 2, 0.42 * len(names) + 1.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, each in zip(panels[0], races, strict=True):
        for place, name in enumerate(names):
            setting = each["settings"][name]
            mean = setting["mean"]
            panel.barh(place, mean, color=OURS if setting["stages"] else OTHERS)
            panel.plot(setting["median"], place, "o", color="black", markersize=4)
            if setting["floor"] is not None:
                panel.plot(
                    [setting["floor"]] * 2, [place - 0.4, place + 0.4], color=LEAST, linewidth=2
                )
            panel.annotate(
                f"{mean:.2f}  (worst {setting['worst']:.1f})",
                (mean, place),
                (4, 0),
                textcoords="offset points",
                va="center",
            )
        panel.axvline(1.0, color="black", linewidth=0.6)
        panel.set(
            title=f"{each['task']}, {each['device']}",
            xlabel=f"mean step, x {each['baseline']}",
            yticks=range(len(names)),
            yticklabels=names,
        )
        panel.set_xlim(0, 1.45 * max(each["settings"][name]["mean"] for name in names))
    panels[0][0].invert_yaxis()
    figure.suptitle(
        "Bars: mean; dots: median; red: arithmetic floor; worst: worst step / median", fontsize=9
    )
    return figure


def memory(found: dict[str, Any]) -> Figure:
    """Plot peaks above SGD's as bars, with the kept and allowed bytes; one panel for each width."""
    runs = found["runs"]
    names = [name for name, each in runs[0]["settings"].items() if each["above"] > 0]
    figure, panels = plt.subplots(
        1,
        len(runs),
        figsize=(5.5 * len(runs) + 2, 0.42 * len(names) + 1.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, run in zip(panels[0], runs, strict=True):
        for place, name in enumerate(names):
            each = run["settings"][name]
            panel.barh(place, each["above"] / MIB, color=OURS if "least" in each else OTHERS)
            if "least" in each:
                for value, style in (
                    (each["least"], "-"),
                    (1.5 * each["least"] + each["workspace"], ":"),
                ):
                    panel.plot(
                        [value / MIB] * 2,
                        [place - 0.4, place + 0.4],
                        color=LEAST,
                        linewidth=2,
                        linestyle=style,
                    )
        panel.set(
            title=f"{run['width']} channels, {run['device']}",
            xlabel="peak above SGD, MiB",
            yticks=range(len(names)),
            yticklabels=names,
        )
    panels[0][0].invert_yaxis()
    figure.suptitle(
        "Red: kept between steps; dotted: 1.5 x that and one layer's workspace", fontsize=9
    )
    return figure


def scaling(found: dict[str, Any]) -> Figure:
    """Plot the seconds of due stages over each dimension, with their exponents."""
    dimensions = found["dimensions"]
    figure, panels = plt.subplots(
        1,
        len(dimensions),
        figsize=(4.2 * len(dimensions), 5.5),
        squeeze=False,
        layout="constrained",
    )
    for panel, (dimension, each) in zip(panels[0], dimensions.items(), strict=True):
        for name, slope in each["exponents"].items():
            values = [
                1e3 * point["sgd" if name == "step of SGD" else name] for point in each["seconds"]
            ]
            panel.plot(
                each["sizes"],
                values,
                "o-",
                label=f"{name} ~ {slope:.2f}",
                color="black" if name == "step of SGD" else None,
                markersize=3,
            )
        panel.set(
            title=dimension, xscale="log", yscale="log", xlabel=dimension, ylabel="ms when due"
        )
        panel.set_xticks(each["sizes"], labels=[str(size) for size in each["sizes"]])
        panel.minorticks_off()
        panel.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return figure


PLOTS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "race": race,
    "memory": memory,
    "scaling": scaling,
}
"""Plots by the part whose results they show."""


def draw(folder: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Plot all results in a folder, into that folder."""
    mpl.use("agg")
    written = []
    for part, plot in PLOTS.items():
        source = folder / f"{part}.json"
        if source.exists():
            figure = plot(json.loads(source.read_text()))
            for suffix in formats:
                written.append(folder / f"{part}.{suffix}")
                figure.savefig(written[-1], bbox_inches="tight", dpi=150)
            plt.close(figure)
    return written


def main() -> None:
    """Plot, and print the names of the written files."""
    parser = argparse.ArgumentParser(
        prog="plot", description="Plots of the results of race, memory and scaling."
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results, and for the plots"
    )
    folder = parser.parse_args().output
    written = draw(folder)
    if not written:
        parser.error(
            f"{folder} has none of {', '.join(f'{part}.json' for part in PLOTS)}: run those parts "
            f"with --output {folder} first"
        )
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
