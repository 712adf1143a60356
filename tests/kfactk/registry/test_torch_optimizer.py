"""Any torch.optim class as an update: the same steps as the class itself, on the caller's own group dicts."""

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


def walk(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_classes_own(name: str) -> None:
    kind, options = CASES[name]
    ours, theirs = parameters(), parameters()
    made = TorchOptimizer(kind, options).make([{"params": ours}], lr=0.05, weight_decay=0.1)
    plain = kind([{"params": theirs}], lr=0.05, weight_decay=0.1, **options)  # type: ignore[call-arg]
    assert type(made) is kind
    for a, b in zip(walk(made, ours), walk(plain, theirs), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=effort(20))
@given(lr=st.floats(1e-4, 1.0), own=st.floats(1e-4, 1.0), decay=st.floats(0.0, 0.5))
def test_groups_are_the_callers_own_dicts_and_keep_their_values(
    lr: float, own: float, decay: float
) -> None:
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
    walk(made, [first, second])
    assert torch.equal(first, before), (
        "a schedule that writes into the caller's dict reaches the step"
    )


@pytest.mark.parametrize(
    "unfit",
    [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Optimizer, torch.nn.Linear, "Adam"],
)
def test_what_cannot_take_the_step_is_refused(unfit: Any) -> None:
    with pytest.raises(OptionError, match="cannot be an update rule"):
        TorchOptimizer(unfit)


def test_a_subclass_of_an_unfit_class_is_unfit() -> None:
    class Mine(torch.optim.LBFGS):
        pass

    with pytest.raises(OptionError, match=r"Mine .* several times a step"):
        TorchOptimizer(Mine)


def test_weight_decay_that_the_class_lacks_is_refused_unless_zero() -> None:
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
    ("options", "says"),
    [
        ({"momentun": 0.9}, "Did you mean 'momentum'"),
        ({"lr": 1.0}, "give it to build"),
        ({"weight_decay": 1.0}, "give it to build"),
        ({"params": []}, "no option"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        TorchOptimizer(torch.optim.SGD, options)


def test_values_that_the_class_refuses_are_option_errors() -> None:
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


def test_a_class_that_copies_its_groups_is_refused() -> None:
    with pytest.raises(OptionError, match="Copying copies the parameter groups"):
        TorchOptimizer(Copying).make([{"params": parameters()}], lr=0.1, weight_decay=0.0)


def test_a_class_that_takes_no_learning_rate_is_refused() -> None:
    with pytest.raises(OptionError, match="takes no `lr`"):
        TorchOptimizer(WithoutRate)


def test_a_class_with_open_arguments_takes_what_it_is_given() -> None:
    made = TorchOptimizer(Open, {"momentum": 0.5}).make(
        [{"params": parameters()}], lr=0.1, weight_decay=0.2
    )
    assert (made.defaults["momentum"], made.defaults["weight_decay"]) == (0.5, 0.2)


def test_equality_hash_copies_and_pickles() -> None:
    update = TorchOptimizer(torch.optim.Adam, {"betas": [0.8, 0.9]})
    same = TorchOptimizer(torch.optim.Adam, {"betas": (0.8, 0.9)})
    assert update == same
    assert hash(update) == hash(same)
    assert update != TorchOptimizer(torch.optim.Adam, {"betas": (0.8, 0.99)})
    assert update != TorchOptimizer(torch.optim.AdamW, {"betas": (0.8, 0.9)})
    assert copy.deepcopy(update) == pickle.loads(pickle.dumps(update)) == update
    assert missing_members("update", update) == []


def test_adapting_classes_and_partials() -> None:
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
def test_what_is_no_optimiser_class_is_not_adapted(other: Any) -> None:
    assert TorchOptimizer.adapt(other) is None


def test_unwrapping_is_for_exactly_this_class() -> None:
    class Mine(TorchOptimizer):
        pass

    assert TorchOptimizer.unwrap(TorchOptimizer(torch.optim.SGD, {"momentum": 0.1})) == (
        torch.optim.SGD,
        {"momentum": 0.1},
    )
    assert TorchOptimizer.unwrap(Mine(torch.optim.SGD)) is None
    assert TorchOptimizer.unwrap(object()) is None
