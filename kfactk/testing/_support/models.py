"""A small model for laws of whole recipes, and minimal stages for a problem with a known answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from kfactk.stages import Dot, GradientPair, Likelihood


class Scale(nn.Module):
    """A trained factor for each channel of `[N, C, L]`; no curvature knows this class."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, channels).unsqueeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        """Return `factor * x`."""
        return self.factor * x


class Net(nn.Module):
    """A convolution, a layer that no curvature supports, and two linear layers, in float64.

    It maps `[N, 2, 4]` to `[N, 3]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv1d(2, 3, 2), Scale(3)
        self.hidden, self.out = nn.Linear(9, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of three classes."""
        scaled = self.scale(torch.tanh(self.conv(x)))
        return self.out(torch.tanh(self.hidden(scaled.flatten(1))))  # type: ignore[no-any-return]


@attrs.frozen(eq=False)
class Squares:
    """Likelihood of `|y - f|^2 / 2`: a Gaussian of variance 1 around an output `[N, C]`.

    The Fisher information of the output is I.
    """

    def view(self, output: Tensor) -> Tensor:
        """Return the output as `[N, 1, C]`."""
        return output.unsqueeze(1)

    def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        """Return `None`: all weights are 1."""
        return None

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Return the output plus noise."""
        return view.detach() + torch.randn(view.shape, generator=generator, dtype=view.dtype)

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Return half the squared distance, up to a constant."""
        return (targets - view).square().sum(-1) / 2

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """Yield the unit vectors."""
        for column in torch.eye(view.shape[-1], dtype=view.dtype):
            yield column.expand(view.shape)


@attrs.frozen(eq=False)
class Columns:
    """Fisher stage without draws: one loss for each column of the likelihood's root.

    It is for outputs with one term for each example.
    """

    own_pass: ClassVar[bool] = True
    seed: ClassVar[int] = 0

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """Yield `sum_n <b_n, f_n>` for each column b."""
        for column in likelihood.root(view):
            yield (view * column).sum()


@attrs.frozen(eq=False)
class Unclipped:
    """The clip that changes nothing."""

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """Return the preconditioned gradients, and 1."""
        return [pair.preconditioned for pair in pairs], torch.ones(())


@attrs.frozen(eq=False)
class Still:
    """A likelihood whose draws for an example depend on that example's output alone.

    Args:
        original: The likelihood that does the rest.
    """

    original: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Draw each example's targets with its own generator; all generators have the same seed."""
        return torch.cat(
            [
                self.original.sample(row, torch.Generator(view.device).manual_seed(7))
                for row in torch.split(view, 1)
            ]
        )
