"""Linear algebra on the last two dimensions: Kronecker products, and robust decompositions.

Pure: no hooks, no module state, no collectives. Matrices V are `[..., d_out, d_in]`, and `vec`
stacks columns, so that

    vec(L V R^T) = (R kron L) vec(V)                                        (the vec trick)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfactk.errors import LOWER_MEMORY, DecompositionError, memory_ran_out

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
    _check_finite(matrix)
    failures, lacking = [], []
    for times, prepare in _ATTEMPTS:
        shift = times * jitter(matrix)
        try:
            values, vectors = torch.linalg.eigh(
                prepare(add_diagonal(matrix, shift) if times else matrix)
            )
        # LinAlgError is a RuntimeError; float64 on MPS is a TypeError.
        except (RuntimeError, TypeError) as error:
            failures.append(str(error).partition("\n")[0])
            lacking.append(memory_ran_out(error))
            continue
        values, vectors = (values.to(matrix) - shift.unsqueeze(-1)).clamp(min=0), vectors.to(matrix)
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            return values, vectors
        failures.append("the result was not finite")
        lacking.append(False)
    tried = "; ".join(failures)
    remedy = LOWER_MEMORY if all(lacking) else RAISE_DAMPING
    raise DecompositionError(f"eigendecomposition failed in every way tried ({tried}); {remedy}")


def orthogonal_iteration(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Do one step of simultaneous iteration on a symmetric positive semi-definite matrix.

        Q' R = M Q,    the columns of Q from the largest eigenvalue to the smallest

    Repeated, it converges to the eigenvectors, each at the ratio of its eigenvalue to the next
    larger one; |R_ii| then is the eigenvalue. If the matrix has changed little since `vectors` were
    its eigenvectors, one step is enough. It takes about half the operations of `eigh`.

    Args:
        matrix: `[..., n, n]`; only finiteness is required.
        vectors: Q, `[..., n, n]`, in the order of ascending eigenvalues, as `eigh` gives them.

    Returns:
        |R_ii|, `[..., n]`, ascending, and the new basis in the same order, signs as in `vectors`.

    Raises:
        DecompositionError: The matrix is not finite, or the result is not.

    References:
        Golub & Van Loan, "Matrix Computations", section 8.2.4.
    """
    _check_finite(matrix)
    orthogonal, triangle = torch.linalg.qr(matrix @ vectors.flip(-1))
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    values, order = diagonal.abs().sort(-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)
    found = (orthogonal * signs).gather(-1, order.unsqueeze(-2).expand_as(orthogonal))
    if not bool(torch.isfinite(found).all()):
        raise DecompositionError(
            f"orthogonal iteration gave a result that was not finite; {RAISE_DAMPING}"
        )
    return values, found


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
    _check_finite(matrix)
    shifted, failures, lacking = add_diagonal(matrix, shift), [], []
    for times, prepare in _ATTEMPTS:
        try:
            lower, info = torch.linalg.cholesky_ex(
                prepare(add_diagonal(shifted, times * jitter(shifted)) if times else shifted)
            )
        except (RuntimeError, TypeError) as error:  # not implemented on this device
            failures.append(str(error).partition("\n")[0])
            lacking.append(memory_ran_out(error))
            continue
        result: Tensor = lower.to(matrix)
        if not bool(info.any()) and bool(torch.isfinite(result).all()):
            return result
        failures.append("the factor is far from positive semi-definite")
        lacking.append(False)
    tried = "; ".join(failures)
    remedy = LOWER_MEMORY if all(lacking) else RAISE_DAMPING
    raise DecompositionError(f"Cholesky failed in every way tried ({tried}); {remedy}")


def jitter(matrix: Tensor) -> Tensor:
    """Return `eps * n * max|M|`, `[...]`, the size of rounding errors; positive also for zero."""
    info = torch.finfo(matrix.dtype)
    return (matrix.abs().amax((-2, -1)) * info.eps * matrix.shape[-1]).clamp(min=info.tiny)


_ATTEMPTS: tuple[tuple[float, Callable[[Tensor], Tensor]], ...] = (
    (0.0, lambda matrix: matrix),
    (1.0, lambda matrix: matrix),
    (8.0, lambda matrix: matrix.double()),
    (64.0, lambda matrix: matrix.cpu().double()),
)
"""Multiples of `jitter` to add, and the precision and device to try. `jitter` is always that of the
original precision: rounding there made the matrix indefinite, and float64 does not undo it."""


def _check_finite(matrix: Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
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
