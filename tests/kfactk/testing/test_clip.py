"""Laws of clips, put to clips that break them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from kfactk import GradientPair
from kfactk.testing import ClipLaws
from kfactk.testing._support.laws import VARIABLE
from tests.kfactk.testing.broken import caught

ONE = torch.ones(())


@attrs.frozen
class By:
    """A clip that is one function."""

    rule: Callable[[Sequence[GradientPair], Any], Any]

    def clip(self, pairs: Sequence[GradientPair], dot: Any) -> Any:
        return self.rule(pairs, dot)


def given(pairs: Sequence[GradientPair]) -> list[Tensor]:
    return [p.preconditioned for p in pairs]


def times(pairs: Sequence[GradientPair], factor: Tensor) -> tuple[list[Tensor], Tensor]:
    return [p * factor.to(p.dtype) for p in given(pairs)], factor


def norm_of(pairs: Sequence[GradientPair], dot: Any) -> Tensor:
    wide = [p.double() for p in given(pairs)]
    return dot(wide, wide).sum().sqrt() if pairs else torch.zeros(())


def by_norm(pairs: Sequence[GradientPair], dot: Any) -> tuple[list[Tensor], Tensor]:
    """As it ought to be, with the limit 1."""
    return times(pairs, 1 / norm_of(pairs, dot).clamp(min=1.0))


def fisher_length(pairs: Sequence[GradientPair], dot: Any, rates: Sequence[float]) -> Tensor:
    products = [
        dot([p.gradient.double()], [p.preconditioned.double()])[0] * lr**2
        for p, lr in zip(pairs, rates, strict=True)
    ]
    return torch.stack([*products, torch.zeros((), dtype=torch.float64)]).sum()


def modifying(pairs: Sequence[GradientPair], dot: Any) -> tuple[list[Tensor], Tensor]:
    factor = 1 / norm_of(pairs, dot).clamp(min=1.0)
    return [p.mul_(factor) for p in given(pairs)], factor


def by_layer(pairs: Sequence[GradientPair], dot: Any) -> tuple[list[Tensor], Tensor]:
    return [c for p in pairs for c in by_norm([p], dot)[0]], ONE


def unless_it_has_nothing(pairs: Sequence[GradientPair], dot: Any) -> tuple[list[Tensor], Tensor]:
    return by_norm(pairs, dot) if any(p.numel() for p in given(pairs)) else (given(pairs), ONE)


class Adaptive:
    """Halves more every time."""

    def __init__(self) -> None:
        self.factor = 1.0

    def clip(self, pairs: Sequence[GradientPair], dot: Any) -> Any:
        self.factor /= 2
        return times(pairs, torch.tensor(self.factor))


class Norm(ClipLaws):
    """Claims what the norm clip with the limit 1 does."""

    idempotent = keeps_direction = keeps_entries = reaches_bound = True

    def bound(
        self, pairs: Sequence[GradientPair], clipped: Sequence[Tensor]
    ) -> tuple[float, float]:
        return float(torch.cat([c.flatten() for c in clipped]).norm()), 1.0


class Loose(Norm):
    """Does not claim to reach its bound."""

    reaches_bound = False


class Kl(ClipLaws):
    """Claims what the KL clip with the limit 0.01 does."""

    keeps_direction = keeps_entries = reaches_bound = True

    def bound(
        self, pairs: Sequence[GradientPair], clipped: Sequence[Tensor]
    ) -> tuple[float, float]:
        def length(tensors: Sequence[Tensor]) -> float:
            return float(
                sum(p.lr**2 * (p.gradient * x).sum() for p, x in zip(pairs, tensors, strict=True))
            )

        return length(clipped), (0.01 * length(given(pairs))) ** 0.5


def own_rate(pairs: Sequence[GradientPair]) -> list[float]:
    return [pair.lr for pair in pairs]


def by_rates(
    rates: Callable[[Sequence[GradientPair]], Sequence[float]],
    pairs: Sequence[GradientPair],
    dot: Any,
) -> tuple[list[Tensor], Tensor]:
    return times(pairs, 0.1 / fisher_length(pairs, dot, rates(pairs)).sqrt().clamp(min=0.1))


def kl(rates: Callable[[Sequence[GradientPair]], Sequence[float]]) -> By:
    return By(partial(by_rates, rates))


def swap(pairs: Sequence[GradientPair], dot: Any) -> tuple[list[Tensor], Tensor]:
    return [p.flip(0) if p.ndim else p for p in given(pairs)], ONE


BROKEN: dict[str, tuple[type[ClipLaws], Any, str, str]] = {
    "a tensor lost": (
        ClipLaws,
        lambda ps, d: (given(ps)[:1], ONE),
        "gives_one_tensor_for_each_pair",
        "not those of the preconditioned",
    ),
    "flattened": (
        ClipLaws,
        lambda ps, d: ([p.flatten() for p in given(ps)], ONE),
        "gives_one_tensor_for_each_pair",
        "shapes and dtypes",
    ),
    "widened": (
        ClipLaws,
        lambda ps, d: ([p.double() for p in given(ps)], ONE),
        "gives_one_tensor_for_each_pair",
        "torch.float64",
    ),
    "a tuple": (
        ClipLaws,
        lambda ps, d: (tuple(given(ps)), ONE),
        "gives_one_tensor_for_each_pair",
        "come as tuple",
    ),
    "factor on the host": (
        ClipLaws,
        lambda ps, d: (given(ps), 1.0),
        "gives_one_tensor_for_each_pair",
        "factor is a float",
    ),
    "a factor for each": (
        ClipLaws,
        lambda ps, d: (given(ps), torch.ones(len(ps))),
        "gives_one_tensor_for_each_pair",
        "factor has shape",
    ),
    "needs pairs": (
        ClipLaws,
        lambda ps, d: times(ps, torch.stack(given(ps)).sum()),
        "no_pairs",
        "non-empty",
    ),
    "factor 0 of none": (
        ClipLaws,
        lambda ps, d: times(ps, torch.ones(len(ps)).max() if ps else 0 * ONE),
        "no_pairs",
        "in place of 1",
    ),
    "no min(1, .)": (
        ClipLaws,
        lambda ps, d: times(ps, 1 / (norm_of(ps, d) + 1e-30)),
        "never_enlarges",
        "the clip enlarges",
    ),
    "factor above 1": (
        Norm,
        lambda ps, d: times(ps, 1 / (norm_of(ps, d) + 1e-30)),
        "factor_lies_between_zero_and_one",
        "outside (0, 1]",
    ),
    "entries swapped": (Norm, swap, "never_enlarges", "an entry grew or changed its sign"),
    "turned round": (
        Norm,
        lambda ps, d: times(ps, -ONE),
        "never_enlarges",
        "an entry grew or changed its sign",
    ),
    "inf / inf": (
        ClipLaws,
        lambda ps, d: (
            [p * p.abs().max() / p.abs().max().clamp(min=1e-10) for p in given(ps)],
            ONE,
        ),
        "finite_stays_finite",
        "finite input became NaN or inf in tensor",
    ),
    "0 / 0": (
        Norm,
        lambda ps, d: times(
            ps, (1 / norm_of(ps, d)).clamp(max=1.0) * norm_of(ps, d) / norm_of(ps, d)
        ),
        "zero_stays_zero",
        "division by zero",
    ),
    "zero noticed, not told": (
        Norm,
        lambda ps, d: times(
            ps, torch.where(norm_of(ps, d) > 0, 1 / norm_of(ps, d).clamp(min=1.0), 0.0)
        ),
        "zero_stays_zero",
        "the factor is 0.0 in place of 1",
    ),
    "offset": (
        ClipLaws,
        lambda ps, d: ([p + 1e-30 * norm_of(ps, d).bool() for p in given(ps)], ONE),
        "zero_stays_zero",
        "a zero tensor became",
    ),
    "layer by layer": (Norm, by_layer, "bound_is_kept", "the bound 1.0 is exceeded"),
    "always scales": (
        Loose,
        lambda ps, d: times(ps, 1 / (1 + norm_of(ps, d))),
        "bound_is_kept",
        "is within the bound 1.0, and yet the",
    ),
    "told a wrong factor": (
        Norm,
        lambda ps, d: (by_norm(ps, d)[0], 0.5 * ONE),
        "bound_is_kept",
        "and yet the factor is 0.5",
    ),
    "cuts too much": (
        Norm,
        lambda ps, d: by_norm(ps, d) if norm_of(ps, d) <= 1 else times(ps, 0.5 / norm_of(ps, d)),
        "bound_is_kept",
        "more is cut off than the bound 1.0 asks for",
    ),
    "one rate for all groups": (
        Kl,
        kl(lambda ps: [p.lr for p in ps[:1]] * len(ps)).rule,
        "bound_is_kept",
        "bound",
    ),
    "the rate once": (Kl, kl(lambda ps: [p.lr**0.5 for p in ps]).rule, "bound_is_kept", "bound"),
    "the first pair alone": (
        Kl,
        kl(lambda ps: [p.lr * (k == 0) for k, p in enumerate(ps)]).rule,
        "bound_is_kept",
        "exceeded",
    ),
    "scales twice": (
        Norm,
        kl(lambda ps: [p.lr for p in ps]).rule,
        "clipping_twice_is_clipping_once",
        "not idempotent",
    ),
    "by entries": (
        Norm,
        lambda ps, d: ([p.clamp(-1, 1) for p in given(ps)], ONE),
        "direction_is_kept",
        "the direction is not kept",
    ),
    "by the first": (
        ClipLaws,
        lambda ps, d: times(ps, by_norm(ps[:1], d)[1]),
        "order_of_pairs_does_not_matter",
        "order of the pairs matters",
    ),
    "in place": (Norm, modifying, "input_is_left_alone", "the input was modified"),
    "sums of its own": (
        Norm,
        lambda ps, d: by_norm(
            ps, lambda xs, ys: torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)])
        ),
        "sums_go_through_the_given_dot",
        "must be taken with the given dot",
    ),
    "a rank steps out": (
        Norm,
        unless_it_has_nothing,
        "sums_go_through_the_given_dot",
        "wait for each other forever",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_clip_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "thorough")  # as many examples as it takes to find one that fails
    laws, rule, title, says = BROKEN[name]
    law = f"test_{title}"
    found = caught(laws, By(rule), law)
    assert says in found.get(law, "obeyed")
    assert "breaks a law of its family" in found[law]


def test_a_clip_with_memory_is_caught() -> None:
    assert (
        "something else the second time"
        in caught(ClipLaws, Adaptive, "test_input_is_left_alone")["test_input_is_left_alone"]
    )


@pytest.mark.parametrize(("laws", "stage"), [(Norm, By(by_norm)), (Kl, kl(own_rate))])
def test_a_good_clip_obeys(laws: type[ClipLaws], stage: Any) -> None:
    assert caught(laws, stage) == {}


def test_what_is_not_claimed_is_skipped_with_a_reason() -> None:
    made = type("TestPlain", (ClipLaws,), {"stage": By(by_norm)})()
    for name, says in (
        ("test_bound_is_kept", "TestPlain has no `bound`"),
        ("test_clipping_twice_is_clipping_once", "does not claim `idempotent`"),
        ("test_direction_is_kept", "does not claim `keeps_direction`"),
    ):
        with pytest.raises(pytest.skip.Exception, match=says):
            getattr(made, name)()
