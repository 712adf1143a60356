import math

import attrs
import pytest

from experiments import claims, statistics
from experiments.claims import OPEN
from experiments.statistics import FAILS, HOLDS, UNDECIDED
from tests.experiments import made_up

BASE = [2.35 - 0.1 * epoch for epoch in range(1, 21)]
NEEDS_NAG = [0, 2, 4, 6, 7]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 499)


def as_published(seeds: int = 8) -> dict[str, list[list[float]]]:
    """Twenty epochs in which every claim holds."""
    curves = dict.fromkeys(("sgd", "kfac", "ekfac"), BASE)
    curves["ekfacnag"] = [b - 0.1 if i < 10 else b + 0.05 for i, b in enumerate(BASE)]
    curves["ekfacadam"] = [b - 0.3 for b in BASE]
    curves["ekfacradam"] = [b - 0.25 for b in BASE]
    return {
        name: [[(1 + seed / 100) * value for value in curve] for seed in range(seeds)]
        for name, curve in curves.items()
    }


def verdicts(losses, **changes) -> list[str]:
    return [claim.verdict for claim in claims.check(made_up.results(losses, **changes))]


def changed(name: str, change) -> list[str]:
    losses = as_published()
    losses[name] = [[change(i, value) for i, value in enumerate(seed)] for seed in losses[name]]
    return verdicts(losses)


def test_every_claim_can_hold():
    assert verdicts(as_published()) == [HOLDS] * 8


@pytest.mark.parametrize(
    ("name", "change", "failed"),
    [
        # One of the nine pairs, in one of the ten epochs.
        ("ekfacnag", lambda i, value: 3.0 if i == 9 else value, {0}),
        ("ekfacnag", lambda i, value: value if i < 10 else value - 0.1, {2}),
        ("ekfacnag", lambda i, value: value + 0.2 if i < 10 else value, {0, 2}),
        # Only one of two keeps the lead.
        ("ekfacradam", lambda i, value: 3.0 if i == 14 else value, {1}),
        ("ekfacradam", lambda i, value: 3.0 if i == 12 else value, {1, 3}),
        ("ekfacradam", lambda i, value: value - 0.06, {3, 6, 7}),
        ("ekfacradam", lambda i, value: 0.01 if i == 19 else value, {3, 7}),
        ("ekfacradam", lambda i, value: 0.6 if i == 19 else value, {1, 4}),
        ("ekfacadam", lambda i, value: value + 0.15, {3, 5, 6, 7}),
        ("ekfac", lambda i, value: 0.2 if i == 19 else value, {5}),
        ("ekfac", lambda i, value: value + 0.2 if i == 19 else value, {2, 5}),
        ("sgd", lambda i, value: value - 0.4 if i < 10 else value, {0, 1, 2, 6}),
        ("sgd", lambda i, value: 0.01 if i == 19 else value, {1, 4, 5, 7}),
    ],
)
def test_each_claim_can_fail(name, change, failed):
    found = changed(name, change)
    assert {i for i, verdict in enumerate(found) if verdict == FAILS} == failed
    assert {i for i, verdict in enumerate(found) if verdict == HOLDS} == set(range(8)) - failed


def test_runs_without_accuracies_decide_no_claim():
    found = claims.check(made_up.results(as_published(), loss="reconstruction"))
    assert {claim.verdict for claim in found} == {OPEN}
    assert {claim.evidence for claim in found} == {"these runs do not classify"}


def test_ties_are_undecided():
    losses = as_published()
    losses["ekfacradam"] = losses["ekfacadam"]
    assert verdicts(losses) == [HOLDS, HOLDS, HOLDS, UNDECIDED, HOLDS, HOLDS, UNDECIDED, UNDECIDED]
    losses = as_published()
    losses["ekfacnag"] = [
        [*seed[:-1], losses["ekfac"][i][-1]] for i, seed in enumerate(losses["ekfacnag"])
    ]
    assert verdicts(losses) == [HOLDS, HOLDS, UNDECIDED, *[HOLDS] * 5]
    same = dict.fromkeys(losses, losses["sgd"])
    found = verdicts(same)
    assert found == [UNDECIDED] * 5 + [FAILS] + [UNDECIDED] * 2  # no 3 points


