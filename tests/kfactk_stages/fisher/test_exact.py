"""Against dense Fisher matrices of the output, built term by term from the likelihood's definition."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from kfactk import CaptureError, Likelihood, OptionError
from kfactk_stages.fisher.exact import Exact
from kfactk_stages.likelihood.bernoulli import Bernoulli
from kfactk_stages.likelihood.categorical import Categorical
from kfactk_stages.likelihood.gaussian import Gaussian

F64 = torch.float64


def of_term(likelihood: Likelihood, f: Tensor) -> Tensor:
    """The textbook Fisher information of one term's parameters, `[C, C]`."""
    if isinstance(likelihood, Gaussian):
        return torch.eye(len(f), dtype=F64) / likelihood.variance
    if isinstance(likelihood, Bernoulli):
        return torch.diag(f.sigmoid() * (1 - f.sigmoid()))
    p = f.softmax(-1)
    return torch.diag(p) - torch.outer(p, p)


def of_example(likelihood: Likelihood, view: Tensor, weights: Tensor) -> Tensor:
    """Of all terms of one example `[S, C]`, `[S C, S C]`: terms are independent, so it is block diagonal."""
    return torch.block_diag(*(w * of_term(likelihood, f) for f, w in zip(view, weights, strict=True)))


def accumulated(fisher: Exact, likelihood: Likelihood, output: Tensor, weights: Tensor | None) -> Tensor:
    """Outer products of per-example gradients with respect to the output, summed over losses: `[N, P, P]`."""
    view = likelihood.view(output)
    total = torch.zeros(1, dtype=F64)
    for loss in fisher.losses(view, likelihood, weights, torch.Generator()):
        assert loss.ndim == 0
        (gradient,) = torch.autograd.grad(loss, view, retain_graph=True)
        d = gradient.flatten(1)
        total = total + d.unsqueeze(-1) * d.unsqueeze(-2)
    return total


likelihoods = st.sampled_from([Categorical(class_axis=1), Bernoulli(class_axis=1), Gaussian(class_axis=1, variance=0.3)])


@settings(deadline=None)
@given(likelihood=likelihoods, seed=st.integers(0, 2**31), n=st.integers(1, 3), s=st.integers(1, 4), c=st.integers(2, 4), data=st.data())
def test_gradients_reproduce_the_dense_fisher(likelihood: Likelihood, seed: int, n: int, s: int, c: int, data: st.DataObject) -> None:
    output = torch.randn(n, c, s, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    number = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    weights = data.draw(st.none() | st.lists(number, min_size=n * s, max_size=n * s))
    w = None if weights is None else torch.tensor(weights, dtype=F64).reshape(n, s)
    found = accumulated(Exact(), likelihood, output, w)
    each = torch.ones(n, s, dtype=F64) if w is None else w
    view = likelihood.view(output).detach()
    torch.testing.assert_close(found, torch.stack([of_example(likelihood, f, v) for f, v in zip(view, each, strict=True)]))


def test_a_models_fisher_is_the_gauss_newton_matrix() -> None:
    """Through a network: sum of J^T H J over terms, J from torch.func, against gradients of the parameters, one example at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    likelihood = Categorical(class_axis=-1)
    x = torch.randn(2, 3, dtype=F64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]

    def flat(vector: Tensor) -> Tensor:
        pieces = vector.split(sizes)
        named = {k: v.view_as(p) for k, v, p in zip(names, pieces, parameters, strict=True)}
        return torch.func.functional_call(model, named, (x,))

    theta = torch.cat([p.detach().flatten() for p in parameters])
    jacobian = torch.func.jacrev(flat)(theta)
    expected = sum(j.T @ of_term(likelihood, f) @ j for j, f in zip(jacobian, model(x).detach(), strict=True))
    found = torch.zeros_like(expected)
    view = likelihood.view(model(x).unsqueeze(0))  # one example of two terms: a pass for each position
    for loss in Exact().losses(view, likelihood, None, torch.Generator()):
        d = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
        found += torch.outer(d, d)
    torch.testing.assert_close(found, expected)


def test_masked_terms_give_no_gradient() -> None:
    likelihood = Categorical(class_axis=-1, weights="mask")
    output = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    view = likelihood.view(output)
    weights = likelihood.term_weights(view, {"mask": torch.tensor([[True, False, True], [False, True, False]])})
    total = torch.zeros_like(output)
    for loss in Exact().losses(view, likelihood, weights, torch.Generator()):
        total += torch.autograd.grad(loss, output, retain_graph=True)[0].abs()
    assert (total.sum(-1) > 0).tolist() == [[True, False, True], [False, True, False]]


def test_too_many_passes_are_refused_before_the_first() -> None:
    view = torch.zeros(2, 100, 50, requires_grad=True)
    remedies = r'5000 backward passes.*100 terms.*width 50.*max_passes=4096.*fisher="mc", with samples=.*"max_passes"'
    with pytest.raises(CaptureError, match=remedies):
        Exact().losses(view, Categorical(), None, torch.Generator())
    small = torch.zeros(1, 2, 3, requires_grad=True)
    assert len(list(Exact(max_passes=6).losses(small, Gaussian(), None, torch.Generator()))) == 6
    with pytest.raises(CaptureError, match="max_passes=5"):
        Exact(max_passes=5).losses(small, Gaussian(), None, torch.Generator())


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, None])
def test_max_passes_is_a_positive_whole_number(bad: object) -> None:
    with pytest.raises(OptionError, match="max_passes must be a whole number of backward passes"):
        Exact(max_passes=bad)


def test_it_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before, ours = torch.get_rng_state(), generator.get_state()
    list(Exact().losses(torch.zeros(2, 1, 3, requires_grad=True), Categorical(), None, generator))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), ours)
    assert Exact().seed == 0
    assert Exact.own_pass
