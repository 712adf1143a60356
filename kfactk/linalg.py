"""Linear algebra on the last two dimensions: Kronecker products, and robust decompositions.

Pure: no hooks, no module state, no collectives. Matrices V are `[..., d_out, d_in]`, and `vec`
stacks columns, so that

    vec(L V R^T) = (R kron L) vec(V)                                        (the vec trick)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kfactk.errors import DecompositionError, memory_ran_out

T = TypeVar("T")
Preparation = Callable[[Tensor], Tensor]
"""Moves a matrix to the precision and the device of an attempt to decompose it."""

RAISE_DAMPING = "raise damping, or look for extreme values in the data"
"""What to do when a matrix cannot be decomposed."""


def vec(matrix: Tensor) -> Tensor:
    """Stack the columns: `[..., d_out, d_in]` to `[..., d_in * d_out]`."""
    return matrix.transpose(-1, -2).flatten(-2)


def unvec(vector: Tensor, d_out: int, d_in: int) -> Tensor:
    """Invert `vec`: `[..., d_in * d_out]` to `[..., d_out, d_in]`."""
    return vector.reshape(*vector.shape[:-1], d_in, d_out).transpose(-1, -2)


def kron(a: Tensor, b: Tensor) -> Tensor:
    """Return the Kronecker product of `[..., m, n]` and `[..., p, q]`, `[..., m p, n q]`.

    Leading dimensions broadcast.

    Example:
        >>> kron(torch.eye(2), torch.tensor([[2.0]]))
        tensor([[2., 0.],
                [0., 2.]])
    """
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)


def block_diagonal(a: Tensor, b: Tensor) -> Tensor:
    """Return `[[a, 0], [0, b]]`; leading dimensions must agree."""
    m, n = a.shape[-1], b.shape[-1]
    out = a.new_zeros(*a.shape[:-2], m + n, m + n)
    out[..., :m, :m] = a
    out[..., m:, m:] = b
    return out


def mean_diagonal(matrix: Tensor) -> Tensor:
    """Return `trace / dimension`, `[...]`."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def symmetrise(matrix: Tensor) -> Tensor:
    """Return `(M + M^T) / 2`."""
    return (matrix + matrix.transpose(-1, -2)) / 2


def add_diagonal(matrix: Tensor, value: Tensor | float) -> Tensor:
    """Return `M + value I`; `value` is a number or `[...]`, one for each matrix."""
    out = matrix.clone()
    diagonal = out.diagonal(dim1=-2, dim2=-1)
    diagonal += value.unsqueeze(-1) if isinstance(value, Tensor) and value.ndim else value
    return out


def tikhonov_pi(mean_a: Tensor, mean_g: Tensor) -> Tensor:
    """Return `pi = sqrt((tr A / dim A) / (tr G / dim G))`, 1 where either trace is zero.

    Args:
        mean_a: `tr A / dim A`, `[...]`.
        mean_g: `tr G / dim G`, `[...]`.

    References:
        Martens & Grosse 2015, arXiv:1503.05671, section 6.3.
    """
    usable = (mean_a > 0) & (mean_g > 0)
    safe_a, safe_g = torch.where(usable, mean_a, 1.0), torch.where(usable, mean_g, 1.0)
    return safe_a.sqrt() / safe_g.sqrt()


