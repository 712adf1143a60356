"""Flattened tokens are measured by example, as where nothing was flattened; else the user is told.

Truth is per-example autograd in float64 and dense algebra: the step is `-(F + damping I)^-1 g`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import kfactk
from kfactk import KfactkWarning
from kfactk.capture import row_orders
from kfactk.samples import LayerCall
from kfactk.testing._support.ranks import shared_workers
from kfactk_stages.curvature.conv_kfac import ConvKfac

N, T, D, C, DAMPING = 4, 3, 4, 3, 0.02
WAYS = ("whole", "inside", "output", "sequence first")


class Tokens(nn.Module):
    """A model of sequences that mixes positions, and may flatten tokens in one of `WAYS`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.table = way, nn.Embedding(7, D)
        self.mix, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.up, self.down, self.head = nn.Linear(D, 5), nn.Linear(5, D), nn.Linear(D, C)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.table(x)
        hidden = hidden + torch.tanh(self.mix(hidden)).cumsum(1)
        given = self.flat(hidden)
        found = self.down(torch.tanh(self.up(self.norm(given))))
        logits: Tensor = self.head(torch.tanh(given + found))
        if self.way == "sequence first":
            return logits.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1).contiguous()
        return logits.view(*x.shape, C) if self.way == "inside" else logits

    def flat(self, hidden: Tensor) -> Tensor:
        if self.way == "whole":
            return hidden
        return (hidden.transpose(0, 1) if self.way == "sequence first" else hidden).reshape(-1, D)


def data(examples: int = N, length: int = T, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = examples, length
    return torch.randint(7, shape, generator=generator), torch.randint(
        C, shape, generator=generator
    )


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, C), y.reshape(-1))


