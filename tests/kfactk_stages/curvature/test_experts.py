"""Gradients of stacked experts are autograd's, each expert with the tokens routed to it."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, ModuleCall
from kfactk.costmodel.counting import training_load
from kfactk.testing import CurvatureLaws, PipelineLaws
from kfactk.testing._support.division import on_ranks
from kfactk.testing._support.strategies import Case, case_of
from kfactk.testing._support.truth import solve
from kfactk_stages.curvature.experts import Experts
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
from tests.kfactk_stages.curvature.mixture import Config, D, E, H, K, Mixture, stacked

N, T = 3, 5
INSIDE = Inside(Experts())


def routed(module: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what experts are called with: tokens, K experts of each, and their weights."""
    scores = tokens.double() @ rows(D, E, seed=8)
    weights, chosen = scores.topk(K)
    return tokens, chosen, weights.tanh().to(tokens.dtype)


class TestExperts(CurvatureLaws):
    """The laws see experts that are called with the tokens of a router; a token is an example."""

    stage = "experts"

    def drawn(self, most_calls: int) -> st.SearchStrategy[Case]:
        modules = st.builds(
            lambda **how: stacked(**how)(Config("batched_mm")),
            has_gate=st.booleans(),
            has_bias=st.booleans(),
            is_transposed=st.booleans(),
        )
        shape = st.integers(1, 3)
        cases = case_of(
            modules, lambda draw, _: (draw(shape), D), most_calls=most_calls, called_with=routed
        )
        return cases.flatmap(lambda case: st.sampled_from(self._layers_in(case)))

    def cases(self) -> st.SearchStrategy[Case]:
        return self.drawn(2)

    def single_row_cases(self) -> st.SearchStrategy[Case]:
        whole = self.drawn(1)
        return whole.filter(lambda case: not self.curvature.stand_ins(case.layer))


class TestExpertsOfBlocks(TestExperts):
    stage: ClassVar[Any] = {"name": "experts", "max_side": 4, "wide": "blocks"}


KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "without a gate": {"has_gate": False},
    "transposed": {"is_transposed": True},
    "with biases": {"has_bias": True},
    "transposed with biases": {"is_transposed": True, "has_bias": True},
    "batched": {"kind": "batched_mm"},
    "twice": {"twice": True},
}


@pytest.mark.parametrize("how", KINDS.values(), ids=list(KINDS))
def test_gradients_inside_are_those_of_autograd(how: dict[str, Any]) -> None:
    model, args, cotangent = Mixture(**how), [rows(N, T, D)], rows(N, D, seed=5)
    found = INSIDE.gradients(model, args, cotangent)
    assert set(found) == {
        f"experts[{'up_proj' if 'has_gate' in how else 'gate_up_proj'}]",
        "experts[down_proj]",
    }
    assert deviation(found, INSIDE.autograds(model, args, cotangent)) < 1e-12


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "Qwen3Moe", "Olmoe"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_of_transformers_are_followed(kind: str, implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=D,
        intermediate_size=H,
        moe_intermediate_size=H,
        num_local_experts=E,
        num_experts=E,
        num_experts_per_tok=K,
        num_attention_heads=1,
    )
    config._experts_implementation = implementation
    folder = "".join(f"_{c.lower()}" if c.isupper() else c for c in kind)[1:]
    models = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    model = Mixture()
    model.experts = getattr(models, f"{kind}Experts")(config).double()
    for parameter in model.experts.parameters():
        nn.init.normal_(parameter)
    args, cotangent = [rows(N, T, D)], rows(N, D, seed=5)
    found = INSIDE.gradients(model, args, cotangent)
    assert deviation(found, INSIDE.autograds(model, args, cotangent)) < 1e-6  # gates in float32


def test_an_expert_without_tokens_has_no_gradient() -> None:
    model = Mixture(has_bias=True)
    with torch.no_grad():
        model.router.bias[1] = -50.0
    args, cotangent = [rows(N, T, D)], rows(N, D, seed=5)
    found = INSIDE.gradients(model, args, cotangent)
    assert deviation(found, INSIDE.autograds(model, args, cotangent)) < 1e-12
    assert all(not each[1].any() and each[0].any() for each in found.values())


