"""Recipes with several curvatures: who takes which layer, and dense truth for norms and embeddings.

The truth is a loop over examples in float64 that uses nothing of kfactk.
"""

from __future__ import annotations

import copy
import io
import json
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CombinationError, OptionError, Recipe
from kfactk.testing import PipelineLaws

F64 = torch.float64
TAU, LR = 0.03, 0.1
LIST: Any = ["conv_kfac", "embedding", "norm"]
PLAIN: Any = {"update": torch.optim.SGD, "clip": "none", "damping": TAU, "lr": LR}
"""A step is the preconditioned gradient times the learning rate."""


class Words(nn.Module):
    """A classifier of sequences of tokens; 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4, padding_idx=0)
        self.ln = nn.LayerNorm(4)
        self.body = nn.Linear(4, 4)
        self.gn = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(4, eps=1e-4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.ln(self.emb(tokens))))
        h = self.gn(h.transpose(1, 2)).transpose(1, 2)
        return self.head(self.rms(h).mean(1))


class Images(nn.Module):
    """A classifier of images with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).tanh().mean((2, 3)))


def spread_out(model: nn.Module) -> nn.Module:
    """The model with normal numbers for the parameters of its norms."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, dtype=F64) + (name[-1] == "t"))
    return model


def sentences(examples: int = 6, length: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, (examples, length), generator=generator)
    return tokens, torch.randint(3, (examples,), generator=generator)


def stages(model: nn.Module, **recipe: Any) -> dict[str, str]:
    """For each parameter, the stages of its block."""
    rows = kfactk.build(**recipe).coverage(model)
    return {row.parameter: row.stages if row.block is not None else "" for row in rows}


# ---------------------------------------------------------------------------- who takes which layer


def test_the_first_curvature_that_supports_a_module_takes_it() -> None:
    found = stages(Words(), curvature=LIST, basis="ekfac")
    assert found == {
        "emb.weight": "embedding, ekfac",
        "ln.weight": "norm, unitwise",
        "ln.bias": "norm, unitwise",
        "body.weight": "conv_kfac, ekfac",
        "body.bias": "conv_kfac, ekfac",
        "gn.weight": "norm, unitwise",
        "gn.bias": "norm, unitwise",
        "rms.weight": "norm, unitwise",
        "head.weight": "conv_kfac, ekfac",
        "head.bias": "conv_kfac, ekfac",
    }
    found = stages(Words(), curvature=["kfac", "conv_kfac"], basis="kfac")
    assert found["body.weight"] == "kfac, kfac"
    assert found["ln.weight"] == ""


def test_the_basis_of_a_block_is_the_recipes_where_it_fits() -> None:
    found = stages(Words(), curvature=LIST, basis="kfac")
    assert found["body.weight"] == "conv_kfac, kfac"
    assert found["emb.weight"] == "embedding, ekfac"
    assert found["ln.weight"] == "norm, unitwise"


def test_a_block_may_be_kept_to_some_layers_and_name_its_basis() -> None:
    norm = kfactk.block("norm", basis="unitwise", layers=["*ln"])
    head = kfactk.block("conv_kfac", basis="kfac", layers=["head"])
    found = stages(Words(), curvature=[head, "conv_kfac", norm], basis="ekfac")
    assert found["head.weight"] == "conv_kfac, kfac"
    assert found["body.weight"] == "conv_kfac, ekfac"
    assert found["ln.weight"] == "norm, unitwise"
    assert found["gn.weight"] == found["rms.weight"] == found["emb.weight"] == ""


@pytest.mark.parametrize("model", [Words(), Images()], ids=["words", "images"])
def test_all_curvatures_cover_the_whole_model(model: nn.Module) -> None:
    table = kfactk.build(curvature="all").coverage(model)
    assert not table.plain
    assert "norm, unitwise" in str(table)


def test_the_table_tells_the_blocks_and_the_reasons() -> None:
    model = Words()
    model.emb.sparse = True
    model.gn.weight.requires_grad_(False)
    model.ln.bias.requires_grad_(False)
    table = str(kfactk.build(curvature=LIST, basis="ekfac").coverage(model))
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert "use sparse=False" in lines["emb.weight"]
    assert "block ln (norm, unitwise)" in lines["ln.weight"]
    assert "frozen" in lines["ln.bias"]
    assert "frozen" in lines["gn.weight"]
    assert "weight is not trained" in lines["gn.bias"]


def test_a_recipe_of_blocks_is_written_and_read() -> None:
    norm = kfactk.block("norm", basis="unitwise", layers=["ln"])
    for curvature in (LIST, [norm, "conv_kfac"], "all", kfactk.block("norm", layers=["ln"])):
        recipe = kfactk.build(curvature=curvature)
        again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        assert again == recipe
        assert repr(again) == repr(recipe)
        assert recipe.evolve(curvature="kfac") == kfactk.build(curvature="kfac")
    assert kfactk.build(curvature=["norm", "kfac"]) != kfactk.build(curvature=["kfac", "norm"])
    assert kfactk.build(curvature=["kfac"]) == kfactk.build(curvature="kfac")


def test_what_cannot_work_together_is_refused() -> None:
    with pytest.raises(CombinationError, match=r"'ekfac' needs A, G.*'norm'"):
        kfactk.build(curvature=kfactk.block("norm", basis="ekfac"))
    with pytest.raises(CombinationError, match=r"'unitwise' needs U.*'kfac'"):
        kfactk.build(curvature="kfac", basis="unitwise")
    with pytest.raises(OptionError, match="nowhere"):
        kfactk.build(curvature=kfactk.block("norm", layers=["nowhere"])).bind(Words())
    with pytest.raises(OptionError, match="empty"):
        kfactk.build(curvature=[])


# -------------------------------------------------------------------------------------- dense truth


def root_scores(output: Tensor) -> list[Tensor]:
    """Losses of one example whose gradients' outer products sum to its Fisher information."""
    logs = output.squeeze(0).log_softmax(-1)
    return [-log * log.detach().exp().sqrt() for log in logs]


