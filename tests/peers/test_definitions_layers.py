"""Convolutions, tied layers and null spaces, where kfactk and its peers part.

The dense Fisher matrix of single examples by autograd is the judge.
"""

from __future__ import annotations

import copy
from typing import Any

import attrs
import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR, DiagGGNExact
from curvlinops import EKFACLinearOperator
from nngeometry.object import PMatBlockDiag
from torch import Tensor, nn

from kfactk.testing._support.truth import categorical_fisher_gradients, projected_square
from tests.deviations import deviation
from tests.kfactk.dense import pooled
from tests.peers import nngeometry_side
from tests.peers.comparing import TOLERANCE, agree, compared, differs, eigenvectors
from tests.peers.curvlinops_side import kronecker
from tests.peers.problems import F64, OUTPUTS, Problem, conv_kfac, measured, problem

EXAMPLES = 10
NULL = 1e-10
"""Eigenvalues below this fraction of the largest are zero but for rounding."""


def convolution(**options: Any) -> Problem:
    """Return a problem whose first layer is a convolution with padding."""
    torch.manual_seed(0)
    first = nn.Conv2d(4, 4, 2, padding=1, **options)
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4 * 4, OUTPUTS)).double()
    inputs = torch.randn(EXAMPLES, 4, 3, 3, dtype=F64)
    labels = torch.randint(OUTPUTS, (EXAMPLES,))
    return Problem(model, inputs, labels, nn.CrossEntropyLoss(), "categorical")


def trace_of_diagonal(case: Problem) -> Tensor:
    """Return the trace of the first layer's block by BackPACK."""
    model, loss = extend(copy.deepcopy(case.model)), extend(copy.deepcopy(case.loss))
    with backpack(DiagGGNExact()):
        loss(model(case.inputs), case.targets).backward()
    return model[0].weight.diag_ggn_exact.sum() + model[0].bias.diag_ggn_exact.sum()


def trace_of_block(case: Problem) -> Tensor:
    """Return it by nngeometry."""
    return nngeometry_side.fisher(case, PMatBlockDiag, "classif_logits").data["0"].trace()


def trace_of_ekfac(case: Problem) -> Tensor:
    """Return the sum of EKFAC's eigenvalues by curvlinops: the trace of the block."""
    theirs = kronecker(case, EKFACLinearOperator)
    theirs.compute_eigenvalue_correction()
    return theirs._corrected_eigenvalues["0"].sum()


def checked_trace(case: Problem) -> Tensor:
    """Check our scale of the first layer against the truth, and return the trace."""
    view = measured(case, basis="ekfac").layers["0"]
    truth = categorical_fisher_gradients(case.model, "0", case.inputs)
    agree(view.scale, [projected_square(truth, *eigenvectors(view)) / EXAMPLES])
    return truth.square().sum() / EXAMPLES


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_with_anything_but_zeros(mode: str) -> None:
    """The peers take patches that are padded with zeros, whatever the layer does."""
    case = convolution(padding_mode=mode)
    truth = checked_trace(case)
    differs("curvlinops-for-pytorch", trace_of_ekfac(case), truth)
    differs("nngeometry", trace_of_block(case), truth)
    differs("backpack-for-pytorch", trace_of_diagonal(case), truth)


@pytest.mark.usefixtures("double")
def test_grouped_convolutions() -> None:
    """Ours has a block for each group; a mean over groups is in none of them."""
    case = convolution(groups=2)
    truth = checked_trace(case)
    differs("curvlinops-for-pytorch", trace_of_ekfac(case), truth)
    differs("nngeometry", trace_of_block(case), truth)
    agree({"trace": truth}, [trace_of_diagonal(case)])
    model, loss = extend(copy.deepcopy(case.model)), extend(nn.CrossEntropyLoss())
    with pytest.raises(NotImplementedError, match="groups"), backpack(KFLR()):
        loss(model(case.inputs), case.targets).backward()


@pytest.mark.usefixtures("double")
def test_plain_convolutions_are_told_apart_from_those() -> None:
    """The peers are right where the convolution is neither grouped nor padded otherwise."""
    case = convolution()
    truth = checked_trace(case)
    for found in (trace_of_ekfac, trace_of_block, trace_of_diagonal):
        agree({"trace": truth}, [found(case)])


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(x)))


def test_a_layer_that_is_called_twice() -> None:
    """Our rows are those of both calls; curvlinops does not divide by the number of calls."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(EXAMPLES, 3, dtype=F64), torch.randint(OUTPUTS, (EXAMPLES,))
    case = Problem(Twice().double(), inputs, labels, nn.CrossEntropyLoss(), "categorical")
    ours = measured(case, basis="ekfac")
    view = ours.layers["shared"]
    truth = categorical_fisher_gradients(case.model, "shared", case.inputs)
    agree(view.scale, [projected_square(truth, *eigenvectors(view)) / EXAMPLES])
    v = case.vector()
    product, calls = measured(case, basis="kfac").fisher_product(v), 2
    theirs = kronecker(case) @ list(v.values())
    if compared("curvlinops-for-pytorch"):
        agree({name: calls * each for name, each in product.items()}, theirs)


def test_directions_of_a_null_space_share_their_scale() -> None:
    """With few examples "reduce" has a null space in A where the Fisher is not zero.

    The scale of curvlinops depends on what the eigensolver chose there; pooled it is ours.
    """
    full, few = problem("tokens"), slice(2)
    case = attrs.evolve(full, inputs=full.inputs[few], targets=full.targets[few])
    view = measured(case, basis="ekfac", curvature=conv_kfac("reduce"))
    theirs = kronecker(case, EKFACLinearOperator, spatial="reduce")
    theirs.compute_eigenvalue_correction()
    for name in ("first", "second"):
        ours = view.layers[name]
        u_a, u_g = (
            side[name]
            for side in (
                theirs._input_covariances_eigenvectors,
                theirs._gradient_covariances_eigenvectors,
            )
        )
        a, g = ours.factors["A"], ours.factors["G"]
        scale = pooled(theirs._corrected_eigenvalues[name], a, g, u_a, u_g, NULL)
        basis = torch.kron(*eigenvectors(ours))
        mine = basis @ ours.scale["scale"].flatten().diag() @ basis.T
        other = torch.kron(u_g, u_a)
        agree({name: mine}, [other @ scale.flatten().diag() @ other.T])
        single = theirs._corrected_eigenvalues[name]
        assert deviation(mine, other @ single.flatten().diag() @ other.T) > TOLERANCE
