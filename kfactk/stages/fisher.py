"""Fisher stages: whose targets the gradients are taken with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kfactk.stages.likelihood import Likelihood


class Fisher(Protocol):
    """Whose targets the gradients are taken with.

    Laws: the gradients' outer products summed over the losses are, in expectation, M times F.

    One that listens to the user's backward may have one more member: `loss_terms(batch)` returns M,
    the number of terms of the user's loss, given the arguments of the forward and of
    `Optimizer.observe` by name. The model's output is not read then. Where it returns `None`, the
    likelihood counts. Where it never does, an attribute `reads_output` is False.
    """

    own_pass: ClassVar[bool]
    """Whether the framework runs backward passes of its own over `losses`. Otherwise it listens to
    the user's backward."""

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """Yield the scalar summed losses of one forward.

        They are scaled so that the **sum** of their gradients' outer products is M F.
        """

    @property
    def seed(self) -> int:
        """Seed that, with step, micro-batch and rank, gives every draw."""
