"""What the Fisher pass measures equals loops over examples in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, Optimizer
from kfactk.capture.fisher_pass import draw_seed
from kfactk.testing import effort
from tests.kfactk import dense

F64 = torch.float64
TAU = 0.1
PLAIN: dict[str, Any] = {"lr": 0.1, "damping": TAU, "clip": "none", "update": "sgd"}


class Tokens(nn.Module):
    """Linear layers over T tokens, the first of them used twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def tokens() -> Tokens:
    torch.manual_seed(3)
    return Tokens().double()


def classifier() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def bound(model: nn.Module, **recipe: Any) -> Optimizer:
    return kfactk.build(**{**PLAIN, **recipe}).bind(model)


def found(optimizer: Optimizer) -> dict[str, Tensor]:
    out = {}
    for name, view in optimizer.layers.items():
        out |= {
            f"{name}.{key}": tensor.clone() for key, tensor in (view.factors | view.scale).items()
        }
    return out


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor,
            other[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_is_dense(model: nn.Module, optimizer: Optimizer, problem: dense.Problem) -> None:
    """Compare factors, scale and the next step with their definitions, in the optimizer's basis."""
    seen, vectors, expected = problem.watch((nn.Linear,)), {}, {}
    for name, each in seen.items():
        factors = dense.factors(each, "sud", problem.num_terms)
        turned = vectors[name] = {
            key: optimizer.layers[name].decomposition[key]["eigenvectors"] for key in factors
        }
        for key, matrix in factors.items():
            expected[f"{name}.{key}"] = matrix
            assert dense.is_eigenbasis(matrix, turned[key], 1e-9)
        expected[f"{name}.scale"] = dense.exact_scale(
            each.products, turned["A"], turned["G"], problem.num_terms
        )
    assert_same(found(optimizer), expected)
    changed = dense.all_preconditioned(
        problem, seen, vectors, spatial="sud", basis="exact", tau=TAU
    )
    assert_same(
        {n: p.detach() for n, p in model.named_parameters()},
        dense.updated("sgd", problem.model, problem.gradients() | changed, 0.1),
    )


# ---------------------------------------------------------------------- likelihoods, weights, masks

Labels = Callable[[Tensor], Iterator[tuple[Tensor | float, Tensor]]]
"""From the logits of one term: each possible label's probability and negative log-likelihood."""


def categorical(logits: Tensor) -> Iterator[tuple[Tensor | float, Tensor]]:
    for c in range(len(logits)):
        log_p = torch.distributions.Categorical(logits=logits).log_prob(torch.tensor(c))
        yield log_p.detach().exp(), -log_p


def bernoulli(logits: Tensor) -> Iterator[tuple[Tensor | float, Tensor]]:
    for logit in logits:
        for label in (0.0, 1.0):
            log_p = torch.distributions.Bernoulli(logits=logit).log_prob(
                torch.tensor(label, dtype=F64)
            )
            yield log_p.detach().exp(), -log_p


def gaussian(logits: Tensor) -> Iterator[tuple[Tensor | float, Tensor]]:
    """Yield targets one standard deviation off, on both sides: their scores have F as moment."""
    deviation = math.sqrt(0.5)
    for mean in logits:
        for side in (-1, 1):
            yield (
                0.5,
                -torch.distributions.Normal(mean, deviation).log_prob(
                    mean.detach() + side * deviation
                ),
            )


LIKELIHOODS: dict[str, tuple[dict[str, Any], Labels]] = {
    "categorical": ({}, categorical),
    "bernoulli": ({}, bernoulli),
    "gaussian": ({"variance": 0.5}, gaussian),
}
WEIGHTS: dict[str, Tensor | None] = {
    "none": None,
    "mask": torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=F64),
    "weights": torch.tensor([[0.5, 2, 1], [0, 3, 0.1], [1, 1, 1], [1, 0.7, 2]], dtype=F64),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_exact_statistics_of_weighted_tokens(kind: str, weights: str) -> None:
    """Sum over each label of each token, with a layer used twice, masks and sample weights."""
    model, x, w = tokens(), torch.randn(4, 3, 4, dtype=F64), WEIGHTS[weights]
    options, labels = LIKELIHOODS[kind]
    names = {} if w is None else {"weights": "mask"}
    optimizer = bound(
        model, fisher="exact", likelihood={"name": kind, "class_axis": -1, **options, **names}
    )

    def scores(output: Tensor, n: int) -> list[Tensor]:
        every = [
            (1.0 if w is None else w[n, t], p, nll)
            for t in range(3)
            for p, nll in labels(output[0, t])
        ]
        return [(torch.as_tensor(weight, dtype=F64) * p).sqrt() * nll for weight, p, nll in every]

    problem = dense.Problem(
        tokens(),
        x,
        lambda output: output.square().mean(),
        scores,
        12.0 if w is None else float(w.sum()),
    )
    problem.loss(model(x, mask=w)).backward()
    optimizer.step()
    assert_is_dense(model, optimizer, problem)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_sampled_statistics_of_weighted_tokens(weights: str) -> None:
    """Two draws are two passes, in each of which the tokens of one example add up."""
    model, x, w = tokens(), torch.randn(4, 3, 4, dtype=F64), WEIGHTS[weights]
    draws = [torch.randint(3, (4, 3)) for _ in range(2)]
    turns = iter(draws)
    names = {} if w is None else {"weights": "mask"}
    fisher = {"name": "mc", "samples": 2, "draw": lambda view: next(turns)}
    optimizer = bound(
        model, fisher=fisher, likelihood={"name": "categorical", "class_axis": -1, **names}
    )

    def scores(output: Tensor, n: int) -> list[Tensor]:
        root = torch.ones(3, dtype=F64) if w is None else w[n].sqrt()
        return [
            (root * F.cross_entropy(output[0], drawn[n], reduction="none")).sum() / math.sqrt(2)
            for drawn in draws
        ]

    problem = dense.Problem(
        tokens(),
        x,
        lambda output: output.square().mean(),
        scores,
        12.0 if w is None else float(w.sum()),
    )
    problem.loss(model(x, mask=w)).backward()
    optimizer.step()
    assert_is_dense(model, optimizer, problem)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_statistics_of_the_users_own_loss(reduction: str) -> None:
    """Positions with `ignore_index` are no terms; the recipe is told how the loss reduces."""
    model, x = tokens(), torch.randn(4, 3, 4, dtype=F64)
    labels = torch.tensor([[0, 1, -100], [2, -100, -100], [1, 1, 0], [2, 0, 1]])
    likelihood = {"name": "categorical", "class_axis": -1, "targets": "labels"}
    optimizer = bound(
        model, fisher="empirical", likelihood=likelihood, reduction=reduction, observe="manual"
    )

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction=reduction)

    def scores(output: Tensor, n: int) -> list[Tensor]:
        return [F.cross_entropy(output[0], labels[n], reduction="sum")]

    value = loss(model(x))
    optimizer.observe(labels=labels)
    value.backward()
    optimizer.step()
    assert_is_dense(model, optimizer, dense.Problem(tokens(), x, loss, scores, 9.0))


