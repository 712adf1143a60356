"""A sample of recipes on several ranks equals one process; `nox -s equivalence` runs all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from typing import Any

import attrs
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from kfactk.registry.registry import registry
from kfactk.testing import effort
from kfactk.testing._support.ranks import shared_workers
from tests.covering import covering
from tests.equivalence.__main__ import Cell, main
from tests.equivalence.judging import TOLERANCE, Truths, Verdict, disagreements, judged, verdict
from tests.equivalence.product import (
    ABSENT,
    FAMILIES,
    HEADS,
    LISTS,
    RANKS,
    VARIANTS,
    WITH,
    Anyhow,
    Case,
    cases,
    determined,
    extras,
    placements,
    possible,
    stages,
    written,
)
from tests.equivalence.training import Mixed, Outcome, train, train_all

pytestmark = pytest.mark.xdist_group("ranks")
ACCEPTED, REFUSED = cases()
SUA = Case(
    {
        "curvature": {"name": "conv_kfac", "spatial": "sua"},
        "basis": {"name": "ekfac"},
        "fisher": {"name": "exact"},
        "clip": {"name": "kl"},
        "update": {"name": "momentum"},
    },
    taps=2,
)
DEFAULT = Case({**SUA.recipe, "curvature": {"name": "conv_kfac"}}, taps=2)


def check(case: Case, placement: object, ranks: int) -> None:
    [found] = judged([case], placement, ranks, Truths())
    assert not found.faults, found.faults
    assert found.deviation <= TOLERANCE, (
        f"{case} x {placement} on {ranks} ranks: {found.where} is off by {found.deviation:.1e}"
    )


@settings(max_examples=effort(6))
@given(st.sampled_from(ACCEPTED), st.sampled_from(placements()), st.sampled_from(RANKS))
def test_ranks_do_what_one_process_does(
    case: Case, placement: dict[str, object], ranks: int
) -> None:
    assume(possible(case, placement))
    check(case, placement, ranks)


@settings(max_examples=effort(4))
@given(st.sampled_from(ACCEPTED), st.integers(0, 2**16), st.sampled_from(RANKS[1:]))
def test_wherever_the_work_lies(case: Case, seed: int, ranks: int) -> None:
    """Also for assignments that no first-party placement gives: workers of all kinds are random."""
    assume(possible(case, Anyhow(seed)))
    check(case, Anyhow(seed), ranks)


def kind_of(recipe: Mapping[str, Any]) -> str:
    """What a recipe has besides single stages of `FAMILIES`; empty where it has nothing."""
    curvature = recipe.get("curvature")
    if curvature in LISTS:
        return f"blocks {LISTS.index(curvature)}"
    if curvature == {"name": "experts"}:
        return "experts"
    besides = [name for name in recipe if name not in FAMILIES]
    return " x ".join(recipe[name]["name"] if name in WITH else name for name in besides)


KINDS: dict[str, list[Case]] = {}
for each in ACCEPTED:
    KINDS.setdefault(kind_of(each.recipe), []).append(each)
JOINED = [kind for kind in KINDS if kind]


@covering(strength=1, kind=JOINED, ranks=RANKS[1:])
def test_what_is_joined_does_what_one_process_does(kind: str, ranks: int) -> None:
    """One recipe of each kind: stages together, a lag, a staggered schedule, heads, blocks."""
    random = Random(kind)
    case = random.choice(KINDS[kind])
    check(case, random.choice([each for each in placements() if possible(case, each)]), ranks)


def test_what_cannot_be_joined_is_refused() -> None:
    """Every other pair has a recipe in the product."""
    assert {kind_of(extra) for extra in extras()} - set(JOINED) == {
        "two_level x similar",
        "block_tridiagonal x similar",
        "block_tridiagonal x lag",
        *(f"{each} x stagger" for each in ("two_level", "block_tridiagonal", "similar")),
        "similar x lag",
    }


@pytest.mark.parametrize("placement", ["replicated", "comm_opt", "mem_opt"])
@pytest.mark.parametrize("option", [1, 2])
def test_chains_over_time_do_what_one_process_does(option: int, placement: str) -> None:
    stages = {
        "curvature": {"name": "rnn", "time": "chain"},
        "basis": {"name": "lgm", "option": option},
    }
    check(Case({**DEFAULT.recipe, **stages}, taps=2), {"name": placement}, 2)


@pytest.mark.parametrize("placement", [{"name": "mem_opt"}, {"name": "comm_opt"}, Anyhow(1)])
@pytest.mark.parametrize("basis", ["ikfac", "ingd", "kl"])
def test_what_follows_the_last_refresh_does_what_one_process_does(
    basis: str, placement: Any
) -> None:
    """The second refresh goes on from the first one, wherever the work lies."""
    curvature = {"name": "gradient" if basis == "kl" else "conv_kfac"}
    made = {"name": "kl", "eps": 0.01} if basis == "kl" else {"name": "singd", "variant": basis}
    stages = {"curvature": curvature, "basis": made, "clip": {"name": "none"}}
    check(Case({**DEFAULT.recipe, **stages}, taps=2), placement, 2)


@pytest.mark.parametrize("placement", ["comm_opt", "hybrid"])
def test_rows_of_square_layers_do_what_one_process_does(placement: str) -> None:
    rows = {"curvature": {"name": "rows"}, "basis": {"name": "cg"}, "clip": {"name": "none"}}
    check(Case({**DEFAULT.recipe, **rows}, taps=2), {"name": placement}, 4)


def test_where_rounding_chooses_the_eigenvectors_ranks_agree_all_the_same() -> None:
    """SUA with several taps does not determine EKFAC; the ranks still agree bit for bit."""
    assert not determined(SUA.recipe)
    truth = train(SUA.recipe, "replicated", 2, 0, 1)
    for placement in placements():
        outcomes = [
            each[0] for each in shared_workers().run(3, train_all, 3, [(SUA.recipe, 2)], placement)
        ]
        assert not list(disagreements([outcome.bits for outcome in outcomes]))
        assert all(
            bool(torch.isfinite(tensor).all())
            for outcome in outcomes
            for tensor in outcome.tensors.values()
        )
        assert {name for outcome in outcomes for name in outcome.tensors} == set(truth.tensors)


def test_every_stage_of_ours_is_in_the_product() -> None:
    for family in (*FAMILIES, *WITH, "placement"):
        listed = {info.name for info in registry().stages(family) if info.distribution == "kfactk"}
        assert {stage["name"] for stage in stages(family)} == listed - ABSENT
    names = {stage["name"] for family in (*FAMILIES, *WITH) for stage in stages(family)}
    assert {name for _, name in VARIANTS} <= names
    others = math.prod(len(stages(family)) for family in ("curvature", "basis", "fisher"))
    alone = len(stages("clip")) * len(stages("update"))
    product = others * (alone + sum(len(stages(family)) for family in WITH))
    curvatures, bases = (len(stages(family)) for family in ("curvature", "basis"))
    joined = (curvatures + len(LISTS)) * bases * len(extras())
    blocks = len(LISTS) * bases * len(stages("clip"))
    assert len(ACCEPTED) + len(REFUSED) == product + joined + blocks
    tried = {
        stage["name"]
        for case in ACCEPTED
        for stage in case.recipe.values()
        if isinstance(stage, dict) and "name" in stage
    }
    assert tried == names
    assert (
        [case.taps for case in ACCEPTED].count(1)
        == len([case for case in ACCEPTED if not determined(case.recipe)])
        > 0
    )
    assert written(SUA.recipe["curvature"]) == "conv_kfac spatial=sua"


def test_the_model_has_every_kind_of_part() -> None:
    model = Mixed()
    assert model.grouped.groups > 1
    assert not model.frozen.weight.requires_grad
    assert not model.out.bias.requires_grad
    assert model.wide.in_features > 12
    assert model.attn.in_proj_weight.requires_grad
    assert model.steps.weight_hh_l0.requires_grad
    with torch.no_grad():
        assert model(torch.zeros(2, 2, 4, 4)).shape == (2, 3)
        assert Mixed(1)(torch.zeros(2, 2, 2, 2)).shape == (2, 3)
        assert set(Mixed(heads=True)(torch.zeros(2, 2, 4, 4))) == set(HEADS)


TRUTH = Outcome(
    {"parameter a": torch.tensor([1.0, 4.0]), "scale": torch.zeros(2)},
    {"a": "1"},
    {"skipped_batches": 0},
    1,
)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": {"a": "2"}}, "ranks have different bits in the a"),
        ({"counters": {"skipped_batches": 1}}, "rank 1 counts {'skipped_batches': 1}"),
        ({"tensors": {"more": torch.ones(1)}}, "one process has no more"),
    ],
)
def test_faults_are_told(changes: dict[str, object], says: str) -> None:
    assert says in verdict(TRUTH, [TRUTH, attrs.evolve(TRUTH, **changes)]).faults


def test_what_no_rank_has_and_what_deviates_is_told() -> None:
    only = attrs.evolve(TRUTH, tensors={"parameter a": torch.tensor([1.0, 4.2])})
    found = verdict(TRUTH, [only])
    assert found.faults == ("no rank has the scale",)
    assert (round(found.deviation, 6), found.where) == (0.05, "parameter a")
    assert (
        verdict(
            TRUTH, [attrs.evolve(TRUTH, tensors={"parameter a": torch.tensor([math.nan, 4])})]
        ).deviation
        == math.inf
    )
    assert verdict(TRUTH, [TRUTH, TRUTH]) == Verdict(0.0, "scale")


class Unshared:
    """Stands for a framework that adds up nothing."""

    def __getitem__(self, case: Case) -> Outcome:
        found = train(case.recipe, "replicated", case.taps, 0, 2)  # half of the batch
        return found


def test_a_deviation_is_seen() -> None:
    [found] = judged([DEFAULT], "mem_opt", 2, Unshared())  # type: ignore[arg-type]
    assert found.deviation > 1e-3
    cell = Cell()
    cell.add(DEFAULT, found)
    cell.add(DEFAULT, Verdict())
    assert (cell.runs, cell.faulty, cell.deviation) == (2, 1, found.deviation)


def test_a_rank_that_fails_is_told_with_its_recipe() -> None:
    wrong = attrs.evolve(DEFAULT, recipe={**DEFAULT.recipe, "lr": -1.0})
    good, bad = judged([DEFAULT, wrong], "replicated", 1, Truths())
    assert good.deviation <= TOLERANCE
    assert (
        "a job of 2 recipes, of which this is the first, failed: rank 0 of 1: Traceback"
        in good.faults[0]
    )
    assert bad.deviation == math.inf
    assert "lr is -1.0" in bad.faults[0] or "lr=-1.0" in bad.faults[0]


def test_the_command_prints_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--sample", "1", "--ranks", "2", "--placement", "mem_opt", "comm_opt"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert (
        f"{len(ACCEPTED)} recipes are accepted, {len(REFUSED)} refused; 1 run under 2 placements"
        in told.out
    )
    assert [line.split()[:4] for line in told.out.splitlines()[-3:]] == [
        ["comm_opt", "2", "1", "0"],
        ["mem_opt", "2", "1", "0"],
        ["all", "2", "0", told.out.split()[-1]],
    ]
    assert "[1/1]" in told.err
    seen: list[Case] = []
    monkeypatch.setattr(
        "tests.equivalence.__main__.judged",
        lambda cases, *_: seen.extend(cases) or [Verdict() for _ in cases],
    )
    for part in ("1/3", "2/3", "3/3"):
        assert main(["--part", part, "--ranks", "1", "--placement", "replicated"]) == 0
    assert sorted(map(str, seen)) == sorted(map(str, ACCEPTED))
    with pytest.raises(SystemExit):
        main(["--part", "4/3"])
    assert "'4/3' is no part: write 1/4 for the first of four" in capsys.readouterr().err
    monkeypatch.setattr(
        "tests.equivalence.__main__.judged", lambda cases, *_: [Verdict(1e-9, "parameter x")]
    )
    assert main(arguments) == 1
    assert "on 2 ranks: off by 1.0e-09 in the parameter x" in capsys.readouterr().out
