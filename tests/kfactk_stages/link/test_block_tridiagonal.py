"""Block-tridiagonal link against dense inverses of the matrix that it claims to invert."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, CombinationError, KfactkWarning, Optimizer, OptionError
from kfactk.testing import LinkLaws
from kfactk.testing._support.division import equal_on_ranks
from kfactk.testing._support.ranks import RankError, shared_workers
from kfactk.testing._support.training import Training
from kfactk.testing._support.truth import dense_kron, vec
from kfactk_stages.link.block_tridiagonal import BlockTridiagonal
from tests.kfactk.small import F64

TAU = 0.05
RECIPE: dict[str, Any] = {
    "link": "block_tridiagonal",
    "curvature": "kfac",
    "basis": "kfac",
    "fisher": "exact",
    "clip": "none",
    "update": "sgd",
    "lr": 0.1,
    "damping": TAU,
    "factor_every": 1,
    "basis_every": 1,
    "factor_decay": 0.5,
}


class TestBlockTridiagonal(LinkLaws):
    stage = "block_tridiagonal"

    def in_recipe(self) -> dict[str, Any]:
        return {"link": self.subject(), "basis": "kfac"}


# ------------------------------------------------------------------------------- the dense truth


class Seen:
    """Inputs and output gradients of each layer of a model, by autograd, an example at a time.

    Rows are `[passes, N, T, d]`; inputs are the same in every pass.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], x: Tensor, scores: Any) -> None:
        self.model, self.names = copy.deepcopy(model), list(names)  # nobody follows a copy
        self.a: dict[str, list[Tensor]] = {name: [] for name in names}
        self.g: dict[str, list[Tensor]] = {name: [] for name in names}
        self.examples = len(x)
        for n in range(len(x)):
            self._watch(x[n : n + 1], scores)

    def _watch(self, x: Tensor, scores: Any) -> None:
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.names}
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name: calls[name].append((args[0].detach(), out))
            )
            for name in self.names
        ]
        losses = scores(self.model(x))
        for handle in handles:
            handle.remove()
        for name in self.names:
            module = self.model.get_submodule(name)
            rows = torch.cat([a.reshape(-1, a.shape[-1]) for a, _ in calls[name]])
            if module.bias is not None:
                rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], -1)
            self.a[name].append(rows)
            outputs = [out for _, out in calls[name]]
            passes = [
                torch.cat(
                    [
                        g.reshape(-1, g.shape[-1])
                        for g in torch.autograd.grad(loss, outputs, retain_graph=True)
                    ]
                )
                for loss in losses
            ]
            self.g[name].append(torch.stack(passes))  # [passes, T, d_out]

    def moment(self, side: str, one: str, other: str, *, reduce: bool = False) -> Tensor:
        """A or G of two layers, by sums over examples, rows and passes."""
        total: Any = 0
        for n in range(self.examples):
            if side == "A":
                a, b = self.a[one][n], self.a[other][n]
                if reduce:
                    a, b = a.mean(0, keepdim=True), b.mean(0, keepdim=True)
                total = total + sum(torch.outer(p, q) for p, q in zip(a, b, strict=True))
                continue
            for g, h in zip(self.g[one][n], self.g[other][n], strict=True):
                if reduce:
                    g, h = g.sum(0, keepdim=True), h.sum(0, keepdim=True)
                part: Any = sum(torch.outer(p, q) for p, q in zip(g, h, strict=True))
                total = total + part / len(g)
        return total / self.examples


def damped(a: Tensor, g: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g)))
    eye = functools.partial(torch.eye, dtype=F64)
    return a + pi * tau**0.5 * eye(len(a)), g + tau**0.5 / pi * eye(len(g))


Moment = Callable[[str, str, str], Tensor]
"""From the side and two layers to A or G of the two."""