@pytest.mark.parametrize("frozen", ["gate_up_proj", "gate_up_proj_bias", "down_proj"])
def test_what_is_frozen_is_left_out(frozen: str) -> None:
    model = Mixture(has_bias=True)
    model.experts.get_parameter(frozen).requires_grad_(False)
    args, cotangent = [rows(N, T, D)], rows(N, D, seed=5)
    found = INSIDE.gradients(model, args, cotangent)
    assert len(found) == (2 if frozen.endswith("bias") else 1)
    assert deviation(found, INSIDE.autograds(model, args, cotangent)) < 1e-12


# ------------------------------------------------------------------------------- factors and steps


def products(model: Mixture, x: Tensor) -> dict[str, list[list[tuple[Tensor, Tensor]]]]:
    """Return inputs and outputs of each product for one example `[T, D]`, and its output."""
    experts: Any = model.experts
    found: dict[str, list[list[tuple[Tensor, Tensor]]]] = {
        part: [[] for _ in range(E)] for part in ("gate_up_proj", "down_proj")
    }
    total = torch.zeros(D, dtype=torch.float64)
    for token in x:
        weights, chosen = model.router(token).softmax(-1).topk(K)
        total = total + token
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            first = experts.gate_up_proj[expert] @ token
            gate, up = first.chunk(2)
            inside = torch.tanh(gate) * up
            second = experts.down_proj[expert] @ inside
            found["gate_up_proj"][expert].append((token, first))
            found["down_proj"][expert].append((inside.detach(), second))
            total = total + weight * second
    return found | {"": [[(total, total)]]}


