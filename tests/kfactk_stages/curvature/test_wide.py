"""Wide sides: the claimed matrix, densely in float64; factors of every view; nothing of n x n."""

import io
from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
from torch import nn

import kfactk
from kfactk import Layer, LayerCall
from kfactk.testing import CurvatureLaws
from kfactk.testing._support import truth
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac
from tests.kfactk.dense import masked, stand_ins

TAU, MOST, N = 0.03, 5, 24
FORMS = ("diagonal", "blocks", "identity")
BOTH = ("weight", "bias")


class TestKfacWide(CurvatureLaws):
    stage: ClassVar = {"name": "kfac", "max_side": 3, "wide": "diagonal"}


class TestConvKfacOfBlocks(CurvatureLaws):
    stage: ClassVar = {"name": "conv_kfac", "max_side": 4, "wide": "blocks"}


def model_of(*, dtype=torch.float64):
    """Return a model of which one side of a layer is wide, and both of another, and its data."""
    torch.manual_seed(0)
    layers = OrderedDict(fc=nn.Linear(6, 5), act=nn.Tanh(), head=nn.Linear(5, 7))
    model = nn.Sequential(layers).to(dtype)
    return model, torch.randn(N, 6, dtype=dtype), torch.randint(7, (N,))


def loss(output, labels):
    return nn.functional.cross_entropy(output, labels, reduction="sum")


def trained(model, inputs, labels, basis, steps=1, **options):
    recipe = kfactk.build(
        curvature={"name": "kfac", "max_side": MOST, **options},
        basis=basis,
        fisher="empirical",
        damping=TAU,
        factor_every=1,
        scale_every=1,
        basis_every=1,
        clip="none",
        reduction="mean",
        update="sgd",
        lr=0.1,
    )
    optimizer = recipe.bind(model)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return optimizer


def claimed(model, name, inputs, labels, wide):
    """Return D of a layer by autograd, example by example, and A and G as the form claims them."""
    d = truth.layer_gradients(model, name, inputs, labels, loss)
    g = d[..., -1]  # the bias's part of D is g
    a = torch.linalg.lstsq(g[..., None], d).solution[:, 0]  # rank one: T = 1
    return d, masked(a.T @ a / N, MOST, wide), masked(g.T @ g / N, MOST, wide)


@pytest.mark.parametrize("wide", FORMS)
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_a_step_is_that_of_the_claimed_matrix(basis, wide):
    model, inputs, labels = model_of()
    before = {name: claimed(model, name, inputs, labels, wide) for name in ("fc", "head")}
    optimizer = trained(model, inputs, labels, basis, wide=wide)
    for name, (d, a, g) in before.items():
        v = torch.randn_like(d[0])
        given = {"weight": v[:, :-1], "bias": v[:, -1]}
        layer = optimizer.layers[name]
        solved, multiplied = (
            torch.cat([found["weight"], found["bias"][:, None]], 1)
            for found in (layer.precondition(given), layer.fisher_product(given))
        )
        if basis == "kfac":
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            eye_a, eye_g = (torch.eye(len(m), dtype=m.dtype) for m in (a, g))
            expected = torch.linalg.inv(g + TAU**0.5 / pi * eye_g) @ v
            expected = expected @ torch.linalg.inv(a + TAU**0.5 * pi * eye_a)
            product = g @ v @ a
        else:
            u_a, u_g = (
                torch.eye(len(m), dtype=m.dtype) if _diagonal(m) else torch.linalg.eigh(m)[1]
                for m in (a, g)
            )
            scale = (u_g.T @ d @ u_a).square().sum(0) / N
            expected = u_g @ ((u_g.T @ v @ u_a) / (scale + TAU)) @ u_a.T
            product = u_g @ ((u_g.T @ v @ u_a) * scale) @ u_a.T
            fisher, u = truth.dense_fisher(d, N), truth.dense_kron(u_a, u_g)
            mine = u @ truth.vec(scale).diag() @ u.T
            assert (fisher - mine).norm() <= (fisher - truth.dense_kron(a, g)).norm()
        torch.testing.assert_close(solved, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(multiplied, product, rtol=1e-9, atol=1e-12)


def _diagonal(matrix):
    return bool((matrix == matrix.diagonal().diag()).all())


CONVOLUTIONS = {
    "conv": nn.Conv2d(2, 6, 3, padding=1),
    "grouped": nn.Conv2d(4, 12, 2, groups=2),
    "transposed": nn.ConvTranspose2d(2, 6, 2, stride=2),
    "pointwise": nn.Conv2d(8, 3, 1, bias=False),
    "linear": nn.Linear(6, 7),
}


@pytest.mark.parametrize("wide", FORMS)
@pytest.mark.parametrize("spatial", ConvKfac.spatial_settings)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_factors_are_parts_of_the_whole_ones(kind, spatial, wide):
    torch.manual_seed(0)
    module = CONVOLUTIONS[kind].double()
    shape = (
        4,
        module.weight.shape[0 if kind == "transposed" else 1] * getattr(module, "groups", 1),
    )
    inputs = torch.randn(*shape, *(() if kind == "linear" else (3, 4)), dtype=torch.float64)
    inputs = inputs if kind != "linear" else torch.randn(4, 3, 6, dtype=torch.float64)
    gradient = torch.randn_like(module(inputs))
    layer = Layer("layer", module, BOTH if module.bias is not None else ("weight",))
    calls = [LayerCall(inputs, gradient)]

    def matrices(curvature):
        samples = curvature.samples(layer, calls, num_terms=4.0, first=True)
        found = curvature.factors(layer, samples)
        return curvature.assemble(layer, {n: s.total / s.count for n, s in found.items()})

    curvature = ConvKfac(spatial=spatial, max_side=MOST, wide=wide)
    channels_wide = kind in ("linear", "pointwise")
    whole = matrices(
        ConvKfac(
            spatial="sud" if kind == "pointwise" and spatial != "reduce" else spatial, max_side=None
        )
    )
    found, names = matrices(curvature), curvature.stand_ins(layer)
    assert "A" in names
    for side in ("A", "G"):
        expected = whole[side]
        if side not in names:
            torch.testing.assert_close(found[side], expected)
            continue
        parts = stand_ins(side, expected, MOST, wide)
        assert names[side] == tuple(parts)
        for name, part in parts.items():
            torch.testing.assert_close(found[name], part)
    for name in () if channels_wide else ("C", "K"):
        torch.testing.assert_close(found[name], whole[name])


def test_nothing_of_the_whole_side_is_ever_made():
    side = 300
    model = nn.Linear(4, side)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = torch.utils._pytree.tree_leaves(out)
            largest.extend(t.numel() for t in tensors if isinstance(t, torch.Tensor))
            return out

    recipe = kfactk.build(curvature={"name": "kfac", "max_side": 64, "wide": "diagonal"})
    optimizer = recipe.bind(model)
    with Watch():
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(3, 4)), torch.arange(3)).backward()
            optimizer.step()
        torch.save(optimizer.state_dict(), io.BytesIO())
    assert max(largest) < side**2 / 4


