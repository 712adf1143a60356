"""A small model for laws of recipes, and reference stages written by their definitions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from kfactk.stages import Dot, GradientPair, Likelihood


class Scale(nn.Module):
    """A trained factor for each channel of `[N, C, L]`; no curvature supports this class."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, channels).unsqueeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        """`factor * x`."""
        return self.factor * x


class Net(nn.Module):
    """A convolution, an unsupported part, two linear layers: `[N, 2, 4]` to `[N, 3]`, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv1d(2, 3, 2), Scale(3)
        self.hidden, self.out = nn.Linear(9, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """The logits of three classes."""
        return self.out(torch.tanh(self.hidden(self.scale(torch.tanh(self.conv(x))).flatten(1))))  # type: ignore[no-any-return]


@attrs.frozen(eq=False)
class Squares:
    """Likelihood of `|y - f|^2 / 2`: Gaussian of variance 1; output `[N, C]`; Fisher I."""

    def view(self, output: Tensor) -> Tensor:
        """`[N, 1, C]`."""
        return output.unsqueeze(1)

    def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        """All 1."""
        return None

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """The output plus noise."""
        return view.detach() + torch.randn(view.shape, generator=generator, dtype=view.dtype)

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Half the squared distance, up to a constant."""
        return (targets - view).square().sum(-1) / 2

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """The unit vectors."""
        for column in torch.eye(view.shape[-1], dtype=view.dtype):
            yield column.expand(view.shape)


@attrs.frozen(eq=False)
class Columns:
    """Fisher stage without draws: a loss for each column of the likelihood's root."""

    own_pass: ClassVar[bool] = True
    seed: ClassVar[int] = 0

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """`sum_n <b_n, f_n>`."""
        for column in likelihood.root(view):
            yield (view * column).sum()


@attrs.frozen(eq=False)
class Unclipped:
    """The clip that leaves everything as it is."""

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """The preconditioned gradients, and 1."""
        return [pair.preconditioned for pair in pairs], torch.ones(())


@attrs.frozen(eq=False)
class Still:
    """A likelihood whose draws depend on each example's output alone; else it is the original.

    Args:
        original: The likelihood.
    """

    original: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Each example's targets are drawn by a generator of its own, all of one seed."""
        return torch.cat(
            [
                self.original.sample(row, torch.Generator(view.device).manual_seed(7))
                for row in torch.split(view, 1)
            ]
        )
