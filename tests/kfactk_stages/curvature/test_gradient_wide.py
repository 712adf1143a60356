"""Wide sides of gradients: truth is the same method on whole matrices that are masked, densely."""

from __future__ import annotations

import functools
import io
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import kfactk
from kfactk.sides import block_slices
from kfactk.testing import GradientCurvatureLaws
from kfactk.testing._support.ranks import shared_workers
from kfactk_stages.curvature.gradient import Gradient

F64 = torch.float64
FORMS = ("diagonal", "blocks", "identity")
MOST, D_OUT, D_IN, BETA = 3, 7, 5, 0.9
SHAMPOO, SOAP, KL = ({"name": name} for name in ("shampoo", "soap", "kl"))


class TestGradientOfBlocks(GradientCurvatureLaws):
    stage: ClassVar[Any] = {"name": "gradient", "max_side": 3, "wide": "blocks"}


class TestGradientOfDiagonals(GradientCurvatureLaws):
    stage: ClassVar[Any] = {"name": "gradient", "max_side": 3, "wide": "diagonal"}


class TestGradientOfIdentities(GradientCurvatureLaws):
    stage: ClassVar[Any] = {"name": "gradient", "max_side": 3, "wide": "identity"}


def gradients(count: int = 8, shape: tuple[int, ...] = (D_OUT, D_IN)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.randn(n, n, generator=generator, dtype=F64) for n in (shape[-2], shape[-1])
    )
    return [left @ torch.randn(shape, generator=generator, dtype=F64) @ right for _ in range(count)]


def masked(matrix: Tensor, wide: str, most: int | None = MOST) -> Tensor:
    """Return what stands for a whole matrix, as a whole matrix."""
    n = len(matrix)
    if most is None or n <= most:
        return matrix
    if wide == "identity":
        return torch.eye(n, dtype=F64) * matrix.diagonal().mean()
    block = torch.arange(n)
    if wide == "blocks":
        for number, each in block_slices(n, most).items():
            block[each] = int(number)
    return torch.where(block[:, None] == block, matrix, 0.0)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def curvature(wide: str, most: int | None = MOST, **options: Any) -> dict[str, Any]:
    return {"name": "gradient", "max_side": most, "wide": wide, **options}


BLOCKS = curvature("blocks")


def bound(module: nn.Module, **recipe: Any) -> kfactk.Optimizer:
    given: dict[str, Any] = {
        "update": "sgd",
        "lr": 1.0,
        "factor_decay": BETA,
        "factor_every": 1,
        "scale_every": 1,
        "basis_every": 1,
    }
    return kfactk.build(**(given | recipe)).bind(module)


def step(layer: nn.Linear, optimizer: Any, gradient: Tensor) -> Tensor:
    before = layer.weight.detach().clone()
    layer.weight.grad = gradient.clone()
    optimizer.step()
    return before - layer.weight.detach()


def linear(d_out: int = D_OUT, d_in: int = D_IN) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=False, dtype=F64)


@pytest.mark.parametrize("wide", FORMS)
def test_steps_of_shampoo_are_dense_algebra_on_the_masked_moments(wide: str) -> None:
    layer = linear()
    optimizer = bound(layer, curvature=curvature(wide), basis={**SHAMPOO, "eps": 0.0})
    sums = [torch.zeros(n, n, dtype=F64) for n in (D_OUT, D_IN)]
    weight = 0.0
    for v in gradients():
        weight = BETA * weight + 1
        sums = [BETA * s + m for s, m in zip(sums, (v @ v.T, v.T @ v), strict=True)]
        found = step(layer, optimizer, v)
        left, right = (masked(s / weight, wide) for s in sums)
        floor = 1e-6  # rank: each block sees all rows or columns, and has its full rank at once
        assert float(torch.linalg.eigvalsh(left)[0]) > floor
        expected = power(left, -0.25) @ v @ power(right, -0.25)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        vector = torch.randn(D_OUT, D_IN, dtype=F64)
        product = optimizer.layers[""].fisher_product({"weight": vector})["weight"]
        torch.testing.assert_close(product, power(left, 0.5) @ vector @ power(right, 0.5))
    operator = optimizer.layers[""].block.operator()
    values = [torch.linalg.eigvalsh(m) for m in (left, right)]
    ratio = float((values[0][-1] / values[0][0] * values[1][-1] / values[1][0]).sqrt())
    assert float(operator.condition()) == pytest.approx(ratio)


