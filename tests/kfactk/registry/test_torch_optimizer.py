"""A torch.optim class as an update takes its own steps, on the group dicts of the caller."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kfactk import OptionError
from kfactk.registry.inspection import missing_members, options_of
from kfactk.registry.torch_optimizer import TorchOptimizer
from kfactk.testing import effort

CASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"betas": (0.8, 0.99)}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "NAdam": (torch.optim.NAdam, {"momentum_decay": 0.01}),
}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=generator))
        for _ in range(2)
    ]


def steps(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("name", CASES)
def test_update_takes_the_steps_of_its_class(name: str) -> None:
    kind, options = CASES[name]
    ours, theirs = parameters(), parameters()
    made = TorchOptimizer(kind, options).make([{"params": ours}], lr=0.05, weight_decay=0.1)
    plain = kind([{"params": theirs}], lr=0.05, weight_decay=0.1, **options)  # type: ignore[call-arg]
    assert type(made) is kind
    for a, b in zip(steps(made, ours), steps(plain, theirs), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=effort(20))
@given(lr=st.floats(1e-4, 1.0), own=st.floats(1e-4, 1.0), decay=st.floats(0.0, 0.5))
def test_make_uses_the_group_dicts_of_the_caller(lr: float, own: float, decay: float) -> None:
    first, second = parameters()
    groups: list[dict[str, Any]] = [
        {"params": [first], "lr": own, "weight_decay": decay},
        {"params": [second], "label": "rest"},
    ]
    made = TorchOptimizer(torch.optim.SGD, {"momentum": 0.5}).make(groups, lr=lr, weight_decay=0.25)
    assert all(theirs is ours for theirs, ours in zip(made.param_groups, groups, strict=True))
    assert [(group["lr"], group["weight_decay"], group["momentum"]) for group in groups] == [
        (own, decay, 0.5),
        (lr, 0.25, 0.5),
    ]
    assert groups[1]["label"] == "rest"
    groups[0]["lr"] = 0.0
    groups[0]["weight_decay"] = 0.0
    before = first.detach().clone()
    steps(made, [first, second])
    assert torch.equal(first, before), (
        "a schedule that writes into the caller's dict must reach the step"
    )


@pytest.mark.parametrize(
    "unsupported",
    [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Optimizer, torch.nn.Linear, "Adam"],
)
def test_classes_that_cannot_take_the_step_are_refused(unsupported: Any) -> None:
    with pytest.raises(OptionError, match="cannot be an update rule"):
        TorchOptimizer(unsupported)


def test_subclass_of_an_unsupported_class_is_refused() -> None:
    class Mine(torch.optim.LBFGS):
        pass

    with pytest.raises(OptionError, match=r"Mine .* several times a step"):
        TorchOptimizer(Mine)


def test_a_class_whose_step_needs_a_closure_is_refused() -> None:
    class Needs(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return super().step(closure)

    with pytest.raises(OptionError, match=r"Needs cannot be .* its step needs a closure"):
        TorchOptimizer(Needs)


def test_make_refuses_weight_decay_that_the_class_lacks() -> None:
    update = TorchOptimizer(torch.optim.Rprop)
    assert (
        type(update.make([{"params": parameters(), "weight_decay": 0.0}], lr=0.1, weight_decay=0.0))
        is torch.optim.Rprop
    )
    with pytest.raises(OptionError, match="Rprop has no weight decay"):
        update.make([{"params": parameters()}], lr=0.1, weight_decay=0.1)
    with pytest.raises(OptionError, match="Rprop has no weight decay"):
        update.make([{"params": parameters(), "weight_decay": 0.1}], lr=0.1, weight_decay=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentun": 0.9}, "Did you mean 'momentum'"),
        ({"lr": 1.0}, "give it to build"),
        ({"weight_decay": 1.0}, "give it to build"),
        ({"params": []}, "no option"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TorchOptimizer(torch.optim.SGD, options)


def test_make_turns_refused_values_into_option_errors() -> None:
    with pytest.raises(OptionError, match="SGD refuses its arguments: Invalid momentum") as caught:
        TorchOptimizer(torch.optim.SGD, {"momentum": -1.0}).make(
            [{"params": parameters()}], lr=0.1, weight_decay=0.0
        )
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(OptionError, match="empty"):
        TorchOptimizer(torch.optim.SGD).make([], lr=0.1, weight_decay=0.0)


class Copying(torch.optim.SGD):
    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__([dict(group) for group in params], lr=lr, weight_decay=weight_decay)


class Open(torch.optim.SGD):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


class WithoutRate(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)


def test_make_refuses_a_class_that_copies_its_groups() -> None:
    with pytest.raises(OptionError, match="Copying copies the parameter groups"):
        TorchOptimizer(Copying).make([{"params": parameters()}], lr=0.1, weight_decay=0.0)


def test_class_without_a_learning_rate_is_refused() -> None:
    with pytest.raises(OptionError, match="takes no `lr`"):
        TorchOptimizer(WithoutRate)


def test_class_with_open_arguments_takes_any_option() -> None:
    made = TorchOptimizer(Open, {"momentum": 0.5}).make(
        [{"params": parameters()}], lr=0.1, weight_decay=0.2
    )
    assert (made.defaults["momentum"], made.defaults["weight_decay"]) == (0.5, 0.2)


def test_updates_compare_hash_copy_and_pickle() -> None:
    update = TorchOptimizer(torch.optim.Adam, {"betas": [0.8, 0.9]})
    same = TorchOptimizer(torch.optim.Adam, {"betas": (0.8, 0.9)})
    assert update == same
    assert hash(update) == hash(same)
    assert update != TorchOptimizer(torch.optim.Adam, {"betas": (0.8, 0.99)})
    assert update != TorchOptimizer(torch.optim.AdamW, {"betas": (0.8, 0.9)})
    assert copy.deepcopy(update) == pickle.loads(pickle.dumps(update)) == update
    assert missing_members("update", update) == []


def test_adapt_takes_classes_and_partials() -> None:
    nested = functools.partial(
        functools.partial(torch.optim.SGD, momentum=0.5, dampening=0.1), momentum=0.9
    )
    factory = TorchOptimizer.adapt(nested)
    assert factory is not None
    assert factory() == TorchOptimizer(torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1})
    assert factory(momentum=0.2) == TorchOptimizer(
        torch.optim.SGD, {"momentum": 0.2, "dampening": 0.1}
    )
    assert {
        option.name: option.default
        for option in options_of(factory).known
        if option.name in {"momentum", "dampening"}
    } == {
        "momentum": 0.9,
        "dampening": 0.1,
    }
    assert not {"lr", "params", "weight_decay"} & set(options_of(factory).names())


@pytest.mark.parametrize(
    "other", [torch.nn.Linear, functools.partial(torch.optim.SGD, []), len, "SGD", TorchOptimizer]
)
def test_adapt_gives_none_for_other_objects(other: Any) -> None:
    assert TorchOptimizer.adapt(other) is None


def test_unwrap_takes_exactly_this_class() -> None:
    class Mine(TorchOptimizer):
        pass

    assert TorchOptimizer.unwrap(TorchOptimizer(torch.optim.SGD, {"momentum": 0.1})) == (
        torch.optim.SGD,
        {"momentum": 0.1},
    )
    assert TorchOptimizer.unwrap(Mine(torch.optim.SGD)) is None
    assert TorchOptimizer.unwrap(object()) is None
