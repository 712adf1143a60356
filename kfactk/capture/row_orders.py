"""Which rows of layers, and of flattened outputs, belong to which example.

Models flatten tokens: a layer gets `[N T, d]` in place of `[N, T, d]`, or `[T N, d]` where the
sequence comes first, and a model returns `[N T, C]`. Passes of our own tell once for each layer in
which order its rows are (`kfactk.capture.layout`). From then on its calls are unfolded by example
before anyone takes them.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from kfactk.capture.forward import Forward, RecordedCall
from kfactk.capture.heads import FlatOutput, HeadView, runs
from kfactk.capture.hooks import folded_from
from kfactk.capture.layout import LayoutSketch, Marks, RowFinding, row_finding, sketch
from kfactk.capture.replay import tensors_of
from kfactk.capture.support import is_distributed
from kfactk.errors import CaptureError
from kfactk.samples import LayerCall, RowOrder, Samples
from kfactk.stages import Layer
from kfactk.validation import (
    chosen_output_message,
    flat_output_message,
    joined_message,
    transposed_output_message,
    unknown_examples_message,
    unordered_message,
)

CERTAIN = 12
"""Examples from which on a regular order of rows is no chance.

Of tokens that a router chose, all examples have equally many now and then. With k each on average
the probability is about `(2 pi k) ** (-(N - 1) / 2)`: below 1e-6 for N = 12 and k = 2.
"""


class RowTaker(Protocol):
    """Whoever takes rows: what this module wants of it."""

    @property
    def alone(self) -> bool:
        """Whether there is one rank."""

    def follows(self, layer: Layer) -> bool:
        """Return whether the calls of a layer are taken in this step."""

    def tells_examples_apart(self, layer: Layer) -> bool:
        """Return whether anything is measured for each example of a layer."""

    def samples_of(self, layer: Layer, call: LayerCall) -> Samples:
        """Return one call of a layer that tells its examples apart, as samples."""

    def unfold(self, layer: Layer, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return a call by example; nothing where the layer's curvature cannot."""

    def warn_of_layout(self, faults: Mapping[Layer, str]) -> None:
        """Warn of layers whose examples are not the output's."""

    def warn_of_output(self, message: str) -> None:
        """Warn of an output whose examples are not known."""


@attrs.frozen
class KnownOrder:
    """The order of a layer's rows.

    Args:
        interleaved: As in `RowOrder`.
        certain: Whether the order is no chance, whatever the number of rows.
    """

    interleaved: bool
    certain: bool


@attrs.frozen(eq=False)
class ForwardRows:
    """The rows of one forward.

    Args:
        orders: What is known of the layers.
        examples: N.
        positions: Numbers of positions that an example is seen to have in this forward.
        given: Numbers of rows of the model's arguments.
    """

    orders: RowOrders
    examples: int
    positions: frozenset[int]
    given: frozenset[int]

    @classmethod
    def of(cls, orders: RowOrders, forward: Forward, heads: Sequence[HeadView]) -> ForwardRows:
        """Return the rows of a forward, of which the heads are known by example."""
        examples = _most(heads)
        given = [each.shape for value in forward.batch.values() for each in tensors_of(value)]
        shapes = [*given, *(call.record.shape[:-1] for call in forward.calls)]
        shapes += [head.view.shape[:-1] for head in heads]
        here = (shape[1:] for shape in shapes if len(shape) > 1 and shape[0] == examples)
        positions = frozenset[int]().union(*map(runs, here)) - {1}
        return cls(orders, examples, positions, frozenset(each[0] for each in given if each))

    def unfolded(self, layer: Layer, calls: list[LayerCall]) -> list[LayerCall]:
        """Return the calls of a layer by example, as far as their order is known."""
        return self.orders.unfolded(layer, calls, self)

    def fits(self, rows: int, positions: int) -> bool:
        """Return whether an example would have as many rows, or positions, as it has elsewhere.

        Args:
            rows: Number of rows of all examples.
            positions: Number of positions of each row.
        """
        each = rows // self.examples
        known = not self.positions.isdisjoint((each, each * positions)) or rows in self.given
        return rows % self.examples == 0 and known


