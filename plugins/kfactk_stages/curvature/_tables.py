"""Samples of a table of which each position reads one row: only rows that occur cost anything."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk import Statistic
from kfactk.samples import product
from kfactk_stages.curvature._calls import Call, CallSamples, scaled

NEXT_TO_NONE = 1e-12
"""Positions of an example where all are padding: means exist, and others do not notice."""


class TableSamples(CallSamples[Call], abc.ABC):
    """Samples whose inputs are sparse rows `[V]`, so that D has few columns that are not zero."""

    @property
    def entries(self) -> int:
        """How many numbers of its inputs are not zero for an example, at the mean: T by default."""
        return self.positions

    @abc.abstractmethod
    def pair_sums(
        self, rows: slice, left: Tensor | None = None, precision: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the columns of `left^T D_n` that are not zero, of the examples `rows`.

        Returns:
            For each column `index * n + example`, `[U]`, ascending; and the columns, `[U, k_out]`.
        """

    def per_example_gradients(
        self,
        rows: slice = slice(None),
        left: Tensor | None = None,
        *,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Return `left^T D_n` of the examples `rows`, `[n, d, V]`; large where V is."""
        pairs, sums = self.pair_sums(rows, left, precision)
        n = len(range(*rows.indices(self.examples)))
        found = sums.new_zeros(self.d_in * n, sums.shape[-1]).index_copy_(0, pairs, sums)
        return found.view(self.d_in, n, sums.shape[-1]).permute(1, 2, 0)

    def projected_square(
        self, left: Tensor | None, right: Tensor | None, *, precision: torch.dtype | None = None
    ) -> Statistic:
        """Return `sum_n (left^T D_n right)^2`, `[k_out, k_in]`, counted by likelihood terms.

        Where `right` is `None`, gradients of equal examples and indices are added, then the squares
        of equal indices. Rows that do not occur stay zero and cost nothing else.
        """
        if right is not None:
            return super().projected_square(left, right, precision=precision)
        total: Tensor | None = None
        width = self.d_out if left is None else left.shape[-1]
        for rows in self.chunks(self.entries * (2 * self.d_out + 3 * width + 4)):
            pairs, sums = self.pair_sums(rows, left, precision)
            if total is None:
                total = sums.new_zeros(self.d_in, width)
            n = len(range(*rows.indices(self.examples)))
            seen, many = runs(pairs.div(n, rounding_mode="floor"))
            total.index_add_(0, seen, sums_of_runs(sums.square_(), many))
        return Statistic(None if total is None else total.mT, self.num_terms)


@attrs.frozen(eq=False)
class EmbeddingCall:
    """One call of an embedding, examples in dimension 0.

    Args:
        tokens: Indices `[N, T]`.
        gradient: `[N, T, d]`.
        scale: What the gradient is to be multiplied by.
    """

    tokens: Tensor
    gradient: Tensor
    scale: Tensor | float


class EmbeddingSamples(TableSamples[EmbeddingCall]):
    """Samples of all calls of an embedding, joined along T: `a = e_x`, a row of the identity.

    Positions of the padding index have `a = 0` and `g = 0`: their row gets no gradient.

    Args:
        calls: The calls; all of the same number of examples.
        rows: V, the number of rows of the table.
        padding: The padding index; `None` where there is none.
        num_terms, first, chunk_bytes: See `kfactk.Samples`.
    """

    def __init__(
        self,
        calls: Sequence[EmbeddingCall],
        *,
        rows: int,
        padding: int | None,
        num_terms: Tensor | float,
        first: bool,
        chunk_bytes: int,
    ) -> None:
        gradients = [call.gradient for call in calls]
        examples, _, d_out = gradients[0].shape
        super().__init__(
            calls,
            gradients,
            (examples, sum(gradient.shape[1] for gradient in gradients)),
            rows,
            d_out,
            num_terms=num_terms,
            first=first,
            chunk_bytes=chunk_bytes,
        )
        self.padding = padding

    def tokens(self, rows: slice = slice(None)) -> Tensor:
        """Return the indices of the examples `rows`, `[n, T]`."""
        return torch.cat([call.tokens[rows] for call in self.calls], 1).long()

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Return the rows `e_x` of the examples `rows`, `[n, T, V]`; large where V is."""
        return self.input_rotation(torch.eye(self.d_in, dtype=self.dtype, device=self.device))(rows)

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Return the output gradients of the examples `rows`, `[n, T, d]`."""
        parts = [scaled(call.gradient[rows].to(self.dtype), call.scale) for call in self.calls]
        return self._unpadded(parts[0] if len(parts) == 1 else torch.cat(parts, 1), rows)

    def counts(self) -> Statistic:
        """Return `sum_n sum_t e_x`, `[V]`, counted by examples; nothing on later passes.

        It is the diagonal of `input_moment`.
        """
        if not self.first:
            return Statistic(None, 0.0)
        total = torch.zeros(self.d_in, dtype=self.dtype, device=self.device)
        for call in self.calls:
            tokens = call.tokens.flatten().long()
            total.index_add_(0, tokens, total.new_ones(()).expand(len(tokens)))
        if self.padding is not None:
            total[self.padding] = 0
        return Statistic(total, float(self.examples))

    def mean_positions(self) -> Tensor | float:
        """Return how many positions an example has in the mean, without padding; never zero."""
        if self.padding is None or not self.examples:
            return float(max(1, self.positions))
        seen = torch.stack([(call.tokens != self.padding).sum() for call in self.calls])
        return (seen.sum().double() / self.examples).clamp(min=NEXT_TO_NONE)

    def input_rotation(
        self, right: Tensor, precision: torch.dtype | None = None
    ) -> Callable[[slice], Tensor]:
        """Return what looks up rows of `right` for the examples of a slice, `[n, T, k_in]`."""
        right = right.to(precision or self.dtype)

        def looked_up(rows: slice) -> Tensor:
            return self._unpadded(F.embedding(self.tokens(rows), right).to(self.dtype), rows)

        return looked_up

    def pair_sums(
        self, rows: slice, left: Tensor | None = None, precision: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the columns of `left^T D_n` that are not zero, of the examples `rows`."""
        gradients, tokens = self.gradients(rows), self.tokens(rows)
        if left is not None:
            gradients = product(gradients, left, self.dtype, precision)
        example = torch.arange(len(tokens), device=tokens.device).unsqueeze(-1)
        pairs = (tokens * len(tokens) + example).flatten()
        return sums_by_key(pairs, gradients.flatten(0, 1))

    def _unpadded(self, found: Tensor, rows: slice) -> Tensor:
        if self.padding is None:
            return found
        return found.masked_fill((self.tokens(rows) == self.padding).unsqueeze(-1), 0)


def sums_by_key(
    keys: Tensor, gradients: Tensor, rows: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the different keys of entries, ascending, and the sum of their weighted gradients.

    Args:
        keys: The key of each entry, `[E]`.
        gradients: `[R, k]`.
        rows: The gradient of each entry, `[E]`; `None` where there is one for each.
        weights: What it is multiplied by, `[E]`; `None` for 1.

    Example:
        >>> sums_by_key(torch.tensor([7, 3, 7]), torch.tensor([[1.0], [2.0], [4.0]]))
        (tensor([3, 7]), tensor([[2.],
                [5.]]))
    """
    keys, order = keys.sort(stable=True)
    keys, many = runs(keys)
    if weights is not None:
        weights = weights[order]
    return keys, sums_of_runs(gradients, many, order if rows is None else rows[order], weights)


def runs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different ones among sorted values, and how often each occurs.

    On the meta device, where values are not known, all count as different.
    """
    if values.is_meta:
        return values, torch.ones_like(values)
    different, many = torch.unique_consecutive(values, return_counts=True)
    return different, many


def sums_of_runs(
    rows: Tensor, lengths: Tensor, order: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Return the sums of consecutive rows, in the same order on every run.

    Args:
        rows: `[R, k]`.
        lengths: How many rows make each sum, `[S]`.
        order: The order in which rows are taken, of the length that `lengths` add to; `None` for
            all rows as they come.
        weights: What each row that is taken is multiplied by; `None` for 1.

    Example:
        >>> sums_of_runs(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 2]))
        tensor([[1.],
                [6.]])
    """
    order = torch.arange(len(rows), device=rows.device) if order is None else order
    starts = lengths.cumsum(0) - lengths
    return F.embedding_bag(order, rows, starts, mode="sum", per_sample_weights=weights)
