import math
import re
from pathlib import Path
from xml.etree import ElementTree

import attrs
import numpy as np
import pytest

from experiments import figures
from experiments.settings import METRICS
from tests.experiments import made_up

NAN = math.nan
LOSSES = {"sgd": [[3.0, 1.0], [1.0, 0.5], [2.0, 0.8]], "ekfacadam": [[2.0, 0.2], [1.0, 0.1]]}


def lines(axes):
    return [line for line in axes.lines if line.get_marker() not in ("x", "None", None)]


def crosses(axes):
    return [line for line in axes.lines if line.get_marker() == "x"]


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def heights(shade, x: float) -> tuple[float, float]:
    corners = shade.get_paths()[0].vertices
    found = corners[np.isclose(corners[:, 0], x)][:, 1]
    return float(found.min()), float(found.max())


def test_a_line_is_the_median_and_a_shade_the_range():
    axes = figures.draw(made_up.results(LOSSES), "train_loss").axes[0]
    assert axes.get_yscale() == "log"
    assert legend(axes) == ["SGD", "EKFACadam"]
    np.testing.assert_allclose(lines(axes)[0].get_xydata(), [[1, 2.0], [2, 0.8]])
    np.testing.assert_allclose(lines(axes)[1].get_xydata(), [[1, 1.5], [2, 0.15]])
    assert heights(axes.collections[0], 1) == (1.0, 3.0)
    assert heights(axes.collections[0], 2) == (0.5, 1.0)


def test_accuracies_are_drawn_as_errors():
    axes = figures.draw(made_up.results(LOSSES), "train_accuracy").axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "training error (%, log axis)"
    np.testing.assert_allclose(lines(axes)[0].get_ydata(), [20, 8])  # 100 - (100 - 10 * loss)


def test_an_error_of_zero_lies_on_the_lower_edge():
    axes = figures.draw(made_up.results({"sgd": [[1.0, 0.5, 0.0]]}), "test_accuracy").axes[0]
    values = lines(axes)[0].get_ydata()
    assert list(values[:2]) == [20, 10]
    assert 0 < values[2] == axes.get_ylim()[0] < 10


def test_a_diverged_seed_cuts_no_line_and_is_marked():
    losses = {"sgd": [[3.0, 2.0, 1.0], [4.0, 3.0, 2.0], [2.0, 1.5, NAN]]}
    axes = figures.draw(made_up.results(losses), "train_loss").axes[0]
    np.testing.assert_allclose(lines(axes)[0].get_xydata(), [[1, 3.0], [2, 2.0], [3, 2.0]])
    assert [line.get_xydata().tolist() for line in crosses(axes)] == [[[2, 1.5]]]
    assert legend(axes) == ["SGD (1 of 3 diverged)"]
    assert heights(axes.collections[0], 3) == (1.0, axes.get_ylim()[1])


def test_seeds_that_all_diverged_are_marked():
    losses = {"sgd": [[1.0, 1.0, 0.5]], "kfac": [[1.0, 0.7, NAN], [NAN]]}
    for name in figures.TITLES:
        axes = figures.draw(made_up.results(losses), name).axes[0]
        assert legend(axes) == ["SGD", "K-FAC (2 of 2 diverged)"]
    axes = figures.draw(made_up.results(losses), "train_loss").axes[0]
    top = axes.get_ylim()[1]
    assert [line.get_xydata().tolist()[0] for line in crosses(axes)] == [[2, 0.7], [1, top]]


def test_the_loss_against_steps_and_seconds():
    results = made_up.results({"sgd": [[2.0, 1.0], [3.0, 2.0], [4.0, 3.0]]})
    axes = figures.draw(results, "steps").axes[0]
    found = lines(axes)[0].get_xydata()
    np.testing.assert_allclose(found[:, 0], [4, 5, 6, 7, 8])
    np.testing.assert_allclose(found[:, 1], [3.0, 2.75, 2.5, 2.25, 2.0])
    axes = figures.draw(results, "seconds").axes[0]
    np.testing.assert_allclose(lines(axes)[0].get_xdata(), [2, 2.5, 3, 3.5, 4])


def test_compact_runs_are_drawn_at_the_same_steps_also_where_one_diverged():
    results = made_up.results({"sgd": [[4.0, 3.0, 2.0, 1.0]] * 2 + [[4.0, 3.0, NAN]]})
    compact = attrs.evolve(results, runs=[run.compact(8) for run in results.runs])
    assert len({len(run.history[0].losses) for run in compact.runs}) == 1
    coarse = [results.runs[0].compact(8), results.runs[1].compact(8), results.runs[2]]
    for runs in (compact.runs, coarse):
        (curve,) = figures.course_curves(attrs.evolve(results, runs=runs), "steps")
        np.testing.assert_allclose(curve.x, [4, 6, 8, 10, 12, 14, 16])
        np.testing.assert_allclose(curve.median, [4, 3.5, 3, 2.5, 2, 1.5, 1])
        assert np.isinf(curve.high[-3:]).all()
        assert curve.ends == [(8.0, 3.0)]


