"""K-FAC, EKFAC and dense matrices of curvlinops."""

from __future__ import annotations

import itertools

import pytest
import torch
from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
)

from tests.peers.comparing import agree, blocks, diagonal
from tests.peers.curvlinops_side import dense, kronecker, labels_of, operator
from tests.peers.problems import DAMPING, LOSSES, MODELS, ROWS, conv_kfac, measured, problem

SEED = 3
BASES = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}
DENSE = {"exact": GGNLinearOperator, "empirical": EFLinearOperator}
every_problem = pytest.mark.parametrize(("model", "loss"), list(itertools.product(MODELS, LOSSES)))
every_approximation = pytest.mark.parametrize("spatial", ["sud", "reduce"])


@every_problem
@every_approximation
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("basis", BASES)
def test_products_and_damped_inverses(
    model: str, loss: str, spatial: str, fisher: str, basis: str
) -> None:
    """F v and P v; the split of damping by pi does not depend on which factor has 1/T."""
    case = problem(model, loss)
    ours = measured(case, basis=basis, fisher=fisher, curvature=conv_kfac(spatial))
    theirs = kronecker(case, BASES[basis], fisher, spatial)
    inverse = KFACInverseLinearOperator(
        theirs,
        damping=DAMPING,
        use_heuristic_damping=basis == "kfac",
        use_exact_damping=basis == "ekfac",
    )
    v = case.vector()
    agree(ours.fisher_product(v), theirs @ list(v.values()))
    agree(ours.precondition(v), inverse @ list(v.values()))


@every_problem
@every_approximation
def test_factors_up_to_the_number_of_rows(model: str, loss: str, spatial: str) -> None:
    """With "sud" T is in their G, and in our A; "reduce" has no such choice."""
    case = problem(model, loss)
    ours = measured(case, basis="kfac", curvature=conv_kfac(spatial))
    theirs = kronecker(case, spatial=spatial)
    theirs.compute_kronecker_factors()
    rows = ROWS.get(model, {})
    for name in case.layers():
        t = rows.get(name, 1) if spatial == "sud" else 1
        a, g = theirs._input_covariances[name], theirs._gradient_covariances[name]
        factors = ours.layers[name].factors
        agree({"A": factors["A"] / t, "G": factors["G"] * t}, (a, g))


@every_problem
@every_approximation
def test_traces_of_ekfac(model: str, loss: str, spatial: str) -> None:
    """The sum of all corrected eigenvalues is the trace of the Fisher's blocks."""
    case = problem(model, loss)
    ours = measured(case, basis="ekfac", curvature=conv_kfac(spatial))
    total = sum(view.scale["scale"].sum() for view in ours.layers.values())
    agree({"trace": total}, [kronecker(case, EKFACLinearOperator, spatial=spatial).trace])


@every_problem
@pytest.mark.parametrize("fisher", DENSE)
def test_scales_are_diagonals_of_dense_blocks(model: str, loss: str, fisher: str) -> None:
    """In our basis the diagonal of the Gauss-Newton matrix, or of the empirical Fisher."""
    case = problem(model, loss)
    ours = measured(case, basis="ekfac", fisher=fisher)
    for name, block in blocks(case, dense(operator(DENSE[fisher], case))).items():
        view = ours.layers[name]
        agree(view.scale, [diagonal(view, block)])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("basis", BASES)
def test_sampled_targets(loss: str, basis: str) -> None:
    """The same draws give the same matrices."""
    case, draws = problem("convolutions", loss), 2
    theirs = kronecker(case, BASES[basis], "mc", seed=SEED, mc_samples=draws)
    draw = labels_of(kronecker(case, fisher="mc"), SEED)
    ours = measured(case, basis=basis, fisher={"name": "mc", "samples": draws, "draw": draw})
    v = case.vector()
    agree(ours.fisher_product(v), theirs @ list(v.values()))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("loss", LOSSES)
def test_scales_of_sampled_targets(loss: str) -> None:
    """Its normal noise has the standard deviation of a number in torch's default precision."""
    case = problem("perceptron", loss)
    theirs = operator(FisherMCLinearOperator, case, seed=SEED, mc_samples=1)
    draw = labels_of(kronecker(case, fisher="mc"), SEED)
    ours = measured(case, basis="ekfac", fisher={"name": "mc", "draw": draw})
    for name, block in blocks(case, dense(theirs)).items():
        view = ours.layers[name]
        agree(view.scale, [diagonal(view, block)])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fisher", DENSE)
def test_embeddings_and_norms_on_sequences(loss: str, fisher: str) -> None:
    """Whatever autograd can differentiate has a dense matrix.

    The basis of an embedding is that of its indices on one side.
    """
    case = problem("embedded", loss)
    table, norm = case.model[0], case.model[1]
    every = ["conv_kfac", "embedding", "norm"]
    ours = measured(case, basis="ekfac", fisher=fisher, curvature=every).layers
    chosen = [table.weight, norm.weight, norm.bias]
    whole = dense(operator(DENSE[fisher], case, parameters=chosen))
    rows, width = table.weight.shape
    vectors = ours["0"].decomposition["G"]["eigenvectors"]
    basis = torch.kron(vectors, torch.eye(rows, dtype=vectors.dtype))
    at = torch.arange(rows * width).reshape(rows, width).T.flatten()  # [width, rows], row by row
    scale = ours["0"].scale
    turned = (basis.T @ whole[at[:, None], at] @ basis).diagonal()
    agree(scale, [turned.reshape(scale["scale"].shape)])
    units = rows * width + torch.arange(2 * width).reshape(2, width)  # scales, then shifts
    agree(
        ours["1"].factors,
        [torch.stack([whole[unit[:, None], unit] for unit in units.T])],
    )
