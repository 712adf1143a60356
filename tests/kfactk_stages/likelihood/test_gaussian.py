import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.distributions import Normal as Truth

from kfactk import OptionError
from kfactk_stages.likelihood.gaussian import Gaussian

F64 = torch.float64
variances = st.sampled_from([1.0, 1, 0.25, 3.7, 1e-3])


def means(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 3), s=st.integers(1, 3), c=st.integers(1, 5), variance=variances)
def test_root_is_a_root_of_the_dense_fisher(seed: int, n: int, s: int, c: int, variance: float) -> None:
    likelihood = Gaussian(class_axis=1, variance=variance)
    view = likelihood.view(means(seed, n, c, s))
    columns = list(likelihood.root(view))
    assert all(column.shape == view.shape and not column.requires_grad for column in columns)
    found = sum(column.unsqueeze(-1) * column.unsqueeze(-2) for column in columns)
    y = torch.zeros(c, dtype=F64)  # the Hessian is the same for every target, and so is its own expectation
    expected = torch.func.hessian(lambda f: -Truth(f, math.sqrt(variance), validate_args=False).log_prob(y).sum())(view[0, 0].detach())
    torch.testing.assert_close(found, expected.expand(n, s, c, c))


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 4), s=st.integers(1, 4), c=st.integers(1, 5), variance=variances)
def test_nll_is_that_of_torch_distributions(seed: int, n: int, s: int, c: int, variance: float) -> None:
    likelihood = Gaussian(class_axis=-1, variance=variance)
    view, targets = likelihood.view(means(seed, n, s, c)), means(seed + 1, n, s, c).detach()
    expected = -Truth(view, math.sqrt(variance)).log_prob(targets).sum(-1)
    torch.testing.assert_close(likelihood.nll(view, targets), expected)


@pytest.mark.parametrize("c", [1, 3])
def test_half_the_width_as_variance_makes_it_mse_loss(c: int) -> None:
    likelihood = Gaussian(variance=c / 2)
    f, y = means(0, 6, c), means(1, 6, c).detach()
    (ours,) = torch.autograd.grad(likelihood.nll(likelihood.view(f), y.unsqueeze(1)).mean(), f)
    (theirs,) = torch.autograd.grad(torch.nn.functional.mse_loss(f, y), f)
    torch.testing.assert_close(ours, theirs)


def test_draws_are_the_mean_plus_noise_of_the_variance() -> None:
    """40000 draws of 3 numbers: each bound is off with probability below 1e-4."""
    f = torch.tensor([2.0, 0.0, -100.0])
    draws = Gaussian(variance=4.0).sample(f.expand(200, 200, 3).contiguous().requires_grad_(), torch.Generator().manual_seed(3))
    assert draws.shape == (200, 200, 3)
    noise = (draws - f).double().flatten(0, 1)
    assert float(noise.mean(0).abs().max()) < 4.3 * 2 / 200
    assert float((noise.var(0) / 4 - 1).abs().max()) < 4.3 * math.sqrt(2) / 200
    assert float((torch.corrcoef(noise.T) - torch.eye(3)).abs().max()) < 4.3 / 200


def test_draws_depend_on_the_generator_alone() -> None:
    view, before = means(0, 50, 3, 4), torch.get_rng_state()
    first = Gaussian().sample(view, torch.Generator().manual_seed(1))
    assert torch.equal(first, Gaussian().sample(view, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, Gaussian().sample(view, torch.Generator().manual_seed(2)))
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("variance", [0, -1.0, float("inf"), float("nan"), "1", True, None])
def test_a_variance_that_cannot_be_is_refused(variance: object) -> None:
    with pytest.raises(OptionError, match="variance must be a positive, finite number"):
        Gaussian(variance=variance)
