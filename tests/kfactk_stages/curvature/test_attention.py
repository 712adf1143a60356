"""Gradients inside attention are autograd's, example by example, and its forward stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import kfactk
from kfactk import Optimizer
from kfactk.testing import CurvatureLaws, PipelineLaws
from kfactk.testing._support.division import on_ranks
from kfactk.testing._support.truth import solve
from kfactk_stages.curvature.attention import Attention
from tests.kfactk.dense import block_of, masked, stand_ins
from tests.kfactk_stages.curvature.inside import (
    MOST,
    SPREAD,
    WIDE,
    Inside,
    check_ranks,
    check_resumes,
    deviation,
    limited,
    rows,
)

N, L, S, E = 3, 4, 5, 6


class Calls(nn.Module):
    """A model whose forward is a function of itself and attention."""

    def __init__(self, attn: nn.MultiheadAttention, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attn, self.function = attn, function

    def forward(self, *args: Any) -> Tensor:
        """Return an output with the examples first."""
        return self.function(self.attn, *args)


INSIDE = Inside(Attention())
layers_of, gradients_inside, autograds = INSIDE.layers_of, INSIDE.gradients, INSIDE.autograds


def itself(attn: Any, x: Tensor, **how: Any) -> Tensor:
    """Return self-attention of `[N, L, E]`, whatever the module's layout."""
    x = x if attn.batch_first else x.transpose(0, 1)
    found: Tensor = attn(x, x, x, **how)[0]
    return found if attn.batch_first else found.transpose(0, 1)


