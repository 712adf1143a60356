"""Recurrent modules as loops over steps and gates, written by hand, for one example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Products = dict[str, list[tuple[Tensor, Tensor]]]
"""For each part of a module, the input and output of its product, step by step of its chain."""


def by_hand(
    rnn: Any, x: Tensor, states: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Products]:
    """Run all layers and directions of a module on one example.

    Args:
        rnn: An `nn.RNN` (tanh), `nn.LSTM` or `nn.GRU` with biases.
        x: `[T, d]`.
        states: h and c before the first step, `[layers directions, H]`; `None` for zeros.

    Returns:
        The output at each step `[T, *]`, the last h `[layers directions, H]`, and the products.
    """
    suffixes = [f"_l{n}{d}" for n in range(rnn.num_layers) for d in ("", "_reverse")]
    suffixes = [each for each in suffixes if hasattr(rnn, f"weight_ih{each}")]
    zeros = x.new_zeros(len(suffixes), rnn.hidden_size)
    before = (zeros, zeros) if states is None else states
    found: Products = {}
    last, rows, outputs = [], list(x), []
    for number, suffix in enumerate(suffixes):
        own, h = _chain(rnn, suffix, rows, before[0][number], before[1][number], found)
        last.append(h)
        outputs.append(own)
        if not rnn.bidirectional or suffix.endswith("_reverse"):
            rows, outputs = [torch.cat(each) for each in zip(*outputs, strict=True)], []
    return torch.stack(rows), torch.stack(last), found


def _chain(
    rnn: Any, suffix: str, rows: Sequence[Tensor], h: Tensor, c: Tensor, found: Products
) -> tuple[list[Tensor], Tensor]:
    """Run one layer in one direction; return h at each step of the sequence, and the last one."""
    weights = {side: rnn.get_parameter(f"weight_{side}{suffix}") for side in ("ih", "hh")}
    biases = {side: rnn.get_parameter(f"bias_{side}{suffix}") for side in ("ih", "hh")}
    order = range(len(rows))
    own: dict[int, Tensor] = {}
    for t in reversed(order) if suffix.endswith("_reverse") else order:
        u, v = (weights[s] @ a + biases[s] for s, a in (("ih", rows[t]), ("hh", h)))
        found.setdefault(f"ih{suffix}", []).append((rows[t].detach(), u))
        found.setdefault(f"hh{suffix}", []).append((h.detach(), v))
        h, c = _step(rnn, u, v, h, c)
        own[t] = h
    return [own[t] for t in order], h


def _step(rnn: nn.Module, u: Tensor, v: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(rnn, nn.LSTM):
        i, f, g, o = (u + v).view(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if isinstance(rnn, nn.GRU):
        (ru, zu, nu), (rv, zv, nv) = u.view(3, -1), v.view(3, -1)
        z = torch.sigmoid(zu + zv)
        return (1 - z) * torch.tanh(nu + torch.sigmoid(ru + rv) * nv) + z * h, c
    return torch.tanh(u + v), c
