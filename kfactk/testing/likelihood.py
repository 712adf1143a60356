"""Laws of likelihoods: each is a distribution that torch.distributions also has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Distribution

from kfactk.errors import CaptureError, OptionError
from kfactk.testing._support import distributions
from kfactk.testing._support.distributions import Cells, drawn, score, surprise
from kfactk.testing._support.laws import Laws, close, effort, law
from kfactk.testing._support.strategies import Terms, seeds, terms

DRAWS = 200_000
"""Number of draws for each of two rows, to measure frequencies."""
PROBES = 100
"""Number of terms to tell draws apart."""


class LikelihoodLaws(Laws):
    """Laws of a likelihood, given the distribution that it stands for.

        class TestPoisson(LikelihoodLaws):
            stage = "poisson"

            def distribution(self, row):
                return torch.distributions.Poisson(row.exp())

    The target of one term has the form of `distribution(row).sample()`. The targets of a forward
    are stacked: `[N, S]` and then the shape of one value.

    Example:
        >>> class TestBernoulli(LikelihoodLaws):
        ...     stage = "bernoulli"
        ...     def distribution(self, row):
        ...         return torch.distributions.Bernoulli(logits=row)
        >>> TestBernoulli().test_nll_is_minus_the_log_probability()
    """

    family = "likelihood"

    widths: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    """Possible numbers C of an output for one term. Smaller numbers that are not among them must be
    refused."""
    event_axis: ClassVar[int | None] = None
    """Dimension with those numbers in outputs of more than two dimensions; `None` where the stage
    takes no such outputs."""
    weights: ClassVar[tuple[float, ...]] = (1.0,)
    """Weights that `batch` can give to terms: (0.0, 1.0) for a mask."""
    normalised: ClassVar[bool] = True
    """Whether `nll` is the whole negative log-probability. If not, it may lack what does not depend
    on the parameters."""

    def distribution(self, row: Tensor) -> Distribution:
        """Return the distribution of one term's target, differentiable in the output `[C]`.

        A batch shape stands for independent components. Each class has to write it.
        """
        raise OptionError(
            f"{type(self).__name__} does not say which distribution its likelihood stands for. "
            "Write `def distribution(self, row)`, which returns the "
            "torch.distributions.Distribution of one term's target, given the output [C] for that "
            "term."
        )

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        """Return a batch that gives the weights `[N, S]` to terms with these targets.

        Write it where the class has `weights`.
        """
        return {}

    def information(self, row: Tensor) -> Tensor:
        """Return the Fisher information `[C, C]` of the output `[C]` for one term.

        Write it only where the values of the distribution cannot be enumerated and torch knows no
        formula for its Kullback-Leibler divergence.
        """
        return distributions.information(self.distribution, row)

    def cells(self, found: Distribution, draws: Tensor) -> list[Cells]:
        """Cut independent components of draws `[n, ...]` into cells of known probability.

        Write it only where the values of the distribution cannot be enumerated and it has no `cdf`.
        """
        return distributions.cells(found, draws)

    def cases(self) -> st.SearchStrategy[Terms]:
        """Return a strategy for outputs of a few terms; replace it where parameters are bounded."""
        return terms(self.widths)

    def typical(self, width: int, seed: int) -> Tensor:
        """Return outputs of two terms, `[2, C]`, whose values are all frequent enough to count.

        Replace it where parameters are bounded.
        """
        return _normal(seed, 2, width)

    def extents(self) -> st.SearchStrategy[list[int]]:
        """Return a strategy for the sizes of dimensions other than examples and event."""
        return (
            st.just([])
            if self.event_axis is None
            else st.lists(st.integers(1, 3), min_size=self._least(), max_size=3)
        )

    def output(self, rows: Tensor, extents: list[int]) -> Tensor:
        """Return the model's output for the terms `[N, S, C]`, S the product of the extents.

        It requires a gradient.
        """
        shaped = rows.reshape(len(rows), *extents, rows.shape[-1])
        placed = shaped if self.event_axis is None else shaped.movedim(-1, self.event_axis)
        return placed.detach().clone().requires_grad_()

    @law(case="cases", extents="extents", seed=seeds())
    def test_the_view_is_the_output(self, case: Terms, extents: list[int], seed: int) -> None:
        """The view has the output's numbers as [N, S, C], terms in order, and shares its graph."""
        n, s, c = len(case.rows), math.prod(extents), case.rows.shape[-1]
        rows = _normal(seed, n, s, c)
        output = self.output(rows, extents)
        view = self.subject().view(output)
        looks = f"the view of an output of shape {list(output.shape)}"
        assert tuple(view.shape) == (n, s, c), (
            f"{looks} has shape {list(view.shape)}, not [N, S, C] = {[n, s, c]}"
        )
        close(
            view.detach(),
            rows,
            f"{looks} does not hold the output's numbers, terms in order and the event last",
        )
        assert view.requires_grad, (
            f"{looks} does not require gradients: it must share the output's graph"
        )
        cotangent = _normal(seed + 1, n, s, c)
        (gradient,) = torch.autograd.grad((view * cotangent).sum(), output)
        close(
            gradient,
            self.output(cotangent, extents).detach(),
            f"a gradient of {looks} does not reach the output as it is",
        )

    @law()
    def test_what_cannot_be_its_parameters_is_refused(self) -> None:
        """Outputs that cannot be parameters of the distribution raise a CaptureError."""
        stage, width = self.subject(), self.widths[0]
        bad = [
            (torch.zeros(2, width, dtype=torch.long), "of integers"),
            (torch.zeros((), requires_grad=True), "that is a single number, like a loss,"),
            (torch.zeros(2, width), "that does not require gradients"),
        ]
        bad += [
            (
                torch.zeros(2, c, requires_grad=True),
                f"of width {c}, which is not among the class' `widths`,",
            )
            for c in range(1, max(self.widths))
            if c not in self.widths
        ]
        if 1 not in self.widths:
            bad.append(
                (
                    torch.zeros(3, requires_grad=True),
                    "of one number in each example, which is not among the class' `widths`,",
                )
            )
        for output, what in bad:
            _refused(
                partial(stage.view, output), f"an output {what} is not refused with a CaptureError"
            )
        try:
            view = stage.view(torch.zeros(3, requires_grad=True))
        except CaptureError:
            return
        assert tuple(view.shape) == (3, 1, 1), (
            "an output of shape [3] is neither refused nor viewed as [3, 1, 1], but as "
            f"{list(view.shape)}"
        )

    @law(case="cases", other="cases", seed=seeds())
    def test_nll_is_minus_the_log_probability(self, case: Terms, other: Terms, seed: int) -> None:
        """The negative log-likelihood and its gradient are those of the distribution."""
        stage, view = self.subject(), case.rows.clone().requires_grad_()
        targets = drawn(self.distribution, case.rows, seed)
        found = stage.nll(view, targets)
        assert found.shape == view.shape[:2], (
            f"nll has shape {list(found.shape)}: it must be one number for each term, "
            f"{list(view.shape[:2])}"
        )
        expected = self._nll(case.rows, targets)
        if self.normalised:
            close(
                found.detach(), expected, "nll is not minus the log-probability of the distribution"
            )
        elsewhere = case.rows + 0.1
        difference = found.detach() - stage.nll(elsewhere, targets)
        says = (
            "nll differs from minus the log-probability of the distribution by more than a constant"
        )
        close(difference, expected - self._nll(elsewhere, targets), says)
        cotangent = _normal(seed, *found.shape)
        (gradient,) = torch.autograd.grad((cotangent * found).sum(), view)
        scores = [
            score(self.distribution, row, target) for row, target in _each(case.rows, targets)
        ]
        truth = -cotangent.unsqueeze(-1) * torch.stack(scores).reshape(view.shape)
        close(
            gradient,
            truth,
            "the gradient of nll is not minus that of the distribution's log-probability "
            "(terms mixed, or a part detached?)",
        )

    @law()
    def test_draws_follow_the_distribution(self) -> None:
        """Targets follow the distribution, independently over components, terms and examples.

        Correct draws fail with probability below 1e-8 for each seed, by Chernoff's bound for each
        frequency (`kfactk.testing._support.distributions.surprise`). The seeds are fixed, so the
        law always gives the same.
        """
        for seed in range(effort(1)):
            for width in self.widths:
                self._follows(self.typical(width, seed), seed)

    def _follows(self, rows: Tensor, seed: int) -> None:
        view = rows.expand(DRAWS, *rows.shape).contiguous()
        draws = self.subject().sample(view, torch.Generator().manual_seed(seed))
        shape = (DRAWS, 2, *self.distribution(rows[0]).sample().shape)
        assert tuple(draws.shape) == shape, (
            f"drawn targets have shape {list(draws.shape)}, not [N, S] and the shape of one value, "
            f"{shape}"
        )
        parts = [self.cells(self.distribution(row), draws[:, s]) for s, row in enumerate(rows)]
        for row, each in zip(rows, parts, strict=True):
            found = surprise(each)
            assert not found, (
                f"draws do not follow the distribution of the output {row.tolist()}: {found}"
            )
        found = surprise([parts[0][0], parts[1][0]])
        assert not found, f"the terms of one example are not drawn independently: {found}"
        codes, probabilities = parts[0][0].codes, parts[0][0].probabilities
        found = surprise([Cells(codes[::2], probabilities), Cells(codes[1::2], probabilities)])
        assert not found, f"neighbouring examples are not drawn independently: {found}"

    @law(examples=10, seed=seeds())
    def test_draws_depend_on_view_and_generator_alone(self, seed: int) -> None:
        """Draws depend on the view and the generator; the global random state plays no part."""
        stage, rows = self.subject(), self.typical(self.widths[-1], seed).expand(PROBES, -1, -1)
        view = rows.clone().requires_grad_()
        generator, state = torch.Generator().manual_seed(seed), torch.get_rng_state()
        first = stage.sample(view, generator)
        assert torch.equal(torch.get_rng_state(), state), (
            "drawing changes the global random state: draw with the given generator"
        )
        assert not first.requires_grad, (
            "drawn targets require gradients: they must be detached from the view's graph"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            again = stage.sample(view, torch.Generator().manual_seed(seed))
        assert torch.equal(first, again), (
            "the same view and generator give other draws: they depend on something else"
        )
        assert not torch.equal(
            first, stage.sample(view, torch.Generator().manual_seed(seed + 1))
        ), "another seed gives the same draws"
        assert not torch.equal(first, stage.sample(view, generator)), (
            "two draws in a row from one generator are the same"
        )
        assert torch.equal(view.detach(), rows), "drawing changes the view"

    @law(case="cases")
    def test_root_columns_make_the_fisher_information(self, case: Terms) -> None:
        """The outer products of the root's columns sum to each term's Fisher information."""
        view = case.rows.clone().requires_grad_()
        total = torch.zeros(*view.shape, view.shape[-1], dtype=view.dtype)
        for column in self.subject().root(view):
            assert column.shape == view.shape, (
                f"a column of the root has shape {list(column.shape)}, not that of the view, "
                f"{list(view.shape)}"
            )
            assert not column.requires_grad, (
                "a column of the root requires gradients: it must be detached"
            )
            total += column.unsqueeze(-1) * column.unsqueeze(-2)
        expected = torch.stack([self.information(row) for row in case.rows.flatten(0, 1)]).reshape(
            total.shape
        )
        close(
            total,
            expected,
            "the root's outer products do not sum to the Fisher information",
            rtol=1e-9,
            atol=1e-12,
        )

    @law(case="cases", data=st.data(), seed=seeds())
    def test_terms_weigh_what_the_batch_says(
        self, case: Terms, data: st.DataObject, seed: int
    ) -> None:
        """Each term has the weight in the batch, or 1; a missing argument is refused."""
        stage, (n, s) = self.subject(), case.rows.shape[:2]
        given = data.draw(
            st.lists(st.sampled_from(self.weights), min_size=n * s, max_size=n * s), label="weights"
        )
        weights = torch.tensor(given, dtype=torch.float64).reshape(n, s)
        targets = drawn(self.distribution, case.rows, seed)
        batch = self.batch(targets, weights)
        found = stage.term_weights(case.rows, batch)
        if found is None:
            found = torch.ones(n, s, dtype=torch.float64)
        assert tuple(found.shape) == (n, s), (
            f"weights have shape {list(found.shape)}, not one for each term, {[n, s]}"
        )
        assert not found.requires_grad, "weights require gradients: they must be detached"
        close(found.double(), weights, "terms do not weigh what the batch says")
        if self.weights == (1.0,):
            return
        _refused(
            lambda: stage.term_weights(case.rows, {}),
            "a batch without the weights or labels that the stage names is not refused",
        )
        if set(self.weights) <= {0.0, 1.0}:
            return
        for bad in (-1.0, math.nan, math.inf):
            wrong = weights.clone()
            wrong[0, 0] = bad
            _refused(
                partial(stage.term_weights, case.rows, self.batch(targets, wrong)),
                f"a weight of {bad} is not refused",
            )

    def _least(self) -> int:
        """Return how many other dimensions an output needs to have dimension `event_axis`."""
        axis = self.event_axis or 1
        return max(0, axis - 1 if axis > 0 else -axis - 1)

    def _nll(self, rows: Tensor, targets: Tensor) -> Tensor:
        each = [
            -distributions.log_prob(self.distribution(row), target)
            for row, target in _each(rows, targets)
        ]
        return torch.stack(each).reshape(rows.shape[:2])


def _each(rows: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(rows.flatten(0, 1), targets.flatten(0, 1), strict=True)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _refused(call: Callable[[], object], says: str) -> None:
    try:
        call()
    except CaptureError as error:
        said = str(error).strip()
    except Exception as error:
        raise AssertionError(f"{says}, but ends in {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(says)
    assert said, f"{says} that says anything"
