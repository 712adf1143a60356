"""The chain over time: the laws of bases, and dense sums over all lags."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import kfactk
from kfactk import CombinationError, DecompositionError, FactorContext, Layer, Samples, Statistic
from kfactk.linalg import mean_diagonal
from kfactk.testing import BasisLaws, effort
from kfactk.testing._support.situations import Situation
from kfactk.testing._support.strategies import Case
from kfactk.testing._support.truth import solve
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.basis.lgm import LinearGaussianModel, chain_sum
from kfactk_stages.curvature.kfac import Kfac
from tests.deviations import deviation

F64 = torch.float64
LONG = 100_000
"""Numbers of steps that are nearly without end."""


@attrs.frozen
class Sequences(Kfac):
    """Takes the rows of a linear layer as the steps of a sequence."""

    provides: ClassVar[frozenset[str]] = frozenset({"A", "G", "A_next", "G_next", "steps"})

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        a, n = samples.inputs(), float(samples.examples)
        after, before = a[:, 1:].flatten(0, 1), a[:, :-1].flatten(0, 1)
        steps = torch.tensor([1.0, samples.positions], dtype=a.dtype) * samples.positions * n
        found = {"A_next": Statistic(after.mT @ before, n), "steps": Statistic(steps, n)}
        return super().input_factors(layer, samples) | found

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        g = samples.gradients()
        after, before = g[:, 1:].flatten(0, 1), g[:, :-1].flatten(0, 1)
        found = Statistic(after.mT @ before / samples.positions, samples.num_terms)
        return super().gradient_factors(layer, samples) | {"G_next": found}


@st.composite
def sequences(draw: st.DrawFn) -> Case:
    """Linear layers on one to four steps of a few examples."""
    module = nn.Linear(draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans()))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x, g = (
        torch.randn(*shape, width, generator=generator, dtype=F64)
        for width in (module.in_features, module.out_features)
    )
    return Case(module.double(), x, g)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a symmetric positive semi-definite matrix; 0 in its null space."""
    values, vectors = torch.linalg.eigh(matrix)
    null = values <= 1e-12 * len(values) * values[-1].clamp(min=0)
    return vectors @ torch.diag(values.clamp(min=0).pow(exponent).masked_fill(null, 0)) @ vectors.mT


def chained(side: Tensor, following: Tensor, option: int) -> Tensor:
    """Return `A^-1/2 A_next A^-1/2`, of option 1 its symmetric part."""
    mixing = power(side, -0.5) @ following @ power(side, -0.5)
    return (mixing + mixing.mT) / 2 if option == 1 else mixing


def dense_chain(a: Tensor, g: Tensor, m: Tensor, n: Tensor, steps: float) -> Tensor:
    """Return `sum_d (1 - |d|/T) X_d kron Y_d`, lag by lag; of endless sequences with no weights."""
    root_a, root_g = power(a, 0.5), power(g, 0.5)
    total = torch.kron(a, g)
    x, y = m, n
    for lag in range(1, LONG):
        weight = 1 - lag / steps
        if weight <= 0 or float(x.norm() * y.norm()) < 1e-18:
            return total
        term = torch.kron(root_a @ x @ root_a, root_g @ y @ root_g)
        total, x, y = total + weight * (term + term.mT), x @ m, y @ n
    raise AssertionError("the chain does not decay")


