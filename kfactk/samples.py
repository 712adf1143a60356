"""What one layer saw of one mini-batch: inputs, gradients, and the sums every curvature is made of.

The convention, written here once. For example n, `D_n` is the part of the summed loss' gradient that flows through example n's rows of the
layer, as a matrix `[..., d_out, d_in]`: rows are outputs, columns inputs, the bias is the last input column, leading dimensions are
groups (grouped convolution) and linear algebra works on the last two. With T rows (spatial positions, tokens, uses of a shared module)

    D_n = sum_t g_{n,t} a_{n,t}^T,        F = (1/M) sum_n vec(D_n) vec(D_n)^T

where M counts *likelihood terms* (examples; for sequences, unmasked positions; with sample weights, their sum). Gradients are those of the
summed, never the mean, loss. So damping means the same at every batch size, resolution, sequence length and world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor

DEFAULT_CHUNK_BYTES = 256 * 2**20


@attrs.frozen(eq=False)
class Statistic:
    """A local sum and the count it is to be divided by; sums and counts of micro-batches and ranks add.

    Args:
        total: The sum, any shape; `None` contributes nothing.
        count: What the sum is divided by for the mean: a number, or a scalar tensor when it is known on the device only.
        symmetric: Whether the sum is symmetric in its last two dimensions, so that one triangle of it is enough to send.
    """

    total: Tensor | None
    count: Tensor | float
    symmetric: bool = False

    def __add__(self, other: Statistic) -> Statistic:
        count = self.count + other.count
        if self.total is None or other.total is None:
            return attrs.evolve(other if self.total is None else self, count=count)
        return Statistic(self.total + other.total, count, self.symmetric and other.symmetric)

    def scaled(self, factor: float) -> Statistic:
        """The same count with the sum multiplied by `factor`."""
        return attrs.evolve(self, total=None if self.total is None else self.total * factor)


@attrs.frozen(eq=False)
class Use:
    """One call of a module in one forward.

    Args:
        inputs: The module's input as it was called, detached.
        gradient: Gradient of the summed (Fisher) loss with respect to the module's output, of the output's shape, times `1 / scale`.
        scale: What `gradient` is still to be multiplied by (power-of-two protection against half-precision underflow, loss scaling).
    """

    inputs: Tensor
    gradient: Tensor
    scale: Tensor | float = 1.0


class Samples:
    """One layer's view of one mini-batch in one Fisher pass.

    Subclasses that know a faster exact way (convolutions do) override a method, and nothing else needs to know. Everything is computed in
    chunks of examples so that no temporary exceeds about `chunk_bytes`.

    Args:
        inputs: `[..., N, T, d_in]`, bias column included; floating.
        gradients: `[..., N, T, d_out]`.
        terms: Number M of likelihood terms behind this mini-batch. Counts enter once a forward: on the second and later Fisher passes
            over the same forward (`exact`) `first` is False, and both counts are taken as zero.
        first: Whether this is the first Fisher pass over its forward.
        chunk_bytes: Bound on the size of temporaries, in bytes. One example is always processed whole.

    Example:
        >>> a, g = torch.ones(4, 1, 3), torch.ones(4, 1, 2)
        >>> s = Samples(a, g, terms=4)
        >>> s.input_moment().total.shape, s.per_example_gradients().shape
        (torch.Size([3, 3]), torch.Size([4, 2, 3]))
    """

    def __init__(
        self,
        inputs: Tensor,
        gradients: Tensor,
        *,
        terms: Tensor | float,
        first: bool = True,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        self._inputs, self._gradients = inputs, gradients
        self.examples, self.positions = int(gradients.shape[-3]), int(gradients.shape[-2])
        self.d_out, self.d_in = int(gradients.shape[-1]), int(inputs.shape[-1])
        self.groups = int(math.prod(gradients.shape[:-3]))
        self.dtype = working_dtype(inputs.dtype, gradients.dtype)
        self.terms: Tensor | float = terms if first else 0.0
        self.first = first
        self.chunk_bytes = chunk_bytes

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Inputs of the examples `rows`, `[..., n, T, d_in]`, in the working precision (float32 at least)."""
        return self._inputs[..., rows, :, :].to(self.dtype)

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Output gradients of the examples `rows`, `[..., n, T, d_out]`, in the working precision."""
        return self._gradients[..., rows, :, :].to(self.dtype)

    def input_sums(self, rows: slice = slice(None)) -> Tensor:
        """`sum_t a` of the examples `rows`, `[..., n, d_in]`."""
        return self.inputs(rows).sum(-2)

    def chunks(self, numbers_per_example: int) -> Iterator[slice]:
        """Slices over the examples such that `numbers_per_example` numbers each, in the working precision, fit in `chunk_bytes`."""
        size = max(1, numbers_per_example * max(1, self.groups) * self.dtype.itemsize)
        step = max(1, self.chunk_bytes // size)
        for start in range(0, self.examples, step):
            yield slice(start, min(start + step, self.examples))

    def input_moment(self) -> Statistic:
        """`sum_n sum_t a a^T`, `[..., d_in, d_in]`, counted by examples; nothing on later passes over the same forward."""
        if not self.first:
            return Statistic(None, 0.0)
        parts = (gram(self.inputs(rows)) for rows in self.chunks(self.positions * self.d_in))
        return Statistic(total_of(parts), float(self.examples), symmetric=True)

    def grad_moment(self) -> Statistic:
        """`sum_n sum_t g g^T`, `[..., d_out, d_out]`, counted by likelihood terms."""
        parts = (gram(self.gradients(rows)) for rows in self.chunks(self.positions * self.d_out))
        return Statistic(total_of(parts), self.terms, symmetric=True)

    def per_example_gradients(self, rows: slice = slice(None), left: Tensor | None = None) -> Tensor:
        """`left^T D_n` of the examples `rows`, `[..., n, d_out, d_in]`. The `D_n` sum to autograd's gradient of the summed loss.

        Args:
            rows: The examples.
            left: `[..., d_out, k_out]`; `None` for no rotation.
        """
        gradients = self.gradients(rows)
        return (gradients if left is None else _rotate(gradients, left)).transpose(-1, -2) @ self.inputs(rows)

    def projected_square(self, left: Tensor | None, right: Tensor | None) -> Statistic:
        """`sum_n (left^T D_n right)^2`, elementwise square, `[..., k_out, k_in]`, counted by likelihood terms.

        Args:
            left: `[..., d_out, k_out]`, columns are directions of the output space; `None` for no rotation.
            right: `[..., d_in, k_in]`, the same for the input space.

        References:
            George et al. 2018, arXiv:1806.03884, the scale s* of EKFAC (equation 10 of the study).
        """
        t, d_in, d_out = self.positions, self.d_in, self.d_out
        numbers = 2 * t * (d_in + d_out) + (0 if t == 1 else 2 * d_in * d_out)
        parts = (self._squared_chunk(rows, left, right) for rows in self.chunks(numbers))
        return Statistic(total_of(parts), self.terms)

    def projected_square_of_channels(self, left: Tensor | None, right: Tensor, taps: Tensor | None = None) -> Statistic:
        """`sum_n (left^T D_n blockdiag(right kron taps, 1))^2`, elementwise square, `[..., k_out, k * l (+ 1)]`, counted by terms.

        `projected_square` with a matrix that is never formed: the input space is rotated among its channels, and its taps.

        Args:
            left: `[..., d_out, k_out]`, columns are directions of the output space; `None` for no rotation.
            right: `[..., channels, k]`, columns are directions of the channel space, where `d_in` is `channels * taps (+ 1)`.
            taps: `[..., taps, l]`, the same for the taps; `None` for no rotation.

        References:
            George et al. 2018, arXiv:1806.03884, the scale s* of EKFAC, in a basis that is a product on the input side.
        """
        numbers = 2 * self.positions * (self.d_in + self.d_out) + 2 * self.d_in * self.d_out
        parts = (self._squared_channels(rows, left, right, taps) for rows in self.chunks(numbers))
        return Statistic(total_of(parts), self.terms)

    def _squared_channels(self, rows: slice, left: Tensor | None, right: Tensor, taps: Tensor | None) -> Tensor:
        early, late = (left, None) if self.positions <= self.d_in else (None, left)
        found = self.per_example_gradients(rows, early)
        return project_channels(found, late, right, taps, per_example=True).square_().sum(-3)

    def _squared_chunk(self, rows: slice, left: Tensor | None, right: Tensor | None) -> Tensor:
        # Rotating rows costs T d^2, rotating D_n costs d_in d_out d: each side is rotated where that is cheaper.
        early_left, early_right = self.positions <= self.d_in, self.positions <= self.d_out
        early, late = (left, None) if early_left else (None, left)
        if not early_right:
            return project(self.per_example_gradients(rows, early), late, right, per_example=True).square_().sum(-3)
        g, a = self.gradients(rows), self.inputs(rows)
        g = g if early is None else _rotate(g, early)
        a = a if right is None else _rotate(a, right)
        if self.positions == 1:
            return g.squeeze(-2).square().transpose(-1, -2) @ a.squeeze(-2).square()
        return project(g.transpose(-1, -2) @ a, late, None, per_example=True).square_().sum(-3)


def channel_columns(d_in: int, channels: int, taps: int | None = None) -> int:
    """How many of `d_in` columns are channels times taps, channel by channel; one more is the bias.

    With one channel and `taps` not told, a bias column is counted as a tap: where taps are not rotated, that is the same basis.

    Raises:
        ValueError: More than one column is left over.

    Example:
        >>> channel_columns(19, 2), channel_columns(18, 2), channel_columns(10, 1, taps=9)
        (18, 18, 9)
    """
    columns = d_in - d_in % channels if taps is None else channels * taps
    if not columns <= d_in <= columns + 1 or not columns:
        many = "" if taps is None else f"{taps} "
        raise ValueError(f"{d_in} columns are not {channels} channels times {many}taps, with or without a bias column")
    return columns


def project_channels(
    matrix: Tensor, left: Tensor | None, right: Tensor | None, taps: Tensor | None = None, *, per_example: bool = False
) -> Tensor:
    """`left^T M blockdiag(right kron taps, 1)`: channels and taps are rotated, the bias column is left where it is.

    Args:
        matrix: `[..., d_out, channels * taps (+ 1)]`, columns in the order channel, tap, bias; with `per_example` it has an example
            dimension before its last two that the rotations lack.
        left: `[..., d_out, k_out]`; `None` for no rotation.
        right: `[..., channels, k]`; `None` for no rotation.
        taps: `[..., taps, l]`; `None` for no rotation.
        per_example: See `matrix`.

    Returns:
        `[..., k_out, k * l (+ 1)]`.

    Example:
        >>> project_channels(torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0]]), None, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[3., 4., 1., 2., 9.]])
    """
    if left is not None:
        turn = left.to(matrix.dtype).transpose(-1, -2)
        matrix = (turn.unsqueeze(-3) if per_example else turn) @ matrix
    if right is None and taps is None:
        return matrix
    many = None if taps is None else taps.shape[-2]
    channels = right.shape[-2] if right is not None else matrix.shape[-1] // (many or 1)
    columns = channel_columns(matrix.shape[-1], channels, many)
    body = matrix[..., :columns]
    body = body.view(*body.shape[:-1], channels, columns // channels)
    if taps is not None:
        body = _turned(body, taps)
    if right is not None:
        body = _turned(body.transpose(-1, -2), right).transpose(-1, -2)
    found = body.flatten(-2)
    return found if columns == matrix.shape[-1] else torch.cat([found, matrix[..., columns:]], -1)


def _turned(body: Tensor, rotation: Tensor) -> Tensor:
    """`body @ rotation`, all rows that one rotation turns as one product."""
    rows = body.flatten(rotation.ndim - 2, -2) @ rotation.to(body.dtype)
    return rows.view(*body.shape[:-1], rotation.shape[-1])


def project(matrix: Tensor, left: Tensor | None, right: Tensor | None, *, per_example: bool = False) -> Tensor:
    """`left^T matrix right`; with `per_example` the matrix has an example dimension before its last two that the rotations lack."""
    if not per_example:
        matrix = matrix if left is None else left.to(matrix.dtype).transpose(-1, -2) @ matrix
        return matrix if right is None else matrix @ right.to(matrix.dtype)
    if right is not None:
        matrix = _rotate(matrix, right)
    if left is not None:  # examples beside the columns: one product, where broadcasting would copy `left` for each example
        beside = matrix.movedim(-3, -2)
        product = left.to(matrix.dtype).transpose(-1, -2) @ beside.flatten(-2)
        matrix = product.reshape(*product.shape[:-1], *beside.shape[-2:]).movedim(-2, -3)
    return matrix


def _rotate(rows: Tensor, rotation: Tensor) -> Tensor:
    """Rows `[..., n, t, d]` times one rotation `[..., d, k]` for all examples, as one product, which broadcasting would not be."""
    product = rows.flatten(-3, -2) @ rotation.to(rows.dtype)
    return product.reshape(*rows.shape[:-1], product.shape[-1])


def gram(rows: Tensor) -> Tensor:
    """`sum_{n,t} r r^T` of rows `[..., N, T, d]`, as `[..., d, d]`."""
    flat = rows.flatten(-3, -2)
    return flat.transpose(-1, -2) @ flat


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The precision curvature is computed in: float64 when anything is, else float32.

    Example:
        >>> working_dtype(torch.bfloat16, torch.float32)
        torch.float32
    """
    return torch.float64 if torch.float64 in dtypes else torch.float32


def total_of(parts: Iterable[Tensor]) -> Tensor | None:
    """The sum of tensors that nobody else holds; `None` where there are none."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    return total
