"""The heads of a model: which part of its output holds the parameters of which likelihood.

With several heads k, whose losses are means over M_k likelihood terms and add up with weights w_k,

    loss = sum_k w_k loss_k,    F = sum_k w_k F_k.

Each head has Fisher passes of its own, so their gradients never mix. Sums are divided by N, the
number of examples: the losses of head k are multiplied by sqrt(w_k N / M_k). A head without a term
in a forward adds nothing there, as to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kfactk.capture.replay import tensors_of
from kfactk.capture.support import model_output
from kfactk.errors import CaptureError, OptionError, near_names
from kfactk.stages import Likelihood
from kfactk.validation import attribute_errors


@attrs.frozen
class FlatOutput:
    """Tells of how many examples a flattened output holds the rows: of as many as an argument.

    Args:
        argument: Name of the argument.
        leaf: Which of the tensors in it.
    """

    argument: str
    leaf: int = 0

    @classmethod
    def of(cls, rows: int, batch: Mapping[str, Any]) -> FlatOutput | None:
        """Return what an output of so many rows is a flattening of, as its shape has it.

        Args:
            rows: Number of its rows, more than an argument has.
            batch: The arguments of the forward.

        Returns:
            `None` where a tensor has as many rows, or none divides them.

        Example:
            >>> FlatOutput.of(6, {"tokens": torch.ones(2, 3), "scale": torch.ones(5)})
            FlatOutput(argument='tokens', leaf=0)
        """
        found = None
        for name, value in batch.items():
            for leaf, tensor in enumerate(tensors_of(value)):
                if tensor.ndim and len(tensor) == rows:
                    return None
                here = cls(name, leaf)
                if found is None and here.examples(rows, batch) is not None:
                    found = here
        return found

    @classmethod
    def chosen(cls, rows: int, batch: Mapping[str, Any]) -> FlatOutput | None:
        """Return what an output of so many rows may be a part of the tokens of.

        Returns:
            `None` where a tensor has as many rows, or none has fewer rows and more tokens.

        Example:
            >>> FlatOutput.chosen(5, {"tokens": torch.ones(2, 3)})
            FlatOutput(argument='tokens', leaf=0)
            >>> FlatOutput.chosen(7, {"tokens": torch.ones(2, 3)}) is None
            True
        """
        found = None
        for name, value in batch.items():
            for leaf, tensor in enumerate(tensors_of(value)):
                if tensor.ndim and len(tensor) == rows:
                    return None
                if tensor.ndim > 1 and found is None and len(tensor) < rows:
                    found = cls(name, leaf) if rows < len(tensor) * tensor.shape[1] else None
        return found

    def examples(self, rows: int, batch: Mapping[str, Any]) -> int | None:
        """Return N where an output of so many rows divides by the argument; else `None`."""
        n, *sizes = self._shape(batch) or (0,)
        return n if 0 < n < rows and rows % n == 0 and rows // n in runs(sizes) else None

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the number of rows of the argument; 0 where it is not there."""
        return (self._shape(batch) or (0,))[0]

    def _shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        leaves = tensors_of(batch.get(self.argument))
        return tuple(leaves[self.leaf].shape) if self.leaf < len(leaves) else ()


def runs(sizes: Sequence[int]) -> set[int]:
    """Return the products of neighbouring sizes.

    Example:
        >>> sorted(runs([2, 3, 5]))
        [2, 3, 5, 6, 15, 30]
    """
    ends = range(1, len(sizes) + 1)
    return {math.prod(sizes[start:end]) for end in ends for start in range(end)}


@attrs.frozen(eq=False)
class Head:
    """One likelihood of a model.

    Args:
        likelihood: What its output means.
        find: Finds its output in what the model returns.
        weight: w, the factor of its loss.
        optional: Whether a forward may lack it.
        name: What the user calls it, where there are several.
        flat: What its output is a flattening of, where that is known.
        written: The head as `kfactk.build` takes it, `{"output": ..., "likelihood": {"name": ...}}`
            in JSON's types, without "output" where it is the only one; `None` where it cannot be
            written so.
    """

    likelihood: Likelihood
    find: Callable[[Any], Any] = model_output
    weight: float = 1.0
    optional: bool = False
    name: str = ""
    flat: FlatOutput | None = None
    written: Mapping[str, Any] | None = None

    @property
    def class_axis(self) -> int | None:
        """The dimension of the classes, where its likelihood knows it."""
        axis: int | None = getattr(self.likelihood, "class_axis", None)
        return axis

    def with_class_axis(self, axis: int) -> Head:
        """Return the same head with its classes in a dimension.

        A likelihood that has no such option, or whose other options leave no room for it, stays as
        it is.
        """
        if not attrs.has(type(self.likelihood)) or not hasattr(self.likelihood, "class_axis"):
            return self
        likelihood: Any = self.likelihood
        try:
            return attrs.evolve(self, likelihood=attrs.evolve(likelihood, class_axis=axis))
        except OptionError:
            return self

    def written_with(
        self, output: str | None = None, class_axis: int | None = None
    ) -> dict[str, Any] | None:
        """Return how `kfactk.build` takes the head, with another output or dimension of classes.

        Args:
            output: Path of its output; `None` for its own.
            class_axis: The dimension; `None` for its own.
        """
        if self.written is None:
            return None
        axis = {} if class_axis is None else {"class_axis": class_axis}
        likelihood = {**self.written["likelihood"], **axis}
        path = {} if output is None else {"output": output}
        return {**path, **self.written, **path, "likelihood": likelihood}

    def locate(self, output: Any) -> Tensor | None:
        """Return its part of what a model returned; `None` where an optional head has none.

        Raises:
            CaptureError: There is no tensor.
        """
        found = self.find(output)
        if isinstance(found, Tensor) or (found is None and self.optional):
            return found
        if not self.name:
            raise CaptureError(
                f"output= found {type(found).__name__} in what the model returned; it must find a "
                "tensor."
            )
        raise CaptureError(
            f"head {self.name!r} is {found if found is None else type(found).__name__} in what the "
            "model returned, and not a tensor. If some forwards have no such output, give "
            f"kfactk.head({self.name!r}, ..., optional=True)."
        )

    def read(self, output: Tensor, batch: Mapping[str, Any]) -> HeadView:
        """Return its part of an output as the likelihood sees it.

        Args:
            output: What `locate` found.
            batch: What the likelihood may ask for by name.

        Raises:
            CaptureError: The likelihood cannot read it.
        """
        view = self.view(output)
        with attribute_errors("likelihood", self.likelihood, "on the model's output"):
            weights = self.likelihood.term_weights(view.detach(), batch)
        terms: Tensor | float = float(view.shape[0] * view.shape[1])
        if weights is not None:
            terms = weights.detach().sum().double()
        found = HeadView(output, view, weights, terms, self)
        examples = None if self.flat is None else self.flat.examples(len(view), batch)
        return found if examples is None else found.by_example(examples)

    def view(self, output: Tensor) -> Tensor:
        """Return its part of an output as `[N, S, C]`.

        Raises:
            CaptureError: The likelihood cannot read it.
        """
        try:
            with attribute_errors("likelihood", self.likelihood, "on the model's output"):
                return self.likelihood.view(output)
        except CaptureError as error:
            if not self.name:
                raise
            raise CaptureError(f"head {self.name!r}: {error}") from error