def across(attn: Any, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    q, k, v = (x if attn.batch_first else x.transpose(0, 1) for x in (q, k, v))
    found: Tensor = attn(q, k, v, **how)[0]
    return found if attn.batch_first else found.transpose(0, 1)


def memory(attn: Any, q: Tensor, k: Tensor, **how: Any) -> Tensor:
    found: Tensor = attn(q, k, k, **how)[0]
    return found


def weighed(attn: Any, x: Tensor, **how: Any) -> Tensor:
    """Return output and weights side by side; `[N, L, *]`."""
    x = x if attn.batch_first else x.transpose(0, 1)
    found, weights = attn(x, x, x, **how)
    found = found if attn.batch_first else found.transpose(0, 1)
    weights = weights if weights.ndim == 3 else weights.transpose(1, 2).flatten(2)
    return torch.cat([found, weights], -1)


def one_weighed(attn: Any, x: Tensor, **how: Any) -> Tensor:
    """Return output and weights of an example without a dimension of examples."""
    return torch.cat([each.flatten() for each in attn(x, x, x, **how)]).unsqueeze(0)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
PADDING = torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True]])
HIDDEN = torch.zeros(2 * N, L, L, dtype=torch.bool)
HIDDEN[2, :, 1] = HIDDEN[5, 0, 2:] = True
X, Q, K, V = rows(N, L, E), rows(N, L, E), rows(N, S, E, seed=1), rows(N, S, E, seed=2)
Case = tuple[dict[str, Any], Callable[..., Tensor], list[Tensor], dict[str, Any]]
CASES: dict[str, Case] = {
    "batch first": ({"batch_first": True}, itself, [X], {}),
    "batch second": ({}, itself, [X], {}),
    "without bias": ({"bias": False}, itself, [X], {}),
    "without weights": ({}, itself, [X], {"need_weights": False}),
    "weights of each head": ({}, itself, [X], {"average_attn_weights": False}),
    "a loss of weights": ({"batch_first": True}, weighed, [X], {"key_padding_mask": PADDING}),
    "a loss of each head's weights": ({}, weighed, [X], {"average_attn_weights": False}),
    "a loss of weights with dropout": (
        {"dropout": 0.5},
        weighed,
        [X],
        {"average_attn_weights": False, "attn_mask": CAUSAL},
    ),
    "a loss of one example's weights": ({}, one_weighed, [X[0]], {}),
    "a loss of one example's heads": ({}, one_weighed, [X[0]], {"average_attn_weights": False}),
    "keywords": ({"batch_first": True}, lambda a, x: a(value=x, key=x, query=x)[0], [X], {}),
    "memory": ({"batch_first": True}, memory, [Q, K], {}),
    "memory without weights": ({"batch_first": True}, memory, [Q, K], {"need_weights": False}),
    "three inputs": ({}, across, [Q, K, V], {}),
    "other widths": ({"kdim": 5, "vdim": 3}, across, [Q, rows(N, S, 5), rows(N, S, 3)], {}),
    "other widths without bias": (
        {"kdim": 5, "bias": False, "batch_first": True},
        across,
        [Q, rows(N, S, 5), V],
        {},
    ),
    "causal": ({}, itself, [X], {"attn_mask": CAUSAL, "is_causal": True}),
    "causal without weights": (
        {},
        itself,
        [X],
        {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    ),
    "causal and padded": (
        {"batch_first": True},
        itself,
        [X],
        {
            "attn_mask": CAUSAL.isinf(),
            "key_padding_mask": PADDING,
            "is_causal": True,
            "need_weights": False,
        },
    ),
    "padded": ({}, itself, [X], {"key_padding_mask": PADDING}),
    "padded without weights": (
        {},
        itself,
        [X],
        {"key_padding_mask": PADDING, "need_weights": False},
    ),
    "a mask for each head": ({}, itself, [X], {"attn_mask": HIDDEN}),
    "a mask for each head without weights": (
        {},
        itself,
        [X],
        {"attn_mask": HIDDEN, "need_weights": False},
    ),
    "more keys": (
        {"add_bias_kv": True, "add_zero_attn": True},
        itself,
        [X],
        {"attn_mask": CAUSAL, "key_padding_mask": PADDING.double()},
    ),
    "more keys without weights": (
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
        itself,
        [X],
        {"attn_mask": HIDDEN, "need_weights": False},
    ),
    "dropout": ({"dropout": 0.5}, itself, [X], {}),
    "dropout without weights": ({"dropout": 0.5}, itself, [X], {"need_weights": False}),
    "dropout across": ({"dropout": 0.4, "batch_first": True}, memory, [Q, K], {}),
    "twice": ({"dropout": 0.3}, lambda a, x: itself(a, itself(a, x).tanh()), [X], {}),
    "changed in place": ({}, lambda a, x: itself(a, x).add_(x).tanh(), [X], {}),
    "twice of other lengths": (
        {"batch_first": True},
        lambda a, q, k: memory(a, q, k) + itself(a, q),
        [Q, K],
        {},
    ),
    "one example": ({}, lambda a, x: a(x, x, x)[0].unsqueeze(0), [X[0]], {}),
    "one example padded": (
        {"batch_first": True, "dropout": 0.2},
        lambda a, q, k: a(q, k, k, key_padding_mask=torch.arange(S) > 3)[0].unsqueeze(0),
        [Q[0], K[0]],
        {},
    ),
}


class TestAttention(CurvatureLaws):
    stage = "attention"


class TestAttentionOfBlocks(CurvatureLaws):
    stage: ClassVar[Any] = {"name": "attention", "max_side": 2, "wide": "blocks"}


def model_of(case: Case) -> Calls:
    settings, function, _, how = case
    torch.manual_seed(3)
    attn = nn.MultiheadAttention(E, 2, **settings, dtype=torch.float64)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return Calls(attn, lambda module, *args: function(module, *args, **how))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_gradients_inside_are_those_of_autograd(case: Case) -> None:
    model, args = model_of(case), case[2]
    cotangent = rows(*model(*args).shape, seed=5)
    expected = autograds(model, args, cotangent)
    assert deviation(gradients_inside(model, args, cotangent), expected) < 1e-12


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_what_is_frozen_is_left_out(frozen: str) -> None:
    model = model_of(CASES["dropout"])
    model.attn.get_parameter(frozen).requires_grad_(False)
    layers = {layer.name: layer.parameters for layer in layers_of(model)}
    assert frozen not in [name for names in layers.values() for name in names]
    assert len(layers) == (2 if frozen.endswith("bias") else 1)
    cotangent = rows(N, L, E, seed=5)
    found = gradients_inside(model, [X], cotangent)
    assert deviation(found, autograds(model, [X], cotangent)) < 1e-12


def test_evaluation_has_no_dropout() -> None:
    model, cotangent = model_of(CASES["dropout"]).eval(), rows(N, L, E, seed=5)
    found = gradients_inside(model, [X], cotangent)
    assert deviation(found, autograds(model, [X], cotangent)) < 1e-12


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_of_the_call_is_that_of_its_replay(need_weights: bool) -> None:
    settings = {"dropout": 0.4, "batch_first": True}
    case: Case = (settings, itself, [X], {"need_weights": need_weights})
    model, args, cotangent = model_of(case).float(), [X.float()], rows(N, L, E, seed=5).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients_inside(model, args, cotangent)
        expected = autograds(model, args, cotangent)
    assert deviation(found, expected) < 0.01  # twice the precision of bfloat16
    assert deviation(gradients_inside(model, args, cotangent), expected) > 1e-5


class Encoding(nn.Module):
    """The whole transformer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(4, 2, 1, 1, 5, dropout=0.2, dtype=torch.float64)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = self.body.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        found = self.body(source.transpose(0, 1), target.transpose(0, 1), tgt_mask=mask)
        return found.transpose(0, 1)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_torchs_transformer_is_followed() -> None:
    model, args = Encoding(), [rows(3, 3, 4), rows(3, 5, 4, seed=1)]
    cotangent = rows(3, 5, 4, seed=5)
    found = gradients_inside(model, args, cotangent)
    assert len(found) == 6
    assert deviation(found, autograds(model, args, cotangent)) < 1e-12


def test_torchvisions_transformer_is_followed() -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.VisionTransformer(
        image_size=4,
        patch_size=2,
        num_layers=2,
        num_heads=2,
        hidden_dim=4,
        mlp_dim=5,
        dropout=0.1,
        attention_dropout=0.3,
        num_classes=3,
    ).double()
    nn.init.normal_(model.heads.head.weight)
    images, cotangent = rows(3, 3, 4, 4), rows(3, 3, seed=5)
    found = gradients_inside(model, [images], cotangent)
    assert len(found) == 4
    assert deviation(found, autograds(model, [images], cotangent)) < 1e-12


class Pair(nn.Module):
    """Two modules of attention, of other settings, that share a part."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.MultiheadAttention(E, 2, batch_first=True)
        self.b = nn.MultiheadAttention(E, 3, dropout=0.4)
        if shared == "out_proj":
            self.b.out_proj = self.a.out_proj
        for name in () if shared == "out_proj" else shared.split():
            path, _, key = name.rpartition(".")
            setattr(self.b.get_submodule(path), key, self.a.get_parameter(name))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return itself(self.b, torch.tanh(itself(self.a, x)), need_weights=False).flatten(1)


@pytest.mark.parametrize(
    ("shared", "layers"),
    [
        ("out_proj", ["a[in_proj]", "a[out_proj]", "b[in_proj]"]),
        ("out_proj.weight out_proj.bias", ["a[in_proj]", "a[out_proj]", "b[in_proj]"]),
        ("in_proj_weight in_proj_bias", ["a[in_proj]", "a[out_proj]", "b[out_proj]"]),
    ],
)
def test_a_part_that_two_modules_share_is_one_block(shared: str, layers: list[str]) -> None:
    model, cotangent = Pair(shared), rows(N, L * E, seed=5)
    found = gradients_inside(model, [X], cotangent)
    assert list(found) == layers
    assert deviation(found, autograds(model, [X], cotangent)) < 1e-12
    optimizer = kfactk.build(curvature="all", likelihood="gaussian").bind(model)
    assert sum(row.block is not None for row in optimizer.recipe.coverage(model)) == 6
    model(X).square().sum(1).mean().backward()
    optimizer.step()
    assert list(optimizer.layers) == layers


def test_half_of_a_part_that_two_modules_share_is_left_out() -> None:
    coverage = kfactk.build(curvature="all").coverage(Pair("out_proj.weight"))
    assert not coverage.covered
    assert "tied: it shares a parameter with b.out_proj.weight" in str(coverage)


# ------------------------------------------------------------------------------- factors and steps


class Pooled(nn.Module):
    """A classifier whose first two positions look at all three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.attn, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)
        nn.init.normal_(self.attn.in_proj_bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(self.attn(x[:2], x, x)[0].mean(0))


def by_hand(attn: nn.MultiheadAttention, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return inputs and outputs of each product for one example `[T, E]`, groups in order."""
    sources, width = (x[:2], x, x), 2
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = (s @ w.T + b for s, w, b in zip(sources, weights, biases, strict=True))
    mixed = []
    for head in range(2):
        own = slice(head * width, (head + 1) * width)
        mixed.append((q[:, own] @ k[:, own].T / width**0.5).softmax(-1) @ v[:, own])
    found = torch.cat(mixed, -1)
    output = found @ attn.out_proj.weight.T + attn.out_proj.bias
    inside = list(zip(sources, (q, k, v), strict=True))
    return {"in_proj": inside, "out_proj": [(found.detach(), output)]}


def moments_by_hand(model: Pooled, x: Tensor) -> dict[str, tuple[list[Tensor], ...]]:
    """Return A, G and D of each layer and group, by a loop over examples and classes."""
    found: dict[str, tuple[list[Tensor], ...]] = {}
    for part, groups in (("in_proj", 3), ("out_proj", 1)):
        eye = [torch.zeros(5, 5, dtype=torch.float64) for _ in range(groups)]
        found[part] = eye, [e[:4, :4].clone() for e in eye], [torch.empty(0, 4, 5)] * groups
    for example in x:
        products = by_hand(model.attn, example)
        logs = model.head(products["out_proj"][0][1].mean(0)).log_softmax(-1)
        for number, log in enumerate(logs):
            score = -log * log.detach().exp().sqrt()
            for part, inside in products.items():
                a_sum, g_sum, d = found[part]
                outputs = [output for _, output in inside]
                grads = torch.autograd.grad(score, outputs, retain_graph=True)
                for group, ((rows_in, _), g) in enumerate(zip(inside, grads, strict=True)):
                    a = torch.cat([rows_in, rows_in.new_ones(len(rows_in), 1)], -1)
                    a_sum[group] += a.T @ a / len(x) if number == 0 else 0
                    g_sum[group] += g.T @ g / len(x) / len(g)
                    d[group] = torch.cat([d[group], (g.T @ a).unsqueeze(0)])
    return found


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_a_step_is_that_of_dense_algebra(basis: str, wide: str | None) -> None:
    tau, lr, x = 0.03, 0.1, rows(9, 3, 4)
    model = Pooled()
    truth = moments_by_hand(model, x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = kfactk.build(
        curvature=[limited("attention", wide), "kfac"],
        basis=basis,
        update=torch.optim.SGD,
        clip="none",
        damping=tau,
        lr=lr,
        fisher="exact",
    ).bind(model)
    F.cross_entropy(model(x), torch.arange(9) % 3).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for part, (a, g, d) in truth.items():
        view = optimizer.layers[f"attn[{part}]"]
        for name, own in (("A", a), ("G", g)):
            whole = torch.stack(own) if len(own) > 1 else own[0]
            for each, part in stand_ins(name, whole, MOST, wide).items():
                torch.testing.assert_close(view.factors[each], part, rtol=1e-10, atol=1e-12)
        names = [f"attn.{key}" for key in view.layer.parameters]
        weight, bias = (gradients[name].view(len(a), 4, -1) for name in names)
        changes = [(before[n] - model.get_parameter(n).detach()) / lr for n in names]
        step = torch.cat([change.view(len(a), 4, -1) for change in changes], -1)
        for k, v in enumerate(torch.cat([weight, bias], -1)):
            kept = (masked(each[k], MOST, wide) for each in (a, g))
            block = block_of(basis, *kept, d[k], len(x), tau)
            torch.testing.assert_close(step[k], solve(block, v), rtol=1e-8, atol=1e-10)


def test_a_bias_of_its_own_sees_ones() -> None:
    case = CASES["other widths"]
    model = Calls(model_of(case).attn, lambda attn, *args: across(attn, *args).flatten(1))
    optimizer = kfactk.build(curvature="attention", likelihood="gaussian").bind(model)
    model(*case[2]).square().sum().backward()
    optimizer.step()
    assert list(optimizer.layers) == [
        f"attn[{part}]" for part in ("q_proj", "k_proj", "v_proj", "in_proj_bias", "out_proj")
    ]
    ones = torch.tensor([L, S, S], dtype=torch.float64).view(3, 1, 1)
    assert torch.equal(optimizer.layers["attn[in_proj_bias]"].factors["A"], ones)


def stepped(model: nn.Module, *skipped: bool) -> Optimizer:
    """Return the optimizer after one step of several forwards."""
    optimizer = kfactk.build(curvature="all", fisher="exact").bind(model)
    for skips in skipped:
        model.skips = skips
        F.cross_entropy(model(rows(9, 3, 4)), torch.arange(9) % 3).backward()
    optimizer.step()
    return optimizer


def test_a_forward_without_attention_counts_its_terms() -> None:
    class Skipping(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean(1)) if self.skips else super().forward(x)

    once, both = stepped(Skipping(), False), stepped(Skipping(), False, True)
    for part in ("in_proj", "out_proj"):
        views = [optimizer.layers[f"attn[{part}]"].factors for optimizer in (once, both)]
        torch.testing.assert_close(views[1]["A"], views[0]["A"])  # a mean over its examples
        torch.testing.assert_close(2 * views[1]["G"], views[0]["G"])


def test_parameters_inside_have_their_names_in_views_and_states() -> None:
    model = Pooled()
    optimizer = stepped(model, False)
    tensors = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = optimizer.precondition(tensors)
    assert found.keys() == tensors.keys()
    view = optimizer.layers["attn[out_proj]"]
    inside = {"out_proj.weight": tensors["attn.out_proj.weight"]}
    assert list(view.precondition(inside)) == ["out_proj.weight", "out_proj.bias"]
    other = kfactk.build(curvature="all", fisher="exact").bind(Pooled())
    other.load_state_dict(optimizer.state_dict())
    again = other.precondition(tensors)
    assert all(torch.equal(again[name], found[name]) for name in found)


class TestAttending(PipelineLaws):
    """The laws of recipes, on a model of attention: ranks, resuming, accumulation."""

    recipe: ClassVar[Any] = {"curvature": "all", "update": torch.optim.SGD, "lr": 0.01}

    def model(self) -> nn.Module:
        return Pooled()

    def batch(self, generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(examples, 3, 4, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (examples,), generator=generator)


@pytest.mark.parametrize("wide", WIDE[1:])
def test_wide_sides_resume_to_the_bit(wide: str) -> None:
    check_resumes(TestAttending(), [limited("attention", wide), "kfac"])


@on_ranks
@pytest.mark.parametrize(("wide", "placement"), SPREAD)
def test_wide_sides_on_two_ranks_are_those_of_one_process(wide: str, placement: str) -> None:
    check_ranks(TestAttending(), [limited("attention", wide), "kfac"], placement)


# ---------------------------------------------------------------------------------- what is covered


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_nearly_all_elements_of_transformers_are_covered() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        every = {
            "nn.Transformer": nn.Transformer(16, 2, 2, 2, 32),
            "vit_b_16": models.vit_b_16(),
        }
    for name, model in every.items():
        table = list(kfactk.build(curvature="all").coverage(model))
        covered = sum(row.numel for row in table if row.block is not None)
        assert covered >= 0.99 * sum(row.numel for row in table), name


def test_excluded_output_projections_are_left_alone() -> None:
    recipe = kfactk.build(curvature="all", exclude=["*.out_proj"])
    table = {row.parameter: row for row in recipe.coverage(Pooled())}
    assert table["attn.in_proj_weight"].block == "attn[in_proj]"
    assert table["attn.out_proj.bias"].reason == "excluded (exclude='*.out_proj')"


def test_other_curvatures_say_who_covers_attention() -> None:
    table = {row.parameter: row.reason for row in kfactk.build().coverage(Pooled())}
    assert table["attn.in_proj_weight"].endswith("curvature='attention' covers it")
    assert "covers it with that module" in table["attn.out_proj.weight"]


def test_additional_keys_are_plain() -> None:
    model = model_of(CASES["more keys"])
    assert kfactk.build(curvature="attention").coverage(model).plain == (
        "attn.bias_k",
        "attn.bias_v",
    )


def tied(whole: bool) -> nn.Module:
    model = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)])
    model[1].in_proj_weight, model[1].in_proj_bias = model[0].in_proj_weight, model[0].in_proj_bias
    if whole:
        model[1].out_proj.weight = model[0].out_proj.weight
        model[1].out_proj.bias = model[0].out_proj.bias
    return model


