"""An embedding and an output layer with one weight, and bags of embeddings, in a training loop.

The truth is a loop over examples in float64 that uses nothing of kfactk.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfactk
from kfactk import CaptureError, Optimizer
from kfactk.testing._support.ranks import shared_workers

F64 = torch.float64
V, WIDTH, TAU, LR = 7, 4, 0.03, 0.1
RECIPE: dict[str, Any] = {
    "curvature": "all",
    "basis": "ekfac",
    "fisher": "empirical",
    "likelihood": {"name": "categorical", "class_axis": -1},
    "update": torch.optim.SGD,
    "clip": "none",
    "damping": TAU,
    "lr": LR,
    "factor_every": 1,
    "scale_every": 1,
    "basis_every": 1,
}
BAGS: dict[str, Any] = {**RECIPE, "likelihood": "categorical"}
Batch = tuple[Tensor, Tensor]


class Language(nn.Module):
    """A causal model of tokens: each token sees the mean of those before it."""

    def __init__(self, *, head_first: bool = False, bias: bool = False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(WIDTH, V, bias=bias)
        self.emb = nn.Embedding(V, WIDTH, padding_idx=0)
        self.body = nn.Linear(WIDTH, WIDTH)
        if not head_first:
            self.head = nn.Linear(WIDTH, V, bias=bias)
        nn.init.normal_(self.emb.weight, std=0.7)
        self.head.weight = self.emb.weight
        self.recompute = False
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.emb(tokens)
        h = found.cumsum(1) / torch.arange(1, tokens.shape[1] + 1).unsqueeze(-1)
        run = self.hidden
        h = checkpoint(run, h, use_reentrant=False) if self.recompute else run(h)
        return self.head(h + found)

    def hidden(self, h: Tensor) -> Tensor:
        return torch.tanh(self.body(h))


def language(**how: Any) -> Language:
    torch.manual_seed(0)
    return Language(**how)


def sentences(examples: int = 6, length: int = 5, seed: int = 1) -> Batch:
    """Tokens, the padding index among them, and targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (examples, length), generator=generator)
    return tokens, torch.randint(V, (examples, length), generator=generator)


def loss_of(model: nn.Module, batch: Batch, **how: Any) -> Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, -2), targets.flatten(), **how)


def train(optimizer: Optimizer, model: nn.Module, *batches: Batch) -> None:
    optimizer.zero_grad()
    for batch in batches:
        (loss_of(model, batch) / len(batches)).backward()
    optimizer.step()


def bound(model: nn.Module, **recipe: Any) -> Optimizer:
    return kfactk.build(**{**RECIPE, **recipe}).bind(model)


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_equal(found: list[Tensor], expected: list[Tensor], **how: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **how)


# -------------------------------------------------------------------------------------- dense truth


def losses(logits: Tensor, targets: Tensor, fisher: str) -> list[Tensor]:
    """Losses of one example whose gradients' outer products sum to its Fisher information."""
    logs = logits.squeeze(0).log_softmax(-1)
    if fisher == "empirical":
        return [F.nll_loss(logs, targets, reduction="sum")]
    return list((-logs * logs.detach().exp().sqrt()).flatten())


