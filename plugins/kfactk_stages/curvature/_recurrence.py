"""Recurrent layers that run again: the products inside one call of RNN, LSTM, GRU or their cells.

Fused kernels do not show what happens between two steps, so the call runs again as a loop over
time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from kfactk import InnerCall, ModuleCall, Replayed, Tensors
from kfactk_stages.curvature._coverage import CELLS

States = tuple[Tensor, ...]
"""h, and c of an LSTM; the module's own have a leading dimension of layers times directions."""


@attrs.frozen
class RecurrentReplay:
    """Runs calls of recurrent modules again, step by step.

    With u_t = W_ih x_t + b_ih and v_t = W_hh h_{t-1} + b_hh, one step is

        RNN:   h_t = tanh(u + v), or relu
        LSTM:  (i, f, g, o) = u + v,   c_t = sig(f) c_{t-1} + sig(i) tanh(g),
               h_t = sig(o) tanh(c_t),   with `proj_size`  h_t = W_hr (sig(o) tanh(c_t))
        GRU:   r = sig(u_r + v_r),   z = sig(u_z + v_z),   n = tanh(u_n + r v_n),
               h_t = (1 - z) n + z h_{t-1}

    Inputs of products are given as `[N, T, d + 1]`, the examples first, in the order of the
    sequence whatever the direction. The last column is 1, or 0 where an example of a packed
    sequence is shorter than T. Such rows are zeros.
    """

    def outputs(self, output: Any) -> list[Any]:
        """Return the output and the last states; of a packed sequence its data."""
        if isinstance(output, PackedSequence):
            return [output.data]
        if isinstance(output, tuple):
            return [tensor for each in output for tensor in self.outputs(each)]
        return [output]

    def run(self, call: ModuleCall) -> Replayed:
        """Compute the outputs again."""
        module: Any = call.module
        given = inspect.signature(type(module).forward).bind(module, *call.args, **call.kwargs)
        source, hx = given.arguments["input"], given.arguments.get("hx")
        layout = _packed(source) if isinstance(source, PackedSequence) else _dense(module, source)
        states = None if hx is None else tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        once = _cell if isinstance(module, CELLS) else _module
        return once(call, layout, source, states)


@attrs.frozen(eq=False)
class Layout:
    """Where the examples and steps are in the input of a call.

    Args:
        batched: Whether there is a dimension of examples, and states have one.
        time_dim: Which of the first two dimensions counts steps; `None` where there are none.
        packed: Example and step of each row of a packed sequence; `None` elsewhere.
        mask: `[N, T]` of a packed sequence: which steps an example has.
    """

    batched: bool
    time_dim: int | None
    packed: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """Return an input or output as `[N, T, d]`."""
        if self.packed is not None:
            assert self.mask is not None
            return tensor.new_zeros(*self.mask.shape, tensor.shape[-1]).index_put(
                self.packed, tensor
            )
        if self.time_dim is None:
            return tensor.reshape(-1, 1, tensor.shape[-1])
        if not self.batched:
            return tensor.unsqueeze(0)
        return tensor.transpose(0, 1) if self.time_dim == 0 else tensor

    def as_given(self, rows: Tensor) -> Tensor:
        """Return the inverse."""
        if self.packed is not None:
            return rows[self.packed]
        if not self.batched:
            return rows.squeeze(0)
        return rows.transpose(0, 1) if self.time_dim == 0 else rows

    def dropped(self, rows: Tensor, probability: float) -> Tensor:
        """Return rows with dropout, drawn in the order of torch's: step by step."""
        if self.packed is not None:
            return self.rows(F.dropout(self.as_given(rows), probability))
        steps = F.dropout(rows.transpose(0, 1).contiguous(), probability)
        return steps.transpose(0, 1)


def _dense(module: Any, source: Tensor) -> Layout:
    if isinstance(module, CELLS):
        return Layout(source.ndim == 2, None)
    return Layout(source.ndim == 3, 1 if module.batch_first else 0)


def _packed(source: PackedSequence) -> Layout:
    """Return the layout of a packed sequence; examples are as before they were sorted."""
    device, sizes = source.data.device, source.batch_sizes
    steps = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    ranks = torch.arange(len(steps)) - (sizes.cumsum(0) - sizes)[steps]
    order = source.sorted_indices
    ranks, steps = ranks.to(device), steps.to(device)
    examples = ranks if order is None else order[ranks]
    mask = torch.zeros(int(sizes[0]), len(sizes), dtype=torch.bool, device=device)
    mask[examples, steps] = True
    return Layout(True, None, (examples, steps), mask)