@pytest.mark.parametrize("wide", FORMS)
@pytest.mark.parametrize("basis", ["kfac", "ekfac", {"name": "ekfac", "scale": "running"}])
def test_state_returns_bit_for_bit(basis, wide):
    model, inputs, labels = model_of(dtype=torch.float32)
    optimizer = trained(model, inputs, labels, basis, steps=2, wide=wide)
    saved = optimizer.state_dict()
    other, *_ = model_of(dtype=torch.float32)
    other.load_state_dict(model.state_dict())
    resumed = trained(other, inputs, labels, basis, steps=0, wide=wide)
    resumed.load_state_dict(saved)
    for each, one in ((model, optimizer), (other, resumed)):
        one.zero_grad()
        nn.functional.cross_entropy(each(inputs), labels).backward()
        one.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_basis_of_whole_matrices_is_refused():
    class Whole(kfactk.Basis):
        requires = frozenset({"A", "G"})

        def decompose(self, name, matrix, context):
            return {}

        def operator(self, decomposition, moments, damping, matrices):
            raise NotImplementedError

    recipe = kfactk.build(curvature={"name": "kfac", "max_side": MOST}, basis=Whole())
    with pytest.raises(kfactk.CombinationError, match=r"'head'.*max_side.*exclude=\['head'\]"):
        recipe.bind(nn.Sequential(OrderedDict(head=nn.Linear(3, 9))))


def test_sides_within_the_limit_are_whole():
    layer = Layer("fc", nn.Linear(4, 5), BOTH)
    assert Kfac(max_side=5).stand_ins(layer) == {}
    assert Kfac(max_side=4).stand_ins(layer) == {"A": ("a",), "G": ("g",)}
    assert Kfac(max_side=None).stand_ins(layer) == {}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_follows_from_the_sides_alone(device):
    found = {
        sides: Kfac().stand_ins(Layer("fc", nn.Linear(*sides, device=device), BOTH))
        for sides in ((64, 8000), (64, 2048), (256, 4000), (768, 8300), (2, 2049))
    }
    assert found == {
        (64, 8000): {"G": ("g",)},
        (64, 2048): {},
        (256, 4000): {},
        (768, 8300): {"G": ("g",)},
        (2, 2049): {"G": ("g",)},
    }


def test_blocks_of_the_default_are_as_long_as_a_whole_side_may_be():
    layer = Layer("fc", nn.Linear(63, 5000, device="meta"), BOTH)
    assert Kfac(wide="blocks").stand_ins(layer) == {"G": ("G0", "G1", "G2")}


def test_the_diagonal_that_the_default_keeps_is_that_of_the_gradients():
    gradient = torch.randn(5, 2100, dtype=torch.float64)
    layer = Layer("fc", nn.Linear(3, 2100).double(), BOTH)
    call = LayerCall(torch.randn(5, 3, dtype=torch.float64), gradient)
    samples = Kfac().samples(layer, [call], num_terms=5, first=True)
    found = Kfac().factors(layer, samples)
    assert set(found) == {"A", "g"}
    assert torch.allclose(found["g"].total, gradient.square().sum(0))


@pytest.mark.parametrize("wrong", ["long", 0, 1.5, True])
def test_other_limits_are_refused(wrong):
    with pytest.raises(kfactk.OptionError, match='or None, or "auto"'):
        Kfac(max_side=wrong)