def moments(model: Mixture, x: Tensor) -> dict[str, tuple[list[Tensor], ...]]:
    """Return A, G and D of each layer and expert, by a loop over examples and classes."""
    sizes = {"gate_up_proj": (2 * H, D), "down_proj": (D, H)}
    a = {part: torch.zeros(E, d, d, dtype=torch.float64) for part, (_, d) in sizes.items()}
    g = {part: torch.zeros(E, d, d, dtype=torch.float64) for part, (d, _) in sizes.items()}
    each: dict[str, list[Tensor]] = {part: [] for part in sizes}
    tokens = torch.zeros(E, 1, 1, dtype=torch.float64)
    for example in x:
        found = products(model, example)
        total = found.pop("")[0][0][0]
        for number, log in enumerate(total.log_softmax(-1)):
            score = -log * log.detach().exp().sqrt()
            for part, inside in found.items():
                d = torch.zeros(E, *sizes[part], dtype=torch.float64)
                for expert, pairs in enumerate(inside):
                    outputs = [output for _, output in pairs]
                    if not outputs:
                        continue
                    grads = torch.autograd.grad(score, outputs, retain_graph=True)
                    for (token, _), grad in zip(pairs, grads, strict=True):
                        if not number:
                            a[part][expert] += torch.outer(token, token)
                            tokens[expert] += part == "down_proj"
                        g[part][expert] += torch.outer(grad, grad) / len(x)
                        d[expert] += torch.outer(grad, token)
                each[part].append(d)
    return {
        part: (list(a[part] / tokens.clamp(min=1)), list(g[part]), list(torch.stack(each[part], 1)))
        for part in sizes
    }


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_a_step_is_that_of_dense_algebra(basis: str, wide: str | None) -> None:
    tau, lr, x, y = 0.03, 0.1, rows(7, 3, D), torch.arange(7) % D
    model = Mixture()
    truth = moments(model, x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = kfactk.build(
        curvature=limited("experts", wide),
        basis=basis,
        update=torch.optim.SGD,
        clip="none",
        damping=tau,
        lr=lr,
        fisher="exact",
    ).bind(model)
    F.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for part, (a, g, d) in truth.items():
        name, view = f"experts.{part}", optimizer.layers[f"experts[{part}]"]
        for side, own in (("A", a), ("G", g)):
            for each, kept in stand_ins(side, torch.stack(own), MOST, wide).items():
                torch.testing.assert_close(view.factors[each], kept, rtol=1e-10, atol=1e-12)
        for e in range(E):
            kept = (masked(each[e], MOST, wide) for each in (a, g))
            block = block_of(basis, *kept, d[e], len(x), tau)
            step = (before[name] - model.get_parameter(name).detach())[e] / lr
            torch.testing.assert_close(
                step, solve(block, gradients[name][e]), rtol=1e-8, atol=1e-10
            )


def test_factors_are_those_of_independent_tokens() -> None:
    """Where one token alone reaches an expert, A kron G is its block of F exactly."""
    x = rows(1, 1, D)
    model = Mixture()
    optimizer = kfactk.build(curvature="experts", fisher="exact", damping=1e-3).bind(model)
    F.cross_entropy(model(x), torch.zeros(1, dtype=torch.int64)).backward()
    optimizer.step()
    for part, (_, _, d) in moments(Mixture(), x).items():
        found = optimizer.layers[f"experts[{part}]"].factors
        for expert in range(E):
            flat = d[expert].flatten(1)
            both = torch.kron(found["G"][expert], found["A"][expert]), flat.T @ flat
            torch.testing.assert_close(*both, rtol=1e-10, atol=1e-14)


class TestMixture(PipelineLaws):
    """The laws of recipes, on a mixture of experts: ranks, resuming, accumulation."""

    recipe: ClassVar[Any] = {
        "curvature": ["experts", "kfac"],
        "update": torch.optim.SGD,
        "lr": 0.01,
        "unseen": "plain",
    }

    def model(self) -> nn.Module:
        return Mixture(has_bias=True)

    def batch(self, generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(examples, 3, D, generator=generator, dtype=torch.float64)
        return x, torch.randint(D, (examples,), generator=generator)


@pytest.mark.parametrize("wide", WIDE[1:])
def test_wide_sides_resume_to_the_bit(wide: str) -> None:
    check_resumes(TestMixture(), [limited("experts", wide), "kfac"])


@on_ranks
@pytest.mark.parametrize(("wide", "placement"), SPREAD)
def test_wide_sides_on_two_ranks_are_those_of_one_process(wide: str, placement: str) -> None:
    check_ranks(TestMixture(), [limited("experts", wide), "kfac"], placement)


def test_costs_are_counted_without_data() -> None:
    """Where tokens go is not known then: every expert is counted as if it got as many as others."""
    with torch.device("meta"):
        model = Mixture("batched_mm")
    recipe = kfactk.build(curvature=["experts", "kfac"], unseen="plain")
    batch = torch.empty(8, T, D, dtype=torch.float64, device="meta")
    load = training_load(model, recipe, batch)
    rows_each = 8 * T * K / E  # of every expert
    for part, d_in, d_out in (("gate_up_proj", D, 2 * H), ("down_proj", H, D)):
        factors = load.layers[f"experts[{part}]"].factors.products
        assert factors >= 2 * E * rows_each * (d_in**2 + d_out**2)
        assert factors <= 4 * E * rows_each * ((d_in + 1) ** 2 + d_out**2)


# ---------------------------------------------------------------------------------- what is covered


def test_tokens_that_do_not_divide_are_refused() -> None:
    class Packed(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)[:-1]
            weights, chosen = self.router(flat).softmax(-1).topk(K)
            return self.experts(flat, chosen, weights)[: len(x)]

    model = Packed()
    optimizer = kfactk.build(curvature="experts").bind(model)
    with pytest.raises(CaptureError, match="14 tokens, and the model's output has 3 examples"):
        model(rows(N, T, D))
    optimizer.close()


class Arranged(Mixture):
    """A mixture whose experts get their tokens in some order of the examples."""

    def __init__(self, order: str, *, norm: bool = False) -> None:
        super().__init__()
        self.order, self.norm = order, nn.BatchNorm1d(D).double() if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1) if self.order == "examples" else x.transpose(0, 1).flatten(0, 1)
        if self.order == "none":
            flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(1))]
        weights, chosen = self.router(flat).softmax(-1).topk(K)
        found = self.norm(self.experts(flat, chosen, weights))
        if self.order == "none":
            found = found[
                torch.randperm(len(flat), generator=torch.Generator().manual_seed(1)).argsort()
            ]
        if self.order == "examples":
            return found.view_as(x).sum(1)
        return found.view(x.shape[1], x.shape[0], D).sum(0)


