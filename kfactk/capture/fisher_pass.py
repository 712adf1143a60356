"""The Fisher pass: from one followed forward to the calls of its layers, with their gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from kfactk.capture.forward import Arrivals, Forward
from kfactk.capture.guard import unseen_layers
from kfactk.capture.support import model_output
from kfactk.errors import CaptureError
from kfactk.samples import LayerCall
from kfactk.stages import Fisher, Layer, Likelihood
from kfactk.validation import attribute_errors, stage_label, unseen_message


class SampleTaker(Protocol):
    """Whoever takes the calls of layers: what this room wants of it."""

    @property
    def rank(self) -> int:
        """This process's rank."""

    def forward(self) -> AbstractContextManager[None]:
        """Surround the passes over one forward: they count all together, or not at all."""

    def begin_forward(self, num_terms: Tensor | float, examples: int) -> None:
        """Note the likelihood terms and the examples of one forward."""

    def accumulate(
        self, layer: Layer, calls: Sequence[LayerCall], num_terms: Tensor | float, first: bool
    ) -> None:
        """Take the calls of one layer in one pass."""

    def accumulate_nothing(self, layers: Iterable[Layer], num_terms: Tensor | float) -> None:
        """Count the terms of one forward for layers that did not run in it."""

    def mark_seen(self, layers: Iterable[Layer]) -> None:
        """Note that layers ran in a forward of which nothing counts."""

    def input_only(self) -> frozenset[str]:
        """Return the names of the layers that need no gradients."""

    def needs_pass(self) -> bool:
        """Return whether gradients are needed."""

    def leave(self, layers: Iterable[Layer]) -> None:
        """Follow these layers no more: what was seen of them is not the whole."""

    def end_forward(self) -> None:
        """Note that all passes over one forward are done."""


@attrs.frozen(eq=False)
class LossScale:
    """What the user's own gradients are multiplied by to be those of the summed loss.

    Args:
        num_terms: Number of likelihood terms.
        reduction: "mean" or "sum": how the user's loss reduces over them.
        scaler: The loop's `torch.amp.GradScaler`, if any; asked while the backward runs.
    """

    num_terms: Tensor | float
    reduction: str
    scaler: Any = None

    def factor(self) -> Tensor | float:
        """Return the factor."""
        terms = self.num_terms if self.reduction == "mean" else 1.0
        return terms if self.scaler is None else terms / float(self.scaler.get_scale())


class LayerSink:
    """Hands the layers of one pass to whoever takes them, and notes which they were.

    Args:
        taker: Takes them.
        layers: Those that are followed.
        num_terms: Number of likelihood terms of the forward.
        first: Whether this is the first pass over the forward.
        counts: Whether the forward counts; if not, its layers are dropped.
    """

    def __init__(
        self,
        taker: SampleTaker,
        layers: Sequence[Layer],
        num_terms: Tensor | float,
        *,
        first: bool = True,
        counts: bool = True,
    ) -> None:
        self._taker, self._layers = taker, layers
        self._num_terms, self._first, self._counts = num_terms, first, counts
        self.taken: set[Layer] = set()

    def __call__(self, layer: Layer, calls: list[LayerCall]) -> None:
        """Take all calls of one layer."""
        self.taken.add(layer)
        if self._counts:
            self._taker.accumulate(layer, calls, self._num_terms, self._first)

    def finish(self) -> None:
        """Count the terms for the layers that did not run."""
        missing = [layer for layer in self._layers if layer not in self.taken]
        self._taker.accumulate_nothing(missing, self._num_terms)


