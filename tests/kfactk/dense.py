"""The first step of an optimizer in dense float64 algebra, one example at a time.

A problem is a model with a batch. `watch` runs it example by example with plain autograd. The other
functions turn what was seen into factors, dense blocks, preconditioned gradients and changed
parameters, each by its definition. Nothing here uses kfactk.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from kfactk.testing._support.truth import (
    TRANSPOSED,
    as_matrix,
    dense_kron,
    input_rows,
    moment,
    output_rows,
    outputs_first,
    solve,
    vec,
)

Scores = Callable[[Tensor, int], list[Tensor]]
"""From the output `[1, ...]` for one example, and its index, to scalars.

The outer products of their gradients sum to the example's part of M F.
"""


@attrs.frozen(eq=False)
class Seen:
    """What one layer saw: a list entry for each pass over the batch.

    Args:
        module: The layer.
        raw: Its inputs as called, one tensor for each use, examples in dim 0.
        inputs: Rows a, `[N, T, d_in]` (groups first).
        gradients: Rows g of each pass, `[N, T, d_out]`.
        products: D of each pass, from autograd on the parameters, `[N, d_out, d_in]`.
    """

    module: nn.Module
    raw: list[Tensor]
    inputs: Tensor
    gradients: list[Tensor]
    products: list[Tensor]


def watch(model: nn.Module, inputs: Tensor, scores: Scores, names: list[str]) -> dict[str, Seen]:
    """Run the model on each example alone and note what flows through the named layers."""
    per_example = [
        _watch_one(model, inputs[n : n + 1], lambda output, n=n: scores(output, n), names)
        for n in range(len(inputs))
    ]
    found = {}
    for name in names:
        module, ones = model.get_submodule(name), [example[name] for example in per_example]
        axis = 1 if getattr(module, "groups", 1) > 1 else 0
        raw = [torch.cat([one[0][call] for one in ones]) for call in range(len(ones[0][0]))]
        rows = torch.cat(
            [input_rows(module, each, bias=module.bias is not None) for each in raw], dim=-2
        )
        gradients = [
            torch.cat(
                [torch.cat([output_rows(module, g) for g in one[1][k]], dim=-2) for one in ones],
                dim=axis,
            )
            for k in range(len(ones[0][1]))
        ]
        products = [
            torch.stack([one[2][k] for one in ones], dim=axis) for k in range(len(ones[0][2]))
        ]
        found[name] = Seen(module, raw, rows, gradients, products)
    return found


def _watch_one(
    model: nn.Module, inputs: Tensor, scores: Callable[[Tensor], list[Tensor]], names: list[str]
) -> dict[str, tuple]:
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: calls[name].append((args[0].detach(), output))
        )
        for name in names
    ]
    losses = scores(model(inputs))
    for handle in handles:
        handle.remove()
    outputs = {name: [output for _, output in calls[name]] for name in names}
    own = {name: dict(model.get_submodule(name).named_parameters(recurse=False)) for name in names}
    flat = [each for name in names for each in (*outputs[name], *own[name].values())]
    rows: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    products: dict[str, list[Tensor]] = {name: [] for name in names}
    for loss in losses:
        gradients = iter(torch.autograd.grad(loss, flat, retain_graph=True))
        for name in names:
            rows[name].append([next(gradients) for _ in outputs[name]])
            of_parameters = {key: next(gradients) for key in own[name]}
            products[name].append(as_matrix(model.get_submodule(name), of_parameters))
    return {
        name: ([given for given, _ in calls[name]], rows[name], products[name]) for name in names
    }


def factors(seen: Seen, spatial: str, num_terms: float) -> dict[str, Tensor]:
    """A and G by their definitions; leading group dimension where the layer is grouped."""
    examples, positions = seen.inputs.shape[-3], seen.inputs.shape[-2]
    if spatial == "reduce":
        a = moment(seen.inputs.mean(-2, keepdim=True)) / examples
        return {
            "A": a,
            "G": sum(moment(g.sum(-2, keepdim=True)) for g in seen.gradients) / num_terms,
        }
    g = sum(moment(g) for g in seen.gradients) / (num_terms * positions)
    if spatial == "sua" and not isinstance(seen.module, nn.Linear):
        return {"A": _uncorrelated_activations(seen, positions), "G": g}
    return {"A": moment(seen.inputs) / examples, "G": g}


def _uncorrelated_activations(seen: Seen, positions: int) -> Tensor:
    """Return `blockdiag(T E[x x^T] kron I_taps, T)`, x the channels at one input position."""
    [raw], groups = seen.raw, seen.module.groups
    size, taps, bias = (
        raw.shape[1] // groups,
        math.prod(seen.module.kernel_size),
        seen.module.bias is not None,
    )
    blocks = []
    for k in range(groups):
        pixels = raw[:, k * size : (k + 1) * size].flatten(2).transpose(1, 2)
        omega = positions * moment(pixels) / (pixels.shape[0] * pixels.shape[1])
        block = raw.new_zeros(size * taps + bias, size * taps + bias)
        for i in range(size):
            for j in range(size):
                for tap in range(taps):
                    block[i * taps + tap, j * taps + tap] = omega[i, j]
        if bias:
            block[-1, -1] = positions
        blocks.append(block)
    return torch.stack(blocks) if groups > 1 else blocks[0]


def kfac_block(a: Tensor, g: Tensor, tau: float) -> Tensor:
    """`(A + pi sqrt(tau) I) kron (G + sqrt(tau) / pi I)`."""
    mean_a, mean_g = float(a.trace()) / len(a), float(g.trace()) / len(g)
    pi = math.sqrt(mean_a / mean_g) if mean_a > 0 and mean_g > 0 else 1.0
    eye_a, eye_g = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
    return dense_kron(a + pi * math.sqrt(tau) * eye_a, g + math.sqrt(tau) / pi * eye_g)


def each_group(groups: int | None, block: Callable[[Any], Tensor]) -> Tensor:
    """`block(k)` of each group, stacked; of the whole, `block(...)`, where there are no groups."""
    return block(...) if groups is None else torch.stack([block(k) for k in range(groups)])


def ekfac_block(u_a: Tensor, u_g: Tensor, scale: Tensor, tau: float) -> Tensor:
    """`Q diag(vec(scale) + tau) Q^T`, Q = U_A kron U_G."""
    q = dense_kron(u_a, u_g)
    return q @ torch.diag(vec(scale) + tau) @ q.T


def exact_scale(products: list[Tensor], u_a: Tensor, u_g: Tensor, num_terms: float) -> Tensor:
    """Return equation 10: squares of the projected per-example gradients, summed, over M."""
    total = u_a.new_zeros(len(u_g), len(u_a))
    for each in products:
        for d in each:
            total += (u_g.T @ d @ u_a) ** 2
    return total / num_terms


def pooled(
    scale: Tensor, a: Tensor, g: Tensor, u_a: Tensor, u_g: Tensor, tolerance: float
) -> Tensor:
    """Let directions with eigenvalues below `tolerance` times the largest share their mean."""
    scale = scale.clone()
    null_a, null_g = _null(a, u_a, tolerance), _null(g, u_g, tolerance)
    if null_a:
        for row in scale:
            row[null_a] = row[null_a].mean()
    if null_g:
        for column in scale.T:
            column[null_g] = column[null_g].mean()
    return scale


def _null(matrix: Tensor, vectors: Tensor, tolerance: float) -> list[int]:
    values = [float(v @ matrix @ v) for v in vectors.T]
    return [i for i, value in enumerate(values) if value <= tolerance * max(0.0, *values)]


def block_of(
    basis: str, a: Tensor, g: Tensor, products: Tensor, num_terms: float, tau: float
) -> Tensor:
    """The damped block of `kfac` or `ekfac` for A, G and the per-example gradients `[N, ...]`."""
    if basis == "kfac":
        return kfac_block(a, g, tau)
    u_a, u_g = (torch.linalg.eigh(each).eigenvectors for each in (a, g))
    scale = exact_scale([products], u_a, u_g, num_terms)
    return ekfac_block(u_a, u_g, pooled(scale, a, g, u_a, u_g, 1e-10), tau)


def stand_ins(side: str, matrix: Tensor, most: int, wide: str | None) -> dict[str, Tensor]:
    """What is kept of A or G, `[..., n, n]`, by name: more than `most` is wide, if anything is."""
    n, slots = matrix.shape[-1], torch.arange(matrix.shape[-1])
    if n <= most or wide is None:
        return {side: matrix}
    if wide == "blocks":
        parts = slots.tensor_split(math.ceil(n / most))
        return {f"{side}{k}": matrix[..., own, :][..., own] for k, own in enumerate(parts)}
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    if wide == "identity":
        diagonal = diagonal.mean(-1, keepdim=True).expand(diagonal.shape)
    return {side.lower(): diagonal}


def masked(matrix: Tensor, most: int, wide: str | None) -> Tensor:
    """What is kept of `[n, n]` as a whole matrix; see `stand_ins`."""
    parts = stand_ins("A", matrix, most, wide).values()
    return torch.block_diag(*(part.diag() if part.ndim == 1 else part for part in parts))


def is_eigenbasis(matrix: Tensor, vectors: Tensor, tolerance: float) -> bool:
    """Whether the columns are orthonormal and diagonalise the matrix."""
    turned = vectors.T @ matrix @ vectors
    off = turned - torch.diag(turned.diagonal())
    straight = (
        float((vectors.T @ vectors - torch.eye(len(vectors), dtype=vectors.dtype)).abs().max())
        <= tolerance
    )
    return straight and float(off.abs().max()) <= tolerance * max(float(matrix.abs().max()), 1e-30)


def preconditioned(
    seen: Seen,
    gradient: Tensor,
    *,
    spatial: str,
    basis: str,
    num_terms: float,
    tau: float,
    vectors: Mapping[str, Tensor],
    own: Tensor | None = None,
    tolerance: float = 1e-9,
    null: float = 1e-10,
) -> Tensor:
    """`block^-1 vec(gradient)` of one layer, group by group.

    Args:
        seen: What the layer saw.
        gradient: The mean gradient as the layer's matrix.
        spatial: "sud", "sua" or "reduce".
        basis: "kfac", "exact" (EKFAC) or "running" (EKFAC-ra).
        num_terms: M.
        tau: Damping.
        vectors: For EKFAC the eigenvectors of A and G, which are not unique; they are checked.
        own: The gradient that EKFAC-ra's scale is measured on, where it is not the same.
        tolerance: Of that check.
        null: Eigenvalues below this fraction of the largest belong to the null space.
    """
    whole, groups = factors(seen, spatial, num_terms), gradient.ndim == 3
    blocks = range(len(gradient)) if groups else [...]
    parts = []
    for k in blocks:
        a, g, v, products = whole["A"][k], whole["G"][k], gradient[k], [d[k] for d in seen.products]
        if basis == "kfac":
            parts.append(solve(kfac_block(a, g, tau), v))
            continue
        u_a, u_g = vectors["A"][k], vectors["G"][k]
        assert is_eigenbasis(a, u_a, tolerance)
        assert is_eigenbasis(g, u_g, tolerance)
        running = num_terms * (u_g.T @ (v if own is None else own[k]) @ u_a) ** 2
        scale = running if basis == "running" else exact_scale(products, u_a, u_g, num_terms)
        parts.append(solve(ekfac_block(u_a, u_g, pooled(scale, a, g, u_a, u_g, null), tau), v))
    return torch.stack(parts) if groups else parts[0]


def as_tensors(module: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
    """A layer's matrix as its weight and bias."""
    rows, shape = matrix.reshape(-1, matrix.shape[-1]), module.weight.shape
    weight = rows if module.bias is None else rows[:, :-1]
    if isinstance(module, TRANSPOSED):
        outputs = weight.reshape(len(rows), shape[0] // module.groups, *shape[2:])
        weight = outputs_first(outputs, module.groups)
    found = {"weight": weight.reshape(shape)}
    return found if module.bias is None else {**found, "bias": rows[:, -1]}


def clipped(
    kind: str,
    limit: float,
    gradients: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    lr: Mapping[str, float],
    damping: float = 0.0,
) -> dict[str, Tensor]:
    """The preconditioned gradients after clipping, by the formulas; `lr` by parameter name."""
    if kind == "none":
        return dict(changed)
    if kind == "value":
        return {name: p.clamp(-limit, limit) for name, p in changed.items()}
    if kind == "norm":
        norm = math.sqrt(sum(float(p.square().sum()) for p in changed.values()))
        return {name: p * min(1.0, limit / norm) for name, p in changed.items()}
    assert kind in ("kl", "trust_region")
    tau, bound = (0.0, limit) if kind == "kl" else (damping, 2 * limit)
    length = sum(
        lr[name] ** 2 * float(((gradients[name] - tau * p) * p).sum())
        for name, p in changed.items()
    )
    return {name: p * min(1.0, math.sqrt(bound / length)) for name, p in changed.items()}


def updated(
    kind: str | type,
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    lr: float,
    weight_decay: float = 0.0,
) -> dict[str, Tensor]:
    """Parameters after one step of the rule from a fresh start, with these gradients."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    if kind == "nag":  # equation 12 from v = 0, the model at the look-ahead point theta + alpha v
        alpha, out = 0.9, {}
        for name, parameter in parameters.items():
            v = -lr * (gradients[name] + weight_decay * parameter.detach())
            out[name] = parameter.detach() + v + alpha * v
        return out
    rules: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "momentum": lambda p, **options: torch.optim.SGD(p, momentum=0.9, **options),
        "velocity": torch.optim.SGD,  # its first step
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "radam": torch.optim.RAdam,
    }
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    rule = rules[kind] if isinstance(kind, str) else kind
    decay = (
        {"weight_decay": weight_decay}
        if isinstance(kind, str) or "weight_decay" in inspect.signature(kind).parameters
        else {}
    )
    rule(list(parameters.values()), lr=lr, **decay).step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def exact_scores(
    log_likelihoods: Callable[[Tensor, int], Iterator[tuple[Tensor, Tensor]]],
) -> Scores:
    """Return scores of the exact Fisher: each label's nll times the root of its probability."""

    def scores(output: Tensor, n: int) -> list[Tensor]:
        return [
            probability.detach().sqrt() * nll for probability, nll in log_likelihoods(output, n)
        ]

    return scores


def categorical_labels(output: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Probability and negative log-probability of each class for one example `[1, C]`."""
    for c in range(output.shape[1]):
        log_p = torch.distributions.Categorical(logits=output[0]).log_prob(torch.tensor(c))
        yield log_p.exp(), -log_p


@attrs.frozen(eq=False)
class Problem:
    """A model with one batch.

    Args:
        model: The model, float64.
        inputs: The batch, examples in dim 0.
        loss: The user's loss of the model's output for the whole batch.
        scores: Whose gradients make the Fisher matrix.
        num_terms: M.
    """

    model: nn.Module
    inputs: Tensor
    loss: Callable[[Tensor], Tensor]
    scores: Scores
    num_terms: float

    def gradients(self) -> dict[str, Tensor]:
        """The user's gradient, by parameter name."""
        parameters = dict(self.model.named_parameters())
        found = torch.autograd.grad(self.loss(self.model(self.inputs)), list(parameters.values()))
        return dict(zip(parameters, found, strict=True))

    def watch(self, kinds: tuple[type[nn.Module], ...]) -> dict[str, Seen]:
        """What the layers of these classes see."""
        names = [name for name, module in self.model.named_modules() if isinstance(module, kinds)]
        return watch(self.model, self.inputs, self.scores, names)


def layer_gradient(seen: Seen, name: str, gradients: Mapping[str, Tensor]) -> Tensor:
    """One layer's part of the gradients as its matrix."""
    own = [key for key, _ in seen.module.named_parameters(recurse=False)]
    return as_matrix(seen.module, {key: gradients[f"{name}.{key}"] for key in own})


def all_preconditioned(
    problem: Problem,
    seen: Mapping[str, Seen],
    vectors: Mapping[str, Mapping[str, Tensor]],
    *,
    applied: Mapping[str, Tensor] | None = None,
    **how: Any,
) -> dict[str, Tensor]:
    """The preconditioned form of a gradient, by parameter name, of the layers in `seen` only.

    Args:
        problem: What the curvature is measured on.
        seen: What its layers saw.
        vectors: For EKFAC the eigenvectors of each layer's factors.
        applied: The gradient; by default the problem's own.
        how: See `preconditioned`.
    """
    gradients, out = problem.gradients(), {}
    for name, each in seen.items():
        own = layer_gradient(each, name, gradients)
        matrix = own if applied is None else layer_gradient(each, name, applied)
        matrix = preconditioned(
            each, matrix, own=own, num_terms=problem.num_terms, vectors=vectors.get(name, {}), **how
        )
        out |= {f"{name}.{key}": tensor for key, tensor in as_tensors(each.module, matrix).items()}
    return out
