"""Jets against autograd: every rule, and what has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, Jet, OptionError
from kfactk.derivatives import FUNCTIONS

EXACT = {"rtol": 1e-12, "atol": 1e-12}
POSITIVE = {"log", "sqrt", "rsqrt"}
Function = Callable[[Any], Any]


pytestmark = pytest.mark.usefixtures("doubles")


def derivatives(function: Function, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return value `[N, w]`, gradient `[N, d, w]` and Hessian `[N, d, d, w]`, point by point."""

    def one(point: Tensor) -> Tensor:
        found: Tensor = function(point.unsqueeze(0))[0]
        return found

    values, gradients, hessians = [], [], []
    for point in points:
        values.append(one(point))
        gradients.append(torch.autograd.functional.jacobian(one, point).T)
        rows = [
            torch.autograd.functional.hessian(lambda x, k=k: one(x)[k], point)
            for k in range(len(values[-1]))
        ]
        hessians.append(torch.stack(rows, -1))
    return torch.stack(values), torch.stack(gradients), torch.stack(hessians)


def check(function: Function, points: Tensor, **tolerance: float) -> None:
    """Compare jets with autograd: of the coordinates, and of directions and sums of one's own."""
    exact = {**EXACT, **tolerance}
    value, gradient, hessian = (each.detach() for each in derivatives(function, points))
    u = function(kfactk.jet(points))
    assert isinstance(u, Jet)
    assert u.shape == value.shape
    torch.testing.assert_close(u.value, value, **exact)
    torch.testing.assert_close(u.gradient, gradient, **exact)
    torch.testing.assert_close(u.laplacian, torch.einsum("niiw->nw", hessian), **exact)
    along, weights = torch.randn(3, points.shape[1]), torch.randn(2, 3)
    u = function(kfactk.jet(points, directions=along, second=weights))
    torch.testing.assert_close(u.gradient, torch.einsum("md,ndw->nmw", along, gradient), **exact)
    second = torch.einsum("km,md,me,ndew->nkw", weights, along, along, hessian)
    torch.testing.assert_close(u.second, second, rtol=10 * exact["rtol"], atol=10 * exact["atol"])


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_has_the_derivatives_of_autograd(name: str) -> None:
    points = 2 * torch.randn(7, 2)
    points = points.abs() + 0.2 if name in POSITIVE else points
    points = points.clamp(-0.8, 0.8) if name in ("log1p", "tan") else points
    where = [getattr(each, name, None) for each in (torch, F, torch.special)]
    ways = [each for each in where if callable(each)]
    ways += [lambda x: getattr(x, name)()] if hasattr(torch.Tensor, name) else []
    assert ways
    for way in ways:
        check(lambda x, way=way: way(x * 0.9 + 0.05), points)


