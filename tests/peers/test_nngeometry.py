"""K-FAC, EKFAC and dense Fisher matrices of nngeometry."""

from __future__ import annotations

import itertools

import pytest
import torch
from nngeometry.object import PMatBlockDiag, PMatDense, PMatEKFAC, PMatKFAC
from torch import nn

from tests.peers.comparing import agree, blocks, diagonal
from tests.peers.nngeometry_side import (
    VARIANTS,
    fisher,
    likelihood_problem,
    loader,
    tensors,
    vector,
)
from tests.peers.problems import DAMPING, measured

MODELS = ("perceptron", "convolutions", "normalized")
"""It has no Linear layer that shares its weight over positions."""
every_problem = pytest.mark.parametrize(
    ("model", "variant"), list(itertools.product(MODELS, VARIANTS))
)
pytestmark = pytest.mark.usefixtures("double")


@every_problem
def test_kfac_products_and_damped_inverses(model: str, variant: str) -> None:
    case = likelihood_problem(model, variant)
    ours, theirs = measured(case, basis="kfac"), fisher(case, PMatKFAC, variant)
    v = case.vector()
    w = vector(case, v)
    agree(ours.fisher_product(v), tensors(theirs.mv(w)))
    agree(ours.precondition(v), tensors(theirs.solve(w, regul=DAMPING)))
    agree(ours.precondition(v), tensors(theirs.inverse(regul=DAMPING).mv(w)))


@every_problem
def test_kfac_factors_up_to_the_number_of_passes(model: str, variant: str) -> None:
    """The root of the number of backward passes is in its A, and divides its G."""
    case, passes = likelihood_problem(model, variant), VARIANTS[variant][2]
    ours, theirs = measured(case, basis="kfac"), fisher(case, PMatKFAC, variant)
    for name, (a, g) in theirs.data.items():
        factors = ours.layers[name].factors
        agree({"A": factors["A"] * passes**0.5, "G": factors["G"] / passes**0.5}, (a, g))


@every_problem
def test_ekfac_products_and_damped_inverses(model: str, variant: str) -> None:
    """Its scale is measured by `update_diag`; until then it is that of K-FAC."""
    case = likelihood_problem(model, variant)
    theirs, v = fisher(case, PMatEKFAC, variant), case.vector()
    w = vector(case, v)
    agree(measured(case, basis="kfac").fisher_product(v), tensors(theirs.mv(w)))
    theirs.update_diag(loader(case))
    ours = measured(case, basis="ekfac")
    agree(ours.fisher_product(v), tensors(theirs.mv(w)))
    agree(ours.precondition(v), tensors(theirs.solve(w, regul=DAMPING)))


@every_problem
@pytest.mark.parametrize("kind", [PMatDense, PMatBlockDiag])
def test_scales_are_diagonals_of_dense_blocks(model: str, variant: str, kind: type) -> None:
    case = likelihood_problem(model, variant)
    ours = measured(case, basis="ekfac")
    for name, block in blocks(case, fisher(case, kind, variant).to_torch()).items():
        view = ours.layers[name]
        agree(view.scale, [diagonal(view, block)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_of_normalization_layers(variant: str) -> None:
    """Batch norm in evaluation mode and layer norm: entries of scale and shift of one unit."""
    case = likelihood_problem("normalized", variant)
    kinds = (nn.BatchNorm1d, nn.LayerNorm)
    norms = {name: m for name, m in case.model.named_modules() if isinstance(m, kinds)}
    whole = fisher(case, PMatDense, variant, norms).to_torch()
    ours, start = measured(case, curvature=["conv_kfac", "norm"], basis="ekfac"), 0
    for name, module in norms.items():
        units = module.weight.numel()
        at = start + torch.arange(2 * units).reshape(2, units)  # scales, then shifts
        start += 2 * units
        theirs = torch.stack([whole[at[:, c][:, None], at[:, c]] for c in range(units)])
        agree(ours.layers[name].factors, [theirs])
