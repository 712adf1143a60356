"""`Block`: work by shapes, decompositions, the cached operator, and checks of its two stages."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk import CurvatureOperator, Layer, LayerCall, PluginError, Statistic, Work
from kfactk.preconditioner.block import Block, LazyMatrices, mean_diagonals, parts_of
from kfactk.preconditioner.plan import BlockPlan
from kfactk.testing._support import truth
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac

F64 = torch.float64
TAU = 0.1


def layer(module: nn.Module, *parameters: str) -> Layer:
    return Layer("mine", module.double(), parameters or ("weight", "bias"))


def block(module: nn.Module, curvature: Any = None, basis: Any = None) -> Block:
    return Block(layer(module), curvature or ConvKfac(), basis or KfacInverse())


# ------------------------------------------------------------------------------------------- work


@pytest.mark.parametrize(
    ("module", "parameters", "work"),
    [
        (nn.Linear(4, 3), (), Work("mine", {"A": (5, 5), "G": (3, 3)}, (3, 5))),
        (nn.Linear(4, 3), ("weight",), Work("mine", {"A": (4, 4), "G": (3, 3)}, (3, 4))),
        (nn.Conv2d(2, 6, (3, 2)), (), Work("mine", {"A": (13, 13), "G": (6, 6)}, (6, 13))),
        (
            nn.Conv1d(4, 6, 2, groups=2),
            (),
            Work("mine", {"A": (2, 5, 5), "G": (2, 3, 3)}, (2, 3, 5)),
        ),
    ],
)
@pytest.mark.parametrize("basis", [KfacInverse(), Ekfac()])
def test_the_work_of_a_layer_follows_from_its_shapes(
    basis: Any, module: nn.Module, parameters: tuple[str, ...], work: Work
) -> None:
    assert Block(layer(module, *parameters), ConvKfac(), basis).work() == work


@attrs.frozen(kw_only=True)
class Mixed(ConvKfac):
    """Makes the matrix A of both statistics."""

    def assemble(self, layer: Layer, factors: Any) -> dict[str, Tensor]:
        a, g = factors["A"], factors["G"]
        return {"A": a * (1 + g.diagonal(dim1=-2, dim2=-1).mean()), "G": g}


@attrs.frozen(kw_only=True)
class Doubling(ConvKfac):
    """Gives G beside A even when asked for A alone."""

    def assemble(self, layer: Layer, factors: Any) -> dict[str, Tensor]:
        size = layer.tensors()["weight"].shape[0]
        return {"G": torch.zeros(size, size, dtype=F64), **super().assemble(layer, factors)}


@attrs.frozen(kw_only=True)
class Further(ConvKfac):
    """Has a statistic that is no matrix of the basis."""

    def gradient_factors(self, layer: Layer, samples: Any) -> dict[str, Statistic]:
        found = super().gradient_factors(layer, samples)
        total = found["G"].total
        assert total is not None
        trace = attrs.evolve(found["G"], total=total.diagonal().sum(), symmetric=False)
        return {**found, "trace": trace}


@pytest.mark.parametrize("curvature", [Mixed(), Doubling(), Further()])
def test_matrices_of_common_statistics_stay_together(curvature: ConvKfac) -> None:
    found = block(nn.Linear(4, 3), curvature).work()
    assert found == Work("mine", {"A": (5, 5), "G": (3, 3)}, (3, 5), indivisible=True)


@attrs.frozen(kw_only=True)
class OnlyG(KfacInverse):
    """Needs one matrix of the two."""

    requires: ClassVar[frozenset[str]] = frozenset({"G"})


def test_what_a_basis_does_not_need_is_no_work() -> None:
    found = block(nn.Linear(4, 3), basis=OnlyG()).work()
    assert found.matrices == {"G": (3, 3)}
    assert found.indivisible  # the other statistic is kept where this one is


def test_input_factors_are_named() -> None:
    assert block(nn.Linear(4, 3), Kfac()).input_factors() == {"A"}


# ----------------------------------------------------------------------------- calls into factors

EVERYTHING = BlockPlan(True, True, False, True)


def calls(count: int) -> list[LayerCall]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 4, generator=generator, dtype=F64)
    return [LayerCall(x, torch.randn(count, 3, generator=generator, dtype=F64))]


def test_two_forwards_average_to_the_factors_of_both() -> None:
    found = block(nn.Linear(4, 3), Kfac())
    one, other = calls(2), calls(5)
    for each, terms in ((one, 2.0), (other, 5.0)):
        samples = found.accumulate(each, terms, True, EVERYTHING)
        assert samples.examples == int(terms)
    found.state.commit()
    assert found.state.seen == 2
    means = {key: s.total / s.count for key, s in found.state.pending.items()}
    x = torch.cat([one[0].inputs, other[0].inputs])
    g = torch.cat([one[0].gradient, other[0].gradient])
    rows = torch.cat([x, torch.ones(7, 1, dtype=F64)], 1)
    torch.testing.assert_close(means["factor.A"], rows.T @ rows / 7)
    torch.testing.assert_close(means["factor.G"], g.T @ g / 7)


def test_a_forward_in_which_the_layer_did_not_run_adds_its_terms_to_g() -> None:
    found = block(nn.Linear(4, 3), Kfac())
    found.accumulate(calls(2), 2.0, True, EVERYTHING)
    found.accumulate_nothing(3.0, EVERYTHING)
    found.state.commit()
    g = calls(2)[0].gradient
    statistic = found.state.pending["factor.G"]
    torch.testing.assert_close(statistic.total / statistic.count, g.T @ g / 5)
    assert found.state.seen == 1


def test_samples_are_kept_only_where_the_plan_needs_them_later() -> None:
    found = block(nn.Linear(4, 3), Kfac(), Ekfac())
    found.accumulate(calls(2), 2.0, True, BlockPlan(True, True, False, False))
    assert (found.state.retained, found.state.input_versions) == ([], [])
    found.accumulate(calls(2), 2.0, True, BlockPlan(True, True, True, True, late=True))
    assert len(found.state.retained) == len(found.state.input_versions) == 1


# ----------------------------------------------------------------------- decomposing and solving


def measured(basis: Any, module: nn.Module | None = None) -> Block:
    """A block with random positive definite factors, decomposed."""
    torch.manual_seed(0)
    found = block(nn.Linear(4, 3) if module is None else module, Kfac(), basis)
    roots = {"A": torch.randn(9, 5, dtype=F64), "G": torch.randn(9, 3, dtype=F64)}
    found.update_factors({name: root.T @ root / 9 for name, root in roots.items()}, 0.9)
    found.adopt(found.decompose(TAU))
    found.state.ready = True
    return found


def dense(found: Block) -> Tensor:
    a, g = (found.state.factor_values()[name] for name in "AG")
    return truth.dense_kron(a, g)


def test_solve_is_the_inverse_of_the_damped_kronecker_product() -> None:
    found, v = measured(Ekfac()), torch.randn(3, 5, dtype=F64)
    found.update_moments({"scale": torch.full((3, 5), 0.7, dtype=F64)})
    torch.testing.assert_close(found.solve(v, TAU), v / (0.7 + TAU))
    torch.testing.assert_close(found.multiply(v, TAU), 0.7 * v)
    torch.testing.assert_close(found.condition(TAU), torch.ones((), dtype=F64))


def test_multiply_by_the_factors_is_the_kronecker_product() -> None:
    found, v = measured(KfacInverse()), torch.randn(3, 5, dtype=F64)
    product = truth.unvec(dense(found) @ truth.vec(v), 3)
    torch.testing.assert_close(found.multiply(v, TAU), product)


def test_an_operator_is_kept_until_something_it_depends_on_changes() -> None:
    found = measured(Ekfac())
    found.update_moments({"scale": torch.ones(3, 5, dtype=F64)})
    operator = found.operator(TAU)
    assert found.operator(TAU) is operator
    assert found.operator(2 * TAU) is not operator
    operator = found.operator(TAU)
    changes = [
        lambda: found.update_moments({"scale": torch.full((3, 5), 2.0, dtype=F64)}),
        lambda: found.update_factors({"A": torch.eye(5, dtype=F64)}, 0.9),
        lambda: found.adopt(found.decompose(TAU)),
        lambda: found.replace_state(attrs.evolve(found.state)),
        found.invalidate,
    ]
    for change in changes:
        change()
        assert found.operator(TAU) is not operator
        operator = found.operator(TAU)


def test_the_damping_of_the_step_is_used_where_none_is_given() -> None:
    found, v = measured(Ekfac()), torch.ones(3, 5, dtype=F64)
    found.update_moments({"scale": torch.zeros(3, 5, dtype=F64)})
    found.damping = 0.25
    torch.testing.assert_close(found.solve(v), 4 * v)


def test_decompose_changes_nothing() -> None:
    found = measured(Ekfac())
    before = found.state.decomposition
    flat = {key: tensor.clone() for key, tensor in found.flat().items()}
    found.decompose(TAU, {"A": torch.eye(5, dtype=F64), "G": torch.eye(3, dtype=F64)})
    assert found.state.decomposition is before
    assert all(torch.equal(tensor, flat[key]) for key, tensor in found.flat().items())


def test_a_new_decomposition_carries_the_moments_into_its_basis() -> None:
    """By EKFAC's rule: the diagonal of `Q'^T F Q'`, F diagonal in the old basis."""
    found = measured(Ekfac())
    scale = torch.rand(3, 5, dtype=F64)
    found.update_moments({"scale": scale})
    old = found.state.decomposition
    roots = {"A": torch.randn(9, 5, dtype=F64), "G": torch.randn(9, 3, dtype=F64)}
    found.update_factors({name: root.T @ root / 9 for name, root in roots.items()}, 0.0)
    carried = found.adopt(found.decompose(TAU))
    new = found.state.decomposition
    q, p = (
        truth.dense_kron(each["A"]["eigenvectors"], each["G"]["eigenvectors"])
        for each in (old, new)
    )
    f = q @ torch.diag(truth.vec(scale)) @ q.T
    expected = truth.unvec((p.T @ f @ p).diagonal(), 3)
    torch.testing.assert_close(carried["scale"].value, expected)