def claimed(moment: Moment, names: Sequence[str], tau: float, cut: Sequence[int] = ()) -> Tensor:
    """The matrix whose inverse is claimed, its blocks in the order of the layers.

    Its blocks on the diagonal and beside it are Kronecker products; the others are what makes its
    inverse block-tridiagonal: F_ik = F_ij F_jj^-1 F_jk for i < j < k.
    """
    blocks: dict[tuple[int, int], Tensor] = {}
    for i, one in enumerate(names):
        a, g = (moment(side, one, one) for side in "AG")
        blocks[i, i] = dense_kron(*damped(a, g, tau))
    for i, (one, other) in enumerate(itertools.pairwise(names)):
        blocks[i, i + 1] = torch.zeros(len(blocks[i, i]), len(blocks[i + 1, i + 1]), dtype=F64)
        if i not in cut:
            blocks[i, i + 1] = dense_kron(*(moment(side, one, other) for side in "AG"))
    for gap in range(2, len(names)):
        for i in range(len(names) - gap):
            j, k = i + gap - 1, i + gap
            blocks[i, k] = blocks[i, j] @ torch.linalg.solve(blocks[j, j], blocks[j, k])
    rows = [
        torch.cat(
            [blocks[i, k] if i <= k else blocks[k, i].T for k in range(len(names))],
            1,
        )
        for i in range(len(names))
    ]
    return torch.cat(rows)


def matrix_of(module: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    weight = tensors["weight"]
    return torch.cat([weight, tensors["bias"].unsqueeze(-1)], -1) if "bias" in tensors else weight


def joined(model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors by parameter name as one vector, layer by layer, columns of each matrix stacked."""
    parts = []
    for name in names:
        module = model.get_submodule(name)
        own = {k: tensors[f"{name}.{k}"] for k, _ in module.named_parameters()}
        parts.append(vec(matrix_of(module, own)))
    return torch.cat(parts)


def class_scores(output: Tensor) -> list[Tensor]:
    """Scalars whose gradients' outer products sum to M F of a classifier, an example."""
    terms = F.log_softmax(output, -1).reshape(-1, output.shape[-1])
    return [
        term[c] * term[c].exp().detach().sqrt() for term in terms for c in range(terms.shape[-1])
    ]


def net(depth: int, bias: bool) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(depth)
    sizes = [3, 4, 2, 3, 3][: depth + 1]
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=bias), nn.Tanh()]
    names = [str(2 * n) for n in range(depth)]
    return nn.Sequential(*layers[:-1]).to(F64), names


def data(d: int = 3, n: int = 7, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=generator, dtype=F64),
        torch.randint(classes, (n,), generator=generator),
    )


def step(model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_step_is_the_dense_inverse_of_the_claimed_matrix(depth: int, bias: bool) -> None:
    model, names = net(depth, bias)
    batch = data()
    before = copy.deepcopy(model)
    seen = Seen(before, names, batch[0], class_scores)
    matrix = claimed(seen.moment, names, TAU)
    loss = F.cross_entropy(before(batch[0]), batch[1])
    named = dict(before.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    expected = torch.linalg.solve(matrix, joined(before, names, gradients))
    step(model, kfactk.build(**RECIPE).bind(model), batch)
    moved = {
        n: (p - dict(model.named_parameters())[n]).detach() / RECIPE["lr"] for n, p in named.items()
    }
    found = joined(before, names, moved)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_each_damping_that_a_controller_tries_has_its_own_inverse() -> None:
    model, names = net(2, True)
    x, y = data()
    seen = Seen(model, names, x, class_scores)
    options = {
        "basis": {"name": "kfac", "solver": "eigh"},
        "update": "velocity",
        "lr": 0.003,
        "damping": None,
        "controller": {"name": "quadratic", "model_damping": 3.0, "search_every": 1, "omega": 0.1},
    }
    optimizer = kfactk.build(**{**RECIPE, **options}).bind(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    [group] = optimizer.param_groups
    assert group["damping"] != 3.0  # a neighbour was better
    gradient = {name: p.grad for name, p in model.named_parameters()}
    expected = -torch.linalg.solve(
        claimed(seen.moment, names, group["damping"]), joined(model, names, gradient)
    )
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    torch.testing.assert_close(
        joined(model, names, moved), group["lr"] * expected, rtol=1e-8, atol=1e-12
    )
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, group["damping"]))


def drawn(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=F64) for n, p in model.named_parameters()
    }


def assert_inverse(
    optimizer: Optimizer, model: nn.Module, names: Sequence[str], matrix: Tensor
) -> None:
    """Assert that the optimizer preconditions by the inverse of a matrix."""
    v = drawn(model)
    found = joined(model, names, optimizer.precondition(v))
    expected = torch.linalg.solve(matrix, joined(model, names, v))
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * size)


