"""Gradients inside recurrent modules are autograd's, example by example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import kfactk
from kfactk import CaptureError, Layer
from kfactk.testing import CurvatureLaws, PipelineLaws
from kfactk.testing._support.division import on_ranks
from kfactk.testing._support.truth import solve
from kfactk_stages.curvature.rnn import Rnn
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
from tests.kfactk_stages.curvature.recurrent import by_hand

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


class TestRnnOfDiagonals(CurvatureLaws):
    stage: ClassVar[Any] = {"name": "rnn", "max_side": 2, "wide": "diagonal"}


# ----------------------------------------------------------------------------------- per example


def output(rnn: Any, x: Tensor, *states: Any) -> Tensor:
    """Return the output for `[N, T, D]`, whatever the module's layout."""
    found: Tensor = rnn(x if rnn.batch_first else x.transpose(0, 1), *states)[0]
    return found if rnn.batch_first else found.transpose(0, 1)


def flat(last: Any) -> list[Tensor]:
    """Return last states, examples first, as `[N, *]` each."""
    states = last if isinstance(last, tuple) else (last,)
    return [each.transpose(0, 1).flatten(1) for each in states]


def last_h(rnn: Any, x: Tensor) -> Tensor:
    return flat(rnn(x.transpose(0, 1))[1])[0]


def last_c(rnn: Any, x: Tensor) -> Tensor:
    return flat(rnn(x.transpose(0, 1))[1])[1]


def everything(rnn: Any, x: Tensor) -> Tensor:
    found, last = rnn(x if rnn.batch_first else x.transpose(0, 1))
    found = found if rnn.batch_first else found.transpose(0, 1)
    return torch.cat([found.flatten(1), *flat(last)], 1)


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
    return torch.cat([padded.flatten(1), *flat(last)], 1)


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
    "states in a list": ({}, lambda rnn, x: output(rnn, x, [rows(1, N, H), rows(1, N, H, seed=1)])),
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


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_fused_kernels_in_float32_are_followed(kind: str) -> None:
    case: Case = ({"num_layers": 2, "bidirectional": True, "dropout": 0.3}, everything)
    model, x = model_of(kind, case).float(), X.float()
    cotangent = rows(*model(x).shape, seed=5).float()
    expected = INSIDE.autograds(model, [x], cotangent)
    assert deviation(INSIDE.gradients(model, [x], cotangent), expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["output and states", "packed with all"])
def test_autocast_of_the_call_is_that_of_its_replay(kind: str, name: str) -> None:
    model, x = model_of(kind, CASES[name]).float(), X.float()
    cotangent = rows(*model(x).shape, seed=5).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = INSIDE.autograds(model, [x], cotangent)
        found = INSIDE.gradients(model, [x], cotangent)
    assert deviation(found, expected) < 0.03  # a few times the precision of bfloat16


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "bias_ih_l0", "weight_ih_l1"])
def test_what_is_frozen_is_left_out(frozen: str) -> None:
    model = model_of("gru", CASES["dropout"])
    model.rnn.get_parameter(frozen).requires_grad_(False)
    layers = [layer.parameters for layer in INSIDE.layers_of(model)]
    assert frozen not in [name for names in layers for name in names]
    assert len(layers) == (6 if frozen.startswith("bias") else 5)
    check(model)


def test_a_module_called_twice_has_the_rows_of_both() -> None:
    def twice(rnn: Any, x: Tensor) -> Tensor:
        first = output(rnn, x)
        return output(rnn, F.pad(first[:, :2], (0, D - H))) + last_h(rnn, x)[:, None, :H]

    check(Calls(model_of("lstm", CASES["two layers"]).rnn, twice))


def test_evaluation_has_no_dropout() -> None:
    check(model_of("lstm", CASES["dropout"]).eval())


# ------------------------------------------------------------------------------- factors and steps


class Classifier(nn.Module):
    """Classifies examples of several lengths by the last h; the last number is the length."""

    def __init__(self, kind: str = "lstm", **settings: Any) -> None:
        super().__init__()
        self.rnn = drawn(KINDS[kind](3, 2, **settings).double())
        self.head = drawn(nn.Linear(2, 3).double())

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[:, 0, -1].abs().mul(10).long() % 3 + 2
        source = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        last = self.rnn(source)[1]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


def lengths_of(x: Tensor) -> list[int]:
    return [int(abs(float(each)) * 10) % 3 + 2 for each in x[:, 0, -1]]


