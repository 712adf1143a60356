"""K-FAC for convolutions (KFC), transposed ones and linear layers; several views of positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, cast

import attrs
import torch
from torch import Tensor, nn

from kfactk import Layer, LayerCall, RowOrder, Samples, Statistic, Tensors, hookimpl
from kfactk.linalg import block_diagonal, kron, mean_diagonal
from kfactk.samples import gram, total_of
from kfactk.sides import is_diagonal
from kfactk_stages.curvature._coverage import CONVOLUTIONS, TRANSPOSED
from kfactk_stages.curvature._lags import lag_sums, tap_correlation
from kfactk_stages.curvature._on_demand import OnDemand
from kfactk_stages.curvature._rows import ConvRows, ImageRows, JoinedSamples, Rows
from kfactk_stages.curvature._transposed import TransposedRows, smallest, window_of
from kfactk_stages.curvature._unfold import Window
from kfactk_stages.curvature._wide import Reader, read
from kfactk_stages.curvature.kfac import Kfac, by_inputs, groups_of

OF_CHANNELS = {"Omega", "positions", "lags"}
"""Factors that are no matrices of the basis."""
IMAGES = (*CONVOLUTIONS, *TRANSPOSED)
"""Layers on images."""


@attrs.frozen(kw_only=True)
class ConvKfac(Kfac):
    """Kronecker-factored curvature of convolutions, transposed convolutions and linear layers.

    These are `nn.Conv1d` to `3d`, `nn.ConvTranspose1d` to `3d`, and what `kfac` covers.

    The row a_t of an example is the input patch at output position t. Its columns are in the order
    of `weight.reshape(d_out, -1)`, the bias last. Every stride, dilation, padding, padding mode and
    grouping is exact; grouped convolutions have one pair of factors a group. With N examples, M
    likelihood terms and T rows an example:

        sud:         A = (1/N) sum_n sum_t a a^T,           G = (1/(M T)) sum_n sum_t g g^T
        sua:         A = blockdiag(Omega kron I_taps, T),   G as in sud
                     Omega = T mean_{n,s} x x^T
        reduce:      A = (1/N) sum_n abar abar^T,           G = (1/M) sum_n gsum gsum^T
                     abar = mean_t a,   gsum = sum_t g
        stationary:  A = blockdiag(Omega kron K, T),        G as in sud
                     K = kron_axes R,   R_ij = r_{|i-j|} / r_0,   r_k = sum_{n,s} <x_s, x_{s+k}>

    Here x are the channels at input position s, without padding. The paper states "sua" with
    covariances; here x is not centred. The bias is a block of its own, since cross terms of taps
    and bias would make A indefinite. "stationary" is "sua" with the correlation K of taps that are
    k apart along one axis, the same everywhere and for each channel. For `nn.Linear` both are
    "sud".

    With "sua", every eigenvalue of A occurs once for each tap. So its eigenbasis, and an EKFAC step
    with it, depends on the eigensolver's choice. The K-FAC inverse does not, nor a basis made of C.

    A transposed convolution has a row for each output position, too: what this position sees of the
    input, one entry for each channel and tap, zero where a tap hits no pixel. That is a convolution
    of stride 1 over the input with the stride's zeros between its pixels. So the matrix is
    `[d_out / groups, channels * taps (+ 1)]`, the bias has its column, and every stride, padding,
    output padding (or `output_size` of the call), dilation and grouping is exact. "sua" and
    "stationary" have `Omega = sum_s x x^T`, since a tap sees each pixel once, and r_k = 0 for taps
    that are no whole number of pixels apart.

    The other view has a row for each input position: x_s, and the patch of gradients that it
    reaches. It gives the same D_n with sides of `channels` and `d_out * taps`. But the bias is no
    column there, and patches that overlap share gradients, so that rows are far from uncorrelated.
    `python -m benchmarks.transposed_rows` finds K-FAC farther from the Fisher matrix in that view
    wherever the kernel is larger than the stride, and as far where it is not. There, with the
    kernel as large as the stride, every tap sees every pixel: eigenvalues of A repeat as with
    "sua", `C kron I` loses nothing of A but the bias, and a basis of C is small.

    Bases that are a product of one of channels and one of taps use C and K: `C kron K` stands for A
    without its bias.

        sua, stationary:  C = Omega,                            K as above; the identity for sua
        sud, reduce:      C_{cd} = (1/taps) sum_k A_{ck,dk},    K_{kl} = sum_c A_{ck,cl} / tr C
        nn.Linear:        C = A, bias included,                 K = 1

    K has the mean diagonal 1. With "sua" and "stationary", A is formed only when it is read.

    Args:
        spatial: How the rows of one example are summed: "sud" (spatially uncorrelated derivatives),
            "sua" (spatially uncorrelated activations; the factor that is kept has the size of the
            channels), "reduce" (neither), or "stationary" (activations whose correlation depends on
            their distance only).
        batch_dim: Which dimension of a linear layer's inputs of rank 3 and more counts the
            examples, from the front.
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.
        max_side: As for `kfac`. Where A of a convolution is wide, C and K stay as they are; where
            the channels are, all three are as for "sud", and bases of channels use what stands for
            A.
        wide: As for `kfac`.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> layer = Layer("conv", nn.Conv2d(2, 4, 3, padding="same"), ("weight", "bias"))
        >>> call = LayerCall(torch.ones(5, 2, 6, 6), torch.ones(5, 4, 6, 6))
        >>> curvature = ConvKfac(spatial="sua")
        >>> samples = curvature.samples(layer, [call], num_terms=5, first=True)
        >>> factors = curvature.factors(layer, samples)
        >>> {name: tuple(s.total.shape) for name, s in factors.items()}
        {'Omega': (2, 2), 'positions': (), 'G': (4, 4)}
        >>> means = {name: s.total / s.count for name, s in factors.items()}
        >>> found = curvature.assemble(layer, means)
        >>> {name: tuple(found[name].shape) for name in sorted(found)}
        {'A': (19, 19), 'C': (2, 2), 'G': (4, 4), 'K': (9, 9)}

    References:
        Grosse & Martens 2016, "A Kronecker-factored approximate Fisher matrix for convolution
        layers", arXiv:1602.01407.
        Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
        Architectures", arXiv:2311.00636.
        Dangel 2024, "Convolutions and More as Einsum: A Tensor Network Perspective with Advances
        for Second-Order Methods", arXiv:2307.02275, the unfolded input of transposed convolutions.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"A", "C", "G", "K"})
    spatial_settings: ClassVar[tuple[str, ...]] = ("sud", "sua", "reduce", "stationary")
    covered: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, *IMAGES)

    def blank(self, layer: Layer) -> LayerCall:
        """Return zeros; for a convolution, of the size that padding mode and one patch need."""
        weight = layer.tensors()["weight"]
        if isinstance(layer.module, TRANSPOSED):
            sizes, outs = smallest(cast("nn.ConvTranspose2d", layer.module))
            zeros = partial(torch.zeros, dtype=weight.dtype, device=weight.device)
            outputs = weight.shape[1] * groups_of(layer.module)
            return LayerCall(zeros(1, weight.shape[0], *sizes), zeros(1, outputs, *outs))
        if not isinstance(layer.module, CONVOLUTIONS):
            return super().blank(layer)
        window = Window.of(cast("nn.Conv2d", layer.module))
        patch = [
            dilation * (taps - 1) + 1
            for taps, dilation in zip(window.kernel, window.dilation, strict=True)
        ]
        sizes = [max(size, max(window.pads) + 1) for size in patch]
        # The weight may be sharded, activations never are.
        zeros = partial(torch.zeros, dtype=weight.dtype, device=weight.device)
        inputs = zeros(1, weight.shape[1] * groups_of(layer.module), *sizes)
        positions = window.patches(inputs).shape[2 : 2 + len(sizes)]
        return LayerCall(inputs, zeros(1, weight.shape[0], *positions))

    def unfold(self, layer: Layer, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return the call with its rows as `[N, T, ...]`; images as T calls."""
        if isinstance(layer.module, IMAGES):
            return order.parts(call)
        return super().unfold(layer, call, order)

    def rows(self, layer: Layer, call: LayerCall) -> Rows:
        """Return one call as rows; for a convolution, they are patches."""
        module = layer.module
        if not isinstance(module, IMAGES):
            return super().rows(layer, call)
        batched = call.inputs.ndim == layer.tensors()["weight"].ndim
        inputs, gradient = (
            (call.inputs, call.gradient) if batched else (call.inputs[None], call.gradient[None])
        )
        if isinstance(module, TRANSPOSED):
            window = window_of(
                cast("nn.ConvTranspose2d", module), inputs.shape[2:], gradient.shape[2:]
            )
            return TransposedRows(inputs, gradient, call.scale, groups_of(module), window)
        window = Window.of(cast("nn.Conv2d", module))
        return ConvRows(inputs, gradient, call.scale, groups_of(module), window)

    def factor_rows(
        self, layer: Layer, samples: Samples, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor] | None:
        """Return the rows that A and G are sums over.

        There are none for convolutions without `spatial="reduce"`: rows of every position would
        take more memory than the model.
        """
        if isinstance(layer.module, IMAGES) and self.spatial != "reduce":
            return None
        return super().factor_rows(layer, samples, rows)

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sum and count of A; for "sua" and "stationary" of a convolution, of Omega.

        There T is added where there is a bias, and for "stationary" the products of pixels that are
        taps apart. Where A of a convolution is wide, C and K are measured beside its stand-ins.
        """
        if not self._by_channels(layer):
            factors = super().input_factors(layer, samples)
            if isinstance(layer.module, IMAGES) and self._keeps_channels(layer):
                factors |= tap_moments(layer, samples, self.input_reader(samples))
            return factors
        assert isinstance(samples, JoinedSamples)
        factors = {"Omega": channel_moment(samples)}
        if layer.bias:
            factors["positions"] = _positions(samples, factors["Omega"])
        if self.spatial == "stationary" and _taps(layer) > 1:
            factors["lags"] = lag_moment(samples)
        return factors

    def stand_ins(self, layer: Layer) -> Mapping[str, tuple[str, ...]]:
        """Return what stands for the sides of a layer that are wide.

        C and K of a convolution remain where C is not wide; elsewhere A's stand for C, too.
        """
        found = super().stand_ins(layer)
        channels = isinstance(layer.module, IMAGES) and not self._wide_channels(layer)
        return found if "A" not in found or channels else {**found, "C": found["A"], "K": ()}

    def _by_channels(self, layer: Layer) -> bool:
        """Return whether the input factor that is kept is Omega."""
        spatial = self.spatial in ("sua", "stationary") and isinstance(layer.module, IMAGES)
        return spatial and not self._wide_channels(layer)

    def _keeps_channels(self, layer: Layer) -> bool:
        """Return whether A is wide and C is not."""
        d_out, d_in = self.sides(layer)
        return self.is_wide(d_in, d_out) and not self._wide_channels(layer)

    def _wide_channels(self, layer: Layer) -> bool:
        """Return whether C would be too wide."""
        return self.is_wide(_channels(layer), self.sides(layer)[0])

    def assemble(self, layer: Layer, factors: Tensors) -> Tensors:
        """Return those of A, C, K and G that the factors determine, each made when it is read.

        Stand-ins come in place of what they stand for.
        """
        own = {name: each for name, each in factors.items() if name not in OF_CHANNELS}
        makers = self.makers(layer, own)
        if "Omega" in factors:
            makers |= self._of_channels(layer, factors)
        elif "A" in factors:
            a = factors["A"]
            makers |= {"C": partial(_over_channels, layer, a), "K": partial(_over_taps, layer, a)}
        elif "K" in factors:
            makers["K"] = partial(_of_mean_one, factors["K"])
        return OnDemand(makers)

    def _of_channels(self, layer: Layer, factors: Tensors) -> dict[str, Callable[[], Tensor]]:
        """Return what makes C, K, and A or what stands for it, of Omega."""
        correlation = partial(_correlation, layer, factors)
        found: dict[str, Callable[[], Tensor]] = {"C": lambda: factors["Omega"], "K": correlation}
        for name, columns in self.parts_of("A", *self.sides(layer)[::-1]).items():
            if is_diagonal(name):
                found[name] = partial(self._diagonal, layer, factors)
            elif name == "A":
                found[name] = lambda: _product(layer, factors, correlation())
            else:
                found[name] = partial(_block_of_product, layer, factors, columns)
        return found

    def _diagonal(self, layer: Layer, factors: Tensors) -> Tensor:
        """Return the diagonal of `blockdiag(Omega kron K, T)`, or its mean in each place."""
        a = _diagonal_of_product(layer, factors)
        return a.mean(-1, keepdim=True).expand(a.shape) if self.wide == "identity" else a


def _taps(layer: Layer) -> int:
    return math.prod(layer.tensors()["weight"].shape[2:])


def _channels(layer: Layer) -> int:
    """Return the input channels of a group of a layer on images."""
    shape = layer.tensors()["weight"].shape
    return int(shape[0] // groups_of(layer.module) if by_inputs(layer.module) else shape[1])


def _correlation(layer: Layer, factors: Tensors) -> Tensor:
    """Return K, `[..., taps, taps]`."""
    omega, kernel = factors["Omega"], layer.tensors()["weight"].shape[2:]
    if "lags" not in factors:
        return torch.eye(math.prod(kernel), dtype=omega.dtype, device=omega.device).expand(
            *omega.shape[:-2], -1, -1
        )
    return tap_correlation(factors["lags"], omega.diagonal(dim1=-2, dim2=-1).sum(-1), kernel)


def _product(layer: Layer, factors: Tensors, correlation: Tensor) -> Tensor:
    """Return `blockdiag(Omega kron K, T)`."""
    omega = factors["Omega"]
    a = kron(omega, correlation)
    return (
        block_diagonal(a, factors["positions"].to(omega.dtype).expand(*omega.shape[:-2], 1, 1))
        if layer.bias
        else a
    )


def _diagonal_of_product(layer: Layer, factors: Tensors) -> Tensor:
    """Return the diagonal of `blockdiag(Omega kron K, T)`, `[..., d_in]`."""
    omega, taps = factors["Omega"], _correlation(layer, factors)
    channels, each = (m.diagonal(dim1=-2, dim2=-1) for m in (omega, taps))
    found = (channels.unsqueeze(-1) * each.unsqueeze(-2)).flatten(-2)
    if not layer.bias:
        return found
    positions = factors["positions"].to(omega.dtype).expand(*omega.shape[:-2], 1)
    return torch.cat([found, positions], -1)


def _block_of_product(layer: Layer, factors: Tensors, columns: slice) -> Tensor:
    """Return rows and columns of `blockdiag(Omega kron K, T)`; the rest of it is never formed."""
    omega, taps = factors["Omega"], _correlation(layer, factors)
    many = taps.shape[-1]
    inside = min(columns.stop, omega.shape[-1] * many)
    index = torch.arange(columns.start, inside, device=omega.device)
    channel, tap = index // many, index % many
    found = omega[..., channel[:, None], channel] * taps[..., tap[:, None], tap]
    if inside == columns.stop:
        return found
    positions = factors["positions"].to(omega.dtype).expand(*omega.shape[:-2], 1, 1)
    return block_diagonal(found, positions)


def tap_moments(layer: Layer, samples: Samples, rows: Reader) -> dict[str, Statistic]:
    """Return `(1/taps) sum a_k a_k^T` over rows and taps k, and `sum a_c a_c^T` over channels c.

    They are counted by examples, and empty on later passes.

    Args:
        layer: A layer on images.
        samples: Its samples.
        rows: Reads the rows of some examples, `[..., n, T, channels * taps (+ 1)]`.
    """
    taps, totals = _taps(layer), dict[str, Tensor]()
    for each in read(samples, rows, samples.d_in) if samples.first else ():
        body = each[..., : samples.d_in - layer.bias]
        body = body.reshape(*each.shape[:-3], -1, body.shape[-1] // taps, taps)
        for name, part in (("C", gram(body.mT).div_(taps)), ("K", gram(body))):
            totals[name] = totals[name].add_(part) if name in totals else part
    count = float(samples.examples * samples.first)
    return {name: Statistic(totals.get(name), count, symmetric=True) for name in ("C", "K")}


def _over_channels(layer: Layer, a: Tensor) -> Tensor:
    """Return the mean of a convolution's A over taps, `[..., channels, channels]`.

    For any other layer it is A itself.
    """
    if not isinstance(layer.module, IMAGES):
        return a
    return _split(layer, a).diagonal(dim1=-3, dim2=-1).mean(-1)


def _over_taps(layer: Layer, a: Tensor) -> Tensor:
    """Return the sum of a convolution's A over channels, `[..., taps, taps]`, mean diagonal 1.

    It is the identity where the sum is zero.
    """
    if not isinstance(layer.module, IMAGES):
        return a.new_ones(*a.shape[:-2], 1, 1)
    return _of_mean_one(_split(layer, a).diagonal(dim1=-4, dim2=-2).sum(-1))


def _of_mean_one(k: Tensor) -> Tensor:
    """Return a matrix divided by its mean diagonal; the identity where that is zero."""
    mean = mean_diagonal(k)[..., None, None]
    return torch.where(
        mean > 0,
        k / torch.where(mean > 0, mean, 1.0),
        torch.eye(k.shape[-1], dtype=k.dtype, device=k.device),
    )


def _split(layer: Layer, a: Tensor) -> Tensor:
    """Return A without the bias as a view `[..., channels, taps, channels, taps]`."""
    taps, columns = _taps(layer), a.shape[-1] - layer.bias
    return a[..., :columns, :columns].view(
        *a.shape[:-2], columns // taps, taps, columns // taps, taps
    )


def channel_moment(samples: JoinedSamples) -> Statistic:
    """Return `sum_n T mean_s x x^T`, `[..., channels, channels]`, counted by examples."""
    return _over_pixels(
        samples, lambda call, rows: call.pixel_moment(rows, samples.dtype), symmetric=True
    )


def lag_moment(samples: JoinedSamples) -> Statistic:
    """Return `sum_n T mean_s <x_s, x_{s + k}>`, `[..., lags]`, counted by examples.

    The pixels are k = 1, 2, ... taps apart along each axis.
    """
    return _over_pixels(
        samples,
        lambda call, rows: lag_sums(
            call.inputs[rows].to(samples.dtype), call.window, call.spacing, call.groups
        ),
        symmetric=False,
    )


def _over_pixels(
    samples: JoinedSamples, summed: Callable[[ImageRows, slice], Tensor], *, symmetric: bool
) -> Statistic:
    """Return a sum over the pixels of all calls, times how often a tap sees one."""
    if not samples.first:
        return Statistic(None, 0.0)
    parts: list[Tensor] = []
    for call in samples.calls:
        assert isinstance(call, ImageRows)
        spatial = math.prod(call.inputs.shape[2:])
        parts += (
            summed(call, rows) * call.visits for rows in samples.chunks(spatial * call.channels)
        )
    return Statistic(total_of(parts), float(samples.examples), symmetric=symmetric)


def _positions(samples: Samples, moment: Statistic) -> Statistic:
    """Return T as a statistic with the count of `moment`.

    So batches of different resolution average.
    """
    if moment.total is None:
        return Statistic(None, moment.count)
    return Statistic(
        moment.total.new_tensor(float(samples.positions * samples.examples)), moment.count
    )


@hookimpl
def kfactk_curvatures() -> dict[str, type[ConvKfac]]:
    """Provide `conv_kfac`."""
    return {"conv_kfac": ConvKfac}
