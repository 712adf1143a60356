"""What to say of an output that the recipe cannot read: all at once, and one line to paste."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from kfactk.capture.class_axis import find_class_axis, label_axes, likely_class_axis
from kfactk.capture.forward import Forward
from kfactk.capture.heads import Head, HeadView
from kfactk.capture.output_parts import OutputPart, last_parts, output_parts
from kfactk.capture.support import NO_LIKELIHOOD, no_logits
from kfactk.errors import CaptureError, nearest
from kfactk.stages import Layer
from kfactk.validation import OtherParts, likelihood_argument, listed


@attrs.frozen
class Proposal:
    """Likelihoods that can read an output.

    Args:
        heads: The likelihoods, each as `kfactk.build` takes it.
        parts: The parts that they read.
        chosen: Whether the recipe does not name these parts, and they were chosen.
        changed: Whether that, or another path or dimension of the classes, is new.
    """

    heads: list[dict[str, Any]]
    parts: list[OutputPart]
    chosen: bool = False
    changed: bool = True


class OutputAdvice:
    """Examines the output of one forward, its heads, and the layers behind each, together.

    Args:
        heads: The heads of the recipe.
        located: Their tensors, by number, as far as they were found.
        forward: The forward.
        batch: Its arguments, and what likelihoods may ask for besides.
        output: The user's function on what the model returns, which the heads apply too.
        exclude: The patterns of modules that the recipe leaves alone.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        located: Mapping[int, Tensor],
        forward: Forward,
        batch: Mapping[str, Any],
        *,
        output: Callable[[Any], Any] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        self._heads, self._located, self._exclude = list(heads), dict(located), list(exclude)
        self._forward, self._batch = forward, batch
        made = forward.output if output is None else output(forward.output)
        self._named = len(heads) > 1 or bool(heads[0].name)
        self._picked = not self._named and output is not None and isinstance(made, Tensor)
        """Whether the user's function alone says which tensor is read."""
        self._all = output_parts(forward.output, forward.calls)
        whole = output is None or self._picked
        self._parts = self._all if whole else output_parts(made, forward.calls)
        self._lost = not (self._named or self._located) and output is None
        self._further: list[str] = []
        self._guessed = False

    def unreadable(
        self, views: Mapping[int, HeadView], problems: Mapping[int, CaptureError]
    ) -> str:
        """Return the message for an output in which some heads cannot be read.

        Args:
            views: What was read, by number.
            problems: What is wrong with the others, likewise.
        """
        last = last_parts(self._parts)
        proposal = self._by_name(views, problems, last) if self._named else self._by_place(last)
        told = [str(problems[number]) for number in sorted(problems)] + self._further
        if proposal is not None and self._lost:
            told = [no_logits(self._forward.output), *self._further]
        text = " ".join(f"{each.removesuffix('.')}." for each in dict.fromkeys(told))
        if len(last) > 1:
            text += (
                f" Choose among the parts of the output: {listed([part.told for part in last])}."
            )
        if proposal is None or not (proposal.changed or self._silent(proposal.parts)):
            return text
        text += self._line(proposal, last)
        return f"{text} {NO_LIKELIHOOD}" if self._lost else text

    def other_parts(self) -> OtherParts:
        """Return the parts of the output that no head reads, and layers depend on them alone."""
        parts: dict[str, dict[str, Any]] = {}
        told: dict[str, str] = {}
        heard = [self._part_of(tensor) for tensor in self._located.values()]
        silent = self._silent(heard) if self._beside() else {}
        for part in last_parts(self._parts):
            for layer in part.layers:
                if layer in silent and layer.name not in parts:
                    parts[layer.name], told[layer.name] = self._entry(part), part.told
        heads: list[dict[str, Any]] = []
        for number, head in enumerate(self._heads):
            path = None if self._named else self._path_of(number)
            written = head.written_with(path, head.class_axis)
            heads += [] if written is None or "output" not in written else [written]
        return OtherParts(
            heads if len(heads) == len(self._heads) else [],
            parts,
            told,
            {layer.name: layer.path for layer in silent},
            self._exclude,
        )

    # ------------------------------------------------------------------------ what can be read

    def _by_name(
        self,
        views: Mapping[int, HeadView],
        problems: Mapping[int, CaptureError],
        last: Sequence[OutputPart],
    ) -> Proposal | None:
        """Return the named heads as they can be read; `None` where one cannot, or not be written.

        A name that leads nowhere is replaced by the nearest that does, or by the only one left.
        """
        taken = {id(tensor) for tensor in self._located.values()}
        free = {part.path: part for part in last if id(part.tensor) not in taken}
        found: list[dict[str, Any]] = []
        parts: list[OutputPart] = []
        changed = False
        for number, head in enumerate(self._heads):
            path: str | None = None
            tensor = self._located.get(number)
            read: Head | None = views[number].head if number in views else head
            if number in problems:
                if tensor is None:
                    near = nearest(head.name, free) or (list(free) if len(free) == 1 else [])
                    if not near:
                        return None
                    path, tensor = near[0], free.pop(near[0]).tensor
                read = self._reading(head, tensor)
            written = None if read is None else head.written_with(path, read.class_axis)
            if written is None:
                return None
            if written["output"] == "" and len(self._heads) == 1:  # the tensor is all there is
                del written["output"]
            found.append(written)
            parts += [] if tensor is None else [self._part_of(tensor)]
            changed |= path is not None or (number in problems and read is not head)
        return Proposal(found, parts, changed=changed)

    def _by_place(self, last: Sequence[OutputPart]) -> Proposal | None:
        """Return likelihoods for parts that the recipe does not name; `None` for none.

        Of several, the first that the recipe's likelihood can read has that.
        """
        head, tensor = self._heads[0], self._located.get(0)
        read = None if tensor is None else self._reading(head, tensor)
        if head.written is None:
            return None
        if tensor is not None and read is not None:
            own = self._part_of(tensor)
            others = self._beyond(own, last) if own.path and not self._picked else []
            if not others:
                alone = head.written_with(None, read.class_axis) or {}
                return Proposal([alone], [own], changed=read is not head)
            parts, first = [own, *others], own
        else:
            parts = [part for part in last if len(part.tensor) == len(last[0].tensor)]
            if not parts or (len(parts) == 1 and parts[0].tensor is tensor):
                return None
            first, read = self._first_read(head, parts)
        own_entry = None if read is None else head.written_with(first.path, read.class_axis)
        entries = [own_entry if p is first and own_entry else self._entry(p) for p in parts]
        if len(entries) == 1 and not parts[0].path:
            del entries[0]["output"]
        return Proposal(entries, parts, chosen=True)

    def _first_read(
        self, head: Head, parts: Sequence[OutputPart]
    ) -> tuple[OutputPart, Head | None]:
        """Return the part that is most likely a head's, and the head that reads it, if one can.

        It is the first that labels are there for, or else the first that can be read.
        """
        read = [(part, told) for part in parts if (told := self._reading(head, part.tensor))]
        labels = (each for each in read if label_axes(head.likelihood, each[0].tensor, self._batch))
        return next(labels, next(iter(read), (parts[0], None)))

    def _reading(self, head: Head, output: Tensor) -> Head | None:
        """Return a head that reads a tensor, perhaps with another dimension of the classes.

        Returns:
            `None` where none can. What is in the way of a head that can is noted.
        """
        told = head
        try:
            head.view(output)
        except CaptureError:
            if output.ndim < 3:
                return None
            told = head.with_class_axis(self._axis(output))
            try:
                told.view(output)
            except CaptureError:
                return None
        try:
            told.read(output, self._batch)
        except CaptureError as error:
            self._further.append(str(error))
        return told

    def _found_axis(self, output: Tensor) -> int | None:
        likelihood = self._heads[0].likelihood
        found = find_class_axis(likelihood, output, self._batch, self._forward)
        return None if found is None else found.axis

    def _axis(self, output: Tensor) -> int:
        """Return where the classes are in a tensor; where nothing tells, a guess."""
        found = self._found_axis(output)
        self._guessed |= found is None
        return likely_class_axis(output) if found is None else found

    def _entry(self, part: OutputPart) -> dict[str, Any]:
        """Return a head for a part of which nothing is said."""
        axis = {} if part.tensor.ndim < 3 else {"class_axis": self._axis(part.tensor)}
        return {"output": part.path, "likelihood": {**self._beside(), **axis}}

    def _beside(self) -> Mapping[str, Any]:
        """Return the likelihood that is proposed for such a part; nothing where none is known.

        The recipe's own names one, or it is that.
        """
        name = getattr(self._heads[0].likelihood, "beside", None)
        if name is not None:
            return {"name": name}
        written = self._heads[0].written
        return {} if written is None else dict(written["likelihood"])

    def _beyond(self, own: OutputPart, last: Iterable[OutputPart]) -> list[OutputPart]:
        """Return parts of as many examples that depend on a layer that no part before does."""
        found, layers = [], set(own.layers)
        for part in last:
            if len(part.tensor) == len(own.tensor) and not layers.issuperset(part.layers):
                found.append(part)
                layers.update(part.layers)
        return found

    def _silent(self, heard: Sequence[OutputPart]) -> dict[Layer, None]:
        """Return the layers that lead to some part of the output, but to none of these."""
        seen = set().union(*(part.layers for part in heard))
        ran = dict.fromkeys(call.record.layer for call in self._forward.calls)
        leads = set().union(*(part.layers for part in (*self._all, *self._parts)))
        return {layer: None for layer in ran if layer in leads - seen}

    def _part_of(self, tensor: Tensor) -> OutputPart:
        """Return the part that a tensor is; one without a path where it is none."""
        there = (part for part in self._parts if part.tensor is tensor)
        return next(there, None) or OutputPart.of("", tensor, self._forward.calls)

    def _path_of(self, number: int) -> str | None:
        """Return where an unnamed head is in the output; `None` where it has no path."""
        if self._picked or number not in self._located:
            return None
        return self._part_of(self._located[number]).path or None

    # --------------------------------------------------------------------------- the sentences

    def _line(self, proposal: Proposal, last: Sequence[OutputPart]) -> str:
        """Return the line to paste, and what to know of it."""
        silent = self._silent(proposal.parts)
        arguments = [likelihood_argument(proposal.heads)]
        if self._picked and proposal.chosen:
            arguments.append("output=None")
        if silent:
            left = dict.fromkeys([*self._exclude, *(layer.path for layer in silent)])
            arguments.append(f"exclude={list(left)!r}")
        start = "With that mended, this line works" if self._further else "This line works as it is"
        text = f" {start}: build(..., {', '.join(arguments)})."
        if proposal.chosen and len(proposal.heads) > 1:
            text += (
                " Put there the likelihood of each loss: 'categorical' is cross entropy, "
                "'gaussian' a squared error. Leave out a part that no loss trains."
            )
        if self._guessed and proposal.chosen:
            text += (
                " Check the dimension of the classes, which nothing tells for certain: "
                "class_axis=1 is the layout of F.cross_entropy, class_axis=-1 has them last."
            )
        if silent:
            names = listed([repr(layer.name) for layer in silent])
            text += f" Leave these, which lead to no such part, to their plain gradients: {names}."
        others = [part for part in last if set(part.layers) & set(silent) and part.path]
        if others and self._named:
            entries = listed([likelihood_argument([self._entry(part)]) for part in others])
            text += f" To precondition them, add the likelihood of their loss, such as {entries}."
        return text