def test_a_run_that_broke_off_in_its_first_epoch_hides_no_other():
    results = made_up.results({"sgd": [[NAN], [2.0, 1.0], [3.0, 2.0]]})
    broken = made_up.epoch(1, NAN, steps=1, losses=(NAN,), times=(0.5,))
    runs = [attrs.evolve(results.runs[0], history=(broken,)), *results.runs[1:]]
    (curve,) = figures.course_curves(attrs.evolve(results, runs=runs), "steps")
    np.testing.assert_allclose(curve.x, [4, 5, 6, 7, 8])
    np.testing.assert_allclose(curve.median, [3, 2.75, 2.5, 2.25, 2])
    np.testing.assert_allclose(curve.low, [2, 1.75, 1.5, 1.25, 1])
    # Chunks of 27 / 14 steps: their sum is less than 27.
    thinned = made_up.epoch(1, 1.0, steps=27, losses=(1.0,) * 14, times=(0.5,) * 14)
    run = attrs.evolve(results.runs[1], history=(thinned,))
    (curve,) = figures.course_curves(attrs.evolve(results, runs=[run]), "steps")
    np.testing.assert_allclose(curve.x, [27])


def test_labels_are_plain_text(tmp_path: Path):
    results = made_up.results({"sgd": [[1.0, 0.5]], "mine": [[1.0, 0.5]]})
    mine = attrs.evolve(results.study.algorithms["mine"], label="_a$b_c$ <&>")
    study = attrs.evolve(results.study, algorithms={**results.study.algorithms, "mine": mine})
    svg = figures.save(
        figures.draw(attrs.evolve(results, study=study), "train_loss"), tmp_path, "x"
    )
    texts = [
        "".join(each.itertext())
        for each in ElementTree.fromstring(svg).iter()
        if "text" in each.tag
    ]
    assert {"_a$b_c$ <&>", "SGD", "epoch", "training loss (nats, log axis)"} <= set(texts)


def test_figures_are_saved_the_same_each_time(tmp_path: Path):
    results = made_up.results(LOSSES)
    drawn = figures.save_all(results, tmp_path)
    assert list(drawn) == [*METRICS, "steps", "seconds"]
    for name, each in drawn.items():
        assert (tmp_path / f"{name}.svg").read_text() == each.svg
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert figures.drawn(results, name).svg == each.svg
    assert not re.search(r"\d{4}-\d\d-\d\dT", "".join(each.svg for each in drawn.values()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train_loss", "SGD 0.800, K-FAC (1 of 3 diverged) 0.600."),
        ("train_accuracy", "SGD 8.00 %, K-FAC (1 of 3 diverged) 6.00 %."),
        ("seconds", "SGD 0.800 after 4.00 s, K-FAC (1 of 3 diverged) 0.600 after 6.00 s."),
    ],
)
def test_alt_texts_have_the_main_numbers(name, expected):
    losses = {"sgd": LOSSES["sgd"], "kfac": [[1.0, 0.5], [1.0, 0.6], [1.0, NAN]]}
    text = figures.alt(made_up.results(losses), name)
    assert text == f"{figures.TITLES[name]}. Medians over seeds at the end: {expected}"


def test_alt_texts_of_many_algorithms_name_the_lowest_and_the_highest():
    losses = {"sgd": 0.9, "kfac": 0.5, "ekfac": 0.4, "ekfacnag": 0.6, "ekfacadam": 0.3}
    results = made_up.results({name: [[1.0, last]] for name, last in losses.items()})
    text = figures.alt(results, "train_loss")
    assert text.endswith("lowest EKFACadam 0.300, EKFAC 0.400, K-FAC 0.500; highest SGD 0.900.")


def test_the_overview_shows_chosen_algorithms_on_white():
    losses = {name: [[1.0, 0.5]] for name in made_up.ALL}
    figure = figures.overview(made_up.results(losses), ["ekfacadam", "sgd"])
    assert legend(figure.axes[0]) == ["SGD", "EKFACadam"]
    assert figure.get_facecolor() == (1, 1, 1, 1)
    width, height = figure.get_size_inches()
    assert width > 1.5 * height


def test_steps_and_seconds_to_the_target_against_batch_size():
    sizes = {
        64: made_up.results({"sgd": [[1.0, 0.5]], "kfac": [[0.5, 0.4]]}),
        16: made_up.results({"sgd": [[0.5, 0.4]], "kfac": [[0.9, 0.8]]}),
    }
    figure = figures.versus(sizes)
    steps, seconds = figure.axes
    assert {axes.get_xscale() for axes in (steps, seconds)} == {"log"}
    assert {axes.get_yscale() for axes in (steps, seconds)} == {"log"}
    np.testing.assert_array_equal(lines(steps)[0].get_xydata(), [[16, 4], [64, 8]])
    np.testing.assert_array_equal(lines(seconds)[0].get_xydata(), [[16, 2], [64, 4]])
    np.testing.assert_array_equal(lines(steps)[1].get_ydata(), [NAN, 4])
    crosses = [line for line in steps.get_lines() if line.get_marker() == "x"]
    assert [float(line.get_xdata()[0]) for line in crosses] == [16]  # not reached
    assert legend(steps) == ["SGD", "K-FAC"]
    assert "SGD 4 at 16, 8 at 64; K-FAC not reached at 16, 4 at 64" in figures.versus_alt(sizes)
