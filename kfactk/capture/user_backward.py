"""The user's own backwards over one forward: whether they came, and the gradients they brought.

A backward counts when it adds to the `.grad` of the followed parameters, or returns their gradients
from `torch.autograd.grad`. One that is made to be differentiated again, as for a gradient penalty,
or that asks for gradients of inputs alone, counts nothing. Backwards through the same graph add up,
as they do in `.grad`.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfactk.capture.forward import Forward, Sink
from kfactk.capture.guard import parameter_nodes
from kfactk.capture.torch_modes import full_precision
from kfactk.samples import LayerCall
from kfactk.stages import Layer


class Scale(Protocol):
    """Says what gradients are multiplied by."""

    def factor(self) -> Tensor | float:
        """Return the factor, while a backward runs."""


class BackwardOwner(Protocol):
    """Whoever keeps the watches of a step."""

    def reach(self, layer: Layer, task: int, *, fills: bool) -> None:
        """Note, before its gradient is added, that a backward reaches a layer."""


class UserBackward:
    """Watches for the user's backwards over one forward.

    Gradients leave while the backward runs, each layer's when its last one has come. While the
    graph is retained another backward may add to them, so they stay until `finish`.

    Args:
        forward: The forward.
        output: The tensor that the likelihood reads, watched where no layer is followed.
        sink: Takes each layer with its gradients; `None` where only their coming matters.
        scale: Asked for the factor of the gradients while a backward runs.
        owner: Told of each layer that a backward reaches.
    """

    def __init__(
        self,
        forward: Forward,
        output: Tensor,
        sink: Sink | None,
        scale: Scale,
        owner: BackwardOwner,
    ) -> None:
        self.arrived = False
        self._sink, self._scale, self._owner = sink, scale, owner
        self._records = [call.record for call in forward.calls]
        self._ends = [parameter_nodes(call.parameters) for call in forward.calls]
        self._devices = {record.inputs.device.type for record in self._records}
        self._tops = [len(call.tops) for call in forward.calls]
        self._arrived: dict[int, int] = {}
        self._waiting: dict[int, dict[int, Tensor]] = {}
        self._calls: dict[int, list[LayerCall]] = {}
        self._reached: set[int] = set()
        self._gone: set[Layer] = set()
        self._derived: set[Layer] = set()
        self._unseen = False
        self._task, self._freed = -1, False
        self._last: Node | None = None
        self._handles = [
            node.register_prehook(_Prehook(self, number, outputs))
            for number, call in enumerate(forward.calls)
            for node, outputs in call.tops.items()
        ]
        if not forward.calls and output.grad_fn is not None:
            below = (child for child, _ in output.grad_fn.next_functions)
            for node in (output.grad_fn, *below):
                if node is not None:
                    self._handles.append(node.register_prehook(_Prehook(self, None, {0: 0})))

    @property
    def unseen(self) -> list[Layer]:
        """The layers that act in a derivative which a counted backward went through."""
        if not self._unseen:
            return []
        layers = dict.fromkeys(record.layer for record in self._records)
        return [layer for layer in layers if layer in self._derived]

    def forget(self) -> bool:
        """Drop what has arrived, because `.grad` was emptied; return whether anything had."""
        arrived, self.arrived = self.arrived, False
        self._waiting.clear()
        self._calls.clear()
        self._reached.clear()
        self._gone.clear()
        return arrived

    def forget_layers(self, layers: Collection[Layer]) -> None:
        """Drop what has arrived of these layers."""
        for number, record in enumerate(self._records):
            if record.layer in layers:
                self._waiting.pop(number, None)
                self._calls.pop(number, None)
                self._reached.discard(number)
        self._gone.difference_update(layers)

    def finish(self) -> None:
        """Hand on what has arrived: calls without a gradient add nothing. Nothing comes after."""
        for handle in self._handles:
            handle.remove()
        self._hand_on([self._records[number].layer for number in self._calls])
        self._last = None

    def take(self, number: int | None, gradients: Mapping[int, Tensor]) -> None:
        """Take what arrived at a node of one call, in the backward that runs now.

        Args:
            number: Which call; `None` for the output.
            gradients: The gradients of its outputs, by their number; of those that have one.
        """
        if number is not None and gradients and torch.is_grad_enabled():
            self._derived.add(self._records[number].layer)
            for gradient in gradients.values():
                if gradient.grad_fn is not None:
                    gradient.grad_fn.register_prehook(_Derived(self))
        if not self._counts(number):
            return
        task = torch._C._current_graph_task_id()
        if number is not None:
            self._owner.reach(self._records[number].layer, task, fills=bool(self._adds(number)))
        self.arrived = True
        if self._sink is None or number is None:
            return
        if self._records[number].layer in self._gone:
            return
        if task != self._task:
            self._task, self._freed = task, False
            for each in (self._reached, self._arrived, self._waiting):
                each.clear()
            torch.autograd.Variable._execution_engine.queue_callback(_End(self))
        elif not self._freed and self._last is not None:
            self._freed = _is_freed(self._last)
        self._last = torch._C._current_autograd_node()
        with torch.no_grad(), full_precision(self._devices):
            self._add(number, gradients)
            self._arrived[number] = self._arrived.get(number, 0) + 1
            if self._arrived[number] == self._tops[number] and number not in self._waiting:
                self._reached.add(number)
            if self._freed:
                self._hand_on(self._complete())

    def end_task(self) -> None:
        """End one backward: hand on what no other one can add to."""
        last, self._last = self._last, None
        with torch.no_grad(), full_precision(self._devices):
            for number in list(self._waiting):
                self._add(number, {}, last=True)
            self._reached.update(self._arrived)  # the loss may not depend on all their outputs
            if self._freed or (last is not None and _is_freed(last)):
                self._hand_on(self._complete())

    def derive(self) -> None:
        """Note that a derivative of the layers takes part in a backward that counts."""
        self._unseen = self._unseen or self._counts(None)

    def _counts(self, number: int | None) -> bool:
        """Return whether the backward that runs now gives gradients of the parameters.

        Args:
            number: The call whose parameters are meant; `None` for those of all calls.
        """
        adds = self._adds(number) if self._ends else None
        return not torch.is_grad_enabled() if adds is None else adds

    def _adds(self, number: int | None) -> bool | None:
        """Return whether the backward that runs now adds to the `.grad` of the parameters.

        Args:
            number: As for `_counts`.

        Returns:
            `None` where `torch.autograd.grad` was asked for their gradients.
        """
        return adds_to(set().union(*self._ends) if number is None else self._ends[number])

    def _add(self, number: int, gradients: Mapping[int, Tensor], *, last: bool = False) -> None:
        """Read a call, and add it to what other gradients of this backward or others gave.

        Gradients inside are linear in those of the outputs, so each may be read when it comes:
        nobody knows here which others will. Only those of outputs that another one was made from
        wait for it, or for the last one that comes: what came before is in it.
        """
        record = self._records[number]
        waiting = {**self._waiting.pop(number, {}), **gradients}
        missing = any(each.whole and n not in waiting for n, each in enumerate(record.outputs))
        if missing and not last and waiting:
            self._waiting[number] = waiting
            return
        if not waiting:
            return
        calls = record.calls(waiting, self._scale.factor())
        if number in self._calls:
            before = self._calls[number]
            calls = [_summed(one, other) for one, other in zip(before, calls, strict=True)]
        self._calls[number] = calls

    def _complete(self) -> list[Layer]:
        """Return the layers of which this backward has reached every call, in their order.

        The graph of the others may be whole yet, so that more gradients may come.
        """
        waiting = {
            record.layer
            for number, record in enumerate(self._records)
            if number not in self._reached
        }
        arrived = (self._records[number].layer for number in self._calls)
        return [layer for layer in arrived if layer not in waiting]

    def _hand_on(self, layers: list[Layer]) -> None:
        """Hand on these layers, unless they have been."""
        for layer in dict.fromkeys(layers):
            if layer in self._gone:
                continue
            self._gone.add(layer)
            calls: list[LayerCall] = []
            for number, record in enumerate(self._records):
                if record.layer is layer and number in self._calls:
                    record.check()
                    calls += self._calls.pop(number)
            if self._sink is not None:
                self._sink(layer, calls)


def _summed(one: LayerCall, other: LayerCall) -> LayerCall:
    """Return a call with the gradients of two backwards."""
    gradient = one.gradient * one.scale + other.gradient * other.scale
    return attrs.evolve(one, gradient=gradient, scale=1.0)


def adds_to(ends: Iterable[Node]) -> bool | None:
    """Return whether the backward that runs now adds to the `.grad` of some parameters.

    Args:
        ends: The nodes at which their gradients arrive.

    Returns:
        `None` where `torch.autograd.grad` was asked for their gradients.
    """
    try:
        return any(map(torch._C._will_engine_execute_node, ends))
    except RuntimeError as error:
        if "running autograd.grad()" not in str(error):
            raise
        return None


class _Prehook:
    """Tells a watch of a gradient that reaches a node; it does not keep the watch alive."""

    def __init__(self, watch: UserBackward, number: int | None, outputs: Mapping[int, int]) -> None:
        self._watch, self._number, self._outputs = weakref.ref(watch), number, outputs

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Run as a prehook of a node."""
        watch = self._watch()
        if watch is not None:
            found = ((number, gradients[output]) for number, output in self._outputs.items())
            watch.take(self._number, {n: each for n, each in found if each is not None})


class _Derived:
    """Tells a watch that a backward runs through a derivative of its layers."""

    def __init__(self, watch: UserBackward) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Run as a prehook of a node."""
        watch = self._watch()
        if watch is not None:
            watch.derive()


class _End:
    """Tells a watch of the end of a backward."""

    def __init__(self, watch: UserBackward) -> None:
        self._watch = watch

    def __call__(self) -> None:
        """Run as a callback of the autograd engine."""
        self._watch.end_task()


def _is_freed(node: Node) -> bool:
    """Return whether a node has run and gave up what it had saved, so that it cannot run again."""
    for name in dir(node):
        if name.startswith("_saved_"):
            try:
                saved = getattr(node, name)
            except RuntimeError as error:
                return "already been freed" in str(error)
            if isinstance(saved, Tensor):
                return False
    return False
