"""The check of the scale of a loss whose curvature is that of the likelihood.

A controller takes slopes from the user's loss, and curvature from the likelihood. Where the loss is
c times the likelihood's mean, the curvature is 1/c of what belongs to it, and nothing fails. The
gradient at the output tells c: of a softmax cross entropy with single labels it is c (p - y) / M. A
squared error tells by two of them, with the same targets: the gradient moves by c times what the
output does. So the first closure is looked at, and the first that runs again after a step.

A loss may be a mean over the terms with a label alone. So c is told where it is off both for the
number of all terms, and for those that have a gradient. Where micro-batches run in one closure,
their shares add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from kfactk.capture.forward import leads_to
from kfactk.capture.guard import parameter_nodes
from kfactk.capture.heads import Head, HeadView
from kfactk.capture.torch_modes import full_precision
from kfactk.capture.user_backward import adds_to
from kfactk.validation import attribute_errors

FACTOR = 1.3
"""Factors below it are let pass: those of smoothed labels and of weights of classes."""


@attrs.frozen(eq=False)
class ScaleFault:
    """A loss of another scale than its likelihood's mean.

    Args:
        head: The head.
        shape: Shape of its output.
        factor: How many times the mean it is.
        terms: Number of its likelihood terms.
    """

    head: Head
    shape: tuple[int, ...]
    factor: float
    terms: float


@attrs.define(eq=False)
class Sighting:
    """The output of a head in one forward, and its gradient.

    Args:
        head: The output, as the likelihood sees it.
        output: The same, detached.
        version: How often it had been written to.
        gradient: The sum of what backwards brought; `None` for none.
    """

    head: HeadView
    output: Tensor
    version: int
    gradient: Tensor | None = None

    @property
    def usable(self) -> bool:
        """Whether it has a gradient that is finite and not zero, and is unchanged."""
        if self.gradient is None or self.output._version != self.version:
            return False
        return self.gradient.numel() > 0 and 0 < float(self.gradient.abs().max()) < float("inf")

    def labelled(self) -> float:
        """Return how many terms have a gradient."""
        assert self.gradient is not None
        with torch.enable_grad():
            view = self.head.likelihood.view(self.gradient.detach().requires_grad_())
        return float((view.detach() != 0).any(-1).sum())


class ScaleCheck:
    """Looks at the gradients of the first closures, and tells once.

    In a step: `begin`, `watch` for each forward, `look`; and where the closure runs again,
    `begin_again`, `watch`, `compare`.
    """

    def __init__(self) -> None:
        self.done = False
        self._looked = False
        self._watching = False
        self._first: list[Sighting] = []
        self._second: list[Sighting] = []
        self._now = self._first
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._sizes: list[Tensor] = []

    def begin(self, *, again: bool) -> None:
        """Begin a closure.

        Args:
            again: Whether it will run again after the step.
        """
        self.finish()
        self._watching = not self.done and (again or not self._looked)

    def begin_again(self) -> None:
        """Begin the same closure once more, after the step."""
        self._second = []
        self._now = self._second

    def watch(self, heads: Sequence[HeadView], parameters: Iterable[Tensor]) -> None:
        """Wait for backwards over one forward.

        Args:
            heads: Its outputs. Heads whose likelihood has no `loss_factor` are left out, and those
                that others are made of: their gradient is that of other losses too.
            parameters: Those whose gradients make a backward count.
        """
        if not self._watching:
            return
        parameters = list(parameters)
        ends = parameter_nodes(parameters)
        for head in heads:
            others = [each.output for each in heads if each is not head]
            known = hasattr(head.likelihood, "loss_factor")
            if not known or head.output.grad_fn is None or leads_to(head.output, others):
                continue
            self._follow(head, ends, parameters)

    def _follow(
        self, head: HeadView, ends: set[torch.autograd.graph.Node], parameters: list[Tensor]
    ) -> None:
        edge = get_gradient_edge(head.output)
        number = edge.output_nr  # a hook that held the edge would keep its node for ever
        output = head.output.detach()
        plain = attrs.evolve(head, output=output, view=head.view.detach())
        seen = Sighting(plain, output, output._version)
        self._now.append(seen)

        def note() -> None:
            self._sizes = sizes_of(parameters)

        def prehook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[number]
            if gradient is None or torch.is_grad_enabled() or not adds_to(ends):
                return
            gradient = gradient.detach()
            seen.gradient = gradient.clone() if seen.gradient is None else seen.gradient + gradient
            engine = torch.autograd.Variable._execution_engine
            # Wrappers reduce gradients in callbacks of their own, which come after the first.
            engine.queue_callback(lambda: engine.queue_callback(note))

        self._handles.append(edge.node.register_prehook(prehook))

    def forget(self) -> None:
        """Forget the backwards so far, because the user emptied `.grad`."""
        for each in self._now:
            each.gradient = None

    def look(self, parameters: Iterable[Tensor]) -> ScaleFault | None:
        """Return what is wrong by the gradients of the closure that ended.

        Args:
            parameters: Those of `watch`. Where their gradients were changed after the backward,
                as a gradient scaler does, they are not those of the outputs, and nothing is told.
        """
        if not self._watching or not any(each.gradient is not None for each in self._first):
            return None
        sizes = sizes_of(parameters)
        if len(sizes) != len(self._sizes) or not all(map(torch.equal, sizes, self._sizes)):
            self.done = True
            self.finish()
            return None
        self._looked = self._looked or any(each.usable for each in self._first)
        return self._judged([(each, None) for each in self._first])

    def compare(self) -> ScaleFault | None:
        """Return what is wrong by the gradients of before the step and after it."""
        if not self._watching or self.done or len(self._first) != len(self._second):
            return None
        pairs = list(zip(self._first, self._second, strict=True))
        fault = self._judged(pairs)
        self.done = self.done or any(one.usable and other.usable for one, other in pairs)
        return fault

    def _judged(self, pairs: Sequence[tuple[Sighting, Sighting | None]]) -> ScaleFault | None:
        """Return the first fault; where every head tells its factor, all is done."""
        heads: dict[Head, list[tuple[Sighting, Sighting | None]]] = {}
        for one, other in pairs:
            if one.usable and one.head.head is not None:
                heads.setdefault(one.head.head, []).append((one, other))
        told = {head: self._share(mine) for head, mine in heads.items()}
        for head, share in told.items():
            if share is None:
                continue
            least, most = sorted(each / head.weight for each in share)
            if most < 1 / FACTOR or least > FACTOR:
                self.done = True
                seen = heads[head][0][0]
                terms = sum(float(one.head.terms) for one, _ in heads[head])
                return ScaleFault(head, tuple(seen.output.shape), share[0] / head.weight, terms)
        self.done = self.done or (bool(told) and None not in told.values())
        return None

    def _share(
        self, pairs: Sequence[tuple[Sighting, Sighting | None]]
    ) -> tuple[float, float] | None:
        """Return the factor of a head, for all terms and for those with a gradient, if certain."""
        of_all = of_labelled = 0.0
        for one, other in pairs:
            assert one.gradient is not None
            later = None
            if other is not None:
                if not other.usable or other.gradient is None:
                    return None
                later = other.output, other.gradient
            likelihood, device = one.head.likelihood, one.gradient.device.type
            where = "on the gradient of the loss"
            with (
                torch.no_grad(),
                full_precision([device]),
                attribute_errors("likelihood", likelihood, where),
            ):
                scale = likelihood.loss_factor(one.output, one.gradient, later)  # type: ignore[attr-defined]
                if scale is None:
                    return None
                of_all += float(scale) * float(one.head.terms)
                of_labelled += float(scale) * one.labelled()
        return of_all, of_labelled

    def finish(self) -> None:
        """End a step: keep nothing of its closure."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._first, self._second, self._sizes = [], [], []
        self._now, self._watching = self._first, False


def sizes_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return how large the gradients of parameters are; 0 where that is no number.

    A gradient scaler divides them where no version tells.
    """
    found = (each.grad.detach() for each in parameters if each.grad is not None)
    dense = (gradient.to_dense() if gradient.is_sparse else gradient for gradient in found)
    return [gradient.abs().sum().nan_to_num() for gradient in dense]
