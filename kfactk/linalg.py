"""Pure linear algebra on the last two dimensions: Kronecker products, damped inverses, decompositions that survive bad input.

No hooks, no module state, no collectives. Matrices `V` are `[..., d_out, d_in]` and `vec` stacks columns, so that

    vec(L V R^T) = (R kron L) vec(V)                                                                (the vec trick)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfactk.errors import DecompositionError


def vec(matrix: Tensor) -> Tensor:
    """Stack the columns: `[..., d_out, d_in]` to `[..., d_in * d_out]`."""
    return matrix.transpose(-1, -2).flatten(-2)


def unvec(vector: Tensor, d_out: int, d_in: int) -> Tensor:
    """Inverse of `vec`: `[..., d_in * d_out]` to `[..., d_out, d_in]`."""
    return vector.reshape(*vector.shape[:-1], d_in, d_out).transpose(-1, -2)


def kron(a: Tensor, b: Tensor) -> Tensor:
    """Kronecker product over the last two dimensions, leading dimensions broadcast: `[..., m p, n q]`.

    Example:
        >>> kron(torch.eye(2), torch.tensor([[2.0]]))
        tensor([[2., 0.],
                [0., 2.]])
    """
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)


def block_diagonal(a: Tensor, b: Tensor) -> Tensor:
    """`[[a, 0], [0, b]]` over the last two dimensions; leading dimensions must agree."""
    m, n = a.shape[-1], b.shape[-1]
    out = a.new_zeros(*a.shape[:-2], m + n, m + n)
    out[..., :m, :m] = a
    out[..., m:, m:] = b
    return out


def mean_diagonal(matrix: Tensor) -> Tensor:
    """`trace / dimension`, `[...]`."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def symmetrise(matrix: Tensor) -> Tensor:
    """`(M + M^T) / 2`."""
    return (matrix + matrix.transpose(-1, -2)) / 2


def add_diagonal(matrix: Tensor, value: Tensor | float) -> Tensor:
    """`M + value I`; `value` is a number or `[...]`, one for each matrix."""
    out = matrix.clone()
    diagonal = out.diagonal(dim1=-2, dim2=-1)
    diagonal += value.unsqueeze(-1) if isinstance(value, Tensor) and value.ndim else value
    return out


def tikhonov_pi(mean_a: Tensor, mean_g: Tensor) -> Tensor:
    """`pi = sqrt((tr A / dim A) / (tr G / dim G))`, 1 where either trace is zero.

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
    """Eigenvalues below this fraction of the largest belong to the numerical null space of an n x n matrix."""
    return n * 1e-12 if dtype == torch.float64 else 4 * n**0.5 * torch.finfo(dtype).eps


def null_mask(eigenvalues: Tensor) -> Tensor:
    """Which directions are in the numerical null space, `[..., n]` boolean. All of them for a zero matrix."""
    largest = eigenvalues.amax(-1, keepdim=True)
    return eigenvalues <= null_tolerance(eigenvalues.dtype, eigenvalues.shape[-1]) * largest.clamp(
        min=0
    )


def pool_null(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Give the directions in `mask` along `dim` (-1 or -2) their shared mean, so that their choice inside the null space does not matter.

    Args:
        values: `[..., d_out, d_in]`.
        mask: `[..., d_in]` for `dim=-1`, `[..., d_out]` for `dim=-2`.
    """
    mask = mask.unsqueeze(-2 if dim == -1 else -1)
    count = mask.sum(dim, keepdim=True).clamp(min=1)
    pooled = torch.where(mask, values, 0.0).sum(dim, keepdim=True) / count
    return torch.where(mask, pooled, values)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition of symmetric positive semi-definite matrices that survives what LAPACK does not.

    Tries as it is, with a jitter of the rounding error's size, in float64, and on the CPU, in this order. The jitter is taken off the
    eigenvalues again, so that the null space stays one.

    Args:
        matrix: `[..., n, n]`; only finiteness is required.

    Returns:
        Eigenvalues `[..., n]`, ascending and clamped at zero, and eigenvectors `[..., n, n]` in columns; dtype and device of the input.

    Raises:
        DecompositionError: The matrix is not finite, or every attempt failed.
    """
    matrix = symmetrise(matrix)
    if not bool(torch.isfinite(matrix).all()):
        raise DecompositionError("a factor holds NaN or inf; it was not decomposed")
    failures = []
    for times, prepare in _ATTEMPTS:
        shift = times * jitter(matrix)
        try:
            values, vectors = torch.linalg.eigh(
                prepare(add_diagonal(matrix, shift) if times else matrix)
            )
        except (
            RuntimeError,
            TypeError,
        ) as error:  # LinAlgError is the first, float64 on MPS the second
            failures.append(str(error).partition("\n")[0])
            continue
        values, vectors = (values.to(matrix) - shift.unsqueeze(-1)).clamp(min=0), vectors.to(matrix)
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            return values, vectors
        failures.append("the result was not finite")
    raise DecompositionError(f"eigendecomposition failed in every way tried: {'; '.join(failures)}")


def orthogonal_iteration(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """One step of simultaneous iteration on a symmetric positive semi-definite matrix, from an orthonormal basis.

        Q' R = M Q,    the columns of Q from the largest eigenvalue to the smallest

    Repeated, it converges to the eigenvectors, each at the ratio of its eigenvalue to the next larger one; |R_ii| then is the eigenvalue.
    Of a matrix that has changed little since its eigenvectors were taken one step is enough, at about half the operations of `eigh`.

    Args:
        matrix: `[..., n, n]`; only finiteness is required.
        vectors: Q, `[..., n, n]`, in the order of ascending eigenvalues, as `eigh` gives them.

    Returns:
        |R_ii|, `[..., n]`, ascending, and the new basis in the same order; signs follow those of `vectors`.

    Raises:
        DecompositionError: The matrix is not finite, or the result is not.

    References:
        Golub & Van Loan, "Matrix Computations", section 8.2.4.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise DecompositionError("a factor holds NaN or inf; it was not decomposed")
    turned, triangle = torch.linalg.qr(matrix @ vectors.flip(-1))
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    values, order = diagonal.abs().sort(-1)
    found = (turned * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)).gather(
        -1, order.unsqueeze(-2).expand_as(turned)
    )
    if not bool(torch.isfinite(found).all()):
        raise DecompositionError("orthogonal iteration gave a result that was not finite")
    return values, found


