"""`OutputReader`: reads the heads in what a model returned, or says all that is in the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfactk.capture.class_axis import ClassAxis, find_class_axis
from kfactk.capture.forward import Forward
from kfactk.capture.heads import Head, HeadView
from kfactk.capture.output_advice import OutputAdvice
from kfactk.capture.output_parts import output_tensors
from kfactk.capture.torch_modes import full_precision
from kfactk.errors import CaptureError, KfactkWarning
from kfactk.validation import OtherParts


class OutputReader:
    """Reads the heads of a model.

    Args:
        heads: What the parts of the output mean.
        output: The user's function on what the model returns, which the heads apply too.
        exclude: The patterns of modules that the recipe leaves alone, for the line to paste.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        output: Callable[[Any], Any] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        self.heads = list(heads)
        """The heads, as far as earlier forwards told more of them than the recipe."""
        self.others = OtherParts()
        """The parts of the output that no head reads, as last seen."""
        self._output, self._exclude = output, tuple(exclude)
        self._seen: tuple[str, ...] = ()

    def locate(self, output: Any) -> list[tuple[Head, Tensor]]:
        """Return the heads that an output has, each with its part, as they were found before."""
        found = [(head, head.locate(output)) for head in self.heads]
        return [(head, each) for head, each in found if each is not None]

    def replace(self, before: Head, now: Head) -> None:
        """Read with another head from now on."""
        self.heads[self.heads.index(before)] = now

    def read(self, forward: Forward, batch: Mapping[str, Any]) -> list[HeadView]:
        """Return what the output of a forward holds of each head.

        Where the classes of a head are is found where only one dimension can be, and said.

        Args:
            forward: The forward.
            batch: Its arguments, and what likelihoods may ask for besides.

        Raises:
            CaptureError: A head is not there, or its likelihood cannot read it. It tells of all
                heads, and of the layers that none of them depends on.
        """
        located, problems = self._located(forward.output)
        if not located and not problems:
            raise CaptureError(
                "the model returned the output of none of the heads, and all are optional. Name "
                "the one that this forward has, or run it before bind()."
            )
        views: dict[int, HeadView] = {}
        axes: dict[int, ClassAxis] = {}
        with torch.enable_grad(), full_precision({each.device.type for each in located.values()}):
            for number, tensor in located.items():
                try:
                    views[number], axis = self._read_head(number, tensor, forward, batch)
                except CaptureError as error:
                    problems[number] = error
                else:
                    axes |= {} if axis is None else {number: axis}
            if problems:
                advice = self._advice(forward, batch, located)
                raise CaptureError(advice.unreadable(views, problems)) from problems[min(problems)]
        for number, axis in axes.items():
            self._say(number, views[number], axis)
        self._note_others(forward, batch, located)
        return list(views.values())

    def _located(self, output: Any) -> tuple[dict[int, Tensor], dict[int, CaptureError]]:
        """Return the tensors of the heads that are there, and what is wrong with the others."""
        located: dict[int, Tensor] = {}
        problems: dict[int, CaptureError] = {}
        for number, head in enumerate(self.heads):
            try:
                found = head.locate(output)
            except CaptureError as error:
                problems[number] = error
            else:
                located |= {} if found is None else {number: found}
        return located, problems

    def _read_head(
        self, number: int, output: Tensor, forward: Forward, batch: Mapping[str, Any]
    ) -> tuple[HeadView, ClassAxis | None]:
        """Return one head's output, and where its classes are if that was not said."""
        head, axis = self.heads[number], None
        try:
            return head.read(output, batch), None
        except CaptureError:
            if head.class_axis is None:
                axis = find_class_axis(head.likelihood, output, batch, forward)
            if axis is None:
                raise
        return head.with_class_axis(axis.axis).read(output, batch), axis

    def _say(self, number: int, view: HeadView, axis: ClassAxis) -> None:
        """Go on with the dimension of the classes that was found, and warn."""
        assert view.head is not None
        self.heads[number] = view.head
        name = f"head {view.head.name!r}: " if view.head.name else ""
        warnings.warn(
            f"{name}the output of shape {list(view.output.shape)} has its classes in dimension "
            f"{axis.axis}, as {axis.teller}. Give the likelihood class_axis={axis.axis} to say so "
            "yourself (said once)",
            KfactkWarning,
            stacklevel=2,
        )

    def _note_others(
        self, forward: Forward, batch: Mapping[str, Any], located: Mapping[int, Tensor]
    ) -> None:
        """Note the parts of an output that no head reads, where they are others than before."""
        heads, tensors = {id(each) for each in located.values()}, output_tensors(forward.output)
        rest = [path for path, each in tensors.items() if id(each) not in heads]
        if tuple(rest) != self._seen:
            self._seen = tuple(rest)
            advice = self._advice(forward, batch, located) if rest else None
            self.others = OtherParts() if advice is None else advice.other_parts()

    def _advice(
        self, forward: Forward, batch: Mapping[str, Any], located: Mapping[int, Tensor]
    ) -> OutputAdvice:
        return OutputAdvice(
            self.heads, located, forward, batch, output=self._output, exclude=self._exclude
        )
