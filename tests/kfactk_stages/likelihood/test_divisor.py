"""What a loss divides by: the curvature of torch's own mean losses, from autograd in float64.

All examples have the same input, so that K-FAC is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, OptionError
from kfactk.testing import LikelihoodLaws
from tests.kfactk_stages.likelihood import test_bernoulli, test_gaussian

F64 = torch.float64
N = 5
SHAPES: list[tuple[int, ...]] = [(), (1,), (2,), (10,), (3, 2), (1, 4), (2, 3, 2)]
"""Shapes of an example's output, classes first."""
Loss = Callable[..., Tensor]
LOSSES: dict[str, tuple[Any, Loss, float]] = {
    "bernoulli": ({"name": "bernoulli"}, F.binary_cross_entropy_with_logits, 1.0),
    "gaussian": ({"name": "gaussian", "variance": 0.5}, F.mse_loss, 1.0),
    "gaussian of variance 3": ({"name": "gaussian", "variance": 3.0}, F.mse_loss, 6.0),
}
"""Each stage with its loss, whose Hessian is the factor times F."""


class TestBernoulliLaws(LikelihoodLaws):
    stage = {"name": "bernoulli", "divisor": "entries", "targets": "y"}  # noqa: RUF012
    widths = (1,)
    event_axis = -1
    weights = (0.0, 1.0)
    distribution = test_bernoulli.TestLaws.distribution
    batch = test_bernoulli.TestLawsWithMissingLabels.batch


class TestGaussianLaws(LikelihoodLaws):
    stage = {"name": "gaussian", "divisor": "entries", "weights": "w"}  # noqa: RUF012
    widths = (1,)
    event_axis = -1
    weights = (0.0, 0.5, 3.0)
    distribution = test_gaussian.TestLaws.distribution
    batch = test_gaussian.TestLaws.batch


class Net(nn.Module):
    """A linear layer whose output has some shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, math.prod(shape), bias=False).double()
        self.shape = shape

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.layer(x).reshape(len(x), *self.shape)


def problem(shape: tuple[int, ...]) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    net, x = Net(shape), torch.randn(4, dtype=F64).expand(N, 4)
    return net, x, torch.randint(2, (N, *shape)).to(F64)


def asked(net: Net, x: Tensor, loss: Callable[[], Tensor], **recipe: Any) -> tuple[Tensor, Tensor]:
    """Return a vector and F times it, after one step."""
    recipe = {"curvature": "kfac", "basis": "kfac", "fisher": "exact", "lr": 0.0} | recipe
    optimizer = kfactk.build(**recipe).bind(net)
    loss().backward()
    optimizer.step()
    v = torch.randn_like(net.layer.weight)
    return v, optimizer.fisher_product({"layer.weight": v})["layer.weight"]


def times_hessian(net: Net, v: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    weight = net.layer.weight
    (gradient,) = torch.autograd.grad(loss(), weight, create_graph=True)
    return torch.autograd.grad((gradient * v).sum(), weight)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", LOSSES)
def test_entries_give_the_curvature_of_the_mean_loss(which: str, shape: tuple[int, ...]) -> None:
    """Of torch's own function with its mean, over N C entries."""
    stage, function, factor = LOSSES[which]
    net, x, y = problem(shape)

    def loss() -> Tensor:
        return function(net(x), y)

    v, found = asked(net, x, loss, likelihood={**stage, "divisor": "entries"})
    torch.testing.assert_close(factor * found, times_hessian(net, v, loss), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", LOSSES)
def test_terms_give_the_curvature_of_the_mean_over_terms(
    which: str, shape: tuple[int, ...]
) -> None:
    stage, function, factor = LOSSES[which]
    net, x, y = problem(shape)
    terms = N * math.prod(shape[1:])

    def loss() -> Tensor:
        return function(net(x), y, reduction="sum") / terms

    axis = 1 if len(shape) > 1 else None
    v, found = asked(net, x, loss, likelihood={**stage, "class_axis": axis})
    torch.testing.assert_close(factor * found, times_hessian(net, v, loss), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("which", LOSSES)
def test_the_empirical_fisher_of_the_mean_loss(
    which: str, reduction: str, shape: tuple[int, ...]
) -> None:
    """`1 / (N C)` times the sum of outer products of the summed loss' gradients."""
    stage, function, _ = LOSSES[which]
    net, x, y = problem(shape)
    v, found = asked(
        net,
        x,
        lambda: function(net(x), y, reduction=reduction),
        likelihood={**stage, "divisor": "entries"},
        fisher="empirical",
        reduction=reduction,
    )
    truth = torch.zeros_like(v)
    for n in range(N):
        one = function(net(x[n : n + 1]), y[n : n + 1], reduction="sum")
        (gradient,) = torch.autograd.grad(one, net.layer.weight)
        truth += gradient * (gradient * v).sum() / y.numel()
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_running_scale_of_the_mean_loss(shape: tuple[int, ...]) -> None:
    net, x, y = problem(shape)
    optimizer = kfactk.build(
        curvature="kfac",
        basis={"name": "ekfac", "scale": "running"},
        likelihood={"name": "bernoulli", "divisor": "entries"},
        lr=0.0,
    ).bind(net)
    F.binary_cross_entropy_with_logits(net(x), y).backward()
    optimizer.step()
    gradient = net.layer.weight.grad
    assert gradient is not None
    found = optimizer.layers["layer"].scale["scale"].sum()
    torch.testing.assert_close(found, y.numel() * gradient.square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", LOSSES)
def test_entries_are_missing_one_by_one(which: str, shape: tuple[int, ...]) -> None:
    """The loss is the mean over those that are there."""
    stage, function, factor = LOSSES[which]
    net, x, y = problem(shape)
    there = torch.rand(y.shape) < 0.6
    there[0] = True
    mark = -100.0 if "bernoulli" in which else math.nan
    labels = torch.where(there, y, mark)

    def loss() -> Tensor:
        out = net(x, targets=labels)
        return function(out[there], y[there])

    options = {"divisor": "entries", "targets": "targets"}
    v, found = asked(net, x, loss, likelihood=stage | options)
    torch.testing.assert_close(factor * found, times_hessian(net, v, loss), rtol=1e-9, atol=1e-12)


def test_what_entries_cannot_have() -> None:
    for name in ("bernoulli", "gaussian"):
        with pytest.raises(OptionError, match="shift=1 cannot work with divisor='entries'"):
            kfactk.build(likelihood={"name": name, "divisor": "entries", "shift": 1})
        with pytest.raises(OptionError, match=r"divisor='entry' cannot work.*mean 'entries'"):
            kfactk.build(likelihood={"name": name, "divisor": "entry"})
    net, x, _ = problem((3, 2))
    stage = {"name": "bernoulli", "divisor": "entries", "targets": "targets"}
    optimizer = kfactk.build(likelihood=stage).bind(net)
    with pytest.raises(CaptureError, match=r"shape \[5, 2\], but the output has 5 examples of 6"):
        net(x, targets=torch.zeros(N, 2))
    optimizer.close()