def damped_sides(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return `A + pi sqrt(tau) I` and `G + sqrt(tau) / pi I`."""
    mean_a, mean_g = mean_diagonal(a), mean_diagonal(g)
    both = bool(mean_a > 0) and bool(mean_g > 0)
    pi = (mean_a / mean_g).sqrt() if both else torch.tensor(1.0, dtype=F64)
    eye_a, eye_g = (torch.eye(len(each), dtype=F64) for each in (a, g))
    return a + pi * damping**0.5 * eye_a, g + damping**0.5 / pi * eye_g


def truth(matrices: dict[str, Tensor], damping: float, option: int, steps: float) -> Tensor:
    """Return the damped F."""
    a, g = damped_sides(matrices["A"].double(), matrices["G"].double(), damping)
    m = chained(a, matrices["A_next"].double(), option)
    n = chained(g, matrices["G_next"].double(), option)
    return dense_chain(a, g, m, n, steps)


class TestLinearGaussianModel(BasisLaws):
    """Its block is the sum over all lags of endless sequences."""

    stage = "lgm"
    curvature = Sequences()

    def cases(self) -> st.SearchStrategy[Case]:
        return sequences()

    def block(self, situation: Situation) -> Tensor:
        return truth(situation.matrices, situation.damping, 2, float("inf"))

    def turned(self, name: str, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if name == "steps":
            return matrix
        return super().turned(name[0], matrix, left, right)


class TestOfOneLength(TestLinearGaussianModel):
    """Its block is the sum over all lags of T steps, of the symmetric parts."""

    stage: ClassVar[Any] = {"name": "lgm", "option": 1}

    def block(self, situation: Situation) -> Tensor:
        return truth(
            situation.matrices, situation.damping, 1, float(situation.matrices["steps"][0])
        )


# ------------------------------------------------------------------------------------ dense truth


def measured(seed: int, n: int, examples: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return the sums of a chain with its own dynamics, over steps, and of the next ones."""
    generator = torch.Generator().manual_seed(seed)
    dynamics = torch.randn(n, n, generator=generator, dtype=F64)
    dynamics = 0.9 * dynamics / torch.linalg.matrix_norm(dynamics, 2)
    rows = [torch.randn(examples, n, generator=generator, dtype=F64)]
    for _ in range(steps - 1):
        noise = torch.randn(examples, n, generator=generator, dtype=F64)
        rows.append(rows[-1] @ dynamics.mT + noise)
    x = torch.stack(rows, 1)
    a = torch.einsum("nti,ntj->ij", x, x) / examples
    return a, torch.einsum("nti,ntj->ij", x[:, 1:], x[:, :-1]) / examples


def drawn_matrices(seed: int, steps: int, examples: int = 6) -> dict[str, Tensor]:
    a, a_next = measured(seed, 4, examples, steps)
    g, g_next = measured(seed + 1, 3, examples, steps)
    number = torch.tensor([steps, steps**2], dtype=F64)
    parts = {"A": a, "A_next": a_next, "G": g / steps, "G_next": g_next / steps}
    return {**parts, "steps": number}


def operator_of(matrices: dict[str, Tensor], damping: float, option: int) -> Any:
    basis = LinearGaussianModel(option=option)
    means = {name: mean_diagonal(matrices[name]) for name in ("A", "G")}
    parts = {}
    for name in sorted(basis.requires):
        beside = {each: matrices[each] for each in basis.beside.get(name, ())}
        context = FactorContext(damping, means, beside=beside)
        parts[name] = basis.decompose(name, matrices[name], context)
    return basis.operator(parts, {}, damping, matrices)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_a_solve_is_that_of_dense_algebra(option: int, steps: int, damping: float) -> None:
    worst = 0.0
    for seed in range(4):
        matrices = drawn_matrices(seed, steps, examples=2 + 3 * seed)
        v = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)
        length = float(steps) if option == 1 else float("inf")
        expected = solve(truth(matrices, damping, option, length), v)
        found = operator_of(matrices, damping, option).solve(v)
        worst = max(worst, deviation(found, expected))
    assert worst < 1e-9


@pytest.mark.parametrize("option", [1, 2])
def test_a_product_is_that_of_dense_algebra(option: int) -> None:
    matrices = drawn_matrices(3, 5)
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    dense = truth(matrices, 0.0, option, 5.0 if option == 1 else float("inf"))
    expected = (dense @ v.mT.flatten()).reshape(4, 3).mT
    found = operator_of(matrices, 0.3, option).multiply(v)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("option", [1, 2])
def test_the_condition_is_that_of_the_diagonal_of_the_inverse(option: int) -> None:
    matrices = drawn_matrices(4, 5)
    length = 5.0 if option == 1 else float("inf")
    diagonal = torch.linalg.inv(truth(matrices, 0.01, option, length)).diagonal()
    expected = float(diagonal.max() / diagonal.min())
    assert float(operator_of(matrices, 0.01, option).condition()) == pytest.approx(expected)


