"""Taylor: the laws on tensors and on jets; curvature of residuals against autograd.

The truth is the user's own formula: a plain network, differentiated twice in its points.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk import CaptureError, Layer, LayerCall, OptionError
from kfactk.costmodel.counting import training_load
from kfactk.testing import CurvatureLaws, PipelineLaws
from kfactk.testing._support import truth
from kfactk.testing._support.strategies import linear_cases
from kfactk_stages.curvature.taylor import Taylor

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MEASURED: dict[str, Any] = {
    **{"likelihood": "gaussian", "fisher": "exact", "update": "sgd", "lr": 1e-9, "clip": "none"},
    **{"factor_every": 1, "scale_every": 1, "basis_every": 1},
}


# -------------------------------------------------------------------------------------- the laws


class TestTaylor(CurvatureLaws):
    stage = "taylor"


def ones_of(rows: int) -> Tensor:
    """Return what the bias is multiplied by in each row of a jet."""
    return (torch.arange(rows) == 0).double()


class TestTaylorOfJets(CurvatureLaws):
    """The same laws where each input `[N, T, d]` is a jet, whose bias is in the first row alone."""

    stage = "taylor"
    covers: ClassVar = (nn.Linear,)

    def cases(self):
        return linear_cases(3, freeze=True, most_calls=2).filter(
            lambda case: case.inputs.ndim == 3 and all(x.ndim == 3 for x, _ in case.calls)
        )

    def single_row_cases(self):
        return self.cases().filter(lambda case: case.inputs.shape[1] == 1 and not case.further)

    def _layer_calls(self, case, inputs, gradient, scale):
        return [LayerCall(inputs, gradient, scale, ones=ones_of(inputs.shape[1]).to(inputs.dtype))]

    def gradients(self, case):
        total = torch.zeros(())
        for x, g in case.calls:
            columns = [x, ones_of(x.shape[1]).to(x.dtype).expand(len(x), -1).unsqueeze(-1)]
            a = torch.cat(columns if case.layer.bias else columns[:1], -1)
            total = total + torch.einsum("nto,nti->noi", g, a)
        return total

    # These compare with the module itself, which adds its bias to all rows.
    test_per_example_gradients_are_autograds = None
    test_moments_are_sums_over_rows = None


def test_a_tensor_beside_a_jet_has_a_bias_in_each_row(doubles) -> None:
    layer = Layer("fc", nn.Linear(2, 3), ("weight", "bias"))
    x, g = torch.randn(4, 3, 2), torch.randn(4, 3, 3)
    z, h = torch.randn(4, 2), torch.randn(4, 3)
    calls = [LayerCall(x, g, ones=ones_of(3)), LayerCall(z, h)]
    samples = Taylor().samples(layer, calls, num_terms=4, first=True)
    jets = torch.einsum("nto,nti->noi", g, torch.cat([x, ones_of(3).expand(4, 3)[..., None]], -1))
    tensors = torch.einsum("no,ni->noi", h, torch.cat([z, torch.ones(4, 1)], -1))
    torch.testing.assert_close(samples.per_example_gradients(), jets + tensors)


def test_points_of_a_jet_are_in_front_also_where_sequences_come_first(doubles) -> None:
    layer = Layer("fc", nn.Linear(2, 3), ("weight", "bias"))
    x, g = torch.randn(4, 3, 2), torch.randn(4, 3, 3)
    for batch_dim in (0, 1):
        curvature = Taylor(batch_dim=batch_dim)
        samples = curvature.samples(
            layer, [LayerCall(x, g, ones=ones_of(3))], num_terms=4, first=True
        )
        assert (samples.examples, samples.positions) == (4, 3)


def test_wide_sides_keep_the_diagonal_of_jets(doubles) -> None:
    layer = Layer("fc", nn.Linear(5, 3), ("weight", "bias"))
    x, g = torch.randn(4, 3, 5), torch.randn(4, 3, 3)
    call = LayerCall(x, g, ones=ones_of(3))
    wide, whole = Taylor(max_side=4, wide="diagonal"), Taylor()
    found, expected = (
        each.factors(layer, each.samples(layer, [call], num_terms=4, first=True))
        for each in (wide, whole)
    )
    torch.testing.assert_close(found["a"].total, expected["A"].total.diagonal())


def test_rows_of_one_point_are_never_averaged() -> None:
    with pytest.raises(OptionError, match="sud"):
        Taylor(spatial="reduce")


# ------------------------------------------------------------------------------------- residuals


def network(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "residual":
        return Connected()
    width = 5
    return nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 4, bias=False), nn.SiLU(), nn.Linear(4, 1)
    )


class Connected(nn.Module):
    """Residual connections, a shared layer, and zero on the edge by construction."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.shared = nn.Linear(4, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Any) -> Any:
        h = self.first(x).sin()
        for _ in range(2):
            h = h + self.shared(h).tanh()
        a, b = x[:, :1], x[:, 1:]
        return a * (1 - a) * b * (1 - b) * self.last(h) + a