# ------------------------------------------------------------------- how a batch is cut and counted


def run(
    parts: list[tuple[Tensor, Tensor]],
    *,
    reduction: str = "mean",
    c: float = 1.0,
    steps: int = 1,
    **recipe: Any,
) -> Optimizer:
    """Steps over the same micro-batches, their losses joined as one batch's loss would be."""
    model = classifier()
    optimizer = bound(model, reduction=reduction, **recipe)
    total = sum(len(x) for x, _ in parts)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in parts:
            loss = F.cross_entropy(model(x), y, reduction="sum")
            (c * (loss / total if reduction == "mean" else loss)).backward()
        optimizer.step()
    return optimizer


def parameters(optimizer: Optimizer) -> dict[str, Tensor]:
    return {f"{i}": p.detach() for i, p in enumerate(optimizer.param_groups[0]["params"])}


def batch(n: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=F64), torch.randint(3, (n,))


@pytest.mark.parametrize("basis", ["kfac", "ekfac", {"name": "ekfac", "scale": "running"}])
def test_accumulated_micro_batches_measure_the_whole_batch(basis: Any) -> None:
    """Sizes are unequal; the second step refreshes nothing, and the third everything."""
    x, y = batch()
    cuts = [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])]
    recipe: dict[str, Any] = {
        "basis": basis,
        "fisher": "exact",
        "factor_every": 2,
        "scale_every": 2,
        "basis_every": 2,
        "steps": 3,
    }
    whole, cut = run([(x, y)], **recipe), run(cuts, **recipe)
    assert_same(found(cut), found(whole))
    assert_same(parameters(cut), parameters(whole))