# ----------------------------------------------------------------------------------------- shapes


def test_blank_parts_are_those_of_a_real_decomposition() -> None:
    for basis in (KfacInverse(), Ekfac()):
        found = block(nn.Linear(4, 3), basis=basis)
        _, sums = found.blank()
        assert set(sums) == {"A", "G"}
        made = found.decompose(TAU, {"A": torch.diag(torch.arange(1.0, 6.0)), "G": torch.eye(3)})
        assert parts_of(made) == found.blank_parts(sums)
        assert list(made) == ["A", "G"]


def test_mean_diagonals_are_those_of_square_matrices() -> None:
    matrices = {
        "A": torch.diag(torch.arange(1.0, 6.0)),
        "G": 2 * torch.eye(3),
        "flat": torch.ones(2, 3),
    }
    found = mean_diagonals(matrices)
    assert {name: float(each) for name, each in found.items()} == {"A": 3.0, "G": 2.0}


def test_allocated_tensors_have_the_shapes_of_measured_ones() -> None:
    one, other = block(nn.Linear(4, 3), Kfac(), Ekfac()), measured(Ekfac())
    other.update_moments({"scale": torch.ones(3, 5, dtype=F64)})
    one.damping = TAU
    one.allocate(frozenset({"A", "G"}), holds=True)
    assert not one.state.measured
    shapes = [{key: tensor.shape for key, tensor in each.flat().items()} for each in (one, other)]
    assert shapes[0] == shapes[1]


