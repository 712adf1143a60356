"""Medians and ranges over seeds, paired differences, and what they allow to say.

A diverged seed counts as worst, infinite loss and accuracy 0, from its last epoch on. There are no
means over seeds: one diverged or lucky seed would decide them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from experiments.results import Results
from experiments.store import Epoch, Run

Array = NDArray[np.float64]

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
LEAST_SEEDS = 5
"""With fewer common seeds, every comparison is undecided."""
RESAMPLES = 4999
FAR = 1e9
"""Takes the place of infinite differences of logarithms: its exponential is infinite."""


@attrs.frozen
class Spread:
    """The values of several seeds.

    Args:
        median: Their median.
        low: The smallest.
        high: The largest.
    """

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Return median and range."""
    array = np.asarray(list(values), dtype=float)
    return Spread(float(np.median(array)), float(array.min()), float(array.max()))


def number(value: float, worst: str = "diverged", digits: int = 3) -> str:
    """Return a number in a few digits; `worst` for infinity.

    Example:
        >>> number(0.012345), number(0.00012345), number(123456.0), number(float("inf"))
        ('0.0123', '1.2e-04', '123,456', 'diverged')
    """
    if not math.isfinite(value):
        return worst
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) < 10**digits else f"{value:.0f}"


def is_loss(metric: str) -> bool:
    """Return whether a metric is a loss: lower is better."""
    return metric.endswith("loss")


def diverged(run: Run) -> bool:
    """Return whether a run diverged, or ended with values that are not finite."""
    return run.status == "diverged" or not all(
        math.isfinite(value) for value in run.history[-1].metrics.values()
    )


def diverged_seeds(results: Results, name: str) -> tuple[int, int]:
    """Return how many seeds of an algorithm diverged, and how many there are."""
    runs = results.of(name).values()
    return sum(map(diverged, runs)), len(runs)


def values(run: Run, metric: str, epochs: int) -> Array:
    """Return a metric of one run after each epoch: the worst value from where it diverged."""
    worst = math.inf if is_loss(metric) else 0.0
    found = np.full(epochs, worst)
    history = run.history[:-1] if diverged(run) else run.history
    for epoch in history:
        found[epoch.epoch - 1] = epoch.metrics[metric]
    return np.where(np.isfinite(found), found, worst)


def curves(results: Results, name: str, metric: str) -> Array:
    """Return a metric of an algorithm, [seeds, epochs]."""
    runs = results.of(name).values()
    return np.stack([values(run, metric, results.epochs) for run in runs])


def final(results: Results, name: str, metric: str) -> Spread:
    """Return median and range of a metric after the last epoch."""
    return spread(curves(results, name, metric)[:, -1])


@attrs.frozen
class Comparison:
    """Two algorithms over their common seeds, in one metric after one epoch.

    Args:
        first: Label of the one that should be better.
        second: Label of the other.
        metric: The metric.
        epoch: The epoch, from 1.
        median: Median over seeds of the ratio first / second of losses, or of the difference
            first - second of accuracies in points; NaN without common seeds.
        interval: Bootstrap interval of that median, 95 %; `None` with too few seeds.
        seeds: Number of common seeds.
        verdict: Whether the first is better.
    """

    first: str
    second: str
    metric: str
    epoch: int
    median: float
    interval: tuple[float, float] | None
    seeds: int
    verdict: str

    @property
    def text(self) -> str:
        """Median and interval for readers."""
        return effect(self.median, self.interval, ratio=is_loss(self.metric))


def effect(median: float, interval: tuple[float, float] | None, *, ratio: bool) -> str:
    """Return a ratio or a difference in points, with its interval if there are enough seeds.

    Example:
        >>> effect(0.5, (0.25, math.inf), ratio=True), effect(3.0, None, ratio=False)
        ('0.500 [0.250, infinite]', '+3.00 points')
    """

    def one(value: float) -> str:
        return number(value, "infinite") if ratio else f"{value:+.2f}"

    if math.isnan(median):
        return "no common seeds"
    unit = "" if ratio else " points"
    if interval is None:
        return f"{one(median)}{unit}"
    return f"{one(median)}{unit} [{one(interval[0])}, {one(interval[1])}]"


