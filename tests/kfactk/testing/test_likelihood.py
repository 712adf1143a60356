"""Likelihoods that break a law, and which; and right ones of other kinds than ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, distributions as dist

from kfactk import CaptureError
from kfactk.testing import LikelihoodLaws
from kfactk.testing._support.distributions import Cells, cells
from kfactk.testing._support.strategies import Terms, terms
from tests.kfactk.testing.broken import caught
from tests.kfactk.testing.outside import Correlated, Poisson, Rates, Scaled, Weighted

VIEW = "test_the_view_is_the_output"
REFUSED = "test_what_cannot_be_its_parameters_is_refused"
NLL = "test_nll_is_minus_the_log_probability"
DRAWS = "test_draws_follow_the_distribution"
PURE = "test_draws_depend_on_view_and_generator_alone"
ROOT = "test_root_columns_make_the_fisher_information"
WEIGHTS = "test_terms_weigh_what_the_batch_says"


class PoissonLaws(LikelihoodLaws):
    def distribution(self, row: Tensor) -> dist.Distribution:
        return dist.Poisson(row.exp())


class TestPoisson(PoissonLaws):
    stage = Poisson


class WeightedLaws(PoissonLaws):
    widths = (1, 2)
    weights = (0.0, 1.0, 2.5)

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        return {"w": weights}


class TestWeightedPoisson(WeightedLaws):
    stage = Weighted


class ScaledLaws(LikelihoodLaws):
    widths = (2,)
    normalised = False

    def distribution(self, row: Tensor) -> dist.Distribution:
        return dist.Normal(row[0], (row[1] / 2).exp())


class TestScaled(ScaledLaws):
    stage = Scaled


class CorrelatedLaws(LikelihoodLaws):
    widths = (2,)

    def distribution(self, row: Tensor) -> dist.Distribution:
        return dist.MultivariateNormal(row, scale_tril=Correlated.factor)


class TestCorrelated(CorrelatedLaws):
    stage = Correlated

    def cells(self, found: Any, draws: Tensor) -> list[Cells]:
        straight = torch.linalg.solve_triangular(
            found.scale_tril, (draws - found.mean).T, upper=False
        ).T
        return cells(dist.Normal(torch.zeros(2), torch.ones(2)), straight)


class TestRates(LikelihoodLaws):
    """Parameters that are bounded: the class says which outputs are tried."""

    stage = Rates
    widths = (1, 2)

    def distribution(self, row: Tensor) -> dist.Distribution:
        return dist.Poisson(row)

    def cases(self) -> st.SearchStrategy[Terms]:
        return terms(self.widths).map(lambda case: Terms(case.rows.exp(), None))

    def typical(self, width: int, seed: int) -> Tensor:
        return super().typical(width, seed).exp()


class HalfRoot(Poisson):
    def root(self, view: Tensor) -> Iterator[Tensor]:
        yield from (column.square() for column in super().root(view))


class DiagonalRoot(Poisson):
    def root(self, view: Tensor) -> Iterator[Tensor]:
        yield sum(super().root(view))


class RootWithGraph(Poisson):
    def root(self, view: Tensor) -> Iterator[Tensor]:
        yield (view / 2).exp()


class MeanNll(Poisson):
    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        return super().nll(view, targets) / view.shape[-1]


class UnsummedNll(Poisson):
    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        return view.exp() - targets * view


class ShortNll(Poisson):
    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        return (view.exp() - targets * view).sum(-1)


class CutNll(Poisson):
    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        return super().nll(view.detach(), targets) + (targets * (view.detach() - view)).sum(-1)


class Warm(Poisson):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(1.02 * view.detach().exp(), generator)


class Rounded(Poisson):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return super().sample(view, generator) + 0.5


class SharedByComponents(Scaled):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return view.detach() + torch.randn(
            *view.shape[:2], 1, generator=generator, dtype=view.dtype
        )


class SharedByTerms(Scaled):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(view), 1, generator=generator, dtype=view.dtype)
        return (view[..., 0] + (view[..., 1] / 2).exp() * noise).detach()


class SharedByExamples(Scaled):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(
            -(len(view) // -2), view.shape[1], generator=generator, dtype=view.dtype
        )
        return (
            view[..., 0] + (view[..., 1] / 2).exp() * noise.repeat_interleave(2, 0)[: len(view)]
        ).detach()


class OneTarget(Poisson):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return super().sample(view, generator).sum(-1)


class GlobalDraws(Poisson):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(view.detach().exp())


class SeededGlobally(Poisson):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return super().sample(view, torch.Generator().manual_seed(torch.initial_seed() % 2**32))


class ForgetsTheGenerator(Poisson):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return super().sample(view, torch.Generator().manual_seed(0))


class Stuck(Poisson):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return super().sample(view, torch.Generator().set_state(generator.get_state()))


class DrawsWithGraph(Scaled):
    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return view[..., 0] + torch.randn(view.shape[:2], generator=generator, dtype=view.dtype)


class CutView(Poisson):
    def view(self, output: Tensor) -> Tensor:
        return super().view(output).detach()


class TwiceTheView(Poisson):
    def view(self, output: Tensor) -> Tensor:
        return super().view(output) * 2


class FlatView(Poisson):
    def view(self, output: Tensor) -> Tensor:
        super().view(output)
        return output


class AnyView(Poisson):
    def view(self, output: Tensor) -> Tensor:
        return output.reshape(len(output), 1, -1)


class SaysNothing(Poisson):
    def view(self, output: Tensor) -> Tensor:
        try:
            return super().view(output)
        except CaptureError:
            raise CaptureError from None


@pytest.mark.parametrize(
    ("stage", "laws", "law", "says"),
    [
        (
            HalfRoot,
            PoissonLaws,
            ROOT,
            "the root's outer products do not sum to the Fisher information",
        ),
        (
            DiagonalRoot,
            PoissonLaws,
            ROOT,
            "the root's outer products do not sum to the Fisher information",
        ),
        (
            RootWithGraph,
            PoissonLaws,
            ROOT,
            "a column of the root requires gradients: it must be detached",
        ),
        (MeanNll, PoissonLaws, NLL, "nll is not minus the log-probability of the distribution"),
        (
            UnsummedNll,
            PoissonLaws,
            NLL,
            r"nll has shape \[.*\]: it must be one number for each term",
        ),
        (ShortNll, PoissonLaws, NLL, "nll is not minus the log-probability of the distribution"),
        (
            CutNll,
            PoissonLaws,
            NLL,
            r"the gradient of nll is not minus that of .* \(terms mixed, or a part detached\?\)",
        ),
        (
            Warm,
            PoissonLaws,
            DRAWS,
            r"draws do not follow the .* of 200000 draws have values of probability .* "
            r"fewer than 1e-09 of all cases",
        ),
        (Rounded, PoissonLaws, DRAWS, r"sampler drew \d+\.5, which the distribution does not give"),
        (SharedByTerms, ScaledLaws, DRAWS, "the terms of one example are not drawn independently"),
        (SharedByExamples, ScaledLaws, DRAWS, "neighbouring examples are not drawn independently"),
        (
            OneTarget,
            PoissonLaws,
            DRAWS,
            r"drawn targets have shape \[200000, 2\], not \[N, S\] and the shape of one value",
        ),
        (GlobalDraws, PoissonLaws, PURE, "drawing changes the global random state"),
        (SeededGlobally, PoissonLaws, PURE, "the same view and generator give other draws"),
        (ForgetsTheGenerator, PoissonLaws, PURE, "another seed gives the same draws"),
        (Stuck, PoissonLaws, PURE, "two draws in a row from one generator are the same"),
        (DrawsWithGraph, ScaledLaws, PURE, "drawn targets require gradients"),
        (
            CutView,
            PoissonLaws,
            VIEW,
            "does not require gradients: it must share the output's graph",
        ),
        (
            TwiceTheView,
            PoissonLaws,
            VIEW,
            "does not hold the output's numbers, terms in order and the event last",
        ),
        (FlatView, PoissonLaws, VIEW, r"has shape \[\d, \d\], not \[N, S, C\]"),
        (AnyView, PoissonLaws, REFUSED, "an output of integers is not refused with a CaptureError"),
        (
            SaysNothing,
            PoissonLaws,
            REFUSED,
            "is not refused with a CaptureError that says anything",
        ),
        (
            Poisson,
            ScaledLaws,
            REFUSED,
            "an output of width 1, which is not among the class' `widths`, is not refused",
        ),
        (Poisson, WeightedLaws, WEIGHTS, "terms do not weigh what the batch says"),
    ],
)
def test_a_broken_likelihood_is_caught(
    stage: type[Poisson], laws: type[LikelihoodLaws], law: str, says: str
) -> None:
    found = caught(laws, stage, law)
    assert list(found) == [law]
    assert re.search(says, found[law], re.DOTALL), found[law]


def test_noise_shared_by_components_is_caught() -> None:
    class TwoMeans(LikelihoodLaws):
        widths = (2,)

        def distribution(self, row: Tensor) -> dist.Distribution:
            return dist.Independent(dist.Normal(row, 1.0), 1)

    assert "draws do not follow" in caught(TwoMeans, SharedByComponents, DRAWS)[DRAWS]


def test_what_may_be_left_out_of_nll_is_said_by_the_class() -> None:
    assert caught(PoissonLaws, ShortNll, NLL, normalised=False) == {}
    assert (
        "by more than a constant"
        in caught(PoissonLaws, MeanNll, NLL, normalised=False, widths=(2, 3))[NLL]
    )


def test_mixed_terms_are_caught() -> None:
    class Reversed(Poisson):
        def view(self, output: Tensor) -> Tensor:
            if not (output.is_floating_point() and output.requires_grad and output.ndim):
                raise CaptureError("no log-rates")
            return output.flatten(1, -2).flip(1) if output.ndim > 2 else super().view(output)

    found = caught(PoissonLaws, Reversed, VIEW, event_axis=-1)
    assert "terms in order" in found[VIEW]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda w: w.sqrt(), "terms do not weigh what the batch says"),
        (lambda w: w[:, 0], "not one for each term"),
        (lambda w: w.requires_grad_(), "weights require gradients"),
    ],
)
def test_wrong_weights_are_caught(spoil: Any, says: str) -> None:
    class Wrong(Weighted):
        def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor:
            return spoil(super().term_weights(view, batch).clone())

    assert says in caught(WeightedLaws, Wrong, WEIGHTS)[WEIGHTS]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (
            {"w": None},
            "a batch without the weights or labels that the stage names is not refused",
        ),
        ({"w": -1.0}, "a weight of -1.0 is not refused with"),
    ],
)
def test_weights_that_are_not_checked_are_caught(batch: dict[str, Any], says: str) -> None:
    class Lenient(Weighted):
        def term_weights(self, view: Tensor, given: Mapping[str, Any]) -> Tensor:
            if batch["w"] is None:
                return given.get("w", torch.ones(view.shape[:2], dtype=view.dtype))
            return super().term_weights(
                view, {name: each.clamp(min=0) for name, each in given.items()}
            )

    assert says.split(" with")[0] in caught(WeightedLaws, Lenient, WEIGHTS)[WEIGHTS]


def test_other_errors_are_no_refusal() -> None:
    class Crashes(Poisson):
        def view(self, output: Tensor) -> Tensor:
            return super().view(output) if output.is_floating_point() else output.logits

    assert (
        "is not refused with a CaptureError, but ends in"
        in caught(PoissonLaws, Crashes, REFUSED)[REFUSED]
    )


def test_what_the_class_has_to_write_is_said() -> None:
    assert (
        "does not say which distribution its likelihood stands for"
        in caught(LikelihoodLaws, Poisson, NLL)[NLL]
    )
    assert (
        "Write `def cells(self, found, draws)`" in caught(CorrelatedLaws, Correlated, DRAWS)[DRAWS]
    )

    class Mixed(PoissonLaws):
        def distribution(self, row: Tensor) -> dist.Distribution:
            return dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Poisson(row.exp().expand(2, -1).T)
            )

    assert "Write `def information(self, row)`" in caught(Mixed, Poisson, ROOT)[ROOT]
