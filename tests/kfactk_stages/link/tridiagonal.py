"""The matrix whose inverse the block-tridiagonal link claims, by sums over examples, and models."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Optimizer
from kfactk.testing._support.truth import dense_kron, vec
from tests.kfactk.small import F64
from tests.kfactk_stages.link import linking
from tests.kfactk_stages.link.linking import batch

RECIPE: dict[str, Any] = {**linking.RECIPE, "link": "block_tridiagonal"}


class Seen:
    """Inputs and output gradients of each layer of a model, by autograd, an example at a time.

    Rows are `[passes, N, T, d]`; inputs are the same in every pass.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], x: Tensor, scores: Any) -> None:
        self.model, self.names = copy.deepcopy(model), list(names)  # nobody follows a copy
        self.a: dict[str, list[Tensor]] = {name: [] for name in names}
        self.g: dict[str, list[Tensor]] = {name: [] for name in names}
        self.examples = len(x)
        for n in range(len(x)):
            self._watch(x[n : n + 1], scores)

    def _watch(self, x: Tensor, scores: Any) -> None:
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.names}
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name: calls[name].append((args[0].detach(), out))
            )
            for name in self.names
        ]
        losses = scores(self.model(x))
        for handle in handles:
            handle.remove()
        for name in self.names:
            module = self.model.get_submodule(name)
            rows = torch.cat([a.reshape(-1, a.shape[-1]) for a, _ in calls[name]])
            if module.bias is not None:
                rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], -1)
            self.a[name].append(rows)
            outputs = [out for _, out in calls[name]]
            passes = [
                torch.cat(
                    [
                        g.reshape(-1, g.shape[-1])
                        for g in torch.autograd.grad(loss, outputs, retain_graph=True)
                    ]
                )
                for loss in losses
            ]
            self.g[name].append(torch.stack(passes))  # [passes, T, d_out]

    def moment(self, side: str, one: str, other: str, *, reduce: bool = False) -> Tensor:
        """A or G of two layers, by sums over examples, rows and passes."""
        total: Any = 0
        for n in range(self.examples):
            if side == "A":
                a, b = self.a[one][n], self.a[other][n]
                if reduce:
                    a, b = a.mean(0, keepdim=True), b.mean(0, keepdim=True)
                total = total + sum(torch.outer(p, q) for p, q in zip(a, b, strict=True))
                continue
            for g, h in zip(self.g[one][n], self.g[other][n], strict=True):
                if reduce:
                    g, h = g.sum(0, keepdim=True), h.sum(0, keepdim=True)
                part: Any = sum(torch.outer(p, q) for p, q in zip(g, h, strict=True))
                total = total + part / len(g)
        return total / self.examples


def damped(a: Tensor, g: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g)))
    eye = functools.partial(torch.eye, dtype=F64)
    return a + pi * tau**0.5 * eye(len(a)), g + tau**0.5 / pi * eye(len(g))


"""From the side and two layers to A or G of the two."""


Moment = Callable[[str, str, str], Tensor]
"""From the side and two layers to A or G of the two."""


def claimed(moment: Moment, names: Sequence[str], tau: float, cut: Sequence[int] = ()) -> Tensor:
    """The matrix whose inverse is claimed, its blocks in the order of the layers.

    Its blocks on the diagonal and beside it are Kronecker products; the others are what makes its
    inverse block-tridiagonal: F_ik = F_ij F_jj^-1 F_jk for i < j < k.
    """
    blocks: dict[tuple[int, int], Tensor] = {}
    for i, one in enumerate(names):
        a, g = (moment(side, one, one) for side in "AG")
        blocks[i, i] = dense_kron(*damped(a, g, tau))
    for i, (one, other) in enumerate(itertools.pairwise(names)):
        blocks[i, i + 1] = torch.zeros(len(blocks[i, i]), len(blocks[i + 1, i + 1]), dtype=F64)
        if i not in cut:
            blocks[i, i + 1] = dense_kron(*(moment(side, one, other) for side in "AG"))
    for gap in range(2, len(names)):
        for i in range(len(names) - gap):
            j, k = i + gap - 1, i + gap
            blocks[i, k] = blocks[i, j] @ torch.linalg.solve(blocks[j, j], blocks[j, k])
    rows = [
        torch.cat(
            [blocks[i, k] if i <= k else blocks[k, i].T for k in range(len(names))],
            1,
        )
        for i in range(len(names))
    ]
    return torch.cat(rows)


def matrix_of(module: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    weight = tensors["weight"]
    return torch.cat([weight, tensors["bias"].unsqueeze(-1)], -1) if "bias" in tensors else weight


def joined(model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors by parameter name as one vector, layer by layer, columns of each matrix stacked."""
    parts = []
    for name in names:
        module = model.get_submodule(name)
        own = {k: tensors[f"{name}.{k}"] for k, _ in module.named_parameters()}
        parts.append(vec(matrix_of(module, own)))
    return torch.cat(parts)


def class_scores(output: Tensor) -> list[Tensor]:
    """Scalars whose gradients' outer products sum to M F of a classifier, an example."""
    terms = F.log_softmax(output, -1).reshape(-1, output.shape[-1])
    return [
        term[c] * term[c].exp().detach().sqrt() for term in terms for c in range(terms.shape[-1])
    ]


def net(depth: int, bias: bool) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(depth)
    sizes = [3, 4, 2, 3, 3][: depth + 1]
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=bias), nn.Tanh()]
    names = [str(2 * n) for n in range(depth)]
    return nn.Sequential(*layers[:-1]).to(F64), names


def data(d: int = 3, n: int = 7, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    return batch((d,), classes, n, seed)


def drawn(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=F64) for n, p in model.named_parameters()
    }


def assert_inverse(
    optimizer: Optimizer, model: nn.Module, names: Sequence[str], matrix: Tensor
) -> None:
    """Assert that the optimizer preconditions by the inverse of a matrix."""
    v = drawn(model)
    found = joined(model, names, optimizer.precondition(v))
    expected = torch.linalg.solve(matrix, joined(model, names, v))
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * size)
