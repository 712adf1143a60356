"""Which layers the block-tridiagonal link joins, in which order, and what it refuses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk import CaptureError, CombinationError, KfactkWarning, OptionError
from kfactk.testing._support.truth import vec
from kfactk_stages.link.block_tridiagonal import BlockTridiagonal
from tests.kfactk.small import F64
from tests.kfactk_stages.link.linking import TAU, step
from tests.kfactk_stages.link.tridiagonal import (
    RECIPE,
    Seen,
    assert_inverse,
    claimed,
    class_scores,
    data,
    drawn,
    joined,
    net,
)


class Tokens(nn.Module):
    """Layers on sequences, `[N, T, d]`, and a head on their mean where `pools`."""

    def __init__(self, pools: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 3)
        self.head, self.pools = nn.Linear(3, 2), pools
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.other(torch.tanh(self.one(x))))
        return self.head(x.mean(1) if self.pools else x).movedim(-1, 1)


def tokens(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, 3, generator=generator, dtype=F64)
    return x, torch.randint(2, (n, 4), generator=generator)


def token_scores(output: Tensor) -> list[Tensor]:
    return class_scores(output.movedim(1, -1).reshape(-1, 2))


@pytest.mark.parametrize("spatial", ["sud", "reduce"])
def test_rows_of_sequences_are_paired(spatial: str) -> None:
    model, (x, y), names = Tokens(), tokens(), ["one", "other", "head"]
    seen = Seen(model, names, x, token_scores)
    likelihood = {"name": "categorical", "class_axis": 1}
    curvature = {"name": "kfac", "spatial": spatial}
    recipe = {**RECIPE, "curvature": curvature, "likelihood": likelihood, "lr": 0.0}
    optimizer = kfactk.build(**recipe).bind(model)
    step(model, optimizer, (x, y))
    reduce, terms = spatial == "reduce", 4  # terms of an example

    def moment(side: str, one: str, other: str) -> Tensor:
        found = seen.moment(side, one, other, reduce=reduce)
        return found / terms if side == "G" else found

    assert_inverse(optimizer, model, names, claimed(moment, names, TAU))


def test_a_chain_is_cut_where_numbers_of_rows_differ() -> None:
    model, (x, y), names = Tokens(pools=True), tokens(), ["one", "other", "head"]
    seen = Seen(model, names, x, class_scores)
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0}).bind(model)
    with pytest.warns(KfactkWarning, match=r"'other' \(4\) and 'head' \(1\) \(said once\)"):
        step(model, optimizer, (x, y[:, 0]))
    step(model, optimizer, (x, y[:, 0]))
    matrix = claimed(seen.moment, names, TAU, cut=[1])
    assert_inverse(optimizer, model, names, matrix)
    joined_again = {**RECIPE, "lr": 0.0, "curvature": {"name": "kfac", "spatial": "reduce"}}
    optimizer = kfactk.build(**joined_again).bind(model)
    step(model, optimizer, (x, y[:, 0]))
    moment = functools.partial(seen.moment, reduce=True)
    assert_inverse(optimizer, model, names, claimed(moment, names, TAU))


class Crossed(nn.Module):
    """Runs its second layer first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.late, self.early = nn.Linear(4, 2).double(), nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.late(torch.tanh(self.early(x)))


def test_another_order_than_the_models_is_refused_until_it_is_named() -> None:
    model, batch = Crossed(), data()
    says = r"order, \['late', 'early'\], .*'layers': \['early', 'late'\]"
    optimizer = kfactk.build(**RECIPE).bind(model)
    with pytest.raises(CaptureError, match=says):
        step(model, optimizer, batch)
    optimizer.close()
    link = {"name": "block_tridiagonal", "layers": ["early", "late"]}
    seen = Seen(model, ["early", "late"], batch[0], class_scores)
    optimizer = kfactk.build(**{**RECIPE, "link": link, "lr": 0.0}).bind(model)
    step(model, optimizer, batch)
    names = ["early", "late"]
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, TAU))


def test_a_named_order_that_is_not_the_forwards_is_told() -> None:
    model, batch = Crossed(), data()
    link = {"name": "block_tridiagonal", "layers": ["late", "early"]}
    optimizer = kfactk.build(**{**RECIPE, "link": link}).bind(model)
    says = r"ran them in the order \['early', 'late'\].*give 'layers': \['early', 'late'\]"
    with pytest.warns(KfactkWarning, match=says):
        step(model, optimizer, batch)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"basis": "ekfac"}, r"moments of basis 'ekfac' would be measured for nothing.*'kfac'"),
        ({"lag": 1, "basis_every": 2}, r"lag=1 lets decompositions begin earlier.*Leave out lag"),
        ({"stagger": True}, r"Leave out stagger=True"),
        ({"pace": "similar"}, r"measures all layers on the same batch"),
        ({"curvature": "gradient", "basis": "soap"}, r"'gradient' has none"),
        ({"curvature": "rows", "basis": "cg"}, r"and basis 'cg' waives this"),
        ({"curvature": "norm", "basis": "unitwise"}, r"reads A, G of each layer, .* 'unitwise'"),
        (
            {"curvature": "conv_kfac", "basis": {"name": "ekfac", "inputs": "channels"}},
            r"reads A of each layer, which basis 'ekfac'",
        ),
    ],
    ids=["ekfac", "lag", "stagger", "pace", "soap", "cg", "unitwise", "channels"],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CombinationError, match=says):
        kfactk.build(**{**RECIPE, **changes})


