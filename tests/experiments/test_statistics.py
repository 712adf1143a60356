import itertools
import math

import attrs
import numpy as np
import pytest

from experiments import statistics
from experiments.statistics import FAILS, HOLDS, UNDECIDED, Spread
from tests.experiments import made_up

NAN = math.nan


def compare(losses, metric="train_loss", **changes):
    return statistics.compare(made_up.results(losses, **changes), "kfac", "sgd", metric)[0]


def test_a_diverged_seed_counts_as_worst_and_is_counted():
    results = made_up.results({"sgd": [[1.0, 0.5, 0.4], [1.0, NAN], [1.0, 0.25, 0.2]]})
    np.testing.assert_array_equal(
        statistics.curves(results, "sgd", "train_loss"),
        [[1.0, 0.5, 0.4], [1.0, math.inf, math.inf], [1.0, 0.25, 0.2]],
    )
    assert statistics.final(results, "sgd", "train_loss") == statistics.Spread(0.4, 0.2, math.inf)
    assert statistics.final(results, "sgd", "test_accuracy").low == 0
    assert statistics.final(results, "sgd", "test_accuracy").median == 92
    assert statistics.diverged_seeds(results, "sgd") == (1, 3)


def test_a_run_that_ends_with_values_that_are_not_finite_has_diverged():
    ended = made_up.run("sgd", 0, [1.0, 0.5])
    last = attrs.evolve(ended.history[-1], test_loss=math.inf)
    ended = attrs.evolve(ended, history=(ended.history[0], last))
    assert ended.status == "finished"
    assert statistics.diverged(ended)
    assert list(statistics.values(ended, "train_loss", 2)) == [1.0, math.inf]
    assert list(statistics.values(ended, "train_accuracy", 2)) == [90.0, 0.0]


def test_medians_of_an_even_number_of_seeds_with_half_of_them_diverged():
    results = made_up.results({"sgd": [[1.0, NAN], [1.0, NAN], [1.0, 0.5], [1.0, 0.5]]})
    assert statistics.final(results, "sgd", "train_loss").median == math.inf


@pytest.mark.parametrize("count", [5, 6, 7])
def test_the_bootstrap_agrees_with_a_count_of_all_samples(count):
    values = np.array([0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])[:count]
    medians = np.median(list(itertools.product(values, repeat=count)), axis=1)
    expected = np.quantile(medians, [0.025, 0.975], method="inverted_cdf")
    np.testing.assert_allclose(statistics.bootstrap(values[:, None])[0], expected)


def test_ratios_of_losses_and_differences_of_accuracies_are_paired():
    sgd = [[2.0], [4.0], [6.0], [8.0], [1.0]]
    kfac = [[1.0], [3.0], [3.0], [2.0], [0.9]]  # ratios 1/2, 3/4, 1/2, 1/4, 9/10
    found = compare({"sgd": sgd, "kfac": kfac})
    assert found.median == pytest.approx(0.5)
    assert found.interval == pytest.approx((0.25, 0.9))
    assert found.text == "0.500 [0.250, 0.900]"
    assert (found.verdict, found.seeds) == (HOLDS, 5)
    found = compare({"sgd": sgd, "kfac": kfac}, "train_accuracy")  # 10, 10, 30, 60, 1 points
    assert found.text == "+10.00 points [+1.00, +60.00]"
    assert found.verdict == HOLDS


@pytest.mark.parametrize("metric", ["train_loss", "train_accuracy", "test_loss", "test_accuracy"])
def test_the_worse_one_does_not_hold(metric):
    losses = {"sgd": [[1.0]] * 5, "kfac": [[2.0]] * 5}
    assert compare(losses, metric).verdict == FAILS
    losses = {"sgd": [[2.0]] * 5, "kfac": [[1.0]] * 5}
    assert compare(losses, metric).verdict == HOLDS


def test_undecided():
    tie = compare({"sgd": [[1.0]] * 8, "kfac": [[1.0]] * 8})
    assert (tie.verdict, tie.text) == (UNDECIDED, "1.00 [1.00, 1.00]")
    both = compare({"sgd": [[1.0]] * 8, "kfac": [[0.5], [2.0]] * 4})
    assert both.verdict == UNDECIDED
    assert both.interval[0] < 1 < both.interval[1]
    few = compare({"sgd": [[1.0]] * 4, "kfac": [[0.5]] * 4})
    assert (few.verdict, few.interval) == (UNDECIDED, None)
    assert compare({"sgd": [[1.0]] * 5, "kfac": [[0.5]] * 5}).verdict == HOLDS
    limited = compare({"sgd": [[1.0]] * 5, "kfac": [[0.5]] * 5}, max_steps=3)
    assert limited.verdict == UNDECIDED


def test_only_common_seeds_are_compared():
    results = made_up.results({"sgd": [[1.0]] * 6, "kfac": [[0.5]] * 6})
    moved = [
        attrs.evolve(run, seed=run.seed + 2) if run.algorithm == "kfac" else run
        for run in results.runs
    ]
    found = statistics.compare(attrs.evolve(results, runs=moved), "kfac", "sgd", "train_loss")[0]
    assert (found.seeds, found.verdict) == (4, UNDECIDED)
    moved = [
        attrs.evolve(run, seed=run.seed + 9) if run.algorithm == "kfac" else run
        for run in results.runs
    ]
    found = statistics.compare(attrs.evolve(results, runs=moved), "kfac", "sgd", "train_loss")[0]
    assert (found.seeds, found.verdict, found.text) == (0, UNDECIDED, "no common seeds")