@pytest.mark.parametrize(
    "module",
    [
        nn.GELU(approximate="tanh"),
        nn.Softplus(beta=3.0, threshold=2.0),
        nn.Softplus(),
        nn.SiLU(),
        nn.Mish(),
        nn.GELU(),
        nn.LogSigmoid(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Identity(),
        nn.Dropout(0.0),
        nn.Dropout(0.5).eval(),
    ],
    ids=str,
)
def test_a_module_has_the_derivatives_of_autograd(module: nn.Module) -> None:
    check(lambda x: module(2 * x), torch.randn(7, 2))


A, B = torch.randn(3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
STRUCTURES: dict[str, Function] = {
    "sum of jets": lambda x: x + x.sin(),
    "sum with a number": lambda x: 2 + x + 1,
    "sum with a tensor": lambda x: x[:, :1] + A,
    "sum with a scalar": lambda x: A[0] + x,
    "sum with alpha": lambda x: torch.add(x, x.sin(), alpha=3).add(2, alpha=2),
    "difference": lambda x: 1 - x - x.cos() - A[1],
    "difference with alpha": lambda x: torch.sub(x, x.sin(), alpha=2),
    "reversed difference": lambda x: torch.rsub(x, x.sin(), alpha=2),
    "negative": lambda x: -x.exp() + (+1) * x.neg(),
    "product": lambda x: x.sin() * x.exp(),
    "product with itself": lambda x: x * x,
    "product of columns": lambda x: x[:, :1] * (1 - x[:, 1:]) * x,
    "product with a number": lambda x: 3 * x.sin() * 2,
    "product with a tensor": lambda x: x[:, :1] * A,
    "product with a row": lambda x: (A.unsqueeze(0) * x[:, :1]).sin(),
    "quotient": lambda x: x.sin() / (2 + x * x),
    "quotient by a number": lambda x: x.sin() / 3,
    "quotient by a tensor": lambda x: x[:, :1] / A,
    "number by a jet": lambda x: 2 / (x * x + 1),
    "tensor by a jet": lambda x: A / (x[:, :1] * x[:, :1] + 1),
    "power 0": lambda x: x**0 + x,
    "power 1": lambda x: x**1,
    "power 2": lambda x: x**2,
    "power 3": lambda x: x.pow(3),
    "power -1.5": lambda x: (x * x + 1) ** -1.5,
    "power 2.0 at zero": lambda x: (x - x) ** 2 + x,
    "matrix": lambda x: (x @ B).tanh(),
    "matmul": lambda x: torch.matmul(x, B).tanh() + torch.mm(x, B),
    "linear": lambda x: F.linear(x.sin(), B.T, B[0]).tanh(),
    "linear without bias": lambda x: F.linear(x.sin(), B.T),
    "cat": lambda x: torch.cat([x.sin(), x, x[:, :1] * x], -1),
    "cat of dim 1": lambda x: torch.cat((x.cos(), x), dim=1),
    "columns": lambda x: x.sin()[:, 1:],
    "listed columns": lambda x: (x @ B)[:, [2, 0]].sin(),
    "columns by ellipsis": lambda x: (x @ B)[..., 1:3].sin(),
    "columns by tensor": lambda x: (x @ B)[:, torch.tensor([3, 1])].sin(),
    "split": lambda x: torch.split(x @ B, 2, -1)[1].sin(),
    "chunk": lambda x: (x @ B).sin().chunk(2, dim=1)[0],
    "sum of columns": lambda x: x.sin().sum(-1, keepdim=True),
    "mean of columns": lambda x: torch.mean(x.sin(), 1, keepdim=True) * x,
    "zeros": lambda x: torch.zeros_like(x) + x.sin(),
    "ones": lambda x: torch.ones_like(x) * x.sin() + torch.ones_like(x),
    "clone": lambda x: x.sin().clone().contiguous(),
    "periodic features": lambda x: torch.cat([torch.sin(2 * x), torch.cos(2 * x)], -1) @ B.T,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_an_operation_has_the_derivatives_of_autograd(name: str) -> None:
    check(STRUCTURES[name], torch.randn(5, 2))


class Residual(nn.Module):
    """A network with residual connections, gates and a hard boundary condition."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.gate = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.rand(width))
        self.out = nn.Linear(width, 1)

    def forward(self, x: Any) -> Any:
        h = torch.sin(self.embed(x))
        for layer in self.layers:
            h = h + self.scale * torch.tanh(layer(h))
        h = F.silu(self.gate(h)) * h
        a, b = x[:, :1], x[:, 1:]
        return a * (1 - a) * b * (1 - b) * self.out(h)


def test_a_residual_network_has_the_derivatives_of_autograd() -> None:
    check(Residual(), torch.rand(6, 2))


@pytest.mark.parametrize("depth", [1, 3])
def test_a_network_has_the_derivatives_of_autograd(depth: int) -> None:
    layers = [nn.Linear(3, 8), nn.Tanh()]
    for _ in range(depth):
        layers += [nn.Linear(8, 8), nn.GELU()]
    check(nn.Sequential(*layers, nn.Linear(8, 2)), torch.randn(6, 3))


def test_gradients_of_parameters_are_those_of_derivatives_by_autograd() -> None:
    """And so a step on a jet is that on the user's own formula."""
    net, points = Residual(), torch.rand(6, 2)
    x = points.clone().requires_grad_()
    u = net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    bends = [
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    ]
    loss = (sum(bends) + u[:, 0] * slope[:, 1]).square().mean()
    truth = torch.autograd.grad(loss, list(net.parameters()))
    jet = net(kfactk.jet(points))
    loss = (jet.laplacian[:, 0] + jet.value[:, 0] * jet.gradient[:, 1, 0]).square().mean()
    found = torch.autograd.grad(loss, list(net.parameters()))
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_directions_of_each_point_give_normal_derivatives() -> None:
    net, points = Residual(), torch.rand(6, 2)
    normals = F.normalize(torch.randn(6, 2))
    _, gradient, hessian = derivatives(net, points)
    u = net(kfactk.jet(points, directions=normals.unsqueeze(1)))
    torch.testing.assert_close(u.gradient[:, 0], torch.einsum("nd,ndw->nw", normals, gradient))
    along = torch.einsum("nd,ne,ndew->nw", normals, normals, hessian)
    torch.testing.assert_close(u.second[:, 0], along)


def test_first_derivatives_alone_have_no_second_rows() -> None:
    u = Residual()(kfactk.jet(torch.rand(6, 2), second=[]))
    assert u.rows.shape == (6, 3, 1)
    assert u.second.shape == (6, 0, 1)


def test_constants_of_points_have_no_derivatives() -> None:
    points, mu = torch.rand(5, 2), torch.rand(5, 1)
    x = kfactk.jet(points)
    u = torch.cat([x, x.constant(mu)], 1).sin() * x.constant(mu)
    truth = kfactk.jet(points).sin()
    torch.testing.assert_close(u.laplacian[:, :2], truth.laplacian * mu)
    torch.testing.assert_close(u.value[:, 2:], mu.sin() * mu)
    assert not u.gradient[:, :, 2].any()


def test_jets_look_like_tensors_of_points_by_width() -> None:
    x = kfactk.jet(torch.rand(5, 2))
    assert (x.shape, x.size(), x.size(1), x.ndim, x.dim(), len(x)) == ((5, 2), (5, 2), 2, 2, 2, 5)
    assert (x.dtype, x.device.type, x.requires_grad) == (torch.float64, "cpu", False)
    assert x.float().dtype == torch.float32
    assert x.to(torch.float32).second.dtype == torch.float32
    assert nn.Linear(2, 3)(x).requires_grad
    assert not nn.Linear(2, 3)(x).detach().requires_grad
    assert repr(x) == "Jet(shape=[5, 2], first=2, second=1)"


def test_no_points_are_no_rows() -> None:
    assert Residual()(kfactk.jet(torch.rand(0, 2))).laplacian.shape == (0, 1)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


REFUSED: dict[str, tuple[Function, str]] = {
    "relu": (F.relu, "relu has no rule"),
    "abs": (torch.abs, "abs has no rule"),
    "layer_norm": (nn.LayerNorm(2), "layer_norm has no rule"),
    "softmax": (lambda x: x.softmax(-1), "softmax has no rule"),
    "reshape": (lambda x: x.reshape(-1), "reshape has no rule"),
    "transpose": (lambda x: x.T, "T has no rule"),
    "where": (lambda x: torch.where(torch.ones(5, 1) > 0, x, x), "where has no rule"),
    "norm": (lambda x: x.norm(), "norm has no rule"),
    "sum of points": (lambda x: x.sum(0), "sum has no rule"),
    "mean of all": (torch.mean, "mean has no rule"),
    "out": (lambda x: torch.tanh(x, out=torch.ones(5, 2)), "tanh has no rule.*out"),
    "rounding": (lambda x: torch.div(x, 2, rounding_mode="floor"), "div has no rule.*rounding"),
    "a point": (lambda x: x[0], "indexing has no rule"),
    "one column": (lambda x: x[:, 0], r"x\[:, :1\]"),
    "points": (lambda x: x[1:], "indexing has no rule"),
    "a power of jets": (lambda x: x**x, "pow has no rule"),
    "a number to a jet": (lambda x: 2**x, "pow has no rule"),
    "jets by jets": (lambda x: x @ x, "matmul has no rule"),
    "a weight": (lambda x: F.linear(torch.ones(3, 2), x), "linear has no rule"),
    "cat of points": (lambda x: torch.cat([x, x]), "cat has no rule"),
    "cat of a tensor": (lambda x: torch.cat([x, torch.ones(5, 1)], 1), r"x\.constant"),
    "a tensor of points": (lambda x: x * torch.ones(5, 1), "may depend on the points"),
    "a sum with points": (lambda x: torch.ones(5, 2) + x, "may depend on the points"),
    "a list": (lambda x: x * [1, 2], "mul has no rule.*list"),
    "another jet": (lambda x: x + kfactk.jet(torch.ones(5, 2)), "different calls"),
    "another jet in a product": (lambda x: kfactk.jet(torch.ones(5, 2)) * x, "different calls"),
    "another jet in cat": (lambda x: torch.cat([x, kfactk.jet(torch.ones(5, 1))], 1), "calls"),
    "in place": (lambda x: F.silu(x, inplace=True), "silu has no rule.*in place"),
    "dropout": (lambda x: F.dropout(x, 0.5), "dropout has no rule.*in training"),
    "truth": (bool, "bool has no rule"),
    "iteration": (list, "iteration has no rule"),
    "an aten operation": (torch.ops.aten.tanh, "tanh has no rule"),
    "a Function": (Doubled.apply, "gradients is used where they are switched off"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        function(kfactk.jet(torch.rand(5, 2)))


def test_adding_in_place_is_refused() -> None:
    x = kfactk.jet(torch.rand(5, 2))
    with pytest.raises(CaptureError, match=r"write x = x \+ y"):
        x += 1


def test_a_row_of_one_point_may_be_the_point() -> None:
    x, row = kfactk.jet(torch.rand(1, 2)), torch.rand(1, 2)
    with pytest.raises(CaptureError, match="may depend on the points"):
        x * row
    assert (x * nn.Parameter(row)).shape == (1, 2)
    assert (x * row[0]).shape == (1, 2)


@pytest.mark.parametrize("given", [{"directions": [[1.0, 0.0]]}, {"second": [[1.0, 0.0]]}])
def test_a_jet_of_other_derivatives_has_no_laplacian(given: dict[str, Any]) -> None:
    with pytest.raises(CaptureError, match=r"\.second"):
        _ = kfactk.jet(torch.rand(5, 2), **given).laplacian


@pytest.mark.parametrize(
    ("points", "given", "message"),
    [
        (torch.rand(5), {}, r"points \[N, d\]"),
        (torch.ones(5, 2, dtype=torch.long), {}, "floating"),
        ([[1.0]], {}, "list"),
        (torch.rand(5, 2), {"directions": [[1.0]]}, r"give \[m, 2\]"),
        (torch.rand(5, 2), {"directions": torch.ones(4, 1, 2)}, r"\[5, m, 2\]"),
        (torch.rand(5, 2), {"directions": [1.0, 0.0]}, r"give \[m, 2\]"),
        (torch.rand(5, 2), {"second": [1.0, 1.0]}, r"coefficients \[K, 2\]"),
        (torch.rand(5, 2), {"second": [[1.0]]}, r"coefficients \[K, 2\]"),
    ],
)
def test_wrong_shapes_are_refused(points: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kfactk.jet(points, **given)


def test_a_constant_of_another_shape_is_refused() -> None:
    with pytest.raises(OptionError, match=r"\[5, width\]"):
        kfactk.jet(torch.rand(5, 2)).constant(torch.rand(4, 1))


def test_a_jet_of_no_grad_runs_without_gradients() -> None:
    net, points = Residual(), torch.rand(6, 2)
    truth = net(kfactk.jet(points)).laplacian
    with torch.no_grad():
        found = net(kfactk.jet(points)).laplacian
    assert torch.equal(found, truth.detach())
    assert not found.requires_grad
    x = kfactk.jet(points)
    with torch.no_grad(), pytest.raises(CaptureError, match=r"under torch\.no_grad\(\) too"):
        net(x)
    with torch.inference_mode():
        assert torch.equal(net(kfactk.jet(points)).laplacian, found)


def test_checkpointed_parts_give_the_same() -> None:
    net, points = Residual(), torch.rand(6, 2)
    found = []
    for run in (net, lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)):
        loss = run(kfactk.jet(points)).laplacian.square().sum()
        found.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        torch.utils.checkpoint.checkpoint(net, kfactk.jet(points), use_reentrant=True)


def test_wrappers_of_modules_find_the_rows() -> None:
    x = kfactk.jet(torch.rand(5, 2))
    leaves, form = torch.utils._pytree.tree_flatten(({"x": x}, 1))
    assert leaves[0] is x.rows
    back = torch.utils._pytree.tree_unflatten([2 * leaves[0], 1], form)[0]["x"]
    assert torch.equal(back.value, 2 * x.value)
    assert (back + x).shape == (5, 2)
    with pytest.raises(CaptureError, match="vmap divides jets by points"):
        torch.func.vmap(lambda each: each.sin().value)(x)


def test_autocast_keeps_the_derivatives_to_its_precision() -> None:
    net, points = Residual().float(), torch.rand(6, 2, dtype=torch.float32)
    truth = net(kfactk.jet(points))
    with torch.autocast("cpu", torch.bfloat16):
        found = net(kfactk.jet(points))
    torch.testing.assert_close(found.rows.float(), truth.rows, rtol=0.1, atol=0.05)