def through(model: nn.Module, name: str, tokens: Tensor) -> list[tuple[list[Tensor], Tensor]]:
    """For each example and class: gradients of a layer's parameters, and of its output."""
    found = []
    module = model.get_submodule(name)
    parameters = list(module.parameters())
    for n in range(len(tokens)):
        outputs: list[Tensor] = []
        handle = module.register_forward_hook(lambda _m, _i, y, seen=outputs: seen.append(y))
        scores = root_scores(model(tokens[n : n + 1]))
        handle.remove()
        for score in scores:
            *own, output = torch.autograd.grad(score, [*parameters, *outputs], retain_graph=True)
            found.append((own, output))
    return found


def stepped(model: nn.Module, tokens: Tensor, labels: Tensor, **recipe: Any) -> Any:
    """The optimizer after one step, and the gradients it was given."""
    optimizer = kfactk.build(**PLAIN, **recipe).bind(model)
    F.cross_entropy(model(tokens), labels).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return optimizer, gradients


@pytest.mark.parametrize("name", ["ln", "gn", "rms"])
def test_a_norm_gets_its_exact_natural_gradient(name: str) -> None:
    torch.manual_seed(0)
    tokens, labels = sentences()
    model = spread_out(Words())
    before = copy.deepcopy(model)
    optimizer, gradients = stepped(model, tokens, labels, curvature=LIST, fisher="exact")

    module, changed = before.get_submodule(name), model.get_submodule(name)
    parameters = [key for key, _ in module.named_parameters()]
    d = torch.stack([torch.stack(own, -1) for own, _ in through(before, name, tokens)])
    for c in range(4):
        block = sum(torch.outer(each[c], each[c]) for each in d) / len(tokens)
        torch.testing.assert_close(optimizer.layers[name].factors["U"][c], block)
        v = torch.stack([gradients[f"{name}.{key}"][c] for key in parameters])
        expected = torch.linalg.solve(block + TAU * torch.eye(len(v), dtype=F64), v)
        steps = [getattr(module, key)[c] - getattr(changed, key)[c] for key in parameters]
        torch.testing.assert_close(torch.stack(steps).detach() / LR, expected)


