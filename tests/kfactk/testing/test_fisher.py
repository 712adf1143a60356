"""Fisher estimators that break a law, and which; and right ones of other kinds than ours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kfactk import Likelihood, OptionError
from kfactk.testing import FisherLaws
from kfactk.testing.fisher import natural_likelihoods
from tests.kfactk.testing.broken import caught, laws_of
from tests.kfactk.testing.outside import Scaled

Losses = Iterator[Tensor]
SCALARS = "test_losses_are_scalars_with_gradients"
DENSE = "test_outer_products_are_the_dense_fisher"
NETWORK = "test_through_a_network_they_are_the_gauss_newton_matrix"
CONVERGE = "test_outer_products_converge_to_the_dense_fisher"
MASKED = "test_masked_terms_contribute_nothing"
GENERATOR = "test_the_generator_alone_decides"
UNTOUCHED = "test_the_users_loss_and_gradients_are_left_alone"
SAYS = "test_it_says_how_it_works"


class Estimator:
    """An estimator from one function of view, likelihood, weights `[N, S]` and generator."""

    own_pass: Any = True
    seed: Any = 0

    def __init__(
        self,
        function: Callable[[Tensor, Likelihood, Tensor, torch.Generator], Losses],
        **members: Any,
    ) -> None:
        self.function = function
        vars(self).update(members)

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Losses:
        given = torch.ones(view.shape[:2], dtype=view.dtype) if weights is None else weights
        return self.function(view, likelihood, given, generator)


def drawn(
    *,
    k: int = 1,
    scale: float | None = None,
    power: float = 0.5,
    view_of: Callable[[Tensor], Tensor] = Tensor.detach,
    **how: Any,
) -> Callable[..., Losses]:
    """The sampled Fisher; the arguments spoil it."""

    def losses(
        view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
    ) -> Losses:
        for _ in range(k):
            targets = likelihood.sample(view_of(view).contiguous(), how.get("generator", generator))
            num_terms = weights**power * likelihood.nll(view, targets)
            yield num_terms.sum() * (1 / math.sqrt(k) if scale is None else scale)

    return losses


def exact(
    *, power: float = 0.5, last: int | None = None, mixed: bool = False
) -> Callable[..., Losses]:
    """The Fisher without draws; the arguments spoil it."""

    def losses(
        view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
    ) -> Losses:
        for column in likelihood.root(view):
            num_terms = weights**power * (view * column).sum(-1)
            if mixed:
                yield num_terms.sum()
                continue
            for s in range(view.shape[1])[:last]:
                yield num_terms[:, s].sum()

    return losses


def signs(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    """The root's columns with random signs; it draws no target.

    Its expectation is the Fisher matrix.
    """
    total = torch.zeros_like(view)
    for column in likelihood.root(view):
        flips = 2.0 * torch.randint(2, view.shape[:2], generator=generator) - 1
        total += flips.unsqueeze(-1) * column
    yield (weights.sqrt().unsqueeze(-1) * total * view).sum()


def flipped_once(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    """One sign for all columns of a term: the columns' cross products stay."""
    flips = 2.0 * torch.randint(2, view.shape[:2], generator=generator) - 1
    yield (weights.sqrt() * flips * (view * sum(likelihood.root(view))).sum(-1)).sum()


