"""Layers that do not run at every step, that are left alone, or whose input is overwritten."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, OptionError
from tests.kfactk.small import F64, assert_equal, batch, bound, net, train, values


class Switch(nn.Module):
    """Two linear layers, and a third in between when it is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sometimes, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, call: bool = False) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.sometimes(x)) if call else x)


def call(optimizer: kfactk.Optimizer, model: Switch, with_it: bool) -> dict[str, Tensor]:
    """One step; how `sometimes` moved, over the learning rate, beside its plain gradient."""
    before = model.sometimes.weight.detach().clone()
    optimizer.zero_grad()
    x, y = batch(8)
    F.cross_entropy(model(x, with_it), y).backward()
    gradient = model.sometimes.weight.grad
    optimizer.step()
    return {
        "moved": (before - model.sometimes.weight.detach()) / 0.1,
        "plain": torch.zeros_like(before) if gradient is None else gradient,
    }


def test_a_layer_that_does_not_run_when_it_is_due_is_waited_for() -> None:
    torch.manual_seed(0)
    model = Switch().double()
    optimizer = bound(model, factor_every=4, scale_every=4, basis_every=4)
    followed = {}
    steps = iter(range(12))

    def watch(*_: object) -> None:
        followed[optimizer.steps] = len(model.sometimes._forward_hooks)

    handle = model.sometimes.register_forward_pre_hook(watch)
    for step in steps:
        runs = step in (1, 2, 6, 7, 8, 9)  # never when it is due, but for step 8
        found = call(optimizer, model, with_it=runs)
        assert torch.allclose(found["moved"], found["plain"], rtol=1e-6, atol=1e-12) == (
            not runs
        ), step
    handle.remove()
    assert followed == {1: 1, 2: 0, 6: 1, 7: 0, 8: 1, 9: 0}


def test_layers_that_run_by_turns_all_get_their_curvature_refreshed() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.heads = (
                nn.Linear(4, 4),
                nn.ModuleList(nn.Linear(4, 3) for _ in range(2)),
            )

        def forward(self, x: Tensor, slot: int) -> Tensor:
            return self.heads[slot](torch.tanh(self.trunk(x)))

    torch.manual_seed(0)
    model = Turns().double()
    optimizer = bound(model, factor_every=4, scale_every=4, basis_every=4, factor_decay=0.0)
    seen: dict[str, list[Tensor]] = {"heads.0": [], "heads.1": []}
    for step in range(10):
        optimizer.zero_grad()
        x, y = batch()
        F.cross_entropy(model(x, step % 2), y).backward()
        optimizer.step()
        for name, found in seen.items():
            factors = optimizer.layers[name].factors
            if factors and not (found and torch.equal(found[-1], factors["A"])):
                found.append(factors["A"])
                hidden = torch.cat([torch.tanh(model.trunk(x)), torch.ones(6, 1, dtype=F64)], 1)
                assert factors["A"].shape == (hidden.T @ hidden).shape
    assert {name: len(found) for name, found in seen.items()} == {"heads.0": 3, "heads.1": 3}