def poisson(points: Tensor, u: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """u_xx + u_yy + f."""
    return hessian.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True) + points.prod(1, keepdim=True)


def heat(points: Tensor, u: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """u_t - u_xx."""
    return gradient[:, :1] - hessian[:, 1, 1:]


def wave(points: Tensor, u: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """u_tt - u_xx + u u_t."""
    return hessian[:, :1, 0] - hessian[:, 1, 1:] + u * gradient[:, :1]


EQUATIONS: dict[str, tuple[Callable[..., Tensor], Any, Callable[..., Tensor]]] = {
    "poisson": (poisson, None, lambda p, u: u.laplacian + p.prod(1, keepdim=True)),
    "heat": (heat, [[0, 1]], lambda p, u: u.gradient[:, 0] - u.second[:, 0]),
    "wave": (
        wave,
        [[1, -1]],
        lambda p, u: u.second[:, 0] + u.value * u.gradient[:, 0],
    ),
}
"""By name: the residual by derivatives of autograd, `second`, and the residual by a jet."""


class ByJet(nn.Module):
    def __init__(self, net: nn.Module, equation: str) -> None:
        super().__init__()
        self.net, self.equation = net, equation

    def forward(self, points: Tensor, inside: Tensor) -> Tensor:
        _, second, residual = EQUATIONS[self.equation]
        u = self.net(kfactk.jet(points, second=second))
        return torch.where(inside, residual(points, u), 10 * u.value)


def by_autograd(net: nn.Module, equation: str, points: Tensor, inside: Tensor) -> Tensor:
    """Return the residuals by the user's formula: two backward passes in the points."""
    x = points.clone().requires_grad_()
    u = net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    bends = [
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0]
        for i in range(points.shape[1])
    ]
    residual = EQUATIONS[equation][0](points, u, slope, torch.stack(bends, 1))
    return torch.where(inside, residual, 10 * u)


def gradients(net: nn.Module, equation: str, points: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """Return D of each linear layer `[N, d_out, d_in]`, a row of autograd a point."""
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    residuals = by_autograd(net, equation, points, inside).flatten()
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for each in residuals:
        for name, layer in layers.items():
            wanted = [p for p in (layer.weight, layer.bias) if p is not None]
            parts = torch.autograd.grad(each, wanted, retain_graph=True, materialize_grads=True)
            found[name].append(torch.cat([p.reshape(len(layer.weight), -1) for p in parts], 1))
    return {name: torch.stack(each) for name, each in found.items()}


@pytest.fixture
def points(doubles) -> tuple[Tensor, Tensor]:
    return torch.rand(12, 2), (torch.arange(12) < 8)[:, None]


@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_curvature_is_that_of_the_residual(
    basis: str, kind: str, equation: str, points: tuple[Tensor, Tensor]
) -> None:
    """EKFAC's scale is the diagonal of F in its basis; A and G are sums over rows."""
    net = network(kind)
    expected, truths = gradients(net, equation, *points), by_autograd(net, equation, *points)
    seen: dict[str, list[Tensor]] = {}
    model = ByJet(net, equation)
    handles = [
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.setdefault(name, []).append((args[0], out))
        )
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear)
    ]
    periods = {"scale_every": 1 if basis == "ekfac" else None}
    recipe = kfactk.build(curvature="taylor", basis=basis, **{**MEASURED, **periods})
    optimizer = recipe.bind(model)
    residuals = model(*points)
    torch.testing.assert_close(residuals, truths, **EXACT)
    outputs = [out.rows for calls in seen.values() for _, out in calls]
    slopes = iter(torch.autograd.grad(residuals.sum(), outputs, retain_graph=True))
    (residuals.square().mean() / 2).backward()
    optimizer.step()
    for handle in handles:
        handle.remove()
    for name, d in expected.items():
        view = optimizer.layers[f"net.{name}"]
        bias = net.get_submodule(name).bias is not None
        calls = [with_ones(x, bias) for x, _ in seen[name]]
        a = torch.cat(calls, 1)
        g = torch.cat([next(slopes) for _ in calls], 1)
        torch.testing.assert_close(torch.einsum("nto,nti->noi", g, a), d, **EXACT)
        torch.testing.assert_close(view.factors["A"], truth.moment(a) / 12, **EXACT)
        rows = 12 * a.shape[1]
        torch.testing.assert_close(view.factors["G"], truth.moment(g) / rows, **EXACT)
        if basis == "ekfac":
            left, right = (view.decomposition[side]["eigenvectors"] for side in ("G", "A"))
            scale = (left.T @ d @ right).square().sum(0) / 12
            torch.testing.assert_close(view.scale["scale"], scale, **EXACT)
    optimizer.close()