class FisherPass:
    """Runs or awaits the backward passes that curvature is measured on.

    Args:
        taker: Takes the calls of layers.
        fisher: Whose targets.
        likelihood: What the output means.
        output: The user's function that finds the likelihood's parameters in the output.
        reduction: "mean" or "sum": how the user's loss reduces over likelihood terms. Only a Fisher
            stage that listens to the user's backward needs it.
        unseen: "error" or "plain": what to do with layers that influence the output also past
            their recorded calls.
        scaler: The loop's `torch.amp.GradScaler`, if any; likewise.
    """

    def __init__(
        self,
        taker: SampleTaker,
        fisher: Fisher,
        likelihood: Likelihood,
        output: Any = None,
        *,
        reduction: str = "mean",
        unseen: str = "error",
        scaler: Any = None,
    ) -> None:
        self._taker = taker
        self._fisher, self._likelihood = fisher, likelihood
        self._output = model_output if output is None else output
        self._reduction, self._unseen, self._scaler = reduction, unseen, scaler
        self._listening: list[tuple[Arrivals, LayerSink]] = []

    def finish(self) -> None:
        """End listening: take the layers that the user's backward reached in part."""
        listening, self._listening = self._listening, []
        for arrivals, sink in listening:
            arrivals.finish()
            if sink.taken:  # otherwise the forward had no backward
                sink.finish()

    def run(
        self, forward: Forward, batch: Mapping[str, Any], *, step: int, micro_batch: int
    ) -> None:
        """Measure one forward.

        Args:
            forward: What was followed.
            batch: What the likelihood may ask for, besides the forward's own arguments.
            step: Index of the step, from 0.
            micro_batch: Index of the forward within the step, from 0.

        Raises:
            CaptureError: The output holds no tensor that the likelihood can read, or depends on
                layers also past their recorded calls.
        """
        output = self._output(forward.output)
        if not isinstance(output, Tensor):
            raise CaptureError(
                f"output= found {type(output).__name__} in what the model returned; it must find a "
                "tensor."
            )
        device = output.device.type
        autocast = torch.autocast(device, enabled=False)
        with torch.enable_grad(), autocast, self._taker.forward():
            with attribute_errors("likelihood", self._likelihood, "on the model's output"):
                view = self._likelihood.view(output)
                named = {**forward.batch, **batch}
                weights = self._likelihood.term_weights(view.detach(), named)
            terms: Tensor | float = float(view.shape[0] * view.shape[1])
            if weights is not None:
                terms = weights.detach().sum().double()
            forward = self._guarded(forward, view)
            self._taker.begin_forward(terms, len(view))
            self._measure(forward, view, weights, terms, (step, micro_batch))
        if forward.calls and self._fisher.own_pass:
            self._taker.end_forward()

    def _guarded(self, forward: Forward, view: Tensor) -> Forward:
        """Return the forward without the layers that influence `view` past their recorded calls.

        Raises:
            CaptureError: There are such layers, and they are to be refused.
        """
        layers = unseen_layers(view, forward.calls, forward.layers)
        if not layers:
            return forward
        if self._unseen == "error":
            paths = list(dict.fromkeys(layer.path for layer in layers))
            raise CaptureError(
                f"{unseen_message([layer.name for layer in layers])}To train them by their plain "
                f"gradient, build the recipe with exclude={paths} or with unseen='plain'."
            )
        self._taker.leave(layers)
        return forward.leaving(layers)

    def _measure(
        self,
        forward: Forward,
        view: Tensor,
        weights: Tensor | None,
        terms: Tensor | float,
        place: tuple[int, int],
    ) -> None:
        """Run or await the passes over one forward."""
        if not forward.calls:
            self._taker.accumulate_nothing(forward.layers, terms)
            return
        counts = bool(float(terms))  # otherwise everything is masked: nothing is to be learned
        if not counts:
            self._taker.mark_seen({record.layer for record, _ in forward.calls})
        if not self._fisher.own_pass:
            if counts:
                self._listen(forward, terms)
            return
        taken = self._take_inputs(forward, view, terms) if counts else set()
        if self._taker.needs_pass():
            forward = forward.without(self._taker.input_only())
            layers = [layer for layer in forward.layers if layer not in taken]
            seed = draw_seed(self._fisher.seed, *place, self._taker.rank)
            self._run_passes(forward, view, weights, (layers, terms, counts), seed)
        elif counts:
            rest = [layer for layer in forward.layers if layer not in taken]
            self._taker.accumulate_nothing(rest, terms)

    def _take_inputs(self, forward: Forward, view: Tensor, terms: Tensor | float) -> set[Layer]:
        """Take the layers that need no gradients, and return them."""
        sink = LayerSink(self._taker, forward.layers, terms)
        with torch.no_grad():
            for layer, calls in forward.inputs(self._taker.input_only(), view).items():
                sink(layer, calls)
        return sink.taken

    def _run_passes(
        self,
        forward: Forward,
        view: Tensor,
        weights: Tensor | None,
        wanted: tuple[Sequence[Layer], Tensor | float, bool],
        seed: int,
    ) -> None:
        """Run the Fisher passes over a forward.

        All ranks run them, also where the forward does not count: there may be collectives inside.
        """
        layers, terms, counts = wanted
        generator = torch.Generator(view.device)
        generator.manual_seed(seed)
        for number, loss in enumerate(self._losses(view, weights, generator)):
            sink = LayerSink(self._taker, layers, terms, first=number == 0, counts=counts)
            forward.run(loss, view, sink)
            if counts and number == 0:
                sink.finish()

    def _losses(
        self, view: Tensor, weights: Tensor | None, generator: torch.Generator
    ) -> Iterator[Tensor]:
        losses = None
        where = f"with {stage_label('likelihood', self._likelihood)}"
        while True:
            with attribute_errors("fisher", self._fisher, where):
                if losses is None:
                    found = self._fisher.losses(view, self._likelihood, weights, generator)
                    losses = iter(found)
                loss = next(losses, None)
            if loss is None:
                return
            yield loss

    def _listen(self, forward: Forward, terms: Tensor | float) -> None:
        """Take the layers from the user's own backward, whenever it runs."""
        sink = LayerSink(self._taker, forward.layers, terms)  # does not keep the forward
        scale = LossScale(terms, self._reduction, self._scaler)
        self._listening.append((forward.listen(sink, scale), sink))


def draw_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Return a 63-bit seed for the draws of one forward: no generator state has to be saved.

    Example:
        >>> draw_seed(0, 1, 0, 0) == draw_seed(0, 1, 0, 0) != draw_seed(0, 0, 1, 0)
        True
    """
    digest = hashlib.blake2b(f"{seed},{step},{micro_batch},{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
