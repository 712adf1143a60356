"""A chain over time in the loops that train language models, and in their checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import kfactk
from kfactk import CombinationError, StateError
from tests.kfactk_stages.curvature.inside import rows
from tests.kfactk_stages.curvature.recurrent import by_hand
from tests.kfactk_stages.curvature.test_rnn import KINDS, drawn
from tests.kfactk_stages.curvature.test_rnn_chain import (
    CHAIN,
    HOW,
    Moments,
    add,
    check_factors,
    check_step,
)

OWN = kfactk.block("kfac", basis="kfac")
OFTEN: Mapping[str, Any] = {"factor_every": 1, "basis_every": 1}
SYMBOLS, LENGTH = 7, 6


# ------------------------------------------------------------------------- states that are carried


class Stack(nn.Module):
    """Classifies by the sum of the outputs of several layers."""

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        self.rnn = drawn(KINDS[kind](3, 2, batch_first=True, **settings).double())
        width = 2 * (2 if settings.get("bidirectional") else 1)
        self.head = drawn(nn.Linear(width, 3).double())

    def forward(self, x: Tensor, lengths: Tensor, states: Any) -> tuple[Tensor, Any]:
        source = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        found, states = self.rnn(source, states)
        return self.head(pad_packed_sequence(found, batch_first=True)[0].sum(1)), states


def moments_of(model: Any, x: Tensor, lengths: Tensor, states: Any) -> dict[str, Moments]:
    """Return the moments of all parts, example by example."""
    found: dict[str, Moments] = {}
    for n, length in enumerate(lengths.tolist()):
        own = None if states is None else tuple(each[:, n] for each in states)
        outputs, _, products = by_hand(model.rnn, x[n, :length], own)
        logs = model.head(outputs.sum(0)).log_softmax(-1)
        for part, steps in products.items():
            add(found, part, steps, logs, len(x))
    return found


@pytest.mark.parametrize("settings", [{"bidirectional": True}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_steps_from_carried_states_are_those_of_dense_algebra(
    kind: str, settings: dict[str, Any]
) -> None:
    """States of the batch before begin the next one, detached, on sequences of all lengths."""
    model, states = Stack(kind, **settings), None
    recipe = kfactk.build(
        curvature=[CHAIN, OWN], basis="lgm", damping=0.03, lr=0.1, factor_decay=0.0, **OFTEN, **HOW
    )
    optimizer = recipe.bind(model)
    for step in range(3):
        x, lengths = rows(4, 3, 3, seed=step), torch.tensor([3, 1, 2, 1 + step])
        carried = None
        if states is not None:
            states = tuple(s.detach() for s in (states if kind == "lstm" else (states,)))
            carried = (states[0], states[-1])
        moments = moments_of(model, x, lengths, carried)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        given = states if kind == "lstm" or states is None else states[0]
        output, states = model(x, lengths, given)
        F.cross_entropy(output, torch.arange(4) % 3).backward()
        optimizer.step()
        check_factors(optimizer, moments)
        check_step(optimizer, model, before, moments, 2)


# ------------------------------------------------------------------------------- language models


class Language(nn.Module):
    """Predicts the next symbol; the matrix of the output is that of the symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(SYMBOLS, 4), nn.LSTM(4, 4, 2, batch_first=True)
        self.head = nn.Linear(4, SYMBOLS)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        found, states = self.rnn(self.table(tokens), states)
        return self.head(found), states


def language(**how: Any) -> tuple[Language, Any]:
    torch.manual_seed(0)
    model = Language()
    recipe = kfactk.build(
        curvature=[CHAIN, "embedding", OWN],
        likelihood={"name": "categorical", "class_axis": -1},
        **{"basis": "lgm", "update": "sgd", "lr": 0.1, "damping": 0.03, **OFTEN, **how},
    )
    assert recipe.coverage(model).plain == ()
    return model, recipe.bind(model)


