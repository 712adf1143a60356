"""Laws of clips: nothing grows, zero stays zero, and the claims of the class hold."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kfactk.stages import Clip, GradientPair
from kfactk.testing._support.division import InRecipe
from kfactk.testing._support.laws import close, law

Clipped = tuple[list[Tensor], Tensor]
"""What a clip returns: tensors in the order of the pairs, and the factor."""
RATES = (0.0, 1e-4, 0.03, 0.3, 1.0)
SLACK = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
"""Relative error allowed for sums and roundings, by precision."""
MEASURABLE, REACH = 18, 20
"""Powers of ten: up to the first, float32 holds the squares; up to the second, sizes are drawn."""


# Hypothesis examines each strategy once: those that are made once draw faster.
_GROUP_RATES = st.lists(st.sampled_from(RATES), min_size=1, max_size=3)
_DTYPES = st.sampled_from([[dtype] for dtype in SLACK]) | st.just(list(SLACK))
_SEEDS, _PAIRS, _ZERO = (
    st.integers(0, 2**16),
    st.integers(1, 4),
    st.sampled_from([False, False, True]),
)
_SHARES = st.sampled_from([0.0, 0.5, 0.75])
_SHAPES = st.lists(st.integers(1, 3), max_size=3)


@functools.cache
def _exponents(reach: int) -> st.SearchStrategy[int]:
    return st.integers(-2, 2) | st.integers(-reach, reach) | st.sampled_from([-reach, reach])


@st.composite
def clip_pairs(draw: st.DrawFn, reach: int = MEASURABLE) -> list[GradientPair]:
    """Draw pairs of a few tensors, each preconditioned by a positive definite matrix.

    Some are zero. They have the learning rates of up to three groups. For their damping tau there
    is an F with `(F + tau I) p = g`.

    Args:
        draw: Given by Hypothesis.
        reach: Largest power of ten in the size of an entry, in both directions.
    """
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    rates, dtypes, exponents = draw(_GROUP_RATES), draw(_DTYPES), _exponents(reach)
    pairs = []
    for _ in range(draw(_PAIRS)):
        shape = draw(_SHAPES)
        gradient, direction, diagonal = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        direction /= direction.norm()
        product = (diagonal.abs() + 0.1) * gradient + direction * (direction * gradient).sum()
        zero = draw(_ZERO)
        sizes = [0.0 if zero else 10.0 ** draw(exponents) for _ in range(2)]
        dtype = draw(st.sampled_from(dtypes))
        gradient, product = (
            (x / x.abs().max() * size).to(dtype)
            for x, size in zip((gradient, product), sizes, strict=True)
        )
        lr, share = draw(st.sampled_from(rates)), draw(_SHARES)
        pairs.append(GradientPair(gradient, product, lr, share * _largest(gradient, product)))
    return pairs


def _largest(gradient: Tensor, preconditioned: Tensor) -> float:
    """Return the largest damping with which `<g, p> - tau <p, p>` is not negative."""
    g, p = gradient.double().flatten(), preconditioned.double().flatten()
    square = float(p @ p)
    return max(float(g @ p), 0.0) / square if square else 0.0


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Return the inner products pair by pair, in the tensors' own precision."""
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)])


