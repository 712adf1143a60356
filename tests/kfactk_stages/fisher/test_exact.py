"""The laws of Fisher estimators, the limit on passes, and that nothing is drawn."""

import pytest
import torch

from kfactk import CaptureError, OptionError
from kfactk.testing import FisherLaws
from kfactk_stages.fisher.exact import Exact
from kfactk_stages.likelihood.categorical import Categorical
from kfactk_stages.likelihood.gaussian import Gaussian


class TestLaws(FisherLaws):
    stage = "exact"
    deterministic = True
    likelihoods = ("categorical", "bernoulli", {"name": "gaussian", "variance": 0.3})


def test_too_many_passes_are_refused_before_the_first() -> None:
    view = torch.zeros(2, 100, 50, requires_grad=True)
    remedies = (
        r"5000 backward passes.*100 terms.*width 50.*max_passes=4096.*"
        r'fisher="mc", with samples=.*"max_passes"'
    )
    with pytest.raises(CaptureError, match=remedies):
        Exact().losses(view, Categorical(), None, torch.Generator())
    small = torch.zeros(1, 2, 3, requires_grad=True)
    assert len(list(Exact(max_passes=6).losses(small, Gaussian(), None, torch.Generator()))) == 6
    with pytest.raises(CaptureError, match="max_passes=5"):
        Exact(max_passes=5).losses(small, Gaussian(), None, torch.Generator())


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, None])
def test_max_passes_is_checked(bad: object) -> None:
    with pytest.raises(
        OptionError, match=r"max_passes=.* a whole number of at least 1: it counts backward passes"
    ):
        Exact(max_passes=bad)


def test_exact_draws_signs_of_examples_from_its_own_generator() -> None:
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state()
    view = torch.zeros(64, 1, 3, requires_grad=True)
    [first, *_] = list(Exact().losses(view, Categorical(), None, generator))
    assert torch.equal(torch.get_rng_state(), before)
    signs = torch.autograd.grad(first, view)[0][:, 0, 0].sign()
    assert 0 < int((signs > 0).sum()) < 64
    assert Exact().seed == 0
    assert Exact.own_pass
