"""Entries: methods whose calls are forwards; what is measured, what is left alone and put back."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, OptionError
from kfactk.capture.entries import EntryMethod
from tests.kfactk.small import F64, assert_equal, factors, hooks

OPTIONS: dict[str, Any] = {
    **{"curvature": "kfac", "fisher": "exact", "clip": "none", "update": "sgd", "lr": 0.1},
    **{
        "damping": 0.05,
        "likelihood": [kfactk.head("1", "categorical"), kfactk.head("0", "gaussian")],
    },
}


class Policy(nn.Module):
    """As the policies of Stable-Baselines3: the loop calls `evaluate_actions`, not the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.action_net, self.value_net = nn.Linear(4, 2), nn.Linear(4, 1)
        self.double()

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Act: another output than that of `evaluate_actions`."""
        hidden = self.body(obs)
        return self.action_net(hidden).argmax(-1), self.value_net(hidden)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value, the logits, and the likelihood of actions."""
        hidden = self.body(obs)
        logits = self.action_net(hidden)
        return self.value_net(hidden), logits, -F.cross_entropy(logits, actions, reduction="none")

    def act_and_evaluate(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Use other entries inside."""
        self(obs)
        return self.evaluate_actions(obs, actions)


class Called(Policy):
    """The same, with its forward in place of the method: what any recipe can follow."""

    def forward(self, obs: Tensor, actions: Tensor) -> Any:
        return Policy.evaluate_actions(self, obs, actions)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(1)), torch.tensor(
        [0, 1, 1, 0, 1]
    )


def bound(model: nn.Module, entry: Any = "evaluate_actions", **options: Any) -> kfactk.Optimizer:
    return kfactk.build(**{**OPTIONS, **options}).bind(model, entry=entry)


def step(optimizer: kfactk.Optimizer, found: tuple[Tensor, Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    (found[0].square().mean() - found[2].mean()).backward()
    optimizer.step()


def truth() -> tuple[kfactk.Optimizer, nn.Module]:
    """Two steps of a model whose own forward is the method."""
    model = Called()
    optimizer = kfactk.build(**OPTIONS).bind(model)
    for _ in range(2):
        step(optimizer, model(*data()))
    return optimizer, model


@pytest.mark.parametrize(
    ("entry", "method"),
    [
        ("evaluate_actions", "evaluate_actions"),
        (["forward", "evaluate_actions"], "evaluate_actions"),
        (["act_and_evaluate"], "act_and_evaluate"),
        (("evaluate_actions", "act_and_evaluate", "forward"), "act_and_evaluate"),
    ],
)
def test_method_gives_the_curvature_of_a_forward(entry: Any, method: str) -> None:
    """Also where it calls the model, or another entry: the outermost is the forward."""
    model, (other, twin) = Policy(), truth()
    optimizer = bound(model, entry)
    for _ in range(2):
        if method == "evaluate_actions" and entry == "evaluate_actions":
            model(data()[0])  # acts, and does not count
        step(optimizer, getattr(model, method)(*data()))
    assert optimizer.steps == 2
    if method == "evaluate_actions":
        assert_equal(factors(optimizer), factors(other))
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_forward_counts_where_it_is_named() -> None:
    model, (other, _) = Called(), truth()
    optimizer = bound(model, ["evaluate_actions", "forward"])
    for _ in range(2):
        step(optimizer, model(*data()))
    assert_equal(factors(optimizer), factors(other))


def test_method_that_is_not_named_is_refused_with_the_line_to_write() -> None:
    model = Policy()
    optimizer = kfactk.build(**OPTIONS).bind(model)
    with pytest.raises(CaptureError, match=r"bind\(model, entry='evaluate_actions'\)"):
        step(optimizer, model.evaluate_actions(*data()))


class Quiet(Policy):
    """Keeps what the likelihoods read, and returns nothing."""

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> Any:
        self.found = super().evaluate_actions(obs, actions)


def test_heads_that_are_functions_need_nothing_that_is_returned() -> None:
    model, (other, _) = Quiet(), truth()
    heads = [
        kfactk.head(lambda _: model.found[1], "categorical"),
        kfactk.head(lambda _: model.found[0], "gaussian"),
    ]
    optimizer = bound(model, likelihood=heads)
    for _ in range(2):
        assert model.evaluate_actions(*data()) is None
        step(optimizer, model.found)
    assert_equal(factors(optimizer), factors(other))


def test_method_keeps_its_name_and_signature() -> None:
    model = Policy()
    optimizer = bound(model)
    assert list(inspect.signature(model.evaluate_actions).parameters) == ["obs", "actions"]
    assert model.evaluate_actions.__name__ == "evaluate_actions"
    assert "logits" in str(model.evaluate_actions.__doc__)
    optimizer.close()


def test_likelihood_reads_the_arguments_of_the_method() -> None:
    class Masked(Policy):
        def evaluate(self, obs: Tensor, *, weight: Tensor) -> Tensor:
            return self.action_net(self.body(obs))

    found = []
    for keep in (5, 3):
        model = Masked()
        optimizer = bound(
            model,
            "evaluate",
            likelihood={"name": "categorical", "weights": "weight"},
            exclude=["value_net"],
        )
        logits = model.evaluate(data()[0][:keep], weight=torch.arange(keep) < 3)
        F.cross_entropy(logits[:3], data()[1][:3]).backward()
        optimizer.step()
        found.append([optimizer.layers["action_net"].factors["G"]])
    assert_equal(*found)


@pytest.mark.parametrize("mode", ["no_grad", "eval"])
def test_calls_that_do_not_train_are_not_followed(mode: str) -> None:
    model = Policy()
    optimizer = bound(model)
    model.train(mode != "eval")
    with torch.set_grad_enabled(mode != "no_grad"):
        model.evaluate_actions(*data())
    model.train()
    step(optimizer, model.evaluate_actions(*data()))
    other = Policy()
    twin = bound(other)
    step(twin, other.evaluate_actions(*data()))
    assert_equal(factors(optimizer), factors(twin))


def test_observed_by_hand() -> None:
    model = Policy()
    optimizer = bound(model, observe="manual")
    found = model.evaluate_actions(*data())
    optimizer.observe()
    step(optimizer, found)
    assert optimizer.steps == 1


def test_call_that_raises_leaves_nothing_behind() -> None:
    model = Policy()
    optimizer = bound(model, ["evaluate_actions", "act_and_evaluate"])
    for error in (KeyboardInterrupt, ValueError):
        handle = model.value_net.register_forward_hook(_raising(error))
        with pytest.raises(error):
            model.act_and_evaluate(*data())
        handle.remove()
        assert hooks(model) == 0
    step(optimizer, model.evaluate_actions(*data()))
    assert optimizer.steps == 1


def _raising(error: type[BaseException]) -> Any:
    def hook(*_: Any) -> None:
        raise error

    return hook


def test_interrupted_forward_does_not_hold_a_method() -> None:
    model = Policy()
    optimizer = bound(model, ["forward", "evaluate_actions"])
    handle = model.value_net.register_forward_hook(_raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(data()[0])
    handle.remove()
    step(optimizer, model.evaluate_actions(*data()))
    assert optimizer.steps == 1


def test_call_interrupted_before_it_begins_leaves_nothing_behind() -> None:
    model = Policy()
    optimizer = bound(model, ["forward", "evaluate_actions"])
    optimizer._hooks.before_entry(compiled=False)  # and Ctrl-C comes here
    step(optimizer, model.evaluate_actions(*data()))
    other, _ = truth()
    assert optimizer.steps == 1
    assert hooks(model) == 2  # on the model itself
    assert len(factors(optimizer)) == len(factors(other))


def test_calls_of_another_thread_do_not_count() -> None:
    model = Policy()
    optimizer = bound(model)
    seen = []

    def elsewhere(*_: Any) -> None:
        if not seen:
            seen.append(1)
            thread = threading.Thread(target=lambda: model.evaluate_actions(*data()))
            thread.start()
            thread.join()

    handle = model.value_net.register_forward_hook(elsewhere)
    found = model.evaluate_actions(*data())
    handle.remove()
    step(optimizer, found)
    other, _ = truth()
    assert optimizer.steps == 1
    assert seen
    assert len(factors(optimizer)) == len(factors(other))


def test_copies_of_a_bound_model_have_the_plain_method() -> None:
    model = Policy()
    optimizer = bound(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(copy.deepcopy(model)),
    ]
    for twin in copies:
        assert not isinstance(twin.evaluate_actions, EntryMethod)
        with torch.no_grad():
            twin.value_net.bias += 1
            difference = twin.evaluate_actions(*data())[0] - model.evaluate_actions(*data())[0]
        torch.testing.assert_close(difference, torch.ones(5, 1, dtype=F64))
        other = bound(twin)
        step(other, twin.evaluate_actions(*data()))
        assert other.steps == 1
    assert optimizer.steps == 0
    step(optimizer, model.evaluate_actions(*data()))


@pytest.mark.parametrize("first", [0, 1])
def test_methods_are_put_back_in_any_order(first: int) -> None:
    model = Policy()
    optimizers = [bound(model), bound(model)]
    for optimizer in (optimizers[first], optimizers[1 - first]):
        assert isinstance(model.evaluate_actions, EntryMethod)
        optimizer.close()
    assert "evaluate_actions" not in vars(model)


def test_methods_of_the_instance_are_put_back() -> None:
    model, calls = Policy(), []

    def own(obs: Tensor, actions: Tensor) -> Any:
        calls.append(1)
        return Policy.evaluate_actions(model, obs, actions)

    model.evaluate_actions = own  # type: ignore[method-assign]
    optimizer = bound(model)
    step(optimizer, model.evaluate_actions(*data()))
    assert calls == [1]
    assert optimizer.steps == 1
    assert copy.deepcopy(model).evaluate_actions is own  # as a function is copied
    optimizer.close()
    assert model.evaluate_actions is own


def test_method_replaced_after_bind_is_left_alone() -> None:
    model = Policy()
    optimizer = bound(model)

    def other(*_: Any) -> None: ...

    model.evaluate_actions = other  # type: ignore[assignment,method-assign]
    optimizer.close()
    assert model.evaluate_actions is other


def test_nothing_is_kept_alive_when_the_optimizer_is_gone() -> None:
    model = Policy()
    model.optimizer = bound(model)  # as Stable-Baselines3 keeps it
    seen = weakref.ref(model)
    model.optimizer = None
    gc.collect()
    assert "evaluate_actions" not in vars(model)
    model.optimizer = bound(model)
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("entry", ["evaluate_action", "body", "training", "optimizer", "a.b"])
def test_entry_that_is_no_method_is_refused(entry: str) -> None:
    with pytest.raises(OptionError, match=f"entry has '{entry}', and Policy has no such method"):
        bound(Policy(), entry)


def test_method_that_a_wrapper_hands_on_is_refused_with_the_line_to_write() -> None:
    compiled = torch.compile(Policy(), backend="eager")
    with pytest.raises(OptionError, match=r"bind\(model\.get_submodule\('_orig_mod'\), entry='ev"):
        bound(compiled)
    bound(compiled.get_submodule("_orig_mod"))


@pytest.mark.parametrize("entry", ["__call__", ["evaluate_actions", "__call__"]])
def test_method_that_nothing_can_stand_in_for_is_refused(entry: Any) -> None:
    """Python finds it on the class: its calls would count for nothing."""
    with pytest.raises(OptionError, match=r"entry has '__call__', .* Give entry='forward'"):
        bound(Policy(), entry)


@pytest.mark.parametrize("entry", ["", [], None, [1], 3])
def test_entry_that_is_no_name_is_refused(entry: Any) -> None:
    with pytest.raises(OptionError, match=r"entry (is|has) .*'evaluate_actions'"):
        bound(Policy(), entry)


def test_compiled_method_is_followed() -> None:
    model, (other, _) = Policy(), truth()
    model.evaluate_actions = torch.compile(  # type: ignore[method-assign]
        model.evaluate_actions, backend="eager"
    )
    optimizer = bound(model)
    for _ in range(2):
        step(optimizer, model.evaluate_actions(*data()))
    assert_equal(factors(optimizer), factors(other))
