"""K-FAC for `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells: the input and the hidden side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from kfactk import Layer, LayerCall, OptionError, Replay, Samples, Statistic, Tensors, hookimpl
from kfactk.options import choice, whole
from kfactk.samples import DEFAULT_CHUNK_BYTES, gram, total_of
from kfactk.sides import AUTO, slices_of
from kfactk_stages.curvature._calls import check_examples
from kfactk_stages.curvature._coverage import (
    CELLS,
    RECURRENT,
    reason_against,
    reason_against_parameter,
)
from kfactk_stages.curvature._recurrence import RecurrentReplay
from kfactk_stages.curvature._rows import JoinedSamples, LinearRows
from kfactk_stages.curvature._wide import WideSides

FACTORS = frozenset({"A", "G"})
"""What there is of independent steps."""
CHAIN = frozenset({"A_next", "G_next"})
"""What there is of a chain besides."""


class RecurrentSamples(JoinedSamples):
    """Samples of one product of a recurrent module; rows are steps, in the order of time.

    Args:
        calls: The calls.
        lengths: Number of steps of each example in each call, `[calls, N]`.
        backwards: Whether the last row of a call is its first step.
        num_terms, first, chunk_bytes: See `kfactk.Samples`.
    """

    def __init__(
        self,
        calls: Sequence[LinearRows],
        lengths: Tensor,
        *,
        backwards: bool,
        num_terms: Tensor | float,
        first: bool,
        chunk_bytes: int,
    ) -> None:
        super().__init__(
            calls, bias=False, num_terms=num_terms, first=first, chunk_bytes=chunk_bytes
        )
        self.lengths, self.backwards = lengths, backwards

    @property
    def weights(self) -> Tensor:
        """`T_n^(-1/2)`, T_n the number of steps of an example, `[N, 1, 1]`."""
        return self.lengths.sum(0).to(self.dtype).clamp(min=1).rsqrt().view(-1, 1, 1)

    def mean_gradients(self, rows: slice) -> Tensor:
        """Return `T_n^(-1/2) g` of the examples `rows`, `[n, T, d_out]`."""
        return self.gradients(rows) * self.weights[rows]

    def mean_grad_moment(self) -> Statistic:
        """Return `sum_n (1 / T_n) sum_t g g^T`, `[d_out, d_out]`."""
        parts = (
            gram(self.mean_gradients(rows)) for rows in self.chunks(2 * self.positions * self.d_out)
        )
        return Statistic(total_of(parts), self.num_terms, symmetric=True)

    def next_input_moment(self) -> Statistic:
        """Return `sum_n sum_t a_{t+1} a_t^T`, `[d_in, d_in]`, within each call."""
        if not self.first:
            return Statistic(None, 0.0)
        parts = (
            self._next(self.inputs(rows)) for rows in self.chunks(3 * self.positions * self.d_in)
        )
        return Statistic(total_of(parts), float(self.examples))

    def next_grad_moment(self) -> Statistic:
        """Return `sum_n (1 / T_n) sum_t g_{t+1} g_t^T`, `[d_out, d_out]`, within each call."""
        parts = (
            self._next(self.mean_gradients(rows))
            for rows in self.chunks(4 * self.positions * self.d_out)
        )
        return Statistic(total_of(parts), self.num_terms)

    def length_moments(self) -> Statistic:
        """Return `sum T` and `sum T^2` over the sequences, `[2]`: each example of each call."""
        if not self.first:
            return Statistic(None, 0.0)
        lengths = self.lengths.to(self.dtype)
        total = torch.stack([lengths.sum(), lengths.square().sum()])
        return Statistic(total, float(lengths.numel()), unrounded=True)

    def _next(self, rows: Tensor) -> Tensor:
        """Return `sum_n sum_t r_{t+1} r_t^T` of `[n, T, d]`: no pair spans two calls.

        Rows that an example does not have are zeros, and add nothing.
        """
        found = rows.new_zeros(rows.shape[-1], rows.shape[-1])
        for span in slices_of(call.positions for call in self.calls):
            call = rows[:, span]
            later, before = (each.flatten(0, 1) for each in (call[:, 1:], call[:, :-1]))
            found += before.mT @ later if self.backwards else later.mT @ before
        return found


@attrs.frozen(kw_only=True)
class Rnn(WideSides):
    """Kronecker-factored curvature of `nn.RNN`, `nn.LSTM`, `nn.GRU` and of their cells.

    A step multiplies the input x_t and the last state h_{t-1} with a weight each, for all gates at
    once. Each product is linear. For each one with N examples, M likelihood terms and T_n steps of
    example n

        A = (1/N) sum_n sum_t a a^T,    G = (1/M) sum_n (1/T_n) sum_t g g^T

    where a is the input of a step with a last 1 for the bias, and g the gradient of the product. It
    is `kfac` with `spatial="sud"`: steps count as independent. With `time="chain"` there are also

        A_next = (1/N) sum_n sum_t a_{t+1} a_t^T
        G_next = (1/M) sum_n (1/T_n) sum_t g_{t+1} g_t^T
        steps  = the means of T and of T^2 over all sequences

    for a basis that takes steps as a chain, such as `lgm`. Their counts are those of A and G, so
    that a sequence counts as if zeros were before and after it. The blocks `[[A, A_next^T],
    [A_next, A]]` are then positive semi-definite, also as running means. No pair spans two
    sequences: each example of each call is one. A chain of the reverse direction goes backwards.

    Each layer and direction of a module is several layers here, named by the end of its
    parameters' names:

    - `ih_l0`: `weight_ih_l0` and `bias_ih_l0`, a matrix `[gates H, d + 1]`. RNN has one gate, GRU
      three, LSTM four.
    - `hh_l0`: `weight_hh_l0` and `bias_hh_l0`, `[gates H, H + 1]`.
    - `hr_l0`: `weight_hr_l0`, `[proj_size, H]`, of an LSTM with `proj_size`.

    The parts of a cell are `ih` and `hh`.

    The two biases of a step are added, so they have the same gradient (in a GRU, but for the new
    gate). Each is the bias of its own layer and takes a step of its own, as under every other
    optimizer. Their sum, which alone matters, moves by both.

    Inputs and gradients inside come from the call, which runs again in the Fisher pass as a loop
    over time, with the same random state, autocast and initial states. All tensors that the module
    returns are followed: the output, h_n and c_n. Steps that an example of a packed sequence does
    not have count nowhere. An input without a dimension of examples is one example. Rows are in the
    order of the sequence, also in the reverse direction.

    Args:
        time: "independent" or "chain". The calls of a cell do not tell which of them are of one
            sequence, so a chain supports no cells. For the same reason, a module that is called
            step by step has sequences of one step, and no pairs.
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.
        max_side: As for `kfac`. With `time="chain"` every side is whole, whatever its length.
        wide: As for `kfac`, with `time="independent"`.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> module = nn.LSTM(2, 3, bidirectional=True)
        >>> list(Rnn().parts(module))
        ['ih_l0', 'hh_l0', 'ih_l0_reverse', 'hh_l0_reverse']
        >>> layer = Layer("lstm[hh_l0]", module, ("weight_hh_l0", "bias_hh_l0"), "hh_l0")
        >>> Rnn().matrix(layer, layer.tensors()).shape
        torch.Size([12, 4])

    References:
        Martens, Ba & Johnson 2018, "Kronecker-factored Curvature Approximations for Recurrent
        Neural Networks", ICLR, https://openreview.net/forum?id=HyMTkQZAb.
        Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
        Architectures", arXiv:2311.00636.
    """

    time: str = attrs.field(default="independent", validator=choice("independent", "chain"))
    chunk_bytes: int = attrs.field(default=DEFAULT_CHUNK_BYTES, validator=whole(1))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        limits = {"max_side": self.max_side not in (AUTO, None), "wide": self.wide is not None}
        if self.time == "chain" and any(limits.values()):
            name = next(name for name, given in limits.items() if given)
            raise OptionError(
                f"Rnn: {name}={getattr(self, name)!r} lets a side be less than a whole matrix, and "
                f"time='chain' needs whole ones. Leave {name} out, or take steps as independent, "
                "time='independent'."
            )

    @property
    def provides(self) -> frozenset[str]:
        """A and G, and what a chain has besides."""
        return FACTORS | CHAIN | {"steps"} if self.time == "chain" else FACTORS

    @property
    def must_be_read(self) -> frozenset[str]:
        """What a chain has besides."""
        return CHAIN if self.time == "chain" else frozenset()

    @property
    def default_basis(self) -> str | Mapping[str, Any] | None:
        """That of a chain; otherwise none."""
        return "lgm" if self.time == "chain" else None

    def unsupported(self, module: nn.Module) -> str | None:
        """Return why this module cannot be preconditioned exactly, or `None` when it can."""
        reason = reason_against(module, (*RECURRENT, *CELLS), ())
        if reason is not None:
            return reason
        if self.time == "chain" and isinstance(module, CELLS):
            return (
                "calls of a cell do not tell which of them are of one sequence, as time='chain' "
                "must know; use nn.RNN, nn.LSTM or nn.GRU, or take the cells as independent "
                "besides, curvature=[{'name': 'rnn', 'time': 'chain'}, "
                "kfactk.block('rnn', basis='kfac')]"
            )
        reasons = (
            reason_against_parameter(module, name, required=name.startswith("weight"))
            for name in _names(module)
        )
        found = next((each for each in reasons if each is not None), None)
        return found or _reason_against_dropout(module)

    def parts(self, module: nn.Module) -> Mapping[str, tuple[str, ...]]:
        """Return the parts of the module, each with its parameters' names."""
        weights = [name for name in _names(module) if name.startswith("weight")]
        return {
            weight.removeprefix("weight_"): tuple(
                name
                for name in (weight, weight.replace("weight", "bias"))
                if module._parameters.get(name) is not None
            )
            for weight in weights
        }

    def replay(self, module: nn.Module) -> Replay:
        """Return how its calls run again."""
        return RecurrentReplay()

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Join weight and bias into `[gates H, d (+ 1)]`, the bias last."""
        columns = [tensors[name] for name in layer.parameters]
        return torch.cat([x if x.ndim == 2 else x.unsqueeze(-1) for x in columns], -1)

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        width = layer.anchor.shape[1]
        weight, *bias = layer.parameters
        return {weight: matrix[:, :width], **dict.fromkeys(bias, matrix[:, -1])}

    def blank(self, layer: Layer) -> LayerCall:
        """Return one row of zeros."""
        d_out, d_in = layer.anchor.shape
        return LayerCall(
            layer.anchor.new_zeros(1, 1, d_in + 1), layer.anchor.new_zeros(1, 1, d_out)
        )

    def sides(self, layer: Layer) -> tuple[int, int]:
        """Return d_out and d_in of the layer's matrix."""
        d_out, d_in = layer.anchor.shape
        return int(d_out), int(d_in) + len(layer.parameters) - 1

    def is_wide(self, n: int, other: int) -> bool:
        """Return whether a side of n is not kept whole; those of a chain are."""
        return self.time != "chain" and super().is_wide(n, other)

    @property
    def tells_examples_apart(self) -> bool:
        """False: A and G are sums over all rows."""
        return False

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """View calls inside the module as samples; several calls concatenate along T.

        Inputs are `[N, T, d + 1]`; their last column is 1, or 0 where an example has no such step.

        Raises:
            CaptureError: The calls do not have the same number of examples.
        """
        check_examples(layer, (len(call.inputs) for call in calls))
        columns = slice(None) if len(layer.parameters) > 1 else slice(-1)
        rows = [
            LinearRows(
                call.inputs[..., columns],
                call.gradient.reshape(*call.inputs.shape[:-1], call.gradient.shape[-1]),
                call.scale,
            )
            for call in calls
        ]
        lengths = [call.inputs[..., -1].sum(-1, dtype=torch.float32) for call in calls]
        return RecurrentSamples(
            rows,
            torch.stack(lengths),
            backwards=layer.part.endswith("_reverse"),
            num_terms=num_terms,
            first=first,
            chunk_bytes=self.chunk_bytes,
        )

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sums and counts of all factors, or of what stands for them."""
        assert isinstance(samples, RecurrentSamples)
        whole, rows = samples.mean_grad_moment, samples.mean_gradients
        found = self.input_sums(samples) | self.gradient_sums(samples, whole, rows)
        if self.time == "chain":
            found |= {
                "A_next": samples.next_input_moment(),
                "G_next": samples.next_grad_moment(),
                "steps": samples.length_moments(),
            }
        return found


def _names(module: Any) -> list[str]:
    """Return the names that the parameters of a module have, also where one is missing."""
    if isinstance(module, CELLS):
        return ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    return [name for own in module._all_weights for name in own]


def _reason_against_dropout(module: Any) -> str | None:
    """Return why dropout between the layers of a module cannot be drawn again, or `None`."""
    if isinstance(module, CELLS) or module.num_layers == 1 or not module.dropout:
        return None
    fused = module.weight_ih_l0.is_cuda and torch.backends.cudnn.enabled
    return (
        "cuDNN draws the dropout between its layers, and nobody can draw it again; set "
        "torch.backends.cudnn.enabled = False, or write it as modules of one layer with nn.Dropout "
        "between them"
        if fused
        else None
    )


@hookimpl
def kfactk_curvatures() -> dict[str, type[Rnn]]:
    """Provide `rnn`."""
    return {"rnn": Rnn}