def test_a_chain_of_its_own_model_is_the_fisher() -> None:
    """Of symmetric dynamics, and matrices without end effects, F is the sum over true pairs."""
    steps, m, n = (
        6,
        torch.diag(torch.tensor([0.9, -0.3], dtype=F64)),
        torch.tensor([[0.5]]).double(),
    )
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator, dtype=F64)).Q
    m = turn @ m @ turn.mT
    pairs = sum(
        torch.kron(
            torch.linalg.matrix_power(m, abs(s - t)), torch.linalg.matrix_power(n, abs(s - t))
        )
        for s in range(steps)
        for t in range(steps)
    )
    eye = torch.eye(2, dtype=F64)
    matrices = {"A": steps * eye, "A_next": steps * m, "G": eye[:1, :1], "G_next": n}
    matrices["steps"] = torch.tensor([steps, steps**2], dtype=F64)
    v = torch.tensor([[1.0, 2.0]], dtype=F64)
    found = operator_of(matrices, 0.0, 1).multiply(v)
    torch.testing.assert_close(found.mT.flatten(), pairs @ v.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("nothing", ["A_next", "G_next", "both"])
def test_without_correlation_it_is_kfac(option: int, nothing: str) -> None:
    matrices, damping = drawn_matrices(5, 7), 0.02
    for name in ("A_next", "G_next"):
        if nothing in (name, "both"):
            matrices[name] = 0 * matrices[name]
    check_kfac(matrices, damping, option)


@pytest.mark.parametrize("option", [1, 2])
def test_of_single_steps_it_is_kfac(option: int) -> None:
    check_kfac(drawn_matrices(6, 1), 0.02, option)


def check_kfac(matrices: dict[str, Tensor], damping: float, option: int) -> None:
    kfac = KfacInverse()
    means = {name: mean_diagonal(matrices[name]) for name in ("A", "G")}
    context = FactorContext(damping, means)
    parts = {name: kfac.decompose(name, matrices[name], context) for name in ("A", "G")}
    expected = kfac.operator(parts, {}, damping, matrices)
    found = operator_of(matrices, damping, option)
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=F64)
    torch.testing.assert_close(found.solve(v), expected.solve(v), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.multiply(v), expected.multiply(v), rtol=1e-11, atol=1e-13)


@settings(max_examples=effort(60))
@given(
    st.floats(-1, 1),
    st.one_of(st.floats(-1, 1), st.sampled_from([1.0, -1.0, 1 - 1e-9, 1 - 1e-5, 1 - 1e-3])),
    st.integers(1, 300),
)
def test_the_sum_over_lags_is_the_sum(m: float, n: float, steps: int) -> None:
    x = m * n
    expected = 1 + 2 * sum((1 - d / steps) * x**d for d in range(1, steps))
    found = chain_sum(
        torch.tensor([m], dtype=F64), torch.tensor([n], dtype=F64), torch.tensor([float(steps)])
    )
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_equal_gains_give_the_largest_sum() -> None:
    one, steps = torch.ones(1, dtype=F64), torch.tensor([50.0])
    assert float(chain_sum(one, one, steps)) == pytest.approx(50, rel=1e-12)


# --------------------------------------------------------------------------------------- refusals


def test_different_numbers_of_steps_are_refused_with_the_way_out() -> None:
    matrices = drawn_matrices(0, 4)
    matrices["steps"] = torch.tensor([3.9, 15.3], dtype=F64)  # one of ten has three
    with pytest.raises(CombinationError, match=r"they have 3\.9 in the mean.*'option': 2") as error:
        operator_of(matrices, 0.1, 1)
    assert "curvature='rnn', basis='kfac'" in str(error.value)
    operator_of(matrices, 0.1, 2)


@pytest.mark.parametrize("steps", [1, 4, 977, 20_000])
def test_roundings_are_no_different_numbers(steps: int) -> None:
    basis, one = LinearGaussianModel(option=1), torch.tensor(float(steps))
    mean = sum(one / 3 for _ in range(3))
    square = sum(one.square() / 7 for _ in range(7))
    both = torch.stack([torch.as_tensor(mean), torch.as_tensor(square)])
    found = basis.decompose("steps", both, FactorContext(0.1, {}))
    assert float(found["number"]) == pytest.approx(steps, rel=1e-5)


@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("name", ["A_next", "G_next"])
@pytest.mark.parametrize("factor", [3, -3])
def test_a_next_matrix_of_no_sequence_is_refused(factor: int, name: str, option: int) -> None:
    matrices = drawn_matrices(1, 6)
    matrices[name] = factor * matrices[name[0]]
    with pytest.raises(DecompositionError, match=f"{name} is larger than that of any sequence"):
        operator_of(matrices, 1e-6, option)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("option", [1, 2])