def trained(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], **recipe: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """Return how far each parameter moves in steps, and what was told."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"update": "sgd", "lr": 1.0, "clip": "none", "damping": DAMPING, **recipe}
    settings.setdefault("likelihood", {"name": "categorical", "class_axis": -1})
    optimizer = kfactk.build(factor_every=1, scale_every=1, basis_every=1, **settings).bind(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches:
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
    optimizer.close()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return moved, [str(each.message) for each in caught]


def deviation(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[n] - other[n]).norm() / other[n].norm()) for n in other)


def scores(model: Tokens, names: Sequence[str], x: Tensor, y: Tensor, fisher: str) -> list[Tensor]:
    """Return for each example the gradients `[k, P]` whose outer products make M F."""
    parameters, found = [model.get_parameter(name) for name in names], []
    for n in range(len(x)):
        logits = model(x[n : n + 1]).reshape(-1, C)
        if fisher == "empirical":
            columns = [F.cross_entropy(logits, y[n], reduction="sum")]
        else:
            p = logits.detach().softmax(-1)
            root = p.sqrt().diag_embed() - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
            columns = [logits[s] @ root[s, :, c] for s in range(len(logits)) for c in range(C)]
        rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in columns]
        found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    return found


def expected(
    model: Tokens, names: Sequence[str], x: Tensor, y: Tensor, fisher: str, kept: Tensor
) -> dict[str, Tensor]:
    """Return the step of the block of these parameters, F kept where `kept` says so."""
    parameters = {name: model.get_parameter(name) for name in names}
    d = torch.cat(scores(model, names, x, y, fisher))
    dense = (d.T @ d / x.numel()) * kept
    plain = torch.autograd.grad(loss_of(model(x), y), list(parameters.values()))
    gradient = torch.cat([each.flatten() for each in plain])
    step = -torch.linalg.solve(dense + DAMPING * torch.eye(len(dense)).double(), gradient)
    parts = step.split([each.numel() for each in parameters.values()])
    return {
        name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)
    }


BLOCKS: dict[str, tuple[dict[str, Any], Callable[[], Tensor]]] = {
    "up": (
        {"curvature": "rows", "basis": {"name": "cg", "tolerance": 1e-12, "iterations": 200}},
        lambda: torch.ones(5 * D + 5, 5 * D + 5).double(),
    ),
    "norm": (
        {"curvature": "norm", "basis": "unitwise"},
        lambda: torch.eye(D).repeat(2, 2).double(),
    ),
}


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("layer", BLOCKS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_the_fisher_of_examples(way: str, layer: str, fisher: str) -> None:
    model, (x, y) = Tokens(way), data()
    stages, kept = BLOCKS[layer]
    names = [f"{layer}.weight", f"{layer}.bias"]
    truth = expected(model, names, x, y, fisher, kept())
    moved, told = trained(model, [(x, y)], fisher=fisher, **stages)
    assert told == []
    assert deviation({name: moved[name] for name in names}, truth) < 1e-9


RECIPES: dict[str, dict[str, Any]] = {
    "ekfac": {"curvature": "all", "basis": "ekfac"},
    "running": {"curvature": "all", "basis": {"name": "ekfac", "scale": "running"}},
    "reduce": {"curvature": {"name": "kfac", "spatial": "reduce"}, "basis": "kfac"},
    "sud": {"curvature": "kfac", "basis": "kfac"},
    "rows": {"curvature": "rows", "basis": "cg"},
    "link": {"curvature": "kfac", "basis": "kfac", "link": "two_level"},
}


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("way", WAYS[1:])
def test_steps_are_those_of_the_model_that_flattens_nothing(
    way: str, recipe: str, fisher: str
) -> None:
    batches = [data(seed=1), data(3, 5, seed=2), data(1, 4, seed=3)]
    settings = {**RECIPES[recipe], "fisher": fisher, "lr": 0.1}
    truth, _ = trained(Tokens("whole"), batches, **settings)
    moved, told = trained(Tokens(way), batches, **settings)
    assert told == []
    assert deviation(moved, truth) < 1e-7


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**RECIPES["ekfac"], "fisher": "mc"}
    truth, _ = trained(Tokens("whole"), [data()], **settings)
    monkeypatch.setattr(row_orders.RowOrders, "unfolded", lambda self, layer, calls, rows: calls)
    moved, _ = trained(Tokens("inside"), [data()], **settings)
    assert deviation(moved, truth) > 0.05


def test_a_layer_that_is_interleaved_for_another_curvature_dimension_is_unfolded() -> None:
    class First(nn.Module):
        """Layers of `[T, N, d]`, and of the same in one dimension."""

        def __init__(self, flat: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.flat, self.up, self.head = flat, nn.Linear(D, 5), nn.Linear(5, C)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            hidden = x.transpose(0, 1).cumsum(0)
            given = hidden.reshape(-1, D) if self.flat else hidden
            found = torch.tanh(self.up(given)).view(x.shape[1], x.shape[0], 5)
            output: Tensor = self.head(found.mean(0))
            return output

    x, y = rows(N, T, D), torch.arange(N) % C
    recipe: dict[str, Any] = {"fisher": "mc", "likelihood": "categorical", "basis": "ekfac"}
    truth, _ = trained(First(False), [(x, y)], curvature={"name": "kfac", "batch_dim": 1}, **recipe)
    for dim in (0, 1):
        moved, told = trained(
            First(True), [(x, y)], curvature={"name": "kfac", "batch_dim": dim}, **recipe
        )
        assert told == []
        assert deviation(moved, truth) < 1e-7


def rows(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Frames(nn.Module):
    """A network on the frames of films, one after the other or all in the dimension of images."""

    def __init__(self, fold: bool, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fold, self.conv = fold, nn.Conv2d(2, 4, 2)
        self.norm = norm(2, 4) if norm is nn.GroupNorm else norm(4)
        self.fc, self.head = nn.Linear(4, 3), nn.Linear(3, C)
        self.double()

    def of_images(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.conv(x))).mean((2, 3))
        return torch.tanh(self.fc(hidden))

    def forward(self, x: Tensor) -> Tensor:
        if self.fold:
            found = self.of_images(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            found = torch.stack([self.of_images(frame) for frame in x.unbind(1)], 1)
        output: Tensor = self.head(found.cumsum(1).mean(1))
        return output


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("norm", [nn.Identity, nn.GroupNorm])
def test_frames_in_the_dimension_of_images_are_those_of_films(
    norm: type[nn.Module], fisher: str
) -> None:
    batch = rows(N, T, 2, 4, 4), torch.arange(N) % C
    recipe: dict[str, Any] = {"curvature": "all", "basis": "ekfac", "likelihood": "categorical"}
    truth, _ = trained(Frames(False, norm), [batch], fisher=fisher, **recipe)
    moved, told = trained(Frames(True, norm), [batch], fisher=fisher, **recipe)
    assert told == []
    assert deviation(moved, truth) < 1e-7


def test_what_batch_normalisation_mixes_is_told() -> None:
    batch = rows(N, T, 2, 4, 4), torch.arange(N) % C
    recipe: dict[str, Any] = {"curvature": "all", "basis": "ekfac", "likelihood": "categorical"}
    _, told = trained(Frames(True, nn.BatchNorm2d), [batch], **recipe)
    assert any("layer 'norm'" in each or "layer 'conv'" in each for each in told)
    assert any("not known" in each for each in told)


class Tied(nn.Module):
    """A language model whose tied head may see the tokens of all examples in one dimension."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.table, self.fc = flat, nn.Embedding(C, D), nn.Linear(D, D)
        self.head = nn.Linear(D, C, bias=False)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.fc(self.table(x).cumsum(1)))
        logits: Tensor = self.head(hidden.view(-1, D) if self.flat else hidden)
        return logits


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_tied_head_of_flattened_tokens_is_that_of_whole_ones(fisher: str) -> None:
    x, y = data()
    recipe: dict[str, Any] = {"curvature": "all", "basis": "ekfac", "fisher": fisher}
    truth, _ = trained(Tied(False), [(x % C, y)], **recipe)
    moved, told = trained(Tied(True), [(x % C, y)], **recipe)
    assert told == []
    assert deviation(moved, truth) < 1e-7


