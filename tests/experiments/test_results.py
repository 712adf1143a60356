import math

import numpy as np
import pytest

from experiments import table


def test_final_values_are_means_and_ranges_over_seeds(made_up):
    results = made_up({"sgd": [[3.0, 1.0], [3.0, 2.0], [3.0, 6.0]], "kfac": [[1.0, 0.5]]})
    spread = results.final("sgd", "train_loss")
    assert (spread.mean, spread.low, spread.high) == (3.0, 1.0, 6.0)
    assert spread.text(2) == "3.00±2.50"
    assert results.final("sgd", "test_accuracy").mean == pytest.approx(94.0)
    assert results.final("kfac", "train_loss").text(2) == "0.50"
    assert [algorithm.name for algorithm in results.algorithms] == ["sgd", "kfac"]


def test_small_losses_keep_their_digits(made_up):
    results = made_up({"sgd": [[0.0002], [0.0004]], "kfac": [[0.00105], [0.00105]]})
    assert results.final("sgd", "train_loss").text(4) == "3.0e-04±1.0e-04"
    assert results.final("kfac", "train_loss").text(4) == "0.0010±0.0000"


def test_cost_is_relative_to_sgd(made_up):
    results = made_up({"sgd": [[1.0, 1.0]], "kfac": [[1.0, 1.0]]})
    assert results.relative_seconds("kfac") == 1.5
    assert made_up({"kfac": [[1.0, 1.0]]}).relative_seconds("kfac") is None


def test_diverged_seeds_show(made_up):
    results = made_up({"sgd": [[2.0, 1.0, 0.5], [2.0, math.nan]]})
    np.testing.assert_array_equal(
        results.curves("sgd", "train_loss"), [[2.0, 1.0, 0.5], [2.0, np.nan, np.nan]]
    )
    assert not math.isfinite(results.final("sgd", "train_loss").mean)
    assert table.rows(results)[0][1] == "diverged"


def test_table_fits_80_columns(made_up):
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(
        table.for_terminal(
            made_up(
                {
                    "sgd": [[0.1234], [0.4321]],
                    "ekfacradam": [[0.0], [0.9999]],
                    "kfac": [[1e-5], [2e-5]],
                }
            )
        )
    )
    text = console.export_text()
    for word in (
        "EKFACradam",
        "0.2777±0.1543",
        "99.72±0.15",
        "1.50x",
        "seeds 0, 1",
        "1.5e-05±5.0e-06",
    ):
        assert word in text
    assert "…" not in text
