"""Plots show the given results."""

import json

import pytest
from matplotlib.container import BarContainer

from benchmarks import plot

SETTING = {
    "mean": 1.5,
    "median": 1.2,
    "worst": 2.0,
    "floor": 1.25,
    "stages": {"fisher": 0.1},
    "floors": {"fisher": 0.05},
    "seconds": [1.0],
}
BASE = {
    "mean": 1.0,
    "median": 1.0,
    "worst": 1.1,
    "floor": None,
    "stages": {},
    "floors": {},
    "seconds": [1.0],
}
RESULTS = {
    "race": {
        "races": [
            {
                "task": f"ResNet-8, {width} channels",
                "baseline": "SGD",
                "device": "cpu",
                "settings": {"SGD": BASE, "ours": SETTING},
            }
            for width in (16, 64)
        ]
    },
    "memory": {
        "runs": [
            {
                "width": 16,
                "device": "cpu",
                "settings": {
                    "SGD": {"above": 0},
                    "ours": {"above": 3 * 2**20, "least": 2**20, "workspace": 0},
                },
            }
        ]
    },
    "scaling": {
        "dimensions": {
            "width": {
                "sizes": [1, 2],
                "seconds": [{"sgd": 1.0, "fisher": 2.0}] * 2,
                "exponents": {"step of SGD": 0.0, "fisher": 0.0},
            }
        }
    },
}


@pytest.fixture(autouse=True)
def headless():
    plot.mpl.use("agg")
    yield
    plot.plt.close("all")


def lengths(panel):
    return [
        bar.get_width()
        for bars in panel.containers
        if isinstance(bars, BarContainer)
        for bar in bars
    ]


def test_race_plots_means_and_floors():
    figure = plot.race(RESULTS["race"])
    assert len(figure.axes) == 2
    for panel in figure.axes:
        assert lengths(panel) == [1.0, 1.5]
        assert [1.25, 1.25] in [list(line.get_xdata()) for line in panel.lines]


def test_memory_plots_mebibytes():
    [panel] = plot.memory(RESULTS["memory"]).axes
    assert lengths(panel) == [3.0]
    assert [list(line.get_xdata()) for line in panel.lines] == [[1.0, 1.0], [1.5, 1.5]]


def test_scaling_plots_milliseconds():
    [panel] = plot.scaling(RESULTS["scaling"]).axes
    assert [list(line.get_ydata()) for line in panel.lines] == [[1000.0, 1000.0], [2000.0, 2000.0]]


def test_existing_results_are_plotted(tmp_path):
    assert plot.draw(tmp_path) == []
    for part in ("race", "scaling"):
        (tmp_path / f"{part}.json").write_text(json.dumps(RESULTS[part]))
    assert {path.name for path in plot.draw(tmp_path)} == {
        "race.png",
        "race.svg",
        "scaling.png",
        "scaling.svg",
    }
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
