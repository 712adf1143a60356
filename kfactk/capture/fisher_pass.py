"""The Fisher pass: from one followed forward to the calls of its layers, with their gradients."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import attrs
import torch
from torch import Tensor

from kfactk.capture.forward import Forward, leads_to
from kfactk.capture.guard import unseen_layers
from kfactk.capture.heads import Head, HeadView, of_the_loss, terms_of
from kfactk.capture.loss_check import LossCheck
from kfactk.capture.output_reader import OutputReader
from kfactk.capture.remainder import Remainders
from kfactk.capture.replay import tensors_of
from kfactk.capture.row_orders import ForwardRows, RowOrders, RowTaker
from kfactk.capture.support import is_distributed
from kfactk.capture.torch_modes import full_precision
from kfactk.capture.user_backward import UserBackward
from kfactk.errors import CaptureError, KfactkWarning
from kfactk.samples import LayerCall
from kfactk.stages import Fisher, Layer
from kfactk.validation import (
    attribute_errors,
    remainder_message,
    stage_label,
    unseen_message,
)


class SampleTaker(RowTaker, Protocol):
    """Whoever takes the calls of layers: what this room wants of it."""

    @property
    def rank(self) -> int:
        """This process's rank."""

    def forward(self) -> AbstractContextManager[None]:
        """Surround the passes over one forward: they count all together, or not at all."""

    def begin_forward(self) -> None:
        """Note one forward."""

    def counts_terms(self) -> bool:
        """Return whether the number of likelihood terms in the user's gradient is needed."""

    def count_terms(self, num_terms: Tensor | float) -> None:
        """Count the likelihood terms of a forward whose gradient is in `.grad`."""

    def drop_gathered(self, layers: Collection[Layer] | None = None) -> None:
        """Drop the calls of these layers (`None`: of all) that the step has taken so far."""

    def accumulate(
        self,
        layer: Layer,
        calls: Sequence[LayerCall],
        num_terms: Tensor | float,
        *,
        first: bool,
        of: object,
    ) -> None:
        """Take the calls of one layer in one pass, which `of` tells from others."""

    def end_pass(self, of: object, num_terms: Tensor | float, *, last: bool = False) -> None:
        """Note that a pass is at its end; its terms are 0 where it is not the forward's first."""

    def accumulate_nothing(self, layers: Iterable[Layer], num_terms: Tensor | float) -> None:
        """Count the terms of one forward for layers that did not run in it."""

    def mark_seen(self, layers: Iterable[Layer]) -> None:
        """Note that layers ran in a forward of which nothing counts."""

    def input_only(self) -> frozenset[str]:
        """Return the names of the layers that need no gradients."""

    def needs_pass(self) -> bool:
        """Return whether gradients are needed."""

    def needs_gradients(self) -> bool:
        """Return whether they are in any step; otherwise inputs alone are measured."""

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
        rows: The rows of the forward; `None` where nobody knows how many examples there are.
        earlier: Layers that an earlier pass over the forward has reached.
        counts: Whether the forward counts; if not, its layers are dropped.
    """

    def __init__(
        self,
        taker: SampleTaker,
        layers: Sequence[Layer],
        num_terms: Tensor | float,
        rows: ForwardRows | None = None,
        *,
        earlier: Collection[Layer] = (),
        counts: bool = True,
    ) -> None:
        self._taker, self._layers, self._rows = taker, layers, rows
        self._num_terms, self._earlier, self._counts = num_terms, earlier, counts
        self.taken: set[Layer] = set()
        self._forgotten: set[Layer] = set()

    def forget(self, layers: Collection[Layer]) -> None:
        """Treat these layers as if the forward had not been made for them."""
        self.taken.difference_update(layers)
        self._forgotten.update(layers)

    def __call__(self, layer: Layer, calls: list[LayerCall]) -> None:
        """Take all calls of one layer."""
        self.taken.add(layer)
        if self._counts:
            first = layer not in self._earlier
            calls = calls if self._rows is None else self._rows.unfolded(layer, calls)
            self._taker.accumulate(layer, calls, self._num_terms, first=first, of=self)

    def finish(self) -> None:
        """Count the terms for the layers that no pass has reached."""
        known = self.taken | self._forgotten | set(self._earlier)
        missing = [layer for layer in self._layers if layer not in known]
        self._taker.accumulate_nothing(missing, self._num_terms)


@attrs.frozen(eq=False)
class Watch:
    """The watch for backwards over one forward.

    Args:
        backward: The watch.
        sink: Takes the gradients that it keeps.
        terms: Number of likelihood terms of the forward.
    """

    backward: UserBackward
    sink: LayerSink
    terms: Tensor | float


class FisherPass:
    """Runs or awaits the backward passes that curvature is measured on.

    Args:
        taker: Takes the calls of layers.
        fisher: Whose targets.
        heads: What the parts of the output mean.
        output: The user's function on what the model returns, which the heads apply too.
        reduction: "mean" or "sum": how the user's loss reduces over likelihood terms. Only a Fisher
            stage that listens to the user's backward needs it.
        unseen: "error" or "plain": what to do with layers that influence the output also past
            their recorded calls.
        scaler: The loop's `torch.amp.GradScaler`, if any; likewise.
        every: Whether every forward of a step is measured, so that its gradient is theirs alone.
        exclude: The patterns of modules that the recipe leaves alone.
    """

    def __init__(
        self,
        taker: SampleTaker,
        fisher: Fisher,
        heads: Sequence[Head],
        output: Any = None,
        *,
        reduction: str = "mean",
        unseen: str = "error",
        scaler: Any = None,
        every: bool = True,
        exclude: Sequence[str] = (),
    ) -> None:
        self._taker = taker
        self._fisher, self._output = fisher, output
        self.reader = OutputReader(heads, output, exclude)
        """Finds and reads the heads in outputs."""
        self._reduction, self._unseen, self._scaler = reduction, unseen, scaler
        self._watches: list[Watch] = []
        self._filled: dict[Layer, Versions] = {}
        self._task = -1
        self._remainders = Remainders() if every and not fisher.own_pass else None
        self._orders = RowOrders(taker, own_pass=fisher.own_pass)
        self._loss_checks = [
            LossCheck(measured=not fisher.own_pass, several=len(heads) > 1) for _ in heads
        ]

    def finish(self) -> None:
        """End watching: take the layers that the user's backwards reached in part.

        Raises:
            CaptureError: A loss of the user's depends on layers also past their recorded calls.
        """
        watches, self._watches = self._watches, []
        self._filled.clear()
        unseen: dict[Layer, None] = {}
        for watch in watches:
            if self._fisher.own_pass:
                watch.backward.finish()
            else:
                unseen.update(dict.fromkeys(watch.backward.unseen))
                watch.backward.finish()
                if watch.sink.taken:  # otherwise the forward had no backward
                    watch.sink.finish()
                    self._taker.end_pass(watch.sink, watch.terms, last=True)
            if watch.backward.arrived:
                self._taker.count_terms(watch.terms)
        for check in self._loss_checks:
            check.finish()
        past = [] if self._remainders is None else self._remainders.finish()
        if unseen:
            self._refuse_or_leave(list(unseen))
        if told := [layer for layer in past if layer not in unseen]:
            paths = list(dict.fromkeys(layer.path for layer in told))
            message = remainder_message([layer.name for layer in told], paths)
            warnings.warn(message, KfactkWarning, stacklevel=2)

    def forget(self) -> None:
        """Forget the backwards so far, because the user emptied `.grad`."""
        self._filled.clear()
        if self._remainders is not None:
            self._remainders.forget()
        for check in self._loss_checks:
            check.forget()
        arrived = [watch for watch in self._watches if watch.backward.forget()]
        if arrived and not self._fisher.own_pass:
            for watch in arrived:
                watch.sink.taken.clear()
            self._taker.drop_gathered()

    def reach(self, layer: Layer, task: int, *, fills: bool) -> None:
        """Note that a backward reaches a layer.

        Where `.grad` of layers that earlier backwards of the step filled is gone since, these
        backwards are forgotten.

        Args:
            layer: The layer.
            task: The number that autograd has given the backward.
            fills: Whether it adds to `.grad`.
        """
        if task != self._task:
            self._task = task
            if cleared := cleared_layers(self._filled):
                self._forget_layers(cleared)
            torch.autograd.Variable._execution_engine.queue_callback(self._note_gradients)
        if fills:
            self._filled.setdefault(layer, ())

    def _note_gradients(self) -> None:
        """At the end of a backward: note the versions of `.grad`."""
        for layer in self._filled:
            self._filled[layer] = gradient_versions(layer)

    def _forget_layers(self, layers: list[Layer]) -> None:
        """Forget the backwards so far for these layers; altogether where no other was filled."""
        if len(layers) == len(self._filled):
            self.forget()
            return
        for layer in layers:
            del self._filled[layer]
        if self._remainders is not None:
            self._remainders.forget(layers)
        if not self._fisher.own_pass:
            for watch in self._watches:
                watch.backward.forget_layers(layers)
                watch.sink.forget(layers)
            self._taker.drop_gathered(layers)

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
        if not self._taker.needs_gradients():
            self._take_inputs_alone(forward)
            return
        heads = self._read(forward, {**forward.batch, **batch})
        exact = full_precision({head.output.device.type for head in heads})
        with torch.enable_grad(), exact, self._taker.forward():
            forward = self._guarded(forward, [head.view for head in heads])
            self._taker.begin_forward()
            alone = self._fisher.own_pass or not forward.calls  # otherwise `_measure` watches
            if alone and self._taker.counts_terms():
                self._watch(forward, heads, keep=False)
            with forward.unnoticed([head.output for head in heads]):
                heads, rows = self._by_example(forward, heads)
                self._measure(forward, heads, rows, (step, micro_batch))
        self._check_losses(forward, heads, batch)
        if forward.calls and self._fisher.own_pass:
            self._taker.end_forward()

    def _read(self, forward: Forward, batch: Mapping[str, Any]) -> list[HeadView]:
        """Return what the forward's output holds of each head."""
        terms = None if self._fisher.own_pass else loss_terms(self._fisher, batch)
        if terms is not None:
            output = forward.output if self._output is None else self._output(forward.output)
            return of_the_loss(output, terms)
        return self.reader.read(forward, batch)

    def _check_losses(
        self, forward: Forward, heads: Sequence[HeadView], batch: Mapping[str, Any]
    ) -> None:
        """Let the first backward that counts be checked against each likelihood."""
        if not forward.calls or all(check.done for check in self._loss_checks):
            return
        if heads[0].head is None:  # the loss is what it is
            return
        parameters = [p for layer in forward.layers for p in layer.tensors().values()]
        for head in heads:
            others = [each.output for each in heads if each is not head]
            if leads_to(head.output, others):
                continue  # its gradient is that of other losses too
            check = self._loss_checks[self.reader.heads.index(cast(Head, head.head))]
            scale = LossScale(head.terms, self._reduction, self._scaler)
            given = {**forward.batch, **batch}
            check.watch(head.output, head.likelihood, parameters, scale, given)

    def _guarded(self, forward: Forward, views: Sequence[Tensor]) -> Forward:
        """Return the forward without the layers that influence `views` past their recorded calls.

        Raises:
            CaptureError: There are such layers, and they are to be refused.
        """
        layers = unseen_layers(views, forward.calls, forward.layers)
        if not layers:
            return forward
        self._refuse_or_leave(layers)
        return forward.leaving(layers)

    def _refuse_or_leave(self, layers: Sequence[Layer]) -> None:
        if self._unseen == "error":
            paths = list(dict.fromkeys(layer.path for layer in layers))
            raise CaptureError(
                f"{unseen_message([layer.name for layer in layers])}To train them by their plain "
                f"gradient, build the recipe with exclude={paths} or with unseen='plain'."
            )
        self._taker.leave(layers)

    def _by_example(
        self, forward: Forward, heads: Sequence[HeadView]
    ) -> tuple[list[HeadView], ForwardRows | None]:
        """Return the heads by example, and which rows of layers are of which."""
        found, rows = self._orders.examine(forward, heads)
        for before, now in zip(heads, found, strict=True):
            if before.head is not None and now.head is not None and now.head is not before.head:
                self.reader.replace(before.head, now.head)
        return found, rows

    def _measure(
        self,
        forward: Forward,
        heads: Sequence[HeadView],
        rows: ForwardRows | None,
        place: tuple[int, int],
    ) -> None:
        """Run or await the passes over one forward."""
        terms = terms_of(heads)
        if not forward.calls:
            self._taker.accumulate_nothing(forward.layers, terms)
            self._taker.end_pass(None, terms, last=True)
            return
        counts = bool(float(terms))  # otherwise everything is masked: nothing is to be learned
        if not counts:
            self._taker.mark_seen({call.record.layer for call in forward.calls})
        if not self._fisher.own_pass:
            if counts:
                self._watch(forward, heads, rows, keep=True)
            return
        taken = self._take_inputs(forward, heads, rows) if counts else set()
        if self._taker.needs_pass():
            _check_several_backwards(forward)
            forward = forward.without(self._taker.input_only())
            layers = [layer for layer in forward.layers if layer not in taken]
            seed = draw_seed(self._fisher.seed, *place, self._taker.rank)
            self._run_passes(forward, heads, rows, layers, seed, counts=counts)
        elif counts:
            rest = [layer for layer in forward.layers if layer not in taken]
            self._taker.accumulate_nothing(rest, terms)

    def _take_inputs(
        self, forward: Forward, heads: Sequence[HeadView], rows: ForwardRows | None
    ) -> set[Layer]:
        """Take the layers that need no gradients, and return them."""
        sink = LayerSink(self._taker, forward.layers, terms_of(heads), rows)
        self._hand_inputs(forward, [head.view for head in heads], sink)
        return sink.taken

    def _hand_inputs(
        self, forward: Forward, starts: Sequence[Tensor] | None, sink: LayerSink
    ) -> None:
        with torch.no_grad():
            for layer, calls in forward.inputs(self._taker.input_only(), starts).items():
                sink(layer, calls)

    def _take_inputs_alone(self, forward: Forward) -> None:
        """Take a forward of which inputs are all that is measured, whatever its loss will be."""
        starts = [each for each in tensors_of(forward.output) if each.requires_grad]
        exact = full_precision({each.device.type for each in starts})
        with exact, self._taker.forward():
            forward = self._guarded(forward, starts)
            self._taker.begin_forward()
            sink = LayerSink(self._taker, forward.layers, 1.0)
            self._hand_inputs(forward, starts or None, sink)  # an output may hide its tensors
            sink.finish()
        if forward.calls:
            self._taker.end_forward()

    def _run_passes(
        self,
        forward: Forward,
        heads: Sequence[HeadView],
        rows: ForwardRows | None,
        layers: Sequence[Layer],
        seed: int,
        *,
        counts: bool,
    ) -> None:
        """Run the Fisher passes over a forward.

        All ranks run them, also where the forward does not count: there may be collectives inside.
        """
        generator = torch.Generator(heads[0].view.device)
        generator.manual_seed(seed)
        reached: set[Layer] = set()
        terms = new_terms = terms_of(heads)
        for head in heads:
            factor = head.factor(terms)
            for loss in self._losses(head, generator):
                sink = LayerSink(self._taker, layers, terms, rows, earlier=reached, counts=counts)
                scaled = loss if isinstance(factor, float) and factor == 1 else loss * factor
                forward.run(scaled, head.view, sink)
                reached = reached | sink.taken
                if counts:
                    self._taker.end_pass(sink, new_terms)
                new_terms = 0.0
        if counts:
            LayerSink(self._taker, layers, terms, earlier=reached).finish()

    def _losses(self, head: HeadView, generator: torch.Generator) -> Iterator[Tensor]:
        losses, likelihood = None, head.likelihood
        where = f"with {stage_label('likelihood', likelihood)}"
        while True:
            with attribute_errors("fisher", self._fisher, where):
                if losses is None:
                    found = self._fisher.losses(head.view, likelihood, head.weights, generator)
                    losses = iter(found)
                loss = next(losses, None)
            if loss is None:
                return
            yield loss

    def _watch(
        self,
        forward: Forward,
        heads: Sequence[HeadView],
        rows: ForwardRows | None = None,
        *,
        keep: bool,
    ) -> None:
        """Watch for the user's own backwards, and `keep` their gradients or not."""
        terms = terms_of(heads)
        sink = LayerSink(self._taker, forward.layers, terms, rows)  # does not keep the forward
        scale = LossScale(terms, self._reduction, self._scaler)
        backward = UserBackward(forward, heads[0].output, sink if keep else None, scale, self)
        self._watches.append(Watch(backward, sink, terms))
        if keep and self._remainders is not None:
            self._remainders.watch(forward.calls)


