"""Attention that runs again: the products inside one call of `nn.MultiheadAttention`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import InnerCall, ModuleCall, Replayed, Tensors

TAGS = ("q", "k", "v")
"""Which projection of the inputs a call belongs to: queries, keys, values."""


@attrs.frozen
class AttentionReplay:
    """Runs calls of `nn.MultiheadAttention` again, step by step as torch does.

    With queries, keys and values Q, K, V of one head of width d,

        (Q, K, V) = (x_q W_q^T + b_q, x_k W_k^T + b_k, x_v W_v^T + b_v)
        P = dropout(softmax(Q K^T / sqrt(d) + mask)),    o = P V,    y = concat(o) W_o^T + b_o

    Its outputs are y and, where they were asked for, the weights P of each head or their mean over
    the heads. Products are given with the examples first, whatever `batch_first` says. An input
    without a dimension of examples is one example.
    """

    def outputs(self, output: Any) -> tuple[Any, ...]:
        """Return y and the weights, which are `None` where they were not asked for."""
        return output if isinstance(output, tuple) else (output,)

    def run(self, call: ModuleCall) -> Replayed:
        """Compute y again, and the weights."""
        module: Any = call.module
        given = _SIGNATURE.bind(module, *call.args, **call.kwargs)
        given.apply_defaults()
        named = given.arguments
        layout = Layout(named["query"].ndim == 3, bool(module.batch_first))
        same = named["query"] is named["key"] is named["value"]
        sources = [named["query"]] if same else [named[n] for n in ("query", "key", "value")]
        rows = [layout.examples_first(source) for source in sources] * (3 if same else 1)
        q, k, v = (each.requires_grad_() for each in _projected(rows, call.parameters))
        mixed, weights = _attended(module, q, k, v, named, call)
        out = F.linear(
            mixed, call.parameters["out_proj.weight"], call.parameters.get("out_proj.bias")
        )
        inner = [
            InnerCall(part, inputs, output, tag)
            for tag, inputs, output in zip(TAGS, rows, (q, k, v), strict=True)
            for part, inputs in _parts_of(tag, inputs, call.parameters)
        ]
        outputs = [layout.as_given(out), *([] if weights is None else [weights])]
        return Replayed(outputs, [*inner, InnerCall("out_proj", mixed, out)])


@attrs.frozen
class Layout:
    """Where the examples are in the inputs of a call.

    Args:
        batched: Whether there is a dimension of examples.
        batch_first: Whether it is the first, and not the second.
    """

    batched: bool
    batch_first: bool

    def examples_first(self, tensor: Tensor) -> Tensor:
        """Return an input as `[N, T, d]`."""
        if not self.batched:
            return tensor.unsqueeze(0)
        return tensor if self.batch_first else tensor.transpose(0, 1)

    def as_given(self, tensor: Tensor) -> Tensor:
        """Return the inverse."""
        if not self.batched:
            return tensor.squeeze(0)
        return tensor if self.batch_first else tensor.transpose(0, 1)


def _parts_of(tag: str, inputs: Tensor, parameters: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Yield the parts of the module that a projection belongs to, each with its inputs."""
    if "in_proj_weight" in parameters:
        yield "in_proj", inputs
        return
    yield f"{tag}_proj", inputs
    if "in_proj_bias" in parameters:  # the weights are apart, the bias is one parameter
        yield "in_proj_bias", inputs[..., :0]


def _projected(rows: list[Tensor], parameters: Tensors) -> tuple[Tensor, ...]:
    """Return queries, keys and values, `[N, T, E]`."""
    bias, weight = parameters.get("in_proj_bias"), parameters.get("in_proj_weight")
    if weight is not None and rows[0] is rows[1] is rows[2]:
        return F.linear(rows[0], weight, bias).chunk(3, -1)
    weights = (
        weight.chunk(3) if weight is not None else [parameters[f"{t}_proj_weight"] for t in TAGS]
    )
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip(rows, weights, biases, strict=True))


def _attended(
    module: Any, q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any], call: ModuleCall
) -> tuple[Tensor, Tensor | None]:
    """Return the values that attention has mixed, heads side by side, `[N, L, E]`, and weights."""
    dtype, heads = named["query"].dtype, module.num_heads
    attended = _as_bias(named["attn_mask"], dtype)
    padding = _as_bias(named["key_padding_mask"], dtype)
    causal = named["is_causal"] and padding is None and not named["need_weights"]
    if causal:
        attended = None  # the kernel makes it
    more = []
    if "bias_k" in call.parameters:
        more.append((call.parameters["bias_k"], call.parameters["bias_v"]))
    if module.add_zero_attn:
        more.append((k.new_zeros(1, 1, k.shape[-1]), v.new_zeros(1, 1, v.shape[-1])))
    for key, value in more:
        k, v = (torch.cat([x, e.expand(len(x), 1, -1)], 1) for x, e in ((k, key), (v, value)))
        attended, padding = (None if m is None else F.pad(m, (0, 1)) for m in (attended, padding))
    mask = _merged(attended, padding, heads)
    dropout = module.dropout if call.training else 0.0
    width = q.shape[-1] // heads
    q, k, v = (x.view(*x.shape[:2], heads, width).transpose(1, 2) for x in (q, k, v))
    weights = None
    if named["need_weights"]:
        weights = _weights(q, k, mask, dropout)
        if named["query"].ndim == 2:
            weights = weights.squeeze(0)
        mixed = (weights if weights.ndim == 4 else weights.unsqueeze(0)) @ v
        if named["average_attn_weights"]:
            weights = weights.mean(-3)
    else:
        if mask is not None:
            mask = mask.view(-1, heads if len(mask) > 1 else 1, *mask.shape[1:])
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return mixed.transpose(1, 2).flatten(2), weights


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return the weights of each head, `[N, H, L, S]`, as torch computes them to return them."""
    examples, heads, _, width = q.shape
    q, k = (x.flatten(0, 1) for x in (q, k))
    q = q * math.sqrt(1 / width)
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    weights = F.softmax(scores, -1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return weights.view(examples, heads, *weights.shape[1:])


def _as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as what is added to the scores."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _merged(attended: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """Return both masks as one, `[1 or N H, L or 1, S]`.

    Args:
        attended: `[L, S]` or `[N H, L, S]`.
        padding: `[N, S]`, or `[S]` without a dimension of examples.
        heads: H.
    """
    if attended is not None and attended.ndim == 2:
        attended = attended.unsqueeze(0)
    if padding is None:
        return attended
    wide = padding.reshape(-1, 1, padding.shape[-1]).repeat_interleave(heads, 0)
    return wide if attended is None else attended + wide


_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)