def moments_by_hand(model: Any, x: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return A, G and D of both layers, by a loop over examples, classes and steps."""
    found: dict[str, list[Any]] = {}
    for example, length in zip(x, lengths_of(x), strict=True):
        _, h, products = by_hand(model.rnn, example[:length])
        logs = model.head(h[-1]).log_softmax(-1)
        for part, steps in products.items():
            ones = [torch.cat([a, a.new_ones(1)]) for a, _ in steps]
            a_sum, g_sum, d = found.setdefault(part, [0, 0, []])
            a_sum = a_sum + sum(torch.outer(a, a) for a in ones) / len(x)
            for log in logs:
                score = -log * log.detach().exp().sqrt()
                grads = torch.autograd.grad(score, [out for _, out in steps], retain_graph=True)
                g_sum = g_sum + sum(torch.outer(g, g) for g in grads) / len(x) / length
                d.append(sum(torch.outer(g, a) for g, a in zip(grads, ones, strict=True)))
            found[part] = [a_sum, g_sum, d]
    return {part: (a, g, torch.stack(d)) for part, (a, g, d) in found.items()}


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_a_step_is_that_of_dense_algebra(kind: str, basis: str, wide: str | None) -> None:
    tau, lr, x = 0.03, 0.1, rows(9, 4, 3)
    model = Classifier(kind)
    truth = moments_by_hand(model, x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    how = {"update": torch.optim.SGD, "clip": "none", "damping": tau, "lr": lr, "fisher": "exact"}
    curvature = [limited("rnn", wide), "kfac"]
    optimizer = kfactk.build(curvature=curvature, basis=basis, **how).bind(model)
    F.cross_entropy(model(x), torch.arange(9) % 3).backward()
    optimizer.step()
    for part, (a, g, d) in truth.items():
        view = optimizer.layers[f"rnn[{part}]"]
        parts = stand_ins("A", a, MOST, wide) | stand_ins("G", g, MOST, wide)
        for name, part in parts.items():
            torch.testing.assert_close(view.factors[name], part, rtol=1e-10, atol=1e-12)
        names = [f"rnn.{key}" for key in view.layer.parameters]
        grads = [model.get_parameter(name).grad for name in names]
        changes = [(before[n] - model.get_parameter(n).detach()) / lr for n in names]
        v, step = (torch.cat([each[0], each[1].unsqueeze(-1)], -1) for each in (grads, changes))
        kept = (masked(each, MOST, wide) for each in (a, g))
        block = block_of(basis, *kept, d, len(x), tau)
        torch.testing.assert_close(step, solve(block, v), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("option", [{"max_side": 4}, {"wide": "blocks"}])
def test_a_chain_has_whole_sides_alone(option: dict[str, Any]) -> None:
    with pytest.raises(kfactk.OptionError, match="time='chain' needs whole ones"):
        Rnn(time="chain", **option)
    module = nn.LSTM(2, 600, device="meta")  # a side of 2400 beside one of 3
    layer = Layer("rnn[ih_l0]", module, ("weight_ih_l0", "bias_ih_l0"), "ih_l0")
    assert Rnn().stand_ins(layer) == {"G": ("g",)}
    assert Rnn(time="chain").stand_ins(layer) == {}
    assert Rnn(time="chain", max_side=None).stand_ins(layer) == {}


class TestRecurrent(PipelineLaws):
    """The laws of recipes, on a recurrent model: ranks, resuming, accumulation."""

    recipe: ClassVar[Any] = {"curvature": "all", "update": torch.optim.SGD, "lr": 0.01}

    def model(self) -> nn.Module:
        return Classifier("gru", bidirectional=True)

    def batch(self, generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(examples, 4, 3, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (examples,), generator=generator)


@pytest.mark.parametrize("wide", WIDE[1:])
def test_wide_sides_resume_to_the_bit(wide: str) -> None:
    check_resumes(TestRecurrent(), [limited("rnn", wide), "kfac"])


@on_ranks
@pytest.mark.parametrize(("wide", "placement"), SPREAD)
def test_wide_sides_on_two_ranks_are_those_of_one_process(wide: str, placement: str) -> None:
    check_ranks(TestRecurrent(), [limited("rnn", wide), "kfac"], placement)


# ---------------------------------------------------------------------------------- what is covered


class LanguageModel(nn.Module):
    """Predicts the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(9, 4), nn.LSTM(4, 5, 2, batch_first=True)
        self.head = nn.Linear(5, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(tokens))[0])


def test_a_language_model_is_covered_whole_and_learns() -> None:
    torch.manual_seed(0)
    model, tokens = LanguageModel(), torch.randint(9, (4, 8))
    likelihood = {"name": "categorical", "class_axis": -1}
    recipe = kfactk.build(curvature="all", likelihood=likelihood, lr=0.05, update="adam")
    assert recipe.coverage(model).plain == ()
    optimizer, losses = recipe.bind(model), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


class Step(nn.Module):
    """One step of a loop outside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        states = self.cell(x, states)
        return self.head(states[0]), states


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_loop_outside_the_model_is_refused(fisher: str) -> None:
    model = Step()
    optimizer = kfactk.build(curvature="all", fisher=fisher, output=lambda r: r[0]).bind(model)
    _, states = model(torch.randn(5, 3))
    with pytest.raises(CaptureError, match=r"cell\[ih\].*recurrent loop outside the bound model"):
        F.cross_entropy(model(torch.randn(5, 3), states)[0], torch.arange(5) % 3).backward()
    optimizer.close()


def changed(change: Callable[[Any], object], **how: Any) -> nn.Module:
    module = nn.LSTM(3, 2, **how)
    change(module)
    return module


class Halved(nn.GRU):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)[0] / 2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Halved(3, 2), "Halved is a subclass of GRU"),
        (changed(lambda m: setattr(m, "forward", torch.tanh)), "its forward was replaced"),
        (
            changed(lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5)),
            "its weight_hh_l0 is computed from other parameters",
        ),
        (
            changed(lambda m: parametrize.register_parametrization(m, "weight_ih_l0", nn.Tanh())),
            "its state is parametrized",
        ),
        (nn.Linear(2, 2), "no curvature for Linear"),
    ],
    ids=["subclass", "forward", "pruned", "parametrized", "linear"],
)
def test_what_cannot_be_exact_has_a_reason(module: nn.Module, reason: str) -> None:
    assert str(Rnn().unsupported(module)).startswith(reason)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("how", "refused"),
    [({"num_layers": 2, "dropout": 0.5}, True), ({"num_layers": 2}, False), ({}, False)],
    ids=["dropout", "two layers", "one layer"],
)
def test_dropout_that_cudnn_draws_has_a_reason(how: dict[str, Any], refused: bool) -> None:
    with FakeTensorMode():
        module = nn.LSTM(3, 2, device="cuda", **how)
        reason = Rnn().unsupported(module)
        with torch.backends.cudnn.flags(enabled=False):
            assert Rnn().unsupported(module) is None
    assert (reason is not None) == refused
    assert reason is None or "torch.backends.cudnn.enabled = False" in reason
