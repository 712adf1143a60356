"""Gradients inside recurrent modules are autograd's, example by example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kfactk.testing import CurvatureLaws
from kfactk_stages.curvature.rnn import Rnn
from tests.kfactk_stages.curvature.inside import Inside, deviation, rows

N, T, D, H = 3, 4, 5, 2
INSIDE = Inside(Rnn())


class Calls(nn.Module):
    """A model whose forward is a function of a recurrent module."""

    def __init__(self, rnn: Any, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.rnn, self.function = rnn, function

    def forward(self, *args: Any) -> Tensor:
        """Return an output with the examples first."""
        return self.function(self.rnn, *args)


class TestRnn(CurvatureLaws):
    stage = "rnn"


# ----------------------------------------------------------------------------------- per example


def output(rnn: Any, x: Tensor, *states: Any) -> Tensor:
    """Return the output for `[N, T, D]`, whatever the module's layout."""
    found: Tensor = rnn(x if rnn.batch_first else x.transpose(0, 1), *states)[0]
    return found if rnn.batch_first else found.transpose(0, 1)


def finals(rnn: Any, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return the output and the last states, examples first."""
    found, last = rnn(x if rnn.batch_first else x.transpose(0, 1))
    states = last if isinstance(last, tuple) else (last,)
    return found, x, tuple(each.transpose(0, 1) for each in states)


def last_h(rnn: Any, x: Tensor) -> Tensor:
    return finals(rnn, x)[2][0].flatten(1)


def last_c(rnn: Any, x: Tensor) -> Tensor:
    return finals(rnn, x)[2][1].flatten(1)


def everything(rnn: Any, x: Tensor) -> Tensor:
    found, last = rnn(x if rnn.batch_first else x.transpose(0, 1))
    found = found if rnn.batch_first else found.transpose(0, 1)
    states = last if isinstance(last, tuple) else (last,)
    return torch.cat([found.flatten(1), *(each.transpose(0, 1).flatten(1) for each in states)], 1)


def encoder(rnn: Any, x: Tensor) -> Tensor:
    """Let the last states of one call begin the next one."""
    _, last = rnn(x.transpose(0, 1))
    return output(rnn, x.flip(1), last)


def in_place(rnn: Any, x: Tensor) -> Tensor:
    return output(rnn, x).mul_(2).tanh()


LENGTHS = torch.tensor([2, 4, 3])


def packed(rnn: Any, x: Tensor, lengths: Tensor = LENGTHS, **how: Any) -> Tensor:
    source = pack_padded_sequence(x, lengths, batch_first=True, **how)
    found, last = rnn(source)
    padded, _ = pad_packed_sequence(found, batch_first=True)
    states = last if isinstance(last, tuple) else (last,)
    return torch.cat([padded.flatten(1), *(each.transpose(0, 1).flatten(1) for each in states)], 1)


def given_states(rnn: Any, x: Tensor) -> Tensor:
    number = rnn.num_layers * (2 if rnn.bidirectional else 1)
    width = getattr(rnn, "proj_size", 0) or H
    h, c = rows(number, len(x), width, seed=8), rows(number, len(x), H, seed=9)
    return output(rnn, x, (h, c) if isinstance(rnn, nn.LSTM) else h)


def unbatched(rnn: Any, x: Tensor) -> Tensor:
    found, last = rnn(x[0])
    states = last if isinstance(last, tuple) else (last,)
    return torch.cat([found.flatten(), *(each.flatten() for each in states)]).unsqueeze(0)


def unbatched_states(rnn: Any, x: Tensor) -> Tensor:
    h = rows(1, H, seed=8)
    return rnn(x[0], (h, 2 * h) if isinstance(rnn, nn.LSTM) else h)[0].unsqueeze(0)


def loop(cell: Any, x: Tensor) -> Tensor:
    """Call a cell in a loop; return each h and the last state."""
    states, found = None, []
    for step in x.unbind(1):
        states = cell(step, states)
        found.append(states[0] if isinstance(states, tuple) else states)
    if isinstance(states, tuple):
        found += [states[1], 3 * states[1]]
    return torch.stack(found, 1)


def only_c(cell: Any, x: Tensor) -> Tensor:
    states = None
    for step in x.unbind(1):
        states = cell(step, states)
    assert states is not None
    return states[1]


def one_alone(cell: Any, x: Tensor) -> Tensor:
    h = rows(H, seed=8)
    states: Any = (h, 2 * h) if isinstance(cell, nn.LSTMCell) else h
    for step in x[0]:
        states = cell(step, states)
    both = torch.cat(states) if isinstance(states, tuple) else states
    return both.unsqueeze(0)


X = rows(N, T, D)
KINDS: dict[str, Any] = {
    "tanh": nn.RNN,
    "relu": lambda *sizes, **how: nn.RNN(*sizes, nonlinearity="relu", **how),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
CELLS: dict[str, Any] = {
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **how: nn.RNNCell(*sizes, nonlinearity="relu", **how),
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
}
Case = tuple[dict[str, Any], Callable[..., Tensor]]
CASES: dict[str, Case] = {
    "time first": ({}, output),
    "batch first": ({"batch_first": True}, output),
    "without bias": ({"bias": False}, output),
    "two layers": ({"num_layers": 2}, output),
    "both directions": ({"bidirectional": True}, output),
    "all": ({"num_layers": 3, "bidirectional": True, "batch_first": True}, everything),
    "last h": ({"num_layers": 2}, last_h),
    "output and states": ({"batch_first": True}, everything),
    "given states": ({"num_layers": 2, "bidirectional": True}, given_states),
    "states of another call": ({"num_layers": 2}, encoder),
    "changed in place": ({}, in_place),
    "dropout": ({"num_layers": 3, "dropout": 0.5}, everything),
    "dropout in both directions": (
        {"num_layers": 2, "dropout": 0.5, "bidirectional": True, "batch_first": True},
        everything,
    ),
    "one example": ({"num_layers": 2}, unbatched),
    "one example with states": ({}, unbatched_states),
    "packed": ({}, lambda rnn, x: packed(rnn, x, enforce_sorted=False)),
    "packed and sorted": ({}, lambda rnn, x: packed(rnn, x, torch.tensor([4, 2, 1]))),
    "packed with all": (
        {"num_layers": 2, "bidirectional": True, "dropout": 0.4},
        lambda rnn, x: packed(rnn, x, enforce_sorted=False),
    ),
}
OF_LSTM: dict[str, Case] = {
    "last c": ({"num_layers": 2, "bidirectional": True}, last_c),
    "projected": ({"num_layers": 2, "proj_size": 1, "bidirectional": True}, everything),
    "projected and packed": (
        {"num_layers": 2, "proj_size": 1},
        lambda rnn, x: packed(rnn, x, enforce_sorted=False),
    ),
    "projected with states": ({"proj_size": 1}, given_states),
}


def drawn(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * rows(*parameter.shape, seed=number + 20))
    return module


def model_of(kind: str, case: Case) -> Calls:
    settings, function = case
    return Calls(drawn(KINDS[kind](D, H, **settings).double()), function)


def check(model: nn.Module, bound: float = 1e-12) -> None:
    cotangent = rows(*model(X).shape, seed=5)
    expected = INSIDE.autograds(model, [X], cotangent)
    assert deviation(INSIDE.gradients(model, [X], cotangent), expected) < bound


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_inside_are_those_of_autograd(kind: str, case: Case) -> None:
    check(model_of(kind, case))


@pytest.mark.parametrize("case", OF_LSTM.values(), ids=list(OF_LSTM))
def test_what_lstm_alone_has_is_that_of_autograd(case: Case) -> None:
    check(model_of("lstm", case))


@pytest.mark.parametrize("function", [loop, one_alone])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_cells_are_those_of_autograd(
    kind: str, bias: bool, function: Callable[..., Tensor]
) -> None:
    check(Calls(drawn(CELLS[kind](D, H, bias=bias).double()), function))


def test_a_loss_of_the_last_c_alone_is_followed() -> None:
    check(Calls(drawn(nn.LSTMCell(D, H).double()), only_c))
