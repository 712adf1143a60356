"""What stands for a side that is too wide to be a matrix: its diagonal, blocks, or the identity."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import attrs
from torch import Tensor

from kfactk import Curvature, Layer, Samples, Statistic, Tensors
from kfactk.options import choice, whole
from kfactk.samples import gram
from kfactk.sides import DIAGONALS, block_slices, is_diagonal, side_of
from kfactk_stages.curvature._on_demand import OnDemand

MAX_SIDE = 8192
"""Longest side that is kept whole by default.

While a side of n is decomposed, the factor, its sums and means, old and new eigenvectors and the
solver's own arrays are up to 7 n^2 numbers: 1.9 GB here, and four times that for twice the side. On
an H100 an eigendecomposition is predicted to take 0.7 s, of which half is the latency of n
dependent columns. On one core 13 s were measured for n = 4096, which makes 100 s here.
"""
FORMS = ("diagonal", "blocks", "identity")


@attrs.frozen(kw_only=True)
class WideSides(Curvature):
    """A curvature with factors A and G that are kept whole up to a longest side.

    A subclass gives `sides`, and makes its factors with `moment`. Whatever is longer than
    `max_side` is never formed as a matrix.

    Args:
        max_side: Longest side that is kept whole; `None` for no limit.
        wide: What stands for a longer one: "diagonal", "blocks" or "identity"; `None` for
            "diagonal", of which `bind` warns.
    """

    max_side: int | None = attrs.field(default=MAX_SIDE, validator=whole(optional=True))
    wide: str | None = attrs.field(default=None, validator=choice(None, *FORMS))

    @abc.abstractmethod
    def sides(self, layer: Layer) -> tuple[int, int]:
        """Return d_out and d_in of the layer's matrix."""

    @property
    def asked_for_stand_ins(self) -> bool:
        """Whether the user said what stands for a wide side."""
        return self.wide is not None

    def is_wide(self, n: int) -> bool:
        """Return whether a side of n is not kept whole."""
        return self.max_side is not None and n > self.max_side

    def stand_ins(self, layer: Layer) -> Mapping[str, tuple[str, ...]]:
        """Return what stands for the sides of a layer that are wide."""
        d_out, d_in = self.sides(layer)
        sides = (("A", d_in), ("G", d_out))
        return {side: tuple(self.parts_of(side, n)) for side, n in sides if self.is_wide(n)}

    def parts_of(self, side: str, n: int) -> dict[str, slice]:
        """Return the names of the matrices of a side of n, each with its rows and columns."""
        if not self.is_wide(n):
            return {side: slice(0, n)}
        if self.wide != "blocks":
            return {DIAGONALS[side]: slice(0, n)}
        assert self.max_side is not None
        return {side + number: each for number, each in block_slices(n, self.max_side).items()}

    def moment(
        self, side: str, n: int, parts: Iterable[Tensor], count: Tensor | float
    ) -> dict[str, Statistic]:
        """Return `sum r r^T` over rows, or what stands for it, as the statistics of a wide side.

        Args:
            side: "A" or "G".
            n: Its length.
            parts: The rows, `[..., N, T, n]`.
            count: What the sums are divided by.
        """
        slices, totals = self.parts_of(side, n), dict[str, Tensor]()
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
        return factor.expand(*factor.shape[:-1], d_in if side_of(name) == "A" else d_out)


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
