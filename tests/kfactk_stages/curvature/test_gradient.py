"""Gradient: moments of rows and columns of any parameter's gradient, against loops."""

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from kfactk import GradientCurvature, Layer, OptionError
from kfactk.statistics import local_means
from kfactk.testing import GradientCurvatureLaws
from kfactk_stages.curvature.gradient import Gradient

F64 = torch.float64


class TestGradient(GradientCurvatureLaws):
    stage = "gradient"


class TestGradientOfStacks(GradientCurvatureLaws):
    stage: ClassVar[Any] = {"name": "gradient", "dims": "batch", "counts": "next"}


class Held(nn.Module):
    """A module of one parameter, called weight."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=F64))


def layer(*shape):
    return Layer("mine", Held(*shape), ("weight",))


def moments(curvature, of, gradient):
    return local_means(curvature.factors_of_gradient(of, curvature.matrix(of, gradient)))


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (4, 2, 3, 2)])
def test_factors_are_outer_products_of_the_merged_gradient(shape):
    of, gradient = layer(*shape), torch.randn(shape, dtype=F64)
    found = moments(Gradient(), of, {"weight": gradient})
    rows = gradient.reshape(shape[0], -1)
    left, right = torch.zeros(4, 4, dtype=F64), torch.zeros(rows.shape[1], rows.shape[1], dtype=F64)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[0]):
            left[i, j] = sum(rows[i, k] * rows[j, k] for k in range(rows.shape[1]))
    for each in rows:
        right += torch.outer(each, each)
    torch.testing.assert_close(found["L"], left)
    torch.testing.assert_close(found["R"], right)


@pytest.mark.parametrize("shape", [(5, 4, 3), (2, 5, 4, 3)])
def test_stacked_matrices_have_moments_of_their_own(shape):
    of, gradient = layer(*shape), torch.randn(shape, dtype=F64)
    found = moments(Gradient(dims="batch"), of, {"weight": gradient})
    for k, each in enumerate(gradient.reshape(-1, 4, 3)):
        torch.testing.assert_close(found["L"][k], each @ each.T)
        torch.testing.assert_close(found["R"][k], each.T @ each)


@pytest.mark.parametrize("dim", [0, 1])
def test_squares_side_by_side_have_moments_of_their_own(dim):
    of, parts = layer(*((9, 3) if dim == 0 else (3, 9))), torch.randn(3, 3, 3, dtype=F64).unbind()
    curvature, gradient = Gradient(squares=["*.weight"]), torch.cat(parts, dim)
    found = moments(curvature, of, {"weight": gradient})
    for k, each in enumerate(parts):
        torch.testing.assert_close(found["L"][k], each @ each.T)
        torch.testing.assert_close(found["R"][k], each.T @ each)
    again = curvature.tensors(of, curvature.matrix(of, {"weight": gradient}))
    assert torch.equal(again["weight"], gradient)


@pytest.mark.parametrize(
    ("shape", "name"), [((8, 3), "*"), ((9, 3), "*.qkv.weight"), ((3, 3), "*"), ((3, 1), "*")]
)
def test_no_squares_are_seen_where_there_are_none(shape, name):
    of = layer(*shape)
    curvature = Gradient(squares=[name])
    assert curvature.matrix(of, of.tensors()).shape == shape


@pytest.mark.parametrize("shape", [(), (5,)])
def test_vectors_have_a_diagonal_for_their_rows(shape):
    of, gradient = layer(*shape), torch.randn(shape, dtype=F64)
    found = moments(Gradient(), of, {"weight": gradient})
    torch.testing.assert_close(found["L"], gradient.square().reshape(-1, 1))
    torch.testing.assert_close(found["R"], gradient.square().sum().reshape(1, 1))


def test_a_wide_side_has_a_diagonal():
    of, gradient = layer(6, 3), torch.randn(6, 3, dtype=F64)
    found = moments(Gradient(max_side=5), of, {"weight": gradient})
    torch.testing.assert_close(found["l"], gradient.square().sum(1))
    torch.testing.assert_close(found["R"], gradient.T @ gradient)


@pytest.mark.parametrize("max_side", [None, 4])
def test_kfacs_factors_have_the_trace_of_the_second_moment(max_side):
    of, curvature = layer(4, 3), Gradient(max_side=max_side)
    gradient = torch.randn(4, 3, dtype=F64)
    found = curvature.assemble(of, moments(curvature, of, {"weight": gradient}))
    product = torch.kron(found["A"], found["G"])
    torch.testing.assert_close(product.trace(), gradient.square().sum())
    expected = torch.kron(gradient.T @ gradient, gradient @ gradient.T)
    torch.testing.assert_close(product, expected / gradient.square().sum())


def test_kfacs_factors_of_nothing_are_zero():
    of, curvature = layer(2, 2), Gradient()
    found = curvature.assemble(of, {"L": torch.zeros(2, 2), "R": torch.zeros(2, 2)})
    assert not found["A"].any()


def test_kfacs_factors_need_all_blocks_of_a_side():
    of, curvature = layer(6, 3), Gradient(max_side=5, wide="blocks")
    found = moments(curvature, of, {"weight": torch.ones(6, 3, dtype=F64)})
    assert set(curvature.assemble(of, found)) == {"L0", "L1", "R", "G0", "G1", "A"}
    assert set(curvature.assemble(of, {"L0": found["L0"]})) == {"L0"}


@pytest.mark.parametrize("dims", ["merge", "batch"])
@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (3, 2, 4), (3, 2, 4, 5), (2, 3, 2, 4, 5)])
def test_tensors_are_the_inverse_of_matrix(shape, dims):
    of, curvature = layer(*shape), Gradient(dims=dims)
    value = torch.randn(shape, dtype=F64)
    matrix = curvature.matrix(of, {"weight": value})
    assert matrix.ndim in (2, 3)
    assert torch.equal(curvature.tensors(of, matrix)["weight"], value)


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        (nn.Linear(2, 3), {"": ("weight",), "bias": ("bias",)}),
        (nn.LayerNorm(2), {"": ("weight",), "bias": ("bias",)}),
        (nn.Bilinear(2, 3, 4, bias=False), {"": ("weight",)}),
        (
            nn.RNNCell(2, 3, bias=False),
            {"weight_ih": ("weight_ih",), "weight_hh": ("weight_hh",)},
        ),
    ],
)
def test_each_parameter_is_a_part(module, parts):
    assert Gradient().unsupported(module) is None
    assert Gradient().parts(module) == parts


def test_vectors_can_be_left_to_the_update_rule():
    curvature = Gradient(vectors=False)
    assert curvature.parts(nn.Linear(2, 3)) == {"": ("weight",)}
    assert "fewer than two dimensions" in curvature.unsupported(nn.LayerNorm(2))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LazyLinear(3), "not initialised yet"),
        (nn.Embedding(3, 2, sparse=True), "sparse"),
        (nn.Linear(2, 2, dtype=torch.complex64), "no real floating-point"),
    ],
)
def test_what_has_no_dense_real_gradient_is_refused(module, reason):
    assert reason in Gradient().unsupported(module)


@pytest.mark.parametrize(
    "option",
    [
        {"dims": "blocked"},
        {"vectors": 1},
        {"max_side": 0},
        {"wide": "blocked"},
        {"counts": "later"},
        {"squares": "*"},
        {"squares": [""]},
    ],
)
def test_options_are_checked(option):
    with pytest.raises(OptionError, match=f"{next(iter(option))}="):
        Gradient(**option)


def test_it_has_no_samples():
    curvature = Gradient()
    assert isinstance(curvature, GradientCurvature)
    for ask in (
        lambda: curvature.blank(layer(2, 2)),
        lambda: curvature.samples(layer(2, 2), [], num_terms=1.0, first=True),
        lambda: curvature.gradient_factors(layer(2, 2), None),
    ):
        with pytest.raises(NotImplementedError):
            ask()