@pytest.mark.parametrize("layers", ["0", ["0"], ["0", "0"], ["0", 2]])
def test_a_list_of_layers_must_be_one(layers: Any) -> None:
    with pytest.raises(OptionError, match="at least two names of layers, each once"):
        BlockTridiagonal(layers=layers)


def test_layers_that_cannot_be_joined_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    for name, why in (("0", "whose curvature has no rows"), ("9", "which no block preconditions")):
        link = {"name": "block_tridiagonal", "layers": [name, "2"]}
        with pytest.raises(CombinationError, match=rf"{name!r}, {why}.* can join \['2', '3'\]"):
            kfactk.build(**{**RECIPE, "curvature": "conv_kfac", "link": link}).bind(model)


def test_layers_that_share_parameters_and_wide_ones_are_refused_by_their_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 9), nn.Linear(9, 2))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    curvature = {"name": "kfac", "max_side": 8, "wide": "diagonal"}
    for name, why in (("0", "whose parameters several modules share"), ("2", "no whole matrix G")):
        link = {"name": "block_tridiagonal", "layers": [name, "3"]}
        with pytest.raises(CombinationError, match=rf"{name!r}, .*{why}"):
            kfactk.build(**{**RECIPE, "curvature": curvature, "link": link}).bind(model)


def test_coverage_shows_the_chain_and_a_link_of_none_is_told() -> None:
    model = nn.Sequential(
        *(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    )
    recipe = kfactk.build(**{**RECIPE, "curvature": ["conv_kfac", "norm"]})
    linked = {row.block: row.linked for row in recipe.coverage(model)}
    name = "block_tridiagonal"
    assert linked == {"0": "", "2": name, "3": "", "4": name}
    reduce = {**RECIPE, "curvature": {"name": "conv_kfac", "spatial": "reduce"}}
    assert kfactk.build(**reduce).coverage(model).rows[0].linked == name
    for alone in (nn.Conv1d(1, 1, 1), model[:3]):  # a single linear layer has no neighbour
        with pytest.warns(KfactkWarning, match="joins no two layers of this model"):
            kfactk.build(**{**RECIPE, "curvature": "conv_kfac"}).bind(alone)


def test_convolutions_join_where_their_rows_are_reduced() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)).double()
    x, y = torch.randn(5, 1, 4, dtype=F64), torch.arange(5) % 2
    recipe = {**RECIPE, "curvature": {"name": "conv_kfac", "spatial": "reduce"}, "lr": 0.0}
    optimizer = kfactk.build(**recipe).bind(model)
    step(model, optimizer, (x, y))
    rows: dict[str, Any] = {"a0": [], "a3": [], "g0": [], "g3": []}
    for n in range(5):
        kept: dict[str, Tensor] = {}
        hidden = model[0](x[n : n + 1])
        kept["0"], given = hidden, torch.tanh(hidden).flatten(1)
        kept["3"] = model[3](given)
        patches = x[n].unfold(1, 2, 1)[0]  # [T, 2]
        one = torch.ones(1, dtype=F64)
        rows["a0"].append(torch.cat([patches.mean(0), one]))
        rows["a3"].append(torch.cat([given[0].detach(), one]))
        gradients = [
            torch.autograd.grad(loss, [kept["0"], kept["3"]], retain_graph=True)
            for loss in class_scores(kept["3"])
        ]
        rows["g0"] += [g[0][0].sum(-1) for g in gradients]
        rows["g3"] += [g[1][0] for g in gradients]

    def moment(side: str, one: str, other: str) -> Tensor:
        first, second = (torch.stack(rows[f"{side.lower()}{name}"]) for name in (one, other))
        return first.T @ second / 5

    v = drawn(model)
    found = optimizer.precondition(v)
    stacked = [
        vec(torch.cat([t[f"{n}.weight"].flatten(1), t[f"{n}.bias"].unsqueeze(1)], 1))
        for t in (v, found)
        for n in ("0", "3")
    ]
    expected = torch.linalg.solve(claimed(moment, ["0", "3"], TAU), torch.cat(stacked[:2]))
    torch.testing.assert_close(torch.cat(stacked[2:]), expected, rtol=1e-9, atol=1e-9)


def test_frozen_layers_shorten_the_chain() -> None:
    model, names = net(3, True)
    batch = data()
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0, "factor_decay": 0.0}).bind(model)
    step(model, optimizer, batch)
    model[2].requires_grad_(False)
    step(model, optimizer, batch)
    seen, rest = Seen(model, names, batch[0], class_scores), ["0", "4"]
    v = {n: t for n, t in drawn(model).items() if not n.startswith("2.")}
    found = joined(model, rest, optimizer.precondition(v))
    expected = torch.linalg.solve(claimed(seen.moment, rest, TAU), joined(model, rest, v))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    model[2].requires_grad_(True)
    step(model, optimizer, batch)
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, TAU))