def with_ones(x: kfactk.Jet, bias: bool) -> Tensor:
    """Return the input rows of a call, with 1 in the row of the value and 0 elsewhere."""
    rows = x.rows.detach()
    column = torch.zeros(*rows.shape[:2], 1)
    column[:, 0] = 1
    return torch.cat([rows, column], -1) if bias else rows


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_targets_give_the_squares_of_their_own_gradients(
    fisher: str, points: tuple[Tensor, Tensor]
) -> None:
    """The empirical F of a squared residual is that of D times the residual."""
    net = network("plain")
    model, expected = ByJet(net, "poisson"), gradients(net, "poisson", *points)
    options = {**MEASURED, "fisher": fisher}
    optimizer = kfactk.build(curvature="taylor", basis="ekfac", **options).bind(model)
    residuals = model(*points)
    (residuals.square().mean() / 2).backward()
    optimizer.step()
    for name, d in expected.items():
        view = optimizer.layers[f"net.{name}"]
        left, right = (view.decomposition[side]["eigenvectors"] for side in ("G", "A"))
        assert view.scale["scale"].isfinite().all()
        if fisher == "empirical":
            scale = (left.T @ (d * residuals.detach()[..., None]) @ right).square().sum(0) / 12
            torch.testing.assert_close(view.scale["scale"], scale, **EXACT)
    optimizer.close()


def test_a_dense_step_on_one_layer(points: tuple[Tensor, Tensor]) -> None:
    """Without derivatives in a jet, one linear layer of one output has A kron G = F."""
    model = Values()
    p = points[0]
    x = torch.cat([p, torch.ones(12, 1)], 1)
    fisher, damping = x.T @ x / 12, 0.1
    options = {**MEASURED, "lr": 1.0, "damping": damping}
    before = torch.cat([model.fc.weight.detach()[0], model.fc.bias.detach()])
    optimizer = kfactk.build(curvature="taylor", basis="ekfac", **options).bind(model)
    (model(p).square().mean() / 2).backward()
    gradient = torch.cat([model.fc.weight.grad[0], model.fc.bias.grad])
    optimizer.step()
    after = torch.cat([model.fc.weight.detach()[0], model.fc.bias.detach()])
    # One output: the eigenbasis of A is that of F, so that the scale is its spectrum.
    solved = torch.linalg.solve(fisher + damping * torch.eye(3), gradient)
    torch.testing.assert_close(before - after, solved, **EXACT)
    optimizer.close()


class Values(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, points: Tensor) -> Tensor:
        return self.fc(kfactk.jet(points, directions=torch.zeros(0, 2), second=[])).value