class RowOrders:
    """Finds out, and remembers, in which order layers have the rows of examples.

    Args:
        taker: Takes the calls of layers.
        own_pass: Whether curvature is measured in passes of our own.
    """

    def __init__(self, taker: RowTaker, *, own_pass: bool) -> None:
        self._taker, self._own_pass = taker, own_pass
        self._known: weakref.WeakKeyDictionary[Layer, KnownOrder] = weakref.WeakKeyDictionary()
        self._probed: weakref.WeakSet[Layer] = weakref.WeakSet()
        self._whole: weakref.WeakSet[Layer] = weakref.WeakSet()
        self._single: weakref.WeakSet[Layer] = weakref.WeakSet()
        self._interleaved: weakref.WeakSet[Layer] = weakref.WeakSet()
        self._rejected: set[FlatOutput] = set()

    # ------------------------------------------------------------------------- one forward

    def examine(
        self, forward: Forward, heads: Sequence[HeadView]
    ) -> tuple[list[HeadView], ForwardRows | None]:
        """Find the order of rows that are new, and return the heads by example.

        All ranks run the passes, whatever their data: there may be collectives inside. A pass over
        parts of parameters would be a collective call itself, and is left out.

        Args:
            forward: The forward; its calls are told how many examples there are.
            heads: As they were read.

        Returns:
            The heads, and the rows of the forward; `None` where no head says how many examples
            there are.

        Raises:
            CaptureError: The tokens of experts are in no order that is known.
        """
        if heads[0].head is None:
            self._tell_unknown(forward)
            return list(heads), None
        heads, doubtful = self._by_example(forward, heads)
        new = self._new(forward, heads, doubtful=bool(doubtful))
        passes = bool(new) and self._may_pass(forward)
        findings = {layer: RowFinding() for layer in new}
        if passes:
            findings = self._probe(forward, heads, new)
        if doubtful and not (passes and _confirm(findings.values(), _most(heads))):
            heads = [doubtful.get(number, head) for number, head in enumerate(heads)]
            if new:
                self._reject(heads, doubtful, forward)
            findings = {}
        rows = ForwardRows.of(self, forward, heads)
        self._probed.update(new)
        self._note(forward, rows, findings)
        if passes and findings:
            self._tell_transposed(forward, heads, findings)
        forward.count_examples(rows.examples, self._interleaved)
        return list(heads), rows

    def unfolded(self, layer: Layer, calls: list[LayerCall], rows: ForwardRows) -> list[LayerCall]:
        """Return the calls of a layer by example; as they are where their order is not known."""
        order = self._known.get(layer)
        single = rows.examples == 1 and (layer not in self._probed or layer in self._single)
        if not self._taker.follows(layer) or (order is None and not single):
            return calls
        found: list[LayerCall] = []
        for call in calls:
            samples = self._taker.samples_of(layer, call)
            n, t = samples.examples, samples.positions
            if n == rows.examples:
                found.append(call)
                continue
            fits = rows.fits(n, t) or (order is not None and order.certain and n > rows.examples)
            if order is None and not fits:
                return calls
            if not fits or n % rows.examples:
                self._forget(layer, n, rows, "it is another number than in earlier forwards")
                return calls
            interleaved = order is not None and order.interleaved
            parts = self._taker.unfold(layer, call, RowOrder(rows.examples, interleaved))
            if not parts:
                self._forget(layer, n, rows, "its curvature does not divide them")
                return calls
            found += parts
        return found

    def _forget(self, layer: Layer, number: int, rows: ForwardRows, why: str) -> None:
        """Take the rows of a layer for examples from now on."""
        if self._known.pop(layer, None) is not None or rows.examples == 1:
            message = unordered_message(layer.name, number, rows.examples, why)
            self._warn({layer: message})

    # ------------------------------------------------------------------------------- heads

    def _by_example(
        self, forward: Forward, heads: Sequence[HeadView]
    ) -> tuple[list[HeadView], dict[int, HeadView]]:
        """Return flattened heads by example, and those that must be confirmed as they were."""
        found, doubtful = list(heads), dict[int, HeadView]()
        for number, view in enumerate(heads):
            head = view.head
            if head is not None and head.flat is not None:
                self._check_divided(view, head.flat, forward.batch)
                continue
            flat = None if head is None else FlatOutput.of(len(view.view), forward.batch)
            if head is None or flat is None or flat in self._rejected:
                if head is not None and flat is None:
                    self._check_chosen(view, forward)
                continue
            examples = flat.examples(len(view.view), forward.batch)
            assert examples is not None
            known = attrs.evolve(view, head=attrs.evolve(head, flat=flat))
            found[number] = known.by_example(examples)
            if examples > 1 and folded_from(view.output) != examples:
                doubtful[number] = view
        return found, doubtful

    def _check_divided(self, view: HeadView, flat: FlatOutput, batch: Mapping[str, Any]) -> None:
        """Warn of an output that divided by an argument before, and now does not."""
        examples, rows = flat.count(batch), len(view.view)
        if examples != rows:
            message = flat_output_message(rows, examples, flat.argument)
            self._taker.warn_of_output(message)

    def _check_chosen(self, view: HeadView, forward: Forward) -> None:
        """Warn of an output of tokens that the model chose, where its own backward is measured.

        In passes of our own, gradients of different terms do not correlate, so that each row may be
        taken for an example. A layer with as many rows as the argument shows that these are
        examples.
        """
        rows = len(view.view)
        chosen = None if self._own_pass else FlatOutput.chosen(rows, forward.batch)
        if chosen is None:
            return
        examples = chosen.count(forward.batch)
        if any(call.record.shape[:1] == (examples,) for call in forward.calls):
            message = chosen_output_message(rows, examples, chosen.argument)
            self._taker.warn_of_output(message)

    def _reject(
        self, heads: Sequence[HeadView], doubtful: Collection[int], forward: Forward
    ) -> None:
        for number in doubtful:
            rows = len(heads[number].view)
            flat = FlatOutput.of(rows, forward.batch)
            assert flat is not None
            self._rejected.add(flat)
            examples = flat.count(forward.batch)
            self._taker.warn_of_output(flat_output_message(rows, examples, flat.argument))

    def _tell_transposed(
        self, forward: Forward, heads: Sequence[HeadView], findings: Mapping[Layer, RowFinding]
    ) -> None:
        """Warn of an output whose dimension 1 counts the examples, or did before it was flattened.

        The rows of some calls then belong to no part of dimension 0 alone, and those of all to
        parts of dimension 1. On several ranks it is not asked: whether there is a doubt depends on
        their data.
        """
        if not self._taker.alone or all(map(_tells, findings.values())):
            return
        for head in heads:
            divided = head.output.ndim == 3 or len(head.view) < len(head.output)
            if not divided or len(head.view) < 2 or head.view.shape[1] < 2:
                continue
            turned = attrs.evolve(head, view=head.view.transpose(0, 1))
            found = self._probe(forward, [turned], findings.keys())
            if found and all(map(_tells, found.values())):
                message = transposed_output_message(head.output.shape, head.view.shape)
                self._taker.warn_of_output(message)

    # ------------------------------------------------------------------------------ layers

    def _new(
        self, forward: Forward, heads: Sequence[HeadView], *, doubtful: bool
    ) -> dict[Layer, None]:
        """Return the layers whose rows must be examined, in their order."""
        examples = _most(heads)
        records = [call.record for call in forward.calls]
        if self._taker.alone:
            ran = {record.layer for record in records} if examples > 1 else set()
        else:  # what ran, and how many examples there are, may differ between ranks
            ran = set(forward.layers)
        probed = set(self._probed)
        if self._taker.alone:
            probed -= {r.layer for r in records if r.layer in self._whole and r.shape[0] > examples}
        flat = {r.layer for r in records if r.shape and r.shape[0] > examples}
        new = {layer for layer in ran if layer in flat or self._taker.tells_examples_apart(layer)}
        if not doubtful:
            new -= probed
        cause = self._own_pass or doubtful or any(head.output.ndim == 3 for head in heads)
        alone = self._taker.alone
        if not cause and not any(_suspect(each, examples, alone=alone) for each in records):
            return {}
        return {layer: None for layer in forward.layers if layer in new}

    def _may_pass(self, forward: Forward) -> bool:
        """Return whether passes of our own may run over a forward now."""
        parameters = (p for call in forward.calls for p in call.record.layer.tensors().values())
        return not forward.user.single_backward and not any(map(is_distributed, parameters))

    def _probe(
        self, forward: Forward, heads: Sequence[HeadView], layers: Collection[Layer]
    ) -> dict[Layer, RowFinding]:
        """Run passes over a forward, and return what they tell of these layers.

        Of several layers in a module that gets the rows of all examples, one stands for all.
        """
        others: dict[object, Layer] = {}
        twins: dict[Layer, Layer] = {}
        for record in (call.record for call in forward.calls):
            if record.layer in layers and record.replay is not None and _joined(record):
                twins[record.layer] = others.setdefault(record.replay, record.layer)
        outside = set(twins.values())
        chosen = {layer for layer in layers if twins.get(layer, layer) is layer}
        names = {layer.name for layer in forward.layers} - {layer.name for layer in chosen}
        forward = forward.without(names).outside(outside)
        found: dict[Layer, RowFinding] = {}
        for head in heads:
            for layer, finding in self._findings(forward, head.view, outside).items():
                found[layer] = _both(found.get(layer), finding)
        return found | {layer: found[twin] for layer, twin in twins.items() if twin in found}

    def _findings(
        self, forward: Forward, view: Tensor, outside: Collection[Layer]
    ) -> dict[Layer, RowFinding]:
        """Return what the passes tell of the layers that lead to a view."""
        marks = Marks.of((view.dtype, *(call.record.dtype for call in forward.calls)))
        flat = view.flatten(1)
        generator = torch.Generator(view.device)
        weights = torch.randn(
            flat.shape, generator=generator, device=view.device, dtype=torch.float32
        ).to(view)
        passes = []
        for factors in marks.factors(len(view), view.device):
            sink = ProbeSink(self._taker, len(view), frozenset(outside))
            forward.run((flat * weights * factors.to(view).unsqueeze(1)).sum(), view, sink)
            passes.append(sink.sketches)
        return {
            layer: row_finding(layer.name, [each[layer] for each in passes], marks, len(view))
            for layer in passes[0]
            if all(layer in each for each in passes)
        }

    def _note(
        self, forward: Forward, rows: ForwardRows, findings: Mapping[Layer, RowFinding]
    ) -> None:
        """Remember the orders that were found, and warn of what was not."""
        told: dict[Layer, str] = {}
        records: dict[Layer, list[RecordedCall]] = {layer: [] for layer in findings}
        for record in (call.record for call in forward.calls):
            if record.layer in records:
                records[record.layer].append(record)
        for layer, finding in findings.items():
            if finding.rows and all(each == rows.examples for each in finding.rows):
                self._whole.add(layer)
            else:
                self._whole.discard(layer)
            own = records[layer]
            if own and all(map(_joined, own)):
                self._note_joined(layer, own, finding, rows)
            elif finding.fault:
                told[layer] = finding.fault
            elif fault := self._note_order(layer, own, finding, rows):
                told[layer] = fault
        self._warn(told)

    def _warn(self, faults: Mapping[Layer, str]) -> None:
        """Warn of layers, but for those that sum over all rows alike."""
        tells = self._taker.tells_examples_apart
        self._taker.warn_of_layout({layer: why for layer, why in faults.items() if tells(layer)})

    def _note_order(
        self,
        layer: Layer,
        records: Sequence[RecordedCall],
        finding: RowFinding,
        rows: ForwardRows,
    ) -> str:
        """Remember the order of a layer's rows, and return why it is not known, or ""."""
        n = rows.examples
        folded = [r for r in records if r.replay is None and len(r.shape) > 1 and r.shape[0] > n]
        fits = all(r.shape[0] % n == 0 and _positions_fit(r, rows) for r in folded)
        views = bool(folded) and all(r.folded == n for r in folded)
        if finding.interleaved is None and not (views and n > 1):
            if n == 1:
                self._single.add(layer)
            if finding.known or not folded or not fits or n == 1:
                return ""
            why = "its rows do not show to which example they belong"
            return unordered_message(layer.name, folded[0].shape[0], n, why)
        if n < CERTAIN and not fits and not views:
            why = f"the regular order that they have may be chance with {n} examples"
            return unordered_message(layer.name, max(finding.rows), n, why)
        certain = (n >= CERTAIN or views) and not (folded and fits)
        self._known[layer] = KnownOrder(bool(finding.interleaved), certain)
        return ""

    def _note_joined(
        self,
        layer: Layer,
        records: Sequence[RecordedCall],
        finding: RowFinding,
        rows: ForwardRows,
    ) -> None:
        """Remember the order of the rows of experts.

        Raises:
            CaptureError: They are in no order that is known.
        """
        tokens = records[0].shape[0]
        if tokens % rows.examples:  # the calls, which run again, say so themselves
            return
        own = finding.interleaved is not None or tokens == rows.examples
        if finding.fault or (finding.known and not own):
            raise CaptureError(joined_message(layer.path, tokens, rows.examples))
        if finding.interleaved:
            self._interleaved.add(layer)
        elif rows.examples > 1 and tokens > rows.examples and not own:
            why = "its rows do not show to which example they belong"
            message = unordered_message(layer.name, tokens, rows.examples, why)
            self._warn({layer: message})

    def _tell_unknown(self, forward: Forward) -> None:
        """Warn of layers that see flattened tokens where the number of examples is not known."""
        told: dict[Layer, str] = {}
        for record in (call.record for call in forward.calls):
            layer = record.layer
            new = layer not in self._probed and self._taker.tells_examples_apart(layer)
            if new and 1 < record.folded < len(record.inputs):
                told[layer] = unknown_examples_message(layer.name, len(record.inputs))
        self._probed.update(told)
        self._taker.warn_of_layout(told)


