"""One run on one rank: a model with every kind of layer, its share of each batch, its results."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kfactk
from kfactk import Optimizer
from tests.equivalence.product import named

F64 = torch.float64
BATCH = 12
"""Examples of a batch: 1 to 4 ranks have equal parts of it."""
STEPS = 5
PERIODS = {"factor_every": 2, "scale_every": 3, "basis_every": 4}
"""Due in the five steps: all; nothing; the factors; the scale; the factors with the basis."""
VALUES = 2
"""Columns of the head of values."""
NUMBERS = {"lr": 0.02, "damping": 0.02, "weight_decay": 0.01}
Recipe = Mapping[str, Any]


class Mixed(nn.Module):
    """Convolutions, a table, attention, a GRU, norms that mix no examples, a layer called twice.

    Some parameters are frozen.

    Maps `[N, 2, s, s]` to `[N, 3]`, or to this and `[N, 2]` by the names of two heads.

    Args:
        taps: Size of the convolutions' kernels; s is twice that.
        heads: Whether there are two.

    The layer `wide` has more inputs than a batch has rows.
    """

    def __init__(self, taps: int = 2, *, heads: bool = False) -> None:
        super().__init__()
        self.conv, self.grouped, self.norm = (
            nn.Conv2d(2, 4, taps),
            nn.Conv2d(4, 4, taps, groups=2),
            nn.GroupNorm(2, 4),
        )
        self.frozen, self.attn, self.wide, self.rows = (
            nn.Linear(16, 16).requires_grad_(False),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(24, 5),
            nn.LayerNorm(5),
        )
        self.signs = nn.Embedding(2, 4)
        self.steps = nn.GRU(4, 4, batch_first=True)
        self.shared, self.out = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        self.out.bias.requires_grad_(False)
        # Softmax does not see the bias of keys: its gradient is rounding, which Adam enlarges.
        self.attn.in_proj_bias.requires_grad_(False)
        self.size = nn.Linear(5, VALUES) if heads else None

    def forward(self, x: Tensor) -> Any:
        signs = (x.mean((2, 3)) > 0).long()  # [N, 2]
        x = torch.tanh(self.norm(self.grouped(torch.tanh(self.conv(x)))))
        x = torch.tanh(self.frozen(x.flatten(1))).view(-1, 4, 4)
        x = torch.cat([x, self.signs(signs)], 1)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = self.steps(x)[0]
        x = torch.tanh(self.rows(self.wide(x.flatten(1))))
        x = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        return self.out(x) if self.size is None else {"kind": self.out(x), "size": self.size(x)}


class Heads(nn.Module):
    """Make the outputs of two heads of one output, `[N, C]`."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"kind": x, "size": torch.tanh(x[:, :VALUES])}


class Injected:
    """Return prepared targets of this rank's examples in place of draws, one set a draw."""

    def __init__(self) -> None:
        self._classes: Iterator[Tensor] = iter(())
        self._values: Iterator[Tensor] = iter(())

    def hand(self, classes: Tensor, values: Tensor) -> None:
        """Have `[K, N]` and `[K, N, 2]` ready for the next K draws of each head."""
        self._classes, self._values = iter(classes.unsqueeze(-1)), iter(values)

    def __call__(self, view: Tensor) -> Tensor:
        of_values = view[0].numel() == VALUES
        return next(self._values).view(view.shape) if of_values else next(self._classes)


@attrs.frozen(eq=False)
class Batch:
    """Examples of one step.

    Args:
        inputs: `[N, 2, s, s]`.
        classes: `[N]`.
        values: `[N, 2]`.
        drawn_classes: `[2, N]`, as if drawn.
        drawn_values: `[2, N, 2]`, likewise.
    """

    inputs: Tensor
    classes: Tensor
    values: Tensor
    drawn_classes: Tensor
    drawn_values: Tensor

    @classmethod
    def of(cls, step: int, taps: int) -> Batch:
        """The batch of a step, the same on every rank."""
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(BATCH, 2, 2 * taps, 2 * taps, generator=generator, dtype=F64)
        classes, drawn = (torch.randint(3, (k, BATCH), generator=generator) for k in (1, 2))
        values = torch.randn(3, BATCH, VALUES, generator=generator, dtype=F64)
        return cls(inputs, classes[0], values[0], drawn, values[1:])

    def part(self, rank: int, ranks: int) -> Batch:
        """What one rank has of it."""
        each = slice(rank, None, ranks)
        return Batch(
            *(self.inputs[each], self.classes[each], self.values[each]),
            *(self.drawn_classes[:, each], self.drawn_values[:, each]),
        )

    def loss(self, output: Any) -> Tensor:
        """The mean loss; of two heads the sum of both."""
        if isinstance(output, Tensor):
            return F.cross_entropy(output, self.classes)
        of_classes = F.cross_entropy(output["kind"], self.classes)
        return of_classes + F.mse_loss(output["size"], self.values)


