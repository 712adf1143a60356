"""The seam of links: which layers, on which ranks, in which order, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CombinationError, KfactkWarning, Layer, Link, PluginError, Statistic
from kfactk.testing._support.division import equal_on_ranks
from kfactk.testing._support.ranks import RankError, shared_workers
from kfactk.testing._support.training import Training
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.link.two_level import TwoLevel
from tests.kfactk.small import batch, bound, net, train

EACH = {"factor_every": 1, "basis_every": 1}


@attrs.frozen
class Chosen(TwoLevel):
    """Joins the layers of these names, in this order."""

    names: tuple[str, ...] = attrs.field(default=(), converter=tuple)

    def order(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        by_name = {layer.name: layer for layer in layers}
        return [by_name[name] for name in self.names]


@attrs.frozen
class Recording(Link):
    """Notes what it is given, and adds nothing."""

    seen: list[Any] = attrs.field(factory=list, eq=False)

    def rows(self, layer: Any, samples: Any) -> Any:
        return {"a": samples.inputs()[..., 0]}

    def statistics(self, layers: Any, rows: Any, num_terms: Any) -> Any:
        self.seen.append((sorted(rows), float(num_terms)))
        return {"number": Statistic(torch.zeros(2), num_terms)}

    def correct(self, layers: Any, gradients: Any, preconditioned: Any, statistics: Any) -> Any:
        return {name: each[..., :1] for name, each in preconditioned.items()}


def joined_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*net(), nn.Tanh(), nn.Linear(3, 3).double())


def test_a_link_chooses_its_layers_and_their_order() -> None:
    model = joined_net()
    optimizer = bound(model, link=Chosen(["4", "0"]), **EACH)
    train(optimizer, model, batch())
    assert optimizer.state[model[4].weight]["kfactk.link.coarse"].shape == (2, 2)
    assert "kfactk.link.coarse" not in optimizer.state[model[0].weight]
    linked = {row.block: bool(row.linked) for row in optimizer.coverage()}
    assert linked == {"0": True, "2": False, "4": True}


def test_layers_that_are_not_there_are_the_plugins_fault() -> None:
    class Twice(TwoLevel):
        def order(self, layers: Sequence[Layer]) -> Sequence[Layer]:
            return [layers[0], layers[0]]

    with pytest.raises(PluginError, match=r"Twice chose \['0', '0'\].*each once"):
        bound(net(), link=Twice())


def test_passes_tell_their_layers_and_count_terms_once() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 3).double(), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"one": self.one(x), "other": self.other(x)}

    model, stage, (x, y) = Split(), Recording(), batch()
    optimizer = bound(
        model,
        link=stage,
        fisher="mc",
        likelihood={"one": "categorical", "other": "gaussian"},
        **EACH,
    )
    stage.seen.clear()
    out = model(x)
    (F.cross_entropy(out["one"], y) + out["other"].square().mean()).backward()
    assert stage.seen == [(["one"], 6.0), (["other"], 0.0)]
    with pytest.raises(PluginError, match=r"Recording gave shapes .* for gradients of the layers"):
        optimizer.step()


def test_layers_without_a_gradient_are_left_out() -> None:
    model = joined_net()
    optimizer = bound(model, link="two_level", **EACH)
    train(optimizer, model, batch())
    x, y = batch()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[2].weight.grad = model[2].bias.grad = None
    before = model[2].weight.clone()
    optimizer.step()
    assert torch.equal(model[2].weight, before)


def test_shared_and_rare_layers_go_on() -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
            self.head = nn.Linear(4, 3).double()
            self.rare = False

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(torch.tanh(self.a(x))))
            return self.head(self.b(x) if self.rare else x)

    model = Rare()
    optimizer = bound(model, link="two_level", update="momentum", lr=0.01, **EACH)
    losses = []
    for number in range(6):
        model.rare = number > 2
        losses.append(train(optimizer, model, batch()))
    coarse = optimizer.state[model.a.weight]["kfactk.link.coarse"]
    assert coarse.shape == (3, 3)
    assert float(coarse[1, 1]) > 0
    assert torch.isfinite(torch.tensor(losses)).all()


def test_a_forward_that_fails_counts_nothing() -> None:
    class Failing(TwoLevel):
        broken = False

        def statistics(self, layers: Any, rows: Any, num_terms: Any) -> Any:
            if Failing.broken:
                raise RuntimeError("once")
            return super().statistics(layers, rows, num_terms)

    model, other, data = joined_net(), joined_net(), batch()
    optimizer = bound(model, link=Failing(), factor_decay=0.0, **EACH)
    reference = bound(other, link="two_level", factor_decay=0.0, **EACH)
    train(optimizer, model, data)
    Failing.broken = True
    with pytest.raises(PluginError, match="once"):
        model(data[0])
    Failing.broken = False
    train(optimizer, model, data)
    for _ in range(2):
        train(reference, other, data)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def bind_on_ranks(rank: int, placement: Any, link: Any) -> bool:
    optimizer = kfactk.build(link=link, placement=placement).bind(joined_net())
    return all(row.linked for row in optimizer.coverage())


@pytest.mark.xdist_group("ranks")
def test_every_rank_must_hold_the_layers() -> None:
    assert shared_workers().run(2, bind_on_ranks, "comm_opt", "two_level") == [True, True]
    with pytest.raises(RankError, match=r"'mem_opt' has layer '0' on some ranks alone.*replicated"):
        shared_workers().run(2, bind_on_ranks, "mem_opt", "two_level")


def test_a_link_of_a_single_layer_is_told() -> None:
    with pytest.warns(KfactkWarning, match="joins no two layers of this model, so it changes no"):
        kfactk.build(curvature="kfac", link="two_level").bind(nn.Linear(3, 2))


@pytest.mark.parametrize("clip", ["kl", "trust_region"])
def test_clips_that_read_lengths_off_the_blocks_are_refused(clip: str) -> None:
    with pytest.raises(CombinationError, match=f"clip '{clip}' .* link 'two_level' P is the inv"):
        kfactk.build(link="two_level", clip=clip)
    linked, none = kfactk.build(link="two_level"), kfactk.build(clip="none").clip
    assert linked.clip == linked.evolve(lr=0.1).clip == none
    assert linked.evolve(link=None) == kfactk.build()


class OfInputs(KfacInverse):
    """`V (A + tau I)^-1`, which needs no gradients."""

    requires = frozenset({"A"})
    laws = frozenset()

    def decompose(self, name: str, matrix: Tensor, context: Any) -> dict[str, Tensor]:
        return {
            "cholesky": torch.linalg.cholesky(matrix + context.damping * torch.eye(len(matrix)))
        }


def test_a_basis_of_inputs_alone_cannot_be_linked() -> None:
    with pytest.raises(CombinationError, match="layer '0' has a basis that requires its inputs"):
        kfactk.build(link="two_level", basis=OfInputs(), curvature="kfac").bind(
            nn.Sequential(nn.Linear(3, 2))
        )


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "recipe",
    [
        {"fisher": "empirical", "basis": {"name": "ekfac", "scale": "running"}},
        {"fisher": "exact", "basis": "kfac", "placement": "comm_opt", "lag": 1},
        {"curvature": "all", "first_moment": 0.9, "clip": {"name": "norm", "limit": 0.1}},
    ],
    ids=["empirical", "comm_opt", "all"],
)
def test_two_ranks_do_what_one_process_does(recipe: dict[str, Any]) -> None:
    options = {"link": "two_level", "update": torch.optim.SGD, "lr": 0.05, "damping": 0.01}
    equal_on_ranks(Training(), options | recipe)


def test_a_bad_batch_among_good_forwards_is_left_out() -> None:
    model, (x, y) = joined_net(), batch()
    optimizer = bound(model, link="two_level", **EACH, lr=0.0)
    reference = bound(other := joined_net(), link="two_level", **EACH, lr=0.0)
    for inputs in (x, x * float("nan")):
        F.cross_entropy(model(inputs), y).backward()
    F.cross_entropy(other(x), y).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = q.grad.clone()  # the gradient of the good forward alone
    with pytest.warns(KfactkWarning):
        optimizer.step()
    reference.step()
    found, expected = (
        opt.state[net_[0].weight]["kfactk.link.coarse"]
        for opt, net_ in ((optimizer, model), (reference, other))
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