@attrs.frozen(eq=False)
class ProbeSink:
    """Keeps a sketch of each layer's gradients.

    Args:
        taker: Makes them.
        examples: Number of examples of the output.
        outside: Layers whose gradients are those of their modules.
    """

    taker: RowTaker
    examples: int
    outside: frozenset[Layer] = frozenset()
    sketches: dict[Layer, LayoutSketch] = attrs.field(factory=dict, init=False)

    def __call__(self, layer: Layer, calls: list[LayerCall]) -> None:
        """Take all calls of one layer."""
        samples_of = functools.partial(self.taker.samples_of, layer)
        joined = layer in self.outside
        self.sketches[layer] = sketch(samples_of, calls, self.examples, joined=joined)


def _confirm(findings: Iterable[RowFinding], examples: int) -> bool:
    """Return whether layers confirm that the rows of an output are ordered by example.

    The last layer always does. One with a row for each example tells, or all together.
    """
    found = [each for each in findings if each.rows]
    own = any(each.known and examples in each.rows for each in found)
    return own or (bool(found) and all(each.known and not each.fault for each in found))


def _tells(finding: RowFinding) -> bool:
    """Return whether the examples of a layer's rows are known, or known to be elsewhere."""
    return finding.every or bool(finding.fault)


def _most(heads: Iterable[HeadView]) -> int:
    """Return the number of examples."""
    return max(len(head.view) for head in heads)


def _both(one: RowFinding | None, other: RowFinding) -> RowFinding:
    """Return what is known of a layer that leads to two heads."""
    if one is None:
        return other
    same = one.interleaved if one.interleaved is not None else other.interleaved
    fault = one.fault or other.fault
    order = None if fault else same
    known, every = one.known or other.known, one.every or other.every
    return RowFinding(fault, order, known, one.rows, every)


def _joined(record: RecordedCall) -> bool:
    """Return whether a call gets the rows of all examples, and its layer lies inside."""
    return record.replay is not None and record.replay.joins_examples


def _suspect(record: RecordedCall, examples: int, *, alone: bool) -> bool:
    """Return whether the first dimension of a call may not count the examples.

    That a second one is as long is a reason on one rank alone: on others it may be chance, and all
    ranks must come to the same answer.
    """
    first, *others = record.shape or (1,)
    return first != examples or (alone and len(others) > 1 and others[0] == examples)


def _positions_fit(record: RecordedCall, rows: ForwardRows) -> bool:
    """Return whether an example has as many rows in a call as elsewhere."""
    return rows.fits(record.shape[0], math.prod(record.shape[1:-1]))