@pytest.mark.parametrize("repeated", [False, True])
def test_an_embedding_gets_the_diagonal_of_its_fisher_in_the_basis_of_g(repeated: bool) -> None:
    torch.manual_seed(0)
    tokens, labels = sentences()
    if repeated:
        tokens[:, 1:3] = tokens[:, :1]
    model = Words()
    before = copy.deepcopy(model)
    optimizer, gradients = stepped(model, tokens, labels, curvature=LIST, fisher="exact")

    passes = through(before, "emb", tokens)
    counts, g = torch.zeros(7, dtype=F64), torch.zeros(4, 4, dtype=F64)
    length = sum(int(word) != 0 for words in tokens for word in words) / len(tokens)
    for n, (_, output) in enumerate(passes):
        words = tokens[n // 3]
        for word, row in zip(words, output[0], strict=True):
            if word != 0:
                counts[word] += 1 / 3 / len(tokens)
                g += torch.outer(row, row) / length / len(tokens)
    factors = optimizer.layers["emb"].factors
    torch.testing.assert_close(factors["a"], counts)
    torch.testing.assert_close(factors["G"], g)
    u = torch.linalg.eigh(g).eigenvectors
    scale = sum((own[0] @ u).square() for own, _ in passes) / len(tokens)
    expected = (gradients["emb.weight"] @ u / (scale + TAU)) @ u.T
    step = (before.emb.weight - model.emb.weight).detach() / LR
    torch.testing.assert_close(step, expected)
    assert not step[0].any()  # the row of the padding index


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisation_is_treated_as_it_ran(training: bool) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(5, 2, 3, 3, dtype=F64), torch.tensor([0, 1, 2, 1, 0])
    model = spread_out(Images())
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    model.bn.train(training)
    before = copy.deepcopy(model)
    optimizer = kfactk.build(
        **PLAIN, curvature=["conv_kfac", "norm"], fisher="empirical", basis="ekfac"
    ).bind(model)
    loss = F.cross_entropy(model(x), labels)
    model.bn.train(not training)  # what is measured later must not look at the module's mode
    statistics = model.bn.running_mean.clone(), model.bn.running_var.clone()
    loss.backward()
    gradients = [p.grad.clone() for p in model.bn.parameters()]
    optimizer.step()
    assert torch.equal(model.bn.running_mean, statistics[0])
    assert torch.equal(model.bn.running_var, statistics[1])

    seen: list[Tensor] = []
    before.bn.register_forward_hook(lambda _m, inputs, y: seen.extend([inputs[0], y]))
    summed = F.cross_entropy(before(x), labels, reduction="sum")
    (g,) = torch.autograd.grad(summed, [seen[1]])
    affine = [p.detach().view(-1, 1, 1) for p in (before.bn.weight, before.bn.bias)]
    normalised = (seen[1].detach() - affine[1]) / affine[0]
    for c in range(3):
        d = [torch.stack([(g[n, c] * normalised[n, c]).sum(), g[n, c].sum()]) for n in range(5)]
        block = sum(torch.outer(each, each) for each in d) / 5
        torch.testing.assert_close(optimizer.layers["bn"].factors["U"][c], block)
        v = torch.stack([each[c] for each in gradients])
        expected = torch.linalg.solve(block + TAU * torch.eye(2, dtype=F64), v)
        pairs = zip(before.bn.parameters(), model.bn.parameters(), strict=True)
        step = torch.stack([(old[c] - new[c]).detach() / LR for old, new in pairs])
        torch.testing.assert_close(step, expected)


def test_a_frozen_shift_leaves_a_block_of_one() -> None:
    tokens, labels = sentences()
    model = spread_out(Words())
    model.ln.bias.requires_grad_(False)
    optimizer = kfactk.build(**PLAIN, curvature=LIST).bind(
        model, params=[p for p in model.parameters() if p.requires_grad]
    )
    kept = model.ln.bias.clone()
    F.cross_entropy(model(tokens), labels).backward()
    optimizer.step()
    assert optimizer.layers["ln"].factors["U"].shape == (4, 1, 1)
    assert optimizer.layers["gn"].factors["U"].shape == (4, 2, 2)
    assert torch.equal(model.ln.bias, kept)


def test_frozen_weights_leave_no_block() -> None:
    tokens, labels = sentences()
    model = Words()
    model.emb.requires_grad_(False)
    model.rms.requires_grad_(False)
    optimizer = kfactk.build(**PLAIN, curvature=LIST).bind(
        model, params=[p for p in model.parameters() if p.requires_grad]
    )
    F.cross_entropy(model(tokens), labels).backward()
    optimizer.step()
    assert set(optimizer.layers) == {"ln", "body", "gn", "head"}


# ---------------------------------------------------------------------------------- views and state


def trained(model: nn.Module, optimizer: Any, steps: int) -> None:
    tokens, labels = sentences()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()


def test_every_block_can_be_read() -> None:
    model = Words()
    optimizer = kfactk.build(**PLAIN, curvature=LIST).bind(model)
    trained(model, optimizer, 1)
    shapes = {
        name: {key: tuple(factor.shape) for key, factor in view.factors.items()}
        for name, view in optimizer.layers.items()
    }
    assert shapes["emb"] == {"a": (7,), "G": (4, 4)}
    assert shapes["ln"] == shapes["gn"] == {"U": (4, 2, 2)}
    assert shapes["rms"] == {"U": (4, 1, 1)}
    assert set(shapes["body"]) >= {"A", "G"}
    for name, view in optimizer.layers.items():
        v = {key: torch.randn(p.shape, dtype=F64) for key, p in view.layer.tensors().items()}
        product, solved = view.fisher_product(v), view.precondition(v)
        damped = {key: product[key] + TAU * v[key] for key in v}
        again = view.precondition(damped)
        for key, tensor in v.items():
            torch.testing.assert_close(again[key], tensor, msg=f"{name} {key}")
            assert solved[key].shape == tensor.shape
        assert view.condition() >= 1


def test_state_lies_with_the_first_parameter_of_a_layer() -> None:
    model = Words()
    optimizer = kfactk.build(**PLAIN, curvature=LIST).bind(model)
    trained(model, optimizer, 1)
    for parameter, factor in (
        (model.emb.weight, "a"),
        (model.emb.weight, "G"),
        (model.ln.weight, "U"),
        (model.rms.weight, "U"),
        (model.body.weight, "A"),
    ):
        assert any(key.startswith(f"kfactk.factor.{factor}") for key in optimizer.state[parameter])
    assert set(optimizer.state[model.ln.bias]) <= {"kfactk.step"}


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    made = kfactk.build(
        curvature=LIST, update="adamw", factor_every=2, scale_every=1, basis_every=3
    )
    torch.manual_seed(0)
    model = Words()
    optimizer = made.bind(model)
    trained(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = Words()
    resumed = made.bind(other)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    trained(model, optimizer, 4)
    trained(other, resumed, 4)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_blocks_follow_what_is_frozen_between_steps() -> None:
    model = Words()
    periods = {"factor_every": 1, "scale_every": 1, "basis_every": 1}
    optimizer = kfactk.build(**PLAIN, **periods, curvature=LIST).bind(model)
    for trains, columns in ((True, 2), (False, 1), (True, 2)):
        model.ln.bias.requires_grad_(trains)
        model.emb.requires_grad_(trains)
        trained(model, optimizer, 2)
        assert optimizer.layers["ln"].factors["U"].shape == (4, columns, columns)
        assert ("emb" in optimizer.layers) == trains


class TestWords(PipelineLaws):
    """The laws of recipes, on a model whose layers three curvatures share."""

    recipe: ClassVar[Any] = {"curvature": LIST, "update": torch.optim.SGD, "lr": 0.01}

    def model(self) -> nn.Module:
        return Words()

    def batch(self, generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(7, (examples, 5), generator=generator)
        return tokens, torch.randint(3, (examples,), generator=generator)
