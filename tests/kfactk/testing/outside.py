"""Correct likelihoods of an outside author: counts, and real numbers with a known correlation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributions as dist

from kfactk import CaptureError


class Poisson:
    """Counts; the output is log-rates."""

    def view(self, output: Tensor) -> Tensor:
        if not (output.is_floating_point() and output.requires_grad and 1 <= output.ndim <= 2):
            raise CaptureError(
                f"log-rates are [N] or [N, C], floating, with gradients, not {list(output.shape)}"
            )
        return output.reshape(len(output), 1, -1)

    def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        return None

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(view.detach().exp(), generator)

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        return (view.exp() - targets * view + (targets + 1).lgamma()).sum(-1)

    def root(self, view: Tensor) -> Iterator[Tensor]:
        for c in range(view.shape[-1]):
            column = torch.zeros_like(view.detach())
            column[..., c] = (view.detach()[..., c] / 2).exp()
            yield column


class Weighted(Poisson):
    def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if "w" not in batch:
            raise CaptureError("no w")
        if not bool(((batch["w"] >= 0) & batch["w"].isfinite()).all()):
            raise CaptureError("w is negative or not finite")
        return batch["w"].detach()


class Scaled(Poisson):
    """A real number, the output being its mean and log-variance."""

    def view(self, output: Tensor) -> Tensor:
        if output.ndim != 2 or output.shape[-1] != 2:
            raise CaptureError(f"mean and log-variance are [N, 2], not {list(output.shape)}")
        return super().view(output)

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(view.shape[:2], generator=generator, dtype=view.dtype)
        return (view[..., 0] + (view[..., 1] / 2).exp() * noise).detach()

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        return (
            (targets - view[..., 0]).square() * (-view[..., 1]).exp() + view[..., 1]
        ) / 2  # the constant is left out

    def root(self, view: Tensor) -> Iterator[Tensor]:
        zero = torch.zeros_like(view.detach()[..., 0])
        yield torch.stack([(-view.detach()[..., 1] / 2).exp(), zero], -1)
        yield torch.stack([zero, zero + 0.5**0.5], -1)


class Correlated(Poisson):
    """Two real numbers with a correlation: torch has no distribution function for them."""

    factor = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)

    def view(self, output: Tensor) -> Tensor:
        if output.ndim != 2 or output.shape[-1] != 2:
            raise CaptureError(f"means are [N, 2], not {list(output.shape)}")
        return super().view(output)

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return (
            view.detach()
            + torch.randn(view.shape, generator=generator, dtype=view.dtype) @ self.factor.T
        )

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        return -dist.MultivariateNormal(view, scale_tril=self.factor).log_prob(targets)

    def root(self, view: Tensor) -> Iterator[Tensor]:
        for row in torch.linalg.inv(self.factor):
            yield row.expand_as(view)


class Rates(Poisson):
    """Counts, the output being the rates themselves, which are positive."""

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(view.detach(), generator)

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        return (view - torch.xlogy(targets, view) + (targets + 1).lgamma()).sum(-1)

    def root(self, view: Tensor) -> Iterator[Tensor]:
        for c in range(view.shape[-1]):
            column = torch.zeros_like(view.detach())
            column[..., c] = view.detach()[..., c] ** -0.5
            yield column