def test_few_rows_and_no_damping_are_no_reason_to_refuse(option: int, dtype: torch.dtype) -> None:
    """Two rows of one example are orthogonal when whitened: the next one is as large as can be."""
    generator = torch.Generator().manual_seed(0)
    for steps in (2, 3, 5):
        x = torch.randn(steps, 8, generator=generator, dtype=dtype)
        a, a_next = x.mT @ x, x[1:].mT @ x[:-1]
        number = torch.tensor([steps, steps**2], dtype=dtype)
        matrices = {"A": a, "A_next": a_next, "G": a, "G_next": a_next, "steps": number}
        for damping in (0.0, 1e-8, 1e-3):
            found = operator_of(matrices, damping, option).solve(torch.ones(8, 8, dtype=dtype))
            assert bool(found.isfinite().all())


@pytest.mark.parametrize("option", [0, 3, "1", True])
def test_other_options_are_refused(option: Any) -> None:
    with pytest.raises(kfactk.OptionError, match="option"):
        LinearGaussianModel(option=option)


def test_a_curvature_without_a_chain_is_refused_with_what_to_paste() -> None:
    with pytest.raises(CombinationError, match=r"needs A_next, G_next.*'time': 'chain'"):
        kfactk.build(curvature="rnn", basis="lgm")
    with pytest.raises(CombinationError, match=r"needs A_next, G_next, steps"):
        kfactk.build(curvature="kfac", basis={"name": "lgm", "option": 1})


def test_a_chain_that_nobody_reads_is_refused() -> None:
    chain = {"name": "rnn", "time": "chain"}
    with pytest.raises(CombinationError, match=r"A_next, G_next .*'kfac' does not read.*'lgm'"):
        kfactk.build(curvature=kfactk.block(chain, basis="kfac"))
    with pytest.raises(CombinationError, match=r"no block uses basis='kfac'.*rnn, lgm"):
        kfactk.build(curvature=chain, basis="kfac")
    [rule, other] = kfactk.build(curvature=[chain, "kfac"], basis="kfac").rules
    assert rule.basis == LinearGaussianModel()
    assert other.basis != rule.basis
    [rule] = kfactk.build(curvature=chain).rules
    assert rule.basis == LinearGaussianModel()


# ------------------------------------------------------------------------------ numbers of steps


@pytest.mark.parametrize("mean", [400.5, 400.9, 401.4])
def test_nearly_one_length_is_a_whole_number(mean: float) -> None:
    """Long sequences that differ by a step: negative gains have no powers in between."""
    matrices = drawn_matrices(0, 8)
    share = mean - int(mean)
    square = (1 - share) * int(mean) ** 2 + share * (int(mean) + 1) ** 2
    matrices["steps"] = torch.tensor([mean, square], dtype=F64)
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected = solve(truth(matrices, 0.01, 1, float(round(mean))), v)
    torch.testing.assert_close(operator_of(matrices, 0.01, 1).solve(v), expected, rtol=1e-9, atol=0)


def test_numbers_that_no_sequences_have_are_refused() -> None:
    matrices = drawn_matrices(0, 8)
    matrices["steps"] = torch.tensor([8.0, 8.0], dtype=F64)
    with pytest.raises(DecompositionError, match=r"no sequences have .* mean is 8 .* square is 8"):
        operator_of(matrices, 0.1, 1)


def test_rows_that_roundings_lengthen_are_shortened_with_their_gains() -> None:
    """`next next^T` is the square of the gains, so that `1 - Psi Psi^T` is what is divided by."""
    a = torch.diag(torch.tensor([1.0, 1e-6]))  # roundings of so bad a condition may be large
    mean, root = mean_diagonal(a), a.sqrt()
    a_next = root @ torch.tensor([[0.6, 0.8], [0.0, 0.3]]) @ root  # a singular value is 1.03
    context = FactorContext(0.0, {"A": mean, "G": mean}, beside={"A_next": a_next})
    parts = LinearGaussianModel().decompose("A", a, context)
    assert float(parts["gains"].max()) == 1
    squares = torch.diag(parts["gains"].square())
    torch.testing.assert_close(parts["next"] @ parts["next"].mT, squares, rtol=1e-4, atol=1e-4)