def test_eps_of_shampoo_is_a_share_of_the_largest_eigenvalue_of_each_block() -> None:
    layer, eps = linear(), 0.1
    optimizer = bound(layer, curvature=BLOCKS, basis={**SHAMPOO, "eps": eps})
    [v] = gradients(1)

    def damped(matrix: Tensor) -> Tensor:
        parts = [matrix[s, s] for s in block_slices(len(matrix), MOST).values()]
        eyes = [torch.eye(len(m), dtype=F64) * torch.linalg.eigvalsh(m)[-1] for m in parts]
        return torch.block_diag(*(m + eps * e for m, e in zip(parts, eyes, strict=True)))

    expected = power(damped(v @ v.T), -0.25) @ v @ power(damped(v.T @ v), -0.25)
    torch.testing.assert_close(step(layer, optimizer, v), expected)


def test_one_blocked_side_is_shampoo_of_row_blocks() -> None:
    """With R of all rows, a row block has the L of Shampoo on that block alone."""
    layer = linear(6, 3)
    optimizer = bound(layer, curvature=BLOCKS, basis={**SHAMPOO, "eps": 0.0})
    for v in gradients(1, (6, 3)):
        found, right = step(layer, optimizer, v), power(v.T @ v, -0.25)
        for where in (slice(0, 3), slice(3, 6)):
            rows = v[where]
            expected = power(rows @ rows.T, -0.25) @ rows @ right
            torch.testing.assert_close(found[where], expected)


def soap_by_hand(
    vs: list[Tensor], wide: str, *, iterate: bool, decay: float = 0.95, eps: float = 1e-8
) -> list[Tensor]:
    """Return the steps of SOAP with masked moments, each gradient measured after its own step."""
    sums, weight = [torch.zeros(n, n, dtype=F64) for n in (D_OUT, D_IN)], 0.0
    last: list[Tensor] | None = None
    square, terms, steps = torch.zeros(D_OUT, D_IN, dtype=F64), 0.0, []
    for t, v in enumerate(vs):
        weight = BETA * weight + 1
        sums = [BETA * s + m for s, m in zip(sums, (v @ v.T, v.T @ v), strict=True)]
        moments = [masked(s / weight, wide) for s in sums]
        if last is None or not iterate:
            turn = [_directions(m) for m in moments]
            if last is not None:
                square = carried(square, last, turn)
        else:
            turn = [_followed(m, u) for m, u in zip(moments, last, strict=True)]
        last = turn
        inside = turn[0].T @ v @ turn[1]
        if t == 0 and wide == "blocks":
            s = v.square().mean()  # the first gradient has made the basis
            steps.append(turn[0] @ (inside / (s + eps**2).sqrt()) @ turn[1].T)
        terms = decay * terms + 1
        square = decay * square + inside.square()
        if t or wide != "blocks":
            s = square / terms
            steps.append(turn[0] @ (inside / (s + eps**2).sqrt()) @ turn[1].T)
    return steps


def carried(square: Tensor, old: list[Tensor], new: list[Tensor]) -> Tensor:
    left, right = ((u.T @ w).square() for u, w in zip(old, new, strict=True))
    return left.T @ square @ right


def _parts(matrix: Tensor) -> list[slice]:
    n = len(matrix)
    if (matrix == matrix.diagonal().diag()).all():
        return [slice(i, i + 1) for i in range(n)]
    return list(block_slices(n, MOST).values())