@attrs.frozen(eq=False)
class HeadView:
    """The output of one head in one forward.

    Args:
        output: Its output, as the model returned it.
        view: The same as `[N, S, C]`.
        weights: Weights of the terms, `[N, S]`; `None` where all are 1.
        terms: M, their sum.
        head: The head; `None` where the loss alone says what is measured.
    """

    output: Tensor
    view: Tensor
    weights: Tensor | None
    terms: Tensor | float
    head: Head | None = None

    @property
    def likelihood(self) -> Likelihood:
        """What the output means."""
        assert self.head is not None
        return self.head.likelihood

    def by_example(self, examples: int) -> HeadView:
        """Return the same with rows `[N T, S, C]` as `[N, T S, C]`."""
        view = self.view.reshape(examples, -1, self.view.shape[-1])
        weights = None if self.weights is None else self.weights.reshape(examples, -1)
        return attrs.evolve(self, view=view, weights=weights)

    def factor(self, terms: Tensor | float) -> Tensor | float:
        """Return what its Fisher losses are multiplied by, where sums are divided by `terms`."""
        assert self.head is not None
        if terms is self.terms:
            return float(self.head.weight**0.5)
        own = torch.as_tensor(self.terms, dtype=torch.float64, device=self.view.device)
        share = torch.where(own > 0, terms / own.clamp(min=1e-300), 0.0)
        return (self.head.weight * share).sqrt().to(self.view.dtype)


def terms_of(heads: Sequence[HeadView]) -> Tensor | float:
    """Return the number that the sums of a forward are divided by.

    It is the number of terms of a single head; of several, the number of examples.
    """
    if len(heads) == 1 or heads[0].head is None:
        return heads[0].terms
    return float(max(len(head.view) for head in heads))


def of_the_loss(output: Any, terms: Tensor | float) -> list[HeadView]:
    """Return every tensor in an output that the loss may be made of.

    Args:
        output: What a model returned, or what `output=` made of it.
        terms: Number of terms of the loss.

    Raises:
        CaptureError: There is none.
    """
    found = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
    views = [HeadView(each, each, None, terms) for each in found if each.requires_grad]
    if not views:
        raise CaptureError(
            f"the model returned {type(output).__name__}, in which no tensor was found that needs "
            "gradients. Say where one is: build(..., output=lambda out: out.loss)."
        )
    return views


def at_path(output: Any, path: str, *, optional: bool = False) -> Any:
    """Return the part of an output at a path of keys, attributes and numbers.

    A key may hold dots, or be a number.

    Args:
        output: What a model returned.
        path: Such as "value", "aux.logits" or "1".
        optional: Whether to return `None` where its last part is not there.

    Raises:
        CaptureError: It leads nowhere.

    Example:
        >>> at_path({"aux": [torch.tensor(1.0), torch.tensor(2.0)]}, "aux.1")
        tensor(2.)
    """
    found, rest = output, path
    while rest:
        part, there = _first(found, rest)
        if part is None:
            part, last = rest.partition(".")[0], "." not in rest
            near = near_names(part, there)
            if optional and last and not near:
                return None
            names = f" There are: {', '.join(map(repr, there))}." if there else ""
            raise CaptureError(
                f"the model's output has no {path!r}: {type(found).__name__} has no {part!r}."
                f"{near}{names} Name a part of what the model returns"
            )
        found, rest = there[part], rest[len(part) + 1 :]
    return found


def _first(found: Any, path: str) -> tuple[str | None, dict[str, Any]]:
    """Return the longest start of a path that is there, and what is there by name."""
    if isinstance(found, Mapping):
        there = {str(key): each for key, each in found.items()}
    elif isinstance(found, (tuple, list)):
        there = {str(number): each for number, each in enumerate(found)}
    else:
        there = {}
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        start = ".".join(parts[:length])
        if start in there:
            return start, there
    if not isinstance(found, Mapping) and hasattr(found, parts[0]):
        return parts[0], {parts[0]: getattr(found, parts[0])}
    return None, there
