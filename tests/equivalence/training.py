"""One run on one rank: a model with every kind of layer, its share of each batch, its results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kfactk
from kfactk import Optimizer

F64 = torch.float64
BATCH = 12
"""Examples of a batch: 1 to 4 ranks have equal parts of it."""
STEPS = 5
PERIODS = {"factor_every": 2, "scale_every": 3, "basis_every": 4}
"""Due in the five steps: all; nothing; the factors; the scale; the factors with the basis."""
NUMBERS = {"lr": 0.02, "damping": 0.02, "weight_decay": 0.01}
Recipe = Mapping[str, Any]


class Mixed(nn.Module):
    """Convolutions, a table, attention, a GRU, norms that mix no examples, a layer called twice.

    Some parameters are frozen.

    Maps `[N, 2, s, s]` to `[N, 3]`.

    Args:
        taps: Size of the convolutions' kernels; s is twice that.

    The layer `wide` has more inputs than a batch has rows.
    """

    def __init__(self, taps: int = 2) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        signs = (x.mean((2, 3)) > 0).long()  # [N, 2]
        x = torch.tanh(self.norm(self.grouped(torch.tanh(self.conv(x)))))
        x = torch.tanh(self.frozen(x.flatten(1))).view(-1, 4, 4)
        x = torch.cat([x, self.signs(signs)], 1)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = self.steps(x)[0]
        x = torch.tanh(self.rows(self.wide(x.flatten(1))))
        return self.out(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Injected:
    """Return prepared targets of this rank's examples in place of draws, one set a draw."""

    def __init__(self) -> None:
        self._sets: Iterator[Tensor] = iter(())

    def hand(self, sets: Tensor) -> None:
        """Have `[K, N]` ready for the next K draws."""
        self._sets = iter(sets.unsqueeze(-1))

    def __call__(self, view: Tensor) -> Tensor:
        return next(self._sets)


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


def model(taps: int) -> Mixed:
    """The same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Mixed(taps).to(F64)


def batch(step: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and two sets of targets as if drawn."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 2, 2 * taps, 2 * taps, generator=generator, dtype=F64)
    return (
        inputs,
        torch.randint(3, (BATCH,), generator=generator),
        torch.randint(3, (2, BATCH), generator=generator),
    )


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
    drawn, module = Injected(), model(taps)
    wrapped = DistributedDataParallel(module) if torch.distributed.is_initialized() else module
    optimizer = built(recipe, placement, drawn).bind(wrapped)
    for step in range(STEPS):
        inputs, targets, sets = batch(step, taps)
        drawn.hand(sets[:, rank::ranks])

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(wrapped(inputs[rank::ranks]), targets[rank::ranks])
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
