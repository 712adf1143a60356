"""The Fisher pass: from one followed forward to the uses of its layers, with the likelihood's and the Fisher stage's say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kfactk.capture.forward import Forward
from kfactk.errors import CaptureError
from kfactk.preconditioner.preconditioner import Preconditioner
from kfactk.samples import LayerCall
from kfactk.stages import Fisher, Layer, Likelihood
from kfactk.validation import attribute_errors, stage_label


class FisherPass:
    """Runs or awaits the backward passes that curvature is measured on.

    Args:
        preconditioner: Takes the uses.
        fisher: Whose targets.
        likelihood: What the output means.
        output: Finds the likelihood's parameters in what the model returns.
        reduction: "mean" or "sum": how the user's loss reduces over likelihood terms (`empirical` only).
        loss_scale: What the user's loss is multiplied by (`empirical` only), asked while the user's backward runs.
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        fisher: Fisher,
        likelihood: Likelihood,
        output: Callable[[Any], Tensor],
        *,
        reduction: str,
        loss_scale: Callable[[], float],
    ) -> None:
        self._preconditioner = preconditioner
        self._fisher, self._likelihood, self._output = fisher, likelihood, output
        self._reduction, self._loss_scale = reduction, loss_scale
        self._listening: list[Callable[[], None]] = []

    def finish(self) -> None:
        """The user's backward is over: take what it reached of the layers that it reached in part."""
        listening, self._listening = self._listening, []
        for finish in listening:
            finish()

    def observe(
        self, forward: Forward, batch: Mapping[str, Any], *, step: int, micro_batch: int
    ) -> None:
        """Measure one forward.

        Args:
            forward: What was followed.
            batch: What the likelihood may ask for by name, besides the forward's own arguments.
            step: Index of the step, from 0.
            micro_batch: Index of the forward within the step, from 0.
        """
        output = self._output(forward.output)
        if not isinstance(output, Tensor):
            raise CaptureError(
                f"output= found {type(output).__name__} in what the model returned; it must find a tensor."
            )
        with (
            torch.enable_grad(),
            torch.autocast(output.device.type, enabled=False),
            self._preconditioner.forward(),
        ):
            with attribute_errors("likelihood", self._likelihood, "on the model's output"):
                view = self._likelihood.view(output)
                weights = self._likelihood.term_weights(view.detach(), {**forward.batch, **batch})
            num_terms: Tensor | float = (
                float(view.shape[0] * view.shape[1])
                if weights is None
                else weights.detach().sum().double()
            )
            self._preconditioner.count(num_terms, len(view))
            if not forward.calls:
                self._preconditioner.pass_by((), num_terms)
                return
            rank = self._preconditioner.ranks.rank
            counts = bool(
                float(num_terms)
            )  # if not, everything is masked: there is nothing to learn from this forward
            if not counts:
                self._preconditioner.pass_over({record.layer.name for record, _ in forward.calls})
            if not self._fisher.own_pass:
                if counts:
                    self._listen(forward, num_terms)
                return
            taken = self._take_inputs(forward, view, num_terms) if counts else None
            if self._preconditioner.wants_gradients():
                forward = forward.without(self._preconditioner.inputs_only())
                self._run(
                    forward,
                    view,
                    weights,
                    num_terms,
                    taken,
                    draw_seed(self._fisher.seed, step, micro_batch, rank),
                )
            elif taken is not None:
                self._preconditioner.pass_by(taken, num_terms)
        self._preconditioner.leave()

    def _take_inputs(self, forward: Forward, view: Tensor, num_terms: Tensor | float) -> set[str]:
        """Hand on the layers of which inputs alone are wanted; returns their names."""
        sink = _Sink(self._preconditioner, num_terms, first=True)
        with torch.no_grad():
            for layer, calls in forward.inputs(self._preconditioner.inputs_only(), view).items():
                sink(layer, calls)
        return sink.taken

    def _run(
        self,
        forward: Forward,
        view: Tensor,
        weights: Tensor | None,
        num_terms: Tensor | float,
        taken: set[str] | None,
        seed: int,
    ) -> None:
        """Run the Fisher passes over a forward; all ranks run them, since there may be collectives inside.

        Args:
            forward: What was followed.
            view: The model's output as the likelihood sees it.
            weights: Of the likelihood's terms.
            num_terms: Their number.
            taken: The layers that are done with; `None` when the forward does not count.
            seed: Of the draws.
        """
        generator = torch.Generator(view.device)
        generator.manual_seed(seed)
        for number, loss in enumerate(self._losses(view, weights, generator)):
            sink = _Sink(self._preconditioner, num_terms, first=number == 0)
            forward.run(loss, view, sink if taken is not None else _ignored)
            if taken is not None and number == 0:
                self._preconditioner.pass_by(sink.taken | taken, num_terms)

    def _losses(
        self, view: Tensor, weights: Tensor | None, generator: torch.Generator
    ) -> Iterator[Tensor]:
        losses = None
        while True:
            with attribute_errors(
                "fisher", self._fisher, f"with {stage_label('likelihood', self._likelihood)}"
            ):
                losses = (
                    iter(self._fisher.losses(view, self._likelihood, weights, generator))
                    if losses is None
                    else losses
                )
                loss = next(losses, None)
            if loss is None:
                return
            yield loss

    def _listen(self, forward: Forward, num_terms: Tensor | float) -> None:
        # The user's loss is (scale / M) or scale times the sum; gradients are wanted of the sum.
        def scale() -> Tensor | float:
            return (num_terms if self._reduction == "mean" else 1.0) / self._loss_scale()

        sink = _Sink(
            self._preconditioner, num_terms, first=True
        )  # the forward itself must not be kept
        finish = forward.listen(sink, scale)

        def over() -> None:
            finish()
            if sink.taken:  # if not, that forward had no backward
                sink.preconditioner.pass_by(sink.taken, num_terms)

        self._listening.append(over)


class _Sink:
    """Takes the layers of one pass, and notes which they were."""

    def __init__(
        self, preconditioner: Preconditioner, num_terms: Tensor | float, *, first: bool
    ) -> None:
        self.preconditioner, self._num_terms, self._first = preconditioner, num_terms, first
        self.taken: set[str] = set()

    def __call__(self, layer: Layer, calls: list[LayerCall]) -> None:
        self.taken.add(layer.name)
        self.preconditioner.take(layer, calls, self._num_terms, self._first)


def _ignored(layer: Layer, calls: list[LayerCall]) -> None:
    """Takes what does not count."""


def draw_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """A 63-bit seed for the draws of one forward: no generator state has to be kept or saved.

    Example:
        >>> draw_seed(0, 1, 0, 0) == draw_seed(0, 1, 0, 0) != draw_seed(0, 0, 1, 0)
        True
    """
    digest = hashlib.blake2b(f"{seed},{step},{micro_batch},{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
