"""Inputs and gradients of one layer in one mini-batch, and the sums that curvature is made of.

This is the convention of the whole package. For example n, `D_n` is the part of the gradient of the
summed loss that flows through the rows of example n in the layer. It is a matrix
`[..., d_out, d_in]`: rows are outputs, columns are inputs, and the bias is the last column. Leading
dimensions are groups, as in grouped convolutions; linear algebra works on the last two. With T rows
an example (spatial positions, tokens, calls of a shared module)

    D_n = sum_t g_{n,t} a_{n,t}^T,        F = (1/M) sum_n vec(D_n) vec(D_n)^T

where M counts *likelihood terms*: examples; for sequences, unmasked positions; with sample weights,
their sum. Gradients are those of the summed loss, never of the mean. So damping means the same at
every batch size, resolution, sequence length and world size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

DEFAULT_CHUNK_BYTES = 256 * 2**20
CACHED_BYTES = 32 * 2**20
"""Size below which a temporary stays in the cache of a CPU, and its memory is reused."""
SMALL = 16384
"""Number of elements below which a call costs more than a pass over them."""


@attrs.frozen(eq=False)
class Statistic:
    """A sum and the count to divide it by; both add over micro-batches and ranks.

    Args:
        total: The sum, any shape; `None` contributes nothing.
        count: A number, or a scalar tensor where it is known on the device only.
        symmetric: Whether the sum is symmetric in its last two dimensions, so that ranks exchange
            one triangle only.
        rows: 0 for a sum. Otherwise `total` is data of single examples, `[N, T, ...]`, which is
            joined over micro-batches and ranks instead of added (`join_rows`). The number is the
            degree k in which F is made of it, so that its mean is `total / count ** (1 / k)`. No
            running mean is taken: the last one stays.
        unrounded: Whether the sum keeps its precision on its way between ranks, whatever the
            placement's `wire_dtype`: for few numbers that are compared.
    """

    total: Tensor | None
    count: Tensor | float
    symmetric: bool = False
    rows: int = 0
    unrounded: bool = False

    def __add__(self, other: Statistic) -> Statistic:
        count = self.count + other.count
        if self.total is None or other.total is None:
            return attrs.evolve(other if self.total is None else self, count=count)
        if self.rows:
            return Statistic(join_rows([self.total, other.total]), count, rows=self.rows)
        total, symmetric = self.total + other.total, self.symmetric and other.symmetric
        return attrs.evolve(self, total=total, count=count, symmetric=symmetric)

    def scaled(self, factor: float) -> Statistic:
        """Return the statistic with its sum multiplied by `factor`, its count unchanged."""
        return attrs.evolve(self, total=None if self.total is None else self.total * factor)


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Return parts `[N, T, ...]` joined along N; zeros fill up the smaller ones.

    Example:
        >>> join_rows([torch.ones(1, 2), torch.ones(2, 1)])
        tensor([[1., 1.],
                [1., 0.],
                [1., 0.]])
    """
    sizes = [max(part.shape[dim] for part in parts) for dim in range(1, parts[0].ndim)]
    joined = parts[0].new_zeros(sum(len(part) for part in parts), *sizes)
    start = 0
    for part in parts:
        joined[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return joined


@attrs.frozen
class RowOrder:
    """Which example each of the rows in one dimension belongs to: all have equally many.

    Args:
        examples: N, the number of examples.
        interleaved: Whether row r belongs to example `r % N`, as where `[T, N, d]` was flattened.
            Else it is `r // T`, as where `[N, T, d]` was.
    """

    examples: int
    interleaved: bool = False

    def unfold(self, tensor: Tensor) -> Tensor:
        """Return rows `[N T, ...]` as `[N, T, ...]`, without a copy.

        Example:
            >>> rows = torch.arange(6)
            >>> RowOrder(2).unfold(rows), RowOrder(2, interleaved=True).unfold(rows)
            (tensor([[0, 1, 2],
                    [3, 4, 5]]), tensor([[0, 2, 4],
                    [1, 3, 5]]))
        """
        each = len(tensor) // self.examples
        if self.interleaved:
            return tensor.view(each, self.examples, *tensor.shape[1:]).transpose(0, 1)
        return tensor.view(self.examples, each, *tensor.shape[1:])

    def parts(self, call: LayerCall) -> list[LayerCall]:
        """Return a call on `[N T, ...]` as T calls with one row of each example."""
        pairs = (self.unfold(each).unbind(1) for each in (call.inputs, call.gradient))
        return [
            attrs.evolve(call, inputs=inputs, gradient=gradient)
            for inputs, gradient in zip(*pairs, strict=True)
        ]


@attrs.frozen(eq=False)
class LayerCall:
    """One call of a module in one forward.

    Args:
        inputs: The module's input, detached.
        gradient: Gradient of the summed (Fisher) loss with respect to the module's output, of the
            output's shape, times `1 / scale`.
        scale: Factor that `gradient` still has to be multiplied by: protection against underflow in
            half precision, or loss scaling.
        training: Whether the module was in training mode; `None` where that is not known.
        module: Which of the layer's `sites` was called; `None` for its `module`.
        arguments: The other tensors that the module was given, by the names of its parameters.
        tag: Which of several products of the layer this is, where a call of the module makes
            several.
        place: Its place in the order of the forward's followed calls; `None` where not known.
        ones: What the bias was multiplied by in each row of an example, `[T]`: 1 in rows of values,
            0 in those of derivatives (`kfactk.Jet`). `None` for 1 in all. Only curvatures whose
            `reads_ones` says so are given others.
    """

    inputs: Tensor
    gradient: Tensor
    scale: Tensor | float = 1.0
    training: bool | None = None
    module: nn.Module | None = None
    arguments: Mapping[str, Tensor] = attrs.field(factory=dict)
    tag: str = ""
    place: int | None = None
    ones: Tensor | None = None


class Samples:
    """The rows of one layer in one Fisher pass over one forward.

    A subclass may replace a method by a faster exact one. Everything is computed in chunks of
    examples, so that no temporary exceeds about `chunk_bytes`.

    Args:
        inputs: `[..., N, T, d_in]`, bias column included; floating.
        gradients: `[..., N, T, d_out]`.
        num_terms: Number M of likelihood terms of the forward.
        first: Whether this is the first Fisher pass over the forward. Later passes, as with
            `exact`, add to sums, but not to counts.
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.

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
        """Return the inputs of some examples, `[..., n, T, d_in]`, in `self.dtype`."""
        return self._inputs[..., rows, :, :].to(self.dtype)

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Return the output gradients of some examples, `[..., n, T, d_out]`, in `self.dtype`."""
        return self._gradients[..., rows, :, :].to(self.dtype)

    def call_gradients(self) -> Tensor:
        """Return gradients at the outputs of the calls, or fixed sums of them, `[..., N, T, k]`.

        They tell which examples of the model's output a row depends on. The default is `gradients`.
        A subclass whose gradients are elsewhere, or many, replaces it.
        """
        return self.gradients()

    def input_sums(self, rows: slice = slice(None)) -> Tensor:
        """Return `sum_t a` of some examples, `[..., n, d_in]`."""
        return self.inputs(rows).sum(-2)

    @property
    def device(self) -> torch.device:
        """Device of the samples."""
        return self._gradients.device

    def chunks(self, numbers_per_example: int, most: int | None = None) -> Iterator[slice]:
        """Yield slices over the examples, of equal length but for the last.

        Args:
            numbers_per_example: Elements that an example and group needs; those of a slice fit into
                `chunk_bytes`.
            most: Largest length of a slice.
        """
        size = max(1, numbers_per_example * max(1, self.groups) * self.dtype.itemsize)
        longest = max(1, min(self.chunk_bytes // size, self.examples if most is None else most))
        step = max(1, math.ceil(self.examples / math.ceil(max(1, self.examples) / longest)))
        for start in range(0, self.examples, step):
            yield slice(start, min(start + step, self.examples))

    def input_moment(self) -> Statistic:
        """Return `sum_n sum_t a a^T`, `[..., d_in, d_in]`, counted by examples.

        It is empty on later passes over the same forward.
        """
        if not self.first:
            return Statistic(None, 0.0)
        parts = (gram(self.inputs(rows)) for rows in self.chunks(self.positions * self.d_in))
        return Statistic(total_of(parts), float(self.examples), symmetric=True)

    def grad_moment(self) -> Statistic:
        """Return `sum_n sum_t g g^T`, `[..., d_out, d_out]`, counted by likelihood terms."""
        parts = (gram(self.gradients(rows)) for rows in self.chunks(self.positions * self.d_out))
        return Statistic(total_of(parts), self.num_terms, symmetric=True)

    def per_example_gradients(
        self,
        rows: slice = slice(None),
        left: Tensor | None = None,
        *,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Return `left^T D_n` of some examples, `[..., n, k_out, d_in]`.

        Over all examples, the `D_n` sum to the gradient that autograd gives of the summed loss.

        Args:
            rows: The examples.
            left: `[..., d_out, k_out]`; `None` for no rotation.
            precision: Precision of the operands of the rotation; `None` for `self.dtype`.
        """
        gradients = self.gradients(rows)
        if left is not None:
            gradients = _rotate(gradients, left, precision)
        return gradients.transpose(-1, -2) @ self.inputs(rows)

    def input_rotation(
        self, right: Tensor, precision: torch.dtype | None = None
    ) -> Callable[[slice], Tensor]:
        """Return a function that maps a slice of examples to their `a right`, `[..., n, T, k_in]`.

        Args:
            right: `[..., d_in, k_in]`.
            precision: Precision of the operands; `None` for `self.dtype`.
        """
        return lambda rows: _rotate(self.inputs(rows), right, precision)

    def projected_square(
        self, left: Tensor | None, right: Tensor | None, *, precision: torch.dtype | None = None
    ) -> Statistic:
        """Return `sum_n (left^T D_n right)^2`, `[..., k_out, k_in]`, counted by likelihood terms.

        The square is taken entry by entry. A rotation in a lower precision rounds its operands and
        its result by a relative error of at most u (2^-8 for bfloat16); squares and sums stay in
        `self.dtype`. For columns of unit length and m_n = sum_t |g_{n,t}| |a_{n,t}| the rounded
        result s_low satisfies, entry by entry,

            |sqrt(s_low) - sqrt(s)| <= 7 u sqrt(sum_n m_n^2)

        Args:
            left: `[..., d_out, k_out]`, columns are directions of outputs; `None` for no rotation.
            right: `[..., d_in, k_in]`, columns are directions of inputs; `None` for no rotation.
            precision: Precision of the operands of the rotations, such as `torch.bfloat16`, whose
                products are accumulated in float32; `None` for `self.dtype`.

        References:
            George et al. 2018, arXiv:1806.03884: the scale s* of EKFAC (equation 10 of the thesis).
        """
        t, d_in, d_out = self.positions, self.d_in, self.d_out
        left, right = (
            None if side is None else side.to(precision or self.dtype) for side in (left, right)
        )
        by_rows = t == 1 or (right is not None and t <= d_out)
        most = None
        if self.device.type == "cpu" and (t > 1 or left is not None or right is not None):
            # Each chunk reads the rotations once, so it should be at least as large as they are.
            numbers = t * (d_out + (d_in if by_rows else 0)) + 2 * d_in * d_out
            example_bytes = self.groups * self.dtype.itemsize * numbers
            rotation_bytes = [2 * side.nbytes for side in (left, right) if side is not None]
            most = max([CACHED_BYTES, *rotation_bytes]) // max(1, example_bytes)
        square, total = self._squared(left, right, precision, by_rows=by_rows), None
        for rows in self.chunks(2 * t * (d_in + d_out) + (0 if t == 1 else 2 * d_in * d_out), most):
            total = square(rows, total)
        return Statistic(total, self.num_terms)

    def projected_square_of_channels(
        self, left: Tensor | None, right: Tensor, taps: Tensor | None = None
    ) -> Statistic:
        """Return `projected_square` in a basis that is a product of channels and taps.

            sum_n (left^T D_n blockdiag(right kron taps, 1))^2,    [..., k_out, k * l (+ 1)]

        The block diagonal matrix is never formed.

        Args:
            left: `[..., d_out, k_out]`, columns are directions of outputs; `None` for no rotation.
            right: `[..., channels, k]`, columns are directions of channels; `d_in` is
                `channels * taps (+ 1)`.
            taps: `[..., taps, l]`, columns are directions of taps; `None` for no rotation.

        References:
            George et al. 2018, arXiv:1806.03884: the scale s* of EKFAC.
        """
        numbers = 2 * self.positions * (self.d_in + self.d_out) + 2 * self.d_in * self.d_out
        most, total = None, None
        if self.device.type == "cpu":
            most = CACHED_BYTES // (numbers * self.groups * self.dtype.itemsize)
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
        """Return a function that adds the squares of a slice of examples to a total.

        To rotate rows costs T d^2, to rotate D_n costs d_in d_out d. With `by_rows`, inputs are
        rotated as rows. Gradients are rotated as rows where T <= d_in.
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
    """Return how many of `d_in` columns are channels times taps; one more column is the bias.

    With one channel and without `taps`, a bias column counts as a tap. Where taps are not rotated,
    that is the same basis.

    Raises:
        ValueError: The other columns are more than one.

    Example:
        >>> channel_columns(19, 2), channel_columns(18, 2), channel_columns(10, 1, taps=9)
        (18, 18, 9)
    """
    columns = d_in - d_in % channels if taps is None else channels * taps
    if not columns <= d_in <= columns + 1 or not columns:
        number = "" if taps is None else f"{taps} "
        raise ValueError(
            f"{d_in} columns are not {channels} channels times {number}taps, with or without a "
            "bias column"
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
    """Return `left^T M blockdiag(right kron taps, 1)`: the bias column is not rotated.

    Args:
        matrix: `[..., d_out, channels * taps (+ 1)]`, columns in the order channel, tap, bias.
        left: `[..., d_out, k_out]`; `None` for no rotation.
        right: `[..., channels, k]`; `None` for no rotation.
        taps: `[..., taps, l]`; `None` for no rotation.
        per_example: Whether `matrix` has an example dimension before its last two, which the
            rotations lack.

    Returns:
        `[..., k_out, k * l (+ 1)]`.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> project_channels(torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0]]), None, swap)
        tensor([[3., 4., 1., 2., 9.]])
    """
    if left is not None:
        rotation = left.to(matrix.dtype).transpose(-1, -2)
        matrix = (rotation.unsqueeze(-3) if per_example else rotation) @ matrix
    if right is None and taps is None:
        return matrix
    num_taps = None if taps is None else taps.shape[-2]
    channels = right.shape[-2] if right is not None else matrix.shape[-1] // (num_taps or 1)
    columns = channel_columns(matrix.shape[-1], channels, num_taps)
    body = matrix[..., :columns]
    body = body.view(*body.shape[:-1], channels, columns // channels)
    if taps is not None:
        body = _rotate_last(body, taps)
    if right is not None:
        body = _rotate_last(body.transpose(-1, -2), right).transpose(-1, -2)
    found = body.flatten(-2)
    return found if columns == matrix.shape[-1] else torch.cat([found, matrix[..., columns:]], -1)


def _rotate_last(body: Tensor, rotation: Tensor) -> Tensor:
    """Return `body @ rotation`, with one product for all rows of the same rotation."""
    rows = body.flatten(rotation.ndim - 2, -2) @ rotation.to(body.dtype)
    return rows.view(*body.shape[:-1], rotation.shape[-1])


def add_squares(matrices: Tensor, total: Tensor | None) -> Tensor:
    """Return `total + sum_n matrices^2`, summed over examples, in place where there is a total.

    Args:
        matrices: `[..., N, d_out, d_in]`.
        total: `[..., d_out, d_in]`, or `None` for zero.
    """
    if matrices.device.type != "cpu" or matrices[..., 0, :, :].numel() < SMALL:
        part = matrices.square().sum(-3)
        return part if total is None else total.add_(part)
    if total is None:
        total = matrices.new_zeros(*matrices.shape[:-3], *matrices.shape[-2:])
    for matrix in matrices.unbind(-3):  # one pass over each, without a temporary of squares
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
    """Return `left^T matrix right`, in the precision of the matrix.

    Args:
        matrix: `[..., d_out, d_in]`.
        left: `[..., d_out, k_out]`; `None` for no rotation.
        right: `[..., d_in, k_in]`; `None` for no rotation.
        per_example: Whether `matrix` has an example dimension before its last two, which the
            rotations lack.
        precision: Precision of the operands; `None` for that of the matrix.
    """
    if not per_example:
        if left is not None:
            matrix = product(left.transpose(-1, -2), matrix, matrix.dtype, precision)
        return matrix if right is None else product(matrix, right, matrix.dtype, precision)
    if right is not None:
        matrix = _rotate(matrix, right, precision)
    if left is not None:
        # Examples beside columns: one product. Broadcasting would copy `left` for each example.
        beside = matrix.movedim(-3, -2)
        found = product(left.transpose(-1, -2), beside.flatten(-2), matrix.dtype, precision)
        matrix = found.reshape(*found.shape[:-1], *beside.shape[-2:]).movedim(-2, -3)
    return matrix


def product(
    one: Tensor, other: Tensor, dtype: torch.dtype, precision: torch.dtype | None
) -> Tensor:
    """Return the matrix product in `dtype`, of operands rounded to `precision` (or `dtype`)."""
    rounded = precision or dtype
    one = one if one.dtype == rounded else one.to(rounded)
    found = one @ (other if other.dtype == rounded else other.to(rounded))
    return found if rounded == dtype else found.to(dtype)


def _rotate(rows: Tensor, rotation: Tensor, precision: torch.dtype | None = None) -> Tensor:
    """Return rows `[..., n, t, d]` times a rotation `[..., d, k]`, as one product.

    Broadcasting over examples would make one product for each.
    """
    found = product(rows.flatten(-3, -2), rotation, rows.dtype, precision)
    return found.reshape(*rows.shape[:-1], found.shape[-1])


def gram(rows: Tensor) -> Tensor:
    """Return `sum_{n,t} r r^T` of rows `[..., N, T, d]`, as `[..., d, d]`."""
    flat = rows.flatten(-3, -2)
    return flat.transpose(-1, -2) @ flat


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the precision to compute curvature in: float64 if any of `dtypes` is, else float32.

    Example:
        >>> working_dtype(torch.bfloat16, torch.float32)
        torch.float32
    """
    return torch.float64 if torch.float64 in dtypes else torch.float32


def to_working_dtype(tensor: Tensor) -> Tensor:
    """Return the tensor in its `working_dtype`; without a copy where it has that already."""
    dtype = working_dtype(tensor.dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def total_of(parts: Iterable[Tensor]) -> Tensor | None:
    """Return the sum of tensors, `None` without any; the first one is overwritten."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    return total
