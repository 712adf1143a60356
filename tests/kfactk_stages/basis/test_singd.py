"""Inverse-free K-FAC: the laws of bases, a loop by hand in float64, and the dense inverses."""

from __future__ import annotations

import copy
import math
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk import DecompositionError, FactorContext, StateError, linalg
from kfactk.testing import BasisLaws
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.basis.singd import Singd

F64 = torch.float64
STRUCTURES = ("dense", "lower", "upper", "diagonal", "blocks")
BLOCK = 2
TAU = 0.05
SIZES = {"A": 5, "G": 3}


class TestSingd(BasisLaws):
    """As the first refresh leaves it."""

    stage = "singd"


class TestSingdLower(BasisLaws):
    """With lower triangular roots."""

    stage = {"name": "singd", "structure": "lower", "momentum": 0.5}  # noqa: RUF012


class TestSingdUpper(BasisLaws):
    """With upper triangular roots."""

    stage = {"name": "singd", "structure": "upper"}  # noqa: RUF012


class TestSingdDiagonal(BasisLaws):
    """With diagonals."""

    stage = {"name": "singd", "structure": "diagonal"}  # noqa: RUF012


class TestSingdBlocks(BasisLaws):
    """With blocks, the last of which is not full."""

    stage = {"name": "singd", "structure": "blocks", "block": 2}  # noqa: RUF012


class TestIngd(BasisLaws):
    """Where each side needs the other."""

    stage = {"name": "singd", "variant": "ingd"}  # noqa: RUF012


class TestIngdBlocks(BasisLaws):
    """Where each side needs the other, with blocks."""

    stage = {"name": "singd", "variant": "ingd", "structure": "blocks", "block": 3}  # noqa: RUF012


def singd(structure: str, **options: Any) -> Singd:
    sized = {"block": BLOCK} if structure == "blocks" else {}
    return Singd(structure=structure, **sized, **options)


def there(structure: str, n: int) -> Tensor:
    """Return the weight of each number of a slope in its structure, and 0 outside of it."""
    weights = {
        "dense": lambda i, j: 1.0,
        "lower": lambda i, j: 1.0 if i == j else 2.0 * (i > j),
        "upper": lambda i, j: 1.0 if i == j else 2.0 * (i < j),
        "diagonal": lambda i, j: float(i == j),
        "blocks": lambda i, j: float(i // BLOCK == j // BLOCK),
    }
    return torch.tensor([[weights[structure](i, j) for j in range(n)] for i in range(n)], dtype=F64)


def whole(root: Tensor, structure: str, n: int) -> Tensor:
    """Return a root `[n, n]`, however it is stored."""
    if structure == "diagonal":
        return torch.diag(root)
    return torch.block_diag(*root)[:n, :n] if structure == "blocks" else root


def moment(n: int, seed: int) -> Tensor:
    rows = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return rows.mT @ rows / (2 * n)


def factors(seed: int, drift: float = 0.0) -> dict[str, Tensor]:
    """Return factors, moved by `drift` towards others."""
    return {
        name: moment(n, seed + n) + drift * moment(n, seed + 50 + n) for name, n in SIZES.items()
    }


def refreshed(
    basis: Singd | KfacInverse,
    matrices: dict[str, Tensor],
    last: dict[str, dict[str, Tensor]] | None = None,
    tau: float = TAU,
) -> dict[str, dict[str, Tensor]]:
    means = {name: linalg.mean_diagonal(matrix) for name, matrix in matrices.items()}
    made = {}
    for name, matrix in matrices.items():
        names = basis.beside.get(name, ())
        context = FactorContext(
            tau,
            means,
            None if last is None else last[name],
            {each: matrices[each] for each in names},
            {} if last is None else {each: last[each] for each in names},
        )
        made[name] = basis.decompose(name, matrix, context)
    return made


def solve(
    basis: Singd | KfacInverse, parts: dict[str, dict[str, Tensor]], tau: float = TAU
) -> Tensor:
    """Return P of a gradient."""
    gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(9), dtype=F64)
    return basis.operator(parts, {}, tau, {}).solve(gradient)