class Routed(nn.Module):
    """A mixture whose experts are linear layers on the tokens that a router chose."""

    def __init__(self, even: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even, self.router = even, nn.Linear(D, 2)
        self.experts, self.head = nn.ModuleList(nn.Linear(D, D) for _ in range(2)), nn.Linear(D, C)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.reshape(-1, D)
        chosen = self.router(hidden).argmax(-1)
        if self.even:
            chosen = torch.arange(len(hidden)) % 2
        found = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().squeeze(1)
            found = found.index_add(0, mine, torch.tanh(expert(hidden[mine])))
        output: Tensor = self.head((hidden + found).view_as(x).mean(1))
        return output


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("even", [False, True])
def test_tokens_that_a_router_chose_are_told(even: bool, fisher: str) -> None:
    batch = rows(N, 6, D), torch.arange(N) % C
    recipe: dict[str, Any] = {"likelihood": "categorical", "curvature": "kfac", "basis": "ekfac"}
    moved, told = trained(Routed(even), [batch], fisher=fisher, **recipe)
    [message] = told
    assert "'experts.0'" in message
    assert "'experts.1'" in message
    assert ("chance" in message) == even
    assert moved["experts.0.weight"].norm() > 0


class First(nn.Module):
    """A model whose sequence comes first, in its layers and in its output."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.returns = returns
        self.up, self.head = nn.Linear(D, 5), nn.Linear(5, C)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.up(x)).cumsum(0))
        if self.returns == "mean":
            return logits.mean(0)
        return logits.view(-1, C) if self.returns == "flat" else logits


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize(
    ("returns", "length", "words"),
    [
        ("mean", 3, "batch_dim=1"),
        ("mean", N, "batch_dim=1"),
        ("whole", 3, "output=lambda out: out.transpose(0, 1)"),
    ],
)
def test_sequence_first_layers_are_told(returns: str, length: int, words: str, fisher: str) -> None:
    y = torch.arange(N if returns == "mean" else N * length) % C
    recipe: dict[str, Any] = {"curvature": "kfac", "basis": "ekfac", "fisher": fisher}
    _, told = trained(First(returns), [(rows(length, N, D), y)], **recipe)
    assert any(words in each for each in told)


class WordModel(nn.Module):
    """A language model of torch's examples: the sequence comes first, and the output is flat."""

    def __init__(self, *, tied: bool, recurrent: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.rnn, self.out = nn.Embedding(11, 4), nn.LSTM(4, 4), nn.Linear(4, 11)
        self.rnn.requires_grad_(recurrent)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.rnn(self.words(words))[0]).flatten(0, 1)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_flattened_view_whose_sequence_came_first_is_told(
    tied: bool, recurrent: bool, fisher: str
) -> None:
    model = WordModel(tied=tied, recurrent=recurrent)
    parameters = [p for p in model.parameters() if p.requires_grad]
    curvature = ["rnn", "embedding", "kfac"]
    optimizer = kfactk.build(curvature=curvature, fisher=fisher).bind(model, parameters)
    words = torch.randint(11, (7, 14))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KfactkWarning)
        F.cross_entropy(model(words), words.flatten()).backward()
        optimizer.step()
    [told] = [str(each.message) for each in caught if "model's output" in str(each.message)]
    assert ".view(-1, 14, out.shape[-1])" in told
    assert ".transpose(0, 1)" in told