def trained(
    model: Language,
    optimizer: Any,
    steps: range,
    call: Callable[..., Any] | None = None,
    precision: torch.dtype | None = None,
) -> list[float]:
    """Train on a text piece by piece, with the states carried on."""
    text = torch.randint(SYMBOLS, (3, 100), generator=torch.Generator().manual_seed(1))
    call = model if call is None else call
    states, losses = None, []
    for step in steps:
        piece = text[:, step * LENGTH : (step + 1) * LENGTH + 1]
        with torch.autocast("cpu", precision, enabled=precision is not None):
            output, states = call(piece[:, :-1], states)
        states = tuple(each.detach() for each in states)
        loss = F.cross_entropy(output.flatten(0, 1).float(), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.counters == {"skipped_batches": 0, "failed_decompositions": 0}
    return losses


def parameters_of(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_a_compiled_model_trains_as_the_model() -> None:
    model, optimizer = language()
    other, another = language()
    expected = trained(model, optimizer, range(4))
    compiled = torch.compile(other, backend="eager")
    assert trained(other, another, range(4), compiled) == pytest.approx(expected, rel=1e-5)


def test_autocast_trains_as_single_precision_does() -> None:
    model, optimizer = language()
    other, another = language()
    expected = trained(model, optimizer, range(4))
    found = trained(other, another, range(4), precision=torch.bfloat16)
    assert found == pytest.approx(expected, rel=0.02)
    assert found != expected
    values = another.layers["rnn[hh_l1]"].block.state.factor_values().values()
    assert {each.dtype for each in values} == {torch.float32}


def test_two_models_in_one_loop_are_apart() -> None:
    """A copy of a trained model, with an optimizer of its own, does not disturb the first."""
    model, optimizer = language()
    trained(model, optimizer, range(2))
    copied = copy.deepcopy(model)
    alone, single = language()
    trained(alone, single, range(2))
    own = optimizer.recipe.bind(copied)
    for step in range(2, 4):
        trained(model, optimizer, range(step, step + 1))
        trained(copied, own, range(step, step + 1))
        trained(alone, single, range(step, step + 1))
    assert torch.equal(parameters_of(model), parameters_of(alone))
    assert not torch.equal(parameters_of(model), parameters_of(copied))


def test_a_module_that_is_called_step_by_step_has_no_pairs() -> None:
    """A loop outside the module gives sequences of one step: steps are independent."""

    class Steps(Language):
        def forward(self, tokens: Tensor, states: Any = None) -> tuple[Tensor, Any]:
            found = []
            for each in tokens.unbind(1):
                output, states = super().forward(each.unsqueeze(1), states)
                found.append(output)
            return torch.cat(found, 1), states

    ends = []
    for curvature in (CHAIN, kfactk.block("rnn", basis="kfac")):
        torch.manual_seed(0)
        model = Steps()
        recipe = kfactk.build(
            curvature=[curvature, "embedding", OWN],
            likelihood={"name": "categorical", "class_axis": -1},
            basis="kfac",
            **{"update": "sgd", "lr": 0.1, "damping": 0.03},
        )
        trained(model, recipe.bind(model), range(3))
        ends.append(parameters_of(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(400, 401), (399, 400)])
def test_long_sequences_that_differ_by_a_step_are_of_one_length(lengths: tuple[int, int]) -> None:
    """Their mean number of steps is no whole number, and gains may be negative."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    model = Last()
    recipe = kfactk.build(
        curvature=[CHAIN, OWN], basis={"name": "lgm", "option": 1}, update="sgd", lr=0.01, **OFTEN
    )
    optimizer = recipe.bind(model)
    for length in lengths:
        signs = (-1.0) ** torch.arange(length)[:, None]
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(3, length, 2) * signs), torch.arange(3) % 2).backward()
        optimizer.step()
    assert optimizer.counters == {"skipped_batches": 0, "failed_decompositions": 0}


# ------------------------------------------------------------------------------------ checkpoints


def saved(**how: Any) -> dict[str, Any]:
    model, optimizer = language(**how)
    trained(model, optimizer, range(2))
    return copy.deepcopy(optimizer.state_dict())


def changed(state: dict[str, Any], key: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of a saved state."""
    [entry] = [each for each in state["state"].values() if key in each]
    entry[key] = change(entry[key])


PART = "kfactk.[hh_l1]."
DAMAGES: dict[str, tuple[int, str, Callable[[Tensor], Tensor], str]] = {
    "a root of another size": (2, "basis.A.root", lambda t: torch.eye(9), "has the shape"),
    "a next one of another size": (2, "basis.G.next", lambda t: t[:, :-1], "has the shape"),
    "other gains": (1, "basis.A.gains", lambda t: torch.ones(9), "has the shape"),
    "several numbers": (1, "basis.steps.number", lambda t: t.repeat(2), "has the shape"),
    "half precision": (2, "basis.A.root", Tensor.half, "float16"),
    "a root of zeros": (2, "basis.G.root", torch.zeros_like, "cannot be inverted"),
    "too large gains": (2, "basis.A.gains", lambda t: 9 * t, "more than 1 in size"),
    "a too large next one": (2, "basis.A.next", lambda t: 99 * t, "rows longer than 1"),
    "half a step": (1, "basis.steps.number", lambda t: t + 0.5, "no whole number"),
    "mixed factors": (2, "factor.A_next", Tensor.double, "several dtypes"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_chain_is_refused(damage: tuple[int, str, Any, str]) -> None:
    option, key, change, words = damage
    basis = {"name": "lgm", "option": option}
    state = saved(basis=basis)
    changed(state, PART + key, change)
    _, optimizer = language(basis=basis)
    with pytest.raises(StateError, match=words):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("other", ["kfac", {"name": "lgm", "option": 1}], ids=str)
def test_the_state_of_another_recipe_is_named_as_such(other: Any) -> None:
    model = Language()
    recipe = kfactk.build(
        curvature=["rnn" if other == "kfac" else CHAIN, "embedding", OWN],
        likelihood={"name": "categorical", "class_axis": -1},
        **{"basis": other, "update": "sgd", "lr": 0.1, **OFTEN},
    )
    optimizer = recipe.bind(model)
    trained(model, optimizer, range(2))
    _, mine = language()
    with pytest.raises(StateError, match=r"does not fit.*Bind the recipe it was saved with"):
        mine.load_state_dict(optimizer.state_dict())


# --------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("name", ["kfac", "rnn"])
def test_a_curvature_beside_the_chain_is_told_to_have_its_own_basis(name: str) -> None:
    words = rf"another curvature of the recipe does.*: kfactk\.block\('{name}', basis='kfac'\)"
    with pytest.raises(CombinationError, match=words):
        kfactk.build(curvature=[CHAIN, name], basis="lgm")
    kfactk.build(curvature=[CHAIN, kfactk.block(name, basis="kfac")], basis="lgm")


def test_options_of_such_a_curvature_stand_in_what_to_paste() -> None:
    with pytest.raises(CombinationError, match=r"block\(\{'name': 'kfac', 'batch_dim': 1\}, basis"):
        kfactk.build(curvature=[CHAIN, {"name": "kfac", "batch_dim": 1}], basis="lgm")


def test_a_controller_of_damping_names_what_the_chain_measures() -> None:
    how = {"controller": "quadratic", "update": "velocity"}
    with pytest.raises(CombinationError, match=r"'eigh'\}, and curvature 'rnn' without what .*A_n"):
        kfactk.build(curvature=CHAIN, basis="lgm", **how)
    kfactk.build(curvature="rnn", basis={"name": "kfac", "solver": "eigh"}, **how)