def damped(matrices: dict[str, Tensor], tau: float = TAU) -> dict[str, Tensor]:
    """Return `A / pi + sqrt(tau) I` and `pi G + sqrt(tau) I`."""
    pi = math.sqrt(
        (matrices["A"].trace() / len(matrices["A"])) / (matrices["G"].trace() / len(matrices["G"]))
    )
    return {
        "A": matrices["A"] / pi + math.sqrt(tau) * torch.eye(5, dtype=F64),
        "G": matrices["G"] * pi + math.sqrt(tau) * torch.eye(3, dtype=F64),
    }


def seen(target: Tensor, structure: str) -> Tensor:
    """Return what a structure sees of a matrix."""
    if structure in ("diagonal", "blocks"):
        return target * there(structure, len(target))
    return target


def begun(first: Tensor, structure: str) -> Tensor:
    """Return the exact root of the inverse of what a structure sees."""
    first = seen(first, structure)
    if structure == "lower":
        return torch.linalg.cholesky(torch.linalg.inv(first))
    return torch.linalg.inv(torch.linalg.cholesky(first)).T


def by_hand(
    structure: str, n: int, targets: list[Tensor], step: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Return K and m after a start at the first target."""
    eye, m = torch.eye(n, dtype=F64), torch.zeros(n, n, dtype=F64)
    root = begun(targets[0], structure)
    for target in targets[1:]:
        slope = (root.T @ seen(target, structure) @ root - eye) / 2
        m = momentum * m + there(structure, n) * slope
        root = root @ (eye - step * m)
    return root, m


def ingd_by_hand(
    structure: str, each: list[dict[str, Tensor]], step: float, momentum: float
) -> dict[str, Tensor]:
    """Return K and C after a start at the first factors, both from both at once."""
    roots = {name: begun(target, structure) for name, target in damped(each[0]).items()}
    ms = {name: torch.zeros(n, n, dtype=F64) for name, n in SIZES.items()}
    for matrices in each[1:]:
        inner = {n: r.T @ seen(matrices[n], structure) @ r for n, r in roots.items()}
        gram = {n: r.T @ r for n, r in roots.items()}
        for name, other in (("A", "G"), ("G", "A")):
            size = SIZES[other]
            weighed = inner[name] * inner[other].trace() / size
            weighed = weighed + TAU * gram[name] * gram[other].trace() / size
            slope = (weighed - torch.eye(SIZES[name], dtype=F64)) / 2
            ms[name] = momentum * ms[name] + there(structure, SIZES[name]) * slope
        roots = {n: r @ (torch.eye(len(r), dtype=F64) - step * ms[n]) for n, r in roots.items()}
    return roots


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("step", "momentum"), [(1.0, 0.0), (0.1, 0.6)])
def test_fifty_refreshes_are_the_loop_by_hand(structure: str, step: float, momentum: float) -> None:
    basis = singd(structure, step=step, momentum=momentum)
    each = [factors(1, 0.3 * math.sin(0.3 * k) ** 2) for k in range(51)]
    parts = None
    for matrices in each:
        parts = refreshed(basis, matrices, parts)
    assert parts is not None
    for name, n in SIZES.items():
        targets = [damped(matrices)[name] for matrices in each]
        root, m = by_hand(structure, n, targets, step, momentum)
        found = [whole(parts[name][part], structure, n) for part in ("root", "m")]
        torch.testing.assert_close(found, [root, m], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("step", "momentum"), [(0.3, 0.0), (0.1, 0.6)])
def test_sides_that_need_each_other_are_the_loop_by_hand(
    structure: str, step: float, momentum: float
) -> None:
    basis = singd(structure, variant="ingd", step=step, momentum=momentum, limit=0.99)
    each = [factors(1, 0.3 * math.sin(0.3 * k) ** 2) for k in range(51)]
    parts = None
    for matrices in each:
        parts = refreshed(basis, matrices, parts)
    assert parts is not None
    expected = ingd_by_hand(structure, each, step, momentum)
    for name, n in SIZES.items():
        root = whole(parts[name]["root"], structure, n)
        torch.testing.assert_close(root, expected[name], rtol=1e-9, atol=1e-9)
    gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(9), dtype=F64)
    left, right = (expected[n] @ expected[n].T for n in ("G", "A"))
    torch.testing.assert_close(solve(basis, parts), left @ gradient @ right)


def divergence(left: Tensor, right: Tensor, matrices: dict[str, Tensor]) -> Tensor:
    """Return `tr(F P) - log det P` of `F = A kron G + tau I` and `P = right kron left`."""
    fisher = torch.kron(matrices["A"], matrices["G"])
    fisher = fisher + TAU * torch.eye(len(fisher), dtype=F64)
    inverse = torch.kron(right, left)
    return (fisher * inverse).sum() - torch.linalg.slogdet(inverse).logabsdet


def test_sides_that_need_each_other_end_at_the_closest_product() -> None:
    """Its divergence has no slope there, and is less than that of K-FAC's damped inverses."""
    basis, matrices = Singd(variant="ingd"), factors(1)
    parts = refreshed(basis, factors(2))
    for _ in range(200):
        parts = refreshed(basis, matrices, parts)
    roots = {name: parts[name]["root"] for name in SIZES}
    left, right = ((roots[n] @ roots[n].T).requires_grad_() for n in ("G", "A"))
    least = divergence(left, right, matrices)
    slopes = torch.autograd.grad(least, (left, right))
    assert max(float(each.norm()) for each in slopes) < 1e-9 * float(left.norm())
    kfac = {name: torch.linalg.inv(target) for name, target in damped(matrices).items()}
    assert float(divergence(kfac["G"], kfac["A"], matrices) - least) > 1e-3


@pytest.mark.parametrize("structure", STRUCTURES[:3])
def test_the_fixed_point_is_the_damped_inverse(structure: str) -> None:
    """From factors ten times as small, past the limit, to `(A + ...)^-1` of the factors."""
    basis = Singd(structure=structure)
    matrices = factors(1)
    parts = refreshed(basis, {name: m / 10 for name, m in factors(2).items()})
    start = parts["A"]["root"]
    for _ in range(80):
        parts = refreshed(basis, matrices, parts)
    for name, target in damped(matrices).items():
        root = parts[name]["root"]
        torch.testing.assert_close(root @ root.mT, torch.linalg.inv(target), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(start, parts["A"]["root"], rtol=0.1)
    kfac = KfacInverse()
    expected = solve(kfac, refreshed(kfac, matrices))
    torch.testing.assert_close(solve(basis, parts), expected, rtol=1e-9, atol=1e-9)


def test_a_diagonal_follows_the_diagonals() -> None:
    basis, matrices = Singd(structure="diagonal", step=1.0), factors(1)
    parts = refreshed(basis, factors(2))
    for _ in range(30):
        parts = refreshed(basis, matrices, parts)
    for name, target in damped(matrices).items():
        expected = target.diagonal().reciprocal()
        torch.testing.assert_close(parts[name]["root"].square(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES[:3])
def test_a_whole_step_is_right_to_first_order(structure: str) -> None:
    """After factors moved by eps, one step of size 1 leaves an error of eps squared."""
    basis, errors = Singd(structure=structure, step=1.0), []
    for eps in (1e-2, 1e-3):
        matrices = factors(1, eps)
        parts = refreshed(basis, matrices, refreshed(basis, factors(1)))
        root, target = parts["A"]["root"], damped(matrices)["A"]
        errors.append(float((root @ root.mT - torch.linalg.inv(target)).norm()))
    assert 50 < errors[0] / errors[1] < 200


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("variant", ["ikfac", "ingd"])
def test_a_constant_moves_from_one_factor_to_the_other(structure: str, variant: str) -> None:
    """Neither K-FAC's damping nor that of a whole block sees it, whenever it moves."""
    basis, kept, moved = singd(structure, momentum=0.3, variant=variant), None, None
    for k in range(5):
        matrices = factors(1, 0.2 * k)
        kept = refreshed(basis, matrices, kept)
        c = 10.0**k
        moved = refreshed(basis, {"A": matrices["A"] * c, "G": matrices["G"] / c}, moved)
    assert kept is not None
    assert moved is not None
    torch.testing.assert_close(solve(basis, moved), solve(basis, kept), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("times", [1e6, 1e-6])
@pytest.mark.parametrize("variant", ["ikfac", "ingd"])
def test_a_leap_keeps_the_root_definite(structure: str, times: float, variant: str) -> None:
    """Factors a million times as large would make `I - step m` indefinite; m is shortened.

    What was too long is not kept in m: soon the roots are those of a start at these factors.
    """
    basis = singd(structure, step=0.5, momentum=0.5, variant=variant)
    parts = refreshed(basis, factors(1))
    leapt = {name: m * times for name, m in factors(1).items()}
    near = refreshed(basis, leapt)
    for _ in range(100):
        parts, near = refreshed(basis, leapt, parts), refreshed(basis, leapt, near)
        for name, n in SIZES.items():
            root = whole(parts[name]["root"], structure, n)
            assert float(torch.linalg.eigvalsh(root @ root.mT).min()) > 0
            if structure in ("lower", "upper", "diagonal"):
                assert float(root.diagonal().min()) > 0
    torch.testing.assert_close(solve(basis, parts), solve(basis, near), rtol=1e-3, atol=0.0)


def test_a_shortened_step_has_the_norm_of_the_limit() -> None:
    basis = Singd(structure="diagonal", step=1.0, limit=0.5)
    parts = refreshed(basis, factors(1))
    after = refreshed(basis, {name: 100 * m for name, m in factors(1).items()}, parts)
    shrunk = after["A"]["root"] / parts["A"]["root"]
    assert float(shrunk.min()) == pytest.approx(0.5, abs=1e-12)


def test_a_damping_acts_at_the_next_refresh() -> None:
    basis, matrices = Singd(step=1.0), factors(1)
    parts = refreshed(basis, matrices)
    assert basis.damped_at == "refresh"
    assert torch.equal(solve(basis, parts, 1.0), solve(basis, parts))
    for _ in range(30):
        parts = refreshed(basis, matrices, parts, tau=1.0)
    root = parts["G"]["root"]
    expected = torch.linalg.inv(damped(matrices, 1.0)["G"])
    torch.testing.assert_close(root @ root.mT, expected, rtol=1e-9, atol=1e-9)


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    basis, matrices = Singd(), factors(1)
    parts = refreshed(basis, matrices)
    means = {name: linalg.mean_diagonal(matrix) for name, matrix in matrices.items()}
    bad = matrices["A"].clone()
    bad[0, 0] = math.nan
    with pytest.raises(DecompositionError, match="NaN"):
        basis.decompose("A", bad, FactorContext(TAU, means, parts["A"]))


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "block"},
        {"step": 0.0},
        {"momentum": 1.0},
        {"limit": 1.0},
        {"variant": "kfac"},
        {"block": 0},
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(kfactk.OptionError, match=next(iter(options))):
        kfactk.build(curvature="kfac", basis={"name": "singd", **options}, lr=0.1)


def test_steps_that_would_swing_for_ever_are_refused() -> None:
    with pytest.raises(kfactk.OptionError, match="swings from one side"):
        Singd(variant="ingd", step=1.0)
    assert Singd(variant="ingd", step=1.0, momentum=0.1).step == Singd(step=1.0).step


@attrs.frozen
class Run:
    """A model with its optimizer, on its way."""

    model: torch.nn.Module
    optimizer: kfactk.Optimizer

    def step(self, k: int, *, spoil: bool = False) -> None:
        generator = torch.Generator().manual_seed(k)
        x, y = (torch.randn(8, n, generator=generator, dtype=F64) for n in (4, 2))
        self.optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(self.model(x), y)
        (loss * math.nan if spoil else loss).backward()
        self.optimizer.step()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def run(structure: str, variant: str) -> Run:
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)
    model = torch.nn.Sequential(*layers).double()
    recipe = kfactk.build(
        curvature="kfac",
        basis=singd(structure, momentum=0.5, variant=variant),
        likelihood="gaussian",
        fisher="exact",
        update="sgd",
        lr=0.05,
        factor_every=1,
        basis_every=2,
    )
    return Run(model, recipe.bind(model))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("variant", ["ikfac", "ingd"])
def test_a_resumed_run_goes_on_with_its_roots(structure: str, variant: str) -> None:
    first, second = run(structure, variant), run(structure, variant)
    for k in range(5):
        first.step(k)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    for k in range(5, 10):
        first.step(k)
        second.step(k)
    assert torch.equal(first.weights(), second.weights())


@pytest.mark.filterwarnings("ignore::kfactk.KfactkWarning")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("variant", ["ikfac", "ingd"])
def test_a_bad_batch_leaves_finite_roots_and_the_weights(structure: str, variant: str) -> None:
    found = run(structure, variant)
    for k in range(4):
        found.step(k)
    weights = found.weights()
    found.step(4, spoil=True)
    views = found.optimizer.layers.values()
    roots = [part["root"] for view in views for part in view.decomposition.values()]
    assert torch.equal(found.weights(), weights)
    assert roots
    assert all(bool(each.isfinite().all()) for each in roots)
    found.step(5)
    assert bool(found.weights().isfinite().all())
    assert not torch.equal(found.weights(), weights)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("dense", "lower"), ("dense", "upper"), ("lower", "upper"), ("upper", "lower")],
)
@pytest.mark.parametrize("variant", ["ikfac", "ingd"])
def test_roots_of_another_structure_are_refused(saved: str, loaded: str, variant: str) -> None:
    """They would keep their own structure for ever, under the name of another one."""
    first, second = run(saved, variant), run(loaded, variant)
    for k in range(3):
        first.step(k)
    with pytest.raises(StateError, match=rf"root of layer '0' is not {loaded} triangular"):
        second.optimizer.load_state_dict(first.optimizer.state_dict())


