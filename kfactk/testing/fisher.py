"""Laws of Fisher estimators: outer products of gradients are the Fisher matrix, or its estimate."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from kfactk.errors import KfactkError, OptionError
from kfactk.registry.registry import registry
from kfactk.stages import Fisher, Likelihood
from kfactk.testing._support.distributions import FALSE_ALARM, hessian
from kfactk.testing._support.laws import Laws, close, effort, law
from kfactk.testing._support.strategies import Terms, seeds, terms

WEIGHTS = (0.5, 3.0, 1.0, 0.0)
DRAWS = 100_000
"""Number of independent examples in the mean outer product."""
PROBES = 16
"""Number of examples to tell losses apart, and of targets that the Hessian must not depend on."""


class FisherLaws(Laws):
    """Laws of a Fisher estimator.

    They use likelihoods whose Fisher information is the Hessian of `nll` for every target.

    Example:
        >>> class TestMine(FisherLaws):
        ...     stage = "exact"
        >>> TestMine().test_masked_terms_contribute_nothing()
    """

    family = "fisher"

    likelihoods: ClassVar[Sequence[Any] | None] = None
    """Likelihoods to test with, as `kfactk.build` takes them; `None` for every suitable one that is
    registered."""
    deterministic: ClassVar[bool | None] = None
    """Whether it draws nothing and must equal the Fisher matrix; `None` to compare two seeds."""

    def each_likelihood(self) -> st.SearchStrategy[Likelihood]:
        """Return a strategy for the likelihoods."""
        return st.sampled_from(natural_likelihoods(self.likelihoods))

    def cases(self) -> st.SearchStrategy[Terms]:
        """Return a strategy for outputs with and without weights."""
        return terms(weights=WEIGHTS)

    @law()
    def test_it_says_how_it_works(self) -> None:
        """It states `own_pass` and its seed; without its own pass it gives no losses."""
        stage = self.subject()
        assert isinstance(stage.own_pass, bool), (
            f"own_pass is {stage.own_pass!r}: it must be True or False"
        )
        whole = isinstance(stage.seed, int) and not isinstance(stage.seed, bool)
        assert whole, (
            f"seed is {stage.seed!r}: it must be a whole number, 0 for an estimator without draws"
        )
        if not stage.own_pass:
            [likelihood, *_] = natural_likelihoods(self.likelihoods)
            view = torch.zeros(2, 1, 3, requires_grad=True)
            losses = list(stage.losses(view, likelihood, None, torch.Generator()))
            assert not losses, (
                f"it gives {len(losses)} losses that nothing would use: own_pass is False"
            )

    @law(likelihood="each_likelihood", case="cases", seed=seeds())
    def test_losses_are_scalars_with_gradients(
        self, likelihood: Likelihood, case: Terms, seed: int
    ) -> None:
        """Its losses are finite scalars with gradients in the view."""
        view = case.rows.clone().requires_grad_()
        count = 0
        for loss in self._passing().losses(
            view, likelihood, case.weights, torch.Generator().manual_seed(seed)
        ):
            assert loss.ndim == 0, (
                f"a loss has shape {list(loss.shape)}: it must be summed to a scalar"
            )
            assert loss.requires_grad, (
                "a loss does not require gradients: it must be computed from the view, not from "
                "its values alone"
            )
            assert bool(torch.isfinite(loss)), f"a loss is {loss.item()}"
            count += 1
        assert count, "it gives no loss, though own_pass is True"

    @law(likelihood="each_likelihood", case="cases", seed=seeds())
    def test_outer_products_are_the_dense_fisher(
        self, likelihood: Likelihood, case: Terms, seed: int
    ) -> None:
        """Without draws, the outer products of an example's gradients sum to its part of M F."""
        stage = self._of_kind(deterministic=True)
        gradients = scores(stage, likelihood, case.rows, case.weights, seed)
        expected = torch.stack(
            [dense(likelihood, rows, weights) for rows, weights in _examples(case)]
        )
        says = (
            "the outer products of the gradients, summed over the losses, are not the weighted "
            "Fisher information of each example's terms"
        )
        close(
            torch.einsum("kni,knj->nij", gradients, gradients),
            expected,
            says,
            rtol=1e-9,
            atol=1e-12,
        )

    @law(likelihood="each_likelihood", case="cases", seed=seeds())
    def test_through_a_network_they_are_the_gauss_newton_matrix(
        self, likelihood: Likelihood, case: Terms, seed: int
    ) -> None:
        """Without draws, outer products of the gradients of a network are its Gauss-Newton matrix.

        That matrix is sum_s w_s J_s^T H_s J_s.
        """
        stage, c = self._of_kind(deterministic=True), case.rows.shape[-1]
        model = network(c, seed)
        names, parameters = zip(*model.named_parameters(), strict=True)
        for rows, weights in _examples(case):

            def output(*values: Tensor, rows: Tensor = rows) -> Tensor:
                found: Tensor = torch.func.functional_call(
                    model, dict(zip(names, values, strict=True)), (rows.unsqueeze(0),)
                )
                return found

            view = output(*parameters)
            blocks = torch.func.jacrev(output, argnums=tuple(range(len(names))))(*parameters)
            jacobian = torch.cat(
                [block.reshape(rows.numel(), -1) for block in blocks], dim=-1
            ).detach()
            found = torch.zeros(jacobian.shape[1], jacobian.shape[1], dtype=torch.float64)
            for loss in stage.losses(
                view, likelihood, weights.unsqueeze(0), torch.Generator().manual_seed(seed)
            ):
                gradient = torch.cat(
                    [g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
                )
                found += torch.outer(gradient, gradient)
            expected = jacobian.T @ dense(likelihood, view[0].detach(), weights) @ jacobian
            says = (
                "through a network, the outer products of the parameters' gradients are not the "
                "Gauss-Newton matrix"
            )
            close(found, expected, says, rtol=1e-9, atol=1e-12)

    @law()
    def test_outer_products_converge_to_the_dense_fisher(self) -> None:
        """With draws, the mean outer product of n examples differs from M F by its standard error.

        The standard error falls as 1 / sqrt(n). The law compares all entries, also those between
        two terms of one example, which are zero. It fails where an error exceeds z standard errors,
        estimated from the same draws. Normal errors do so in 1e-9 of all cases. For 100000 draws,
        skewed values make the tails at most about ten times heavier: correct draws fail with
        probability below 1e-7 for each seed. The seeds are fixed, so the law always gives the same.
        """
        for seed in range(effort(2)):
            self._converges(seed)

    @law(likelihood="each_likelihood", case="cases", seed=seeds())
    def test_masked_terms_contribute_nothing(
        self, likelihood: Likelihood, case: Terms, seed: int
    ) -> None:
        """Terms of weight zero have a zero gradient."""
        n, s = case.rows.shape[:2]
        cycle = torch.arange(n * s, dtype=torch.float64).remainder(3).reshape(n, s)
        weights = cycle if case.weights is None else case.weights
        gradients = scores(self._passing(), likelihood, case.rows, weights, seed).reshape(
            -1, *case.rows.shape
        )
        masked = gradients[:, weights == 0]
        assert not masked.numel() or float(masked.abs().max()) == 0, (
            "a term of weight zero has a gradient"
        )

    @law(likelihood="each_likelihood", case="cases", seed=seeds())
    def test_the_generator_alone_decides(
        self, likelihood: Likelihood, case: Terms, seed: int
    ) -> None:
        """The same generator gives the same losses; the global random state plays no part."""
        stage, state = self._passing(), torch.get_rng_state()
        first = scores(stage, likelihood, case.rows, case.weights, seed)
        assert torch.equal(torch.get_rng_state(), state), (
            "the global random state is changed: draw with the given generator"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            again = scores(stage, likelihood, case.rows, case.weights, seed)
        assert torch.equal(first, again), (
            "the same generator gives other losses: they depend on something else, such as the "
            "global random state"
        )

    @law(likelihood="each_likelihood", case="cases", seed=seeds())
    def test_the_users_loss_and_gradients_are_left_alone(
        self, likelihood: Likelihood, case: Terms, seed: int
    ) -> None:
        """Losses and their gradients leave `.grad`, view, weights and the user's backward alone."""
        stage, c = self._passing(), case.rows.shape[-1]
        mixing = torch.eye(c, dtype=torch.float64).requires_grad_()
        mixing.grad = mark = torch.full_like(mixing, 7.0).detach()
        view = case.rows @ mixing
        users, weights = view.square().sum(), None if case.weights is None else case.weights.clone()
        (expected,) = torch.autograd.grad(users, mixing, retain_graph=True)
        for loss in stage.losses(view, likelihood, weights, torch.Generator().manual_seed(seed)):
            torch.autograd.grad(loss, view, retain_graph=True)
        assert mixing.grad is mark, ".grad of a parameter is replaced"
        assert float((mark - 7).abs().max()) == 0, (
            ".grad of a parameter is changed: never call backward()"
        )
        assert torch.equal(view.detach(), case.rows), "the view is changed"
        assert weights is None or case.weights is None or torch.equal(weights, case.weights), (
            "the weights are changed"
        )
        torch.autograd.backward(users)
        close(mark, 7 + expected, "the user's own backward, run afterwards, gives other gradients")

    def _converges(self, seed: int) -> None:
        stage = self._of_kind(deterministic=False)
        rows = 1.5 * (
            2 * torch.rand(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            - 1
        )
        some = torch.tensor([WEIGHTS[seed % 4], WEIGHTS[1 + seed % 3]], dtype=torch.float64)
        for likelihood, given in itertools.product(
            natural_likelihoods(self.likelihoods), (None, some)
        ):
            many = None if given is None else given.expand(DRAWS, 2).contiguous()
            gradients = scores(stage, likelihood, rows.expand(DRAWS, 2, 3).contiguous(), many, seed)
            products = torch.einsum("kni,knj->nij", gradients, gradients).flatten(1)
            truth = dense(
                likelihood, rows, torch.ones(2, dtype=torch.float64) if given is None else given
            )
            bound = NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * truth.numel()))
            mean, deviation = products.mean(0), products.std(0) / DRAWS**0.5
            excess = (mean - truth.flatten()).abs() - bound * deviation - 1e-9
            worst = int(excess.argmax())
            i, j = divmod(worst, len(truth))
            assert float(excess[worst]) <= 0, (
                f"the mean of {DRAWS} outer products does not converge to the Fisher information "
                f"of {likelihood!r} at {rows.tolist()}, weights "
                f"{None if given is None else given.tolist()}: entry [{i}, {j}] is "
                f"{float(mean[worst]):.6f} with standard error {float(deviation[worst]):.6f}, but "
                f"must be {float(truth[i, j]):.6f} within {bound:.1f} standard errors"
            )

    def _passing(self) -> Fisher:
        """Return the stage; skip the law for one without its own pass."""
        stage: Fisher = self.subject()
        if not stage.own_pass:
            pytest.skip(
                f"{self.label()} listens to the user's own backward: it has no losses to test"
            )
        return stage

    def _of_kind(self, *, deterministic: bool) -> Fisher:
        """Return the stage; skip the law where it draws and must not, or draws nothing and must."""
        stage = self._passing()
        likelihood, rows = (
            natural_likelihoods(self.likelihoods)[0],
            torch.linspace(-1, 1, 3, dtype=torch.float64).expand(PROBES, 2, 3),
        )
        products = (
            torch.einsum("kni,knj->nij", gradients, gradients)
            for gradients in (scores(stage, likelihood, rows, None, seed) for seed in (0, 1))
        )
        found = torch.equal(*products)
        if self.deterministic is not None:
            same = f"two seeds give {'the same' if found else 'different'} outer products"
            assert found == self.deterministic, (
                f"{same}, and the class says deterministic = {self.deterministic}"
            )
        if found != deterministic:
            does = "draws nothing" if found else "draws"
            pytest.skip(f"{self.label()} {does}: another law compares it with the Fisher matrix")
        return stage


def scores(
    stage: Fisher, likelihood: Likelihood, rows: Tensor, weights: Tensor | None, seed: int
) -> Tensor:
    """Return the gradient of each loss in the output of each example, `[losses, N, S C]`."""
    view = rows.clone().requires_grad_()
    losses = stage.losses(view, likelihood, weights, torch.Generator().manual_seed(seed))
    found = [torch.autograd.grad(loss, view, retain_graph=True)[0].flatten(1) for loss in losses]
    assert found, f"it gives no loss for a view of shape {list(view.shape)}"
    return torch.stack(found)


def of_term(likelihood: Likelihood, row: Tensor, seed: int = 0) -> Tensor:
    """Return the Hessian `[C, C]` of one term's `nll` in the output `[C]`, for a drawn target."""
    targets = likelihood.sample(row.detach().reshape(1, 1, -1), torch.Generator().manual_seed(seed))
    return hessian(lambda f: likelihood.nll(f.reshape(1, 1, -1), targets).sum(), row)


def dense(likelihood: Likelihood, rows: Tensor, weights: Tensor) -> Tensor:
    """Return the Fisher information of one example's independent terms, dense, `[S C, S C]`.

    Args:
        likelihood: The likelihood.
        rows: The outputs of the terms, `[S, C]`.
        weights: `[S]`.
    """
    s, c = rows.shape
    whole = torch.zeros(s, c, s, c, dtype=rows.dtype)
    for t in range(s):
        whole[t, :, t] = weights[t] * of_term(likelihood, rows[t])
    return whole.reshape(s * c, s * c)


def natural_likelihoods(given: Sequence[Any] | None) -> tuple[Likelihood, ...]:
    """Return the likelihoods whose Fisher information is the Hessian of `nll` for every target.

    Their outputs are natural parameters: logits, log-rates, means.

    Args:
        given: Likelihoods as `kfactk.build` takes them; `None` for all suitable ones that are
            registered and need no options.

    Raises:
        OptionError: A given likelihood is not suitable, or none is left.
    """
    if given is None:
        made = tuple(_registered(registry()))
        if not made:
            raise OptionError(
                "No registered likelihood suits the laws of Fisher estimators. Write "
                "`likelihoods = [...]` in the class."
            )
        return made
    resolved = tuple(registry().resolve("likelihood", each) for each in given)
    for each in resolved:
        if not _is_natural(each):
            raise OptionError(
                f"The Hessian of {each!r} depends on the target, so it is not the Fisher "
                "information: these laws cannot use it. Take it out of `likelihoods`."
            )
    return resolved


@functools.cache
def _registered(where: Any) -> list[Likelihood]:
    found = []
    for info in where.stages("likelihood"):
        try:
            likelihood = where.resolve("likelihood", info.name)
            if _is_natural(likelihood):
                found.append(likelihood)
        except KfactkError:  # it needs options, is blocked, or two plugins provide it
            continue
    return found


def _is_natural(likelihood: Likelihood) -> bool:
    row = torch.linspace(-1, 1, 3, dtype=torch.float64)
    hessians = [of_term(likelihood, row, seed) for seed in range(PROBES)]
    return all(torch.allclose(each, hessians[0], rtol=1e-9, atol=1e-12) for each in hessians)


def network(width: int, seed: int) -> nn.Module:
    """Return two layers on vectors of one width, in float64."""
    model = nn.Sequential(nn.Linear(width, 2), nn.Tanh(), nn.Linear(2, width)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _examples(case: Terms) -> Iterator[tuple[Tensor, Tensor]]:
    weights = (
        torch.ones(case.rows.shape[:2], dtype=torch.float64)
        if case.weights is None
        else case.weights
    )
    return zip(case.rows, weights, strict=True)
