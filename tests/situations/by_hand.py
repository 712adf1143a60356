"""EKFAC's step in float64, written again: one example at a time, by plain autograd.

Nothing here uses kfactk. Layers are linear. `Hand` calls the model with one example,
takes the gradient of the layer's own parameters for each column of the likelihood's information,
and solves with the eigenvectors that A and G give. `dense` solves with the whole Fisher matrix,
which is the same for deep linear networks under a Gaussian likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kfactk
from kfactk import Optimizer

DAMPING, LR = 0.1, 0.5
EVERY = {"factor_every": 1, "scale_every": 1, "basis_every": 1, "factor_decay": 0.0}
"""Everything anew at each step: a step depends on no step before it."""
RUNNING = {"name": "ekfac", "scale": "running", "scale_decay": 0.0}
"""The basis that reads its scale from the mini-batch gradient, of the last step alone."""


def recipe(**options: Any) -> kfactk.Recipe:
    """Return the recipe that `Hand` writes again."""
    given = {"fisher": "exact", "update": "sgd", "lr": LR, "damping": DAMPING, "clip": "none"}
    return kfactk.build(**{"curvature": "kfac", "basis": "ekfac", **given, **EVERY, **options})


def bound(model: nn.Module, params: Any = None, **options: Any) -> Optimizer:
    """Bind that recipe."""
    return recipe(**options).bind(model, params)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def perceptron() -> nn.Sequential:
    """Return two linear layers, "0" and "2", the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(step: int, examples: int = 8) -> tuple[Tensor, Tensor]:
    """Return inputs of 4 columns and labels of 3 classes, the same each time for a step."""
    return draw(examples, 4, seed=step), (torch.arange(examples) + step) % 3


def root(information: Tensor) -> Tensor:
    """Return a matrix whose columns' outer products sum to the information."""
    values, vectors = torch.linalg.eigh(information)
    return vectors * values.clamp(min=0).sqrt()


def categorical(output: Tensor) -> list[Tensor]:
    """Return losses of one example whose gradients' outer products sum to its Fisher matrix."""
    p = output.detach().flatten().softmax(0)
    return columns(output, torch.diag(p) - torch.outer(p, p))


def bernoulli(output: Tensor) -> list[Tensor]:
    """Return them for independent binary labels."""
    p = output.detach().flatten().sigmoid()
    return columns(output, torch.diag(p * (1 - p)))


def gaussian(output: Tensor) -> list[Tensor]:
    """Return them for means of variance 1."""
    return columns(output, torch.eye(output.numel(), dtype=torch.float64))


def columns(output: Tensor, information: Tensor) -> list[Tensor]:
    """Return them for any information of one output."""
    return [(output.flatten() * column).sum() for column in root(information).T]