@pytest.mark.parametrize("structure", ["lower", "upper"])
def test_dense_roots_go_on_from_triangular_ones(structure: str) -> None:
    first, second = run(structure, "ikfac"), run("dense", "ikfac")
    first.step(0)
    second.step(0)
    saved = first.optimizer.state_dict()
    second.optimizer.load_state_dict(saved)
    for name, view in second.optimizer.layers.items():
        for side, parts in view.decomposition.items():
            kept = first.optimizer.layers[name].decomposition[side]["root"]
            assert torch.equal(parts["root"], kept)


@pytest.mark.parametrize("part", ["root", "m"])
@pytest.mark.parametrize("fault", ["zero", "cut"])
def test_a_damaged_checkpoint_is_refused(part: str, fault: str) -> None:
    model = nn.Linear(4, 3).to(F64)
    recipe = kfactk.build(curvature="kfac", basis="singd", factor_every=1, basis_every=1)
    optimizer = recipe.bind(model)
    for _ in range(2):
        optimizer.zero_grad()
        x, y = torch.randn(8, 4, dtype=F64), torch.arange(8) % 3
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    entry, key = state["state"][0], f"kfactk.basis.A.{part}"
    entry[key] = torch.zeros_like(entry[key]) if fault == "zero" else entry[key][:2, :2]
    if (part, fault) == ("m", "zero"):
        optimizer.load_state_dict(state)  # that is a direction of no length
        return
    with pytest.raises(kfactk.StateError, match=f"{key} of layer"):
        optimizer.load_state_dict(state)
