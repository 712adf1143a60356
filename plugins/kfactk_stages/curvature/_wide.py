"""What stands for a side that is too wide to be a matrix: its diagonal, blocks, or the identity."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import attrs
from torch import Tensor

from kfactk import Curvature, Layer, OptionError, Samples, Statistic, Tensors
from kfactk.options import choice, longest_side
from kfactk.samples import gram
from kfactk.sides import (
    AUTO,
    DIAGONALS,
    SIDES,
    block_slices,
    is_diagonal,
    longest_whole,
    side_of,
)
from kfactk_stages.curvature._on_demand import OnDemand

FORMS = ("diagonal", "blocks", "identity")


@attrs.frozen(kw_only=True)
class WideSides(Curvature):
    """A curvature with factors of two sides that are kept whole up to a longest side.

    The factors are A and G, or L and R. A subclass gives `sides`, and makes its factors with
    `input_sums` and `gradient_sums`, or with `moment`. Whatever is longer than `max_side` is never
    formed as a matrix.

    Args:
        max_side: Longest side that is kept whole; `None` for no limit; "auto" for one that
            follows from the sides of each layer (`kfactk.sides.longest_whole`).
        wide: What stands for a longer one: "diagonal", "blocks" or "identity"; `None` for
            "diagonal", of which `bind` warns.
    """

    max_side: int | str | None = attrs.field(default=AUTO, validator=longest_side())
    wide: str | None = attrs.field(default=None, validator=choice(None, *FORMS))

    def __attrs_post_init__(self) -> None:
        if self.wide is not None and self.max_side is None:
            raise OptionError(
                f"{type(self).__name__}: wide={self.wide!r} is for sides longer than max_side, "
                "and with max_side=None there are none. Leave wide out, or give a max_side."
            )

    @abc.abstractmethod
    def sides(self, layer: Layer) -> tuple[int, int]:
        """Return d_out and d_in of the layer's matrix."""

    @property
    def asked_for_stand_ins(self) -> bool:
        """Whether the user said what stands for a wide side."""
        return self.wide is not None

    def is_wide(self, n: int, other: int) -> bool:
        """Return whether a side of n is not kept whole, where the other side is this long."""
        most = longest_whole(other, self.max_side)
        return most is not None and n > most

    def stand_ins(self, layer: Layer) -> Mapping[str, tuple[str, ...]]:
        """Return what stands for the sides of a layer that are wide."""
        d_out, d_in = self.sides(layer)
        sides = (("A", d_in, d_out), ("G", d_out, d_in))
        return {
            side: tuple(self.parts_of(side, n, other))
            for side, n, other in sides
            if self.is_wide(n, other)
        }

    def parts_of(self, side: str, n: int, other: int) -> dict[str, slice]:
        """Return the names of the matrices of a side of n, each with its rows and columns."""
        if not self.is_wide(n, other):
            return {side: slice(0, n)}
        if self.wide != "blocks":
            return {DIAGONALS[side]: slice(0, n)}
        most = longest_whole(other, self.max_side)
        assert most is not None
        return {side + number: each for number, each in block_slices(n, most).items()}

    def input_sums(
        self,
        samples: Samples,
        whole: Callable[[], Statistic] | None = None,
        rows: Reader | None = None,
    ) -> dict[str, Statistic]:
        """Return sum and count of A, or of what stands for it.

        Args:
            samples: The samples.
            whole: Makes those of A; `None` for the sum over all rows.
            rows: Reads the rows that it sums over; `None` for all.
        """
        if not self.is_wide(samples.d_in, samples.d_out):
            return {"A": (whole or samples.input_moment)()}
        parts = read(samples, rows or samples.inputs, samples.d_in) if samples.first else ()
        count = float(samples.examples * samples.first)
        return self.moment("A", samples.d_in, samples.d_out, parts, count)

    def gradient_sums(
        self,
        samples: Samples,
        whole: Callable[[], Statistic] | None = None,
        rows: Reader | None = None,
        *,
        share: float = 1.0,
    ) -> dict[str, Statistic]:
        """Return sum and count of G, or of what stands for it.

        Args:
            samples: The samples.
            whole: Makes those of G; `None` for the sum over all rows.
            rows: Reads the rows that it sums over; `None` for all.
            share: What the sums are multiplied by.
        """
        if self.is_wide(samples.d_out, samples.d_in):
            parts = read(samples, rows or samples.gradients, samples.d_out)
            found = self.moment("G", samples.d_out, samples.d_in, parts, samples.num_terms)
        else:
            found = {"G": (whole or samples.grad_moment)()}
        return found if share == 1 else {name: each.scaled(share) for name, each in found.items()}

    def moment(
        self, side: str, n: int, other: int, parts: Iterable[Tensor], count: Tensor | float
    ) -> dict[str, Statistic]:
        """Return `sum r r^T` over rows, or what stands for it, as the statistics of a wide side.

        Args:
            side: "A", "G", "L" or "R".
            n: Its length.
            other: The length of the other side.
            parts: The rows, `[..., N, T, n]`.
            count: What the sums are divided by.
        """
        slices, totals = self.parts_of(side, n, other), dict[str, Tensor]()
        for rows in parts:
            for name, columns in slices.items():
                total = self._squares(rows) if is_diagonal(name) else gram(rows[..., columns])
                totals[name] = totals[name].add_(total) if name in totals else total
        return {
            name: Statistic(totals.get(name), count, symmetric=not is_diagonal(name))
            for name in slices
        }

    def _squares(self, rows: Tensor) -> Tensor:
        squares = rows.square().sum((-3, -2))
        return squares.mean(-1, keepdim=True) if self.wide == "identity" else squares

    def assemble(self, layer: Layer, factors: Tensors) -> Tensors:
        """Return the averaged factors, each when it is read; the identity gets its length."""
        return OnDemand(self.makers(layer, factors))

    def makers(self, layer: Layer, factors: Tensors) -> dict[str, Callable[[], Tensor]]:
        """Return what makes a matrix of each factor."""
        return {
            name: partial(self._whole_diagonal, layer, name, factor)
            if is_diagonal(name)
            else partial(_itself, factor)
            for name, factor in factors.items()
        }

    def _whole_diagonal(self, layer: Layer, name: str, factor: Tensor) -> Tensor:
        d_out, d_in = self.sides(layer)
        return factor.expand(*factor.shape[:-1], d_in if SIDES[side_of(name)] == "input" else d_out)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


Reader = Callable[[slice], Tensor]
"""Reads the rows of some examples, `[..., n, T, d]`."""


def read(samples: Samples, rows: Reader, d: int) -> Iterable[Tensor]:
    """Yield the rows of all examples, a chunk at a time.

    Args:
        samples: The samples.
        rows: Reads them.
        d: Their length.
    """
    for each in samples.chunks(samples.positions * d):
        yield rows(each)