def reached(
    losses: Sequence[Tensor], calls: list[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Return the calls that the losses depend on."""
    if not calls or not losses:
        return []
    outputs = [output for _, output in calls]
    total = torch.stack(list(losses)).sum()
    found = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    return [call for call, gradient in zip(calls, found, strict=True) if gradient is not None]


def matrix_of(loss: Tensor, layer: Any) -> Tensor:
    """Return the gradient of a layer's own parameters, with the bias as its last column."""
    own = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    found = torch.autograd.grad(loss, own, retain_graph=True)
    return torch.cat([gradient.reshape(layer.out_features, -1) for gradient in found], 1)


class Hand:
    """The curvature of some linear layers, from examples that are given one by one.

    Args:
        model: Holds the layers.
        names: Their names.
        summed: Whether losses that `running` sees are sums over examples.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, summed: bool = False) -> None:
        self.summed = summed
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        self.terms = 0
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._whole: dict[str, list[Tensor]] = {name: [] for name in self.layers}

    def example(self, losses: Callable[..., Sequence[Tensor]], *given: Any, terms: int = 1) -> None:
        """Add one example: `losses(*given)` calls the model with it alone."""
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.layers}
        handles = [
            layer.register_forward_hook(
                lambda _, args, out, name=name: calls[name].append((args[0].detach(), out))
            )
            for name, layer in self.layers.items()
        ]
        found = list(losses(*given))
        for handle in handles:
            handle.remove()
        self.terms += terms
        for name, layer in self.layers.items():
            calls[name] = reached(found, calls[name])
            if not calls[name]:
                continue
            rows = torch.cat([given.reshape(-1, layer.in_features) for given, _ in calls[name]])
            if layer.bias is not None:
                rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
            self._inputs[name].append(rows)
            outputs = [output for _, output in calls[name]]
            for loss in found:
                at = torch.autograd.grad(loss, outputs, retain_graph=True)
                self._whole[name].append(matrix_of(loss, layer))
                gradients = torch.cat([g.reshape(-1, layer.out_features) for g in at])
                self._outputs[name].append(gradients / len(rows) ** 0.5)

    def gradients(self, name: str) -> Tensor:
        """Return the gradients of all examples and columns, as `[number, d_out, d_in]`."""
        return torch.stack(self._whole[name])

    def factors(self, name: str) -> dict[str, Tensor]:
        """Return A and G."""
        sides = {"A": torch.cat(self._inputs[name]), "G": torch.cat(self._outputs[name])}
        return {side: rows.mT @ rows / self.terms for side, rows in sides.items()}

    def solve(self, name: str, gradient: Tensor, damping: float = DAMPING) -> Tensor:
        """Return EKFAC's answer for a gradient."""
        whole, factors = self.gradients(name), self.factors(name)
        left, right = (torch.linalg.eigh(factors[side])[1] for side in ("G", "A"))
        scale = (left.mT @ whole @ right).square().sum(0) / self.terms
        return left @ ((left.mT @ gradient @ right) / (scale + damping)) @ right.mT

    def running(self, name: str, gradient: Tensor, damping: float = DAMPING) -> Tensor:
        """Return the answer with the scale of the mean gradient itself."""
        factors = self.factors(name)
        left, right = (torch.linalg.eigh(factors[side])[1] for side in ("G", "A"))
        found = left.mT @ gradient @ right
        scale = found.square() * (1 / self.terms if self.summed else self.terms)
        return left @ (found / (scale + damping)) @ right.mT

    def dense(self, name: str, gradient: Tensor, damping: float = DAMPING) -> Tensor:
        """Return the answer of the whole Fisher matrix."""
        rows = self.gradients(name).flatten(1)
        fisher = rows.mT @ rows / self.terms + damping * torch.eye(rows.shape[1]).double()
        return torch.linalg.solve(fisher, gradient.flatten()).view_as(gradient)

    def natural(
        self,
        loss: Tensor,
        *,
        damping: float = DAMPING,
        how: str = "solve",
        only: Sequence[str] | None = None,
    ) -> dict[Tensor, Tensor]:
        """Return the preconditioned gradient of a loss, by parameter of the layers."""
        found: dict[Tensor, Tensor] = {}
        for name in filter(self._whole.get, self.layers if only is None else only):
            layer = self.layers[name]
            answer = getattr(self, how)(name, matrix_of(loss, layer), damping)
            found[layer.weight] = answer[:, : layer.in_features]
            if layer.bias is not None:
                found[layer.bias] = answer[:, -1]
        return found

    def fill(self, loss: Tensor, rest: Iterable[nn.Parameter] = (), **options: Any) -> None:
        """Put the preconditioned gradient into `.grad`, and the plain one for the `rest`."""
        found = self.natural(loss, **options)
        for parameter in rest:
            if parameter not in found and parameter.requires_grad:
                [gradient] = torch.autograd.grad(
                    loss, [parameter], retain_graph=True, allow_unused=True
                )
                found |= {} if gradient is None else {parameter: gradient}
        for each, direction in found.items():
            each.grad = direction.detach().clone()


def take(rule: torch.optim.Optimizer, hand: Hand, loss: Tensor, **options: Any) -> None:
    """Take a step of a rule of torch on what `hand` preconditions; the rest is plain."""
    trained = [parameter for group in rule.param_groups for parameter in group["params"]]
    rule.zero_grad()
    hand.fill(loss, trained, **options)
    rule.step()


def sgd(model: nn.Module, lr: float = LR) -> torch.optim.SGD:
    """Return the rule of `recipe`."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def values(model: nn.Module) -> list[Tensor]:
    """Return copies of the parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    """Compare the parameters of two models, by name."""
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        torch.testing.assert_close(
            parameter.detach(),
            theirs[name].detach(),
            msg=lambda text, n=name: f"{n}: {text}",
            **tolerance,  # type: ignore[arg-type]
        )
