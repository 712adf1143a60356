"""K-FAC for stacked experts: the matrices of all experts of a mixture in one parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from kfactk import Layer, LayerCall, Replay, Samples, Statistic, Tensors, hookimpl
from kfactk.options import whole
from kfactk.samples import DEFAULT_CHUNK_BYTES
from kfactk.sides import side_of
from kfactk_stages.curvature._calls import check_examples
from kfactk_stages.curvature._coverage import (
    plain_class,
    reason_against_parameter,
    stacks_experts,
)
from kfactk_stages.curvature._experts import SECOND, ExpertsReplay, first_part
from kfactk_stages.curvature._groups import GroupedSamples, no_rows
from kfactk_stages.curvature._rows import JoinedSamples, LinearRows
from kfactk_stages.curvature._wide import WideSides


class RoutedSamples(GroupedSamples):
    """Samples of experts, each with the tokens that the router gave it.

    Args:
        groups: The samples of each.
        calls: Their calls.
        tokens: How many tokens each got, `[experts]`.
    """

    def __init__(
        self, groups: Sequence[JoinedSamples], calls: Sequence[LayerCall], tokens: Tensor
    ) -> None:
        super().__init__(groups, calls)
        self.tokens = tokens

    def token_counts(self) -> Statistic:
        """Return how many tokens each expert got, `[experts, 1, 1]`, counted by examples."""
        if not self.first:
            return Statistic(None, 0.0)
        return Statistic(self.tokens.view(-1, 1, 1), float(self.examples), symmetric=True)


@attrs.frozen(kw_only=True)
class Experts(WideSides):
    """Kronecker-factored curvature of the stacked experts of transformers' mixtures.

    Such a module holds `[experts, d_out, d_in]` in one parameter, and computes with each expert
    what the router gave it. An expert is a group with factors of its own. With the R_e tokens of
    expert e, inputs a, output gradients g and M likelihood terms

        A_e = (1/R_e) sum a a^T,    G_e = (1/M) sum g g^T

    so that `A_e kron G_e` is the part of F that independent tokens would have. A token that an
    expert did not get adds nothing, so F is that of the trained mixture: an expert that is rarely
    chosen has little curvature. R_e is averaged over batches like the other sums.

    The module is two layers: its first projection (`gate_up_proj`, or `up_proj` without a gate) and
    `down_proj`, each with its bias. Inputs and gradients inside come from the call, which runs
    again in the Fisher pass. The experts see the tokens of all examples in one dimension, in the
    order of the examples; the model's output tells how many examples there are. With fisher
    `empirical` and `terms`, where there is no output, every token counts as an example.

    Args:
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.
        max_side: As for `kfac`, for the sides of each expert.
        wide: As for `kfac`.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> Experts().unsupported(nn.Linear(2, 2))
        'no curvature for Linear'

    References:
        Fedus, Zoph & Shazeer 2021, "Switch Transformers", arXiv:2101.03961, for the layer.
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", arXiv:1503.05671.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"A", "G"})

    chunk_bytes: int = attrs.field(default=DEFAULT_CHUNK_BYTES, validator=whole(1))

    def unsupported(self, module: nn.Module) -> str | None:
        """Return why this module cannot be preconditioned exactly, or `None` when it can."""
        name = plain_class(module).__name__
        if not stacks_experts(module):
            return f"no curvature for {name}"
        if not _is_dispatched(module):
            return (
                f"{name} computes its experts in a way of its own: only those that transformers "
                "dispatches (use_experts_implementation) are known"
            )
        if "forward" in vars(module):
            return "its forward was replaced on the instance, so what it computes is not known"
        return _reason_against_settings(module)

    def parts(self, module: nn.Module) -> Mapping[str, tuple[str, ...]]:
        """Return both projections, each with its parameters' names."""
        own = module._parameters
        return {
            part: tuple(n for n in (part, f"{part}_bias") if own.get(n) is not None)
            for part in (first_part(module), SECOND)
        }

    def replay(self, module: nn.Module) -> Replay:
        """Return how its calls run again."""
        return ExpertsReplay()

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Join weight and bias into `[experts, d_out, d_in]`, the bias last."""
        weight = tensors[layer.parameters[0]]
        weight = weight.mT if _is_transposed(layer) else weight
        columns = [weight, *(tensors[name].unsqueeze(-1) for name in layer.parameters[1:])]
        return torch.cat(columns, -1)

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        weight, *bias = layer.parameters
        width = matrix.shape[-1] - len(bias)
        own = matrix[..., :width]
        found = {weight: own.mT if _is_transposed(layer) else own}
        return found | dict.fromkeys(bias, matrix[..., -1])

    def blank(self, layer: Layer) -> LayerCall:
        """Return one row of zeros of the first expert."""
        anchor, (d_out, d_in) = layer.anchor, _columns(layer)
        zeros = partial(torch.zeros, dtype=anchor.dtype, device=anchor.device)
        return LayerCall(zeros(1, 1, d_in + 1), zeros(1, 1, d_out), tag="0")

    def sides(self, layer: Layer) -> tuple[int, int]:
        """Return d_out and d_in of the matrix of an expert."""
        d_out, d_in = _columns(layer)
        return d_out, d_in + len(layer.parameters) - 1

    @property
    def tells_examples_apart(self) -> bool:
        """False: A and G are sums over all rows."""
        return False

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """View the products inside as samples; several calls concatenate along T.

        Raises:
            CaptureError: The calls do not have the same number of examples.
        """
        check_examples(layer, (len(call.inputs) for call in calls))
        bias = len(layer.parameters) > 1
        rows: list[list[LinearRows]] = [[] for _ in layer.anchor]
        tokens = torch.zeros(len(rows), device=calls[0].inputs.device)  # whole numbers
        for call in calls:
            inputs = call.inputs if bias else call.inputs[..., :-1]
            rows[int(call.tag)].append(LinearRows(inputs, call.gradient, call.scale))
            tokens[int(call.tag)] += call.inputs[..., -1].sum(dtype=torch.float32)
        one = LayerCall(calls[0].inputs if bias else calls[0].inputs[..., :-1], calls[0].gradient)
        groups = [
            JoinedSamples(
                its or [no_rows(one)],
                bias=False,
                num_terms=num_terms,
                first=first,
                chunk_bytes=self.chunk_bytes,
            )
            for its in rows
        ]
        return RoutedSamples(groups, calls, tokens.to(groups[0].dtype))

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sums and counts of `A_e R_e / N`, of G_e, and of `R_e / N`, the tokens.

        What stands for A is that of `A_e R_e / N`, too.
        """
        assert isinstance(samples, RoutedSamples)
        return {
            **samples.of_inputs(self.input_sums),
            **samples.of_gradients(self.gradient_sums),
            "tokens": samples.token_counts(),
        }

    def makers(self, layer: Layer, factors: Tensors) -> dict[str, Callable[[], Tensor]]:
        """Return what makes A and G; A of an expert that got no token yet is zero."""
        own = {name: each for name, each in factors.items() if name != "tokens"}
        made = super().makers(layer, own)
        if "tokens" not in factors:
            return made
        return {
            name: partial(_per_token, make, factors["tokens"]) if side_of(name) == "A" else make
            for name, make in made.items()
        }