def compare(
    results: Results, first: str, second: str, metric: str, epochs: Sequence[int] = ()
) -> list[Comparison]:
    """Compare two algorithms, after each of some epochs; by default after the last."""
    epochs = list(epochs) or [results.epochs]
    gaps = differences(results, first, second, metric)[:, np.array(epochs) - 1]
    medians, intervals = median(gaps), bootstrap(gaps)
    limited, loss = results.study.training.max_steps > 0, is_loss(metric)
    compared = []
    for i, epoch in enumerate(epochs):
        verdict = UNDECIDED
        if intervals is not None and not limited:
            verdict = sign(intervals[i], negative=loss)
        scale = exp if loss else float
        interval = None if intervals is None else (scale(intervals[i][0]), scale(intervals[i][1]))
        compared.append(
            Comparison(
                first=results.label(first),
                second=results.label(second),
                metric=metric,
                epoch=epoch,
                median=scale(medians[i]),
                interval=interval,
                seeds=len(gaps),
                verdict=verdict,
            )
        )
    return compared


def differences(results: Results, first: str, second: str, metric: str) -> Array:
    """Return paired differences, [common seeds, epochs]: of logarithms for losses.

    Where both seeds are equally bad, as when both diverged, they are tied.
    """
    left, right = results.of(first), results.of(second)
    seeds = [seed for seed in left if seed in right]
    one, other = (
        np.array([values(runs[seed], metric, results.epochs) for seed in seeds])
        for runs in (left, right)
    )
    if not seeds:
        return np.zeros((0, results.epochs))
    return log_ratio(one, other) if is_loss(metric) else one - other


