"""The basis of a chain over time: steps of a recurrent layer follow a linear Gaussian model."""

from __future__ import annotations

import abc
import functools
import math
from types import MappingProxyType

import attrs
import torch
from torch import Tensor

from kfactk import (
    Basis,
    CombinationError,
    CurvatureOperator,
    Decomposition,
    DecompositionError,
    FactorContext,
    Tensors,
    hookimpl,
    linalg,
)
from kfactk.options import choice

UNEQUAL = 1e-5
"""Variance of numbers of steps, relative to the square of their mean, above which they differ.

Below it they are roundings, or of sequences so long that one step more or less does not count.
"""
NEXT = MappingProxyType({"A": ("A_next",), "G": ("G_next",)})
"""For each side, the matrix of the rows of one step and of the step before."""


@attrs.frozen
class LinearGaussianModel(Basis):
    """Inverse of the curvature of a weight that each step of a sequence uses.

    A step t adds `x_t kron g_t` to the gradient, with x its inputs and g the gradient of its
    outputs. Over T steps

        F = sum_d (T - |d|) X_d kron Y_d,    X_d = E[x_{t+d} x_t^T],    Y_d = E[g_{t+d} g_t^T]

    and in a chain, where what comes depends on the step before alone, `X_d = Psi^d X_0` with `Psi =
    X_1 X_0^-1`, and likewise for Y. A and G of the curvature are the sums over steps, so that `A
    kron G = T X_0 kron Y_0`. With their next ones, after both sides were damped as in `kfac`,

        M = A^-1/2 A_next A^-1/2,    N = G^-1/2 G_next G^-1/2,    Psi = M kron N
        F = (A kron G)^1/2 B (A kron G)^1/2
        B = I + sum_{d=1}^{T-1} (1 - d/T) (Psi^d + Psi^d^T)

    - `option=1` takes the symmetric parts of M and N. With their eigenvalues m and n, B is
      diagonal, with the sum of `(1 - |d|/T) (m n)^|d|`. All sequences must have the same T.
    - `option=2` takes the limit of long sequences. It needs no symmetry, and no T:

        B = (I - Psi)^-1 + (I - Psi^T)^-1 - I,
        B^-1 = (I - Psi^T) (I - Psi Psi^T)^-1 (I - Psi)

      where `Psi Psi^T = M M^T kron N N^T` is diagonal in the eigenvectors of the two.

    Where steps do not correlate, both are `kfac`. Damping is that of the last refresh.

    Args:
        option: 1 or 2.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> basis, tau, one = LinearGaussianModel(), 0.0, torch.ones(1, 1)
        >>> matrices = {"A": 4 * one, "G": one, "A_next": 2 * one, "G_next": one}
        >>> means = {name: linalg.mean_diagonal(each) for name, each in matrices.items()}
        >>> parts = {}
        >>> for name in ("A", "G"):
        ...     beside = {each: matrices[each] for each in basis.beside[name]}
        ...     context = FactorContext(tau, means, beside=beside)
        ...     parts[name] = basis.decompose(name, matrices[name], context)
        >>> operator = basis.operator(parts, {}, tau, matrices)
        >>> operator.multiply(one)  # 4 (1 + 0.5) / (1 - 0.5)
        tensor([[12.]])

    References:
        Martens, Ba & Johnson 2018, "Kronecker-factored Curvature Approximations for Recurrent
        Neural Networks", ICLR, https://openreview.net/forum?id=HyMTkQZAb.
    """

    laws = frozenset({"rotation-equivariant", "null-space-independent", "exact-when-kronecker"})
    beside = NEXT
    damped_at = "refresh"
    measured_by = "curvature={'name': 'rnn', 'time': 'chain'}"
    forms = MappingProxyType(
        {"gains": "correlations", "root": "root", "next": "contraction", "number": "count"}
    )

    option: int = attrs.field(default=2, validator=choice(1, 2))

    @property
    def requires(self) -> frozenset[str]:
        """A and G, each with its next one beside it, and the number of steps where it counts."""
        return frozenset({"A", "G", "steps"} if self.option == 1 else {"A", "G"})

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return what solves with a side, or the number of steps.

        With the damped and balanced A, and M in the coordinates of its eigenvectors:

        - "gains": m of option 1, or the roots of the eigenvalues of `M M^T`, `[..., n]`;
        - "root": `A^-1/2 W`, W the eigenvectors of the symmetric part of M, or of `M M^T`,
          `[..., n, n]`;
        - "next" of option 2: `W^T M W`, `[..., n, n]`, whose rows are as long as the gains.

        For the steps it is `{"number": [1]}`, a whole number. Gains that roundings lift above 1 are
        1, and rows of "next" are shortened with them.

        Raises:
            DecompositionError: A matrix is not finite, cannot be decomposed, or the next one is
                larger than there can be beside it; or numbers of steps are those of no sequences.
            CombinationError: Numbers of steps differ, with `option=1`.
        """
        if name == "steps":
            return {"number": _same_number(matrix)}
        sides = linalg.balanced_sides(context.mean_diagonal["A"], context.mean_diagonal["G"])
        balance, least = sides[name]
        [following] = (context.beside[each] for each in NEXT[name])
        scale = balance[..., None, None]
        shift = least.clamp(min=context.damping**0.5)
        side = Whitened.of(matrix * scale, following * scale, shift)
        if self.option == 1:
            gains, turn = _symmetric(side.mixing)
        else:
            squares, turn = linalg.eigh(side.mixing @ side.mixing.mT)
            gains = squares.sqrt()
        if bool((gains.abs().amax(-1) > 1 + side.doubt).any()):
            raise DecompositionError(
                f"{name}_next is larger than that of any sequence with this {name} (ratio "
                f"{float(gains.abs().max()):.3g}, and at most 1). Raise damping, or take steps as "
                "independent: curvature='rnn', basis='kfac'"
            )
        root = side.vectors @ (side.damped.rsqrt()[..., :, None] * turn)
        found = {"gains": gains.clamp(-1, 1), "root": root}
        if self.option == 1:
            return found
        following = turn.mT @ side.mixing @ turn / gains.clamp(min=1)[..., :, None]
        return {**found, "next": following}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return F, which contains the damping of the refresh where it solves."""
        a, g = decomposition["A"], decomposition["G"]
        if self.option == 1:
            steps = decomposition["steps"]["number"]
            return SymmetricChain(a, g, matrices, chain_sum(a["gains"], g["gains"], steps), steps)
        middle = 1 - _outer(g["gains"].square(), a["gains"].square())
        return LongChain(a, g, matrices, middle.clamp(min=torch.finfo(middle.dtype).eps))


