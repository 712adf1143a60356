import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.distributions import Bernoulli as Truth

from kfactk import OptionError
from kfactk_stages.likelihood.bernoulli import Bernoulli

F64 = torch.float64


def logits(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def dense_fisher(f: Tensor) -> Tensor:
    p = f.detach().sigmoid()

    def expected(g: Tensor) -> Tensor:
        truth = Truth(logits=g, validate_args=False)
        return -(p * truth.log_prob(torch.ones_like(g)) + (1 - p) * truth.log_prob(torch.zeros_like(g))).sum()

    return torch.func.hessian(expected)(f.detach())


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 3), s=st.integers(1, 3), c=st.integers(1, 5), scale=st.sampled_from([0.0, 1.0, 10.0]))
def test_root_is_a_root_of_the_dense_fisher(seed: int, n: int, s: int, c: int, scale: float) -> None:
    likelihood = Bernoulli(class_axis=1)
    view = likelihood.view(logits(seed, n, c, s, scale=scale))
    columns = list(likelihood.root(view))
    assert all(column.shape == view.shape and not column.requires_grad for column in columns)
    found = sum(column.unsqueeze(-1) * column.unsqueeze(-2) for column in columns)
    expected = torch.stack([torch.stack([dense_fisher(f) for f in example]) for example in view])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_root_of_certain_labels() -> None:
    view = torch.tensor([[[float("inf")], [-float("inf")], [60.0]]])
    [column] = Bernoulli().root(view)
    assert column[0, :2].flatten().tolist() == [0, 0]
    torch.testing.assert_close(column[0, 2], torch.exp(torch.tensor([-30.0])))


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 4), s=st.integers(1, 4), c=st.integers(1, 5))
def test_nll_is_that_of_torch_distributions(seed: int, n: int, s: int, c: int) -> None:
    likelihood = Bernoulli(class_axis=-1)
    view = likelihood.view(logits(seed, n, s, c, scale=3))
    targets = torch.randint(2, (n, s, c), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(likelihood.nll(view, targets), -Truth(logits=view).log_prob(targets.double()).sum(-1))


def test_draws_follow_the_sigmoid() -> None:
    """The frequency of each of 5 labels over 40000 draws: off by 4.3 standard deviations with probability below 1e-4 in all."""
    f = torch.tensor([2.0, 0.0, -1.0, 0.5, -3.0])
    draws = Bernoulli().sample(f.expand(200, 200, 5).contiguous().requires_grad_(), torch.Generator().manual_seed(3))
    assert draws.shape == (200, 200, 5)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = f.sigmoid()
    deviation = (p * (1 - p) / 40000).sqrt()
    assert bool(((draws.mean((0, 1)) - p).abs() < 4.3 * deviation).all())
    correlation = torch.corrcoef(draws.flatten(0, 1).T) - torch.eye(5)
    assert float(correlation.abs().max()) < 4.6 / 200, "labels are independent; 10 pairs, false alarm below 1e-4"


def test_draws_of_certain_labels_and_nan() -> None:
    view = torch.tensor([[[float("inf"), -float("inf"), float("nan")]]]).expand(500, 1, 3)
    draws = Bernoulli().sample(view, torch.Generator().manual_seed(0))
    assert bool((draws[..., 0] == 1).all())
    assert bool((draws[..., 1] == 0).all())


def test_draws_depend_on_the_generator_alone() -> None:
    view, before = logits(0, 50, 3, 4), torch.get_rng_state()
    first = Bernoulli().sample(view, torch.Generator().manual_seed(1))
    assert torch.equal(first, Bernoulli().sample(view, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, Bernoulli().sample(view, torch.Generator().manual_seed(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_ignore_index_may_be_any_number() -> None:
    likelihood = Bernoulli(class_axis=1, targets="y", ignore_index=0.5)
    view = likelihood.view(logits(0, 1, 1, 3))
    assert likelihood.term_weights(view, {"y": torch.tensor([[1, 0.5, 0]])}).tolist() == [[1, 0, 1]]
    with pytest.raises(OptionError, match="ignore_index must be a number"):
        Bernoulli(ignore_index="none")
