"""Where kfactk and its peers define a quantity differently: docs/mathematics.md lists it."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from curvlinops import (
    EFLinearOperator,
    GGNLinearOperator,
    KFACInverseLinearOperator,
)
from nngeometry.object import PMatKFAC
from torch import Tensor, nn

from kfactk.testing._support.truth import layer_gradients
from tests.deviations import deviation
from tests.peers import nngeometry_side
from tests.peers.comparing import (
    COMPARED,
    FAR,
    agree,
    blocks,
    differs,
    eigenvectors,
    joined,
)
from tests.peers.curvlinops_side import dense, kronecker, operator
from tests.peers.problems import (
    DAMPING,
    F64,
    LOSSES,
    OUTPUTS,
    ROWS,
    Problem,
    conv_kfac,
    measured,
    problem,
)

POSITIONS = 5


def positions() -> Problem:
    """Return a problem with a term at each position."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, OUTPUTS)).double()
    shape = (20, POSITIONS, OUTPUTS)
    inputs, targets = torch.randn(shape, dtype=F64), torch.randn(shape, dtype=F64)
    return Problem(model, inputs, targets, nn.MSELoss(), LOSSES["mse"][1])


def solved(case: Problem, name: str, v: dict[str, Tensor], a: Tensor, g: Tensor) -> list[Tensor]:
    """Return `G^-1 V A^-1` of one layer as weight and bias."""
    module = case.layers()[name]
    matrix = joined(module, [v[f"{name}.{key}"] for key, _ in module.named_parameters()])
    done = torch.linalg.solve(g, matrix) @ torch.linalg.inv(a)
    return [done[:, :-1].reshape(module.weight.shape), done[:, -1]]


def eye(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=F64)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_summed_loss_multiplies_the_matrix_of_curvlinops(loss: str) -> None:
    """By what the mean divides by; ours is a mean in any case."""
    case = problem("perceptron", loss)
    summed = attrs.evolve(case, loss=type(case.loss)(reduction="sum"))
    v, divisor = case.vector(), len(case.inputs) * (1 if loss == "softmax" else OUTPUTS)
    ours = measured(case, basis="kfac").fisher_product(v)
    agree(
        {name: divisor * each for name, each in ours.items()}, kronecker(summed) @ list(v.values())
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("loss", "variant", "factor"),
    [("bce", "classif_binary_logits", OUTPUTS), ("mse", "regression", OUTPUTS / 2)],
)
def test_the_divisor_of_losses_with_several_labels(loss: str, variant: str, factor: float) -> None:
    """curvlinops divides by C, nngeometry does not; its Gaussian has the variance 1."""
    case = problem("perceptron", loss)
    v = case.vector()
    ours = measured(case, basis="kfac").fisher_product(v)
    agree(ours, kronecker(case) @ list(v.values()))
    theirs = nngeometry_side.fisher(case, PMatKFAC, variant).mv(nngeometry_side.vector(case, v))
    agree({n: factor * each for n, each in ours.items()}, nngeometry_side.tensors(theirs))
    likelihood = {"name": case.likelihood["name"], "divisor": "terms"}
    ours = measured(attrs.evolve(case, likelihood=likelihood), basis="kfac").fisher_product(v)
    agree(ours, nngeometry_side.tensors(theirs))


def test_terms_of_one_example_do_not_mix_in_an_exact_pass() -> None:
    """With "reduce" G is the block of the bias; curvlinops adds products of different terms."""
    case = positions()
    ours = measured(case, basis="kfac", curvature=conv_kfac("reduce"))
    theirs = kronecker(case, spatial="reduce")
    theirs.compute_kronecker_factors()
    for name, block in blocks(case, dense(operator(GGNLinearOperator, case))).items():
        g = ours.layers[name].factors["G"]
        bias = torch.arange(len(block)).reshape(len(g), -1)[:, -1]
        truth = block[bias][:, bias]
        agree({"G": g}, [truth])
        differs("curvlinops-for-pytorch", theirs._gradient_covariances[name], truth)


