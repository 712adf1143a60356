import math
from pathlib import Path

import numpy as np
import pytest

from experiments import figures
from experiments.results import METRICS


@pytest.mark.parametrize("metric", METRICS)
def test_figures_show_mean_and_spread_of_every_algorithm(made_up, metric):
    results = made_up({"sgd": [[3.0, 1.0], [1.0, 0.5]], "ekfacadam": [[2.0, 0.2], [1.0, 0.1]]})
    axes = figures.draw(results, metric).axes[0]
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == ["SGD", "EKFACadam"]
    for line, shade, name in zip(axes.lines, axes.collections, ("sgd", "ekfacadam"), strict=True):
        curves = results.curves(name, metric)
        np.testing.assert_array_equal(line.get_xdata(), [1, 2])
        np.testing.assert_allclose(line.get_ydata(), curves.mean(0))
        corners = shade.get_paths()[0].vertices
        for epoch in (1, 2):
            heights = corners[corners[:, 0] == epoch][:, 1]
            np.testing.assert_allclose(
                [heights.min(), heights.max()],
                [curves[:, epoch - 1].min(), curves[:, epoch - 1].max()],
            )


def test_diverged_runs_are_drawn_while_finite(made_up):
    axes = figures.draw(
        made_up({"sgd": [[3.0, 1.0, 0.5]], "kfac": [[3.0, math.nan]]}), "train_loss"
    ).axes[0]
    assert [len(line.get_xdata()) for line in axes.lines] == [3, 1]


def test_four_figures_are_saved(made_up, tmp_path: Path):
    drawn = figures.save_all(made_up({"sgd": [[3.0, 1.0]]}), tmp_path)
    assert list(drawn) == list(METRICS)
    for metric, svg in drawn.items():
        assert (tmp_path / f"{metric}.svg").read_text() == svg
        assert (tmp_path / f"{metric}.png").read_bytes().startswith(b"\x89PNG")