def test_statistics_decay_over_steps_add_over_forwards_and_wait_for_the_basis() -> None:
    model, names = net(3, True)
    batches = [data(seed=seed) for seed in range(4)]
    recipe = {**RECIPE, "lr": 0.0, "basis_every": 2}
    optimizer = kfactk.build(**recipe).bind(model)
    step(model, optimizer, batches[0])
    seen = [Seen(model, names, x, class_scores) for x, _ in batches]
    assert_inverse(optimizer, model, names, claimed(seen[0].moment, names, TAU))
    step(model, optimizer, batches[1])  # factors move, the basis does not
    assert_inverse(optimizer, model, names, claimed(seen[0].moment, names, TAU))
    optimizer.zero_grad()
    for x, y in batches[2:]:
        (F.cross_entropy(model(x), y) / 2).backward()
    optimizer.step()

    def mean(side: str, one: str, other: str) -> Tensor:
        a, b, c, d = (each.moment(side, one, other) for each in seen)
        return (0.25 * a + 0.5 * b + (c + d) / 2) / 1.75

    assert_inverse(optimizer, model, names, claimed(mean, names, TAU))


def test_a_deep_linear_network_has_the_claimed_matrix_but_for_damping() -> None:
    """Its Fisher blocks are Kronecker products, and blocks apart follow from those between."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3))).to(F64)
    names, (x, _) = ["0", "1", "2"], data(n=9)
    fisher: Any = 0
    for n in range(len(x)):
        for out in model(x[n]):
            found = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
            row = torch.cat([vec(each) for each in found])
            fisher = fisher + torch.outer(row, row) / len(x)
    errors = []
    for tau in (1e-8, 1e-10):
        other = copy.deepcopy(model)
        recipe = {**RECIPE, "likelihood": "gaussian", "lr": 0.0, "damping": tau}
        optimizer = kfactk.build(**recipe).bind(other)
        (0.5 * (other(x) - 1).square().sum(1).mean()).backward()
        optimizer.step()
        columns = []
        for index in range(27):
            unit = torch.zeros(27, dtype=F64)
            unit[index] = 1
            parts = {
                f"{k}.weight": each.view(3, 3).T
                for k, each in zip(names, unit.split(9), strict=True)
            }
            columns.append(joined(other, names, optimizer.precondition(parts)))
        claim = torch.linalg.inv(torch.stack(columns, 1))
        errors.append(float((claim - fisher).norm() / fisher.norm()))
    assert errors[0] < 1e-3
    assert errors[1] < 0.2 * errors[0], "what is left is not the damping"
    assert float(fisher[:9, 18:].norm() / fisher.norm()) > 0.03, "layers apart are uncorrelated"


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


def test_blocks_do_not_solve_where_the_link_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfactk.preconditioner.block import Block

    solved: list[str] = []
    solve = Block.solve
    monkeypatch.setattr(
        Block, "solve", lambda self, *args: solved.append(self.name) or solve(self, *args)
    )
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    optimizer = kfactk.build(**{**RECIPE, "curvature": ["kfac", "norm"]}).bind(model)
    step(model, optimizer, data())
    assert solved == ["1"]
    model[0].requires_grad_(False)
    step(model, optimizer, data())
    assert solved == ["1", "1", "2"], "a layer alone is its block's"


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


def test_a_bad_batch_changes_nothing() -> None:
    model, names = net(2, True)
    batch = data()
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0}).bind(model)
    step(model, optimizer, batch)
    seen = Seen(model, names, batch[0], class_scores)
    with pytest.warns(KfactkWarning):
        step(model, optimizer, (batch[0] * float("nan"), batch[1]))
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, TAU))
    assert optimizer.counters == {"skipped_batches": 1, "failed_decompositions": 0}


def test_heads_that_need_several_passes_are_joined_in_each() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.trunk, self.one, self.other = (
                nn.Linear(3, 4).double(),
                nn.Linear(4, 2).double(),
                nn.Linear(4, 2).double(),
            )

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = torch.tanh(self.trunk(x))
            return {"one": self.one(hidden), "other": self.other(hidden)}

    model, (x, y), names = Heads(), data(), ["trunk", "other"]
    link = {"name": "block_tridiagonal", "layers": names}
    likelihood = {"one": "categorical", "other": "gaussian"}
    recipe = {**RECIPE, "link": link, "likelihood": likelihood, "lr": 0.0, "exclude": ["one"]}
    optimizer = kfactk.build(**recipe).bind(model)
    out = model(x)
    (F.cross_entropy(out["one"], y) + out["other"].square().sum(1).mean()).backward()
    optimizer.step()

    def scores(out: dict[str, Tensor]) -> list[Tensor]:
        return [*class_scores(out["one"]), *out["other"][0]]

    class Watched(Seen):
        def _watch(self, x: Tensor, scores: Any) -> None:
            def safe(out: dict[str, Tensor]) -> list[Tensor]:
                tie = 0.0 * (out["one"].sum() + out["other"].sum())
                return [each + tie for each in scores(out)]

            super()._watch(x, safe)

    seen = Watched(model, names, x, scores)
    v = {n: t for n, t in drawn(model).items() if not n.startswith("one")}
    found = joined(model, names, optimizer.precondition(v))
    expected = torch.linalg.solve(claimed(seen.moment, names, TAU), joined(model, names, v))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------- failures and states


def test_a_pair_that_makes_no_fisher_matrix_is_left_apart_and_counted() -> None:
    class Apart(BlockTridiagonal):
        def statistics(self, layers: Any, rows: Any, num_terms: Any) -> Any:
            found = super().statistics(layers, rows, num_terms)
            return {n: each.scaled(9.0) if n.endswith("0") else each for n, each in found.items()}

    model, names = net(3, True)
    batch = data()
    optimizer = kfactk.build(**{**RECIPE, "link": Apart(), "lr": 0.0, "damping": 1e-6}).bind(model)
    with pytest.warns(KfactkWarning, match=r"leaves layer '0' apart from '2'.*\(said once\)"):
        step(model, optimizer, batch)
    step(model, optimizer, batch)
    assert optimizer.counters["failed_decompositions"] == 2
    seen = Seen(model, names, batch[0], class_scores)
    v = drawn(model)
    found = joined(model, names, optimizer.precondition(v))
    matrix = claimed(seen.moment, names, 1e-6, cut=[0])
    expected = torch.linalg.solve(matrix, joined(model, names, v))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_what_was_prepared_last_stays_where_nothing_can_be_made() -> None:
    class Failing(BlockTridiagonal):
        broken = False

        def prepare(self, layers: Any, statistics: Any) -> Any:
            if Failing.broken:
                raise kfactk.DecompositionError("no luck today")
            return super().prepare(layers, statistics)

    model, names = net(2, True)
    batch = data()
    optimizer = kfactk.build(**{**RECIPE, "link": Failing(), "lr": 0.0}).bind(model)
    step(model, optimizer, batch)
    Failing.broken = True
    with pytest.warns(KfactkWarning, match="no luck today"):
        step(model, optimizer, data(seed=1))
    seen = Seen(model, names, batch[0], class_scores)
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, TAU))
    assert optimizer.counters["failed_decompositions"] == 1


def saved(optimizer: Optimizer) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("fault", ["shape", "missing", "nan"])
def test_a_damaged_state_is_refused(fault: str) -> None:
    model, _ = net(2, True)
    optimizer = kfactk.build(**RECIPE).bind(model)
    step(model, optimizer, data())
    state = saved(optimizer)
    entry, key = state["state"][0], "kfactk.prepared.psi.A.0"
    if fault == "shape":
        entry[key] = entry[key][:1].clone()
    elif fault == "missing":
        del entry[key]
    else:
        entry[key].fill_(float("nan"))
    with pytest.raises(kfactk.StateError, match=r"kfactk\.prepared"):
        optimizer.load_state_dict(state)


def test_a_resumed_run_goes_on_with_what_was_prepared() -> None:
    recipe = {**RECIPE, "basis_every": 3, "update": "momentum"}
    model, _ = net(3, True)
    optimizer = kfactk.build(**recipe).bind(model)
    for seed in range(2):
        step(model, optimizer, data(seed=seed))
    other = copy.deepcopy(model)
    resumed = kfactk.build(**recipe).bind(other)
    resumed.load_state_dict(saved(optimizer))
    for seed in range(2, 5):
        for each, opt in ((model, optimizer), (other, resumed)):
            step(each, opt, data(seed=seed))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_without_the_link_is_loaded() -> None:
    model, names = net(2, True)
    batch = data()
    first = kfactk.build(**{**RECIPE, "link": None, "lr": 0.0}).bind(model)
    step(model, first, batch)
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0, "factor_decay": 0.0}).bind(model)
    optimizer.load_state_dict(saved(first))
    step(model, optimizer, batch)
    seen = Seen(model, names, batch[0], class_scores)
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, TAU))


def test_two_models_do_not_meet() -> None:
    models = [net(2, True)[0] for _ in range(2)]
    alone = copy.deepcopy(models[0])
    optimizers = [kfactk.build(**RECIPE).bind(model) for model in models]
    reference = kfactk.build(**RECIPE).bind(alone)
    for seed in range(2):
        outs = [model(data(seed=seed)[0]) for model in models]
        for optimizer, out in zip(optimizers, outs, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(out, data(seed=seed)[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
        step(alone, reference, data(seed=seed))
    for one, two in zip(models[0].parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_gradient_scaler_changes_nothing() -> None:
    found = []
    for enabled in (True, False):
        model, _ = net(3, True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)
        recipe = {**RECIPE, "fisher": "empirical"}
        optimizer = kfactk.build(**recipe).bind(model, scaler=scaler)
        for seed in range(3):
            x, y = data(seed=seed)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_autocast_trains() -> None:
    model, _ = net(3, True)
    model.float()
    optimizer = kfactk.build(**{**RECIPE, "fisher": "mc"}).bind(model)
    x, y = data(n=32)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.state[model[0].weight]["kfactk.prepared.psi.A.0"].dtype == torch.float32


# ----------------------------------------------------------------------------------------- ranks


def bind_on_ranks(rank: int, placement: Any) -> bool:
    optimizer = kfactk.build(**{**RECIPE, "placement": placement}).bind(net(2, True)[0])
    return all(row.linked for row in optimizer.coverage())


@pytest.mark.xdist_group("ranks")
def test_every_rank_must_keep_the_matrices() -> None:
    assert shared_workers().run(2, bind_on_ranks, "replicated") == [True, True]
    for placement, what in (
        ("comm_opt", r"reads A and G of layer '0'.* 'comm_opt' keeps them on some ranks alone"),
        ("mem_opt", r"'mem_opt' has layer '0' on some ranks alone"),
    ):
        with pytest.raises(RankError, match=rf"{what}.*replicated"):
            shared_workers().run(2, bind_on_ranks, placement)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "recipe",
    [
        {"fisher": "exact"},
        {"fisher": "empirical", "first_moment": 0.9},
        {
            "curvature": {"name": "conv_kfac", "spatial": "reduce"},
            "clip": {"name": "norm", "limit": 0.1},
        },
    ],
    ids=["exact", "empirical", "reduce"],
)
def test_two_ranks_do_what_one_process_does(recipe: dict[str, Any]) -> None:
    options = {"link": "block_tridiagonal", "basis": "kfac", "update": torch.optim.SGD, "lr": 0.05}
    equal_on_ranks(Training(), {**options, "damping": 0.01, **recipe})


class Uneven(BlockTridiagonal):
    """Makes something else on rank 1, as another processor may, or nothing on rank 0."""

    def prepare(self, layers: Any, statistics: Any) -> Any:
        found = super().prepare(layers, statistics)
        rank = torch.distributed.get_rank()
        if rank == 0 and not self.layers:
            raise kfactk.DecompositionError("rank 0 alone")
        if rank == 1 and self.layers == ("2", "0"):
            raise ValueError("rank 1 alone")
        return attrs.evolve(found, tensors={n: t * (1 + rank) for n, t in found.tensors.items()})


def prepared_on_ranks(rank: int, layers: Any) -> Tensor:
    model = net(2, True)[0]
    optimizer = kfactk.build(**{**RECIPE, "link": Uneven(layers)}).bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model, optimizer, data())
    found: Tensor = optimizer.state[model[0].weight]["kfactk.prepared.weights.0"]
    return found.clone()


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("layers", "factor"), [(["0", "2"], 1.0), (None, 2.0)])
def test_ranks_go_on_with_the_same_bits(layers: Any, factor: float) -> None:
    one, two = shared_workers().run(2, prepared_on_ranks, layers)
    assert torch.equal(one, two)
    model = net(2, True)[0]
    optimizer = kfactk.build(**RECIPE).bind(model)
    step(model, optimizer, data())
    alone = optimizer.state[model[0].weight]["kfactk.prepared.weights.0"]
    torch.testing.assert_close(one, factor * alone)


@pytest.mark.xdist_group("ranks")
def test_a_rank_that_fails_stops_all() -> None:
    says = "rank 1 alone"
    with pytest.raises(RankError, match=says):
        shared_workers().run(2, prepared_on_ranks, ["2", "0"])


def test_the_recipe_is_written_and_read() -> None:
    recipe = kfactk.build(basis="kfac", link=BlockTridiagonal(["a", "b"]))
    assert recipe.to_dict()["link"] == {"name": "block_tridiagonal", "layers": ["a", "b"]}
    assert kfactk.Recipe.from_dict(recipe.to_dict()) == recipe
