"""Stacked experts that run again: the products inside one call, with the tokens of each expert."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk import CaptureError, InnerCall, ModuleCall, Replayed


def first_part(module: Any) -> str:
    """Return the name of the projection that tokens go through first."""
    return "gate_up_proj" if module.has_gate else "up_proj"


SECOND = "down_proj"
"""The name of the projection that they go through last."""


@attrs.frozen
class ExpertsReplay:
    """Runs calls of stacked experts again.

    With the tokens x that the router gives expert e with weights r, and f the gate or activation,

        y = sum_e r W_e f(V_e x + b_e) + r c_e

    Products are given for each expert, `[N, T_e, d]`: examples first, T_e the most tokens that one
    of them sends there. The others are filled up with zeros. The last column of inputs is 1 in rows
    of tokens, and 0 in those that fill up.
    """

    joins_examples: ClassVar[bool] = True

    def outputs(self, output: Any) -> tuple[Any]:
        """Return y."""
        return (output,)

    def run(self, call: ModuleCall) -> Replayed:
        """Compute y again.

        Raises:
            CaptureError: The tokens cannot be those of the output's examples.
        """
        module: Any = call.module
        named = inspect.signature(type(module).forward).bind(module, *call.args, **call.kwargs)
        tokens, chosen, weights = list(named.arguments.values())[1:4]
        examples = _examples(call, len(tokens))
        mixed, inner = torch.zeros_like(tokens), list[InnerCall]()
        for expert, (token, place) in enumerate(_routed(chosen, module.num_experts)):
            if not len(token) and (inner or expert < module.num_experts - 1):
                continue
            rows = Rows.of(token, len(tokens), examples, interleaved=call.interleaved)
            hidden = tokens[token]
            for part in (first_part(module), SECOND):
                inputs = rows.packed(hidden)
                output = _product(call, part, expert, inputs[..., :-1])
                inner.append(InnerCall(part, inputs, output, str(expert)))
                hidden = rows.unpacked(output)
                if part != SECOND:
                    hidden = (
                        module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
                    )
            hidden = hidden * weights[token, place, None]
            mixed = mixed.index_add(0, token, hidden.to(mixed.dtype))
        return Replayed([mixed], inner)


@attrs.frozen
class Rows:
    """Where the tokens of one expert are among its rows `[N, T]`.

    Args:
        shape: N and T.
        places: The place of each token in the flattened rows, `[tokens]`.
    """

    shape: tuple[int, int]
    places: Tensor

    @classmethod
    def of(cls, token: Tensor, tokens: int, examples: int, *, interleaved: bool = False) -> Rows:
        """Return the places of tokens, which are sorted.

        Args:
            token: The number of each among all.
            tokens: Number of all tokens.
            examples: N.
            interleaved: Whether token r belongs to example `r % N`, and not to the one whose
                tokens are next to each other.
        """
        if token.is_meta:
            return cls((examples, math.ceil(len(token) / examples)), torch.empty_like(token))
        if interleaved:
            owner = token % max(1, examples)
        else:
            owner = torch.div(token, tokens // max(1, examples), rounding_mode="floor")
        counts = torch.bincount(owner, minlength=examples)
        first, by_owner = counts.cumsum(0) - counts, owner.argsort(stable=True)
        number = torch.empty_like(token)
        number[by_owner] = torch.arange(len(token), device=token.device)
        among = number - first[owner]
        most = int(counts.max()) if len(token) else 0
        return cls((examples, most), owner * most + among)

    def packed(self, hidden: Tensor) -> Tensor:
        """Return what the tokens hold, and a column of ones, as rows `[N, T, d + 1]`."""
        marked = F.pad(hidden, (0, 1), value=1.0)
        rows = marked.new_zeros(math.prod(self.shape), marked.shape[-1])
        return rows.index_copy(0, self.places, marked).view(*self.shape, marked.shape[-1])

    def unpacked(self, rows: Tensor) -> Tensor:
        """Return what the tokens have in rows `[N, T, d]`, `[tokens, d]`."""
        return rows.flatten(0, 1)[self.places]


def _product(call: ModuleCall, part: str, expert: int, inputs: Tensor) -> Tensor:
    module: Any = call.module
    weight, bias = call.parameters[part][expert], call.parameters.get(f"{part}_bias")
    output = F.linear(
        inputs,
        weight.mT if module.is_transposed else weight,
        None if bias is None else bias[expert],
    )
    return output if output.requires_grad else output.requires_grad_()


def _routed(chosen: Tensor, experts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each expert the numbers of its tokens, in order, and which choice of theirs it is.

    On the meta device, where that is not known, all experts get equally many.

    Args:
        chosen: The experts of each token, `[tokens, choices]`.
        experts: Their number.
    """
    for expert in range(experts):
        if chosen.is_meta:
            token = chosen.new_empty(math.ceil(chosen.numel() / experts))
            yield token, token
        else:
            token, place = (chosen == expert).nonzero(as_tuple=True)
            yield token, place


def _examples(call: ModuleCall, tokens: int) -> int:
    """Return the number of examples that tokens belong to; their own where it is not known.

    Raises:
        CaptureError: They are not equally many of each example.
    """
    examples = tokens if call.examples is None else call.examples
    if examples and tokens % examples:
        raise CaptureError(
            f"{type(call.module).__name__} got {tokens} tokens, and the model's output has "
            f"{examples} examples: which tokens belong to which example is not known. Give all "
            "examples the same length, by padding, or set exclude=['*.experts'] to train the "
            "experts by their plain gradient."
        )
    return examples