def most_probable(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    """A fixed draw in place of the expectation."""
    yield from drawn(generator=torch.Generator().manual_seed(0))(
        view, likelihood, weights, generator
    )


def test_a_right_estimator_that_draws_no_targets_obeys() -> None:
    assert caught(FisherLaws, Estimator(signs)) == {}


@pytest.mark.parametrize(
    ("function", "law", "says"),
    [
        (
            drawn(k=2, scale=1.0),
            CONVERGE,
            r"does not converge to the Fisher information of .*entry \[\d, \d\] is .* must be",
        ),
        (drawn(scale=1.03), CONVERGE, r"within \d\.\d standard errors"),
        (drawn(power=1.0), CONVERGE, r"weights \[0\.5, 3\.0\]"),
        (drawn(view_of=lambda view: view[:1].expand_as(view) * 0), CONVERGE, "does not converge"),
        (drawn(view_of=lambda view: 1.03 * view.detach()), CONVERGE, "does not converge"),
        (flipped_once, CONVERGE, "does not converge"),
        (most_probable, DENSE, "are not the weighted Fisher information of each example's terms"),
        (
            exact(power=1.0),
            DENSE,
            "are not the weighted Fisher information of each example's terms",
        ),
        (
            exact(last=-1),
            DENSE,
            "it gives no loss for a view|are not the weighted Fisher information",
        ),
        (
            exact(mixed=True),
            DENSE,
            "are not the weighted Fisher information of each example's terms",
        ),
        (
            exact(mixed=True),
            NETWORK,
            "the outer products of the parameters' gradients are not the Gauss-Newton matrix",
        ),
        (exact(power=0.0), MASKED, "a term of weight zero has a gradient"),
        (drawn(power=0.0), MASKED, "a term of weight zero has a gradient"),
    ],
)
def test_a_wrong_expectation_is_caught(
    function: Callable[..., Losses], law: str, says: str
) -> None:
    found = caught(FisherLaws, Estimator(function), law)
    assert list(found) == [law]
    assert re.search(says, found[law], re.DOTALL), found[law]


def test_draws_shared_by_examples_or_by_terms_do_not_converge() -> None:
    def shared(*, whole: bool) -> Callable[..., Losses]:
        def losses(
            view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
        ) -> Losses:
            one = view.detach()[:1] if whole else view.detach()
            state = generator.get_state()
            targets = []
            for s in range(view.shape[1]):
                if not whole:
                    generator.set_state(state)
                targets.append(likelihood.sample(one[:, s : s + 1].contiguous(), generator))
            drawn = torch.cat(targets, 1)
            yield (
                weights.sqrt()
                * likelihood.nll(view, drawn.expand(len(view), *drawn.shape[1:]).contiguous())
            ).sum()

        return losses

    for whole in (True, False):
        assert list(caught(FisherLaws, Estimator(shared(whole=whole)), CONVERGE)) == [CONVERGE]


def unsummed(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    yield likelihood.nll(view, likelihood.sample(view.detach(), generator))


def cut(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    yield likelihood.nll(view.detach(), likelihood.sample(view.detach(), generator)).sum()


def infinite(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    yield view.sum() / 0


def nothing(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    return iter(())


def global_draws(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    yield (view * torch.randn_like(view)).sum()


def reads_global(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    yield (view * torch.initial_seed()).sum()


def backward(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    for loss in exact()(view, likelihood, weights, generator):
        loss.backward(retain_graph=True)
        yield loss


def in_place(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    yield from exact()(view, likelihood, weights, generator)
    view.detach().add_(1)


def weights_in_place(
    view: Tensor, likelihood: Likelihood, weights: Tensor, generator: torch.Generator
) -> Losses:
    yield from exact()(view, likelihood, weights.add_(1), generator)


WRONG_SIDE_EFFECTS: dict[str, tuple[Callable[..., Losses], str, str]] = {
    "unsummed": (unsummed, SCALARS, r"a loss has shape .*: it must be summed to a scalar"),
    "cut off": (cut, SCALARS, "a loss does not require gradients"),
    "infinite": (infinite, SCALARS, "a loss is (inf|nan)"),
    "none": (nothing, SCALARS, "it gives no loss, though own_pass is True"),
    "global draws": (
        global_draws,
        GENERATOR,
        "the global random state is changed: draw with the given generator",
    ),
    "global seed": (reads_global, GENERATOR, "the same generator gives other losses"),
    "backward": (
        backward,
        UNTOUCHED,
        r"\.grad of a parameter is changed: never call backward\(\)",
    ),
    "view in place": (in_place, UNTOUCHED, "the view is changed"),
    "weights in place": (weights_in_place, UNTOUCHED, "the weights are changed"),
}


@pytest.mark.parametrize("name", WRONG_SIDE_EFFECTS)
def test_a_wrong_side_effect_is_caught(name: str) -> None:
    function, law, says = WRONG_SIDE_EFFECTS[name]
    found = caught(FisherLaws, Estimator(function), law)
    assert list(found) == [law]
    assert re.search(says, found[law]), found[law]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"own_pass": 1}, "own_pass is 1: it must be True or False"),
        ({"seed": None}, "seed is None: it must be a whole number"),
        ({"own_pass": False}, r"it gives \d+ losses that nothing would use"),
    ],
)
def test_what_it_says_of_itself_is_checked(members: dict[str, Any], says: str) -> None:
    assert re.search(says, caught(FisherLaws, Estimator(exact(), **members), SAYS)[SAYS])


def skipped(stage: Any, *names: str) -> dict[str, str]:
    """Those of the laws that are skipped, with the reason."""
    made, found = type("TestSkipped", (FisherLaws,), {"stage": stage})(), {}
    for name in names:
        try:
            getattr(made, name)()
        except pytest.skip.Exception as reason:
            found[name] = str(reason)
    return found


def test_laws_that_do_not_apply_are_skipped_with_the_reason() -> None:
    kinds = (DENSE, NETWORK, CONVERGE)
    assert set(skipped(Estimator(exact()), *kinds)) == {CONVERGE}
    assert set(skipped(Estimator(drawn()), *kinds)) == {DENSE, NETWORK}
    assert (
        "draws: another law compares it with the Fisher matrix"
        in skipped(Estimator(drawn()), DENSE)[DENSE]
    )
    listening = skipped(Estimator(lambda *given: iter(()), own_pass=False), *laws_of(FisherLaws))
    assert set(listening) == set(laws_of(FisherLaws)) - {SAYS}
    assert all("listens to the user's own backward" in reason for reason in listening.values())


def test_a_class_may_say_whether_anything_is_drawn() -> None:
    says = caught(FisherLaws, Estimator(drawn()), DENSE, deterministic=True)[DENSE]
    assert (
        "two seeds give different outer products, and the class says deterministic = True" in says
    )
    says = caught(FisherLaws, Estimator(most_probable), CONVERGE, deterministic=False)[CONVERGE]
    assert (
        "two seeds give the same outer products, and the class says deterministic = False" in says
    )


def test_likelihoods_whose_hessian_depends_on_the_target_are_refused() -> None:
    with pytest.raises(
        OptionError,
        match=r"The Hessian of .*Scaled.* depends on the target.*Take it out of `likelihoods`",
    ):
        natural_likelihoods([Scaled()])
    assert len(natural_likelihoods(["gaussian", {"name": "gaussian", "variance": 2.0}])) == 2
    names = {type(each).__name__.lower() for each in natural_likelihoods(None)}
    assert names >= {"categorical", "bernoulli", "gaussian"}
