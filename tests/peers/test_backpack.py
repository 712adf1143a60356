"""Factors, roots, diagonals and gradients of single examples by BackPACK."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR, BatchGrad, DiagGGNExact, SqrtGGNExact, SumGradSquared
from backpack.utils.conv_transpose import unfold_by_conv_transpose
from torch import Tensor, nn

from kfactk import Layer, LayerCall
from kfactk.testing._support.truth import input_rows, moment
from kfactk_stages.curvature.conv_kfac import ConvKfac
from tests.peers.comparing import agree, compared, eigenvectors, joined
from tests.peers.problems import LOSSES, OUTPUTS, Problem, conv_kfac, measured, problem

MODELS = ("perceptron", "convolutions", "signals", "volumes")
"""It knows no LayerNorm and no factors of layers that share a weight over positions."""
EXACT_LOSSES = ("softmax", "mse")
"""Its information of binary labels is that of one label in each example."""
exact_problems = pytest.mark.parametrize(
    ("model", "loss"), list(itertools.product(MODELS, EXACT_LOSSES))
)
all_problems = pytest.mark.parametrize(("model", "loss"), list(itertools.product(MODELS, LOSSES)))


def extended(case: Problem, extension: Any) -> nn.Module:
    """Return a copy of the model with what BackPACK saved in its parameters."""
    model = extend(copy.deepcopy(case.model))
    loss = extend(copy.deepcopy(case.loss))
    with backpack(extension):
        loss(model(case.inputs), case.targets).backward()
    return model


def saved(model: nn.Module, name: str, field: str) -> Tensor:
    """Return a saved tensor of weight and bias as matrices of the layer."""
    layer = model.get_submodule(name)
    return joined(layer, [getattr(p, field) for p in layer.parameters()])


def terms(case: Problem) -> int:
    """Return by how much the mean loss divides."""
    return len(case.inputs) * (1 if isinstance(case.loss, nn.CrossEntropyLoss) else OUTPUTS)


@exact_problems
def test_kronecker_factors(model: str, loss: str) -> None:
    """Its A is that of "sud" without the bias' column; its G is that of "reduce".

    The bias has a block of its own, which is this G.
    """
    case = problem(model, loss)
    theirs = extended(case, KFLR())
    for spatial, which, keep in (("sud", 1, "A"), ("reduce", 0, "G")):
        ours = measured(case, basis="kfac", curvature=conv_kfac(spatial))
        for name, module in case.layers().items():
            other = theirs.get_submodule(name).weight.kflr[which]
            mine = ours.layers[name].factors[keep]
            agree({keep: mine[: len(other), : len(other)]}, [other])
            if module.bias is not None and keep == "G":
                agree({keep: mine}, theirs.get_submodule(name).bias.kflr)


@exact_problems
def test_scales_from_roots_of_the_gauss_newton_matrix(model: str, loss: str) -> None:
    case = problem(model, loss)
    ours, theirs = measured(case, basis="ekfac"), extended(case, SqrtGGNExact())
    for name, view in ours.layers.items():
        (u_g, u_a), roots = eigenvectors(view), saved(theirs, name, "sqrt_ggn_exact")
        agree(view.scale, [(u_g.T @ roots @ u_a).square().sum((0, 1))])


@all_problems
def test_scales_from_gradients_of_single_examples(model: str, loss: str) -> None:
    """Its gradients are parts of the mean, ours of the sum."""
    case = problem(model, loss)
    ours, theirs = measured(case, basis="ekfac", fisher="empirical"), extended(case, BatchGrad())
    for name, view in ours.layers.items():
        (u_g, u_a), gradients = eigenvectors(view), saved(theirs, name, "grad_batch")
        agree(view.scale, [terms(case) * (u_g.T @ gradients @ u_a).square().sum(0)])


@exact_problems
def test_traces_of_the_gauss_newton_diagonal(model: str, loss: str) -> None:
    case = problem(model, loss)
    ours, theirs = measured(case, basis="ekfac"), extended(case, DiagGGNExact())
    for name, view in ours.layers.items():
        trace = saved(theirs, name, "diag_ggn_exact").sum()
        agree({"trace": view.scale["scale"].sum()}, [trace])


@all_problems
def test_traces_of_summed_squares(model: str, loss: str) -> None:
    case = problem(model, loss)
    ours = measured(case, basis="ekfac", fisher="empirical")
    theirs = extended(case, SumGradSquared())
    for name, view in ours.layers.items():
        trace = terms(case) * saved(theirs, name, "sum_grad_squared").sum()
        agree({"trace": view.scale["scale"].sum()}, [trace])


@pytest.mark.parametrize("loss", EXACT_LOSSES)
def test_diagonals_of_batch_norm(loss: str) -> None:
    case = problem("batch_norm", loss)
    ours = measured(case, curvature=["conv_kfac", "norm"], basis="ekfac")
    norm = extended(case, DiagGGNExact()).get_submodule("1")
    theirs = torch.stack([norm.weight.diag_ggn_exact, norm.bias.diag_ggn_exact], -1)
    agree({"U": ours.layers["1"].factors["U"].diagonal(dim1=-2, dim2=-1)}, [theirs])


@pytest.mark.parametrize("loss", EXACT_LOSSES)
def test_transposed_convolutions(loss: str) -> None:
    """Its unfolded input makes A, its gradients of single examples the scale."""
    case = problem("grown", loss)
    ours = measured(case, basis="ekfac", fisher="empirical")
    theirs = extended(case, BatchGrad())
    for name in ("0", "2"):
        layer, view = theirs.get_submodule(name), ours.layers[name]
        with torch.no_grad():
            rows = unfold_by_conv_transpose(case.model[: int(name)](case.inputs), layer)
        a = torch.einsum("nat,nbt->ab", rows, rows) / len(rows)
        agree({"A": view.factors["A"][: len(a), : len(a)]}, [a])
        weight, *bias = (p.grad_batch for p in layer.parameters())
        gradients = torch.cat(
            [weight.transpose(1, 2).flatten(2), *(each.unsqueeze(-1) for each in bias)], -1
        )
        u_g, u_a = eigenvectors(view)
        agree(view.scale, [terms(case) * (u_g.T @ gradients @ u_a).square().sum(0)])
    exact = measured(case, basis="ekfac")
    theirs = extended(case, DiagGGNExact())
    for name, view in exact.layers.items():
        parts = [p.diag_ggn_exact.sum() for p in theirs.get_submodule(name).parameters()]
        trace = torch.stack(parts).sum()
        agree({"trace": view.scale["scale"].sum()}, [trace])


def test_output_padding_of_a_transposed_convolution() -> None:
    """It leaves it out; the rows of ours are those of the loop."""
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1, bias=False).double()
    inputs = torch.randn(4, 2, 3, 2, dtype=torch.float64)
    output = layer(inputs)
    rows = input_rows(layer, inputs, bias=False)
    call = LayerCall(inputs, torch.ones_like(output))
    ours = ConvKfac().samples(Layer("", layer, ("weight",)), [call], num_terms=4.0, first=True)
    agree({"A": ours.input_moment().total}, [moment(rows)])
    if compared("backpack-for-pytorch"):
        found = unfold_by_conv_transpose(inputs, layer)
        assert found.shape[-1] < output[0, 0].numel(), "BackPACK is right: change the documentation"