def by_example(model: Language, batch: Batch, fisher: str = "empirical") -> dict[str, Tensor]:
    """a, G before it is divided, and every D, `[*, V, d]`: by autograd on one example at a time."""
    a, g, rows = torch.zeros(V, dtype=F64), torch.zeros(WIDTH, WIDTH, dtype=F64), []
    sums = []
    for tokens, targets in zip(*batch, strict=True):
        seen: dict[str, Tensor] = {}
        handles = [
            model.emb.register_forward_hook(lambda _m, _i, y, s=seen: s.update(emb=y)),
            model.head.register_forward_hook(lambda _m, x, y, s=seen: s.update(h=x[0], logits=y)),
        ]
        model(tokens.unsqueeze(0))
        for handle in handles:
            handle.remove()
        wanted = [model.emb.weight, seen["emb"], seen["logits"]]
        for loss in losses(seen["logits"], targets, fisher):
            d, at_emb, gamma = torch.autograd.grad(loss, wanted, retain_graph=True)
            rows.append(d)
            sums.append(gamma[0].sum(0))
            for t, token in enumerate(tokens):
                if token != 0:
                    a[token] += at_emb[0, t] @ at_emb[0, t]
                    g += torch.outer(at_emb[0, t], at_emb[0, t])
                h, gradient = seen["h"][0, t].detach(), gamma[0, t]
                a += (h @ h) * gradient.square()
                g += (gradient @ gradient) * torch.outer(h, h)
    return {"a": a, "G": g, "D": torch.stack(rows), "bias": torch.stack(sums)}


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize(("head_first", "bias"), [(False, False), (True, False), (False, True)])
def test_a_tied_table_gets_the_diagonal_of_its_fisher(
    head_first: bool, bias: bool, fisher: str
) -> None:
    """The gradient of both its uses is preconditioned, by what both contribute to each example."""
    model, batch = language(head_first=head_first, bias=bias), sentences()
    before, name = copy.deepcopy(model), "head" if head_first else "emb"
    optimizer = bound(model, fisher=fisher)
    train(optimizer, model, batch)
    truth, terms = by_example(before, batch, fisher), batch[0].numel()
    factors = optimizer.layers[name].factors
    torch.testing.assert_close(factors["a"], truth["a"] / terms, rtol=1e-12, atol=0)
    torch.testing.assert_close(factors["G"], truth["G"] / truth["a"].sum(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(truth["G"].trace(), truth["a"].sum())

    u = torch.linalg.eigh(truth["G"]).eigenvectors
    scale = (truth["D"] @ u).square().sum(0) / terms
    expected = (model.emb.weight.grad @ u / (scale + TAU)) @ u.T
    step = (before.emb.weight - model.emb.weight).detach() / LR
    torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-12)
    assert model.head.weight is model.emb.weight
    if bias:  # a layer of its own
        fisher_diagonal = truth["bias"].square().sum(0) / terms
        step = (before.head.bias - model.head.bias).detach() / LR
        torch.testing.assert_close(step, model.head.bias.grad / (fisher_diagonal + TAU))


@pytest.mark.parametrize("head_first", [False, True])
def test_the_coverage_tells_the_blocks_of_table_and_bias(head_first: bool) -> None:
    table = kfactk.build(curvature="all").coverage(language(head_first=head_first, bias=True))
    rows = {row.parameter: row.treatment for row in table}
    name = "head" if head_first else "emb"
    assert rows[f"{name}.weight"] == f"block {name} (embedding, ekfac)"
    assert rows["head.bias"] == "block head[bias] (embedding, ekfac)"
    assert not table.plain


def test_a_bias_that_an_enclosing_module_holds_too_is_covered() -> None:
    """As in BERT, whose module around the output layer registers its bias."""
    model = language(bias=True)
    model.bias = model.head.bias
    optimizer = bound(model)
    assert {row.parameter: row.block for row in optimizer.coverage()}["bias"] == "head[bias]"
    train(optimizer, model, sentences())
    assert optimizer.layers["head[bias]"].scale["scale"].shape == (1, V)


def test_a_bias_that_another_module_has_too_goes_to_the_update_rule() -> None:
    model = language(bias=True)
    model.other = nn.Linear(WIDTH, V).double()
    model.other.bias = model.head.bias
    found = {row.parameter: row.treatment for row in kfactk.build(curvature="all").coverage(model)}
    assert found["head.bias"] == "-: the weight beside it is tied, in block 'emb'"
    assert found["emb.weight"] == "block emb (embedding, ekfac)"


def test_a_bias_is_trained_where_the_table_is_frozen() -> None:
    model = language(bias=True)
    model.emb.weight.requires_grad_(False)
    optimizer = bound(model)
    before = model.head.bias.detach().clone()
    train(optimizer, model, sentences())
    assert set(optimizer.layers) == {"body", "head[bias]"}
    scale = optimizer.layers["head[bias]"].scale["scale"][0]
    step = (before - model.head.bias.detach()) / LR
    torch.testing.assert_close(step, model.head.bias.grad / (scale + TAU))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_other_head(model: Language) -> Language:
    model.head = Doubled(WIDTH, V, bias=False).double()
    model.head.weight = model.emb.weight
    return model


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Language], Language]]] = {
    "no curvature for the table": ({"curvature": "kfac"}, lambda model: model),
    "a head of another class": ({"curvature": "all"}, with_other_head),
    "the head is excluded": ({"curvature": "all", "exclude": ["head"]}, lambda model: model),
    "the head is another block's": (
        {"curvature": [kfactk.block("kfac", layers=["head"]), "embedding", "kfac"]},
        lambda model: model,
    ),
    "the block is for the table alone": (
        {"curvature": [kfactk.block("embedding", layers=["emb"]), "kfac"]},
        lambda model: model,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_tied_layer_is_left_to_the_update_rule(case: str) -> None:
    recipe, change = REFUSED[case]
    model = change(language())
    optimizer = bound(model, **recipe)
    assert "emb" not in optimizer.layers
    (row,) = (row for row in optimizer.coverage() if row.parameter == "emb.weight")
    assert "tied" in row.reason or "no curvature" in row.reason
    before = model.emb.weight.detach().clone()
    train(optimizer, model, sentences())
    torch.testing.assert_close(model.emb.weight.detach(), before - LR * model.emb.weight.grad)


def test_a_head_that_sees_flat_rows_is_measured_by_example() -> None:
    found = []
    for flat in (False, True):
        model = language()
        shape = (-1, model.emb.weight.shape[1]) if flat else (6, 5, -1)
        model.forward = lambda tokens, model=model, shape=shape: model.head(  # type: ignore
            model.emb(tokens).reshape(shape)
        )
        optimizer = bound(model)
        for seed in (1, 2):
            train(optimizer, model, sentences(seed=seed))
        found.append(values(model))
    assert_equal(*found)


def test_a_sequence_first_model_is_told_its_batch_dim() -> None:
    model = language()
    model.forward = lambda x: model.head(  # type: ignore[method-assign]
        model.hidden(model.emb(x.T))
    ).transpose(0, 1)
    optimizer = bound(model, fisher="mc")
    with pytest.warns(kfactk.KfactkWarning, match=r"'emb'.*batch_dim=1"):
        loss_of(model, sentences()).backward()
    optimizer.step()


# --------------------------------------------------------------------------------------- situations


def test_two_forwards_a_step_count_like_one_of_all_examples() -> None:
    one, two = language(), language()
    tokens, targets = sentences()
    whole, parts = bound(one), bound(two)
    train(whole, one, (tokens, targets))
    for half in (slice(2), slice(2, None)):
        loss_of(two, (tokens[half], targets[half])).backward()
    for parameter, same in zip(two.parameters(), one.parameters(), strict=True):
        parameter.grad = same.grad.clone()
    parts.step()
    assert_equal(values(two), values(one), rtol=1e-10, atol=1e-12)


def test_checkpointing_and_evaluation_mode_change_nothing() -> None:
    models = [language(), language(), language()]
    models[1].recompute = True
    for model in models:
        optimizer = bound(model)
        for seed in range(3):
            train(optimizer, model, sentences(seed=seed))
            if model is models[2]:
                model.eval()
                with torch.no_grad():
                    model(sentences()[0])
                model.train()
    assert_equal(values(models[1]), values(models[0]), rtol=1e-12, atol=1e-14)
    assert_equal(values(models[2]), values(models[0]), rtol=0, atol=0)


def test_a_frozen_table_has_no_block_and_stays() -> None:
    model = language()
    model.emb.weight.requires_grad_(False)
    kept = model.emb.weight.clone()
    optimizer = bound(model)
    train(optimizer, model, sentences())
    assert set(optimizer.layers) == {"body"}
    assert torch.equal(model.emb.weight, kept)
    model.emb.weight.requires_grad_(True)
    train(optimizer, model, sentences())
    assert set(optimizer.layers) == {"emb", "body"}


def untie(model: Language, optimizer: Optimizer) -> None:
    model.head.weight = nn.Parameter(model.emb.weight.detach().clone())
    optimizer.add_param_group({"params": [model.head.weight]})


def tie(model: Language, optimizer: Optimizer) -> None:
    model.head.weight = model.emb.weight


def test_modules_untied_after_bind_are_layers_of_their_own() -> None:
    model = language()
    optimizer = bound(model)
    train(optimizer, model, sentences())
    untie(model, optimizer)
    train(optimizer, model, sentences())
    assert set(optimizer.layers) == {"emb", "body", "head"}
    counts = torch.bincount(sentences()[0].flatten(), minlength=V).double() / 6
    counts[0] = 0  # padding
    torch.testing.assert_close(optimizer.layers["emb"].factors["a"], counts)


@pytest.mark.filterwarnings("ignore:.*lost their block")
def test_modules_tied_after_bind_are_one_layer_with_a_new_block() -> None:
    model = language()
    model.head.weight = nn.Parameter(model.emb.weight.detach().clone())
    optimizer = bound(model)
    train(optimizer, model, sentences())
    assert set(optimizer.layers) == {"emb", "body", "head"}
    tie(model, optimizer)
    model.zero_grad(set_to_none=True)
    before = copy.deepcopy(model)
    train(optimizer, model, sentences())
    assert set(optimizer.layers) == {"emb", "body"}
    truth = by_example(before, sentences())
    factors = optimizer.layers["emb"].factors
    torch.testing.assert_close(factors["a"], truth["a"] / 30, rtol=1e-12, atol=0)


def test_a_tied_model_in_half_precision_keeps_its_curvature_in_single() -> None:
    model = language().float()
    optimizer = bound(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, sentences())
    loss.backward()
    optimizer.step()
    factors = optimizer.layers["emb"].factors
    assert all(factor.dtype == torch.float32 for factor in factors.values())
    truth = by_example(language(), sentences())
    torch.testing.assert_close(factors["a"].double(), truth["a"] / 30, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("model_of", [language, lambda: bag_model()], ids=["tied", "bags"])
def test_a_saved_run_goes_on_to_the_last_bit(model_of: Callable[[], nn.Module]) -> None:
    recipe = {"basis_every": 2, "scale_every": 2} | ({} if model_of is language else BAGS)
    recipe = {**RECIPE, **recipe, "basis_every": 2, "scale_every": 2}
    batches = [sentences(seed=s) if model_of is language else bag_batch(s) for s in range(5)]
    one = model_of()
    optimizer = kfactk.build(**recipe).bind(one)
    for batch in batches[:3]:
        train(optimizer, one, batch)
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    two = model_of()
    two.load_state_dict(saved["model"])
    again = kfactk.build(**recipe).bind(two)
    again.load_state_dict(saved["optimizer"])
    copied = copy.deepcopy(one)
    for batch in batches[3:]:
        train(optimizer, one, batch)
        train(again, two, batch)
    assert_equal(values(two), values(one), rtol=0, atol=0)
    copied(batches[0][0])  # its hooks do nothing


# --------------------------------------------------------------------------------------------- bags


class Bags(nn.Module):
    """A classifier of bags of tokens; a batch is tokens, offsets and weights."""

    def __init__(self, mode: str, padding: int | None) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(V, WIDTH, mode=mode, padding_idx=padding)
        self.head = nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, batch: Any) -> Tensor:
        tokens, offsets, weights = batch
        if weights is None:
            return self.head(torch.tanh(self.bag(tokens, offsets)))
        # in an order of its own
        bag = self.bag(per_sample_weights=weights, offsets=offsets, input=tokens)
        return self.head(torch.tanh(bag))


def bag_model(mode: str = "mean", padding: int | None = None) -> Bags:
    torch.manual_seed(0)
    return Bags(mode, padding)


def bag_batch(seed: int = 0, kind: str = "offsets") -> tuple[Any, Tensor]:
    """Four bags: with offsets one is empty and the others have equal entries."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(V, (4, 3), generator=generator), torch.tensor([0, 2, 1, 1])
    tokens[1, 1] = tokens[1, 0]
    weights = torch.rand(4, 3, generator=generator, dtype=F64) if "weights" in kind else None
    if "2-D" in kind:
        return (tokens, None, weights), targets
    offsets = torch.tensor([0, 5, 5, 6])
    return (tokens.flatten(), offsets, None if weights is None else weights.flatten()), targets


def single_bags(batch: Any) -> list[Any]:
    """Each bag as a batch of one."""
    tokens, offsets, weights = batch
    if offsets is None:
        pieces = list(tokens.unbind())
        scales = [None] * len(pieces) if weights is None else list(weights.unbind())
    else:
        ends = [*offsets.tolist()[1:], len(tokens)]
        spans = [slice(a, b) for a, b in zip(offsets.tolist(), ends, strict=True)]
        pieces = [tokens[span] for span in spans]
        scales = [None if weights is None else weights[span] for span in spans]
    start = torch.tensor([0])
    return [(piece, start, scale) for piece, scale in zip(pieces, scales, strict=True)]


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("sum", "offsets"),
        ("mean", "offsets"),
        ("sum", "2-D"),
        ("mean", "2-D"),
        ("sum", "offsets, weights"),
        ("sum", "2-D, weights"),
    ],
)
def test_a_bag_gets_the_diagonal_of_its_fisher(mode: str, kind: str, padding: int | None) -> None:
    model, (batch, targets) = bag_model(mode, padding), bag_batch(kind=kind)
    before = copy.deepcopy(model)
    optimizer = kfactk.build(**BAGS).bind(model)
    train(optimizer, model, (batch, targets))

    a, g, rows = torch.zeros(V, dtype=F64), torch.zeros(WIDTH, WIDTH, dtype=F64), []
    for single, target in zip(single_bags(batch), targets, strict=True):
        seen: list[Tensor] = []
        handle = before.bag.register_forward_hook(lambda _m, _i, y, seen=seen: seen.append(y))
        loss = F.cross_entropy(before(single), target.unsqueeze(0))
        handle.remove()
        d, at_bag = torch.autograd.grad(loss, [before.bag.weight, seen[0]])
        rows.append(d)
        g += torch.outer(at_bag[0], at_bag[0]) / 4
        # What a row is multiplied by is the derivative of the output.
        (weights,) = torch.autograd.grad(before.bag(*single)[0, 0], before.bag.weight)
        a += weights[:, 0].square() / 4
    factors = optimizer.layers["bag"].factors
    torch.testing.assert_close(factors["a"], a, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(factors["G"], g, rtol=1e-12, atol=1e-15)
    u, d = torch.linalg.eigh(g).eigenvectors, torch.stack(rows)
    scale = (d @ u).square().sum(0) / 4
    expected = (d.sum(0) / 4 @ u / (scale + TAU)) @ u.T
    step = (before.bag.weight - model.bag.weight).detach() / LR
    torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-12)


def test_a_bag_called_twice_adds_before_the_square() -> None:
    model, (batch, targets) = bag_model(), bag_batch(kind="2-D")
    model.forward = (
        lambda batch: model.head(  # type: ignore[method-assign]
            torch.tanh(model.bag(batch[0]) + model.bag(batch[0].flip(1)[:, :2]))
        )
    )
    before = copy.deepcopy(model)
    optimizer = kfactk.build(**BAGS).bind(model)
    train(optimizer, model, (batch, targets))
    d = []
    for n in range(4):
        one = batch[0][n : n + 1]
        hidden = before.bag(one) + before.bag(one.flip(1)[:, :2])
        loss = F.cross_entropy(before.head(torch.tanh(hidden)), targets[n : n + 1])
        d.append(torch.autograd.grad(loss, before.bag.weight)[0])
    u = torch.linalg.eigh(optimizer.layers["bag"].factors["G"]).eigenvectors
    scale = (torch.stack(d) @ u).square().sum(0) / 4
    expected = (sum(d) / 4 @ u / (scale + TAU)) @ u.T
    step = (before.bag.weight - model.bag.weight).detach() / LR
    torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------- masked positions


class Masked(nn.Module):
    """A masked language model; with `sparse`, its head sees the masked positions alone."""

    def __init__(self, *, tied: bool, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.emb, self.body, self.sparse = nn.Embedding(V, WIDTH), nn.Linear(WIDTH, WIDTH), sparse
        self.head = nn.Linear(WIDTH, V, bias=False)
        if tied:
            self.head.weight = self.emb.weight
        self.double()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.emb(tokens)))
        hidden = hidden + hidden.mean(1, keepdim=True)
        return self.head(hidden[labels != -100] if self.sparse else hidden)


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    kept = labels[labels != -100]
    return F.cross_entropy(logits if logits.ndim == 2 else logits[labels != -100], kept)


def masked_batch() -> Batch:
    tokens = torch.randint(V, (5, 6), generator=torch.Generator().manual_seed(3))
    return tokens, torch.where(torch.arange(30).reshape(5, 6) % 4 == 1, tokens, -100)


def test_a_tied_head_on_masked_positions_alone_is_refused() -> None:
    model, (tokens, labels) = Masked(tied=True, sparse=True), masked_batch()
    optimizer = bound(model, likelihood="categorical", fisher="exact")
    words = r"5 examples, .* 8 rows, .*sparse_prediction=False.*exclude=\['emb'\]"
    with pytest.raises(CaptureError, match=words):
        model(tokens, labels)
    optimizer.close()


def test_a_tied_head_on_all_positions_counts_the_masked_ones() -> None:
    """In an orthogonal basis the scale sums to the mean squared norm of the gradients."""
    model, (tokens, labels) = Masked(tied=True, sparse=False), masked_batch()
    likelihood = {"name": "categorical", "class_axis": -1, "targets": "labels"}
    optimizer = bound(model, likelihood=likelihood, lr=0.0)
    masked_loss(model(tokens, labels), labels).backward()
    optimizer.step()
    square = 0.0
    for row, label in zip(tokens, labels, strict=True):
        twin = Masked(tied=True, sparse=False)
        if (label != -100).any():
            logits = twin(row[None], label[None])
            loss = masked_loss(logits, label[None]) * (label != -100).sum()
            [found] = torch.autograd.grad(loss, [twin.emb.weight])
            square += float(found.square().sum()) / 8
    [scale] = optimizer.layers["emb"].scale.values()
    assert float(scale.sum()) == pytest.approx(square, rel=1e-10)


def test_a_head_of_its_own_on_masked_positions_is_exact() -> None:
    model, (tokens, labels) = Masked(tied=False, sparse=True), masked_batch()
    optimizer = bound(model, likelihood="categorical", fisher="exact", lr=0.0)
    hidden: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda module, args, _: hidden.append(args[0]))
    logits = model(tokens, labels)
    handle.remove()
    masked_loss(logits, labels).backward()
    optimizer.step()
    p = logits.detach().softmax(-1)
    traces = 1 - p.square().sum(-1)  # of diag(p) - p p^T
    truth = float((traces * hidden[0].detach().square().sum(-1)).mean())
    [scale] = optimizer.layers["head"].scale.values()
    assert float(scale.sum()) == pytest.approx(truth, rel=1e-10)


# -------------------------------------------------------------------------------------------- ranks


def on_ranks(rank: int, way: str, recipe: dict[str, Any]) -> list[Tensor]:
    model: Any = language(bias=True)
    if way == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = bound(model, **recipe)
        run = model
    else:
        run = nn.parallel.DistributedDataParallel(model)
        optimizer = bound(run, **recipe)
    for seed in range(3):
        tokens, targets = sentences(seed=seed)
        train(optimizer, run, (tokens[rank::2], targets[rank::2]))
    assert dist.get_world_size() == 2
    found = [p.full_tensor() if way == "fully_shard" else p for p in model.parameters()]
    return [each.detach().clone() for each in found]


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("way", "fisher", "placement"),
    [
        ("ddp", "empirical", "replicated"),
        ("ddp", "exact", "mem_opt"),
        ("fully_shard", "exact", "comm_opt"),
    ],
)
def test_two_ranks_equal_one_process(way: str, fisher: str, placement: str) -> None:
    recipe = {"fisher": fisher, "basis_every": 2, "placement": placement}
    model = language(bias=True)
    optimizer = bound(model, **recipe)
    for seed in range(3):
        train(optimizer, model, sentences(seed=seed))
    for found in shared_workers().run(2, on_ranks, way, recipe):
        assert_equal(found, values(model), rtol=1e-9, atol=1e-11)
