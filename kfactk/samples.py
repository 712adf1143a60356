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
from collections.abc import Callable, Iterable, Iterator

import attrs
import torch
from torch import Tensor

DEFAULT_CHUNK_BYTES = 256 * 2**20
CACHED_BYTES = 32 * 2**20
"""What is made and read again at once stays in the cache of a CPU below about this, and its memory is used again, not mapped anew."""
SMALL = 16384
"""Numbers below which a call costs more than a pass over them."""


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
class LayerCall:
    """One call of a module in one forward.

    Args:
        inputs: The module's input, detached.
        gradient: Gradient of the summed (Fisher) loss with respect to the module's output, of the
            output's shape, times `1 / scale`.
        scale: Factor that `gradient` still has to be multiplied by: protection against underflow in
            half precision, or loss scaling.
        training: Whether the module was in training mode.
    """

    inputs: Tensor
    gradient: Tensor
    scale: Tensor | float = 1.0
    training: bool = True


class Samples:
    """One layer's view of one mini-batch in one Fisher pass.

    Subclasses that know a faster exact way (convolutions do) override a method, and nothing else needs to know. Everything is computed in
    chunks of examples so that no temporary exceeds about `chunk_bytes`.

    Args:
        inputs: `[..., N, T, d_in]`, bias column included; floating.
        gradients: `[..., N, T, d_out]`.
        num_terms: Number M of likelihood terms behind this mini-batch. Counts enter once a forward: on the second and later Fisher passes
            over the same forward (`exact`) `first` is False, and both counts are taken as zero.
        first: Whether this is the first Fisher pass over its forward.
        chunk_bytes: Bound on the size of temporaries, in bytes. One example is always processed whole.

    Example:
        >>> a, g = torch.ones(4, 1, 3), torch.ones(4, 1, 2)
        >>> s = Samples(a, g, num_terms=4)
        >>> s.input_moment().total.shape, s.per_example_gradients().shape
        (torch.Size([3, 3]), torch.Size([4, 2, 3]))
    """

    def __init__(
        self,
        inputs: Tensor,
        gradients: Tensor,
        *,
        num_terms: Tensor | float,
        first: bool = True,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        self._inputs, self._gradients = inputs, gradients
        self.examples, self.positions = int(gradients.shape[-3]), int(gradients.shape[-2])
        self.d_out, self.d_in = int(gradients.shape[-1]), int(inputs.shape[-1])
        self.groups = int(math.prod(gradients.shape[:-3]))
        self.dtype = working_dtype(inputs.dtype, gradients.dtype)
        self.num_terms: Tensor | float = num_terms if first else 0.0
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

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self._gradients.device

    def chunks(self, numbers_per_example: int, most: int | None = None) -> Iterator[slice]:
        """Slices over the examples, of equal length but for the last.

        Args:
            numbers_per_example: Numbers in the working precision, a group, such that those of a slice fit in `chunk_bytes`.
            most: No slice is longer.
        """
        size = max(1, numbers_per_example * max(1, self.groups) * self.dtype.itemsize)
        longest = max(1, min(self.chunk_bytes // size, self.examples if most is None else most))
        step = max(1, math.ceil(self.examples / math.ceil(max(1, self.examples) / longest)))
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
        return Statistic(total_of(parts), self.num_terms, symmetric=True)

    def per_example_gradients(
        self,
        rows: slice = slice(None),
        left: Tensor | None = None,
        *,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """`left^T D_n` of the examples `rows`, `[..., n, d_out, d_in]`. The `D_n` sum to autograd's gradient of the summed loss.

        Args:
            rows: The examples.
            left: `[..., d_out, k_out]`; `None` for no rotation.
            precision: What the operands of the rotation are rounded to; `None` for the working precision.
        """
        gradients = self.gradients(rows)
        return (gradients if left is None else _rotate(gradients, left, precision)).transpose(
            -1, -2
        ) @ self.inputs(rows)

    def input_rotation(
        self, right: Tensor, precision: torch.dtype | None = None
    ) -> Callable[[slice], Tensor]:
        """What makes `a right`, `[..., n, T, k_in]`, of the examples of a slice.

        Args:
            right: `[..., d_in, k_in]`.
            precision: What the operands are rounded to; `None` for the working precision.
        """
        return lambda rows: _rotate(self.inputs(rows), right, precision)

    def projected_square(
        self, left: Tensor | None, right: Tensor | None, *, precision: torch.dtype | None = None
    ) -> Statistic:
        """`sum_n (left^T D_n right)^2`, elementwise square, `[..., k_out, k_in]`, counted by likelihood terms.

        Rotations in a lower precision round their operands and their results, at most by u each, relatively (u = 2^-8 for bfloat16);
        squares and sums are in the working precision. For columns of unit length and m_n = sum_t |g_{n,t}| |a_{n,t}| this moves the
        result s, entry by entry, no further than

            |sqrt(s_low) - sqrt(s)| <= 7 u sqrt(sum_n m_n^2)

        Args:
            left: `[..., d_out, k_out]`, columns are directions of the output space; `None` for no rotation.
            right: `[..., d_in, k_in]`, the same for the input space.
            precision: What the operands of the rotations are rounded to, such as `torch.bfloat16`, with products accumulated in float32;
                `None` for the working precision.

        References:
            George et al. 2018, arXiv:1806.03884, the scale s* of EKFAC (equation 10 of the study).
        """
        t, d_in, d_out = self.positions, self.d_in, self.d_out
        left, right = (
            None if side is None else side.to(precision or self.dtype) for side in (left, right)
        )
        by_rows = t == 1 or (right is not None and t <= d_out)
        most = None
        if (
            self.device.type == "cpu"
        ):  # a large rotation is read once a chunk, and is to be worth it
            made = (
                self.groups
                * self.dtype.itemsize
                * (t * (d_out + (d_in if by_rows else 0)) + 2 * d_in * d_out)
            )
            most = max(
                [CACHED_BYTES, *(2 * side.nbytes for side in (left, right) if side is not None)]
            ) // max(1, made)
        square, total = self._squared(left, right, precision, by_rows=by_rows), None
        for rows in self.chunks(2 * t * (d_in + d_out) + (0 if t == 1 else 2 * d_in * d_out), most):
            total = square(rows, total)
        return Statistic(total, self.num_terms)

    def projected_square_of_channels(
        self, left: Tensor | None, right: Tensor, taps: Tensor | None = None
    ) -> Statistic:
        """`sum_n (left^T D_n blockdiag(right kron taps, 1))^2`, elementwise square, `[..., k_out, k * l (+ 1)]`, counted by terms.

        `projected_square` with a matrix that is never formed: the input space is rotated among its channels, and its taps.

        Args:
            left: `[..., d_out, k_out]`, columns are directions of the output space; `None` for no rotation.
            right: `[..., channels, k]`, columns are directions of the channel space, where `d_in` is `channels * taps (+ 1)`.
            taps: `[..., taps, l]`, the same for the taps; `None` for no rotation.

        References:
            George et al. 2018, arXiv:1806.03884, the scale s* of EKFAC, in a basis that is a product on the input side.
        """
        numbers, total = (
            2 * self.positions * (self.d_in + self.d_out) + 2 * self.d_in * self.d_out,
            None,
        )
        most = (
            CACHED_BYTES // (numbers * self.groups * self.dtype.itemsize)
            if self.device.type == "cpu"
            else None
        )
        for rows in self.chunks(numbers, most):
            total = self._squared_channels(rows, total, left, right, taps)
        return Statistic(total, self.num_terms)

    def _squared_channels(
        self,
        rows: slice,
        total: Tensor | None,
        left: Tensor | None,
        right: Tensor,
        taps: Tensor | None,
    ) -> Tensor:
        early, late = (left, None) if self.positions <= self.d_in else (None, left)
        found = self.per_example_gradients(rows, early)
        return add_squares(project_channels(found, late, right, taps, per_example=True), total)

    def _squared(
        self,
        left: Tensor | None,
        right: Tensor | None,
        precision: torch.dtype | None,
        *,
        by_rows: bool,
    ) -> Callable[[slice, Tensor | None], Tensor]:
        """What adds the squares of the examples of a slice to a total.

        Rotating rows costs T d^2, rotating D_n costs d_in d_out d: each side is rotated where that is cheaper.
        """
        t = self.positions
        early, late = (left, None) if t <= self.d_in else (None, left)
        rotated = self.inputs if right is None else self.input_rotation(right, precision)

        def of_gradients(rows: slice, total: Tensor | None) -> Tensor:
            matrices = self.per_example_gradients(rows, early, precision=precision)
            return add_squares(
                project(matrices, late, right, per_example=True, precision=precision), total
            )

        def of_rows(rows: slice, total: Tensor | None) -> Tensor:
            g = self.gradients(rows)
            g, a = g if early is None else _rotate(g, early, precision), rotated(rows)
            if t == 1:
                part = g.squeeze(-2).square().transpose(-1, -2) @ a.squeeze(-2).square()
                return part if total is None else total.add_(part)
            return add_squares(
                project(g.transpose(-1, -2) @ a, late, None, per_example=True, precision=precision),
                total,
            )

        return of_rows if by_rows else of_gradients


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
        raise ValueError(
            f"{d_in} columns are not {channels} channels times {many}taps, with or without a bias column"
        )
    return columns


def project_channels(
    matrix: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    taps: Tensor | None = None,
    *,
    per_example: bool = False,
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


def add_squares(matrices: Tensor, total: Tensor | None) -> Tensor:
    """`total + sum_n matrices^2` over the dimension of the examples, in place where there is a total."""
    if matrices.device.type != "cpu" or matrices[..., 0, :, :].numel() < SMALL:
        part = matrices.square().sum(-3)
        return part if total is None else total.add_(part)
    total = (
        matrices.new_zeros(*matrices.shape[:-3], *matrices.shape[-2:]) if total is None else total
    )
    for matrix in matrices.unbind(
        -3
    ):  # one pass over each, where squares would be written and read
        total.addcmul_(matrix, matrix)
    return total


def project(
    matrix: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    per_example: bool = False,
    precision: torch.dtype | None = None,
) -> Tensor:
    """`left^T matrix right`; with `per_example` the matrix has an example dimension before its last two that the rotations lack.

    Operands are rounded to `precision` and the result is given in the precision of the matrix.
    """
    if not per_example:
        matrix = (
            matrix
            if left is None
            else product(left.transpose(-1, -2), matrix, matrix.dtype, precision)
        )
        return matrix if right is None else product(matrix, right, matrix.dtype, precision)
    if right is not None:
        matrix = _rotate(matrix, right, precision)
    if (
        left is not None
    ):  # examples beside the columns: one product, where broadcasting would copy `left` for each example
        beside = matrix.movedim(-3, -2)
        found = product(left.transpose(-1, -2), beside.flatten(-2), matrix.dtype, precision)
        matrix = found.reshape(*found.shape[:-1], *beside.shape[-2:]).movedim(-2, -3)
    return matrix


def product(
    one: Tensor, other: Tensor, dtype: torch.dtype, precision: torch.dtype | None
) -> Tensor:
    """`one other` in `dtype`, of operands rounded to `precision`, which is `dtype` where it is `None`."""
    rounded = precision or dtype
    one = one if one.dtype == rounded else one.to(rounded)
    found = one @ (other if other.dtype == rounded else other.to(rounded))
    return found if rounded == dtype else found.to(dtype)


def _rotate(rows: Tensor, rotation: Tensor, precision: torch.dtype | None = None) -> Tensor:
    """Rows `[..., n, t, d]` times one rotation `[..., d, k]` for all examples, as one product, which broadcasting would not be."""
    found = product(rows.flatten(-3, -2), rotation, rows.dtype, precision)
    return found.reshape(*rows.shape[:-1], found.shape[-1])


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


def working(tensor: Tensor) -> Tensor:
    """The tensor in the precision curvature is computed in; itself where that is its own."""
    dtype = working_dtype(tensor.dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def total_of(parts: Iterable[Tensor]) -> Tensor | None:
    """The sum of tensors that nobody else holds; `None` where there are none."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    return total