def test_modules_that_share_everything_are_one_layer() -> None:
    assert [len(layer.sites) for layer in layers_of(tied(whole=True))] == [2, 2]
    assert [len(layer.sites) for layer in layers_of(tied(whole=False))] == [2, 1, 1]
    other = tied(whole=True)
    other[1].num_heads = 1
    assert [len(layer.sites) for layer in layers_of(other)] == [2, 2]


class Halved(nn.MultiheadAttention):
    def forward(self, *args: Any, **how: Any) -> Any:
        return super().forward(*args, **how)[0] / 2, None


def changed(change: Callable[[nn.MultiheadAttention], object]) -> nn.Module:
    attn = nn.MultiheadAttention(4, 2)
    change(attn)
    return attn


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Halved(4, 2), "Halved is a subclass of MultiheadAttention"),
        (changed(lambda a: setattr(a, "forward", torch.tanh)), "its forward was replaced"),
        (
            changed(lambda a: nn.utils.parametrizations.weight_norm(a.out_proj)),
            "in its out_proj, its weight is computed from other parameters",
        ),
        (
            changed(lambda a: prune.l1_unstructured(a, "in_proj_weight", 0.5)),
            "its in_proj_weight is computed from other parameters",
        ),
        (nn.Linear(2, 2), "no curvature for Linear"),
    ],
    ids=["subclass", "forward", "weight norm", "pruned", "linear"],
)
def test_what_cannot_be_exact_has_a_reason(module: nn.Module, reason: str) -> None:
    assert str(Attention().unsupported(module)).startswith(reason)