def log_ratio(one: Array, other: Array) -> Array:
    """Return the logarithm of one / other; 0 where they are equal, also where both are infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(one == other, 0.0, np.log(one) - np.log(other))


def median(samples: Array) -> Array:
    """Return the median of each column; NaN without rows."""
    if not len(samples):
        return np.full(samples.shape[1], np.nan)
    return np.asarray(np.median(np.clip(samples, -FAR, FAR), axis=0))


def bootstrap(samples: Array) -> Array | None:
    """Return the interval of the median of each column, [columns, 2]; `None` with too few rows."""
    if len(samples) < LEAST_SEEDS:
        return None
    found = stats.bootstrap(
        (np.clip(samples, -FAR, FAR),),
        np.median,
        axis=0,
        method="percentile",
        confidence_level=0.95,
        n_resamples=RESAMPLES,
        batch=500,
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return np.stack([found.low, found.high], axis=-1)


def sign(interval: Sequence[float] | Array, *, negative: bool) -> str:
    """Return whether an interval lies on the negative side of zero, or on the positive one."""
    low, high = interval
    if low <= 0 <= high:
        return UNDECIDED
    return HOLDS if (high < 0) == negative else FAILS


def all_hold(verdicts: Iterable[str]) -> str:
    """Return whether all hold: one failure decides, then one that is undecided.

    Example:
        >>> all_hold([HOLDS, UNDECIDED]), all_hold([HOLDS, UNDECIDED, FAILS]), all_hold([HOLDS])
        ('undecided', 'does not hold', 'holds')
    """
    verdicts = set(verdicts)
    return next((each for each in (FAILS, UNDECIDED) if each in verdicts), HOLDS)


@attrs.frozen
class Course:
    """The training loss of one run, step by step or chunk by chunk.

    Args:
        steps: Steps done at the end of each chunk.
        seconds: Training seconds until then.
        losses: Mean loss over the last epoch's worth of steps; NaN in the first epoch.
    """

    steps: Array
    seconds: Array
    losses: Array


def course(run: Run) -> Course:
    """Return the smoothed training loss of a run.

    Losses may be means over chunks of steps: each then counts as often as its chunk has steps.
    """
    chunks = [chunk for epoch in run.history for chunk in _chunks(epoch)]
    counts, times, losses = np.array(chunks, dtype=float).T
    window = len(_chunks(run.history[0]))
    return Course(
        np.cumsum(counts),
        np.cumsum(times * counts),
        _trailing(losses * counts, window) / _trailing(counts, window),
    )


def _chunks(epoch: Epoch) -> list[tuple[float, float, float]]:
    """Return the chunks of an epoch: steps, seconds of a step, and loss."""
    if not epoch.losses or len(epoch.losses) != len(epoch.times):
        return [(epoch.steps, epoch.seconds / epoch.steps, epoch.train_loss)]
    each = epoch.steps / len(epoch.losses)
    return [(each, time, loss) for time, loss in zip(epoch.times, epoch.losses, strict=True)]


def _trailing(array: Array, window: int) -> Array:
    """Return sums over the last `window` values; NaN where there are fewer."""
    sums = np.full(len(array), np.nan)
    if len(array) >= window:
        sums[window - 1 :] = np.lib.stride_tricks.sliding_window_view(array, window).sum(1)
    return sums


@attrs.frozen
class Reached:
    """When a run reached the target: steps and training seconds until then."""

    steps: float
    seconds: float


def reach(run: Run, target: float | None) -> Reached | None:
    """Return when the training loss of a run reached the target.

    Returns:
        `None` where it did not, or where the run diverged.
    """
    if target is None or diverged(run):
        return None
    along = course(run)
    at = np.flatnonzero(along.losses <= target)
    return Reached(float(along.steps[at[0]]), float(along.seconds[at[0]])) if len(at) else None


def reached(results: Results, name: str) -> list[Reached | None]:
    """Return when each seed of an algorithm reached the target of the study."""
    target = results.study.training.target
    return [reach(run, target) for run in results.of(name).values()]


def to_target(results: Results, name: str, what: str) -> Spread:
    """Return median and range of the steps or seconds to the target; infinite if not reached."""
    found = reached(results, name)
    return spread(math.inf if each is None else getattr(each, what) for each in found)


def at_equal_time(results: Results) -> dict[str, tuple[Spread, Spread]]:
    """Return training and test loss of each algorithm after the same seconds of training.

    They are, for each seed, those of the algorithm that ended first. The training loss is smoothed
    as in `course`; the test loss is linear between two epochs.
    """
    limits: dict[int, float] = {}
    for algorithm in results.algorithms:
        for seed, run in results.of(algorithm.name).items():
            if not diverged(run):
                taken = sum(epoch.seconds for epoch in run.history)
                limits[seed] = min(taken, limits.get(seed, taken))
    found = {}
    for algorithm in results.algorithms:
        runs = results.of(algorithm.name)
        values = [_at(run, limits[seed]) for seed, run in runs.items() if seed in limits]
        if values:
            train, test = zip(*values, strict=True)
            found[algorithm.name] = spread(train), spread(test)
    return found


def _at(run: Run, limit: float) -> tuple[float, float]:
    """Return training and test loss of a run after so many seconds."""
    if diverged(run):
        return math.inf, math.inf
    along, ends = course(run), np.cumsum([epoch.seconds for epoch in run.history])
    known = np.isfinite(along.losses)
    train = np.interp(limit, along.seconds[known], along.losses[known])
    test = np.interp(limit, ends, [epoch.test_loss for epoch in run.history])
    return float(train), float(test)


def seconds(results: Results, name: str) -> dict[int, float]:
    """Return the median time of an epoch by seed; epochs that broke off do not count."""
    found = {}
    for seed, run in results.of(name).items():
        whole = max(epoch.steps for epoch in run.history)
        found[seed] = float(np.median([e.seconds for e in run.history if e.steps == whole]))
    return found


def relative_seconds(results: Results, name: str) -> float | None:
    """Return the time of an epoch relative to the first algorithm: the median over common seeds."""
    ours, theirs = seconds(results, name), seconds(results, results.first.name)
    ratios = [ours[seed] / theirs[seed] for seed in ours if theirs.get(seed)]
    return float(np.median(ratios)) if ratios else None


def exp(value: float) -> float:
    """Return the exponential; infinity where it is too large.

    Example:
        >>> exp(0.0), exp(FAR), exp(-FAR)
        (1.0, inf, 0.0)
    """
    with np.errstate(over="ignore"):
        return float(np.exp(value))