@attrs.frozen(eq=False)
class Whitened:
    """A damped side, and the next one in the coordinates in which this is the identity.

    Args:
        values: Eigenvalues l without damping, `[..., n]`.
        vectors: Eigenvectors U, `[..., n, n]`.
        damped: `l + s`, `[..., n]`.
        mixing: `(l + s)^-1/2 U^T A_next U (l + s)^-1/2`, `[..., n, n]`; zero where l is.
        doubt: How far roundings may lift its size above 1, `[...]`.
    """

    values: Tensor
    vectors: Tensor
    damped: Tensor
    mixing: Tensor
    doubt: Tensor

    @classmethod
    def of(cls, matrix: Tensor, following: Tensor, shift: Tensor) -> Whitened:
        """Return it for a side, its next one, and the damping s, `[...]`."""
        linalg.check_finite(following)
        values, vectors = linalg.eigh(matrix)
        damped = values + shift[..., None]
        known = damped.rsqrt().masked_fill(linalg.null_mask(values), 0)  # the rest is rounding
        mixing = known[..., :, None] * (vectors.mT @ following @ vectors) * known[..., None, :]
        eps, n = torch.finfo(values.dtype).eps, values.shape[-1]
        doubt = n * eps * (1 + values.amax(-1) * known.square().amax(-1))
        return cls(values, vectors, damped, mixing, doubt)


