"""Bases of sides that are diagonals or blocks: truth is the whole block diagonal matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk import DecompositionError, FactorContext, Layer, LayerCall
from kfactk.linalg import kron
from kfactk.testing._support import truth
from kfactk_stages.basis._wide import SidesOperator, square_in_parts
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac

BOTH = ("weight", "bias")
F64 = torch.float64


def orthogonal(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]


def side(n: int, form: str) -> tuple[Any, Tensor]:
    """Return the directions of a side in a form, and the whole matrix that they are."""
    if form == "diagonal":
        return None, torch.eye(n, dtype=F64)
    if form == "whole":
        return orthogonal(n, 1), orthogonal(n, 1)
    blocks = tuple(orthogonal(size, size) for size in (2, n - 2))
    return blocks, torch.block_diag(*blocks)


FORMS = ("diagonal", "blocks", "whole")


@pytest.mark.parametrize("outputs", FORMS)
@pytest.mark.parametrize("inputs", FORMS)
@pytest.mark.parametrize("rows", [1, 3])
def test_squares_in_parts_are_those_of_the_gradients(outputs: str, inputs: str, rows: int) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 6).double()
    x, g = torch.randn(5, rows, 4, dtype=F64), torch.randn(5, rows, 6, dtype=F64)
    x, g = (each.squeeze(1) if rows == 1 else each for each in (x, g))
    layer = Layer("fc", module, BOTH)
    samples = Kfac().samples(layer, [LayerCall(x, g)], num_terms=2.0, first=True)
    (left, u_g), (right, u_a) = side(6, outputs), side(5, inputs)
    found = square_in_parts(samples, left, right, None)
    d = truth.module_gradients(module, x, g)
    torch.testing.assert_close(found.total, (u_g.mT @ d @ u_a).square().sum(0))
    assert found.count == 2.0
    spectrum, v = torch.rand(6, 5, dtype=F64), torch.randn(6, 5, dtype=F64)
    operator = SidesOperator(spectrum, 0.1, left, right)
    expected = u_g @ ((u_g.mT @ v @ u_a) / (spectrum + 0.1)) @ u_a.mT
    torch.testing.assert_close(operator.solve(v), expected)
    root = SidesOperator(spectrum, 0.1, left, right, power=0.5)
    torch.testing.assert_close(root.solve(root.solve(v)), expected)
    torch.testing.assert_close(operator.multiply(v), u_g @ ((u_g.mT @ v @ u_a) * spectrum) @ u_a.mT)


def test_channels_of_inputs_go_with_blocks_of_outputs() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 6, 2).double()
    x = torch.randn(4, 3, 3, 4, dtype=F64)
    g = torch.randn_like(module(x))
    layer = Layer("conv", module, BOTH)
    samples = ConvKfac().samples(layer, [LayerCall(x, g)], num_terms=4.0, first=True)
    left, u_g = side(6, "blocks")
    u_c, u_k = orthogonal(3, 5), orthogonal(4, 6)
    u_a = torch.block_diag(kron(u_c, u_k), torch.ones(1, 1, dtype=F64))
    d = truth.module_gradients(module, x, g)
    found = square_in_parts(samples, left, u_c, u_k)
    torch.testing.assert_close(found.total, (u_g.mT @ d @ u_a).square().sum(0))
    v, spectrum = torch.randn(6, 13, dtype=F64), torch.rand(6, 13, dtype=F64)
    solved = SidesOperator(spectrum, 0.1, left, u_c, u_k).solve(v)
    expected = u_g @ ((u_g.mT @ v @ u_a) / (spectrum + 0.1)) @ u_a.mT
    torch.testing.assert_close(solved, expected)


def test_null_directions_of_a_block_are_pooled_there_alone() -> None:
    """Rotations within the null space of one block change nothing; other blocks are not mixed."""
    torch.manual_seed(0)
    basis, few = Ekfac(), torch.randn(2, 4, dtype=F64)
    matrices = {"A0": few.mT @ few, "A1": torch.eye(2, dtype=F64)}
    matrices["g"] = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    context = FactorContext(0.1, {})
    parts = {name: basis.decompose(name, m, context) for name, m in matrices.items()}
    samples = kfactk.Samples(
        torch.randn(7, 1, 6, dtype=F64), torch.randn(7, 1, 3, dtype=F64), num_terms=7
    )
    turn = torch.block_diag(orthogonal(2, 3), torch.eye(2, dtype=F64))  # null vectors come first
    other = dict(parts)
    other["A0"] = {**parts["A0"], "eigenvectors": parts["A0"]["eigenvectors"] @ turn}
    one, two = (basis.moments(each, samples)["scale"].total for each in (parts, other))
    assert one is not None
    torch.testing.assert_close(one[:, 4:], two[:, 4:])
    v = torch.randn(3, 6, dtype=F64)
    solved = [
        basis.operator(each, {"scale": s}, 0.1, {}).solve(v)
        for each, s in ((parts, one), (other, two))
    ]
    torch.testing.assert_close(*solved)
    assert torch.equal(one[:, 0], one[:, 1])
    assert not torch.equal(one[:, 4], one[:, 5])
    assert not torch.equal(one[0], one[1])  # coordinates are not chosen


def test_a_scale_is_carried_block_by_block() -> None:
    old, new = side(5, "blocks")[0], tuple(orthogonal(n, n + 9) for n in (2, 3))
    scale, basis = torch.rand(3, 5, dtype=F64), Ekfac()

    def of(blocks: tuple[Tensor, ...]) -> dict[str, dict[str, Tensor]]:
        found = {
            f"A{n}": {"eigenvalues": torch.ones(len(u), dtype=F64), "eigenvectors": u}
            for n, u in enumerate(blocks)
        }
        return {**found, "g": {"eigenvalues": torch.ones(3, dtype=F64)}}

    there = basis.transport({"scale": scale}, of(old), of(new))["scale"]
    turn = torch.block_diag(*old).mT @ torch.block_diag(*new)
    expected = torch.stack([(turn.mT @ row.diag() @ turn).diagonal() for row in scale])
    torch.testing.assert_close(there, expected)


SOLVERS = ("cholesky", "inverse", "eigh")


@pytest.mark.parametrize("basis", [Ekfac(), *(KfacInverse(solver=each) for each in SOLVERS)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diagonal_that_is_not_finite_is_an_error(basis: Any, value: float) -> None:
    context = FactorContext(0.1, {"A": torch.ones(()), "G": torch.ones(())})
    with pytest.raises(DecompositionError, match="NaN or inf"):
        basis.decompose("g", torch.tensor([1.0, value]), context)
