"""Samples of a table that embeddings look up and linear output layers multiply by.

The table W `[V, d]` is the weight of both. In the convention of an embedding, D is `[d, V]`:

    D_n = sum_t g_t e_{x_t}^T + sum_s h_s gamma_s^T

with g the gradient at the output of the embedding, h `[d]` the input of the output layer and gamma
`[V]` the gradient at its output. So the rows of an output layer are those of a linear layer with
the sides exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kfactk import Statistic
from kfactk.samples import CACHED_BYTES, add_squares, product, total_of
from kfactk_stages.curvature._calls import CallSamples, scaled
from kfactk_stages.curvature._rows import LinearRows
from kfactk_stages.curvature._tables import EmbeddingSamples, sums_by_key


class TiedSamples(CallSamples[Any]):
    """Samples of all calls of both kinds, joined along T: first lookups, then output layers.

    A row of an output layer has `a = gamma`, `[V]`, and `g = h`, `[d]`.

    Args:
        lookups: The calls of embeddings; `None` where none was called.
        heads: The calls of output layers; all calls are of the same number of examples.
        sides: Those of D, `(d, V)`.
        num_terms, first, chunk_bytes: See `kfactk.Samples`.
    """

    def __init__(
        self,
        lookups: EmbeddingSamples | None,
        heads: Sequence[LinearRows],
        sides: Sequence[int],
        *,
        num_terms: Tensor | float,
        first: bool,
        chunk_bytes: int,
    ) -> None:
        calls: list[Any] = [*(() if lookups is None else lookups.calls), *heads]
        positions = sum(head.positions for head in heads)
        gradients: list[Tensor] = [call.gradient for call in calls]
        super().__init__(
            calls,
            gradients,
            (len(gradients[0]), positions + (0 if lookups is None else lookups.positions)),
            sides[1],
            sides[0],
            num_terms=num_terms,
            first=first,
            chunk_bytes=chunk_bytes,
        )
        self.lookups, self.heads, self.head_positions = lookups, tuple(heads), positions

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Return `e_x` and gamma of the examples `rows`, `[n, T, V]`; large where V is."""
        parts = [] if self.lookups is None else [self.lookups.inputs(rows).to(self.dtype)]
        return torch.cat([*parts, *(self._gamma(head, rows) for head in self.heads)], 1)

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Return g and h of the examples `rows`, `[n, T, d]`."""
        parts = [] if self.lookups is None else [self.lookups.gradients(rows).to(self.dtype)]
        return torch.cat([*parts, *(self._hidden(head, rows) for head in self.heads)], 1)

    def call_gradients(self) -> Tensor:
        """Return g and sums of gamma, `[N, 1, k]`: those of an example in one row."""
        parts = [] if self.lookups is None else [self.lookups.gradients().to(self.dtype)]
        parts += [folded(head.gradient_view(slice(None))).to(self.dtype) for head in self.heads]
        return torch.cat([part.flatten(1) for part in parts], 1).unsqueeze(1)

    def moments(self) -> tuple[Statistic, Statistic]:
        """Return the diagonal of `sum D^T D` and `sum D D^T`, of positions without correlation.

        They are counted by likelihood terms, and have the same trace:

            sum_t |g|^2 e_x + sum_s |h|^2 gamma^2     [V]
            sum_t g g^T + sum_s |gamma|^2 h h^T       [d, d]
        """
        diagonal = torch.zeros(self.d_in, dtype=self.dtype, device=self.device)
        parts = (
            part
            for rows in self.chunks(self.positions * (2 * self.d_out + 2))
            for part in (*self._lookup_moments(rows, diagonal), *self._head_moments(rows, diagonal))
        )
        whole = total_of(parts)
        return (
            Statistic(None if whole is None else diagonal, self.num_terms),
            Statistic(whole, self.num_terms, symmetric=True),
        )

    def _lookup_moments(self, rows: slice, diagonal: Tensor) -> Iterator[Tensor]:
        """Yield parts of `sum D D^T`, and add to the diagonal of `sum D^T D`."""
        if self.lookups is not None:
            gradients = self.lookups.gradients(rows).to(self.dtype).flatten(0, 1)
            norms = gradients.square().sum(-1, keepdim=True)
            seen, sums = sums_by_key(self.lookups.tokens(rows).flatten(), norms)
            diagonal.index_add_(0, seen, sums.squeeze(-1))
            yield gradients.T @ gradients

    def _head_moments(self, rows: slice, diagonal: Tensor) -> Iterator[Tensor]:
        """Yield parts of `sum D D^T`, and add to the diagonal of `sum D^T D`."""
        for head in self.heads:
            hidden = self._hidden(head, rows).flatten(0, 1)
            weights, norms = hidden.square().sum(-1), hidden.new_zeros(len(hidden))
            for columns in self._slices(len(hidden)):
                squares = self._gamma(head, rows, columns).flatten(0, 1).square()
                norms += squares.sum(-1)
                diagonal[columns] += weights @ squares
            yield (hidden * norms.unsqueeze(-1)).T @ hidden

    def projected_square(
        self, left: Tensor | None, right: Tensor | None, *, precision: torch.dtype | None = None
    ) -> Statistic:
        """Return `sum_n (left^T D_n right)^2`, `[k_out, k_in]`, counted by likelihood terms.

        Both kinds of calls are added before the square, so that it contains their products. Where
        `right` is `None`, that is done for a few columns of D at a time.
        """
        if right is not None:
            return super().projected_square(left, right, precision=precision)
        if not self.heads and self.lookups is not None:
            return self.lookups.projected_square(left, None, precision=precision)
        total: Tensor | None = None
        width = self.d_out if left is None else left.shape[-1]
        for rows in self.chunks(self.positions * (2 * self.d_out + 3 * width + 4)):
            if total is None:
                total = torch.zeros(self.d_in, width, dtype=self.dtype, device=self.device)
            self._add_squares(total, rows, left, precision)
        return Statistic(None if total is None else total.mT, self.num_terms)

    def _add_squares(
        self, total: Tensor, rows: slice, left: Tensor | None, precision: torch.dtype | None
    ) -> None:
        """Add the squares of `left^T D_n` of the examples `rows` to a total `[V, k_out]`."""
        hidden = [self._hidden(head, rows) for head in self.heads]
        if left is not None:
            hidden = [product(each, left, self.dtype, precision) for each in hidden]
        n, width = len(hidden[0]), total.shape[-1]
        slices = list(self._slices(n * (self.head_positions + width)))
        pairs = sums = ends = None
        if self.lookups is not None:
            pairs, sums = self.lookups.pair_sums(rows, left, precision)
            ends = self._ends(pairs, [columns.stop * n for columns in slices])
        start = 0
        for number, columns in enumerate(slices):
            both = zip(self.heads, hidden, strict=True)
            d = total_of(self._gamma(head, rows, columns).mT @ each for head, each in both)
            assert d is not None
            if pairs is not None and sums is not None and ends is not None:
                here = slice(start, ends[number])
                index, example = pairs[here].div(n, rounding_mode="floor"), pairs[here] % n
                place = example * d.shape[1] + index - columns.start
                d.view(-1, width).index_add_(0, place, sums[here].to(self.dtype))
                start = ends[number]
            add_squares(d, total[columns])

    def _ends(self, pairs: Tensor, bounds: Sequence[int]) -> list[int]:
        """Return how many of the sorted pairs lie below each bound."""
        if pairs.is_meta:  # there is one slice
            return [len(pairs)]
        return torch.searchsorted(pairs, torch.tensor(bounds, device=pairs.device)).tolist()

    def _slices(self, numbers_per_column: int) -> Iterator[slice]:
        """Yield slices of the columns of D, so that their numbers fit into `chunk_bytes`.

        On a CPU they stay in its cache.
        """
        most = self.chunk_bytes
        if self.device.type == "cpu":
            most = min(most, CACHED_BYTES)
        step = max(1, most // max(1, numbers_per_column * self.dtype.itemsize))
        step = self.d_in if self.device.type == "meta" else step
        for start in range(0, self.d_in, step):
            yield slice(start, min(start + step, self.d_in))

    def _hidden(self, head: LinearRows, rows: slice) -> Tensor:
        """Return h of some examples, `[n, T, d]`."""
        return head.input_view(rows).to(self.dtype)

    def _gamma(self, head: LinearRows, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Return some columns of gamma of some examples, `[n, T, columns]`."""
        return scaled(head.gradient_view(rows)[..., columns].to(self.dtype), head.scale)


def folded(gradients: Tensor, width: int = 64) -> Tensor:
    """Return sums of every `width`-th column, so that there are no more than `width`.

    Example:
        >>> folded(torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0]]), width=2)
        tensor([[4., 6.]])
    """
    whole = gradients.shape[-1] // width * width
    if not whole:
        return gradients
    return gradients[..., :whole].view(*gradients.shape[:-1], -1, width).sum(-2)