def moved(model: nn.Module, fisher: str) -> dict[str, Tensor]:
    """Return how far a step moves the parameters."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = kfactk.build(
        curvature="experts", basis="ekfac", fisher=fisher, update="sgd", clip="none", damping=0.1
    ).bind(model)
    F.cross_entropy(model(rows(N, T, D)), torch.arange(N) % D).backward()
    optimizer.step()
    optimizer.close()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_tokens_whose_sequence_comes_first_are_those_of_their_examples(fisher: str) -> None:
    truth = moved(Arranged("examples"), fisher)
    found = moved(Arranged("positions"), fisher)
    for name, each in truth.items():
        assert float((found[name] - each).norm()) <= 1e-9 * float(each.norm())


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_tokens_in_no_order_of_the_examples_are_refused(fisher: str) -> None:
    with pytest.raises(CaptureError, match="neither example by example nor position by position"):
        moved(Arranged("none"), fisher)


def test_tokens_whose_examples_do_not_show_are_told() -> None:
    with pytest.warns(kfactk.KfactkWarning, match="which row belongs to which is not known"):
        moved(Arranged("positions", norm=True), "mc")


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_of_experts_are_those_of_autograd_in_either_order(interleaved: bool) -> None:
    model = Arranged("positions" if interleaved else "examples")
    x, cotangent = rows(N, T, D), rows(N, D, seed=5)
    [truth] = [
        torch.stack(
            [
                torch.autograd.grad((model(x) * cotangent)[n].sum(), model.experts.down_proj)[0]
                for n in range(N)
            ]
        )
    ]
    layers = INSIDE.layers_of(model)
    layer = next(each for each in layers if each.part == "down_proj")
    tokens = x.transpose(0, 1).flatten(0, 1) if interleaved else x.flatten(0, 1)
    weights, chosen = model.router(tokens).softmax(-1).topk(K)
    call = ModuleCall(
        model.experts,
        (tokens.detach(), chosen, weights.detach()),
        {},
        {name: p.detach() for name, p in model.experts.named_parameters()},
        True,
        N,
        interleaved,
    )
    found = layer.replay.run(call)
    owner = torch.arange(N * T) % N if interleaved else torch.arange(N * T) // T
    inner = [each for each in found.inner if each.part == "down_proj"]
    gradients = torch.autograd.grad(found.outputs[0], [e.output for e in inner], cotangent[owner])
    for each, gradient in zip(inner, gradients, strict=True):
        d = gradient.mT @ each.inputs[..., :-1]
        assert float((d - truth[:, int(each.tag)]).norm()) < 1e-12


def test_mixtral_is_covered() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    tokens = torch.randint(32, (2, 6))
    optimizer = kfactk.build(
        curvature="all", likelihood={"name": "categorical", "class_axis": -1}, lr=0.01
    ).bind(model)
    rows_ = [row for row in optimizer.coverage() if row.trained]
    left = {row.parameter.rpartition(".")[2] for row in rows_ if row.block is None}
    assert all("norm" in row.parameter or "gate" in row.parameter for row in rows_ if not row.block)
    assert left
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_is_expert_parallel": True}, "its experts are spread over ranks"),
        ({"has_post_expert_norm": True}, "it normalises what its experts return"),
        ({"forward": torch.tanh}, "its forward was replaced"),
        ({"has_bias": True}, "its gate_up_proj_bias is computed"),
    ],
)
def test_what_cannot_be_exact_has_a_reason(change: dict[str, Any], reason: str) -> None:
    module = Mixture().experts
    for name, value in change.items():
        setattr(module, name, value)
    assert str(Experts().unsupported(module)).startswith(reason)


def test_others_say_who_covers_stacked_experts() -> None:
    table = {row.parameter: row.reason for row in kfactk.build().coverage(Mixture())}
    assert table["experts.down_proj"].endswith("curvature='experts' covers stacked experts")


def test_experts_of_another_kind_are_left() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts, self.weight = 2, nn.Parameter(torch.zeros(2, 3, 3))

    assert "in a way of its own" in str(Experts().unsupported(Own()))
    assert Experts().unsupported(nn.Linear(2, 2)) == "no curvature for Linear"
