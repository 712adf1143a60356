"""Laws of a whole recipe: what holds for every combination of stages that `kfactk.build` accepts.

    class TestMine(PipelineLaws):
        recipe = {"basis": "mine", "update": "momentum"}

The laws train a small model some steps. A recipe that wants another model, batch or loss says so in `model`, `batch` and `loss`.
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
    flattened,
    hooks,
    identical,
    outcome,
    rearrange,
    through_file,
)
from kfactk.testing._support.truth import moment

EXACT = "exact-when-kronecker"
"""What a basis claims that represents the Fisher matrix exactly wherever that is a Kronecker product."""


class PipelineLaws(Training):
    """Laws of recipes. `recipe` holds arguments of `kfactk.build`; the stages in it are put to work together.

    Example:
        >>> class TestPlain(PipelineLaws):
        ...     recipe = {"update": torch.optim.SGD, "lr": 0.1}
        >>> TestPlain().test_gradients_stay_as_they_were()
    """

    @law(examples=5, recipe="recipes", seed=seeds())
    def test_equal_seeds_give_equal_runs(self, recipe: Mapping[str, Any], seed: int) -> None:
        """Two runs are equal bit for bit, whatever the global random state, which they neither read nor move."""
        made, found = self.build(recipe), []
        for number in (seed, seed + 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                before = torch.get_rng_state(), random.getstate()
                found.append(outcome(*self.run(made)))
                assert torch.equal(before[0], torch.get_rng_state()), (
                    "training moved torch's global random state; draw from a generator"
                )
                assert before[1] == random.getstate(), (
                    "training moved the random state of the module random; draw from a generator"
                )
        identical(
            found[0],
            found[1],
            "two runs of one recipe under another global random state are not the same",
        )

    @law(examples=5, recipe="recipes", saved_at=st.integers(0, 7), used=st.integers(0, 2))
    def test_a_resumed_run_is_the_uninterrupted_one(
        self, recipe: Mapping[str, Any], saved_at: int, used: int
    ) -> None:
        """A state saved at any step, between refreshes too, and loaded into a fresh or used optimizer goes on bit for bit."""
        made = self.build(recipe)
        model, optimizer = self.run(made, saved_at)
        weights, state = through_file(model.state_dict()), through_file(optimizer.state_dict())
        resumed_model, resumed = self.run(made, used)
        resumed_model.load_state_dict(weights)
        resumed.load_state_dict(state)
        assert resumed.steps == saved_at, (
            f"the state was saved after {saved_at} steps, and the resumed optimizer has {resumed.steps}"
        )
        for number in range(saved_at, saved_at + PERIODS["basis_every"] + 1):
            losses = [
                self.step(optimizer, model, number),
                self.step(resumed, resumed_model, number),
            ]
            says = f"saved after {saved_at} steps and resumed, the run has left the uninterrupted one at step {number}"
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
        """Modules that are registered in another order, with the same forward, train alike."""
        made, found = self.build(recipe), []
        for changed in (False, True):
            model = self.fresh()
            if changed:
                for parent in model.modules():
                    if type(parent).forward not in (
                        nn.Sequential.forward,
                        nn.Module.forward,
                    ):  # whose order means something
                        rearrange(parent._modules, order)
                        rearrange(parent._parameters, order)
            optimizer = made.bind(model)
            for number in range(STEPS):
                self.step(optimizer, model, number)
            found.append(dict(outcome(model, optimizer)))
        self.alike(
            found[0],
            found[1],
            f"with its layers registered in another order ({order}) the model trains otherwise",
        )

    @law(
        examples=5,
        recipe="steady",
        cuts=st.sets(st.integers(1, EXAMPLES - 1), min_size=1, max_size=3),
    )
    def test_accumulated_micro_batches_are_one_batch(
        self, recipe: Mapping[str, Any], cuts: set[int]
    ) -> None:
        """Without BatchNorm it does not matter how a batch is split into micro-batches whose gradients accumulate."""
        made = self.still(self.build(recipe))
        listens, mean = not made.fisher.own_pass, made.reduction == "mean"
        if (
            listens and mean
        ):  # a share of a mean is a mean no more: an estimator that listens to the loss wants a sum then
            made = made.evolve(reduction="sum")
        edges = [0, *sorted(cuts), EXAMPLES]

        def whole(optimizer: Optimizer, model: nn.Module, number: int) -> None:
            self.backward(optimizer, model, self.data(number), num_terms=listens and mean)

        def split(optimizer: Optimizer, model: nn.Module, number: int) -> None:
            inputs, targets = self.data(number)
            for start, end in itertools.pairwise(edges):
                share = (end - start) / EXAMPLES if mean and not listens else 1.0
                self.backward(
                    optimizer,
                    model,
                    (inputs[start:end], targets[start:end]),
                    share,
                    num_terms=listens and mean,
                )

        sizes = [end - start for start, end in itertools.pairwise(edges)]
        self.compare(
            made,
            whole,
            split,
            f"a batch of {EXAMPLES} accumulated in micro-batches of {sizes} trains otherwise",
        )

    @law(examples=5, recipe="steady", copies=st.integers(2, 3))
    def test_a_batch_several_times_over_is_one_batch(
        self, recipe: Mapping[str, Any], copies: int
    ) -> None:
        """Repeating every example of a batch changes nothing under a mean loss."""
        made = self.still(self.build(recipe))
        if made.basis.moments_from == "gradient":
            self.inapplicable(
                "moments of the mini-batch gradient estimate the Fisher from independent examples, which copies are not"
            )
        if made.reduction == "sum":
            self.inapplicable("a summed loss grows with its batch")

        def once(optimizer: Optimizer, model: nn.Module, number: int) -> None:
            self.backward(optimizer, model, self.data(number))

        def repeated(optimizer: Optimizer, model: nn.Module, number: int) -> None:
            inputs, targets = self.data(number)
            self.backward(
                optimizer, model, (torch.cat([inputs] * copies), torch.cat([targets] * copies))
            )

        self.compare(
            made,
            once,
            repeated,
            f"with every example {copies} times in its batch the model trains otherwise",
        )

    @law(examples=2, recipe="steady")
    @on_ranks
    def test_two_ranks_are_one_process(self, recipe: Mapping[str, Any]) -> None:
        """Two ranks with half of each batch do what one process does with the whole, and the same bit for bit."""
        equal_on_ranks(self, recipe)

    @law(examples=5, recipe="recipes")
    def test_gradients_stay_as_they_were(self, recipe: Mapping[str, Any]) -> None:
        """After a step every `.grad` is the tensor that it was, unchanged."""
        model = self.fresh()
        optimizer = self.build(recipe).bind(model)
        for number in range(STEPS):
            optimizer.zero_grad()
            self.backward(optimizer, model, self.data(number))
            before = {
                name: (parameter.grad, copy.deepcopy(parameter.grad))
                for name, parameter in model.named_parameters()
            }
            optimizer.step()
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
        """Forwards in evaluation mode or under `no_grad`, before the training forward or after its backward, count for nothing."""
        made = self.build(recipe)
        model = self.fresh()
        optimizer = made.bind(model)
        for number in range(STEPS):
            optimizer.zero_grad()
            if "before" in when:
                self._look(model, number)
            self.backward(optimizer, model, self.data(number))
            if "after" in when:
                self._look(model, number)
            optimizer.step()
        says = f"with forwards that must not count {' and '.join(when)} the training forward the model trains otherwise"
        identical(outcome(*self.run(made)), outcome(model, optimizer), says)

    def _look(self, model: nn.Module, number: int) -> None:
        inputs, _ = self.data(1000 + number)
        with torch.no_grad():
            model(inputs)
        model.eval()
        model(inputs)
        model.train()

    @law(examples=5, recipe="recipes")
    def test_a_closure_is_the_loop(self, recipe: Mapping[str, Any]) -> None:
        """`step(closure)` is forward, backward and `step()`, and returns what the closure does."""
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
                "step(closure) trains otherwise than the loop",
            )
            assert returned == loss, (
                f"step(closure) returned {returned}, where the closure's loss is {loss}"
            )

    @law(examples=5, recipe="recipes")
    def test_a_copied_recipe_is_the_same(self, recipe: Mapping[str, Any]) -> None:
        """A deep copy of a recipe equals it, trains alike, and neither binding nor training changes a recipe."""
        made = self.build(recipe)
        twin, shown = copy.deepcopy(made), repr(made)
        assert twin == made, f"a deep copy of the recipe is another: {twin!r}, not {shown}"
        found = [outcome(*self.run(each)) for each in (made, made, twin)]
        identical(
            found[0],
            found[1],
            "a recipe that is bound again trains otherwise: a stage remembers the first run",
        )
        identical(found[0], found[2], "a deep copy of the recipe trains otherwise")
        assert repr(made) == shown, f"training changed the recipe: {made!r}, not {shown}"

    @law(examples=2, recipe="recipes")
    def test_nothing_is_left_behind(self, recipe: Mapping[str, Any]) -> None:
        """After `close` the model has the hooks it had before, a further step is refused, and the optimizer can be freed."""
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
            f"after close() the model has the hooks {after}, where it had {before} before bind()"
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
            "the optimizer is kept alive after close(), by something that refers to it"
        )
        assert all(handle.id in (handle.hooks_dict_ref() or {}) for handle in handles), (
            "close() took off hooks that are not its own"
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
        """With negligible damping one step of length 1 on least squares lands on the solution, F being `E[a a^T] kron I` there."""
        layer, rows, targets = least_squares(*shape, bias, seed)
        made = self._plainest(recipe, layer, lr=1.0, damping=1e-20)
        if EXACT not in made.basis.laws:
            self.inapplicable(f"the basis does not claim {EXACT!r}")
        if made.basis.moments_from == "gradient":
            self.inapplicable(
                "moments of the mini-batch gradient are the Fisher's for one example only"
            )
        hessian, right = moment(rows.unsqueeze(1)), targets.T @ rows
        solution = torch.linalg.solve(hessian, right.T).T
        close(
            stepped(made, layer, rows, targets),
            solution,
            "one Newton step did not land on the least-squares solution",
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
        """With a damping tau far above the curvature the step is the plain gradient's, of length lr / tau."""
        layer, rows, targets = least_squares(*shape, bias, seed)
        tau = 1e16
        made = self._plainest(recipe, layer, lr=0.1 * tau, damping=tau)
        start = joined(layer)
        gradient = sum(
            (
                torch.outer(start @ row - target, row)
                for row, target in zip(rows, targets, strict=True)
            ),
            0 * start,
        ) / len(rows)
        expected = start - 0.1 * gradient
        close(
            stepped(made, layer, rows, targets),
            expected,
            "under huge damping the step is not lr / damping times the gradient",
            rtol=1e-5,
            atol=1e-6,
        )

    def _plainest(self, recipe: Mapping[str, Any], layer: nn.Linear, **numbers: float) -> Recipe:
        """The recipe's curvature and basis, with all else as plain as can be."""
        kept = {
            name: recipe[name] for name in ("curvature", "basis", "placement") if name in recipe
        }
        plain = {
            "fisher": Columns(),
            "likelihood": Squares(),
            "clip": Unclipped(),
            "update": torch.optim.SGD,
        }
        made = kfactk.build(
            **{**kept, **plain, **numbers, "factor_every": 1, "scale_every": 1, "basis_every": 1}
        )
        if made.coverage(layer).plain:
            self.inapplicable("the curvature does not support nn.Linear")
        return made


def least_squares(d_in: int, d_out: int, bias: bool, seed: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear layer, its inputs as rows `[N, d_in (+ 1)]` (the bias' column of ones last), and targets `[N, d_out]`."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    rows = torch.randn(8 * (d_in + 1), d_in + bias, generator=generator, dtype=torch.float64)
    if bias:
        rows[:, -1] = 1.0
    return layer, rows, torch.randn(len(rows), d_out, generator=generator, dtype=torch.float64)


def stepped(recipe: Recipe, layer: nn.Linear, rows: Tensor, targets: Tensor) -> Tensor:
    """The layer's matrix after one step on `mean_n |y_n - W a_n|^2 / 2`."""
    optimizer = recipe.bind(layer)
    output = layer(rows[:, : layer.in_features])
    optimizer.observe()
    ((output - targets).square().sum(-1).mean() / 2).backward()
    optimizer.step()
    return joined(layer)


def joined(layer: nn.Linear) -> Tensor:
    """Weight and bias side by side."""
    columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias.unsqueeze(1)]
    return torch.cat([column.detach() for column in columns], 1)