class ClipLaws(InRecipe):
    """Laws of every clip, and of the claims that the members of the class make.

    Example:
        >>> class Halve:
        ...     def clip(self, pairs, dot):
        ...         return [pair.preconditioned / 2 for pair in pairs], torch.tensor(0.5)
        >>> class TestHalve(ClipLaws):
        ...     stage = Halve
        ...     keeps_direction = True
        >>> TestHalve().test_never_enlarges(); TestHalve().test_direction_is_kept()
    """

    family = "clip"
    idempotent: ClassVar[bool] = False
    """Claim: clipping a second time changes nothing."""
    keeps_direction: ClassVar[bool] = False
    """Claim: all tensors are multiplied by one number, the factor."""
    keeps_entries: ClassVar[bool] = False
    """Claim: no entry grows or changes its sign."""
    reaches_bound: ClassVar[bool] = False
    """Claim: what exceeds the bound is reduced to the bound, not below."""

    def bound(
        self, pairs: Sequence[GradientPair], clipped: Sequence[Tensor]
    ) -> tuple[float, float] | None:
        """Return the quantity that the clip bounds, measured on `clipped`, and its bound.

        `None` stands for no bound. A class computes both independently of the stage, for the
        stage's options. Where the preconditioned gradients already keep the bound, the stage must
        not change them.

        Args:
            pairs: What the clip was given, in float64.
            clipped: Clipped or not, in float64.
        """
        return None

    def run(self, pairs: Sequence[GradientPair]) -> Clipped:
        """Clip with the inner products of one process."""
        stage: Clip = self.subject()
        return stage.clip(pairs, dot)

    @law(pairs=clip_pairs(REACH))
    def test_gives_one_tensor_for_each_pair(self, pairs: list[GradientPair]) -> None:
        """Each pair gives one tensor of its shape and dtype, in order; the factor is a scalar."""
        clipped, factor = self.run(pairs)
        assert isinstance(clipped, list), (
            f"the clipped tensors come as {type(clipped).__name__}, not as a list"
        )
        assert isinstance(factor, Tensor), (
            f"the factor is a {type(factor).__name__}, not a tensor, which may stay on the device"
        )
        assert factor.shape == (), f"the factor has shape {tuple(factor.shape)}: make it a scalar"
        wanted = [(tuple(p.preconditioned.shape), p.preconditioned.dtype) for p in pairs]
        found = [(tuple(c.shape), c.dtype) for c in clipped]
        assert found == wanted, (
            f"shapes and dtypes are not those of the preconditioned gradients: {found} for {wanted}"
        )

    @law()
    def test_no_pairs(self) -> None:
        """Without pairs there is nothing to clip: an empty list, and the factor 1."""
        clipped, factor = self.run([])
        assert clipped == [], f"no pairs went in, and {clipped} came out"
        assert float(factor) == 1.0, (
            f"no pairs went in, and the factor is {float(factor)} in place of 1"
        )

    @law(pairs=clip_pairs(REACH))
    def test_never_enlarges(self, pairs: list[GradientPair]) -> None:
        """The norm over all tensors does not grow; nor, if claimed, any entry."""
        clipped, _ = self.run(pairs)
        before, after = _norm(_doubles(pairs)), _norm([c.double() for c in clipped])
        assert after <= before * (1 + _slack(pairs)), (
            f"the clip enlarges: the norm of all preconditioned gradients {before} became {after}"
        )
        if self.keeps_entries:
            for p, c in zip(_doubles(pairs), clipped, strict=True):
                kept = (c.double().abs() <= p.abs()) & (c.double() * p >= 0)
                assert kept.all(), (
                    f"an entry grew or changed its sign: {p.tolist()} became {c.tolist()}"
                )

    @law(pairs=clip_pairs(REACH))
    def test_finite_stays_finite(self, pairs: list[GradientPair]) -> None:
        """Finite input gives finite output, even where squares overflow or vanish."""
        clipped, factor = self.run(pairs)
        for k, c in enumerate(clipped):
            assert torch.isfinite(c).all(), (
                f"finite input became NaN or inf in tensor {k}: {c.tolist()}"
            )
        assert torch.isfinite(factor), f"the factor of finite input is {float(factor)}"

    @law(pairs=clip_pairs(REACH))
    def test_zero_stays_zero(self, pairs: list[GradientPair]) -> None:
        """A zero tensor stays zero, among others and alone; where all are zero, the factor is 1."""
        clipped, _ = self.run(pairs)
        for pair, c in zip(pairs, clipped, strict=True):
            if not pair.preconditioned.any():
                assert torch.equal(c, torch.zeros_like(c)), f"a zero tensor became {c.tolist()}"
        nothing = [
            attrs.evolve(
                p, gradient=torch.zeros_like(p.gradient), preconditioned=torch.zeros_like(c)
            )
            for p, c in zip(pairs, clipped, strict=True)
        ]
        clipped, factor = self.run(nothing)
        for c in clipped:
            assert torch.equal(c, torch.zeros_like(c)), (
                f"all gradients are zero, and one became {c.tolist()}: is there a division by zero?"
            )
        assert float(factor) == 1.0, (
            f"all gradients are zero, and the factor is {float(factor)} in place of 1"
        )

    @law(pairs=clip_pairs())
    def test_factor_lies_between_zero_and_one(self, pairs: list[GradientPair]) -> None:
        """The factor lies in (0, 1] wherever the squares of the input can be represented."""
        _, factor = self.run(pairs)
        assert 0 < float(factor) <= 1, f"the factor is {float(factor)}, outside (0, 1]"

    @law(examples=50, pairs=clip_pairs())
    def test_bound_is_kept(self, pairs: list[GradientPair]) -> None:
        """The bound holds. Gradients within it do not change; the others reach it, if claimed."""
        wide = [
            attrs.evolve(p, gradient=p.gradient.double(), preconditioned=c)
            for p, c in zip(pairs, _doubles(pairs), strict=True)
        ]
        before = self.bound(wide, _doubles(pairs))
        if before is None:
            pytest.skip(f"{type(self).__name__} has no `bound`: {self.label()} claims none")
        clipped, factor = self.run(pairs)
        after = self.bound(wide, [c.double() for c in clipped])
        assert after is not None
        slack, tiny = _slack(pairs), 1e-60
        assert after[0] <= after[1] * (1 + slack) + tiny, (
            f"the bound {after[1]} is exceeded: {after[0]} (before the clip {before[0]})"
        )
        if before[0] <= before[1] * (1 - slack):
            same = all(
                torch.equal(p.preconditioned, c) for p, c in zip(pairs, clipped, strict=True)
            )
            assert same, (
                f"{before[0]} is within the bound {before[1]}, and yet the tensors were changed"
            )
            assert float(factor) == 1.0, (
                f"{before[0]} is within the bound {before[1]}, "
                f"and yet the factor is {float(factor)}"
            )
        elif self.reaches_bound and before[0] > before[1] * (1 + slack):
            assert after[0] >= after[1] * (1 - slack), (
                f"more is cut off than the bound {after[1]} asks for: {before[0]} became {after[0]}"
            )

    @law(pairs=clip_pairs())
    def test_clipping_twice_is_clipping_once(self, pairs: list[GradientPair]) -> None:
        """If claimed: clipping a second time changes nothing, but for rounding."""
        if not self.idempotent:
            pytest.skip(f"{type(self).__name__} does not claim `idempotent`")
        once, _ = self.run(pairs)
        twice, factor = self.run(
            [attrs.evolve(p, preconditioned=c) for p, c in zip(pairs, once, strict=True)]
        )
        _same(
            twice, once, "not idempotent: clipping a second time changes the tensors", _slack(pairs)
        )
        assert float(factor) >= 1 - _slack(pairs), (
            f"not idempotent: the factor of the second time is {float(factor)}"
        )

    @law(pairs=clip_pairs())
    def test_direction_is_kept(self, pairs: list[GradientPair]) -> None:
        """If claimed: every tensor is the preconditioned gradient times the factor."""
        if not self.keeps_direction:
            pytest.skip(f"{type(self).__name__} does not claim `keeps_direction`")
        clipped, factor = self.run(pairs)
        scaled = [p * float(factor) for p in _doubles(pairs)]
        _same(
            clipped,
            scaled,
            "the direction is not kept: the tensors are not the preconditioned gradients times "
            "the factor",
            _slack(pairs),
        )

    @law(pairs=clip_pairs(), data=st.data())
    def test_order_of_pairs_does_not_matter(
        self, pairs: list[GradientPair], data: st.DataObject
    ) -> None:
        """Pairs in another order give the same tensors in that order, and the same factor."""
        order = data.draw(st.permutations(range(len(pairs))), label="order")
        clipped, factor = self.run(pairs)
        moved, moved_factor = self.run([pairs[k] for k in order])
        _same(
            moved,
            [clipped[k] for k in order],
            "the order of the pairs matters to the clipped tensors",
            _slack(pairs),
        )
        _same(
            [moved_factor], [factor], "the order of the pairs matters to the factor", _slack(pairs)
        )

    @law(pairs=clip_pairs(REACH))
    def test_input_is_left_alone(self, pairs: list[GradientPair]) -> None:
        """The pairs are not modified, and the same stage clips them to the same a second time."""
        stage: Clip = self.subject()
        copies = [(p.gradient.clone(), p.preconditioned.clone()) for p in pairs]
        clipped, factor = stage.clip(pairs, dot)
        for pair, (gradient, preconditioned) in zip(pairs, copies, strict=True):
            assert torch.equal(pair.gradient, gradient), (
                f"a gradient was modified: {gradient.tolist()} became {pair.gradient.tolist()}"
            )
            found = pair.preconditioned
            assert torch.equal(found, preconditioned), (
                f"the input was modified: {preconditioned.tolist()} became {found.tolist()}"
            )
        again, again_factor = stage.clip(pairs, dot)
        _same(
            [*again, again_factor],
            [*clipped, factor],
            "the same pairs are clipped to something else the second time",
            0.0,
        )

    @law(pairs=clip_pairs())
    def test_sums_go_through_the_given_dot(self, pairs: list[GradientPair]) -> None:
        """Shards on several ranks are clipped as whole tensors are: only `dot` knows all shards."""
        flat = [
            attrs.evolve(
                p, gradient=p.gradient.flatten(), preconditioned=p.preconditioned.flatten()
            )
            for p in pairs
        ]
        firsts, seconds = _halves(flat)
        whole, factor = self.run(flat)
        (one, one_factor), (other, other_factor) = _on_shards(self.subject(), [firsts, seconds])
        says = (
            "sharded tensors are clipped otherwise than whole ones: sums over elements must be "
            "taken with the given dot"
        )
        _same(
            [torch.cat(halves) for halves in zip(one, other, strict=True)],
            whole,
            says,
            _slack(pairs),
        )
        _same(
            [one_factor, other_factor],
            [factor, factor],
            f"{says}. This is the factor",
            _slack(pairs),
        )


