"""Where K-FAC is exact, the blocks are those of the dense Fisher matrix."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import kfactk
from kfactk import Optimizer
from kfactk.testing import effort
from kfactk.testing._support.truth import (
    categorical_fisher_gradients,
    dense_fisher,
    dense_kron,
    layer_gradients,
    vec,
)

F64 = torch.float64
TAU = 0.05
law = settings(max_examples=effort(15))


def observed(model: nn.Module, inputs: Tensor, **recipe: Any) -> tuple[nn.Module, Optimizer]:
    """The model as it was, and the optimizer after one step."""
    before = copy.deepcopy(model)
    optimizer = kfactk.build(fisher="exact", damping=TAU, lr=0.0, **recipe).bind(model)
    model(inputs).square().sum().backward()
    optimizer.step()
    return before, optimizer


def gaussian_fisher(model: nn.Module, layer: str, inputs: Tensor, variance: float) -> Tensor:
    """`(1/N) sum_n J_n^T J_n / v`, the Jacobian of each example's output row by row."""
    outputs = model(inputs).shape[1]
    labels = torch.zeros(len(inputs))
    rows = [
        layer_gradients(model, layer, inputs, labels, lambda output, _, c=c: output[:, c].sum())
        for c in range(outputs)
    ]
    return dense_fisher(torch.cat(rows, dim=-3), len(inputs)) / variance


def categorical_fisher(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    return dense_fisher(categorical_fisher_gradients(model, layer, inputs), len(inputs))


def assert_exact(
    optimizer: Optimizer, layer: str, truth: Tensor, basis: str, tolerance: float = 1e-9
) -> None:
    """Compare the Kronecker product of the factors, F v and, for EKFAC, P v, group by group."""
    view = optimizer.layers[layer]
    torch.testing.assert_close(
        dense_kron(view.factors["A"], view.factors["G"]), truth, rtol=tolerance, atol=tolerance
    )
    v = {name: torch.randn(p.shape, dtype=F64) for name, p in view.layer.tensors().items()}
    product, solved = view.matrix(view.fisher_product(v)), view.matrix(view.precondition(v))
    matrix = view.matrix(v)
    blocks = (
        zip(truth, matrix, product, solved, strict=True)
        if truth.ndim == 3
        else [(truth, matrix, product, solved)]
    )
    for block, given_, times, divided in blocks:
        torch.testing.assert_close(vec(times), block @ vec(given_), rtol=tolerance, atol=tolerance)
        if basis == "ekfac":
            damped = block + TAU * torch.eye(len(block), dtype=F64)
            torch.testing.assert_close(
                damped @ vec(divided), vec(given_), rtol=tolerance, atol=tolerance
            )


@law
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
@given(st.lists(st.integers(1, 4), min_size=3, max_size=4), st.booleans(), st.integers(0, 999))
def test_one_example_through_nonlinear_layers(
    basis: str, widths: list[int], bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    widths[-1] += 1  # two classes at least
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    x = torch.randn(1, widths[0], dtype=F64)
    before, optimizer = observed(model, x, basis=basis, curvature="kfac")
    for name in optimizer.layers:
        assert_exact(optimizer, name, categorical_fisher(before, name, x), basis)


@pytest.mark.parametrize("spatial", ["sud", "sua", "reduce"])
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_example_through_convolutions_with_one_position(
    groups: int, basis: str, spatial: str
) -> None:
    """A kernel covers its input; "sua" is exact only with one tap and no bias."""
    kernel, bias = (1, False) if spatial == "sua" else (2, True)
    model = nn.Sequential(
        nn.Conv2d(4, 4, kernel, groups=groups, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    x = torch.randn(1, 4, kernel, kernel, dtype=F64)
    before, optimizer = observed(
        model, x, basis=basis, curvature={"name": "conv_kfac", "spatial": spatial}
    )
    for name in ("0", "3"):
        assert_exact(optimizer, name, categorical_fisher(before, name, x), basis)


@law
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5),
    st.booleans(),
    st.integers(1, 8),
    st.integers(0, 999),
)
def test_deep_linear_nets_with_a_gaussian_likelihood(
    basis: str, widths: list[int], bias: bool, examples: int, seed: int
) -> None:
    """Any number of examples: the output's gradients do not depend on the input."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(d_in, d_out, bias=bias) for d_in, d_out in itertools.pairwise(widths))
    ).double()
    x = torch.randn(examples, widths[0], dtype=F64)
    before, optimizer = observed(
        model, x, basis=basis, curvature="kfac", likelihood={"name": "gaussian", "variance": 0.5}
    )
    for name in optimizer.layers:
        assert_exact(optimizer, name, gaussian_fisher(before, name, x, 0.5), basis, tolerance=1e-8)


def test_the_comparison_sees_where_kfac_is_not_exact() -> None:
    """With several examples and a nonlinear net no basis is exact; EKFAC is closer."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(6, 3, dtype=F64)
    before, optimizer = observed(model, x, curvature="kfac")
    truth, view = categorical_fisher(before, "0", x), optimizer.layers["0"]
    columns = []
    for i in range(len(truth)):
        unit = torch.zeros(len(truth), dtype=F64)
        unit[i] = 1.0
        matrix = torch.stack(unit.split(3), dim=1)
        columns.append(
            vec(view.matrix(view.fisher_product({"weight": matrix[:, :-1], "bias": matrix[:, -1]})))
        )
    kfac, ekfac = dense_kron(view.factors["A"], view.factors["G"]), torch.stack(columns, dim=1)
    assert 1e-3 < float((truth - ekfac).norm()) < float((truth - kfac).norm())
