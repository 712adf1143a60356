"""KL-Shampoo: the laws; a loop by hand in float64; the divergence has no slope where it ends."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk import FactorContext, OptionError
from kfactk.testing import BasisLaws
from kfactk_stages.basis.kl import Kl

F64 = torch.float64


class TestKl(BasisLaws):
    """As the first refresh leaves it."""

    stage = "kl"
    curvature: ClassVar[Any] = {"name": "gradient", "vectors": False}  # columns do not turn

    def turned(self, name: str, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        rotation = left if name == "L" else right
        return rotation @ matrix @ rotation.mT


def first(v: Tensor) -> Tensor:
    """Return s."""
    return v.square().mean().sqrt()


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def gradients(count: int, d_out: int, d_in: int) -> list[Tensor]:
    """Draw gradients whose rows and columns are correlated."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, n, generator=generator, dtype=F64) for n in (d_out, d_in))
    draws = torch.randn(count, d_out, d_in, generator=generator, dtype=F64)
    return [1e-3 * left @ each @ right for each in draws]


def by_hand(
    vs: list[Tensor], decay: float, eps: float, every: int = 1
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return S_L, S_R and the steps of a loop, `basis_every=every`, the start faded like a mean."""
    (d_out, d_in), s = vs[0].shape, first(vs[0])
    sides = [s * torch.eye(n, dtype=F64) for n in (d_out, d_in)]
    totals = [torch.zeros(n, n, dtype=F64) for n in (d_out, d_in)]
    weight, refreshes, steps = 0.0, 0, []
    for t, v in enumerate(vs):
        measured = (
            v @ torch.linalg.inv(sides[1]) @ v.T / d_in,
            v.T @ torch.linalg.inv(sides[0]) @ v / d_out,
        )
        weight = decay * weight + 1
        totals = [decay * total + each for total, each in zip(totals, measured, strict=True)]
        if t % every == 0:
            refreshes += 1
            share = decay**refreshes
            means = [total / weight for total in totals]
            size = math.prod(float(mean.trace()) / len(mean) for mean in means)
            last, sides = sides, []
            for mean, other in zip(means, reversed(last), strict=True):
                inverse = torch.linalg.inv(other).trace() / len(other)
                eye = torch.eye(len(mean), dtype=F64)
                sides.append((1 - share) * mean + (share * s + eps * size * inverse) * eye)
        steps.append(power(sides[0], -0.5) @ v @ power(sides[1], -0.5))
    return sides[0], sides[1], steps


@attrs.frozen
class Run:
    """One layer without a bias, on its way."""

    layer: nn.Linear
    optimizer: kfactk.Optimizer

    @classmethod
    def of(cls, d_out: int = 4, d_in: int = 6, dtype: torch.dtype = F64, **recipe: Any) -> Run:
        torch.manual_seed(0)
        layer = nn.Linear(d_in, d_out, bias=False, dtype=dtype)
        given: dict[str, Any] = {
            "curvature": "gradient",
            "basis": {"name": "kl", "fade": 0.9, "eps": 1e-3},
            "update": "sgd",
            "lr": 1.0,
            "factor_decay": 0.9,
            "factor_every": 1,
            "basis_every": 1,
        }
        return cls(layer, kfactk.build(**(given | recipe)).bind(layer))

    def step(self, gradient: Tensor) -> Tensor:
        """Take a step, and return it."""
        before = self.layer.weight.detach().clone()
        self.layer.weight.grad = gradient.to(before.dtype).clone()
        self.optimizer.step()
        return before - self.layer.weight.detach()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_steps_are_the_loop_by_hand(every: int, eps: float) -> None:
    run = Run.of(basis={"name": "kl", "fade": 0.9, "eps": eps}, basis_every=every)
    vs = gradients(30, 4, 6)
    *_, expected = by_hand(vs, 0.9, eps, every)
    for v, step in zip(vs, expected, strict=True):
        torch.testing.assert_close(run.step(v), step, rtol=1e-8, atol=1e-8)


def test_with_the_decay_of_the_mean_it_starts_as_a_mean_that_starts_at_s() -> None:
    """S <- decay S + (1 - decay) V S^-1 V^T / d_in, both sides at once."""
    vs, decay = gradients(30, 4, 6), 0.9
    s = first(vs[0])
    left, right = (s * torch.eye(n, dtype=F64) for n in (4, 6))
    for v in vs:
        left, right = (
            decay * left + (1 - decay) * v @ torch.linalg.inv(right) @ v.T / 6,
            decay * right + (1 - decay) * v.T @ torch.linalg.inv(left) @ v / 4,
        )
    found = by_hand(vs, decay, 0.0)
    torch.testing.assert_close(found[0], left)
    torch.testing.assert_close(found[1], right)


def divergence(left: Tensor, right: Tensor, second: Tensor) -> Tensor:
    """Return `log det S + tr(S^-1 E[v v^T])` of `S = R kron L`."""
    inverse = torch.kron(torch.linalg.inv(right), torch.linalg.inv(left))
    return (inverse * second).sum() - torch.linalg.slogdet(inverse).logabsdet


def test_it_ends_where_the_divergence_has_no_slope() -> None:
    """With the same gradients again and again, each mean half of the last one."""
    vs = gradients(12, 4, 6)
    second = torch.stack([torch.outer(v.T.flatten(), v.T.flatten()) for v in vs]).mean(0)
    basis = Kl(fade=0.0, eps=0.0)
    parts: Any = {}
    means: dict[str, Tensor] = {}
    for _ in range(150):
        sums = {"L": torch.zeros(4, 4, dtype=F64), "R": torch.zeros(6, 6, dtype=F64)}
        for v in vs:
            rows = basis.weighed(parts, v)
            sums["L"] += rows["L"] @ rows["L"].T / len(vs)
            sums["R"] += rows["R"].T @ rows["R"] / len(vs)
        means = {name: (means.get(name, each) + each) / 2 for name, each in sums.items()}
        parts = refreshed(basis, means, parts)
    left, right = (power(parts[n]["root"], -2.0).requires_grad_() for n in ("L", "R"))
    least = divergence(left, right, second)
    slopes = torch.autograd.grad(least, (left, right))
    sizes = [
        float((slope @ side).detach().norm())
        for slope, side in zip(slopes, (left, right), strict=True)
    ]
    assert max(sizes) < 1e-6
    rows, columns = (sum(v @ v.T for v in vs), sum(v.T @ v for v in vs))
    shampoo = divergence(rows / 6, columns / columns.trace() * 6, second)
    assert float((shampoo - least).detach()) > 1e-2


def refreshed(basis: Kl, sides: dict[str, Tensor], last: Any) -> Any:
    found = {}
    for name, matrix in sides.items():
        [other] = basis.beside[name]
        context = FactorContext(
            0.0, {}, last.get(name), {other: sides[other]}, {other: last[other]} if last else {}
        )
        found[name] = basis.decompose(name, matrix, context)
    return found


def test_columns_are_weighed_and_divided_row_by_row() -> None:
    """A vector, and a side that is wider than the curvature takes whole."""
    vs, s = [v[:, 0] for v in gradients(10, 5, 3)], 0.0
    torch.manual_seed(0)
    layer = nn.Linear(3, 5, dtype=F64)
    layer.weight.requires_grad_(False)
    optimizer = kfactk.build(
        curvature="gradient",
        basis={"name": "kl", "fade": 0.9, "eps": 0.0},
        update="sgd",
        lr=1.0,
        factor_decay=0.9,
        factor_every=1,
        basis_every=1,
    ).bind(layer)
    s = first(vs[0])
    left, right = s * torch.ones(5, dtype=F64), s.clone()
    for v in vs:
        left, right = (
            0.9 * left + 0.1 * v.square() / right,
            0.9 * right + 0.1 * (v.square() / left).mean(),
        )
        before = layer.bias.detach().clone()
        layer.bias.grad = v.clone()
        optimizer.step()
        torch.testing.assert_close(before - layer.bias.detach(), v / (left * right).sqrt())


def test_a_wide_side_has_a_diagonal() -> None:
    run = Run.of(
        curvature={"name": "gradient", "max_side": 5, "wide": "diagonal"},
        basis={"name": "kl", "fade": 0.9, "eps": 0.0},
    )
    vs = gradients(10, 4, 6)
    s = first(vs[0])
    left, right = s * torch.eye(4, dtype=F64), s * torch.ones(6, dtype=F64)
    for v in vs:
        left, right = (
            0.9 * left + 0.1 * (v / right) @ v.T / 6,
            0.9 * right + 0.1 * (v * (torch.linalg.inv(left) @ v)).sum(0) / 4,
        )
        expected = power(left, -0.5) @ (v / right.sqrt())
        torch.testing.assert_close(run.step(v), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("c", [1e-8, 1e6])
def test_the_scale_of_gradients_does_not_matter(c: float) -> None:
    one, other = Run.of(), Run.of()
    for v in gradients(10, 4, 6):
        torch.testing.assert_close(one.step(v), other.step(c * v), rtol=1e-7, atol=1e-7)


def test_it_starts_at_the_first_gradient_that_is_not_zero() -> None:
    """As where a factor of the layer is zero at first: no absolute number takes its place."""
    run, vs = (
        Run.of(basis={"name": "kl", "fade": 0.9, "eps": 0.0}, factor_decay=0.0),
        gradients(9, 4, 6),
    )
    run.step(torch.zeros(4, 6))
    assert float(run.step(vs[0]).abs().max()) < 10
    s, v = first(vs[0]), vs[0]
    left = 0.1 * v @ v.T / (6 * s) + 0.9 * s * torch.eye(4, dtype=F64)
    block = run.optimizer.layers[""].block.state.decomposition["L"]
    torch.testing.assert_close(power(block["root"], -2.0), left)
    for v in vs[1:]:
        assert float(run.step(v).abs().max()) < 10


@pytest.mark.filterwarnings("ignore::kfactk.KfactkWarning")
def test_a_bad_gradient_leaves_both_sides_as_they_are() -> None:
    run, vs = Run.of(), gradients(6, 4, 6)
    for v in vs[:3]:
        run.step(v)
    before = run.optimizer.layers[""].block.state.factor_values()
    bad = vs[3].clone()
    bad[0, 0] = math.nan
    run.step(bad)
    after = run.optimizer.layers[""].block.state.factor_values()
    assert all(torch.equal(before[name], after[name]) for name in ("L", "R"))
    assert bool(run.step(vs[4]).isfinite().all())


@pytest.mark.parametrize("lag", [0, 1])
def test_a_resumed_run_goes_on_with_both_sides(lag: int) -> None:
    vs = gradients(12, 4, 6)
    whole, second = (Run.of(basis_every=3, lag=lag) for _ in range(2))
    for v in vs[:5]:
        whole.step(v)
    second.layer.load_state_dict(whole.layer.state_dict())
    second.optimizer.load_state_dict(whole.optimizer.state_dict())
    for v in vs[5:]:
        assert torch.equal(whole.step(v), second.step(v))


def test_a_gradient_that_counts_next_is_divided_by_the_sides_before_it() -> None:
    """The first one makes two refreshes, so that the start fades twice."""
    run = Run.of(
        curvature={"name": "gradient", "counts": "next"},
        basis={"name": "kl", "fade": 0.9, "eps": 0.0},
    )
    vs = gradients(8, 4, 6)
    s, weight = first(vs[0]), 1.0
    assert float(run.step(vs[0]).abs().max()) == 0.0, "the first makes the basis only"
    means = vs[0] @ vs[0].T / s / 6, vs[0].T @ vs[0] / s / 4
    for t, v in enumerate(vs[1:], 2):
        share = 0.9**t
        left, right = (
            (1 - share) * mean + share * s * torch.eye(len(mean), dtype=F64) for mean in means
        )
        expected = power(left, -0.5) @ v @ power(right, -0.5)
        torch.testing.assert_close(run.step(v), expected, rtol=1e-8, atol=1e-8)
        weight = 0.9 * weight + 1
        news = v @ torch.linalg.inv(right) @ v.T / 6, v.T @ torch.linalg.inv(left) @ v / 4
        means = tuple(m + (new - m) / weight for m, new in zip(means, news, strict=True))


def test_half_precision_parameters_have_sides_of_single_precision() -> None:
    half, single = (Run.of(dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    vs = [v.bfloat16() for v in gradients(8, 4, 6)]
    for v in vs:
        half.step(v)
        single.step(v.float())
    found, expected = (
        run.optimizer.layers[""].block.state.factor_values() for run in (half, single)
    )
    for name in ("L", "R"):
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("option", [{"fade": 1.0}, {"eps": -1.0}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(option))}="):
        Kl(**option)
