"""K-FAC for `nn.MultiheadAttention`: the projections of queries, keys, values and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from kfactk import (
    Layer,
    LayerCall,
    Replay,
    RowOrder,
    Samples,
    Statistic,
    Tensors,
    hookimpl,
)
from kfactk.options import whole
from kfactk.samples import DEFAULT_CHUNK_BYTES
from kfactk.stages import owner_of, parameter_at
from kfactk_stages.curvature._attention import TAGS, AttentionReplay
from kfactk_stages.curvature._calls import check_examples
from kfactk_stages.curvature._coverage import reason_against, reason_against_parameter
from kfactk_stages.curvature._groups import GroupedSamples, no_rows
from kfactk_stages.curvature._rows import JoinedSamples, LinearRows
from kfactk_stages.curvature._wide import WideSides

PACKED = ("in_proj", "in_proj_bias")
"""Parts whose parameter holds those of queries, keys and values, one below the other."""
IN_BIAS, OUT = "in_proj_bias", ("out_proj.weight", "out_proj.bias")


@attrs.frozen(kw_only=True)
class Attention(WideSides):
    """Kronecker-factored curvature of the projections in `nn.MultiheadAttention`.

    Queries, keys and values are linear maps of their inputs, and so is the output of the mixed
    values. For each of these with N examples, M likelihood terms and T positions an example

        A = (1/N) sum_n sum_t a a^T,    G = (1/(M T)) sum_n sum_t g g^T

    as in `kfac` with `spatial="sud"`. The module is several layers:

    - `in_proj`: `in_proj_weight` and `in_proj_bias` as a matrix `[3, E, E + 1]`, a group each for
      queries, keys and values.
    - `out_proj`: its weight and bias, `[E, E + 1]`.
    - Where keys or values have another width (`kdim`, `vdim`), `q_proj`, `k_proj` and `v_proj` are
      layers without bias, and `in_proj_bias` is one of its own, `[3, E, 1]` with a = 1.

    `bias_k` and `bias_v` (`add_bias_kv=True`) are left to the update rule.

    Inputs and gradients inside come from the call, which runs again in the Fisher pass with the
    same random state: with the dropout, the masks and the autocast of the call. The module says
    itself where the examples are (`batch_first`). An input without a dimension of examples is one
    example. The weights of the attention that the module returns (`need_weights=True`) are followed
    too: outputs and losses may depend on them.

    Args:
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.
        max_side: As for `kfac`, for the sides of each group.
        wide: As for `kfac`.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> module = nn.MultiheadAttention(4, 2, batch_first=True)
        >>> Attention().parts(module)["out_proj"]
        ('out_proj.weight', 'out_proj.bias')
        >>> layer = Layer("attn[in_proj]", module, ("in_proj_weight", "in_proj_bias"), "in_proj")
        >>> Attention().matrix(layer, layer.tensors()).shape
        torch.Size([3, 4, 5])

    References:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", arXiv:1503.05671.
        Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
        Architectures", arXiv:2311.00636.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"A", "G"})

    chunk_bytes: int = attrs.field(default=DEFAULT_CHUNK_BYTES, validator=whole(1))

    def unsupported(self, module: nn.Module) -> str | None:
        """Return why this module cannot be preconditioned exactly, or `None` when it can."""
        reason = reason_against(module, (nn.MultiheadAttention,), ())
        if reason is not None:
            return reason
        for names in _all_parts(module).values():
            for number, name in enumerate(names):
                owner, key = owner_of(module, name)
                reason = reason_against_parameter(
                    owner, key, required=not number and key != IN_BIAS
                )
                if reason is not None:
                    return reason if owner is module else f"in its out_proj, {reason}"
        return None

    def parts(self, module: nn.Module) -> Mapping[str, tuple[str, ...]]:
        """Return the parts of the module, each with its parameters' names."""
        return {
            part: tuple(name for name in names if parameter_at(module, name) is not None)
            for part, names in _all_parts(module).items()
            if parameter_at(module, names[0]) is not None
        }

    def replay(self, module: nn.Module) -> Replay:
        """Return how its calls run again."""
        return AttentionReplay()

    def same_call(self, module: nn.Module, other: nn.Module) -> bool:
        """Return whether two modules with the same parameters compute the same function."""
        names = ("num_heads", "dropout", "batch_first", "add_zero_attn")
        alike = all(getattr(module, name) == getattr(other, name) for name in names)
        return alike and super().same_call(module, other)

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Join weight and bias into `[d_out, d_in]`, or `[3, d_out, d_in]`, the bias last."""
        columns = [tensors[name] for name in layer.parameters]
        columns = [x if x.ndim == 2 else x.unsqueeze(-1) for x in columns]
        matrix = torch.cat(columns, -1)
        return matrix.view(len(TAGS), -1, matrix.shape[-1]) if layer.part in PACKED else matrix

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        rows = matrix.flatten(0, 1) if layer.part in PACKED else matrix
        like = layer.tensors()
        widths = [x.shape[1] if x.ndim == 2 else 1 for x in like.values()]
        columns = zip(like.items(), torch.split(rows, widths, -1), strict=True)
        return {name: column.reshape(x.shape) for (name, x), column in columns}

    def blank(self, layer: Layer) -> LayerCall:
        """Return one row of zeros; of a layer with groups, one of queries."""
        anchor, (d_out, d_in) = layer.anchor, self.sides(layer)
        zeros = partial(torch.zeros, dtype=anchor.dtype, device=anchor.device)
        tag = TAGS[0] if layer.part in PACKED else ""
        return LayerCall(zeros(1, 1, d_in - _has_bias(layer)), zeros(1, 1, d_out), tag=tag)

    def sides(self, layer: Layer) -> tuple[int, int]:
        """Return d_out and d_in of the layer's matrix, of a group."""
        anchor, groups = layer.anchor, len(TAGS) if layer.part in PACKED else 1
        columns = anchor.shape[1] if anchor.ndim == 2 else 0
        return len(anchor) // groups, columns + _has_bias(layer)

    @property
    def tells_examples_apart(self) -> bool:
        """False: A and G are sums over all rows."""
        return False

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """View calls inside the module as samples; several calls concatenate along T.

        Raises:
            CaptureError: The calls do not have the same number of examples.
        """
        check_examples(layer, (len(call.inputs) for call in calls))
        joined = partial(
            JoinedSamples,
            bias=_has_bias(layer),
            num_terms=num_terms,
            first=first,
            chunk_bytes=self.chunk_bytes,
        )
        if layer.part not in PACKED:
            return joined([LinearRows(call.inputs, call.gradient, call.scale) for call in calls])
        groups = []
        for tag in TAGS:
            rows = [LinearRows(c.inputs, c.gradient, c.scale) for c in calls if c.tag == tag]
            groups.append(joined(rows or [no_rows(calls[0])]))
        return GroupedSamples(groups, calls)

    def unfold(self, layer: Layer, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return the call with its rows as `[N, T, ...]`, as where sequences are windows."""
        inputs, gradient = order.unfold(call.inputs), order.unfold(call.gradient)
        return [attrs.evolve(call, inputs=inputs, gradient=gradient)]

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sums and counts of A and G, or of what stands for them."""
        if isinstance(samples, GroupedSamples):
            inputs = samples.of_inputs(self.input_sums)
            return inputs | samples.of_gradients(self._of_gradients)
        return self.input_sums(samples) | self._of_gradients(samples)

    def _of_gradients(self, samples: Samples) -> dict[str, Statistic]:
        return self.gradient_sums(samples, share=1 / max(1, samples.positions))


def _all_parts(module: Any) -> dict[str, tuple[str, ...]]:
    """Return the parts of a module with all parameters that they can have."""
    if module._qkv_same_embed_dim:
        return {"in_proj": ("in_proj_weight", IN_BIAS), "out_proj": OUT}
    apart = {f"{tag}_proj": (f"{tag}_proj_weight",) for tag in TAGS}
    return {**apart, IN_BIAS: (IN_BIAS,), "out_proj": OUT}


def _has_bias(layer: Layer) -> bool:
    return layer.parameters[-1].endswith("bias")


@hookimpl
def kfactk_curvatures() -> dict[str, type[Attention]]:
    """Provide `attention`."""
    return {"attention": Attention}