def cholesky(matrix: Tensor, shift: Tensor | float) -> Tensor:
    """Lower Cholesky factor of `M + shift I`, growing the shift a little where rounding makes it indefinite.

    Args:
        matrix: `[..., n, n]`, symmetric positive semi-definite.
        shift: Number or `[...]`, positive.

    Raises:
        DecompositionError: The matrix is not finite, or every attempt failed.
    """
    matrix = symmetrise(matrix)
    if not bool(torch.isfinite(matrix).all()):
        raise DecompositionError("a factor holds NaN or inf; it was not decomposed")
    shifted, failures = add_diagonal(matrix, shift), []
    for times, prepare in _ATTEMPTS:
        try:
            lower, info = torch.linalg.cholesky_ex(
                prepare(add_diagonal(shifted, times * jitter(shifted)) if times else shifted)
            )
        except (RuntimeError, TypeError) as error:  # what a device lacks
            failures.append(str(error).partition("\n")[0])
            continue
        result: Tensor = lower.to(matrix)
        if not bool(info.any()) and bool(torch.isfinite(result).all()):
            return result
        failures.append("the factor is far from positive semi-definite")
    raise DecompositionError(f"Cholesky failed in every way tried: {'; '.join(failures)}")


def jitter(matrix: Tensor) -> Tensor:
    """What to add to the diagonal to make room for rounding, `[...]`: `eps * n * max|M|`, and something even for a zero matrix."""
    info = torch.finfo(matrix.dtype)
    return (matrix.abs().amax((-2, -1)) * info.eps * matrix.shape[-1]).clamp(min=info.tiny)


_ATTEMPTS: tuple[tuple[float, Callable[[Tensor], Tensor]], ...] = (
    (0.0, lambda matrix: matrix),
    (1.0, lambda matrix: matrix),
    (8.0, lambda matrix: matrix.double()),
    (64.0, lambda matrix: matrix.cpu().double()),
)
"""How many times `jitter` is added, and what precision and device follow. The jitter stays that of the precision the matrix was made
in: what made it indefinite was rounding there, which float64 does not undo."""


def damping_floor(mean: Tensor) -> Tensor:
    """Least damping for curvature whose mean diagonal is `mean`, so that a division by (scale + damping) stays finite.

    `eps * mean`, and never less than the square root of the smallest normal number (1e-19 in float32), zero curvature included.
    """
    info = torch.finfo(mean.dtype)
    return (mean * info.eps).clamp(min=info.tiny**0.5)


def inner_products(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """`<x, y>` pair by pair, `[len]`, on the first one's device, each in the wider precision of its two."""
    dots = []
    for x, y in zip(xs, ys, strict=True):
        if x.dtype != y.dtype:
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        dots.append(torch.dot(x.reshape(-1), y.reshape(-1)))
    device = xs[0].device
    return torch.stack([dot if dot.device == device else dot.to(device) for dot in dots])


def as_gradient(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor in the dtype and the memory layout of its parameter: torch's fused update rules read gradients without their strides."""
    tensor = tensor.to(parameter.dtype)
    fits = (
        tensor.shape != parameter.shape or tensor.stride() == parameter.stride()
    )  # of another shape: torch refuses it
    return tensor if fits else torch.empty_like(parameter).copy_(tensor)