@attrs.define(eq=False)
class ChainOperator(CurvatureOperator):
    """`P V = K_G [B^-1 (K_G^T V K_A)] K_A^T`, with the roots K of the inverses of the sides.

    Args:
        a: What A was decomposed into.
        g: What G was.
        matrices: A, G, A_next and G_next; `multiply` reads them.
        middle: What is divided by between the roots, `[..., d_out, d_in]`.
    """

    a: Tensors
    g: Tensors
    matrices: Tensors
    middle: Tensor

    def solve(self, v: Tensor) -> Tensor:
        """Return P v, with the damping of the refresh."""
        left, right = self.g["root"].to(v.dtype), self.a["root"].to(v.dtype)
        return left @ self._divided(left.mT @ v @ right) @ right.mT

    def multiply(self, v: Tensor) -> Tensor:
        """Return F v, without damping."""
        sides = self._sides
        left, right = (each.vectors * each.values.sqrt().unsqueeze(-2) for each in sides)
        left, right = left.to(v.dtype), right.to(v.dtype)
        after, before = (each.mixing.to(v.dtype) for each in sides)
        return left @ self._multiplied(left.mT @ v @ right, after, before) @ right.mT

    def condition(self) -> Tensor:
        """Return a lower bound, by the diagonal of P."""
        diagonal = self._diagonal(self.g["root"], self.a["root"])
        smallest = diagonal.amin((-2, -1)).clamp(min=torch.finfo(diagonal.dtype).tiny)
        return (diagonal.amax((-2, -1)) / smallest).clamp(min=1).max()

    @functools.cached_property
    def _sides(self) -> tuple[Whitened, Whitened]:
        """G and A without damping."""
        found = []
        for name in ("G", "A"):
            matrix, [following] = self.matrices[name], (self.matrices[n] for n in NEXT[name])
            none = torch.zeros_like(linalg.mean_diagonal(matrix))
            found.append(Whitened.of(matrix, following, none))
        return found[0], found[1]

    @abc.abstractmethod
    def _divided(self, inside: Tensor) -> Tensor:
        """Return `B^-1` times a matrix between the roots."""

    @abc.abstractmethod
    def _multiplied(self, inside: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return B times a matrix between the roots without damping, where N and M are these."""

    @abc.abstractmethod
    def _diagonal(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the diagonal of `(R kron L) B^-1 (R kron L)^T`, `[..., d_out, d_in]`."""


@attrs.define(eq=False)
class SymmetricChain(ChainOperator):
    """Option 1: B is diagonal, and `middle`.

    Args:
        steps: T, `[1]`.
    """

    steps: Tensor

    def _divided(self, inside: Tensor) -> Tensor:
        return inside / self.middle.to(inside.dtype)

    def _multiplied(self, inside: Tensor, left: Tensor, right: Tensor) -> Tensor:
        (n, turn), (m, other) = _symmetric(left), _symmetric(right)
        found = (turn.mT @ inside @ other) * chain_sum(m.clamp(-1, 1), n.clamp(-1, 1), self.steps)
        return turn @ found @ other.mT

    def _diagonal(self, left: Tensor, right: Tensor) -> Tensor:
        return left.square() @ self.middle.reciprocal() @ right.square().mT


@attrs.define(eq=False)
class LongChain(ChainOperator):
    """Option 2: `middle` is `I - Psi Psi^T`, which is diagonal, with `Psi V = N V M^T`."""

    def _divided(self, inside: Tensor) -> Tensor:
        left, right = self.g["next"].to(inside.dtype), self.a["next"].to(inside.dtype)
        inside = (inside - left @ inside @ right.mT) / self.middle.to(inside.dtype)
        return inside - left.mT @ inside @ right

    def _multiplied(self, inside: Tensor, left: Tensor, right: Tensor) -> Tensor:
        inside = _summed(inside, left.mT, right)
        back = left.mT @ inside @ right
        return _summed(inside - left @ back @ right.mT, left, right.mT)

    def _diagonal(self, left: Tensor, right: Tensor) -> Tensor:
        weights = self.middle.reciprocal()
        left_next, right_next = left @ self.g["next"].mT, right @ self.a["next"].mT
        mixed = (left * left_next) @ weights @ (right * right_next).mT
        moved = left_next.square() @ weights @ right_next.square().mT
        return left.square() @ weights @ right.square().mT - 2 * mixed + moved


def chain_sum(m: Tensor, n: Tensor, steps: Tensor) -> Tensor:
    """Return `sum_d (1 - |d|/T) x^|d|` of all products `x = m n`, `[..., d_out, d_in]`.

        (1/T) (T (1 - x^2) - 2 x (1 - x^T)) / (1 - x)^2

    and near x = 1 the series in 1 - x, whose coefficients are binomial.

    Args:
        m: `[..., d_in]`, in [-1, 1].
        n: `[..., d_out]`, likewise.
        steps: T, `[1]`.

    Example:
        >>> m, n, steps = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([3.0])
        >>> chain_sum(m, n, steps)  # 1 + 2 (2/3 * 0.5 + 1/3 * 0.25)
        tensor([[1.8333]])
    """
    x = _outer(n, m)
    t = steps.to(x.dtype).clamp(min=1)
    apart = 1 - x
    closed = (t * apart * (1 + x) - 2 * x * (1 - x**t)) / (t * apart.square())
    series = t - (t.square() - 1) * apart / 3 + (t.square() - 1) * (t - 2) * apart.square() / 12
    eps = torch.finfo(x.dtype).eps
    return torch.where(t * apart > eps**0.25, closed, series).clamp(min=eps)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[..., :, None] * columns[..., None, :]


def _same_number(steps: Tensor) -> Tensor:
    """Return the number of steps that all sequences have, `[1]`.

    Args:
        steps: The means of T and T^2.

    Raises:
        CombinationError: They have not the same.
        DecompositionError: They are not finite, or no sequences have such means.
    """
    linalg.check_finite(steps)
    mean, square = steps[..., :1], steps[..., 1:2]
    variance, least = square - mean.square(), UNEQUAL * mean.square()
    if bool((variance < -least).any()):
        raise DecompositionError(
            f"no sequences have numbers of steps whose mean is {float(mean):.4g} and whose mean "
            f"square is {float(square):.4g}. Load an earlier checkpoint"
        )
    if bool((variance > least).any()):
        raise CombinationError(
            "basis 'lgm' with option=1 needs sequences that all have the same number of steps, and "
            f"here they have {float(mean):.4g} in the mean, with a standard deviation of "
            f"{math.sqrt(float(variance)):.2g}. Give basis={{'name': 'lgm', "
            "'option': 2}, or take steps as independent: curvature='rnn', basis='kfac'."
        )
    return mean.round().clamp(min=1)  # negative gains have powers of whole numbers alone


def _symmetric(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, of any sign, and eigenvectors of the symmetric parts of matrices."""
    matrix = linalg.symmetrise(matrix)
    bound = matrix.abs().sum(-1).amax(-1)
    values, vectors = linalg.eigh(linalg.add_diagonal(matrix, bound))
    return values - bound[..., None], vectors


def _summed(v: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return `sum_k L^k v R^k`, by squaring: it ends where a power no longer counts."""
    least = torch.finfo(v.dtype).eps
    for _ in range(64):
        v = v + left @ v @ right
        left, right = left @ left, right @ right
        if bool((left.square().sum() * right.square().sum()) < least**2):
            break
    return v


@hookimpl
def kfactk_bases() -> dict[str, type[LinearGaussianModel]]:
    """Provide `lgm`."""
    return {"lgm": LinearGaussianModel}