@pytest.mark.parametrize("ties", [False, True])
def test_the_order_of_algorithms_decides_nothing(monkeypatch: pytest.MonkeyPatch, ties):
    losses = as_published()
    if ties:
        losses = dict.fromkeys(made_up.ALL, losses["sgd"])
    expected = claims.check(made_up.results(losses))
    assert claims.check(made_up.results(dict(reversed(losses.items())))) == expected
    for name in ("NEW", "OLD", "ALL"):
        monkeypatch.setattr(claims, name, getattr(claims, name)[::-1])
    turned = claims.check(made_up.results(losses))
    assert [claim.verdict for claim in turned] == [claim.verdict for claim in expected]


def test_four_seeds_and_limited_runs_decide_nothing():
    assert verdicts(as_published(5)) == [HOLDS] * 8
    few = claims.check(made_up.results(as_published(4)))
    assert [claim.verdict for claim in few] == [UNDECIDED] * 8
    assert all("4 common seeds are too few, 5 are needed" in claim.evidence for claim in few)
    limited = claims.check(made_up.results(as_published(), max_steps=7))
    assert [claim.verdict for claim in limited] == [UNDECIDED] * 8
    assert all("stopped after 7 steps" in claim.evidence for claim in limited)


def test_claims_about_missing_algorithms_cannot_be_judged():
    losses = as_published()
    del losses["ekfacnag"]
    found = claims.check(made_up.results(losses))
    assert [i for i, claim in enumerate(found) if claim.verdict == OPEN] == NEEDS_NAG
    assert found[0].evidence == "there are no runs of ekfacnag"
    assert [found[i].verdict for i in (1, 3, 5)] == [HOLDS] * 3


def test_one_epoch_is_too_little():
    losses = {name: [seed[:1] for seed in seeds] for name, seeds in as_published().items()}
    assert verdicts(losses) == [OPEN] * 8


def test_diverged_runs_do_not_win():
    losses = as_published()
    losses["ekfacadam"] = [[*seed[:5], math.nan] for seed in losses["ekfacadam"]]
    assert verdicts(losses) == [FAILS, FAILS, HOLDS, FAILS, FAILS, FAILS, FAILS, FAILS]


def test_the_other_one_diverged_long_ago_is_no_drawing_away():
    losses = as_published()
    losses["ekfacradam"] = [[*seed[:5], math.nan] for seed in losses["ekfacradam"]]
    claim = claims.check(made_up.results(losses))[3]
    assert claim.verdict == UNDECIDED
    assert "0.00 [0.00, 0.00]; from epoch 13 to the end" in claim.evidence
    assert claim.evidence.endswith("the factor 1.00 [1.00, 1.00]")


def test_one_diverged_seed_of_eight_does_not_undo_a_claim():
    losses = as_published()
    losses["ekfacadam"][3] = [*losses["ekfacadam"][3][:12], math.nan]
    assert verdicts(losses)[4] == HOLDS


def test_evidence_has_numbers_with_intervals():
    losses = as_published()
    losses["kfac"] = [[value - 0.01 for value in seed] for seed in losses["kfac"]]
    found = claims.check(made_up.results(losses))
    assert "lower in 90 of 90 comparisons, higher in 0, undecided in 0" in found[0].evidence
    assert "the closest baseline: EKFACnag / K-FAC 0.933 [0.932, 0.933]" in found[0].evidence
    assert "the closest of the other four: EKFACadam against K-FAC +3.0" in found[4].evidence
    assert "EKFACadam / EKFACradam 0.500 [0.500, 0.500]" in found[3].evidence
    assert "EKFACadam against SGD +3.11 points [+3.0" in found[5].evidence


def test_distances_to_the_numbers_of_the_thesis():
    results = made_up.results({"ekfacadam": [[1.0, 0.5]] * 3 + [[1.0, math.nan]]})
    algorithm = attrs.evolve(
        results.study.algorithms["ekfacadam"], reference={"train_accuracy": 98.31}
    )
    study = attrs.evolve(results.study, algorithms={"ekfacadam": algorithm})
    (found,) = claims.distances(attrs.evolve(results, study=study))
    assert (found.label, found.metric, found.thesis) == ("EKFACadam", "training accuracy", 98.31)
    assert (found.ours.median, found.ours.low) == (95.0, 0.0)
    assert found.difference == pytest.approx(-3.31)
    assert claims.distances(results) == []
