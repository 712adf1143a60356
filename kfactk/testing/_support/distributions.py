"""Fisher information and probabilities of values, from torch.distributions.

A distribution with a batch shape stands for independent components; the log-probability is their
sum. `row` is the `[C]` vector of parameters that a model outputs for one term. `distribution` is a
function from a row to its distribution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints, kl_divergence

from kfactk.errors import OptionError

Family = Callable[[Tensor], Distribution]
BINS = 8
"""Number of cells of about equal probability into which long ranges of values are cut."""
FALSE_ALARM = 1e-9
"""Probability that correct draws are called wrong, for each example of a law."""
MOST_OUTCOMES = 4096
NEGLIGIBLE = 1e-13


@attrs.frozen(eq=False)
class Cells:
    """A partition of the values of one component.

    Args:
        codes: The cell of each draw, `[n]`.
        probabilities: The probability of each cell, `[m]`.
    """

    codes: Tensor
    probabilities: Tensor

    def with_other(self, other: Cells) -> Cells:
        """Return the cells of a pair of independent components."""
        codes = self.codes * len(other.probabilities) + other.codes
        return Cells(codes, torch.outer(self.probabilities, other.probabilities).flatten())


def log_prob(found: Distribution, value: Tensor) -> Tensor:
    """Return the log-probability of one value with all its components, a scalar."""
    return found.log_prob(value).sum()


def drawn(distribution: Family, rows: Tensor, seed: int) -> Tensor:
    """Draw a value for each row of `[N, S, C]`; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack(
            [
                torch.stack([distribution(row).sample() for row in example])
                for example in rows.detach()
            ]
        )


def score(distribution: Family, row: Tensor, value: Tensor) -> Tensor:
    """Return the gradient of the log-probability of a value in the parameters, `[C]`."""
    row = row.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(log_prob(distribution(row), value), row, materialize_grads=True)
    return found


def information(distribution: Family, row: Tensor) -> Tensor:
    """Return the Fisher information `E[score score^T]` of the parameters, `[C, C]`.

    It is a sum over all values where they are few. Otherwise it is the Hessian, at b = row, of the
    divergence KL(R(. | row) || R(. | b)).

    Raises:
        OptionError: The values are many, and torch knows no formula for the divergence.
    """
    found = _base(distribution(row.detach()))
    outcomes = _outcomes(found)
    if outcomes is not None:
        total = row.new_zeros(len(row), len(row))
        for value in outcomes:
            s = score(distribution, row, value)
            total += log_prob(found, value).exp() * torch.outer(s, s)
        return total
    try:
        return hessian(lambda b: kl_divergence(found, _base(distribution(b))).sum(), row)
    except NotImplementedError as error:
        raise OptionError(
            f"The Fisher information of {type(found).__name__} cannot be found: its values cannot "
            "be enumerated, and torch.distributions.kl_divergence has no formula for it. Write "
            "`def information(self, row)` in the class of laws."
        ) from error


def hessian(function: Callable[[Tensor], Tensor], row: Tensor) -> Tensor:
    """Return the second derivatives `[C, C]` of a scalar function at `[C]`."""
    row = row.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(row), row, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:  # linear
        return torch.zeros(len(row), len(row), dtype=row.dtype)
    rows = [
        torch.autograd.grad(each, row, retain_graph=True, materialize_grads=True)[0]
        for each in gradient
    ]
    return torch.stack(rows)


def cells(found: Distribution, draws: Tensor) -> list[Cells]:
    """Cut each component of draws `[n, ...]` of one distribution into cells of known probability.

    Raises:
        OptionError: The values cannot be enumerated, and there is no cumulative distribution
            function.
        AssertionError: The distribution does not have a drawn value.
    """
    found = _base(found)
    count = len(draws)
    if found.event_shape:
        if not found.has_enumerate_support:
            raise _no_cells(found)
        values = found.enumerate_support()
        same = (
            draws.reshape(count, 1, -1).double() == values.reshape(1, len(values), -1).double()
        ).all(-1)
        return [_known(same, found.log_prob(values).exp(), draws)]
    flat = draws.reshape(count, -1)
    if found.has_enumerate_support:
        values = found.enumerate_support().reshape(-1, flat.shape[1])
        return _each(
            flat, values, found.log_prob(found.enumerate_support()).exp().reshape(values.shape)
        )
    if found.support is constraints.nonnegative_integer:
        values = _integers(found)
        probabilities = found.log_prob(values.reshape(-1, *[1] * len(found.batch_shape))).exp()
        return [
            _lumped(each)
            for each in _each(
                flat,
                values.reshape(-1, 1).expand(-1, flat.shape[1]),
                probabilities.reshape(len(values), -1),
            )
        ]
    try:
        levels = found.cdf(draws).reshape(count, -1)
    except NotImplementedError as error:
        raise _no_cells(found) from error
    even = torch.full((BINS,), 1 / BINS, dtype=torch.float64)
    return [Cells((level * BINS).long().clamp(0, BINS - 1), even) for level in levels.unbind(1)]


