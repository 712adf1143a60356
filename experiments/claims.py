"""The claims of the thesis, judged on our own runs, whichever way they come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import attrs
import numpy as np

from experiments import statistics
from experiments.results import Results
from experiments.settings import METRICS
from experiments.statistics import FAILS, HOLDS, UNDECIDED, Comparison, Spread, all_hold

NEW = ("ekfacnag", "ekfacadam", "ekfacradam")
"""The methods that the thesis introduces."""
OLD = ("sgd", "kfac", "ekfac")
"""The baselines that it compares them with."""
ALL = (*NEW, *OLD)
EARLY = 10
"""The thesis' number of first epochs."""
ABOUT_THREE = (2.0, 4.0)
"""The points that "about 3 points" allows."""
OPEN = "cannot be judged"
OPPOSITE = {HOLDS: FAILS, FAILS: HOLDS, UNDECIDED: UNDECIDED}

Judged = tuple[str, str]


@attrs.frozen
class Claim:
    """A claim of the thesis.

    Args:
        text: The claim.
        verdict: "holds", "does not hold", "undecided" or "cannot be judged".
        evidence: The numbers behind the verdict, or what is missing, in one sentence.
    """

    text: str
    verdict: str
    evidence: str


@attrs.frozen
class Distance:
    """A final accuracy beside the one that the thesis prints.

    Args:
        label: The algorithm.
        metric: Name of the metric.
        thesis: What the thesis prints, in per cent.
        ours: Ours, over seeds.
    """

    label: str
    metric: str
    thesis: float
    ours: Spread

    @property
    def difference(self) -> float:
        """Our median minus the thesis' value, in points."""
        return self.ours.median - self.thesis


def check(results: Results) -> list[Claim]:
    """Judge every claim."""
    have = {algorithm.name for algorithm in results.algorithms}
    judged = []
    for text, needed, judge in CLAIMS:
        if not results.classifies:
            judged.append(Claim(text, OPEN, "these runs do not classify"))
        elif missing := [name for name in needed if name not in have]:
            judged.append(Claim(text, OPEN, f"there are no runs of {', '.join(missing)}"))
        elif results.epochs < 2:
            judged.append(Claim(text, OPEN, "one epoch is too little"))
        else:
            verdict, evidence = judge(results)
            judged.append(Claim(text, verdict, evidence + _limits(results, verdict, needed)))
    return judged


def distances(results: Results) -> list[Distance]:
    """Return the final accuracies beside those that the thesis prints for these algorithms."""
    return [
        Distance(each.label, METRICS[metric], value, statistics.final(results, each.name, metric))
        for each in results.algorithms
        for metric, value in each.reference.items()
    ]


def _limits(results: Results, verdict: str, names: Iterable[str]) -> str:
    """Return why the runs allow no verdict at all, if they do not."""
    limit = results.study.training.max_steps
    common = set.intersection(*(set(results.of(name)) for name in names))
    if verdict == UNDECIDED and limit:
        return f"; the runs were stopped after {limit} steps"
    if verdict == UNDECIDED and len(common) < statistics.LEAST_SEEDS:
        return f"; {len(common)} common seeds are too few, {statistics.LEAST_SEEDS} are needed"
    return ""


def _pairs(
    results: Results,
    firsts: Sequence[str],
    others: Sequence[str],
    metric: str,
    epochs: Sequence[int] = (),
) -> list[Comparison]:
    """Compare each of some algorithms with each of others; by default after the last epoch."""
    return [
        comparison
        for first in firsts
        for other in others
        if other != first
        for comparison in statistics.compare(results, first, other, metric, epochs)
    ]


def _verdict(comparisons: Iterable[Comparison]) -> str:
    return all_hold(comparison.verdict for comparison in comparisons)


def _tally(comparisons: Sequence[Comparison]) -> str:
    """Return in how many comparisons the first loss is lower."""
    lower, higher, undecided = (
        sum(each.verdict == kind for each in comparisons) for kind in (HOLDS, FAILS, UNDECIDED)
    )
    return (
        f"lower in {lower} of {len(comparisons)} comparisons, higher in {higher}, "
        f"undecided in {undecided}"
    )


def _closest(comparisons: Sequence[Comparison]) -> str:
    """Return, for each first algorithm, the comparison that is least in its favour."""
    least = max if statistics.is_loss(comparisons[0].metric) else min
    firsts = dict.fromkeys(comparison.first for comparison in comparisons)
    return _each(
        least((c for c in comparisons if c.first == first), key=lambda c: c.median)
        for first in firsts
    )


def _each(comparisons: Iterable[Comparison]) -> str:
    """Return the numbers of every comparison."""
    return ", ".join(
        f"{c.first} {'/' if statistics.is_loss(c.metric) else 'against'} {c.second} {c.text}"
        for c in comparisons
    )


def _early_lead(results: Results) -> Judged:
    early = min(EARLY, results.epochs)
    compared = _pairs(results, NEW, OLD, "train_loss", range(1, early + 1))
    last = [comparison for comparison in compared if comparison.epoch == early]
    return _verdict(compared), (
        f"{_tally(compared)} (9 pairs, {early} epochs); the loss after epoch {early}, "
        f"against the closest baseline: {_closest(last)}"
    )


