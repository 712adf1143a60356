import math

from experiments import claims

NEW, OLD = ("ekfacnag", "ekfacadam", "ekfacradam"), ("sgd", "kfac", "ekfac")


def verdicts(results) -> list[str]:
    return [claim.verdict for claim in claims.check(results)]


def as_published(made_up):
    """Twenty epochs as in the thesis."""
    curves = {name: [2.0 / (i + 1) for i in range(20)] for name in OLD}
    curves["ekfacadam"] = [1.0 / (i + 1) for i in range(20)]
    curves["ekfacradam"] = [1.1 / (i + 1) for i in range(20)]
    curves["ekfacnag"] = [
        0.9 / (i + 1) if i < 9 else (1.9 if i == 9 else 2.1) / (i + 1) for i in range(20)
    ]
    return curves


def test_claims_hold(made_up):
    curves = as_published(made_up)
    curves["ekfacnag"][9] = 1.15 / 10
    results = made_up({name: [curve] for name, curve in curves.items()})
    assert verdicts(results) == [claims.HOLDS] * 5


def test_claims_can_fail(made_up):
    base = as_published(made_up)
    base["ekfacnag"][9] = 1.15 / 10
    for change, expected in (
        ({"sgd": [0.01] * 20}, {0, 1, 2, 4}),
        ({"ekfacradam": [*base["ekfacradam"][:9], 9.0, *base["ekfacradam"][10:]]}, {1}),
        ({"ekfacradam": [*base["ekfacradam"][:-1], 9.0]}, {2}),
        ({"ekfacnag": [0.5 / (i + 1) for i in range(20)]}, {3, 4}),
    ):
        results = made_up({name: [curve] for name, curve in {**base, **change}.items()})
        assert {
            i for i, verdict in enumerate(verdicts(results)) if verdict == claims.FAILS
        } == expected


def test_claims_of_missing_algorithms_are_open(made_up):
    judged = claims.check(
        made_up({"sgd": [[2.0, 1.0], [2.0, 1.0]], "ekfacadam": [[1.0, 0.9], [1.0, 1.08]]})
    )
    assert [claim.verdict for claim in judged] == [claims.HOLDS, *[claims.OPEN] * 4]
    assert "0.99 against 1 after 2 epochs; lower for 1 of 2 seeds" in judged[0].evidence
    assert "kfac" in judged[1].evidence


def test_claims_of_diverged_runs_fail(made_up):
    curves = {name: [[1.0, 0.5]] for name in (*NEW, *OLD)}
    curves["ekfacadam"] = [[1.0, math.nan]]
    assert verdicts(made_up(curves)) == [claims.FAILS] * 5
