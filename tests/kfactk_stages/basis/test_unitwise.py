"""Unitwise: the laws on blocks of two and of one; the inverse of blocks of any size."""

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kfactk import DecompositionError, FactorContext, linalg
from kfactk.testing import BasisLaws, effort
from kfactk_stages.basis.unitwise import Unitwise

laws = settings(deadline=None, max_examples=effort(30))
CONTEXT = FactorContext(damping=0.0, mean_diagonal={})


class TestUnitwise(BasisLaws):
    stage = "unitwise"
    curvature: ClassVar = "norm"

    def block(self, situation):
        u = situation.matrices["U"].double()
        return linalg.add_diagonal(u, situation.damping)

    def turned(self, name, matrix, left, right):
        return right @ matrix @ right.mT

    def grouped(self):
        return self.any_situations()


def blocks_of(n, lead=(7,), *, rank=None, dtype=torch.float64):
    rows = torch.randn(*lead, n, n + 2 if rank is None else rank, dtype=dtype)
    return rows @ rows.mT


def operator_of(block, damping=0.0):
    basis = Unitwise()
    return basis.operator({"U": basis.decompose("U", block, CONTEXT)}, {}, damping, {})


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_any_block_is_inverted_exactly(n, rank, lead):
    block, damping = blocks_of(n, lead, rank=rank), 0.3
    operator = operator_of(block, damping)
    dense = block + damping * torch.eye(n, dtype=block.dtype)
    for rows in (1, 3):
        v = torch.randn(*lead, rows, n, dtype=block.dtype)
        torch.testing.assert_close(operator.solve(v), torch.linalg.solve(dense, v.mT).mT)
        torch.testing.assert_close(operator.multiply(v), v @ block)
    conditions = torch.linalg.cond(dense)
    torch.testing.assert_close(operator.condition(), conditions.max())
    torch.testing.assert_close(operator.logdet(), torch.logdet(dense).sum())
    v = torch.randn(*lead, 1, n, dtype=block.dtype)
    root = operator.function(lambda s: (s + damping).rsqrt(), v)
    torch.testing.assert_close((root * root).sum(), (v * operator.solve(v)).sum())


numbers = st.floats(-1, 1).map(lambda x: x if abs(x) > 1e-3 else 0.0)


@laws
@given(st.tuples(numbers, numbers, numbers, numbers), st.integers(-12, 12))
def test_blocks_of_two_are_diagonalised_at_every_scale(entries, decade):
    rows = torch.tensor(entries, dtype=torch.float64).view(2, 2) * 10.0**decade
    block = rows @ rows.T
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 4e-6)):
        parts = Unitwise().decompose("U", block.to(dtype), CONTEXT)
        values, vectors = parts["eigenvalues"].double(), parts["eigenvectors"].double()
        size = float(block.abs().max())
        near = {"rtol": 0, "atol": tolerance * size}
        torch.testing.assert_close(values, torch.linalg.eigvalsh(block).clamp(min=0), **near)
        torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, block, **near)
        eye = torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(vectors.T @ vectors, eye, rtol=0, atol=tolerance)
        assert 0 <= values[0] <= values[1]


@pytest.mark.parametrize(
    "block",
    [
        [[0.0, 0.0], [0.0, 0.0]],
        [[1.0, 0.0], [0.0, 1.0]],
        [[3.0, 0.0], [0.0, 1.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        [[1.0, -1.0], [-1.0, 1.0]],
        [[1e30, 1e-10], [1e-10, 1.0]],
        [[1.0, 1e-30], [1e-30, 1e-38]],
    ],
)
def test_blocks_at_the_edge(block):
    block = torch.tensor([block])
    parts = Unitwise().decompose("U", block, CONTEXT)
    expected = torch.linalg.eigvalsh(block.double()).clamp(min=0)
    size = float(block.max())
    torch.testing.assert_close(parts["eigenvalues"].double(), expected, rtol=1e-6, atol=1e-6 * size)
    vectors = parts["eigenvectors"]
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(2)[None])
    rebuilt = vectors * parts["eigenvalues"].unsqueeze(-2) @ vectors.mT
    torch.testing.assert_close(rebuilt, block, rtol=1e-6, atol=1e-6 * size)
    assert operator_of(block).solve(torch.ones(1, 1, 2)).isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_that_is_not_finite_is_refused(n, bad):
    block = blocks_of(n)
    block[3, 0, n - 1] = bad
    with pytest.raises(DecompositionError, match="NaN or inf"):
        Unitwise().decompose("U", block, CONTEXT)


def test_a_group_does_not_see_the_others():
    block = blocks_of(2)
    block[0] *= 1e12
    v = torch.randn(7, 1, 2, dtype=torch.float64)
    alone = operator_of(block[1:], 0.1).solve(v[1:])
    assert torch.equal(operator_of(block, 0.1).solve(v)[1:], alone)


def test_damping_is_that_of_the_step():
    block, v = blocks_of(2), torch.randn(7, 1, 2, dtype=torch.float64)
    parts = {"U": Unitwise().decompose("U", block, FactorContext(damping=5.0, mean_diagonal={}))}
    for damping in (0.1, 10.0):
        found = Unitwise().operator(parts, {}, damping, {}).solve(v)
        dense = block + damping * torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(found, torch.linalg.solve(dense, v.mT).mT)