class _DotCalled(BaseException):
    """The clip of a shard needs the inner products over all shards."""

    def __init__(self, products: Tensor) -> None:
        super().__init__()
        self.products = products


def _on_shards(stage: Clip, shards: Sequence[Sequence[GradientPair]]) -> list[Clipped]:
    """Clip every shard; each call of `dot` returns the sum over all shards.

    After each new sum, the clips start again, with all sums so far.
    """
    sums: list[Tensor] = []
    while True:
        outcomes = [_clip_until_dot(stage, shard, sums) for shard in shards]
        products = [outcome for outcome in outcomes if isinstance(outcome, Tensor)]
        done = [outcome for outcome in outcomes if not isinstance(outcome, Tensor)]
        if not products:
            return done
        assert not done, (
            "one shard asks for inner products that another does not: ranks would wait for each "
            "other forever"
        )
        sums.append(torch.stack(products).sum(0))


def _clip_until_dot(
    stage: Clip, shard: Sequence[GradientPair], sums: Sequence[Tensor]
) -> Clipped | Tensor:
    """Return the clipped shard, or its inner products at the first `dot` without a known sum."""
    known = iter(sums)

    def replay(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
        for total in known:
            return total
        raise _DotCalled(dot(xs, ys))

    try:
        return stage.clip(shard, replay)
    except _DotCalled as called:
        return called.products


def _halves(pairs: Sequence[GradientPair]) -> tuple[list[GradientPair], list[GradientPair]]:
    """Return the first and the second half of each pair of flat tensors."""
    firsts: list[GradientPair] = []
    seconds: list[GradientPair] = []
    for p in pairs:
        cut = len(p.gradient) // 2
        for half, rows in ((firsts, slice(cut)), (seconds, slice(cut, None))):
            parts = p.gradient[rows], p.preconditioned[rows]
            half.append(attrs.evolve(p, gradient=parts[0], preconditioned=parts[1]))
    return firsts, seconds


def _doubles(pairs: Sequence[GradientPair]) -> list[Tensor]:
    return [p.preconditioned.double() for p in pairs]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def _slack(pairs: Sequence[GradientPair]) -> float:
    return max(SLACK[p.preconditioned.dtype] for p in pairs)


def _same(found: Sequence[Tensor], expected: Sequence[Tensor], says: str, slack: float) -> None:
    for x, y in zip(found, expected, strict=True):
        close(x.double(), y.double(), says, rtol=slack, atol=2e-38 if slack else 0.0)