def test_diverged_seeds_are_compared_as_worst():
    good, bad = [1.0, 0.5], [1.0, NAN]
    assert compare({"sgd": [good] * 5, "kfac": [bad] * 5}).text == "infinite [infinite, infinite]"
    assert compare({"sgd": [good] * 5, "kfac": [bad] * 5}).verdict == FAILS
    assert compare({"sgd": [bad] * 5, "kfac": [good] * 5}).verdict == HOLDS
    tie = compare({"sgd": [bad] * 5, "kfac": [bad] * 5})
    assert (tie.verdict, tie.median) == (UNDECIDED, 1.0)
    some = compare({"sgd": [good] * 5, "kfac": [[1.0, 0.25]] * 4 + [bad]})
    assert some.text == "0.500 [0.500, infinite]"
    either = compare({"sgd": [good, bad] * 3, "kfac": [bad, good] * 3})
    assert (either.verdict, either.text) == (UNDECIDED, "1.00 [0.00, infinite]")


def test_all_hold():
    for verdicts in itertools.product((HOLDS, FAILS, UNDECIDED), repeat=3):
        expected = FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
        assert statistics.all_hold(verdicts) == expected


def by_step(**changes):
    """Two epochs of four steps; sums over the last four: 10, 7, 5, 4, 4 from step 4 on."""
    history = (
        made_up.epoch(1, 2.5, losses=(4.0, 3.0, 2.0, 1.0)),
        made_up.epoch(2, 1.0, losses=(1.0, 1.0, 1.0, 1.0), times=(0.5, 1.0, 0.5, 0.5)),
    )
    return made_up.run("sgd", 0, [2.5, 1.0], history=history, **changes)


def test_the_target_is_reached_by_the_mean_over_an_epochs_steps():
    assert statistics.reach(by_step(), 1.25) == statistics.Reached(6, 3.5)
    assert statistics.reach(by_step(), 2.4) == statistics.Reached(5, 2.5)
    assert statistics.reach(by_step(), 3.5) == statistics.Reached(4, 2.0)  # of a whole epoch
    assert statistics.reach(by_step(), 0.99) is None
    assert statistics.reach(by_step(), None) is None
    assert statistics.reach(by_step(status="diverged"), 1.25) is None


def test_chunks_count_as_often_as_they_have_steps():
    compact = by_step().compact(4)
    assert compact.history[0].losses == (3.5, 1.5)
    assert statistics.reach(compact, 1.25) == statistics.Reached(6, 3.5)
    uneven = attrs.evolve(
        compact,
        history=tuple(attrs.evolve(each, steps=5, losses=(2.0, 1.0)) for each in compact.history),
    )
    np.testing.assert_allclose(statistics.course(uneven).steps, [2.5, 5, 7.5, 10])
    np.testing.assert_allclose(statistics.course(uneven).losses, [NAN, 1.5, 1.5, 1.5])


def test_a_run_without_losses_of_steps_has_those_of_epochs():
    run = made_up.run("sgd", 0, [2.0, 1.0, 0.5])
    bare = [attrs.evolve(each, losses=(), times=()) for each in run.history]
    assert statistics.reach(attrs.evolve(run, history=tuple(bare)), 1.0) == statistics.Reached(8, 4)


def test_steps_to_the_target_are_infinite_where_it_was_not_reached():
    results = made_up.results({"sgd": [[1.0, 0.5], [1.0, 0.9], [0.5, 0.5]]}, target=0.5)
    found = statistics.to_target(results, "sgd", "steps")
    assert found == statistics.Spread(8, 4, math.inf)
    assert [each is None for each in statistics.reached(results, "sgd")] == [False, True, False]


def test_the_time_of_an_epoch_is_relative_to_sgd():
    losses = {"kfac": [[1.0, 1.0]], "sgd": [[1.0, 1.0]]}
    assert statistics.relative_seconds(made_up.results(losses), "kfac") == 1.5
    assert statistics.relative_seconds(made_up.results({"kfac": [[1.0, 1.0]]}), "kfac") == 1.0


def test_epochs_that_broke_off_have_no_time():
    run = made_up.run("sgd", 0, [1.0, NAN])
    short = attrs.evolve(run.history[1], steps=1, seconds=0.1)
    results = attrs.evolve(
        made_up.results({"sgd": [[1.0]]}),
        runs=[attrs.evolve(run, history=(run.history[0], short))],
    )
    assert statistics.seconds(results, "sgd") == {0: 2.0}


def test_equal_time_is_that_of_the_quickest_of_each_seed():
    """SGD takes 2 s for an epoch and ends after 6 s; K-FAC takes 3 s, and has then done two."""
    losses = {"sgd": [(4.0, 3.0, 2.0)] * 2, "kfac": [(4.0, 1.0, 0.5), (4.0, 3.0, NAN)]}
    found = statistics.at_equal_time(made_up.results(losses))
    assert found["sgd"] == (Spread(2.0, 2.0, 2.0), Spread(4.0, 4.0, 4.0))
    assert found["kfac"][0] == Spread(math.inf, 1.0, math.inf)
    assert found["kfac"][1] == Spread(math.inf, 2.0, math.inf)
    halfway = made_up.results({"sgd": [(4.0, 3.0)], "kfac": [(4.0, 2.0)]})
    train, test = statistics.at_equal_time(halfway)["kfac"]  # after 4 s: a third of epoch 2
    assert test.median == pytest.approx(8 - (8 - 4) / 3)
    assert 2.0 < train.median < 4.0
