"""The check of the loss: whether its gradient at the model's output fits the likelihood.

A wrong likelihood gives curvature that is wrong everywhere, and no error. The user's own backward
tells: at the output, the gradient of a softmax cross entropy sums to zero over the classes, and
that of a squared error does not. So the first backward that counts is looked at, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from kfactk.capture.guard import parameter_nodes
from kfactk.capture.torch_modes import full_precision
from kfactk.capture.user_backward import Scale, adds_to
from kfactk.errors import KfactkWarning
from kfactk.stages import Likelihood
from kfactk.validation import attribute_errors


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

    def watch(
        self, output: Tensor, likelihood: Likelihood, parameters: Iterable[Tensor], scale: Scale
    ) -> None:
        """Wait for a backward over one forward.

        Args:
            output: The likelihood's parameters, as the model returned them.
            likelihood: What they mean. Where it has no `misfit`, nothing is checked.
            parameters: Those whose gradients make a backward count.
            scale: What makes its gradient that of the summed loss.
        """
        if self.done or not hasattr(likelihood, "misfit"):
            return
        edge = get_gradient_edge(output)
        number = edge.output_nr  # a hook that held the edge would keep its node for ever
        ends = parameter_nodes(parameters)
        kept = output.detach()

        def prehook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[number]
            handle.remove()
            counts = not torch.is_grad_enabled() and adds_to(ends)
            if gradient is None or self.done or not counts:
                return
            with torch.no_grad(), full_precision([gradient.device.type]):
                self._judge(likelihood, kept, gradient.detach() * scale.factor())

        handle = edge.node.register_prehook(prehook)

    def _judge(self, likelihood: Any, output: Tensor, gradient: Tensor) -> None:
        if not gradient.numel() or not 0 < float(gradient.abs().max()) < float("inf"):
            return  # a later one may tell
        self.done = True
        with attribute_errors("likelihood", likelihood, "on the gradient of the loss"):
            fault = likelihood.misfit(output, gradient, measured=self._measured)
        if fault:
            warnings.warn(
                f"{fault}. Give the likelihood and the reduction of your loss (said once)",
                KfactkWarning,
                stacklevel=2,
            )