@pytest.mark.parametrize(
    ("fisher", "edges", "told"), [("mc", 4, 0), ("empirical", 4, 1), ("empirical", 2, 0)]
)
def test_an_output_of_tokens_that_the_model_chose_is_told(
    fisher: str, edges: int, told: int
) -> None:
    """In passes of our own the gradients of different terms do not correlate.

    Of `edges` rows, such as the two of a list of edges, a model has as many examples or not.
    """

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(D, 5), nn.Linear(5, C)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            rows = x.view(4, 5, -1) if edges == 4 else x.view(20, -1)
            return self.head(torch.tanh(self.up(rows)).view(4, 5, -1)[mask.view(4, 5)])

    model, mask = Chosen(), torch.ones(4, 5, dtype=torch.bool)
    mask[0, 1:] = mask[2, 2:] = False
    optimizer = kfactk.build(curvature="kfac", fisher=fisher).bind(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KfactkWarning)
        logits = model(torch.randn(edges, 20 // edges, D), mask.view(edges, -1))
        F.cross_entropy(logits, torch.arange(len(logits)) % C).backward()
        optimizer.step()
    texts = [str(each.message) for each in caught if each.category is KfactkWarning]
    assert ["has 13 rows" in each for each in texts] == [True] * told


def test_a_flattened_output_whose_sequence_came_first_is_told() -> None:
    class Steps(First):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.up(x)).cumsum(0)
            return self.head(hidden.view(-1, 5))

    y = torch.arange(N * T) % C
    recipe: dict[str, Any] = {"curvature": "kfac", "basis": "ekfac"}
    _, told = trained(Steps("flat"), [(rows(T, N, D), y)], **recipe)
    assert any("ordered by example does not show" in each for each in told)


def test_rows_that_stop_to_divide_are_told() -> None:
    class Packed(Tokens):
        def flat(self, hidden: Tensor) -> Tensor:
            found = super().flat(hidden)
            return found[:-1] if self.short else found

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.table(x)
            found = self.up(self.norm(self.flat(hidden)))
            output: Tensor = self.head(self.down(found).mean(0) + hidden.mean(1))
            return output

    model, (x, _) = Packed("inside"), data()
    recipe: dict[str, Any] = {"likelihood": "categorical", "curvature": "kfac", "basis": "ekfac"}
    model.short = False
    optimizer = kfactk.build(**recipe).bind(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
        model.short = True
        model(x)
    optimizer.close()
    assert any("not known" in str(each.message) for each in caught)


def on_ranks(rank: int, way: str, recipe: dict[str, Any]) -> list[Tensor]:
    """Return how far parameters move in two steps, each rank with a half of each batch."""
    model: Any = Tokens("inside")
    run = model
    if way == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        run = nn.parallel.DistributedDataParallel(model)
    optimizer = kfactk.build(**STEADY, **recipe).bind(run)
    for x, y in (data(seed=1), data(seed=2)):
        optimizer.zero_grad()
        loss_of(run(x[rank::2]), y[rank::2]).backward()
        optimizer.step()
    optimizer.close()
    found = [p.full_tensor() if way == "fully_shard" else p for p in model.parameters()]
    return [each.detach().clone() for each in found]


STEADY: dict[str, Any] = {
    "update": "sgd",
    "lr": 0.1,
    "clip": "none",
    "damping": DAMPING,
    "likelihood": {"name": "categorical", "class_axis": -1},
    "factor_every": 1,
    "scale_every": 1,
    "basis_every": 1,
}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("way", ["ddp", "fully_shard"])
def test_two_ranks_equal_one_process(way: str, fisher: str) -> None:
    stages = {"curvature": "rows", "basis": "cg"}
    if way == "fully_shard":  # no passes run, and of `norm` alone the input is a view
        stages = {"curvature": "norm", "basis": "unitwise"}
    recipe = {**stages, "fisher": fisher}
    model = Tokens("whole")
    optimizer = kfactk.build(**STEADY, **recipe).bind(model)
    for x, y in (data(seed=1), data(seed=2)):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    optimizer.close()
    for found in shared_workers().run(2, on_ranks, way, recipe):
        for one, other in zip(found, model.parameters(), strict=True):
            assert float((one - other).norm()) < 1e-9


class Failing(ConvKfac):
    """Cannot divide calls."""

    def unfold(self, *arguments: Any) -> Sequence[LayerCall]:
        raise RuntimeError("sabotage")


def test_a_curvature_that_fails_to_divide_a_call_is_named() -> None:
    model, (x, y) = Tokens("inside"), data()
    optimizer = kfactk.build(
        curvature=[Failing(), "embedding", "norm"],
        likelihood={"name": "categorical", "class_axis": -1},
        damping=DAMPING,
    ).bind(model)
    with pytest.raises(kfactk.PluginError, match=r"Failing failed on layer .*sabotage"):
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    optimizer.close()