def test_the_empirical_fisher_sums_over_terms_or_over_examples() -> None:
    """`EFLinearOperator` counts a term as an example; K-FAC of curvlinops sums as ours."""
    case = positions()
    ours = measured(case, basis="ekfac", fisher="empirical")
    whole = blocks(case, dense(operator(EFLinearOperator, case)))
    terms = case.targets.numel()
    for name, view in ours.layers.items():

        def rows(t: slice, name: str = name) -> Tensor:
            return layer_gradients(
                case.model,
                name,
                case.inputs,
                case.targets,
                lambda output, target: (output - target)[:, t].square().sum(),
            )

        u_g, u_a = eigenvectors(view)
        squares = (u_g.T @ rows(slice(None)) @ u_a).square().sum(0)
        agree(view.scale, [squares / terms])
        single = torch.cat([rows(slice(t, t + 1)) for t in range(POSITIONS)]).flatten(1)
        agree({"F": single.T @ single / terms}, [whole[name]])
    v, kfac = case.vector(), measured(case, basis="kfac", fisher="empirical")
    agree(kfac.fisher_product(v), kronecker(case, fisher="empirical") @ list(v.values()))


def test_weight_and_bias_in_one_block_or_two() -> None:
    """The separate blocks are those of the joint one; products of both are lost."""
    case = problem("convolutions")
    ours, v = measured(case, basis="kfac"), case.vector()
    theirs = kronecker(case, separate_weight_and_bias=True) @ list(v.values())
    for (name, each), other in zip(v.items(), theirs, strict=True):
        agree({name: ours.fisher_product({name: each})[name]}, [other])
    assert deviation(ours.fisher_product(v)["0.bias"], theirs[1]) > FAR


@pytest.mark.parametrize("model", ["perceptron", "convolutions"])
def test_damping_of_the_product_or_of_both_factors(model: str) -> None:
    """curvlinops can add it to products of eigenvalues, or the same number to each factor.

    Then it matters which factor has 1/T.
    """
    case, v = problem(model), problem(model).vector()
    ours, peer = measured(case, basis="kfac"), kronecker(case)
    vector, names = list(v.values()), list(v)
    added = KFACInverseLinearOperator(peer, damping=DAMPING, use_exact_damping=True) @ vector
    each = KFACInverseLinearOperator(peer, damping=DAMPING) @ vector
    a, g = ours.layers["0"].factors["A"], ours.layers["0"].factors["G"]
    matrix = joined(case.layers()["0"], [v["0.weight"], v["0.bias"]])
    whole = torch.kron(g, a)
    exact = torch.linalg.solve(whole + DAMPING * eye(whole), matrix.flatten()).reshape(len(g), -1)
    agree({"0": joined(case.layers()["0"], added[:2])}, [exact])
    t = ROWS.get(model, {}).get("0", 1)
    apart = solved(case, "0", v, a / t + DAMPING * eye(a), g * t + DAMPING * eye(g))
    agree(dict(zip(names, each[:2], strict=False)), apart)
    for other in (added, each):
        assert deviation(ours.precondition(v)["0.weight"], other[0]) > FAR


@pytest.mark.usefixtures("double")
def test_nngeometry_without_pi_damps_its_own_split() -> None:
    """The root of the number of passes is in its A, and only pi takes it out again."""
    case, root = problem("perceptron"), 2**0.5
    v = case.vector()
    matrix = nngeometry_side.fisher(case, PMatKFAC, "classif_logits")
    theirs = matrix.inverse(regul=DAMPING, use_pi=False).mv(nngeometry_side.vector(case, v))
    factors, damping = measured(case, basis="kfac").layers["0"].factors, DAMPING**0.5
    a, g = factors["A"], factors["G"]
    ours = solved(case, "0", v, a * root + damping * eye(a), g / root + damping * eye(g))
    agree(dict(zip(("weight", "bias"), ours, strict=True)), nngeometry_side.tensors(theirs)[:2])


def test_the_documentation_names_the_versions_compared() -> None:
    page = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text()
    assert [number for number in COMPARED.values() if f") {number}" not in page] == []