def loss_terms(fisher: Fisher, batch: Mapping[str, Any]) -> Tensor | float | None:
    """Return the number of terms of the user's loss, where the Fisher stage says it by itself."""
    counted = getattr(fisher, "loss_terms", None)
    if counted is None:
        return None
    with attribute_errors("fisher", fisher, "on the forward's arguments"):
        found: Tensor | float | None = counted(batch)
    return found


def _check_several_backwards(forward: Forward) -> None:
    """Refuse a forward through which only the user's own backward may run.

    Raises:
        CaptureError: A part of it ran under selective activation checkpointing.
    """
    if forward.user.single_backward:
        raise CaptureError(
            "a part of the model runs under selective activation checkpointing "
            "(create_selective_checkpoint_contexts), and torch allows one backward through it: a "
            "Fisher pass would take yours. Checkpoint without context_fn, or measure on your own "
            "backward with fisher='empirical'."
        )


Versions = tuple[tuple[int, int], ...]
"""For each gradient of a layer, its id and how often it was written to."""


def gradient_versions(layer: Layer) -> Versions:
    """Return the versions of a layer's gradients."""
    found = (p.grad for p in layer.tensors().values() if p.grad is not None)
    return tuple((id(gradient), gradient._version) for gradient in found)


def cleared_layers(layers: Mapping[Layer, Versions]) -> list[Layer]:
    """Return the layers whose `.grad` is gone, or was set to zero; there is one transfer at most.

    Under `fully_shard` it cannot be told while a backward runs.

    Args:
        layers: With the versions of their gradients at the end of the last backward.
    """
    found, gradients = [], {}
    for layer, versions in layers.items():
        parameters = [p for p in layer.tensors().values() if p.requires_grad]
        if any(map(is_distributed, parameters)):
            continue
        there = [p.grad for p in parameters if p.grad is not None]
        if not there:
            found.append(layer)
        elif gradient_versions(layer) != versions and not any(each.is_sparse for each in there):
            gradients[layer] = torch.stack([each.detach().abs().max().float() for each in there])
    if gradients:
        device = next(iter(gradients.values())).device
        largest = torch.stack([each.max().to(device) for each in gradients.values()]).tolist()
        found += [layer for layer, size in zip(gradients, largest, strict=True) if size == 0]
    return found


def draw_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Return a 63-bit seed for the draws of one forward: no generator state has to be saved.

    Example:
        >>> draw_seed(0, 1, 0, 0) == draw_seed(0, 1, 0, 0) != draw_seed(0, 0, 1, 0)
        True
    """
    digest = hashlib.blake2b(f"{seed},{step},{micro_batch},{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