def test_missing_tensors_count_as_zeros() -> None:
    found = block(nn.Linear(2, 2)).matrix({"weight": torch.ones(2, 2, dtype=torch.bfloat16)})
    assert torch.equal(found, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]], dtype=F64))


def test_matrices_are_assembled_when_they_are_read() -> None:
    read: list[set[str]] = []

    class Watched(Kfac):
        def assemble(self, layer: Layer, factors: Any) -> Any:
            read.append(set(factors))
            return super().assemble(layer, factors)

    found = measured(Ekfac())
    found.curvature = Watched()
    lazy = LazyMatrices(found)
    assert (list(lazy), len(lazy), read) == (["A", "G"], 2, [])
    torch.testing.assert_close(lazy["A"], found.state.factor_values()["A"])
    assert len(read) == 1


# ------------------------------------------------------------------------------ faults of stages


@attrs.frozen(eq=False)
class Flat(CurvatureOperator):
    """Gives a vector where a matrix is due."""

    def solve(self, v: Tensor) -> Tensor:
        return v.flatten()

    def multiply(self, v: Tensor) -> Tensor:
        raise ZeroDivisionError("no product")

    def condition(self) -> Tensor:
        raise ZeroDivisionError("no number")


@attrs.frozen(kw_only=True)
class Flattening(KfacInverse):
    def operator(self, *args: Any) -> CurvatureOperator:
        return Flat()


def test_faults_of_an_operator_name_the_basis_and_the_layer() -> None:
    found, v = measured(Flattening()), torch.ones(3, 5, dtype=F64)
    label = "basis .*:Flattening failed on layer 'mine' "
    with pytest.raises(PluginError, match=rf"{label}.*solve gave the shape \(15,\) for \(3, 5\)"):
        found.solve(v, TAU)
    with pytest.raises(PluginError, match=rf"{label}\(ZeroDivisionError: no product"):
        found.multiply(v, TAU)
    with pytest.raises(PluginError, match=rf"{label}\(ZeroDivisionError: no number"):
        found.condition(TAU)


class Lacking(Kfac):
    def assemble(self, layer: Layer, factors: Any) -> dict[str, Tensor]:
        return {"A": factors["A"]}


class Wordy(Kfac):
    def gradient_factors(self, layer: Layer, samples: Any) -> Any:
        return {"G": "G"}


class Turned(Kfac):
    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        found = super().tensors(layer, matrix)
        return {**found, "weight": found["weight"].T}


def test_faults_of_a_curvature_name_it_and_the_layer() -> None:
    label = r"curvature .*:{} .*on layer 'mine'"
    with pytest.raises(PluginError, match=label.format("Lacking") + ".*requires A, G"):
        block(nn.Linear(4, 3), Lacking()).work()
    with pytest.raises(PluginError, match=label.format("Wordy") + ".*kfactk.Statistic"):
        block(nn.Linear(4, 3), Wordy()).accumulate(calls(2), 2.0, True, EVERYTHING)
    with pytest.raises(PluginError, match=label.format("Turned") + r".*gave the shapes"):
        block(nn.Linear(4, 3), Turned()).tensors(torch.ones(3, 5, dtype=F64))


def test_blocks_of_a_bound_model_have_its_stages() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = kfactk.build(curvature=["kfac", "norm"], basis="ekfac").bind(model)
    stages = {n: (type(v.block.curvature), v.block.sampled) for n, v in optimizer.layers.items()}
    assert stages["0"] == (Kfac, True)
    assert not stages["1"][1]