_SETTINGS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What transformers writes on experts that it dispatches."""


def _is_dispatched(module: nn.Module) -> bool:
    """Return whether transformers chooses how a module computes, and no subclass of its own."""
    written = getattr(inspect.getattr_static(type(module), "forward"), "__globals__", {})
    settings = all(hasattr(module, each) for each in _SETTINGS)
    return settings and written.get("__name__") == "transformers.integrations.moe"


def _reason_against_settings(module: Any) -> str | None:
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises what its experts return, which is not followed"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over ranks, and each rank sees some of their tokens"
    for part in (first_part(module), SECOND):
        names = [part, f"{part}_bias"] if module.has_bias else [part]
        for name in names:
            reason = reason_against_parameter(module, name, required=True)
            if reason is not None:
                return reason
    return None


def _per_token(make: Callable[[], Tensor], tokens: Tensor) -> Tensor:
    """Return a sum over the tokens of each expert divided by their number; zero where it is 0."""
    total = make()
    number = tokens.to(total.dtype).view(-1, *[1] * (total.ndim - 1))
    return torch.where(number > 0, total / number, 0.0)


def _columns(layer: Layer) -> tuple[int, int]:
    """Return d_out and d_in of an expert's weight."""
    weight = layer.anchor.mT if _is_transposed(layer) else layer.anchor
    return int(weight.shape[1]), int(weight.shape[2])


def _is_transposed(layer: Layer) -> bool:
    return bool(layer.module.is_transposed)


@hookimpl
def kfactk_curvatures() -> dict[str, type[Experts]]:
    """Provide `experts`."""
    return {"experts": Experts}
