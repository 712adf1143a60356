"""What the laws of likelihoods know of torch.distributions, against formulas and frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, distributions as dist

from kfactk import OptionError
from kfactk.testing._support.distributions import Cells, cells, drawn, information, surprise

F64 = torch.float64
ROW = torch.tensor([0.3, -1.2, 2.0], dtype=F64)


def test_information_is_that_of_the_textbook() -> None:
    p = ROW.softmax(-1)
    categorical = torch.diag(p) - torch.outer(p, p)
    for kind in (dist.Categorical, dist.OneHotCategorical):
        torch.testing.assert_close(
            information(lambda row, kind=kind: kind(logits=row), ROW), categorical
        )
    q = ROW.sigmoid()
    torch.testing.assert_close(
        information(lambda row: dist.Bernoulli(logits=row), ROW), torch.diag(q * (1 - q))
    )
    torch.testing.assert_close(
        information(lambda row: dist.Binomial(5, logits=row[0]), ROW[:1]),
        5 * (q * (1 - q))[:1, None],
    )
    torch.testing.assert_close(
        information(lambda row: dist.Poisson(row.exp()), ROW), torch.diag(ROW.exp())
    )
    torch.testing.assert_close(
        information(lambda row: dist.Independent(dist.Normal(row, 0.5), 1), ROW),
        4 * torch.eye(3, dtype=F64),
    )
    scaled = information(lambda row: dist.Normal(row[0], (row[1] / 2).exp()), ROW[:2])
    torch.testing.assert_close(scaled, torch.diag(torch.tensor([math.exp(1.2), 0.5], dtype=F64)))


def test_information_of_many_values_is_not_enumerated() -> None:
    many = torch.zeros(13, dtype=F64)
    torch.testing.assert_close(
        information(lambda row: dist.Bernoulli(logits=row), many), torch.eye(13, dtype=F64) / 4
    )
    with pytest.raises(
        OptionError, match=r"information of StudentT cannot be found.*def information"
    ):
        information(lambda row: dist.StudentT(row), ROW.exp())


@pytest.mark.parametrize(
    "found",
    [
        dist.Categorical(logits=ROW),
        dist.OneHotCategorical(logits=ROW),
        dist.Bernoulli(logits=ROW),
        dist.Binomial(4, logits=ROW),
        dist.Poisson(ROW.exp()),
        dist.Poisson(ROW[0].exp()),
        dist.Geometric(logits=ROW),
        dist.Independent(dist.Laplace(ROW, 2.0), 1),
        dist.Normal(ROW[0], 0.3),
    ],
    ids=str,
)
def test_draws_of_torch_itself_are_no_surprise(found: dist.Distribution) -> None:
    """False alarm: below 1e-9 each; the seed is fixed. Draws of something a little else are one."""
    torch.manual_seed(1)
    parts = cells(found, found.sample((20_000,)))
    for each in parts:
        torch.testing.assert_close(
            each.probabilities.sum(), torch.ones((), dtype=each.probabilities.dtype)
        )
    assert surprise(parts) == ""
    codes, p = parts[0].codes, parts[0].probabilities
    assert surprise([Cells(torch.where(torch.rand(len(codes)) < 0.1, int(p.argmin()), codes), p)])


def test_components_that_hang_together_are_a_surprise() -> None:
    """Each by itself has the right frequencies."""
    draws = dist.Normal(0.0, 1.0).sample((20_000, 1))
    assert surprise(cells(dist.Normal(0.0, 1.0), draws)) == ""
    assert surprise(cells(dist.Normal(torch.zeros(2), 1.0), draws.expand(-1, 2))) != ""


def test_values_that_cannot_be_and_distributions_that_cannot_be_cut() -> None:
    with pytest.raises(AssertionError, match=r"sampler drew 3.*does not give"):
        cells(dist.Categorical(logits=ROW), torch.tensor([0, 3, 1]))
    for found, draws in [
        (dist.StudentT(3.0), torch.zeros(2)),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), torch.zeros(2, 2)),
    ]:
        with pytest.raises(
            OptionError,
            match=rf"values of {type(found).__name__} are unknown.*def cells",
        ):
            cells(found, draws)


def test_drawn_targets_leave_the_global_random_state_alone() -> None:
    def distribution(row: Tensor) -> dist.Distribution:
        return dist.Normal(row, 1.0)

    state, rows = torch.get_rng_state(), ROW.expand(2, 4, 3)
    first = drawn(distribution, rows, 5)
    assert first.shape == (2, 4, 3)
    assert torch.equal(first, drawn(distribution, rows, 5))
    assert not torch.equal(first, drawn(distribution, rows, 6))
    assert torch.equal(torch.get_rng_state(), state)


def test_false_alarms_are_as_rare_as_stated() -> None:
    """Alarms on 400 samples of 50 draws of 3 values are rarer than Chernoff's bound of 1/10."""
    p = torch.tensor([0.7, 0.29, 0.01])
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(p.expand(400, 3), 50, replacement=True, generator=generator)
    alarms = sum(bool(surprise([Cells(each, p)], false_alarm=0.1)) for each in draws)
    assert 0 < alarms < 40


def test_an_impossible_value_is_always_a_surprise() -> None:
    codes, probabilities = torch.zeros(1000, dtype=torch.long), torch.tensor([0.0, 0.5, 0.5])
    codes[::2] = 1
    codes[1::2] = 2
    assert surprise([Cells(codes, probabilities)]) == ""
    codes[17] = 0
    assert "0.00100 of 1000 draws have values of probability 0.00000, which" in surprise(
        [Cells(codes, probabilities)]
    )