@attrs.frozen(eq=False)
class Chain:
    """One layer in one direction.

    Args:
        module: Settings.
        parameters: Of the module, by name.
        suffix: The end of the names of its parameters.
        mask: See `Layout`.
    """

    module: Any
    parameters: Tensors
    suffix: str
    mask: Tensor | None = None

    def product(self, side: str, inputs: Tensor) -> Tensor:
        """Return `W a + b` of the side "ih", "hh" or "hr"."""
        name = side + self.suffix
        bias = self.parameters.get(f"bias_{name}")
        return F.linear(inputs, self.parameters[f"weight_{name}"], bias)

    def run(
        self, rows: Tensor, states: States, *, reverse: bool = False
    ) -> tuple[Tensor, States, list[InnerCall]]:
        """Run over time.

        Args:
            rows: `[N, T, d]`.
            states: `[N, H]` each, before the first step.
            reverse: Whether the first step is the last in time.

        Returns:
            h at each step `[N, T, H]`, the last states, and the products.
        """
        u = self.product("ih", rows)
        u = u if u.requires_grad else u.requires_grad_()
        probes = self._probes(rows, u)
        steps = u.unbind(1)  # slices would each have a gradient of all steps
        shifts = {side: probe.unbind(1) for side, probe in probes.items()}
        before: list[Tensor] = [u] * rows.shape[1]
        mixed, after = list(before), list(before)
        for t in reversed(range(rows.shape[1])) if reverse else range(rows.shape[1]):
            before[t] = states[0].detach()
            own = {side: each[t] for side, each in shifts.items()}
            new, mixed[t] = self.step(steps[t], states, own)
            if self.mask is not None:
                here = self.mask[:, t].unsqueeze(-1)
                after[t] = new[0].masked_fill(~here, 0)
                states = tuple(torch.where(here, *each) for each in zip(new, states, strict=True))
            else:
                states, after[t] = new, new[0]
        inputs = {"ih": rows, "hh": torch.stack(before, 1)}
        if "hr" in probes:
            inputs["hr"] = torch.stack(mixed, 1)
        calls = [
            InnerCall(side + self.suffix, _with_ones(each, self.mask), probes.get(side, u))
            for side, each in inputs.items()
        ]
        return torch.stack(after, 1), states, calls

    def step(self, u: Tensor, states: States, shifts: Tensors) -> tuple[States, Tensor]:
        """Return the states after one step, and what the projection of an LSTM was given.

        Args:
            u: `W_ih x + b_ih`, `[N, gates H]`.
            states: The states before.
            shifts: Zeros that are added to products, so that their gradients are known.
        """
        h = states[0]
        v = self.product("hh", h)
        if isinstance(self.module, (nn.LSTM, nn.LSTMCell)):
            i, f, g, o = (u + v).chunk(4, -1)
            c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
            h = mixed = o.sigmoid() * c.tanh()
            if "hr" in shifts:
                h = self.product("hr", mixed) + shifts["hr"]
            return (h, c), mixed.detach()
        if isinstance(self.module, (nn.GRU, nn.GRUCell)):
            (u_r, u_z, u_n), (v_r, v_z, v_n) = u.chunk(3, -1), (v + shifts["hh"]).chunk(3, -1)
            n = ((u_r + v_r).sigmoid() * v_n + u_n).tanh()
            h = (h - n) * (u_z + v_z).sigmoid() + n
            return (h,), h.detach()
        relu = self.module.nonlinearity == "relu"
        h = torch.relu(u + v) if relu else torch.tanh(u + v)
        return (h,), h.detach()

    def _probes(self, rows: Tensor, u: Tensor) -> dict[str, Tensor]:
        """Return zeros where the gradient of a product is not that of `u`."""
        sides = [side for side in ("hr",) if f"weight_{side}{self.suffix}" in self.parameters]
        if isinstance(self.module, (nn.GRU, nn.GRUCell)):
            sides.append("hh")
        shapes = {side: len(self.parameters[f"weight_{side}{self.suffix}"]) for side in sides}
        return {
            side: u.new_zeros(*rows.shape[:2], width).requires_grad_()
            for side, width in shapes.items()
        }


def _module(call: ModuleCall, layout: Layout, source: Any, given: States | None) -> Replayed:
    """Run all layers and directions."""
    module: Any = call.module
    rows = layout.rows(source.data if isinstance(source, PackedSequence) else source)
    states = _states(module, given, rows, layout.batched)
    inner: list[InnerCall] = []
    last: list[States] = []
    for number in range(module.num_layers):
        found = []
        for reverse in (False, True) if module.bidirectional else (False,):
            suffix = f"_l{number}{'_reverse' if reverse else ''}"
            chain = Chain(module, call.parameters, suffix, layout.mask)
            own = tuple(each[len(last)] for each in states)
            output, final, calls = chain.run(rows, own, reverse=reverse)
            found.append(output)
            last.append(final)
            inner += calls
        rows = found[0] if len(found) == 1 else torch.cat(found, -1)
        if number < module.num_layers - 1 and call.training and module.dropout > 0:
            rows = layout.dropped(rows, module.dropout)
    finals = [torch.stack(each) for each in zip(*last, strict=True)]
    if not layout.batched:
        finals = [each.squeeze(1) for each in finals]
    return Replayed([layout.as_given(rows), *finals], inner)


def _cell(call: ModuleCall, layout: Layout, source: Tensor, given: States | None) -> Replayed:
    """Run one step, in the shape of the call: its h is computed from the c that it returns."""
    module: Any = call.module
    chain = Chain(module, call.parameters, "")
    u = chain.product("ih", source).requires_grad_()
    kinds = 2 if isinstance(module, nn.LSTMCell) else 1
    zeros = source.new_zeros(*source.shape[:-1], module.hidden_size)
    states = (zeros,) * kinds if given is None else given
    v = torch.zeros_like(u).requires_grad_() if isinstance(module, nn.GRUCell) else u
    new, _ = chain.step(u, states, {"hh": v})
    rows = {"ih": (source, u), "hh": (states[0], v)}
    inner = [
        InnerCall(side, _with_ones(layout.rows(inputs), None), output)
        for side, (inputs, output) in rows.items()
    ]
    return Replayed(list(new), inner)


def _states(module: Any, given: States | None, rows: Tensor, batched: bool) -> Sequence[Tensor]:
    """Return the states before the first step, `[layers directions, N, H]` each."""
    if given is not None:
        return given if batched else [each.unsqueeze(1) for each in given]
    number = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or module.hidden_size]
    if isinstance(module, nn.LSTM):
        widths.append(module.hidden_size)
    return [rows.new_zeros(number, len(rows), width) for width in widths]


def _with_ones(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return rows `[N, T, d]` with the column of ones, zeros where the mask is."""
    if mask is None:
        return F.pad(rows.detach(), (0, 1), value=1.0)
    return F.pad(rows.detach(), (0, 1), value=1.0) * mask.unsqueeze(-1)
