"""Laws of a whole recipe: they hold for every combination of stages that `kfactk.build` accepts.

    class TestMine(PipelineLaws):
        recipe = {"basis": "mine", "update": "momentum"}

The laws train a small model for some steps. Replace `model`, `batch` and `loss` for a recipe that
needs others.
"""

from __future__ import annotations

import copy
import gc
import itertools
import random
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import kfactk
from kfactk.optim.optimizer import Optimizer
from kfactk.recipe import Recipe
from kfactk.testing._support.division import equal_on_ranks, on_ranks
from kfactk.testing._support.laws import close, law
from kfactk.testing._support.models import Columns, Squares, Unclipped
from kfactk.testing._support.strategies import seeds
from kfactk.testing._support.training import (
    EXAMPLES,
    PERIODS,
    STEPS,
    Training,
    built,
    flattened,
    hooks,
    identical,
    outcome,
    rearrange,
    through_file,
)
from kfactk.testing._support.truth import moment

EXACT = "exact-when-kronecker"
"""The claim of a basis to represent the Fisher matrix exactly where it is a Kronecker product."""


class PipelineLaws(Training):
    """Laws of recipes; `recipe` holds the arguments of `kfactk.build`.

    Example:
        >>> class TestPlain(PipelineLaws):
        ...     recipe = {"update": torch.optim.SGD, "lr": 0.1}
        >>> TestPlain().test_gradients_stay_as_they_were()
    """

    @law(examples=5, recipe="recipes", seed=seeds())
    def test_equal_seeds_give_equal_runs(self, recipe: Mapping[str, Any], seed: int) -> None:
        """Two runs are bit-for-bit equal; they neither read nor change the global random state."""
        made, found = self.build(recipe), []
        for number in (seed, seed + 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                before = torch.get_rng_state(), random.getstate()
                found.append(outcome(*self.run(made)))
                assert torch.equal(before[0], torch.get_rng_state()), (
                    "training changed torch's global random state; draw from a generator"
                )
                assert before[1] == random.getstate(), (
                    "training changed the random state of the module random; draw from a generator"
                )
        identical(
            found[0],
            found[1],
            "two runs of one recipe with different global random states are not the same",
        )

    @law(examples=5, recipe="recipes", saved_at=st.integers(0, 7), used=st.integers(0, 2))
    def test_a_resumed_run_is_the_uninterrupted_one(
        self, recipe: Mapping[str, Any], saved_at: int, used: int
    ) -> None:
        """A state saved at any step, and loaded into any optimizer, continues bit for bit."""
        made = self.build(recipe)
        model, optimizer = self.run(made, saved_at)
        weights, state = through_file(model.state_dict()), through_file(optimizer.state_dict())
        resumed_model, resumed = self.run(made, used)
        resumed_model.load_state_dict(weights)
        resumed.load_state_dict(state)
        assert resumed.steps == saved_at, (
            f"the state was saved after {saved_at} steps, "
            f"and the resumed optimizer has {resumed.steps}"
        )
        for number in range(saved_at, saved_at + PERIODS["basis_every"] + 1):
            losses = [
                self.step(optimizer, model, number),
                self.step(resumed, resumed_model, number),
            ]
            says = (
                f"saved after {saved_at} steps and resumed, the run has left the uninterrupted one "
                f"at step {number}"
            )
            assert losses[0] == losses[1], f"{says}: its loss is {losses[1]}, not {losses[0]}"
            identical(outcome(model, optimizer), outcome(resumed_model, resumed), says)
        identical(
            flattened(optimizer.state_dict()),
            flattened(resumed.state_dict()),
            "the states of both runs differ in the end",
        )

    @law(examples=5, recipe="steady", order=st.sampled_from(["reversed", "rotated"]))
    def test_the_order_of_layers_does_not_matter(
        self, recipe: Mapping[str, Any], order: str
    ) -> None:
        """The order in which modules are registered, with the same forward, changes nothing.

        A link may refuse a forward whose order is not that of the model.
        """
        made, found = self.build(recipe), []
        for changed in (False, True):
            model = self.fresh()
            if changed:
                # The order of these modules determines what they compute.
                ordered = (nn.Sequential.forward, nn.Module.forward)
                for parent in model.modules():
                    if type(parent).forward not in ordered:
                        rearrange(parent._modules, order)
                        rearrange(parent._parameters, order)
            optimizer = made.bind(model)
            try:
                for number in range(STEPS):
                    self.step(optimizer, model, number)
            except kfactk.CaptureError as refused:
                if not changed or made.link is None:
                    raise
                self.inapplicable(f"the link needs the model's order: {refused}")
            found.append(dict(outcome(model, optimizer)))
        self.alike(
            found[0],
            found[1],
            f"with its layers registered in another order ({order}) the model trains differently",
        )

    @law(
        examples=5,
        recipe="steady",
        cuts=st.sets(st.integers(1, EXAMPLES - 1), min_size=1, max_size=3),
    )
    def test_accumulated_micro_batches_are_one_batch(
        self, recipe: Mapping[str, Any], cuts: set[int]
    ) -> None:
        """Without BatchNorm, splitting a batch into accumulated micro-batches changes nothing."""
        made = self.still(self.build(recipe))
        listens, mean = not made.fisher.own_pass, made.reduction == "mean"
        if listens and mean and made.controller is not None:
            self.inapplicable("a controller wants a mean loss, and a share of a mean is no mean")
        if listens and mean:
            # An estimator that listens to the loss needs a sum: a share of a mean is no mean.
            made = made.evolve(reduction="sum")
        edges = [0, *sorted(cuts), EXAMPLES]

        def whole(optimizer: Optimizer, model: nn.Module, number: int) -> Tensor:
            return self.backward(optimizer, model, self.data(number), num_terms=listens and mean)

        def split(optimizer: Optimizer, model: nn.Module, number: int) -> Tensor:
            inputs, targets = self.data(number)
            losses = []
            for start, end in itertools.pairwise(edges):
                share = (end - start) / EXAMPLES if mean and not listens else 1.0
                data = inputs[start:end], targets[start:end]
                losses.append(
                    self.backward(optimizer, model, data, share, num_terms=listens and mean)
                )
            return torch.stack(losses).sum()

        sizes = [end - start for start, end in itertools.pairwise(edges)]
        self.compare(
            made,
            whole,
            split,
            f"a batch of {EXAMPLES} accumulated in micro-batches of {sizes} trains differently",
        )

    @law(examples=5, recipe="steady", copies=st.integers(2, 3))
    def test_a_batch_several_times_over_is_one_batch(
        self, recipe: Mapping[str, Any], copies: int
    ) -> None:
        """Repeating every example of a batch changes nothing under a mean loss."""
        made = self.still(self.build(recipe))
        if any(rule.basis.moments_from == "gradient" for rule in made.rules):
            self.inapplicable(
                "moments of the mini-batch gradient estimate the Fisher from independent examples, "
                "which copies are not"
            )
        if made.reduction == "sum":
            self.inapplicable("a summed loss grows with its batch")

        def once(optimizer: Optimizer, model: nn.Module, number: int) -> Tensor:
            return self.backward(optimizer, model, self.data(number))

        def repeated(optimizer: Optimizer, model: nn.Module, number: int) -> Tensor:
            data = (torch.cat([each] * copies) for each in self.data(number))
            return self.backward(optimizer, model, (next(data), next(data)))

        self.compare(
            made,
            once,
            repeated,
            f"with every example {copies} times in its batch the model trains differently",
        )

    @law(examples=2, recipe="steady")
    @on_ranks
    def test_two_ranks_are_one_process(self, recipe: Mapping[str, Any]) -> None:
        """Two ranks with half of each batch train as one process; both are bit-for-bit equal."""
        equal_on_ranks(self, recipe)

    @law(examples=5, recipe="recipes")
    def test_gradients_stay_as_they_were(self, recipe: Mapping[str, Any]) -> None:
        """A step leaves every `.grad` the same tensor, with the same values."""
        model = self.fresh()
        optimizer = self.build(recipe).bind(model)
        for number in range(STEPS):
            before: dict[str, tuple[Tensor | None, Tensor | None]] = {}

            def evaluate(number: int = number, before: dict[str, Any] = before) -> Tensor:
                loss = self.backward(optimizer, model, self.data(number))
                for name, parameter in model.named_parameters():
                    before.setdefault(name, (parameter.grad, copy.deepcopy(parameter.grad)))
                return loss

            self.take(optimizer, evaluate)
            for name, parameter in model.named_parameters():
                held, value = before[name]
                assert parameter.grad is held, (
                    f"after step {number} the gradient of {name} is another tensor"
                )
                if held is not None and value is not None:
                    identical([(name, value)], [(name, held)], f"step {number} changed a gradient")

    @law(
        examples=5,
        recipe="recipes",
        when=st.lists(st.sampled_from(["before", "after"]), min_size=1, max_size=2, unique=True),
    )
    def test_evaluation_changes_nothing(
        self, recipe: Mapping[str, Any], when: Sequence[str]
    ) -> None:
        """Forwards in evaluation mode or under `no_grad` change nothing.

        They run before the training forward, or after its backward.
        """
        made = self.build(recipe)
        model = self.fresh()
        optimizer = made.bind(model)
        for number in range(STEPS):

            def evaluate(number: int = number) -> Tensor:
                if "before" in when:
                    self._evaluate(model, number)
                loss = self.backward(optimizer, model, self.data(number))
                if "after" in when:
                    self._evaluate(model, number)
                return loss

            self.take(optimizer, evaluate)
        says = (
            f"with evaluation {' and '.join(when)} the training forward the model trains "
            "differently"
        )
        identical(outcome(*self.run(made)), outcome(model, optimizer), says)

    def _evaluate(self, model: nn.Module, number: int) -> None:
        inputs, _ = self.data(1000 + number)
        with torch.no_grad():
            model(inputs)
        model.eval()
        model(inputs)
        model.train()

    @law(examples=5, recipe="recipes")
    def test_a_closure_is_the_loop(self, recipe: Mapping[str, Any]) -> None:
        """`step(closure)` is the closure and `step()`, and returns the closure's loss."""
        made = self.build(recipe)
        model, reference = self.fresh(), self.fresh()
        optimizer, other = made.bind(model), made.bind(reference)
        for number in range(STEPS):

            def closure(number: int = number) -> Any:
                optimizer.zero_grad()
                return self.backward(optimizer, model, self.data(number))

            returned, loss = float(optimizer.step(closure)), self.step(other, reference, number)
            identical(
                outcome(reference, other),
                outcome(model, optimizer),
                "step(closure) trains differently from the loop",
            )
            assert returned == loss, (
                f"step(closure) returned {returned}, but the closure's loss is {loss}"
            )

    @law(examples=5, recipe="recipes")
    def test_a_copied_recipe_is_the_same(self, recipe: Mapping[str, Any]) -> None:
        """A deep copy of a recipe equals it and trains the same; training changes no recipe."""
        made = self.build(recipe)
        twin, shown = copy.deepcopy(made), repr(made)
        assert twin == made, f"a deep copy of the recipe differs from it: {twin!r}, not {shown}"
        found = [outcome(*self.run(each)) for each in (made, made, twin)]
        identical(
            found[0],
            found[1],
            "a recipe that is bound again trains differently: a stage remembers the first run",
        )
        identical(found[0], found[2], "a deep copy of the recipe trains differently")
        assert repr(made) == shown, f"training changed the recipe: {made!r}, not {shown}"

    @law(examples=2, recipe="recipes")
    def test_nothing_is_left_behind(self, recipe: Mapping[str, Any]) -> None:
        """`close` removes the optimizer's hooks; then steps are refused, and it can be freed."""
        model = self.fresh()
        handles = [
            model.register_forward_hook(lambda *_: None),
            model.register_forward_pre_hook(lambda *_: None),
        ]
        before = hooks(model)
        optimizer = self.build(recipe).bind(model)
        for number in range(2):
            self.step(optimizer, model, number)
        optimizer.close()
        after = hooks(model)
        assert after == before, (
            f"after close() the model has the hooks {after}, but before bind() it had {before}"
        )
        with pytest.raises(kfactk.KfactkError) as refused:
            optimizer.step()
        assert "closed" in str(refused.value), (
            f"step() after close() does not say that the optimizer was closed, but: {refused.value}"
        )
        del refused
        watch = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert watch() is None, (
            "the optimizer stays alive after close(): something still refers to it"
        )
        assert all(handle.id in (handle.hooks_dict_ref() or {}) for handle in handles), (
            "close() removed hooks that are not its own"
        )

    @law(
        examples=5,
        recipe="recipes",
        shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        bias=st.booleans(),
        seed=seeds(),
    )
    def test_a_quadratic_is_solved_in_one_step(
        self, recipe: Mapping[str, Any], shape: tuple[int, int], bias: bool, seed: int
    ) -> None:
        """With negligible damping, one step of length 1 solves least squares.

        F is `E[a a^T] kron I` there.
        """
        layer, rows, targets = least_squares(*shape, bias, seed)
        made = self._minimal(recipe, layer, lr=1.0, damping=1e-20)
        if any(rule.of_gradient for rule in made.rules):
            self.inapplicable("statistics of the mini-batch gradient are not the Fisher matrix")
        if any(EXACT not in rule.basis.laws for rule in made.rules):
            self.inapplicable(f"a basis does not claim {EXACT!r}")
        if any(rule.basis.moments_from == "gradient" for rule in made.rules):
            self.inapplicable(
                "moments of the mini-batch gradient are the Fisher's for one example only"
            )
        hessian, right = moment(rows.unsqueeze(1)), targets.T @ rows
        solution = torch.linalg.solve(hessian, right.T).T
        close(
            step_once(made, layer, rows, targets),
            solution,
            "one Newton step did not reach the least-squares solution",
            rtol=1e-5,
            atol=1e-6,
        )

    @law(
        examples=5,
        recipe="recipes",
        shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        bias=st.booleans(),
        seed=seeds(),
    )
    def test_huge_damping_makes_a_gradient_step(
        self, recipe: Mapping[str, Any], shape: tuple[int, int], bias: bool, seed: int
    ) -> None:
        """With damping tau far above the curvature, the step is the gradient times -lr / tau."""
        layer, rows, targets = least_squares(*shape, bias, seed)
        tau = 1e16
        made = self._minimal(recipe, layer, lr=0.1 * tau, damping=tau)
        if any("damped-inverse" in rule.basis.waives for rule in made.rules):
            self.inapplicable("a basis waives 'damped-inverse'")
        start = matrix_of(layer)
        gradient = sum(
            (
                torch.outer(start @ row - target, row)
                for row, target in zip(rows, targets, strict=True)
            ),
            0 * start,
        ) / len(rows)
        expected = start - 0.1 * gradient
        close(
            step_once(made, layer, rows, targets),
            expected,
            "under huge damping the step is not lr / damping times the gradient",
            rtol=1e-5,
            atol=1e-6,
        )

    def _minimal(self, recipe: Mapping[str, Any], layer: nn.Linear, **numbers: float) -> Recipe:
        """Return the recipe's curvature, basis and placement, with minimal other stages."""
        kept = {
            name: recipe[name] for name in ("curvature", "basis", "placement") if name in recipe
        }
        minimal = {
            "fisher": Columns(),
            "likelihood": Squares(),
            "clip": Unclipped(),
            "update": torch.optim.SGD,
        }
        periods = {"factor_every": 1, "scale_every": 1, "basis_every": 1}
        made = built({**kept, **minimal, **numbers, **periods})
        if made.coverage(layer).plain:
            self.inapplicable("the curvature does not support nn.Linear")
        return made


def least_squares(d_in: int, d_out: int, bias: bool, seed: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a linear layer, its inputs as rows `[N, d_in (+ 1)]`, and targets `[N, d_out]`.

    With a bias, the last column of the rows is ones.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    rows = torch.randn(8 * (d_in + 1), d_in + bias, generator=generator, dtype=torch.float64)
    if bias:
        rows[:, -1] = 1.0
    return layer, rows, torch.randn(len(rows), d_out, generator=generator, dtype=torch.float64)


def step_once(recipe: Recipe, layer: nn.Linear, rows: Tensor, targets: Tensor) -> Tensor:
    """Take one step on `mean_n |y_n - W a_n|^2 / 2`, and return the layer's matrix."""
    optimizer = recipe.bind(layer)
    output = layer(rows[:, : layer.in_features])
    optimizer.observe()
    ((output - targets).square().sum(-1).mean() / 2).backward()
    optimizer.step()
    return matrix_of(layer)


def matrix_of(layer: nn.Linear) -> Tensor:
    """Return weight and bias as one matrix, the bias as the last column."""
    columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias.unsqueeze(1)]
    return torch.cat([column.detach() for column in columns], 1)
