"""A mixture of stacked experts as transformers makes them; without transformers, tests skip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

moe = pytest.importorskip("transformers.integrations.moe")

D, H, E, K = 4, 3, 4, 2
"""Width of a token, width inside an expert, experts, and experts of a token."""


def stacked(**how: Any) -> type[nn.Module]:
    """Return a class of experts as transformers make them, with an eager forward of its own."""

    @moe.use_experts_implementation(**how)
    class Stacked(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = E, torch.tanh
            first = 2 * H if how.get("has_gate", True) else H
            name = "gate_up_proj" if how.get("has_gate", True) else "up_proj"
            for part, d_out, d_in in ((name, first, D), ("down_proj", D, H)):
                sides = (d_in, d_out) if how.get("is_transposed") else (d_out, d_in)
                setattr(self, part, nn.Parameter(torch.randn(E, *sides)))
                if how.get("has_bias"):
                    setattr(self, f"{part}_bias", nn.Parameter(torch.randn(E, d_out)))

        def forward(
            self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
        ) -> Tensor:
            found = []
            for x, index, weights in zip(hidden_states, top_k_index, top_k_weights, strict=True):
                found.append(
                    sum(w * self.one(x, int(e)) for e, w in zip(index, weights, strict=True))
                )
            return torch.stack(found)

        def one(self, x: Tensor, expert: int) -> Tensor:
            for part in ("gate_up_proj" if self.has_gate else "up_proj", "down_proj"):
                weight = getattr(self, part)[expert]
                x = x @ weight if self.is_transposed else weight @ x
                if self.has_bias:
                    x = x + getattr(self, f"{part}_bias")[expert]
                if part != "down_proj":
                    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
            return x

    return Stacked


class Config:
    """What the dispatcher of transformers reads."""

    def __init__(self, kind: str) -> None:
        self._experts_implementation = kind


class Mixture(nn.Module):
    """A mixture of experts: a router, and what it chooses, for tokens `[N, T, D]`."""

    def __init__(self, kind: str = "eager", *, twice: bool = False, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.router = nn.Linear(D, E)
        self.experts = stacked(**how)(Config(kind))
        self.twice = twice
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + self.twice):
            weights, chosen = self.router(x).softmax(-1).topk(K)
            found = self.experts(x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1))
            x = x + found.view_as(x)
        return x.sum(1)