def surprise(parts: Sequence[Cells], false_alarm: float = FALSE_ALARM) -> str:
    """Say which cell was hit too rarely or too often; return "" where none was.

    Each component and each pair of components is tested. f is the frequency of a cell of
    probability p in n independent draws. By Chernoff's bound, `n KL(f || p) > t` has probability at
    most `2 exp(-t)`. t is such that correct draws are called wrong with probability at most
    `false_alarm`. The bound holds exactly, for any n.
    """
    whole = [*parts, *(one.with_other(other) for one, other in itertools.combinations(parts, 2))]
    bound = math.log(2 * sum(len(each.probabilities) for each in whole) / false_alarm)
    for each in whole:
        n, p = len(each.codes), each.probabilities.double()
        f = torch.bincount(each.codes, minlength=len(p)).double() / n
        excess = n * (_relative(f, p) + _relative(1 - f, 1 - p))
        worst = int(excess.argmax())
        if not float(excess[worst]) <= bound:
            return (
                f"{float(f[worst]):.5f} of {n} draws have values of probability "
                f"{float(p[worst]):.5f}, which happens by chance in fewer than {false_alarm:.0e} "
                "of all cases"
            )
    return ""


def _relative(f: Tensor, p: Tensor) -> Tensor:
    return torch.where(f > 0, f * (f.log() - p.clamp(min=0).log()), 0.0)


def _base(found: Distribution) -> Distribution:
    while isinstance(found, Independent):
        found = found.base_dist
    return found


def _outcomes(found: Distribution) -> list[Tensor] | None:
    """Return all values, components joined; `None` where they are too many."""
    if not found.has_enumerate_support:
        return None
    values = found.enumerate_support(expand=False)
    components = math.prod(found.batch_shape)
    if len(values) ** components > MOST_OUTCOMES:
        return None
    if found.event_shape:
        return list(found.enumerate_support()) if components == 1 else None
    single = values.reshape(-1)
    return [
        torch.stack(each).reshape(found.batch_shape)
        for each in itertools.product(single, repeat=components)
    ]


def _integers(found: Distribution) -> Tensor:
    """Return 0, 1, ... up to where the remaining probability of all components is negligible."""
    top = 1
    while True:
        values = torch.arange(top, dtype=torch.float64)
        masses = found.log_prob(values.reshape(-1, *[1] * len(found.batch_shape))).exp().sum(0)
        if bool((masses > 1 - NEGLIGIBLE).all()) or top > 2**20:
            return values
        top *= 2


def _each(draws: Tensor, values: Tensor, probabilities: Tensor) -> list[Cells]:
    """Return the components of draws `[n, k]` by their values `[m, k]`."""
    return [
        _known(
            draws[:, j].reshape(-1, 1).double() == values[:, j].reshape(1, -1).double(),
            probabilities[:, j],
            draws[:, j],
        )
        for j in range(draws.shape[1])
    ]


def _known(same: Tensor, probabilities: Tensor, draws: Tensor) -> Cells:
    strange = ~same.any(1)
    assert not bool(strange.any()), (
        f"the sampler drew {draws[strange][0].tolist()}, which the distribution does not give"
    )
    return Cells(same.long().argmax(1), probabilities.double())


def _lumped(fine: Cells) -> Cells:
    """Join consecutive values into cells of about equal probability."""
    middle = fine.probabilities.cumsum(0) - fine.probabilities / 2
    place = (middle * BINS).long().clamp(0, BINS - 1)
    return Cells(
        place[fine.codes],
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, fine.probabilities),
    )


def _no_cells(found: Distribution) -> OptionError:
    return OptionError(
        f"The probabilities of values of {type(found).__name__} are unknown: its values cannot be "
        "enumerated, and it has no cdf for single numbers. Write `def cells(self, found, draws)` "
        "in the class of laws, for example by transforming draws into independent normal numbers."
    )
