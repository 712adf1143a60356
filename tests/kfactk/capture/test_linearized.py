"""Forwards that run again: exact Fisher products against dense Jacobians, and no traces."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfactk import CaptureError
from kfactk.capture.heads import Head
from kfactk.capture.linearized import KnownForward, ModelContext, fisher_products
from kfactk_stages.likelihood.categorical import Categorical
from kfactk_stages.likelihood.gaussian import Gaussian

F64 = torch.float64


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    "normalized": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
        ),
        (5, 2, 4, 4),
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)), (6, 4)),
    "recurrent": (Recurrent, (3, 4, 3)),
    "attentive": (Attentive, (3, 5, 4)),
    "tied": (Tied, (5, 3)),
}


def known(model: nn.Module, x: Tensor, *heads: Head) -> KnownForward:
    """Run a forward, and return it."""
    found = heads or (Head(Categorical()),)

    def locate(output: Any) -> list[tuple[Head, Tensor]]:
        return [(head, head.find(output)) for head in found]

    context = ModelContext.now(model)
    output = model(x)
    return KnownForward.of(model, lambda: model(x), context, output, {"x": x}, locate)


def moves(model: nn.Module, seed: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        id(p): torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()
    }


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    torch.manual_seed(3)
    make, shape = MODELS[name]
    model = make().double().train()
    x = torch.randn(*shape, dtype=F64)
    forward = known(model, x)
    directions = [moves(model, 0), moves(model, 1)]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    randoms = torch.get_rng_state(), random.getstate()
    total, terms = fisher_products([forward], directions)
    assert torch.equal(torch.get_rng_state(), randoms[0])
    assert random.getstate() == randoms[1]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert terms == shape[0]

    # J v by central differences of the output, H as softmax has it.
    parameters = list(model.parameters())
    slopes = []
    for direction in directions:
        outputs = []
        for sign in (1, -1):
            with torch.no_grad():
                for p in parameters:
                    p += sign * 1e-6 * direction[id(p)]
                with forward.context.restored(model):
                    outputs.append(model(x))
                for p in parameters:
                    p -= sign * 1e-6 * direction[id(p)]
        slopes.append((outputs[0] - outputs[1]) / 2e-6)
    with torch.no_grad(), forward.context.restored(model):
        p = model(x).softmax(1)
    inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    expected = [[float(torch.einsum("nc,ncd,nd->", a, inner, b)) for b in slopes] for a in slopes]
    torch.testing.assert_close(total, torch.tensor(expected, dtype=F64), rtol=1e-6, atol=1e-8)


def test_heads_count_with_their_weights() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 5).double()
    heads = (
        Head(Categorical(), lambda output: output[:, :3], weight=2.0, name="a"),
        Head(Gaussian(), lambda output: output[:, 3:], weight=0.5, name="b"),
    )
    x = torch.randn(6, 4, dtype=F64)
    direction = moves(model, 0)
    total, terms = fisher_products([known(model, x, *heads)], [direction])
    moved = x @ direction[id(model.weight)].T + direction[id(model.bias)]
    p = model(x)[:, :3].softmax(1)
    inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    one = torch.einsum("nc,ncd,nd->", moved[:, :3], inner, moved[:, :3])
    expected = 2.0 * one + 0.5 * moved[:, 3:].square().sum()
    assert total[0, 0] / terms == pytest.approx(expected.item() / 6, rel=1e-10)


def test_several_forwards_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, directions = torch.randn(6, 4, dtype=F64), [moves(model, 0), {}]
    whole, terms = fisher_products([known(model, x)], directions)
    parts = [known(model, x[:2]), known(model, x[2:])]
    total, count = fisher_products(parts, directions)
    assert count == terms
    torch.testing.assert_close(total, whole)
    assert total[1].tolist() == [0.0, 0.0]


def test_what_cannot_run_again_is_refused() -> None:
    model = nn.Linear(4, 3)
    x = torch.randn(6, 4)
    forward = known(model, x)
    x.add_(1)
    with pytest.raises(CaptureError, match="modified in place"):
        fisher_products([forward], [moves(model, 0)])

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = nn.Linear(4, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x) * self.calls

    other = Counting()
    with pytest.raises(CaptureError, match="another output when its forward ran again"):
        fisher_products([known(other, torch.randn(6, 4))], [moves(other, 0)])


class Odd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def test_operations_without_a_forward_derivative_are_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return Odd.apply(self.inner(x))

    model = Own()
    with pytest.raises(CaptureError, match="forward-mode differentiation"):
        fisher_products([known(model, torch.randn(6, 4))], [moves(model, 0)])


def test_a_context_is_restored_without_traces() -> None:
    model = nn.BatchNorm1d(3)
    model(torch.randn(4, 3))
    start = ModelContext.now(model)
    values = [each.clone() for each in model.buffers()]
    drawn = torch.rand(2), random.random()
    model(torch.randn(4, 3))
    after = [each.clone() for each in model.buffers()]
    states = torch.get_rng_state(), random.getstate()
    with start.restored(model):
        assert all(map(torch.equal, model.buffers(), values))
        assert torch.equal(torch.rand(2), drawn[0])
        assert random.random() == drawn[1]
        model(torch.randn(4, 3))
        model.running_mean = torch.zeros(3)
    assert all(map(torch.equal, model.buffers(), after))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
