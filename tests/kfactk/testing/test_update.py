"""Laws of update rules, put to good torch classes and to rules that break them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kfactk.testing import UpdateLaws
from kfactk.testing._support.laws import VARIABLE
from kfactk.testing._support.trajectories import Groups
from tests.kfactk.testing.broken import caught


class TestRMSprop(UpdateLaws):
    stage = torch.optim.RMSprop

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, lr=lr, weight_decay=weight_decay)


class TestNAdam(UpdateLaws):
    stage = {"name": torch.optim.NAdam, "momentum_decay": 0.01}  # noqa: RUF012
    dtypes = (
        torch.float32,
    )  # torch casts a part of its state when it loads it into other precisions


class TestRprop(UpdateLaws):
    stage = torch.optim.Rprop
    decays = False
    test_zero_rate_changes_nothing = None  # its learning rate is but where its step sizes begin


class Plain(torch.optim.Optimizer):
    """A rule, `theta <- theta - mu m` with m the running mean of gradients; others change it."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.evaluate(closure) if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if self.moves(p):
                    self.advance(p, group)
        return loss

    def evaluate(self, closure: Any) -> Any:
        with torch.enable_grad():
            return closure()

    def moves(self, p: Any) -> bool:
        return p.grad is not None

    def advance(self, p: Any, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * self.mean(p, p.grad + self.decay(p, group) * p))

    def decay(self, p: Any, group: dict[str, Any]) -> float:
        return group["weight_decay"]

    def mean(self, p: Any, gradient: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        state["mean"] = (
            gradient.clone() if "mean" not in state else 0.5 * state["mean"] + 0.5 * gradient
        )
        return state["mean"]


class Copies(Plain):
    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__([dict(group) for group in params], lr, weight_decay)


class IgnoresOwnRates(Plain):
    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        for group in self.param_groups:
            group["lr"] = lr


class Forgets(Plain):
    """Keeps its mean where no state_dict finds it."""

    def mean(self, p: Any, gradient: torch.Tensor) -> torch.Tensor:
        p.mean_ = gradient if not hasattr(p, "mean_") else 0.5 * p.mean_ + 0.5 * gradient
        return p.mean_


class FixedRate(Plain):
    """Reads the learning rate once."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self.rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}

    def advance(self, p: Any, group: dict[str, Any]) -> None:
        super().advance(p, {**group, "lr": self.rates[id(p)]})


class LateDecay(Plain):
    def decay(self, p: Any, group: dict[str, Any]) -> float:
        return group["weight_decay"] if "mean" in self.state[p] else 0.0


class WrongWayDecay(Plain):
    def decay(self, p: Any, group: dict[str, Any]) -> float:
        return -group["weight_decay"]


class MovesAll(Plain):
    def advance(self, p: Any, group: dict[str, Any]) -> None:
        p.sub_(1e-3) if p.grad is None else super().advance(p, group)

    def moves(self, p: Any) -> bool:
        return True


class CountsAll(Plain):
    """Divides by the number of its parameters."""

    def advance(self, p: Any, group: dict[str, Any]) -> None:
        super().advance(
            p, {**group, "lr": group["lr"] / sum(len(each["params"]) for each in self.param_groups)}
        )


class LosesTheLoss(Plain):
    def evaluate(self, closure: Any) -> Any:
        super().evaluate(closure)


class WithoutGradients(Plain):
    def evaluate(self, closure: Any) -> Any:
        return closure()


class EvaluatesTwice(Plain):
    def evaluate(self, closure: Any) -> Any:
        super().evaluate(closure)
        return super().evaluate(closure)


class StepsFirst(Plain):
    """Steps on the gradients that were there before the closure."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        return super().evaluate(closure) if closure else None


class Noisy(Plain):
    def advance(self, p: Any, group: dict[str, Any]) -> None:
        super().advance(p, group)
        p.mul_(1 + 0.1 * torch.rand(()))


class SharesTheRate(Plain):
    """Divides the learning rate among the groups it was made with."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self.share = 1 / len(self.param_groups)

    def advance(self, p: Any, group: dict[str, Any]) -> None:
        super().advance(p, {**group, "lr": group["lr"] * self.share})


class FirstGroups(Plain):
    """Knows the groups of its first step only."""

    def step(self, closure: Any = None) -> Any:
        if not hasattr(self, "known"):
            self.known = {id(p) for group in self.param_groups for p in group["params"]}
        return super().step(closure)

    def moves(self, p: Any) -> bool:
        return super().moves(p) and id(p) in self.known


class Widens(Plain):
    def advance(self, p: Any, group: dict[str, Any]) -> None:
        p.data = p.data.double() - group["lr"] * p.grad.double()


class Deepens(Plain):
    def advance(self, p: Any, group: dict[str, Any]) -> None:
        super().advance(p, group)
        p.grad = None
        p.data = p.data.unsqueeze(0)


class SpoilsGradients(Plain):
    def advance(self, p: Any, group: dict[str, Any]) -> None:
        super().advance(p, group)
        p.grad.mul_(group["lr"])


class TakesGradients(Plain):
    def advance(self, p: Any, group: dict[str, Any]) -> None:
        super().advance(p, group)
        p.grad = None


class Divides(Plain):
    """By the square root of the gradient's mean, which may be negative."""

    def mean(self, p: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / gradient.mean().sqrt()


class LeastStep(Plain):
    def advance(self, p: Any, group: dict[str, Any]) -> None:
        super().advance(p, {**group, "lr": max(group["lr"], 1e-6)})


class Still(Plain):
    def moves(self, p: Any) -> bool:
        return False


class Stubborn:
    """Makes no optimizer at all."""

    def make(self, groups: Groups, *, lr: float, weight_decay: float) -> Any:
        return groups


class Counts(Plain):
    """Wants more than the gradients: whether its step was the first in the process."""

    steps = 0

    def advance(self, p: Any, group: dict[str, Any]) -> None:
        type(self).steps += 1
        super().advance(p, {**group, "lr": group["lr"] / type(self).steps})


class Maker:
    """Makes one class, as a stranger's stage does."""

    def __init__(self, kind: type[Plain]) -> None:
        self.kind = kind

    def make(self, groups: Groups, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return self.kind(groups, lr=lr, weight_decay=weight_decay)


BROKEN: list[tuple[Any, str, str]] = [
    (
        Stubborn(),
        "is_an_optimizer_over_the_given_groups",
        "make returns a list, which is no torch.optim.Optimizer",
    ),
    (Maker(Copies), "is_an_optimizer_over_the_given_groups", "the groups are copied"),
    (Maker(IgnoresOwnRates), "is_an_optimizer_over_the_given_groups", "a group has {'lr': "),
    (Maker(LateDecay), "equals_its_counterpart", "are not those of the counterpart"),
    (
        Maker(Counts),
        "is_the_step_that_kfactk_takes",
        "through kfactk, with identity preconditioning, the parameters are not",
    ),
    (
        Maker(Forgets),
        "resumes_bit_for_bit",
        "after resuming from the state differs from the uninterrupted run",
    ),
    (Maker(FixedRate), "schedules_reach_it", "does not reach the first step"),
    (
        Maker(LateDecay),
        "weight_decay_acts_from_the_first_step",
        "weight decay 0.2 does not act at the first step",
    ),
    (
        Maker(WrongWayDecay),
        "weight_decay_acts_from_the_first_step",
        "weight decay 0.2 does not act at the first step",
    ),
    (
        Maker(MovesAll),
        "parameters_without_gradient_are_left_alone",
        "a parameter without gradient moved",
    ),
    (
        Maker(CountsAll),
        "parameters_without_gradient_are_left_alone",
        "changes the steps of the others",
    ),
    (Maker(LosesTheLoss), "closure", "returns None in place of the closure's loss"),
    (Maker(WithoutGradients), "closure", "with gradients enabled: [False]"),
    (Maker(EvaluatesTwice), "closure", "called 2 times"),
    (Maker(StepsFirst), "closure", "step(closure) differs from a step on the same gradients"),
    (Maker(Noisy), "is_deterministic", "two runs on the same gradients differ"),
    (Maker(SharesTheRate), "groups_may_be_added", "act differently from those given at the start"),
    (Maker(FirstGroups), "groups_may_be_added", "a group added after some steps does not move"),
    (Maker(Widens), "dtypes_stay", "became one of torch.float64"),
    (Maker(Deepens), "dtypes_stay", "a parameter of shape ("),
    (Maker(TakesGradients), "dtypes_stay", "the step took a gradient away"),
    (Maker(Divides), "dtypes_stay", "nan"),
    (Maker(SpoilsGradients), "dtypes_stay", "the step changed a gradient"),
    (Maker(LeastStep), "zero_rate_changes_nothing", "a group with lr=0 is changed"),
    (Maker(Still), "zero_rate_changes_nothing", "does not move"),
    (torch.optim.Rprop, "zero_rate_changes_nothing", "a group with lr=0 is changed"),
]


@pytest.mark.parametrize(("stage", "title", "says"), BROKEN)
def test_a_broken_rule_is_caught(
    stage: Any, title: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "thorough")  # as many examples as it takes to find one that fails

    def counterpart(
        self: Any, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Plain(groups, lr, weight_decay)

    members = {"counterpart": counterpart, "decays": stage is not torch.optim.Rprop}
    law = f"test_{title}"
    found = caught(UpdateLaws, stage, law, **members)
    assert says in found.get(law, "obeyed")
    assert "breaks a law of its family" in found[law]


def test_a_good_rule_obeys() -> None:
    assert caught(UpdateLaws, Maker(Plain)) == {}


def test_without_a_counterpart_it_says_so() -> None:
    made = type("TestPlain", (UpdateLaws,), {"stage": Maker(Plain)})()
    with pytest.raises(pytest.skip.Exception, match="TestPlain has no `counterpart`"):
        made.test_equals_its_counterpart()
