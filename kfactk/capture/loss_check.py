"""The check of the loss: whether its gradient at the model's output fits the likelihood.

A wrong likelihood gives curvature that is wrong everywhere, and no error. The user's own backward
tells: at the output, the gradient of a softmax cross entropy sums to zero over the classes, and
that of a squared error does not. So the first backward that counts is looked at, once. Where it
does not fit, others may come through the same output before the step: of a loss after that of its
penalty, or of another head. It is told at the step, unless one of them fits, or their sum does.

Where curvature is measured on this gradient, its size matters too. Of a squared error one gradient
does not tell it, but two with the same targets do: that of a batch which comes again, as the whole
data does, or the targets themselves, where the error has none. An autoencoder's are its inputs; so
each argument of the forward is tried that has as many numbers as the output.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from kfactk.capture.guard import parameter_nodes
from kfactk.capture.replay import tensors_of
from kfactk.capture.torch_modes import full_precision
from kfactk.capture.user_backward import Scale, adds_to
from kfactk.errors import KfactkWarning
from kfactk.stages import Likelihood
from kfactk.validation import attribute_errors

COMPARED = 4
"""Backwards of which the gradients are compared, one with the next, where one alone tells less."""


@attrs.define(eq=False)
class Misfit:
    """What backwards through the output of one forward brought, none of which fits.

    Args:
        output: The output, detached.
        arguments: Tensors of the forward's arguments of the output's size: perhaps the targets.
        gradient: The sum of their gradients; `None` for none.
        fault: Why it does not fit.
    """

    output: Tensor
    arguments: list[Tensor] = attrs.Factory(list)
    gradient: Tensor | None = None
    fault: str = ""


class LossCheck:
    """Looks at the first backward that fills gradients, and warns once.

    Args:
        measured: Whether curvature is measured on the user's gradient, so that its size matters.
        several: Whether it is of one of several heads, whose losses have weights: sizes tell
            nothing.
    """

    def __init__(self, *, measured: bool, several: bool = False) -> None:
        self._measured = measured
        self.done = measured and several
        self._misfits: list[Misfit] = []
        self._before: tuple[Tensor, Tensor] | None = None
        self._left = COMPARED if measured else 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(
        self,
        output: Tensor,
        likelihood: Likelihood,
        parameters: Iterable[Tensor],
        scale: Scale,
        batch: Mapping[str, Any],
    ) -> None:
        """Wait for backwards over one forward.

        Args:
            output: The likelihood's parameters, as the model returned them.
            likelihood: What they mean. Where it has no `misfit`, nothing is checked.
            parameters: Those whose gradients make a backward count.
            scale: What makes its gradient that of the summed loss.
            batch: The arguments of the forward, and what `Optimizer.observe` was given.
        """
        if self.done or not hasattr(likelihood, "misfit"):
            return
        edge = get_gradient_edge(output)
        number = edge.output_nr  # a hook that held the edge would keep its node for ever
        ends = parameter_nodes(parameters)
        seen = Misfit(output.detach())
        if self._left and hasattr(likelihood, "divisor_misfit"):
            seen.arguments = alike(seen.output, batch)

        def prehook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[number]
            counts = not torch.is_grad_enabled() and adds_to(ends)
            if gradient is None or self.done or not counts:
                return
            with torch.no_grad(), full_precision([gradient.device.type]):
                self._judge(likelihood, seen, gradient.detach() * scale.factor())

        self._handles.append(edge.node.register_prehook(prehook))

    def forget(self) -> None:
        """Forget the backwards so far, because the user emptied `.grad`."""
        for each in self._misfits:
            each.gradient = None
        self._misfits.clear()

    def finish(self) -> None:
        """Warn if nothing fits that came until this step; no backward comes after."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        misfits, self._misfits = self._misfits, []
        if misfits:
            self.done = True
            warnings.warn(
                f"{misfits[0].fault}. Give the likelihood and the reduction of your loss (said "
                "once)",
                KfactkWarning,
                stacklevel=2,
            )

    def _judge(self, likelihood: Any, seen: Misfit, gradient: Tensor) -> None:
        """Look at the gradient of one backward, and at the sum of all."""
        if not gradient.numel() or not 0 < float(gradient.abs().max()) < float("inf"):
            return  # a later one may tell
        gradients = [gradient] if seen.gradient is None else [gradient, seen.gradient + gradient]
        self._misfits = [each for each in self._misfits if each is not seen]
        for each in gradients:
            with attribute_errors("likelihood", likelihood, "on the gradient of the loss"):
                fault = likelihood.misfit(seen.output, each, measured=self._measured)
                fault = fault or self._divisor_fault(likelihood, seen, each)
            if not fault:
                seen.gradient, self.done = None, not self._misfits and not self._left
                return
        seen.gradient, seen.fault = gradients[-1], fault
        self._misfits.append(seen)

    def _divisor_fault(self, likelihood: Any, seen: Misfit, gradient: Tensor) -> str | None:
        """Return what is wrong with the size of a gradient, by others with the same targets."""
        if not self._left or not hasattr(likelihood, "divisor_misfit"):
            self._left = 0
            return None
        output, nothing = seen.output, torch.zeros_like(gradient)
        targets = (each.to(output) for each in seen.arguments)
        masked = gradient == 0  # of which the targets may be no numbers
        others = [(torch.where(masked, output, each), nothing) for each in targets]
        if self._before is not None and self._before[0].shape == output.shape:
            others.append(self._before)
        for other in others:
            fault: str | None = likelihood.divisor_misfit(output, gradient, other)
            if fault:
                return fault
        self._left -= 1
        self._before = (output, gradient) if self._left else None
        return None


def alike(output: Tensor, batch: Mapping[str, Any]) -> list[Tensor]:
    """Return the real tensors among arguments with as many numbers as an output, in its shape.

    Example:
        >>> given = {"images": torch.ones(2, 2, 3), "kinds": torch.zeros(2)}
        >>> [tuple(each.shape) for each in alike(torch.zeros(2, 6), given)]
        [(2, 6)]
    """
    plain = (
        each.detach()
        for each in tensors_of(list(batch.values()))
        if type(each) is type(output) and each.layout is torch.strided and not each.is_complex()
    )
    return [each.reshape_as(output) for each in plain if each.numel() == output.numel()]
