"""What a chain over time has besides: by a loop over examples and steps, and in whole recipes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CombinationError
from kfactk.testing import CurvatureLaws, PipelineLaws
from kfactk.testing._support.truth import solve
from kfactk_stages.curvature.rnn import Rnn
from tests.kfactk_stages.basis.test_lgm import truth
from tests.kfactk_stages.curvature.inside import rows
from tests.kfactk_stages.curvature.recurrent import by_hand
from tests.kfactk_stages.curvature.test_rnn import Classifier, drawn, lengths_of

CHAIN = {"name": "rnn", "time": "chain"}
HOW: Mapping[str, Any] = {"update": torch.optim.SGD, "clip": "none", "fisher": "exact"}
Moments = dict[str, Tensor]


class TestChain(CurvatureLaws):
    stage: ClassVar[Any] = CHAIN


def next_sum(chain: Sequence[Tensor]) -> Tensor:
    """Return `sum_t r_{t+1} r_t^T`, pair by pair."""
    total = torch.zeros(len(chain[0]), len(chain[0]), dtype=chain[0].dtype)
    for before, after in itertools.pairwise(chain):
        total = total + torch.outer(after, before)
    return total


def add(
    found: dict[str, Moments],
    part: str,
    steps: Sequence[tuple[Tensor, Tensor]],
    logs: Tensor,
    examples: int,
) -> None:
    """Add one sequence of one example to the moments of a part.

    Args:
        found: The moments by part.
        part: Which.
        steps: Inputs and output of its product, step by step, in the order of the chain.
        logs: Of the class probabilities.
        examples: Number of examples.
    """
    ones = [torch.cat([a, a.new_ones(1)]) for a, _ in steps]
    sums: Moments = {
        "A": sum((torch.outer(a, a) for a in ones), torch.zeros(())) / examples,
        "A_next": next_sum(ones) / examples,
        "steps": torch.tensor([len(steps), len(steps) ** 2], dtype=logs.dtype) / examples,
    }
    for log in logs:
        score = -log * log.detach().exp().sqrt()
        grads = torch.autograd.grad(score, [out for _, out in steps], retain_graph=True)
        g, g_next = sum((torch.outer(g, g) for g in grads), torch.zeros(())), next_sum(grads)
        for name, each in (("G", g), ("G_next", g_next)):
            sums[name] = sums.get(name, 0) + each / examples / len(steps)
    into = found.setdefault(part, {})
    for name, each in sums.items():
        into[name] = into.get(name, torch.zeros(())) + each


def classifier_by_hand(model: Any, x: Tensor) -> dict[str, Moments]:
    """Return the moments of both parts, by a loop over examples, classes and steps."""
    found: dict[str, Moments] = {}
    for example, length in zip(x, lengths_of(x), strict=True):
        _, h, products = by_hand(model.rnn, example[:length])
        logs = model.head(h[-1]).log_softmax(-1)
        for part, steps in products.items():
            add(found, part, steps, logs, len(x))
    return found


def check_factors(optimizer: Any, found: dict[str, Moments]) -> None:
    for part, moments in found.items():
        factors = optimizer.layers[f"rnn[{part}]"].block.state.factor_values()
        assert factors.keys() == moments.keys()
        for name, expected in moments.items():
            torch.testing.assert_close(factors[name], expected, rtol=1e-10, atol=1e-13)


def check_step(optimizer: Any, model: nn.Module, before: Any, moments: Any, option: int) -> None:
    """Check the step of each part against the dense sum over lags."""
    group = optimizer.param_groups[0]
    for part, each in moments.items():
        view = optimizer.layers[f"rnn[{part}]"]
        names = [f"rnn.{key}" for key in view.layer.parameters]
        grads = [model.get_parameter(name).grad for name in names]
        changes = [(before[n] - model.get_parameter(n).detach()) / group["lr"] for n in names]
        v, step = (torch.cat([e[0], e[1].unsqueeze(-1)], -1) for e in (grads, changes))
        length = float(each["steps"][0]) if option == 1 else float("inf")
        dense = truth(each, group["damping"], option, length)
        torch.testing.assert_close(step, solve(dense, v), rtol=1e-8, atol=1e-10)


def stepped(model: nn.Module, x: Tensor, option: int, **how: Any) -> tuple[Any, dict[str, Tensor]]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    curvature = [CHAIN, kfactk.block("kfac", basis="kfac")]
    basis = {"name": "lgm", "option": option}
    recipe = kfactk.build(curvature=curvature, basis=basis, damping=0.03, lr=0.1, **HOW, **how)
    optimizer = recipe.bind(model)
    F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    optimizer.step()
    return optimizer, before


class OneLength(Classifier):
    """Classifies examples of one length."""

    def forward(self, x: Tensor) -> Tensor:
        last = self.rnn(x.transpose(0, 1))[1]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_a_step_on_packed_sequences_is_that_of_dense_algebra(kind: str) -> None:
    model, x = Classifier(kind), rows(9, 4, 3)
    assert len(set(lengths_of(x))) > 1
    moments = classifier_by_hand(model, x)
    optimizer, before = stepped(model, x, 2)
    check_factors(optimizer, moments)
    check_step(optimizer, model, before, moments, 2)


@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_a_step_on_sequences_of_one_length_is_that_of_dense_algebra(kind: str, option: int) -> None:
    model, x = OneLength(kind), rows(9, 4, 3)
    moments: dict[str, Moments] = {}
    for example in x:
        _, h, products = by_hand(model.rnn, example)
        for part, steps in products.items():
            add(moments, part, steps, model.head(h[-1]).log_softmax(-1), len(x))
    optimizer, before = stepped(model, x, option)
    check_factors(optimizer, moments)
    check_step(optimizer, model, before, moments, option)


class Both(nn.Module):
    """Classifies by the mean output of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = drawn(nn.RNN(3, 2, bidirectional=True, batch_first=True).double())
        self.head = drawn(nn.Linear(4, 3).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


def test_the_chain_of_the_reverse_direction_goes_backwards() -> None:
    model, x = Both(), rows(5, 4, 3)
    expected: dict[str, Moments] = {}
    for example in x:
        outputs, _, parts = by_hand(model.rnn, example)
        logs = model.head(outputs.mean(0)).log_softmax(-1)
        for part, steps in parts.items():
            add(expected, part, steps, logs, len(x))
    optimizer, before = stepped(model, x, 1)
    check_factors(optimizer, expected)
    check_step(optimizer, model, before, expected, 1)


class Twice(OneLength):
    """Reads two sequences of one example, by two calls."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :3]) + super().forward(x[:, 3:])


def test_no_pair_spans_two_calls() -> None:
    model, x = Twice("tanh"), rows(5, 5, 3)
    optimizer, _ = stepped(model, x, 2)
    factors = optimizer.layers["rnn[ih_l0]"].block.state.factor_values()
    ones = torch.cat([x, x.new_ones(5, 5, 1)], -1)
    pairs = sum(next_sum(each[:3]) + next_sum(each[3:]) for each in ones) / len(x)
    torch.testing.assert_close(factors["A_next"], pairs, rtol=1e-12, atol=1e-12)
    expected = torch.tensor([2.5, (9 + 4) / 2], dtype=x.dtype)
    torch.testing.assert_close(factors["steps"], expected)


def test_the_steps_of_all_calls_divide_the_gradients_of_an_example() -> None:
    model, x = Twice("tanh"), rows(5, 5, 3)
    moments: dict[str, Moments] = {}
    for example in x:
        halves = [by_hand(model.rnn, part) for part in (example[:3], example[3:])]
        logits = sum((model.head(h[-1]) for _, h, _ in halves), torch.zeros(()))
        for part, steps in halves[0][2].items():
            both = [*steps, *halves[1][2][part]]
            add(moments, part, both, logits.log_softmax(-1), len(x))
    optimizer, _ = stepped(model, x, 2)
    for part, expected in moments.items():
        found = optimizer.layers[f"rnn[{part}]"].block.state.factor_values()
        torch.testing.assert_close(found["G"], expected["G"], rtol=1e-10, atol=1e-12)


def test_micro_batches_are_one_batch() -> None:
    x, found = rows(8, 4, 3), []
    for parts in (1, 4):
        model = OneLength("gru")
        optimizer = kfactk.build(
            curvature=[CHAIN, kfactk.block("kfac", basis="kfac")], basis="lgm", lr=0.1, **HOW
        ).bind(model)
        for part in x.chunk(parts):
            targets = torch.zeros(len(part), dtype=torch.long)
            (F.cross_entropy(model(part), targets) / parts).backward()
        optimizer.step()
        found.append(optimizer.layers["rnn[hh_l0]"].block.state.factor_values())
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------- whole recipes


class TestPacked(PipelineLaws):
    """The laws of recipes on a packed, bidirectional model: ranks, resuming, accumulation."""

    recipe: ClassVar[Any] = {
        "curvature": [CHAIN, kfactk.block("kfac", basis="kfac")],
        "basis": "lgm",
        "update": torch.optim.SGD,
        "lr": 0.01,
    }

    def model(self) -> nn.Module:
        return Classifier("gru", bidirectional=True)

    def batch(self, generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(examples, 4, 3, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (examples,), generator=generator)


class TestOneLength(TestPacked):
    """Likewise on sequences of one length, with option 1."""

    recipe: ClassVar[Any] = {**TestPacked.recipe, "basis": {"name": "lgm", "option": 1}}

    def model(self) -> nn.Module:
        return OneLength("lstm")


def test_sequences_of_several_lengths_are_refused_with_option_1() -> None:
    model = Classifier("lstm")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(CombinationError, match="that all have the same number of steps"):
        stepped(model, rows(9, 4, 3), 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_new_length_is_refused_with_option_1() -> None:
    model = OneLength("lstm")
    recipe = kfactk.build(
        curvature=[CHAIN, kfactk.block("kfac", basis="kfac")],
        basis={"name": "lgm", "option": 1},
        **{"factor_every": 1, "basis_every": 1, "lr": 0.01},
        **HOW,
    )
    optimizer = recipe.bind(model)
    for steps in (4, 4, 5):
        optimizer.zero_grad()
        F.cross_entropy(model(rows(6, steps, 3)), torch.arange(6) % 3).backward()
        if steps == 4:
            optimizer.step()
    with pytest.raises(CombinationError, match="that all have the same number of steps"):
        optimizer.step()


@pytest.mark.parametrize("cell", [nn.RNNCell(2, 2), nn.LSTMCell(2, 2), nn.GRUCell(2, 2)])
def test_cells_are_refused_with_what_to_paste(cell: nn.Module) -> None:
    reason = Rnn(time="chain").unsupported(cell)
    assert reason is not None
    assert "kfactk.block('rnn', basis='kfac')]" in reason
    pasted = kfactk.build(curvature=[CHAIN, kfactk.block("rnn", basis="kfac")], basis="lgm")
    assert not pasted.coverage(cell).plain


def test_the_default_takes_steps_as_independent() -> None:
    assert Rnn() == Rnn(time="independent")
    assert Rnn().provides == {"A", "G"}
    with pytest.raises(kfactk.OptionError, match="'independent', 'chain'"):
        Rnn(time="series")


def test_a_decomposition_that_fails_leaves_the_last_one_in_use() -> None:
    """Pairs that no sequence has, as damage of the averages: counted, and nothing else changes."""
    model, x = OneLength("tanh"), rows(6, 4, 3)
    recipe = kfactk.build(
        curvature=[CHAIN, kfactk.block("kfac", basis="kfac")],
        basis="lgm",
        **{"factor_every": 2, "basis_every": 1, "lr": 0.01, "damping": 1e-6},
        **HOW,
    )
    optimizer = recipe.bind(model)
    block = optimizer.layers["rnn[hh_l0]"].block
    kept: list[dict[str, Any]] = []
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(6) % 3).backward()
        if step == 1:
            state = block.state.factors["A_next"]
            state.replace(5 * block.state.factor_values()["A"])
            block.invalidate()
            with pytest.warns(UserWarning, match="A_next is larger than that of any sequence"):
                optimizer.step()
        else:
            optimizer.step()
        kept.append({n: dict(parts) for n, parts in block.state.decomposition.items()})
    assert optimizer.counters["failed_decompositions"] == 1
    for name, parts in kept[0].items():
        for part, tensor in parts.items():
            assert torch.equal(tensor, kept[1][name][part])


def test_what_a_chain_keeps_is_saved_and_planned() -> None:
    model, x = OneLength("gru"), rows(6, 4, 3)
    optimizer, _ = stepped(model, x, 2)
    keys = {key for state in optimizer.state.values() for key in state}
    named = {key.partition("]")[2] for key in keys if "[hh_l0]" in key}
    assert {".factor.A_next", ".factor.G_next", ".basis.A.next"} <= named
    block = optimizer.layers["rnn[hh_l0]"].block
    assert block.requires == {"A", "G"}
    work = block.work()
    assert work.beside == {"A_next": (3, 3), "G_next": (6, 6)}
    assert work.indivisible