def test_accumulated_micro_batches_of_a_summed_loss_measure_the_whole_empirical_fisher() -> None:
    x, y = batch()
    whole, cut = (
        run(parts, fisher="empirical", reduction="sum")
        for parts in ([(x, y)], [(x[:2], y[:2]), (x[2:], y[2:])])
    )
    assert_same(found(cut), found(whole))
    assert_same(parameters(cut), parameters(whole))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_batch_twice_over_measures_the_same(fisher: str) -> None:
    x, y = batch()
    once, twice = (
        run([(x, y)], fisher=fisher),
        run([(torch.cat([x, x]), torch.cat([y, y]))], fisher=fisher),
    )
    assert_same(found(twice), found(once))
    assert_same(parameters(twice), parameters(once))


@pytest.mark.parametrize("basis", ["kfac", "ekfac", {"name": "ekfac", "scale": "running"}])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_mean_and_sum_of_the_users_loss_measure_the_same_when_told(fisher: str, basis: Any) -> None:
    whole = [batch()]
    mean, total = (
        run(whole, fisher=fisher, basis=basis, reduction=reduction) for reduction in ("mean", "sum")
    )
    assert_same(found(total), found(mean))


@pytest.mark.parametrize("c", [1e-3, 8.0])
def test_a_multiple_of_the_loss_scales_empirical_statistics_by_its_square(c: float) -> None:
    """G and the scale; A not at all. `exact` and `mc` never see the user's loss."""
    whole = [batch()]
    plain, scaled = (
        found(run(whole, fisher="empirical")),
        found(run(whole, fisher="empirical", c=c)),
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(
            scaled[name],
            tensor * (1.0 if name.endswith(".A") else c**2),
            rtol=1e-9,
            atol=1e-12 * c**2,
        )
    for fisher in ("exact", "mc"):
        assert_same(found(run(whole, fisher=fisher)), found(run(whole, fisher=fisher, c=c)))


def test_the_loss_scale_of_a_gradient_scaler_is_divided_out() -> None:
    class Scaler:
        def get_scale(self) -> float:
            return 1024.0

    (x, y), model = batch(), classifier()
    optimizer = kfactk.build(**PLAIN, fisher="empirical").bind(model, scaler=Scaler())
    (1024.0 * F.cross_entropy(model(x), y)).backward()
    for parameter in model.parameters():
        parameter.grad /= 1024.0
    optimizer.step()
    plain = run([(x, y)], fisher="empirical")
    assert_same(found(optimizer), found(plain))


# --------------------------------------------------------------------------------- draws and passes


def test_draws_follow_from_the_seed_alone() -> None:
    """Not from the global random state, which the pass leaves alone; another seed draws anew."""
    whole = [batch(40)]
    torch.manual_seed(7)
    one = run(whole, fisher={"name": "mc", "seed": 5})
    torch.manual_seed(8)
    model = classifier()  # reseeds
    torch.manual_seed(8)
    before = torch.get_rng_state()
    other = bound(model, fisher={"name": "mc", "seed": 5})
    F.cross_entropy(model(whole[0][0]), whole[0][1]).backward()
    other.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(found(other), found(one), tolerance=0.0)
    third = found(run(whole, fisher={"name": "mc", "seed": 6}))
    assert not torch.allclose(third["2.G"], found(one)["2.G"])
    assert torch.equal(third["2.A"], found(one)["2.A"])


def sampled(micro_batches: int, steps: int) -> Tensor:
    """The last layer's G of the last step alone, on the same examples and parameters each time."""
    model, (x, y) = (
        classifier(),
        (torch.arange(160, dtype=F64).reshape(40, 4) / 160, torch.arange(40) % 3),
    )
    optimizer = bound(model, fisher="mc", factor_every=1, factor_decay=0.0, lr=0.0)
    for _ in range(steps):
        for _ in range(micro_batches):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer.layers["2"].factors["G"]


def test_every_step_and_micro_batch_draws_anew() -> None:
    assert torch.equal(sampled(1, 1), sampled(1, 1))
    assert not torch.allclose(sampled(1, 1), sampled(1, 2))
    assert not torch.allclose(sampled(1, 1), sampled(2, 1))


@settings(max_examples=effort(50))
@given(st.lists(st.tuples(*[st.integers(0, 2**40)] * 4), min_size=2, max_size=20, unique=True))
def test_seeds_of_different_forwards_differ(keys: list[tuple[int, int, int, int]]) -> None:
    seeds = [draw_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("place", range(4))
def test_a_seed_depends_on_each_of_seed_step_micro_batch_and_rank(place: int) -> None:
    keys = [tuple(number if i == place else 3 for i in range(4)) for number in range(50)]
    assert len({draw_seed(*key) for key in keys}) == 50


def test_equal_runs_are_equal_bit_for_bit() -> None:
    whole = [batch()]
    recipe: dict[str, Any] = {
        "steps": 6,
        "factor_every": 2,
        "scale_every": 3,
        "basis_every": 4,
        "update": "adam",
    }
    one, other = run(whole, **recipe), run(whole, **recipe)
    assert_same(parameters(one), parameters(other), tolerance=0.0)
    assert_same(found(one), found(other), tolerance=0.0)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_only_forwards_that_are_observed_count(fisher: str) -> None:
    (x, y), model = batch(), classifier()
    optimizer = bound(model, fisher=fisher, observe="manual")
    model(torch.randn(30, 4, dtype=F64))
    loss = F.cross_entropy(model(x), y)
    optimizer.observe()
    model(torch.randn(30, 4, dtype=F64))
    loss.backward()
    optimizer.step()
    assert_same(found(optimizer), found(run([(x, y)], fisher=fisher)))
    assert_same(parameters(optimizer), parameters(run([(x, y)], fisher=fisher)))


def test_observing_without_a_forward_is_an_error_and_in_the_automatic_mode_nothing() -> None:
    with pytest.raises(CaptureError, match="no forward since"):
        bound(classifier(), observe="manual").observe()
    (x, y), model = batch(), classifier()
    optimizer = bound(model, fisher="exact")
    loss = F.cross_entropy(model(x), y)
    optimizer.observe()
    loss.backward()
    optimizer.step()
    assert_same(found(optimizer), found(run([(x, y)], fisher="exact")))


def test_evaluation_and_no_grad_forwards_do_not_count() -> None:
    (x, y), model = batch(), classifier()
    optimizer = bound(model, fisher="exact")
    with torch.no_grad():
        model(torch.randn(30, 4, dtype=F64))
    model.eval()
    model(torch.randn(30, 4, dtype=F64))
    model.train()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_same(found(optimizer), found(run([(x, y)], fisher="exact")))


def test_the_pass_touches_no_gradient() -> None:
    model = classifier()
    bound(model, fisher="exact")
    model(torch.randn(5, 4, dtype=F64))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_output_finds_must_be_a_tensor() -> None:
    model = nn.Linear(4, 3, dtype=F64)
    optimizer = bound(model, output=lambda logits: [logits])
    with pytest.raises(
        CaptureError, match="output= found list in what the model returned; it must find a tensor"
    ):
        model(batch()[0])
    optimizer.close()
