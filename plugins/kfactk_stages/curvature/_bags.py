"""Samples of an `nn.EmbeddingBag`: the input of a bag is the weighted sum of its rows' units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from kfactk import LayerCall, Statistic
from kfactk.samples import product, working_dtype
from kfactk_stages.curvature._calls import scaled
from kfactk_stages.curvature._tables import TableSamples, runs, sums_by_key, sums_of_runs


@attrs.frozen(eq=False)
class BagCall:
    """One call of an `nn.EmbeddingBag`; a bag is an example.

    Args:
        tokens: The index of each entry, `[E]`.
        bags: The bag of each entry, `[E]`, ascending.
        weights: What its row is multiplied by, `[E]`; zero for padding.
        gradient: `[N, d]`.
        scale: What the gradient is to be multiplied by.
    """

    tokens: Tensor
    bags: Tensor
    weights: Tensor
    gradient: Tensor
    scale: Tensor | float

    @classmethod
    def of(cls, module: nn.EmbeddingBag, call: LayerCall) -> BagCall:
        """Return a call of the module, as inputs `[N, L]`, or `[E]` with offsets."""
        tokens, gradient, given = call.inputs.long(), call.gradient, call.arguments
        bags = _bags(tokens, given)
        tokens = tokens.flatten()
        dtype = working_dtype(gradient.dtype)
        weights = given.get("per_sample_weights")
        if weights is None:
            weights = torch.ones(len(tokens), dtype=dtype, device=tokens.device)
        weights = weights.detach().flatten().to(dtype)
        if module.padding_idx is not None:
            weights = weights.masked_fill(tokens == module.padding_idx, 0)
        if module.mode == "mean":
            sizes = weights.new_zeros(len(gradient)).index_add_(0, bags, weights)
            weights = weights / sizes[bags].clamp(min=1)
        return cls(tokens, bags, weights, gradient, call.scale)

    def entries(self, rows: slice, examples: int) -> slice:
        """Return which entries are in the bags `rows`."""
        start, stop, _ = rows.indices(examples)
        if (start, stop) == (0, examples):
            return slice(None)
        ends = torch.tensor([start, stop], device=self.bags.device)
        return slice(*torch.searchsorted(self.bags, ends).tolist())


def _bags(tokens: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """Return the bag of each entry, `[E]`."""
    places = torch.arange(tokens.numel(), device=tokens.device)
    if tokens.ndim == 2:
        return places.div(max(1, tokens.shape[1]), rounding_mode="floor")
    # An empty bag begins where the next one does: the last of those that begin here has the entry.
    return torch.searchsorted(given["offsets"].long(), places, right=True) - 1


class BagSamples(TableSamples[BagCall]):
    """Samples of all calls of an `nn.EmbeddingBag`, joined along T.

    For a bag of the indices x_i with weights w_i (1 for sums, 1 / size for means)
    `a = sum_i w_i e_{x_i}`.

    Args:
        calls: The calls; all of the same number of bags.
        rows: V, the number of rows of the table.
        num_terms, first, chunk_bytes: See `kfactk.Samples`.
    """

    def __init__(
        self,
        calls: Sequence[BagCall],
        *,
        rows: int,
        num_terms: Tensor | float,
        first: bool,
        chunk_bytes: int,
    ) -> None:
        examples, d_out = calls[0].gradient.shape
        super().__init__(
            calls,
            [call.gradient for call in calls],
            (examples, len(calls)),
            rows,
            d_out,
            num_terms=num_terms,
            first=first,
            chunk_bytes=chunk_bytes,
        )

    @property
    def entries(self) -> int:
        """How many entries an example has, at the mean, and at least T."""
        held = sum(len(call.tokens) for call in self.calls)
        return self.positions + held // max(1, self.examples)

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Return the inputs of the examples `rows`, `[n, T, V]`; large where V is."""
        tokens, places, weights = self._entries(rows)
        n = len(range(*rows.indices(self.examples)))
        found = torch.zeros(
            n * self.positions * self.d_in, dtype=self.dtype, device=self.device
        ).index_add_(0, places * self.d_in + tokens, weights)
        return found.view(n, self.positions, self.d_in)

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Return the output gradients of the examples `rows`, `[n, T, d]`."""
        parts = [scaled(call.gradient[rows].to(self.dtype), call.scale) for call in self.calls]
        return torch.stack(parts, 1)

    def squares(self) -> Statistic:
        """Return `sum_n sum_t a^2`, `[V]`, counted by examples; nothing on later passes.

        It is the diagonal of `input_moment`.
        """
        if not self.first:
            return Statistic(None, 0.0)
        tokens, places, weights = self._entries(slice(None))
        rows = max(1, self.examples * self.positions)
        pairs, sums = sums_by_key(tokens * rows + places, weights.unsqueeze(-1))
        seen, many = runs(pairs.div(rows, rounding_mode="floor"))
        total = torch.zeros(self.d_in, dtype=self.dtype, device=self.device)
        total.index_add_(0, seen, sums_of_runs(sums.square_(), many).squeeze(-1))
        return Statistic(total, float(self.examples))

    def pair_sums(
        self, rows: slice, left: Tensor | None = None, precision: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the columns of `left^T D_n` that are not zero, of the examples `rows`."""
        tokens, places, weights = self._entries(rows)
        gradients = self.gradients(rows)
        if left is not None:
            gradients = product(gradients, left, self.dtype, precision)
        example = places.div(self.positions, rounding_mode="floor")
        pairs = tokens * len(gradients) + example
        return sums_by_key(pairs, gradients.flatten(0, 1), places, weights)

    def _entries(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return index, row `n * T + t` and weight of each entry of the examples `rows`."""
        start, parts = rows.indices(self.examples)[0], []
        for number, call in enumerate(self.calls):
            within = call.entries(rows, self.examples)
            places = (call.bags[within] - start) * self.positions + number
            parts.append((call.tokens[within], places, call.weights[within].to(self.dtype)))
        tokens, places, weights = (torch.cat(each) for each in zip(*parts, strict=True))
        return tokens, places, weights
