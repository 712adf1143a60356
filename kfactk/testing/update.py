"""Laws of update rules: genuine torch optimizers, equal to a counterpart, resumed bit for bit."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

import kfactk
from kfactk.operators import CurvatureOperator
from kfactk.stages import Basis, Decomposition, FactorContext, Tensors, Update
from kfactk.testing._support.division import InRecipe
from kfactk.testing._support.laws import close, law
from kfactk.testing._support.models import Columns, Squares, Unclipped
from kfactk.testing._support.trajectories import (
    DTYPES,
    Groups,
    Problem,
    gradient,
    problems,
    values,
    walk,
)


class UpdateLaws(InRecipe):
    """Laws of every update rule; with a `counterpart`, also of the steps it takes.

    Example:
        >>> class TestRmsprop(UpdateLaws):
        ...     stage = torch.optim.RMSprop
        ...     def counterpart(self, groups, *, lr, weight_decay):
        ...         return torch.optim.RMSprop(groups, lr=lr, weight_decay=weight_decay)
        >>> TestRmsprop().test_equals_its_counterpart()
        >>> TestRmsprop().test_zero_rate_changes_nothing()
    """

    family = "update"
    decays: ClassVar[bool] = True
    """Whether the rule has weight decay."""
    dtypes: ClassVar[Sequence[torch.dtype]] = DTYPES
    """Precisions of parameters to test with; laws that compare numbers always use float64."""
    tolerance: ClassVar[float] = 1e-9
    """Allowed relative difference to the counterpart, in float64."""

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer | None:
        """Return an optimizer whose steps the rule must take, or `None`.

        It is another class, or the equation of the rule, written step by step.

        Args:
            groups: Parameter groups, some with their own `lr` and `weight_decay`.
            lr: Learning rate of the others.
            weight_decay: Weight decay of the others.
        """
        return None

    def make(self, groups: Groups, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return the optimizer of the rule."""
        stage: Update = self.subject()
        return stage.make(groups, lr=lr, weight_decay=weight_decay)

    def problems(self) -> st.SearchStrategy[Problem]:
        """Return a strategy for problems in every precision."""
        drawn = problems(self.dtypes)
        return drawn if self.decays else drawn.map(Problem.without_decay)

    def exact_problems(self) -> st.SearchStrategy[Problem]:
        """Return a strategy for problems in float64."""
        return self.problems().map(lambda problem: attrs.evolve(problem, dtype=torch.float64))

    @law(examples=10, problem="problems")
    def test_is_an_optimizer_over_the_given_groups(self, problem: Problem) -> None:
        """`make` returns a torch.optim.Optimizer over the given dicts, with their own options."""
        groups = problem.start()
        optimizer = problem.made(self.make, groups)
        assert isinstance(optimizer, torch.optim.Optimizer), (
            f"make returns a {type(optimizer).__name__}, which is no torch.optim.Optimizer"
        )
        same = len(optimizer.param_groups) == len(groups) and all(
            a is b for a, b in zip(optimizer.param_groups, groups, strict=True)
        )
        assert same, (
            "the groups are copied: learning rates set in the given dicts would not reach the "
            "optimizer"
        )
        for group, drawn in zip(groups, problem.groups, strict=True):
            wanted = {
                "lr": problem.lr,
                **({"weight_decay": problem.weight_decay} if self.decays else {}),
                **drawn.options,
            }
            found = {name: group.get(name) for name in wanted}
            assert found == wanted, f"a group has {found}, not {wanted}"

    @law(problem="exact_problems")
    def test_equals_its_counterpart(self, problem: Problem) -> None:
        """On plain gradients, it takes the steps of its counterpart, as learning rates change."""
        theirs = problem.start()
        other = self.counterpart(theirs, lr=problem.lr, weight_decay=problem.weight_decay)
        if other is None:
            pytest.skip(f"{type(self).__name__} has no `counterpart`")
        mine = walk(problem.made(self.make, problem.start()), problem.drops)
        for step, (found, expected) in enumerate(
            zip(mine, walk(other, problem.drops), strict=True)
        ):
            self._same(
                found,
                expected,
                f"the parameters after step {step} are not those of the counterpart",
                self.tolerance,
            )

    @law(examples=5, problem="exact_problems")
    def test_is_the_step_that_kfactk_takes(self, problem: Problem) -> None:
        """Bound by `kfactk.build`, with identity preconditioning, it steps as it does alone."""
        models = [_chain(problem.seed) for _ in range(2)]
        recipe = kfactk.build(
            **{
                "basis": Identity(),
                "clip": Unclipped(),
                "fisher": Columns(),
                "likelihood": Squares(),
                "update": self.stage,
            },
            lr=problem.lr,
            weight_decay=problem.weight_decay,
        )
        bound = recipe.bind(models[0])
        alone = problem.made(self.make, [{"params": list(models[1].parameters())}])
        for model, optimizer in zip(models, (bound, alone), strict=True):
            for step, drop in enumerate(problem.drops):
                optimizer.param_groups[0]["lr"] *= drop
                optimizer.zero_grad()
                x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2) + step
                model(x).square().mean().backward()
                optimizer.step()
        bound.close()
        found, expected = ([p.detach() for p in model.parameters()] for model in models)
        self._same(
            found,
            expected,
            "through kfactk, with identity preconditioning, the parameters are not those of the "
            "rule alone",
            1e-11,
        )

    @law(examples=10, problem="problems", stop=st.integers(0, 4))
    def test_resumes_bit_for_bit(self, problem: Problem, stop: int) -> None:
        """Saved and loaded into a new optimizer, it continues bit for bit."""
        first, rest = problem.drops[:stop], problem.drops[stop:]
        optimizer = problem.made(self.make, problem.start())
        walk(optimizer, first)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        copies = problem.start()
        for own, group in zip(optimizer.param_groups, copies, strict=True):
            group["params"] = [
                nn.Parameter(parameter.detach().clone()) for parameter in own["params"]
            ]
        resumed = problem.made(self.make, copies)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        expected, found = walk(optimizer, rest, stop), walk(resumed, rest, stop)
        for step, (a, b) in enumerate(zip(found, expected, strict=True)):
            self._same(
                a,
                b,
                f"step {step} after resuming from the state differs from the uninterrupted run",
                0.0,
            )

    @law(examples=10, problem="exact_problems")
    def test_schedules_reach_it(self, problem: Problem) -> None:
        """A scheduler of torch has the effect of setting the learning rate in each group."""
        scheduled = problem.made(self.make, problem.start())
        lr_scheduler.LambdaLR(scheduled, lambda step: 0.25)
        slower = problem.start()
        for group in slower:
            group["lr"] = 0.25 * group.get("lr", problem.lr)
        found, expected = (
            walk(scheduled, [1.0])[-1],
            walk(problem.made(self.make, slower), [1.0])[-1],
        )
        self._same(
            found,
            expected,
            "a schedule that quarters the learning rate does not reach the first step",
            1e-12,
        )
        scheduled = problem.made(self.make, problem.start())
        factors = [math.prod(problem.drops[: k + 1]) for k in range(len(problem.drops))]
        schedule = lr_scheduler.LambdaLR(
            scheduled, lambda step: factors[min(step, len(factors) - 1)]
        )
        by_hand = walk(problem.made(self.make, problem.start()), problem.drops)
        for step, expected in enumerate(by_hand):
            found = walk(scheduled, [1.0], step)[-1]
            schedule.step()
            self._same(
                found,
                expected,
                f"step {step} under a LambdaLR differs from that with the rate set by hand",
                1e-12,
            )

    @law(examples=10, problem="exact_problems")
    def test_weight_decay_acts_from_the_first_step(self, problem: Problem) -> None:
        """With zero gradients, the first step moves parameters to zero by weight decay alone."""
        for decay in (0.0, 0.2) if self.decays else (0.0,):
            groups: Groups = [{"params": group["params"]} for group in problem.start()]
            before = values(groups)
            optimizer = self.make(groups, lr=1e-4, weight_decay=decay)
            for group in groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            for x, y in zip(before, values(groups), strict=True):
                if decay:
                    says = (
                        f"weight decay {decay} does not act at the first step: zero gradients took "
                        f"{x.tolist()} to {y.tolist()}"
                    )
                    assert ((y - x) * x < 0).all(), says
                else:
                    assert torch.equal(x, y), (
                        f"zero gradients without weight decay moved {x.tolist()} to {y.tolist()}"
                    )

    @law(examples=10, problem="problems", data=st.data())
    def test_parameters_without_gradient_are_left_alone(
        self, problem: Problem, data: st.DataObject
    ) -> None:
        """A parameter without gradient does not change, nor does it change the steps of others."""
        groups = problem.start()
        idle = data.draw(
            st.sampled_from([p for group in groups for p in group["params"]]).map(id), label="idle"
        )
        place = next(
            k for k, p in enumerate(p for group in groups for p in group["params"]) if id(p) == idle
        )
        optimizer, before = problem.made(self.make, groups), values(groups)[place]
        alone = problem.start()
        left = iter(range(sum(len(group["params"]) for group in alone)))
        for group in alone:
            group["params"] = [p for p in group["params"] if next(left) != place]
        alone = [group for group in alone if group["params"]]
        other = problem.made(self.make, alone) if alone else None
        for step in range(len(problem.drops)):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None if id(parameter) == idle else gradient(parameter, step)
            optimizer.step()
            if other is not None:
                walk(other, [1.0], step)
        after = values(groups)
        assert torch.equal(before, after[place]), (
            f"a parameter without gradient moved: {before.tolist()} to {after[place].tolist()}"
        )
        rest = [value for k, value in enumerate(after) if k != place]
        self._same(
            rest, values(alone), "a parameter without gradient changes the steps of the others", 0.0
        )

    @law(examples=10, problem="problems")
    def test_closure(self, problem: Problem) -> None:
        """`step(closure)` calls it once, with gradients enabled, and steps; it returns the loss."""
        groups, calls = problem.start(), []
        optimizer = problem.made(self.make, groups)

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            for group in groups:
                for parameter in group["params"]:
                    parameter.grad = gradient(parameter, 0)
            return torch.tensor(2.5)

        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]
        assert calls == [True], (
            f"the closure was called {len(calls)} times, with gradients enabled: {calls}; it must "
            "be once, with True"
        )
        assert loss is not None, "step(closure) returns None in place of the closure's loss"
        assert float(loss) == 2.5, (
            f"step(closure) returns {loss} in place of the closure's loss 2.5"
        )
        expected = walk(problem.made(self.make, problem.start()), [1.0])[-1]
        self._same(
            values(groups), expected, "step(closure) differs from a step on the same gradients", 0.0
        )

    @law(examples=10, problem="problems")
    def test_is_deterministic(self, problem: Problem) -> None:
        """The same gradients give the same parameters, bit for bit."""
        one, other = (
            walk(problem.made(self.make, problem.start()), problem.drops)[-1] for _ in range(2)
        )
        self._same(one, other, "two runs on the same gradients differ", 0.0)

    @law(examples=10, problem="problems")
    def test_groups_may_be_added(self, problem: Problem) -> None:
        """A group added before the first step acts like those given; one added later moves too."""
        groups = problem.start()
        optimizer = problem.made(self.make, groups[:1])
        for group in groups[1:]:
            optimizer.add_param_group(group)
        found = walk(optimizer, problem.drops)[-1]
        expected = walk(problem.made(self.make, problem.start()), problem.drops)[-1]
        self._same(
            found,
            expected,
            "groups added before the first step act differently from those given at the start",
            0.0,
        )
        late = nn.Parameter(torch.full((2,), 3.0, dtype=torch.float64))
        optimizer.add_param_group({"params": [late], "lr": 0.05})
        walk(optimizer, [1.0], len(problem.drops))
        assert not torch.equal(late.detach(), torch.full_like(late, 3.0)), (
            "a group added after some steps does not move"
        )

    @law(examples=10, problem="problems")
    def test_dtypes_stay(self, problem: Problem) -> None:
        """Parameters keep dtype and shape and stay finite; gradients do not change."""
        groups = problem.start()
        before, optimizer = values(groups), problem.made(self.make, groups)
        walk(optimizer, [1.0])
        after = [parameter for group in groups for parameter in group["params"]]
        for start, parameter in zip(before, after, strict=True):
            assert parameter.dtype == start.dtype, (
                f"a parameter of {start.dtype} became one of {parameter.dtype}"
            )
            assert parameter.shape == start.shape, (
                f"a parameter of shape {tuple(start.shape)} became one of {tuple(parameter.shape)}"
            )
            assert torch.isfinite(parameter).all(), (
                f"the step took {start.tolist()} to {parameter.tolist()}"
            )
            was = gradient(start, 0)
            assert parameter.grad is not None, "the step took a gradient away"
            assert torch.equal(parameter.grad, was), (
                f"the step changed a gradient: {was.tolist()} to {parameter.grad.tolist()}"
            )

    @law(examples=10, problem="exact_problems")
    def test_zero_rate_changes_nothing(self, problem: Problem) -> None:
        """A group with a learning rate of zero does not change, while the others move."""
        groups = problem.start()
        frozen = groups[1:]
        for group in frozen:
            group["lr"] = 0.0
        before, start = values(groups[:1]), values(frozen)
        walk(problem.made(self.make, groups), [1.0] * 3)
        self._same(values(frozen), start, "a group with lr=0 is changed", 0.0)
        moved = not all(torch.equal(x, y) for x, y in zip(before, values(groups[:1]), strict=True))
        assert moved, f"a group with lr={groups[0]['lr']} does not move"

    def _same(
        self, found: Sequence[Tensor], expected: Sequence[Tensor], says: str, tolerance: float
    ) -> None:
        for x, y in zip(found, expected, strict=True):
            close(x, y, says, rtol=tolerance, atol=tolerance / 10)


class IdentityOperator(CurvatureOperator):
    """The identity, whatever the damping."""

    def solve(self, v: Tensor) -> Tensor:
        """Return v."""
        return v

    def multiply(self, v: Tensor) -> Tensor:
        """Return v."""
        return v

    def condition(self) -> Tensor:
        """Return 1."""
        return torch.ones(())


@attrs.frozen
class Identity(Basis):
    """The basis whose operator is the identity."""

    requires = frozenset()

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> IdentityOperator:
        """Return the identity."""
        return IdentityOperator()


def _chain(seed: int) -> nn.Sequential:
    """Return two small layers in float64 whose parameters depend on the seed alone."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model