def _directions(matrix: Tensor) -> Tensor:
    """Return eigenvectors, those of each block in the columns of the block."""
    found = [torch.linalg.eigh(matrix[s, s])[1] for s in _parts(matrix)]
    return torch.block_diag(*found)


def _followed(matrix: Tensor, u: Tensor) -> Tensor:
    """Return one step of orthogonal iteration, block by block, from the largest to the smallest."""
    found = []
    for s in _parts(matrix):
        m, q = matrix[s, s], u[s, s]
        order = (q.T @ m @ q).diagonal().argsort(descending=True)
        new, r = torch.linalg.qr(m @ q[:, order])
        new = new * r.diagonal().sign()
        back = torch.empty_like(new)
        back[:, order] = new
        found.append(back)
    return torch.block_diag(*found)


@pytest.mark.parametrize("wide", FORMS)
@pytest.mark.parametrize("refresh", ["eigh", "iterate"])
def test_steps_of_soap_are_a_loop_by_hand(wide: str, refresh: str) -> None:
    layer, vs = linear(), gradients()
    optimizer = bound(layer, curvature=curvature(wide), basis={**SOAP, "refresh": refresh})
    expected = soap_by_hand(vs, wide, iterate=refresh == "iterate")
    for v, each in zip(vs, expected, strict=True):
        torch.testing.assert_close(step(layer, optimizer, v), each, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("wide", FORMS)
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_steps_of_kl_are_a_loop_by_hand(wide: str, eps: float) -> None:
    layer, vs = linear(), gradients(12)
    basis = {**KL, "fade": BETA, "eps": eps}
    optimizer = bound(layer, curvature=curvature(wide), basis=basis)
    s = vs[0].square().mean().sqrt()
    sides = [s * torch.eye(n, dtype=F64) for n in (D_OUT, D_IN)]
    sums, weight = [torch.zeros(n, n, dtype=F64) for n in (D_OUT, D_IN)], 0.0
    for t, v in enumerate(vs):
        measured = (
            v @ torch.linalg.inv(sides[1]) @ v.T / D_IN,
            v.T @ torch.linalg.inv(sides[0]) @ v / D_OUT,
        )
        weight = BETA * weight + 1
        sums = [BETA * a + m for a, m in zip(sums, measured, strict=True)]
        means, share = [masked(a / weight, wide) for a in sums], BETA ** (t + 1)
        size = float(means[0].trace() / D_OUT * means[1].trace() / D_IN)
        last, sides = sides, []
        for mean, other in zip(means, reversed(last), strict=True):
            inverse = torch.linalg.inv(other).trace() / len(other)
            eye = torch.eye(len(mean), dtype=F64)
            sides.append((1 - share) * mean + (share * s + eps * size * inverse) * eye)
        expected = power(sides[0], -0.5) @ v @ power(sides[1], -0.5)
        found = step(layer, optimizer, v)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    vector = torch.randn(D_OUT, D_IN, dtype=F64)
    product = optimizer.layers[""].fisher_product({"weight": vector})["weight"]
    torch.testing.assert_close(product, means[0] @ vector @ means[1])


@pytest.mark.parametrize("wide", FORMS)
def test_bases_of_kfac_take_the_masked_product(wide: str) -> None:
    layer, tau = linear(), 0.03
    optimizer = bound(layer, curvature=curvature(wide), basis="kfac", damping=tau, clip="none")
    [v] = gradients(1)
    left, right = masked(v @ v.T, wide), masked(v.T @ v, wide)
    a, g = right / right.trace().sqrt(), left / left.trace().sqrt()
    torch.testing.assert_close((a.trace() * g.trace()), v.square().sum())
    pi = ((a.trace() / D_IN) / (g.trace() / D_OUT)).sqrt()
    eye_a, eye_g = (torch.eye(n, dtype=F64) for n in (D_IN, D_OUT))
    half = torch.linalg.inv(g + tau**0.5 / pi * eye_g) @ v
    expected = half @ torch.linalg.inv(a + pi * tau**0.5 * eye_a)
    torch.testing.assert_close(step(layer, optimizer, v), expected)


@pytest.mark.parametrize("power_", [1.0, 0.5])
def test_newton_muon_divides_by_the_blocks_of_the_input_side(power_: float) -> None:
    layer, ridge = linear(), 0.01
    basis = {"name": "newton_muon", "steps": 0, "power": power_, "ridge": ridge, "scale": "none"}
    optimizer = bound(layer, curvature=BLOCKS, basis=basis)
    [v] = gradients(1)
    a = masked(v.T @ v, "blocks")
    a = a / (a.trace() / D_IN) + ridge * torch.eye(D_IN, dtype=F64)
    u, _, w = torch.linalg.svd(v @ power(a, -power_), full_matrices=False)
    torch.testing.assert_close(step(layer, optimizer, v), u @ w)


def test_a_basis_of_whole_matrices_is_refused_with_the_remedy() -> None:
    with pytest.raises(kfactk.CombinationError, match=r"whole matrices.*'soap', 'shampoo' or"):
        bound(linear(), curvature=BLOCKS, basis="singd")


@pytest.mark.parametrize("basis", ["shampoo", "soap", "kl"])
def test_groups_have_blocks_of_their_own(basis: str) -> None:
    """Stacked matrices do what each does alone."""

    class Stacked(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

    vs = gradients(5, (2, D_OUT, D_IN))
    stacked = Stacked(torch.zeros(2, D_OUT, D_IN, dtype=F64))
    alone = [Stacked(torch.zeros(D_OUT, D_IN, dtype=F64)) for _ in range(2)]
    modules = [stacked, *alone]
    made = [
        bound(m, curvature=curvature("blocks", dims="batch"), basis=basis, scale_every=1)
        for m in modules
    ]
    for v in vs:
        for module, optimizer, each in zip(modules, made, (v, *v), strict=True):
            module.weight.grad = each.clone()
            optimizer.step()
    expected = torch.stack([each.weight.detach() for each in alone])
    torch.testing.assert_close(stacked.weight.detach(), expected, rtol=1e-8, atol=1e-9)


def test_bind_warns_until_the_recipe_says_what_stands_for_a_wide_side() -> None:
    with pytest.warns(kfactk.KfactkWarning, match=r"output side 7: diagonal.*'wide': 'diagonal'"):
        bound(linear(), curvature={"name": "gradient", "max_side": 5}, basis="soap")


@pytest.mark.parametrize("basis", ["soap", "shampoo", "kl", "kfac"])
@pytest.mark.parametrize(
    ("wide", "words"),
    [
        ("diagonal", ("input side 5: diagonal", "output side 7: diagonal")),
        ("blocks", ("input side 5: 2 blocks", "output side 7: 3 blocks")),
        ("identity", ("input side 5: identity", "output side 7: identity")),
    ],
)
def test_the_coverage_tells_what_stands_for_wide_sides(
    wide: str, words: tuple[str, ...], basis: str
) -> None:
    recipe = kfactk.build(curvature=curvature(wide), basis=basis, update="sgd")
    weight, bias = recipe.coverage(nn.Linear(D_IN, D_OUT))
    assert weight.wide == words
    assert bias.wide == (("output side 7: diagonal",) if basis == "kfac" else ())


def test_wide_without_a_limit_is_refused() -> None:
    with pytest.raises(kfactk.OptionError, match="wide='blocks' is for sides longer"):
        Gradient(max_side=None, wide="blocks")


def test_the_kronecker_factor_of_a_wide_vector_is_a_diagonal() -> None:
    torch.manual_seed(0)
    module = nn.LayerNorm(9, bias=False, dtype=F64)
    optimizer = bound(module, curvature=BLOCKS, basis="kfac", damping=0.02, clip="none")
    before, v = module.weight.detach().clone(), torch.randn(9, dtype=F64)
    module.weight.grad = v.clone()
    optimizer.step()
    g, a = v.square() / v.norm(), v.norm()
    pi = (a / g.mean()).sqrt()
    expected = v / (g + 0.02**0.5 / pi) / (a + 0.02**0.5 * pi)
    torch.testing.assert_close(before - module.weight.detach(), expected)


@pytest.mark.parametrize("wide", FORMS)
@pytest.mark.parametrize("basis", ["soap", "shampoo", "kl"])
@pytest.mark.parametrize("moment", [None, 0.9])
def test_a_resumed_run_goes_on_bit_for_bit(basis: str, wide: str, moment: float | None) -> None:
    vs = gradients(9)
    layers = [linear(), linear()]
    recipe = {"curvature": curvature(wide), "basis": basis, "basis_every": 2}
    recipe |= {} if moment is None else {"first_moment": moment}
    whole, second = (bound(layer, **recipe) for layer in layers)
    for v in vs[:4]:
        step(layers[0], whole, v)
    layers[1].load_state_dict(layers[0].state_dict())
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    for v in vs[4:]:
        assert torch.equal(step(layers[0], whole, v), step(layers[1], second, v))


def test_soap_averages_in_its_coordinates_what_others_average_outside() -> None:
    """A first moment in block coordinates is that of gradients, turned."""
    layer, vs = linear(), gradients()
    optimizer = bound(layer, curvature=BLOCKS, basis={**SOAP, "refresh": "eigh"}, first_moment=0.9)
    m = torch.zeros(D_OUT, D_IN, dtype=F64)
    for t, v in enumerate(vs, 1):
        found = step(layer, optimizer, v)
        m = 0.9 * m + 0.1 * v
        state = optimizer.layers[""].block.state
        parts, s = state.decomposition, state.moment_values().get("square")
        u, w = (
            torch.block_diag(*(parts[n]["eigenvectors"] for n in sorted(parts) if n[0] == side))
            for side in ("L", "R")
        )
        if t > 1:
            assert s is not None
            inside = u.T @ (m / (1 - 0.9**t)) @ w
            torch.testing.assert_close(found, u @ (inside / (s + 1e-16).sqrt()) @ w.T)


RECIPES: dict[str, dict[str, Any]] = {
    f"{basis} {wide}": {"curvature": curvature(wide), "basis": basis}
    for basis in ("soap", "shampoo", "kl", "kfac")
    for wide in FORMS
}


def trained(rank: int, placement: str) -> dict[str, list[Tensor]]:
    """Return parameters after training on a rank's part of each batch, by recipe."""
    ranks, found = dist.get_world_size() if dist.is_initialized() else 1, {}
    for name, recipe in RECIPES.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 9)).double()
        damping = {"damping": 0.02} if recipe["basis"] == "kfac" else {}
        optimizer = bound(model, **recipe, **damping, lr=0.05, basis_every=2, placement=placement)
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(8, 6, generator=generator, dtype=F64)[rank::ranks]
            y = torch.randint(9, (8,), generator=generator)[rank::ranks]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            for parameter in model.parameters() if ranks > 1 else ():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
            optimizer.step()
        found[name] = [parameter.detach().clone() for parameter in model.parameters()]
    return found


@functools.cache
def truth() -> dict[str, list[Tensor]]:
    return trained(0, "replicated")


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("placement", ["replicated", "comm_opt", "mem_opt"])
def test_two_ranks_do_what_one_process_does(placement: str) -> None:
    one, other = shared_workers().run(2, trained, placement)
    for name, expected in truth().items():
        for mine, theirs, alone in zip(one[name], other[name], expected, strict=True):
            assert torch.equal(mine, theirs), name
            torch.testing.assert_close(mine, alone, rtol=1e-7, atol=1e-9, msg=name)