@pytest.mark.parametrize("saved_at", [3, 5, 9])
def test_a_run_with_a_layer_that_does_not_always_run_resumes_bit_for_bit(saved_at: int) -> None:
    def go_on(optimizer: kfactk.Optimizer, model: Switch, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            call(optimizer, model, with_it=step in (5, 8, 9, 11))

    torch.manual_seed(0)
    model = Switch().double()
    twin = Switch().double()
    recipe = kfactk.build(factor_every=4, scale_every=4, basis_every=4, lr=0.1)
    optimizer = recipe.bind(model)
    go_on(optimizer, model, range(saved_at))
    twin.load_state_dict(model.state_dict())
    resumed = recipe.bind(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go_on(optimizer, model, range(saved_at, 14))
    go_on(resumed, twin, range(saved_at, 14))
    assert_equal(values(model), values(twin))


@pytest.mark.parametrize("basis", ["ekfac", "kfac", {"name": "ekfac", "scale": "running"}])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_batch_of_which_every_term_is_masked_counts_for_nothing(
    basis: object, fisher: str
) -> None:
    class Weighted(nn.Sequential):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model = Weighted(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = bound(
        model,
        basis=basis,
        fisher=fisher,
        likelihood={"name": "categorical", "weights": "w"},
        factor_every=1,
    )
    x, y = batch()
    for weight, size in ((0.0, 1.0), (1.0, 1.0), (0.0, 1e6)):
        optimizer.zero_grad()
        F.cross_entropy(model(x * size, torch.full((6,), weight)), y).backward()
        before = dense_factors(optimizer)
        optimizer.step()
        after = dense_factors(optimizer)
        same = set(before) == set(after) and all(
            torch.equal(before[key], after[key]) for key in before
        )
        assert same == (weight == 0)


def dense_factors(optimizer: kfactk.Optimizer) -> dict[tuple[str, str], Tensor]:
    return {
        (name, factor): value
        for name, view in optimizer.layers.items()
        for factor, value in view.factors.items()
    }


def test_rows_that_are_not_the_outputs_examples_are_told() -> None:
    class Folded(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
            found = super().forward(x.flatten(0, 1)[order])[order.argsort()]
            return found.unflatten(0, x.shape[:2]).mean(1)

    torch.manual_seed(0)
    model = Folded(nn.Linear(4, 3)).double()
    optimizer = bound(model)
    with pytest.warns(
        kfactk.KfactkWarning,
        match="layer '0': 2 of its 12 rows in dimension 0 belong to one example",
    ):
        F.cross_entropy(model(torch.randn(6, 2, 4, dtype=F64)), torch.arange(6) % 3).backward()
    optimizer.step()


def test_an_expert_that_the_first_example_does_not_reach_is_not_told() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

        def forward(self, x: Tensor) -> Tensor:
            out = x.new_zeros(len(x), 3)
            for number, expert in enumerate(self.experts):
                out[number::2] = expert(x[number::2])
            return out

    torch.manual_seed(0)
    model = Routed().double()
    optimizer = bound(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(torch.randn(6, 4, dtype=F64)), torch.arange(6) % 3).backward()
    optimizer.step()


def test_all_layers_with_such_rows_are_told_in_one_warning() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.late, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.calls_late = False

        def forward(self, x: Tensor) -> Tensor:
            order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
            folded = self.inner(x.flatten(0, 1)[order])
            folded = (self.late(folded) if self.calls_late else folded)[order.argsort()]
            output: Tensor = self.head(folded.unflatten(0, x.shape[:2]).mean(1))
            return output

    def told(model: nn.Module) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(torch.randn(6, 2, 4, dtype=F64))
        return [str(each.message) for each in caught]

    torch.manual_seed(0)
    model = Folded().double()
    optimizer = bound(model)
    [message] = told(model)
    assert "Layers 'inner.2' have a fault" in message
    assert "exclude=['inner.0', 'inner.2']" in message
    optimizer.close()

    model.calls_late = False  # a layer without a call in the first forward is looked at later
    optimizer = bound(model, exclude=["inner"])
    assert not told(model)
    optimizer.zero_grad()
    model.calls_late = True
    assert "exclude=['late']" in told(model)[0]
    optimizer.close()


@pytest.mark.parametrize("parts", [6, 3])
def test_a_layer_that_runs_on_parts_of_the_batch_is_told(parts: int) -> None:
    class Looped(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(Looped, self).forward(part) for part in x.chunk(parts)])

    torch.manual_seed(0)
    model = Looped(nn.Linear(4, 3)).double()
    optimizer = bound(model)
    told = f"layer '0' runs {parts} times in a forward, each time on other examples"
    with pytest.warns(kfactk.KfactkWarning, match=told):
        model(torch.randn(6, 4, dtype=F64))
    optimizer.close()


def test_one_position_before_a_batch_norm_is_no_sign_of_another_layout() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.out = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.norm(self.a(x)[:, 0]))
            return out

    torch.manual_seed(0)
    model = First().double()
    optimizer = bound(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", kfactk.KfactkWarning)
        model(torch.randn(6, 5, 4, dtype=F64))
    optimizer.close()


def test_a_forward_in_another_thread_is_no_part_of_the_one_that_is_followed() -> None:
    torch.manual_seed(0)
    model = net()
    optimizer, inside, go = bound(model), threading.Event(), threading.Event()

    def halt(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(30)

    model[1].register_forward_hook(halt)

    def evaluate() -> None:
        with torch.no_grad():
            model(batch()[0])

    other = threading.Thread(target=evaluate)
    other.start()
    assert inside.wait(30)
    optimizer.zero_grad()
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    go.set()
    other.join()
    loss.backward()
    optimizer.step()
    rows = torch.cat([x, torch.ones(6, 1, dtype=F64)], 1)
    torch.testing.assert_close(
        optimizer.layers["0"].factors["A"], rows.T @ rows / 6, rtol=1e-12, atol=0
    )


def test_after_an_interrupted_forward_the_next_one_is_followed() -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model)
    handle = model[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(batch()[0])
    handle.remove()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    rows = torch.cat([x, torch.ones(6, 1, dtype=F64)], 1)
    torch.testing.assert_close(
        optimizer.layers["0"].factors["A"], rows.T @ rows / 6, rtol=1e-12, atol=0
    )


def test_a_layer_that_is_unfrozen_is_followed_at_once() -> None:
    torch.manual_seed(0)
    model = Switch().double()
    model.first.requires_grad_(False)
    optimizer = bound(model, factor_every=100, scale_every=100, basis_every=100)
    call(optimizer, model, with_it=False)
    model.first.requires_grad_(True)
    call(optimizer, model, with_it=False)
    assert set(optimizer.layers["first"].factors) == {"A", "G"}


@pytest.mark.parametrize("due", [0, 4])
def test_an_input_overwritten_before_the_step_that_still_reads_it_is_an_error_and_changes_nothing(
    due: int,
) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model, factor_every=4, scale_every=4, basis_every=4)
    for _ in range(due):
        train(optimizer, model, batch())
    x, y = batch()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    x.normal_()
    before = values(model)
    with pytest.raises(CaptureError, match="modified in place"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
    assert optimizer.steps == due


def test_excluded_layers_take_their_plain_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))).to(F64)
    recipe = kfactk.build(exclude=["1"], update="sgd", clip="none", lr=0.1)
    assert recipe.coverage(model).covered == ("0.weight", "0.bias")
    assert {row.reason for row in recipe.coverage(model) if row.block is None} == {
        "excluded (exclude='1')"
    }
    optimizer, before = recipe.bind(model), values(model)
    train(optimizer, model, batch())
    for old, parameter in list(zip(before, model.parameters(), strict=True))[2:]:
        torch.testing.assert_close(
            parameter.detach(), old - 0.1 * parameter.grad, rtol=1e-12, atol=0
        )
    assert kfactk.build(exclude=["1.*"]).coverage(model).covered == recipe.coverage(model).covered
    assert kfactk.Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_pattern_that_matches_nothing_names_what_there_is() -> None:
    with pytest.raises(
        OptionError,
        match=r"exclude='tail' matches no module.*Give one of: first, sometimes, last",
    ):
        kfactk.build(exclude=["tail"]).bind(Switch())
    with pytest.raises(OptionError, match="list of names"):
        kfactk.build(exclude="head")


@pytest.mark.parametrize("name", ["lr", "damping", "weight_decay"])
def test_infinite_numbers_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is inf"):
        kfactk.build(**{name: float("inf")})


@pytest.mark.parametrize("params", [None, "another model's"])
def test_a_model_of_which_nothing_is_preconditioned_is_told(params: str | None) -> None:
    model = nn.Sequential(nn.LayerNorm(4)) if params is None else net()
    with pytest.warns(kfactk.KfactkWarning, match="no layer is preconditioned"):
        kfactk.build().bind(model, None if params is None else net().parameters())


def test_a_layer_may_have_any_name() -> None:
    model = nn.Module()
    model.add_module("a|b", nn.Linear(4, 3))
    model.forward = lambda x: model.get_submodule("a|b")(x)
    optimizer = bound(model.double())
    train(optimizer, model, batch())
    assert set(optimizer.layers["a|b"].factors) == {"A", "G"}


def test_a_lazy_layer_is_reported_before_it_has_a_shape() -> None:
    table = str(kfactk.build().coverage(nn.Sequential(nn.LazyLinear(4))))
    assert "run one forward before binding" in table
