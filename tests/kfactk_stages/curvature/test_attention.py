"""Gradients inside attention are autograd's, example by example, and its forward stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk import CaptureError, Layer, LayerCall
from kfactk.capture.forward import Forward
from kfactk.capture.hooks import ModelHooks
from kfactk.preconditioner.coverage import ModelSurvey
from kfactk.preconditioner.rules import BlockRule
from kfactk.testing import CurvatureLaws
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.curvature.attention import Attention, ProjectionSamples

N, L, S, E = 3, 4, 5, 6


class Calls(nn.Module):
    """A model whose forward is a function of itself and attention."""

    def __init__(self, attn: nn.MultiheadAttention, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attn, self.function = attn, function

    def forward(self, *args: Any) -> Tensor:
        """Return an output with the examples first."""
        return self.function(self.attn, *args)


@attrs.define(eq=False)
class Listener:
    """Takes the calls of followed layers with the gradient of `(output * cotangent).sum()`."""

    layers: Sequence[Layer]
    cotangent: Tensor
    found: dict[str, list[LayerCall]] = attrs.Factory(dict)

    def _begin_forward(self) -> Sequence[Layer]:
        return self.layers

    def _end_forward(self, forward: Forward) -> None:
        output = forward.output
        forward.run((output * self.cotangent).sum(), output, self._take)

    def _take(self, layer: Layer, calls: list[LayerCall]) -> None:
        self.found[layer.name] = calls


def layers_of(model: nn.Module) -> list[Layer]:
    survey = ModelSurvey(model, [BlockRule(Attention(), Ekfac())])
    return [layer for layer, _ in survey.layers({id(p) for p in model.parameters()})]


def gradients_inside(model: nn.Module, args: Sequence[Any], cotangent: Tensor) -> dict[str, Tensor]:
    """Return D of each layer inside attention, by the Fisher pass."""
    layers = layers_of(model)
    listener = Listener(layers, cotangent)
    hooks = ModelHooks(model, listener, evaluation=True)
    torch.manual_seed(7)
    model(*args)
    hooks.close()
    return {
        layer.name: Attention()
        .samples(layer, listener.found[layer.name], num_terms=1.0, first=True)
        .per_example_gradients()
        for layer in layers
    }


def autograds(model: nn.Module, args: Sequence[Any], cotangent: Tensor) -> dict[str, Tensor]:
    """Return D of each layer, example by example, by one backward for each example."""
    torch.manual_seed(7)
    output, found = model(*args), {}
    for layer in layers_of(model):
        own, matrices = layer.tensors(), []
        for n in range(len(output)):
            alone = (output[n] * cotangent[n]).sum()
            grads = torch.autograd.grad(alone, list(own.values()), retain_graph=True)
            matrices.append(Attention().matrix(layer, dict(zip(own, grads, strict=True))))
        found[layer.name] = torch.stack(matrices, -3)
    return found


def deviation(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative deviation of any layer."""
    assert found.keys() == expected.keys()
    assert found
    return max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in expected)


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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