def test_a_step_has_the_gradient_of_the_double_backward(points: tuple[Tensor, Tensor]) -> None:
    net = network("residual")
    loss = by_autograd(net, "poisson", *points).square().mean() / 2
    expected = torch.autograd.grad(loss, list(net.parameters()))
    model = ByJet(net, "poisson")
    optimizer = kfactk.build(curvature="taylor", **MEASURED).bind(model)
    (model(*points).square().mean() / 2).backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)
    optimizer.close()


# ------------------------------------------------------------------------------ other curvatures


@pytest.mark.parametrize(
    ("curvature", "basis"), [("kfac", "ekfac"), ("conv_kfac", "kfac"), ("rows", "cg")]
)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_other_curvatures_refuse_a_jet_with_the_line_to_write(
    fisher: str, curvature: str, basis: str, points: tuple[Tensor, Tensor]
) -> None:
    options = {**MEASURED, "fisher": fisher, "scale_every": None}
    model = ByJet(network("plain"), "poisson")
    recipe = kfactk.build(curvature=curvature, basis=basis, **options)
    optimizer = recipe.bind(model)
    with pytest.raises(CaptureError, match=r"'net\.\d'.*curvature='taylor'"):
        run(model, optimizer, [points])
    optimizer.close()


def test_statistics_of_gradients_take_jets_as_they_are(points: tuple[Tensor, Tensor]) -> None:
    model = ByJet(network("plain"), "poisson")
    optimizer = kfactk.build(curvature="gradient", basis="soap", update="sgd").bind(model)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(*points).square().mean() / 2
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_derivatives_by_autograd_are_refused_with_the_way_by_jets(
    points: tuple[Tensor, Tensor],
) -> None:
    class ByAutograd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network("plain")

        def forward(self, p: Tensor, inside: Tensor) -> Tensor:
            return by_autograd(self.net, "poisson", p, inside)

    model = ByAutograd()
    optimizer = kfactk.build(curvature="taylor", **MEASURED).bind(model)
    with pytest.raises(CaptureError, match=r"kfactk\.jet\(x\).*curvature='taylor'"):
        model(*points)
    optimizer.close()


def test_a_bound_network_that_returns_a_jet_wants_to_know_the_residual(
    points: tuple[Tensor, Tensor],
) -> None:
    p = points[0]
    net = network("plain")
    optimizer = kfactk.build(curvature="taylor", **MEASURED).bind(net)
    with pytest.raises(CaptureError, match=r"returned a kfactk\.Jet.*output=lambda u"):
        net(kfactk.jet(p))
    optimizer.close()
    expected = gradients(net, "poisson", p, torch.ones(12, 1, dtype=torch.bool))
    recipe = kfactk.build(curvature="taylor", output=lambda u: u.laplacian, **MEASURED)
    optimizer = recipe.bind(net)
    (net(kfactk.jet(p)).laplacian.square().mean() / 2).backward()
    optimizer.step()
    for name, d in expected.items():
        view = optimizer.layers[name]
        left, right = (view.decomposition[side]["eigenvectors"] for side in ("G", "A"))
        scale = (left.T @ d @ right).square().sum(0) / 12
        torch.testing.assert_close(view.scale["scale"], scale, **EXACT)
    optimizer.close()


# ------------------------------------------------------------------------------------ situations