@attrs.frozen(eq=False)
class Outcome:
    """The results of a run on one rank.

    Args:
        tensors: Parameters; the averaged factors that this rank holds; products of the
            preconditioner, and of F in the measured scale, with fixed vectors, which do not depend
            on the choice of eigenvectors.
        bits: A digest of each tensor in the optimizer's state, and of each parameter.
        counters: Skipped batches and failed decompositions.
        layers: How many layers are preconditioned.
    """

    tensors: Mapping[str, Tensor]
    bits: Mapping[str, str]
    counters: Mapping[str, int]
    layers: int


def model(recipe: Recipe, taps: int) -> nn.Module:
    """The same on every rank: `Mixed`, or for stacked experts a mixture, with two tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if {"name": "experts"} in named(recipe["curvature"]):
            mixture = importlib.import_module("tests.kfactk_stages.curvature.mixture")
            tokens = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(2))
            heads = [Heads()] if "likelihood" in recipe else []
            return nn.Sequential(tokens, mixture.Mixture(has_bias=True), *heads).to(F64)
        return Mixed(taps, heads="likelihood" in recipe).to(F64)


def built(recipe: Recipe, placement: Any, drawn: Injected) -> kfactk.Recipe:
    """The recipe, its draws injected."""
    fisher = (
        {"name": recipe["fisher"]} if isinstance(recipe["fisher"], str) else dict(recipe["fisher"])
    )
    if fisher["name"] == "mc":
        fisher["draw"] = drawn
    changes: dict[str, Any] = {"fisher": fisher, "placement": placement}
    if "controller" in recipe:
        changes |= {"weight_decay_at": "gradient", "lr": kfactk.build().lr}
    periods = {"factor_every": 2} if "pace" in recipe else PERIODS
    return kfactk.build(**{**NUMBERS, **periods, **recipe, **changes})


def train(recipe: Recipe, placement: Any, taps: int, rank: int, ranks: int) -> Outcome:
    """Some steps of one recipe, in a process group where one is initialised."""
    drawn, module = Injected(), model(recipe, taps)
    wrapped = DistributedDataParallel(module) if torch.distributed.is_initialized() else module
    optimizer = built(recipe, placement, drawn).bind(wrapped)
    for step in range(STEPS):
        batch = Batch.of(step, taps).part(rank, ranks)
        drawn.hand(batch.drawn_classes, batch.drawn_values)

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = batch.loss(wrapped(batch.inputs))
            loss.backward()
            return loss

        if "controller" in recipe:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    outcome = Outcome(
        tensors_of(optimizer, module),
        bits(optimizer, module),
        optimizer.counters,
        len(optimizer.layers),
    )
    optimizer.close()
    return outcome


def train_all(
    rank: int, ranks: int, recipes: Sequence[tuple[Recipe, int]], placement: Any
) -> list[Outcome]:
    """One after the other, on one rank of several; a job of `kfactk.testing._support.ranks`."""
    return [train(recipe, placement, taps, rank, ranks) for recipe, taps in recipes]


def tensors_of(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """See `Outcome`."""
    found = {
        f"parameter {name}": parameter.detach().clone()
        for name, parameter in module.named_parameters()
    }
    names = {parameter: name for name, parameter in module.named_parameters()}
    views = optimizer.layers.values()
    of_examples = {name for view in views for name in view.block.curvature.row_factors}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            factor = key.removeprefix("kfactk.factor.")
            if factor in of_examples:  # ranks hold the examples in another order
                rows = value.flatten(1)
                found[f"{key} of {names[parameter]}, squared"] = rows.mT @ rows
            elif factor != key:
                found[f"{key} of {names[parameter]}"] = value.clone()
    for name, view in optimizer.layers.items():
        if not view.decomposition:
            continue
        generator = torch.Generator().manual_seed(1)
        probe = {
            key: torch.randn(each.shape, generator=generator, dtype=F64)
            for key, each in view.layer.tensors().items()
        }
        for key, tensor in view.precondition(probe).items():
            found[f"preconditioner on {name}.{key}"] = tensor.clone()
        if view.scale:
            found[f"scale on {name}"] = view.operator.multiply(view.matrix(probe)).clone()
    return found


def bits(optimizer: Optimizer, module: nn.Module) -> dict[str, str]:
    """See `Outcome`."""
    tensors = {f"parameter {name}": parameter for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        entries = optimizer.state.get(parameter, {})
        tensors |= {
            f"{key} of {name}": value for key, value in entries.items() if isinstance(value, Tensor)
        }
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }
