"""Ground truth in float64: per-example gradients by torch.func, dense matrices by plain loops.

Nothing here uses kfactk. A layer's gradient is the matrix `[d_out, d_in]`. Its columns are the
inputs in the order of `weight.reshape(d_out, -1)`, the bias last. Grouped convolutions have a
leading group dimension, `[groups, d_out/g, d_in]`. `D` is the stack of these matrices over
examples, `[N, d_out, d_in]` or `[groups, N, d_out/g, d_in]`. `vec` stacks columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LossOfOutput = Callable[[Tensor, Tensor], Tensor]
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weight is `[inputs, outputs / groups, *taps]`."""


def as_matrix(module: nn.Module, gradients: Mapping[str, Tensor]) -> Tensor:
    """Join `{"weight": ..., "bias": ...}` (bias optional) of one layer into its matrix."""
    groups = getattr(module, "groups", 1)
    weight = gradients["weight"]
    if isinstance(module, TRANSPOSED):
        weight = outputs_first(weight, groups)
    size = weight.shape[0] // groups
    blocks = []
    for k in range(groups):
        rows = [weight[k * size + i].flatten() for i in range(size)]
        if "bias" in gradients:
            rows = [
                torch.cat([row, gradients["bias"][k * size + i].reshape(1)])
                for i, row in enumerate(rows)
            ]
        blocks.append(torch.stack(rows))
    return torch.stack(blocks) if groups > 1 else blocks[0]


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """Return a weight `[inputs, outputs / groups, *taps]` as `[outputs, inputs / groups, *taps]`.

    Applied to the result, it is its own inverse.
    """
    size = weight.shape[0] // groups
    return torch.stack(
        [
            torch.stack([weight[k * size + i, j] for i in range(size)])
            for k in range(groups)
            for j in range(weight.shape[1])
        ]
    )


def stack_examples(module: nn.Module, matrices: list[Tensor]) -> Tensor:
    """Stack one matrix per example into D; the example dimension comes after the groups."""
    return torch.stack(matrices, dim=1 if getattr(module, "groups", 1) > 1 else 0)


def per_example_gradients(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: LossOfOutput,
    arguments: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x,),
) -> list[dict[str, Tensor]]:
    """Return the gradients of `loss(model(inputs[n:n+1]), targets[n:n+1])`, example by example.

    There is one for every parameter that requires it. `arguments` says what the model is called
    with.
    """
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def value(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, parameters, arguments(x)), y)

    gradient = torch.func.grad(value)
    return [gradient(trainable, inputs[n : n + 1], targets[n : n + 1]) for n in range(len(inputs))]


def layer_gradients(
    model: nn.Module, layer: str, inputs: Tensor, targets: Tensor, loss: LossOfOutput
) -> Tensor:
    """Return D of the layer called `layer` ("" for the model itself)."""
    module = model.get_submodule(layer)
    prefix = f"{layer}." if layer else ""
    matrices = []
    for gradients in per_example_gradients(model, inputs, targets, loss):
        own = {
            name: gradients[prefix + name]
            for name in ("weight", "bias")
            if prefix + name in gradients
        }
        matrices.append(as_matrix(module, own))
    return stack_examples(module, matrices)


def module_gradients(module: nn.Module, inputs: Tensor, cotangent: Tensor) -> Tensor:
    """Return D of one module whose output's gradient is `cotangent`.

    The examples are dimension 0 of both.
    """
    return layer_gradients(module, "", inputs, cotangent, lambda output, g: (output * g).sum())


def categorical_fisher_gradients(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """Return D of the exact Fisher of a softmax output `[N, C]`.

    There is one matrix for each example and class, times the root of the class' probability. So
    `dense_fisher(D, num_terms=N)` is F.
    """
    with torch.no_grad():
        probabilities = model(inputs).softmax(-1)
    parts = []
    for c in range(probabilities.shape[-1]):
        labels = torch.full((len(inputs),), c)
        parts.append(
            layer_gradients(model, layer, inputs, labels, nn.CrossEntropyLoss(reduction="sum"))
            * probabilities[:, c].sqrt().reshape(-1, 1, 1)
        )
    return torch.cat(parts, dim=-3)


def vec(matrix: Tensor) -> Tensor:
    """Stack the columns of one matrix `[m, n]`."""
    return torch.cat([matrix[:, j] for j in range(matrix.shape[1])])


def dense_fisher(gradients: Tensor, num_terms: float) -> Tensor:
    """Return `(1/M) sum_n vec(D_n) vec(D_n)^T` of D `[N, d_out, d_in]`.

    For D `[groups, N, ...]` there is one for each group.
    """
    if gradients.ndim == 4:
        return torch.stack([dense_fisher(block, num_terms) for block in gradients])
    size = gradients.shape[1] * gradients.shape[2]
    fisher = gradients.new_zeros(size, size)
    for matrix in gradients:
        fisher += torch.outer(vec(matrix), vec(matrix))
    return fisher / num_terms


def dense_kron(a: Tensor, b: Tensor) -> Tensor:
    """Return `A kron B` of two matrices, or of two stacks of matrices one by one."""
    if a.ndim == 3:
        return torch.stack([dense_kron(x, y) for x, y in zip(a, b, strict=True)])
    return torch.cat(
        [torch.cat([a[i, j] * b for j in range(a.shape[1])], 1) for i in range(a.shape[0])], 0
    )


def projected_square(gradients: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return `sum_n (L^T D_n R)^2`, elementwise square, of D `[N, d_out, d_in]`.

    For D `[groups, N, ...]` the rotations have the groups too.
    """
    if gradients.ndim == 4:
        sides = [
            (None if left is None else left[k], None if right is None else right[k])
            for k in range(len(gradients))
        ]
        return torch.stack(
            [projected_square(block, *side) for block, side in zip(gradients, sides, strict=True)]
        )
    left = torch.eye(gradients.shape[1], dtype=gradients.dtype) if left is None else left
    right = torch.eye(gradients.shape[2], dtype=gradients.dtype) if right is None else right
    return sum(
        ((left.T @ d @ right) ** 2 for d in gradients),
        torch.zeros_like(left.T @ gradients[0] @ right),
    )


def input_rows(module: Any, inputs: Tensor, *, bias: bool) -> Tensor:
    """Return the rows a_{n,t} that the layer's weight sees, `[N, T, d_in]`.

    Grouped layers have `[groups, N, T, d_in]`. Convolution patches are read index by index, padding
    included. The row of a transposed convolution holds what one output position sees.

    Args:
        module: The layer.
        inputs: Its input, examples in dimension 0.
        bias: Whether to append a 1 to each row.
    """
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if bias else rows
    groups = module.groups
    size = module.in_channels // groups
    read = _seen if isinstance(module, TRANSPOSED) else _patches
    stacks = [read(module, inputs[:, k * size : (k + 1) * size], bias) for k in range(groups)]
    return torch.stack(stacks) if groups > 1 else stacks[0]


def output_rows(module: Any, outputs: Tensor) -> Tensor:
    """Return a tensor shaped like the layer's output as rows, `[N, T, d_out]`.

    Grouped layers have `[groups, N, T, d_out/g]`.
    """
    if isinstance(module, nn.Linear):
        return outputs.reshape(len(outputs), -1, outputs.shape[-1])
    size = module.out_channels // module.groups
    blocks = [
        outputs[:, k * size : (k + 1) * size].flatten(2).transpose(1, 2)
        for k in range(module.groups)
    ]
    return torch.stack(blocks) if module.groups > 1 else blocks[0]


def _patches(module: Any, inputs: Tensor, bias: bool) -> Tensor:
    """Return `[N, T, C * taps (+ 1)]` of one group's channels, `[N, C, *S]`."""
    sizes, kernel, stride, dilation = (
        inputs.shape[2:],
        module.kernel_size,
        module.stride,
        module.dilation,
    )
    pads = [_pads(module, i) for i in range(len(sizes))]
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    outs = [
        (s + sum(p) - span) // st + 1
        for s, p, span, st in zip(sizes, pads, spans, stride, strict=True)
    ]
    rows = []
    for position in itertools.product(*(range(o) for o in outs)):
        columns = []
        for channel in range(inputs.shape[1]):
            for tap in itertools.product(*(range(k) for k in kernel)):
                at = [
                    p * st + t * d - pad[0]
                    for p, st, t, d, pad in zip(position, stride, tap, dilation, pads, strict=True)
                ]
                index = [_source(module.padding_mode, i, s) for i, s in zip(at, sizes, strict=True)]
                columns.append(
                    torch.zeros_like(inputs[:, 0].flatten(1)[:, 0])
                    if None in index
                    else inputs[(slice(None), channel, *index)]
                )
        if bias:
            columns.append(torch.ones_like(columns[0]))
        rows.append(torch.stack(columns, -1))
    return torch.stack(rows, 1)


def _seen(module: Any, inputs: Tensor, bias: bool) -> Tensor:
    """Return what each output position of a transposed convolution sees, `[N, T, C * taps (+ 1)]`.

    The pixel s reaches the output position `s * stride - padding + tap * dilation`.
    """
    outs = module(inputs.new_zeros(1, module.in_channels, *inputs.shape[2:])).shape[2:]
    zero = torch.zeros_like(inputs.flatten(1)[:, 0])
    rows = []
    for position in itertools.product(*map(range, outs)):
        columns = []
        for channel in range(inputs.shape[1]):
            for tap in itertools.product(*map(range, module.kernel_size)):
                index = []
                for dim, (t, k) in enumerate(zip(position, tap, strict=True)):
                    offset = t + module.padding[dim] - k * module.dilation[dim]
                    inside = 0 <= offset < inputs.shape[2 + dim] * module.stride[dim]
                    seen = inside and offset % module.stride[dim] == 0
                    index.append(offset // module.stride[dim] if seen else None)
                columns.append(zero if None in index else inputs[(slice(None), channel, *index)])
        if bias:
            columns.append(torch.ones_like(columns[0]))
        rows.append(torch.stack(columns, -1))
    return torch.stack(rows, 1)


def _pads(module: Any, i: int) -> tuple[int, int]:
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        total = module.dilation[i] * (module.kernel_size[i] - 1)
        return total // 2, total - total // 2
    return module.padding[i], module.padding[i]


def _source(mode: str, index: int, size: int) -> int | None:
    """Return where a padded position reads from; `None` for a zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return min(max(index, 0), size - 1)
    return -index if index < 0 else 2 * (size - 1) - index


def moment(rows: Tensor) -> Tensor:
    """Return `sum_n sum_t r r^T` of `[N, T, d]`, as a plain loop; one for each group, if any."""
    if rows.ndim == 4:
        return torch.stack([moment(block) for block in rows])
    total = rows.new_zeros(rows.shape[-1], rows.shape[-1])
    for row in rows.reshape(-1, rows.shape[-1]):
        total += torch.outer(row, row)
    return total


def unvec(vector: Tensor, d_out: int) -> Tensor:
    """Return the matrix of stacked columns: the inverse of `vec`."""
    return torch.stack([vector[i : i + d_out] for i in range(0, len(vector), d_out)], dim=1)


def solve(block: Tensor, matrix: Tensor) -> Tensor:
    """Return `block^-1 vec(matrix)`, as a matrix."""
    return unvec(torch.linalg.solve(block, vec(matrix)), matrix.shape[0])
