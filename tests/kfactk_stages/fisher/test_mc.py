import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kfactk import Likelihood, OptionError
from kfactk.testing import FisherLaws
from kfactk_stages.fisher.mc import MonteCarlo
from kfactk_stages.likelihood.bernoulli import Bernoulli
from kfactk_stages.likelihood.categorical import Categorical
from kfactk_stages.likelihood.gaussian import Gaussian

F64 = torch.float64
LIKELIHOODS = [
    Categorical(class_axis=-1),
    Bernoulli(class_axis=-1),
    Gaussian(class_axis=-1, variance=0.5),
]


class TestLaws(FisherLaws):
    stage = "mc"
    deterministic = False
    likelihoods = ("categorical", "bernoulli", {"name": "gaussian", "variance": 0.5})


class TestLawsOfSeveralDraws(TestLaws):
    stage: ClassVar[dict[str, Any]] = {"name": "mc", "samples": 3, "seed": 7}


def outputs(n: int, *shape: int) -> Tensor:
    """The same example n times."""
    one = torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    return one.expand(n, *shape).contiguous().requires_grad_()


def gradients(
    fisher: MonteCarlo,
    likelihood: Likelihood,
    output: Tensor,
    weights: Tensor | None,
    seed: int = 0,
) -> Tensor:
    view = likelihood.view(output)
    losses = fisher.losses(view, likelihood, weights, torch.Generator().manual_seed(seed))
    return torch.stack(
        [torch.autograd.grad(loss, view, retain_graph=True)[0].flatten(1) for loss in losses]
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_samples_sum_to_one_fisher(likelihood: Likelihood) -> None:
    """K draws give K losses whose sum keeps its size; one generator gives the same first draw."""
    [one] = gradients(MonteCarlo(), likelihood, outputs(8, 2, 3), None, seed=5)
    four = gradients(MonteCarlo(samples=4), likelihood, outputs(8, 2, 3), None, seed=5)
    assert len(four) == 4
    torch.testing.assert_close(four[0] * 2, one)
    assert not torch.allclose(four[0], four[1])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_masked_terms_have_no_gradient_and_change_no_others(likelihood: Likelihood) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=F64)
    [masked] = gradients(MonteCarlo(), likelihood, outputs(2, 3, 4), mask)
    [full] = gradients(MonteCarlo(), likelihood, outputs(2, 3, 4), None)
    assert torch.equal(masked.reshape(2, 3, 4), full.reshape(2, 3, 4) * mask.unsqueeze(-1))


def test_draw_replaces_sampling() -> None:
    seen = []
    targets = torch.tensor([[1, 0], [2, -100]])

    def draw(view: Tensor) -> Tensor:
        seen.append(view)
        return targets

    likelihood, output = (
        Categorical(class_axis=1),
        torch.randn(2, 3, 2, dtype=F64, requires_grad=True),
    )
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    losses = list(
        MonteCarlo(draw=draw, samples=2).losses(
            likelihood.view(output), likelihood, None, generator
        )
    )
    assert torch.equal(generator.get_state(), state)
    assert all(view.shape == (2, 2, 3) and not view.requires_grad for view in seen)
    assert len(seen) == 2
    expected = torch.nn.functional.cross_entropy(output, targets, reduction="sum")
    torch.testing.assert_close(losses[0], expected / math.sqrt(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0 .* a whole number of at least 1: each draw costs"),
        ({"samples": 1.5}, "samples=1.5 .* a whole number"),
        ({"samples": True}, "samples=True .* a whole number"),
        ({"seed": -1}, "seed=-1 .* a whole number of at least 0"),
        ({"seed": None}, "seed=None .* a whole number"),
        ({"draw": 3}, "draw=3 .* a function from the detached output"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MonteCarlo(**options)


def test_equality_is_over_options() -> None:
    assert MonteCarlo(seed=3).seed == 3
    assert MonteCarlo(seed=3) == MonteCarlo(seed=3) != MonteCarlo()
    assert MonteCarlo.own_pass