def balanced_sides(mean_a: Tensor, mean_g: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what makes A and G of one size, each as large as the root of `A kron G`.

        A / pi,    pi G

    Factored Tikhonov damping adds `sqrt(tau) I` to each.

    Args:
        mean_a: `tr A / dim A`, `[...]`.
        mean_g: `tr G / dim G`, `[...]`.

    Returns:
        For "A" and "G" the factor, and the least that may be added to the diagonal of the result.
    """
    pi = tikhonov_pi(mean_a, mean_g)
    sides = {"A": (mean_a, 1 / pi), "G": (mean_g, pi)}
    return {side: (each, damping_floor(mean * each)) for side, (mean, each) in sides.items()}


def null_tolerance(dtype: torch.dtype, n: int) -> float:
    """Return the fraction of the largest eigenvalue below which one counts as zero.

    Args:
        dtype: Precision of the matrix.
        n: Its dimension.
    """
    return n * 1e-12 if dtype == torch.float64 else 4 * n**0.5 * torch.finfo(dtype).eps


def null_mask(eigenvalues: Tensor) -> Tensor:
    """Return which directions are in the numerical null space, `[..., n]`: all of a zero matrix."""
    largest = eigenvalues.amax(-1, keepdim=True).clamp(min=0)
    return eigenvalues <= null_tolerance(eigenvalues.dtype, eigenvalues.shape[-1]) * largest


def pool_null(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Replace values along null directions by their mean.

    The result then does not depend on which eigenvectors span the null space.

    Args:
        values: `[..., d_out, d_in]`.
        mask: Null directions, `[..., d_in]` for `dim=-1`, `[..., d_out]` for `dim=-2`.
        dim: The dimension of the directions, -1 or -2.
    """
    mask = mask.unsqueeze(-2 if dim == -1 else -1)
    count = mask.sum(dim, keepdim=True).clamp(min=1)
    pooled = torch.where(mask, values, 0.0).sum(dim, keepdim=True) / count
    return torch.where(mask, pooled, values)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose symmetric positive semi-definite matrices, also where LAPACK fails at first.

    The attempts are: as is; with `jitter`; in float64; on the CPU. The jitter is subtracted from
    the eigenvalues again, so that the null space keeps eigenvalue zero.

    Args:
        matrix: `[..., n, n]`; only finiteness is required.

    Returns:
        Eigenvalues `[..., n]`, ascending and clamped at zero, and eigenvectors `[..., n, n]` in
        columns; dtype and device of the input.

    Raises:
        DecompositionError: The matrix is not finite, or every attempt failed.
    """
    matrix = symmetrise(matrix)
    check_finite(matrix)

    def attempt(times: float, prepare: Preparation) -> tuple[Tensor, Tensor] | None:
        shift = times * jitter(matrix)
        values, vectors = torch.linalg.eigh(
            prepare(add_diagonal(matrix, shift) if times else matrix)
        )
        values = (values.to(matrix) - shift.unsqueeze(-1)).clamp(min=0)
        vectors = vectors.to(matrix)
        return (values, vectors) if _finite(values, vectors) else None

    return _in_every_way(matrix, attempt, "eigendecomposition", "the result was not finite")


def orthogonal_iteration(
    matrix: Tensor, vectors: Tensor, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do one step of simultaneous iteration on a symmetric positive semi-definite matrix.

        Q' R = M Q,    the columns of Q from the largest eigenvalue to the smallest

    Repeated, it converges to the eigenvectors, each at the ratio of its eigenvalue to the next
    larger one; |R_ii| then is the eigenvalue. If the matrix has changed little since `vectors` were
    its eigenvectors, one step is enough. It takes about half the operations of `eigh`.

    Vectors that spanned a null space of the last matrix say nothing of this one but that space.
    There the eigenvectors of M, restricted to it, take their place: so the result does not depend
    on which vectors `eigh` chose. Where that is most of the work, or M has lost rank elsewhere, or
    the iteration fails, M is decomposed anew.

    Args:
        matrix: `[..., n, n]`; only finiteness is required.
        vectors: Q, `[..., n, n]`, in the order of ascending eigenvalues, as `eigh` gives them.
        values: Their eigenvalues, `[..., n]`; `None` where all are known to be positive.

    Returns:
        |R_ii|, `[..., n]`, ascending, and the new basis in the same order, signs as in `vectors`.

    Raises:
        DecompositionError: The matrix is not finite, or cannot be decomposed.

    References:
        Golub & Van Loan, "Matrix Computations", section 8.2.4.
    """
    check_finite(matrix)
    null = 0 if values is None else int(null_mask(values).sum(-1).max())
    if 2 * null > matrix.shape[-1]:
        return eigh(matrix)
    if null > 1:
        chosen = vectors[..., :null]
        turn = eigh(chosen.mT @ matrix @ chosen)[1]
        vectors = torch.cat([chosen @ turn, vectors[..., null:]], -1)
    step = _orthonormalised(matrix @ vectors.flip(-1))
    if step is None:
        return eigh(matrix)
    found, order = step[0].sort(-1)
    turned = _columns(step[1], order)
    lost = values is not None and int(null_mask(found).sum(-1).max()) > null
    return eigh(matrix) if lost else (found, turned)


def followed(matrix: Tensor, vectors: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Do one step of orthogonal iteration that keeps each vector in its column.

    It is the step of `orthogonal_iteration`, with the vectors in the order of what M makes of them
    now, `q^T M q`, from the largest to the smallest. Column by column the result follows Q, so that
    what was measured along a vector goes on along its successor.

    Args:
        matrix: `[..., n, n]`; only finiteness is required.
        vectors: Q, `[..., n, n]`, in any order.
        values: Their eigenvalues, `[..., n]`.

    Returns:
        |R_ii|, `[..., n]`, and the new basis; `None` where M is to be decomposed anew: it has lost
        rank, most of Q spanned a null space, or the iteration failed.

    Raises:
        DecompositionError: The matrix is not finite.

    References:
        Vyas et al. 2024, arXiv:2409.11321, algorithm 4.
    """
    check_finite(matrix)
    null = int(null_mask(values).sum(-1).max())
    if 2 * null > matrix.shape[-1]:
        return None
    if null > 1:
        order = values.argsort(-1)
        ascending = _columns(vectors, order)
        chosen = ascending[..., :null]
        turn = eigh(chosen.mT @ matrix @ chosen)[1]
        vectors = _columns(torch.cat([chosen @ turn, ascending[..., null:]], -1), order.argsort(-1))
    products = matrix @ vectors
    order = torch.argsort((vectors * products).sum(-2), dim=-1, descending=True, stable=True)
    step = _orthonormalised(_columns(products, order))
    if step is None or int(null_mask(step[0]).sum(-1).max()) > null:
        return None
    back = order.argsort(-1)
    return step[0].gather(-1, back), _columns(step[1], back)


def _columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the columns of `[..., n, n]` in an order `[..., n]`."""
    return matrix.gather(-1, order.unsqueeze(-2).expand_as(matrix))


def _orthonormalised(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return |R_ii| and Q of `M = Q R` with R_ii >= 0; `None` where it fails."""
    try:
        reflectors, factors = torch.geqrf(matrix)  # unlike `qr`, it makes no copy of R
        orthogonal = torch.linalg.householder_product(reflectors, factors)
    except RuntimeError as error:
        if memory_ran_out(error):
            raise
        return None
    diagonal = reflectors.diagonal(dim1=-2, dim2=-1)
    found = orthogonal * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)
    return (diagonal.abs(), found) if _finite(found) else None


def cholesky(matrix: Tensor, shift: Tensor | float) -> Tensor:
    """Return the lower Cholesky factor of `M + shift I`.

    Where rounding makes it indefinite, the shift grows by a few times `jitter`.

    Args:
        matrix: `[..., n, n]`, symmetric positive semi-definite.
        shift: Number or `[...]`, positive.

    Raises:
        DecompositionError: The matrix is not finite, or every attempt failed.
    """
    matrix = symmetrise(matrix)
    check_finite(matrix)
    shifted = add_diagonal(matrix, shift)

    def attempt(times: float, prepare: Preparation) -> Tensor | None:
        lower, info = torch.linalg.cholesky_ex(
            prepare(add_diagonal(shifted, times * jitter(shifted)) if times else shifted)
        )
        lower = lower.to(matrix)
        return lower if not bool(info.any()) and _finite(lower) else None

    fault = "the factor is far from positive semi-definite"
    return _in_every_way(matrix, attempt, "Cholesky", fault)


def _finite(*tensors: Tensor) -> bool:
    """Return whether all numbers are finite: they are where their sum is, which is faster."""
    return all(bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all()) for t in tensors)


def _in_every_way(
    matrix: Tensor, attempt: Callable[[float, Preparation], T | None], what: str, fault: str
) -> T:
    """Return the first success of `attempt`, which takes what `_ATTEMPTS` holds.

    Where memory runs out on another device, only the attempt on the CPU is left.

    Args:
        matrix: The matrix.
        attempt: Returns `None` for a result that cannot be used.
        what: What is tried.
        fault: What is wrong with such a result.

    Raises:
        DecompositionError: Every attempt failed.
        RuntimeError: Memory ran out on the CPU: torch's own error.
    """
    failures: list[str] = []
    lacking = False
    for times, prepare in _ATTEMPTS:
        if lacking and prepare is not _on_cpu:
            continue
        try:
            found = attempt(times, prepare)
        # LinAlgError is a RuntimeError; what a device lacks may be a TypeError.
        except (RuntimeError, TypeError) as error:
            lacking = memory_ran_out(error)
            if lacking and (matrix.device.type == "cpu" or prepare is _on_cpu):
                raise
            failures.append(str(error).partition("\n")[0])
            continue
        if found is not None:
            return found
        failures.append(fault)
    raise DecompositionError(
        f"{what} failed in every way tried ({'; '.join(failures)}); {RAISE_DAMPING}"
    )


def jitter(matrix: Tensor) -> Tensor:
    """Return `eps * n * max|M|`, `[...]`, the size of rounding errors; positive also for zero."""
    info = torch.finfo(matrix.dtype)
    return (matrix.abs().amax((-2, -1)) * info.eps * matrix.shape[-1]).clamp(min=info.tiny)


def _as_is(matrix: Tensor) -> Tensor:
    return matrix


def _on_cpu(matrix: Tensor) -> Tensor:
    return matrix.cpu().double()


_ATTEMPTS: tuple[tuple[float, Preparation], ...] = (
    (0.0, _as_is),
    (1.0, _as_is),
    (8.0, Tensor.double),
    (64.0, _on_cpu),
)
"""Multiples of `jitter` to add, and the precision and device to try. `jitter` is always that of the
original precision: rounding there made the matrix indefinite, and float64 does not undo it."""


def check_finite(matrix: Tensor) -> None:
    """Raise a `DecompositionError` where a matrix holds NaN or inf."""
    if not _finite(matrix):
        raise DecompositionError(f"a factor holds NaN or inf; {RAISE_DAMPING}")


def damping_floor(mean: Tensor) -> Tensor:
    """Return the least damping that keeps a division by (scale + damping) finite.

    It is `eps * mean`, and at least the square root of the smallest normal number (1e-19 in
    float32), also for zero curvature.

    Args:
        mean: Mean diagonal of the curvature, any shape.
    """
    info = torch.finfo(mean.dtype)
    return (mean * info.eps).clamp(min=info.tiny**0.5)


def inner_products(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Return `<x, y>` pair by pair, `[len]`, on the first one's device.

    Each is computed in the wider precision of its two.
    """
    dots = []
    for x, y in zip(xs, ys, strict=True):
        if x.dtype != y.dtype:
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        dots.append(torch.dot(x.reshape(-1), y.reshape(-1)))
    device = xs[0].device
    return torch.stack([dot if dot.device == device else dot.to(device) for dot in dots])


def as_gradient(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor in the dtype and memory layout of its parameter.

    Fused update rules of torch read gradients without their strides. A tensor of another shape
    keeps its layout; torch refuses it.
    """
    tensor = tensor.to(parameter.dtype)
    if tensor.shape != parameter.shape or tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter).copy_(tensor)
