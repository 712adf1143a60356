"""Samples of a layer that holds several matrices, each with rows of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk import LayerCall, Statistic
from kfactk_stages.curvature._calls import CallSamples
from kfactk_stages.curvature._rows import JoinedSamples, LinearRows

Sums = Callable[[JoinedSamples], Mapping[str, Statistic]]
"""Makes sums and counts, by name."""


class GroupedSamples(CallSamples[LayerCall]):
    """Samples of several products with inputs of their own: queries, keys and values, or experts.

    Groups may differ in T. Rows that a group lacks are zeros.

    Args:
        groups: The samples of each, of the same examples.
        calls: Their calls.
    """

    def __init__(self, groups: Sequence[JoinedSamples], calls: Sequence[LayerCall]) -> None:
        one = groups[0]
        super().__init__(
            calls,
            [tensor for call in calls for tensor in (call.inputs, call.gradient)],
            (len(groups), one.examples, max(group.positions for group in groups)),
            one.d_in,
            one.d_out,
            num_terms=one.num_terms if one.first else 0.0,
            first=one.first,
            chunk_bytes=one.chunk_bytes,
        )
        self.parts = tuple(groups)

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Return the inputs of the examples `rows`, `[groups, n, T, d_in]`."""
        return self._stacked(lambda group: group.inputs(rows))

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Return the gradients of the examples `rows`, `[groups, n, T, d_out]`."""
        return self._stacked(lambda group: group.gradients(rows))

    def input_moment(self) -> Statistic:
        """Return `sum_n sum_t a a^T` of each, `[groups, d_in, d_in]`."""
        return self.of_inputs(lambda group: {"A": group.input_moment()})["A"]

    def grad_moment(self) -> Statistic:
        """Return `sum_n sum_t g g^T` of each, `[groups, d_out, d_out]`."""
        return self._joined([group.grad_moment() for group in self.parts])

    def of_inputs(self, sums: Sums) -> dict[str, Statistic]:
        """Return sums of the inputs of each group, stacked; they are made once for the same inputs.

        Args:
            sums: Makes those of one.
        """
        keys = [tuple(id(call.inputs) for call in group.calls) for group in self.parts]
        found: dict[tuple[int, ...], Mapping[str, Statistic]] = {}
        for key, group in zip(keys, self.parts, strict=True):
            if key not in found:
                found[key] = sums(group)
        return self._stacked_sums([found[key] for key in keys])

    def of_gradients(self, sums: Sums) -> dict[str, Statistic]:
        """Return sums of the gradients of each group, stacked.

        Args:
            sums: Makes those of one.
        """
        return self._stacked_sums([sums(group) for group in self.parts])

    def per_example_gradients(
        self,
        rows: slice = slice(None),
        left: Tensor | None = None,
        *,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Return `left^T D_n` of the examples `rows`, `[groups, n, d_out, d_in]`."""
        lefts = _each(left, len(self.parts))
        found = [
            group.per_example_gradients(rows, one, precision=precision)
            for group, one in zip(self.parts, lefts, strict=True)
        ]
        return torch.stack(found)

    def projected_square(
        self, left: Tensor | None, right: Tensor | None, *, precision: torch.dtype | None = None
    ) -> Statistic:
        """Return `sum_n (left^T D_n right)^2` of each, `[groups, k_out, k_in]`."""
        sides = zip(self.parts, *(_each(s, len(self.parts)) for s in (left, right)), strict=True)
        return self._joined(
            [group.projected_square(one, other, precision=precision) for group, one, other in sides]
        )

    def _stacked(self, read: Callable[[JoinedSamples], Tensor]) -> Tensor:
        found = (read(group) for group in self.parts)
        return torch.stack([F.pad(x, (0, 0, 0, self.positions - x.shape[-2])) for x in found])

    def _stacked_sums(self, each: Sequence[Mapping[str, Statistic]]) -> dict[str, Statistic]:
        return {name: self._joined([one[name] for one in each]) for name in each[0]}

    def _joined(self, each: Sequence[Statistic]) -> Statistic:
        totals = [one.total for one in each]
        count, symmetric = each[0].count, each[0].symmetric
        if any(total is None for total in totals):
            return Statistic(None, count, symmetric)
        return Statistic(torch.stack(cast("list[Tensor]", totals)), count, symmetric)


def _each(side: Tensor | None, groups: int) -> Sequence[Tensor | None]:
    return [None] * groups if side is None else list(side.unbind(0))


def no_rows(call: LayerCall) -> LinearRows:
    """Return the rows of a group without a call, of as many examples."""
    return LinearRows(call.inputs[:, :0], call.gradient[:, :0], 1.0)