def run(model: nn.Module, optimizer: Any, batches: list[tuple[Tensor, Tensor]]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        (model(*batch).square().mean() / 2).backward()
        optimizer.step()


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inside = (torch.arange(12) < 8)[:, None]
    return [(torch.rand(12, 2, generator=generator), inside) for _ in range(number)]


LEARNING = {**MEASURED, "lr": 0.05, "damping": 0.1, "basis_every": 2}


@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_a_resumed_run_is_the_same_run(basis: str, doubles) -> None:
    ends = []
    for cut in (None, 3):
        model = ByJet(network("residual"), "heat")
        optimizer = kfactk.build(curvature="taylor", basis=basis, **LEARNING).bind(model)
        run(model, optimizer, batches(6)[:cut])
        if cut is not None:
            state, numbers = optimizer.state_dict(), model.state_dict()
            model = ByJet(network("residual"), "heat")
            model.load_state_dict(numbers)
            optimizer = kfactk.build(curvature="taylor", basis=basis, **LEARNING).bind(model)
            optimizer.load_state_dict(state)
            run(model, optimizer, batches(6)[cut:])
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_micro_batches_make_the_step_of_the_whole(doubles) -> None:
    (points, inside), ends = batches(1)[0], []
    for parts in ([slice(0, 12)], [slice(0, 5), slice(5, 6), slice(6, 12)]):
        model = ByJet(network("plain"), "poisson")
        optimizer = kfactk.build(curvature="taylor", basis="ekfac", **LEARNING).bind(model)
        for part in parts:
            (model(points[part], inside[part]).square().sum() / 24).backward()
        optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


class Heat(nn.Module):
    """Residuals u_t - u_xx of points (t, x)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network("residual")

    def forward(self, points: Tensor) -> Tensor:
        u = self.net(kfactk.jet(points, second=[[0, 1]]))
        return u.gradient[:, 0] - u.second[:, 0]


class TestHeat(PipelineLaws):
    """The laws of recipes, on residuals: ranks, resuming, accumulation, closures."""

    recipe: ClassVar[Any] = {
        **{"curvature": "taylor", "likelihood": "gaussian", "fisher": "exact"},
        **{"update": "sgd", "lr": 0.01, "clip": "none", "damping": 0.1},
    }

    def model(self) -> nn.Module:
        return Heat().double()

    def batch(self, generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
        points = torch.rand(examples, 2, generator=generator, dtype=torch.float64)
        return points, points.sin().sum(1, keepdim=True)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output - targets).square().mean() / 2


class TestHeatObserved(TestHeat):
    """Likewise, on the user's own backward, by the damped inverse."""

    recipe: ClassVar[Any] = {
        **{"curvature": "taylor", "likelihood": "gaussian", "fisher": "empirical"},
        **{"basis": "kfac", "update": "sgd", "lr": 0.01, "clip": "none", "damping": 0.1},
    }


def test_costs_count_each_row_of_a_jet() -> None:
    """Products of a factor are those of 4 rows a point: value, u_t, u_x and u_xx."""
    with torch.device("meta"):
        model = Heat()
    recipe = kfactk.build(curvature="taylor", basis="kfac", likelihood="gaussian", fisher="exact")
    load = training_load(model, recipe, torch.empty(8, 2, device="meta"))
    rows, (d_out, d_in) = 8 * 4, (4, 2 + 1)
    products = load.layers["net.first"].factors.products
    assert products == 2 * rows * (d_in**2 + d_out**2)


class Both(nn.Module):
    """Residuals by jets, and values on the edge by tensors: two methods, and so two forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network("plain")

    def forward(self, points: Tensor) -> Tensor:
        return self.net(kfactk.jet(points)).laplacian

    def edge(self, points: Tensor) -> Tensor:
        return 10 * self.net(points)


@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_two_forwards_of_a_step_sum_up_jets_and_tensors(points: tuple[Tensor, Tensor]) -> None:
    """F is that of all points; a tensor has one row, with a bias."""
    model, (inside, edge) = Both(), (points[0][:8], points[0][8:])
    every = torch.ones(12, 1, dtype=torch.bool)
    parts = [
        gradients(model.net, "poisson", inside, every[:8]),
        gradients(model.net, "poisson", edge, ~every[8:]),
    ]
    optimizer = kfactk.build(curvature="taylor", basis="ekfac", **MEASURED).bind(
        model, entry=["forward", "edge"]
    )
    loss = model(inside).square().sum() + model.edge(edge).square().sum()
    (loss / 24).backward()
    optimizer.step()
    for name in parts[0]:
        d = torch.cat([part[name] for part in parts])
        view = optimizer.layers[f"net.{name}"]
        left, right = (view.decomposition[side]["eigenvectors"] for side in ("G", "A"))
        scale = (left.T @ d @ right).square().sum(0) / 12
        torch.testing.assert_close(view.scale["scale"], scale, **EXACT)
    optimizer.close()


def test_a_nonfinite_batch_changes_nothing(doubles) -> None:
    model = ByJet(network("plain"), "poisson")
    optimizer = kfactk.build(curvature="taylor", basis="ekfac", **LEARNING).bind(model)
    run(model, optimizer, batches(2))
    before = [p.detach().clone() for p in model.parameters()]
    points, inside = batches(1)[0]
    points = points.clone()
    points[0, 0] = float("nan")
    with pytest.warns(kfactk.KfactkWarning):
        run(model, optimizer, [(points, inside)])
    for one, other in zip(model.parameters(), before, strict=True):
        assert torch.equal(one, other)


def test_a_frozen_bias_leaves_the_weight_its_own_matrix(points: tuple[Tensor, Tensor]) -> None:
    net = network("plain")
    net[0].bias.requires_grad_(False)
    d = gradients_of_weight(net, points)
    model = ByJet(net, "poisson")
    optimizer = kfactk.build(curvature="taylor", basis="ekfac", **MEASURED).bind(model)
    (model(*points).square().mean() / 2).backward()
    optimizer.step()
    view = optimizer.layers["net.0"]
    assert view.factors["A"].shape == (2, 2)
    left, right = (view.decomposition[side]["eigenvectors"] for side in ("G", "A"))
    scale = (left.T @ d @ right).square().sum(0) / 12
    torch.testing.assert_close(view.scale["scale"], scale, **EXACT)
    optimizer.close()


def gradients_of_weight(net: nn.Module, points: tuple[Tensor, Tensor]) -> Tensor:
    residuals = by_autograd(net, "poisson", *points).flatten()
    rows = [
        torch.autograd.grad(r, net[0].weight, retain_graph=True, materialize_grads=True)[0]
        for r in residuals
    ]
    return torch.stack(rows)


def test_two_equations_share_a_step(doubles) -> None:
    """Two models, each with its optimizer, in one loop."""
    models = [ByJet(network("plain"), "heat"), ByJet(network("residual"), "wave")]
    optimizers = [
        kfactk.build(curvature="taylor", basis="ekfac", **LEARNING).bind(each) for each in models
    ]
    alone = ByJet(network("plain"), "heat")
    run(alone, kfactk.build(curvature="taylor", basis="ekfac", **LEARNING).bind(alone), batches(3))
    for batch, (model, optimizer) in itertools.product(
        batches(3), zip(models, optimizers, strict=True)
    ):
        run(model, optimizer, [batch])
    for one, other in zip(models[0].parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_jets_under_a_closure_and_the_controller(doubles) -> None:
    """The controller's forward-mode derivatives go through jets."""
    model = ByJet(network("plain"), "poisson")
    recipe = kfactk.build(
        **{"curvature": "taylor", "basis": "ekfac", "likelihood": "gaussian", "fisher": "exact"},
        **{"update": "velocity", "clip": "none", "controller": "quadratic", "reduction": "mean"},
    )
    optimizer = recipe.bind(model)
    losses = []
    for batch in batches(1) * 6:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(*batch).square().mean() / 2
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure)))
    assert losses[-1] < 0.5 * losses[0]


def test_layers_of_one_precision_and_of_another() -> None:
    """bfloat16 rows give statistics near those of float32."""
    found = []
    inside = (torch.arange(12) < 8)[:, None]
    torch.manual_seed(0)
    points = torch.rand(12, 2)
    for half in (False, True):
        model = ByJet(network("plain"), "heat").float()
        options = {**MEASURED, "scale_every": None}
        optimizer = kfactk.build(curvature="taylor", basis="kfac", **options).bind(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            residuals = model(points, inside)
        (residuals.float().square().mean() / 2).backward()
        optimizer.step()
        found.append(optimizer.layers["net.0"].factors)
        optimizer.close()
    for name, each in found[0].items():
        assert (found[1][name] - each).norm() < 0.1 * each.norm()


def test_a_curvature_that_reads_jets_says_so() -> None:
    assert Taylor.reads_ones
    assert not kfactk.Curvature.reads_ones
    assert attrs.fields(LayerCall).ones.default is None