def _kept_lead(results: Results) -> Judged:
    epochs = range(1, results.epochs + 1)
    compared = _pairs(results, ("ekfacadam", "ekfacradam"), OLD, "train_loss", epochs)
    last = [comparison for comparison in compared if comparison.epoch == results.epochs]
    return _verdict(compared), (
        f"{_tally(compared)} (6 pairs, {results.epochs} epochs); the final loss, against "
        f"the closest baseline: {_closest(last)}"
    )


def _nag_overtaken(results: Results) -> Judged:
    early = max(1, results.epochs // 10)
    before = _pairs(results, ("ekfacnag",), OLD, "train_loss", (early,))
    after = _pairs(results, ("ekfacnag",), OLD, "train_loss")
    overtaken = [OPPOSITE[comparison.verdict] for comparison in after]
    return all_hold([_verdict(before), *overtaken]), (
        f"the loss after epoch {early}, a tenth of the training: {_each(before)}; at the end: "
        f"{_each(after)}"
    )


def _draws_away(results: Results) -> Judged:
    late = max(1, results.epochs * 2 // 3)
    last = _pairs(results, ("ekfacadam",), ("ekfacradam",), "train_loss")
    gaps = statistics.differences(results, "ekfacadam", "ekfacradam", "train_loss")
    with np.errstate(invalid="ignore"):
        growth, text = _log_effect(results, gaps[:, -1] - gaps[:, late - 1])
    return all_hold([last[0].verdict, growth]), (
        f"the final loss: {_each(last)}; from epoch {late} to the end this ratio changed by the "
        f"factor {text}"
    )


def _log_effect(results: Results, samples: statistics.Array) -> Judged:
    """Return whether differences of logarithms are negative, and the factor they stand for.

    NaN, the difference of two infinite ones, is a tie.
    """
    samples = np.where(np.isnan(samples), 0.0, samples)[:, None]
    found = statistics.bootstrap(samples)
    middle = statistics.exp(statistics.median(samples)[0])
    if found is None:
        return UNDECIDED, statistics.effect(middle, None, ratio=True)
    limited = results.study.training.max_steps > 0
    verdict = UNDECIDED if limited else statistics.sign(found[0], negative=True)
    low, high = map(statistics.exp, found[0])
    return verdict, statistics.effect(middle, (low, high), ratio=True)


def _highest_accuracy(results: Results) -> Judged:
    firsts = ("ekfacadam", "ekfacradam")
    others = [name for name in ALL if name not in firsts]
    compared = _pairs(results, firsts, others, "train_accuracy")
    return _verdict(compared), (
        f"at the end, against the closest of the other four: {_closest(compared)}"
    )


def _three_points(results: Results) -> Judged:
    compared = _pairs(results, ("ekfacadam",), OLD, "train_accuracy")
    limited = results.study.training.max_steps > 0
    verdicts = [UNDECIDED if limited else _about_three(each.interval) for each in compared]
    low, high = ABOUT_THREE
    return all_hold(verdicts), (
        f"at the end: {_each(compared)}; from {low:g} to {high:g} points count as about 3"
    )


def _about_three(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return UNDECIDED
    if ABOUT_THREE[0] <= interval[0] and interval[1] <= ABOUT_THREE[1]:
        return HOLDS
    apart = interval[1] < ABOUT_THREE[0] or interval[0] > ABOUT_THREE[1]
    return FAILS if apart else UNDECIDED


def _fastest_on_test(results: Results) -> Judged:
    half = results.epochs // 2
    verdicts, texts = [], []
    for other in [name for name in ALL if name != "ekfacadam"]:
        gaps = statistics.differences(results, "ekfacadam", other, "test_loss")[:, :half]
        with np.errstate(invalid="ignore"):
            verdict, text = _log_effect(results, gaps.mean(1))
        verdicts.append(verdict)
        texts.append(f"{results.label('ekfacadam')} / {results.label(other)} {text}")
    return all_hold(verdicts), (
        f"the test loss, as its geometric mean over epochs 1 to {half}: {', '.join(texts)}"
    )


def _best_on_test(results: Results) -> Judged:
    compared = _pairs(results, ("ekfacadam",), ALL, "test_accuracy")
    return _verdict(compared), f"at the end: {_each(compared)}"


CLAIMS: tuple[tuple[str, Sequence[str], Callable[[Results], Judged]], ...] = (
    (
        f"In each of the first {EARLY} epochs all three new methods have a lower training loss "
        "than all three baselines",
        ALL,
        _early_lead,
    ),
    (
        "EKFACadam and EKFACradam keep that advantage through the whole training",
        ("ekfacadam", "ekfacradam", *OLD),
        _kept_lead,
    ),
    (
        "EKFACnag slows in the middle and late phase, and all three baselines overtake it",
        ("ekfacnag", *OLD),
        _nag_overtaken,
    ),
    (
        "Late in training EKFACadam draws away from EKFACradam",
        ("ekfacadam", "ekfacradam"),
        _draws_away,
    ),
    (
        "EKFACadam and EKFACradam reach the highest training accuracy",
        ALL,
        _highest_accuracy,
    ),
    (
        "EKFACadam ends about 3 points above the baselines in training accuracy",
        ("ekfacadam", *OLD),
        _three_points,
    ),
    (
        "EKFACadam minimises the test loss fastest during the first half",
        ALL,
        _fastest_on_test,
    ),
    ("EKFACadam reaches the best test accuracy", ALL, _best_on_test),
)
