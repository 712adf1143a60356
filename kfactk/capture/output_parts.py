"""The tensors in what a model returned: their paths, and which layers each depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn
from torch.autograd.graph import Node

from kfactk.capture.forward import TracedCall, nodes_behind
from kfactk.capture.heads import at_path
from kfactk.errors import CaptureError
from kfactk.jets import Jet
from kfactk.stages import Layer


@attrs.frozen(eq=False)
class OutputPart:
    """One tensor in what a model returned.

    Args:
        path: Where it is, as `at_path` reads it; "" where it is all that was returned.
        tensor: The tensor.
        layers: The layers with recorded calls that it depends on, in the order of the forward.
        nodes: The nodes of autograd that it was made by.
    """

    path: str
    tensor: Tensor
    layers: dict[Layer, None]
    nodes: set[Node]

    @classmethod
    def of(cls, path: str, tensor: Tensor, calls: Iterable[TracedCall]) -> OutputPart:
        """Return the part that a tensor is."""
        nodes = nodes_behind(tensor)
        layers = (call.record.layer for call in calls if not nodes.isdisjoint(call.tops))
        return cls(path, tensor, dict.fromkeys(layers), nodes)

    @property
    def told(self) -> str:
        """Its path and its shape, in words."""
        where = repr(self.path) if self.path else "the tensor"
        return f"{where} of shape {list(self.tensor.shape)}"

    @property
    def parameters(self) -> set[Node]:
        """The nodes of the parameters that it depends on."""
        return {node for node in self.nodes if not node.next_functions}

    def leads_to(self, other: OutputPart) -> bool:
        """Return whether another part was made from this one."""
        node = self.tensor.grad_fn
        return node is not other.tensor.grad_fn and node in other.nodes


def output_tensors(output: Any) -> dict[str, Tensor]:
    """Return the tensors that a model made in what it returned, by their paths for `at_path`.

    These are the floating ones that need gradients, in mappings, sequences, and the attributes of
    objects. A tensor that is there twice counts once. The parts of a `kfactk.Jet` are none.

    Args:
        output: What a model returned.

    Example:
        >>> import torch
        >>> z = torch.ones(2, requires_grad=True) * 2
        >>> list(output_tensors({"mask": torch.ones(2), "aux": [z + 1, {"mean": z}]}))
        ['aux.0', 'aux.1.mean']
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, tensor in _walk(output, "", set(), inside=False):
        if id(tensor) not in seen and tensor.is_floating_point() and tensor.grad_fn is not None:
            seen.add(id(tensor))
            if _leads_there(output, path, tensor):
                found[path] = tensor
    return found


def output_parts(output: Any, calls: Sequence[TracedCall]) -> list[OutputPart]:
    """Return the parts of what a model returned.

    Args:
        output: What a model returned.
        calls: The recorded calls of the forward.
    """
    return [OutputPart.of(path, each, calls) for path, each in output_tensors(output).items()]


def last_parts(parts: Sequence[OutputPart]) -> list[OutputPart]:
    """Return the parts that a likelihood may be of.

    Not among them are numbers, such as a loss; hidden states, from which a part with more
    parameters was made; and what was made from another part without more, such as its softmax.
    """
    own = {id(part): part.parameters for part in parts}
    shaped = [part for part in parts if part.tensor.ndim]

    def replaced(part: OutputPart) -> bool:
        mine = own[id(part)]
        return any(
            (part.leads_to(other) and mine < own[id(other)])
            or (other.leads_to(part) and mine == own[id(other)])
            for other in shaped
        )

    return [part for part in shaped if not replaced(part)]


def _walk(value: Any, path: str, above: set[int], *, inside: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors and their paths.

    Args:
        value: Where to look.
        path: Its path.
        above: The ids of what it is in.
        inside: Whether it is in an attribute of an object, whose other objects are left alone.
    """
    if isinstance(value, Tensor):
        yield path, value
        return
    children = _children(value)
    if id(value) in above or (children is None and inside):
        return
    below = inside or children is None
    for name, child in (_attributes(value) if children is None else children).items():
        inner = f"{path}.{name}" if path else name
        yield from _walk(child, inner, above | {id(value)}, inside=below)


def _children(value: Any) -> dict[str, Any] | None:
    """Return what a container holds, by name; `None` where a value is no container."""
    if isinstance(value, Mapping):
        return {str(key): each for key, each in value.items()}
    if isinstance(value, tuple | list):
        names = getattr(value, "_fields", range(len(value)))
        return {str(name): each for name, each in zip(names, value, strict=True)}
    return None


def _attributes(value: Any) -> dict[str, Any]:
    """Return the public attributes of an object that a model may return."""
    if isinstance(value, nn.Module | Jet | type) or callable(value):
        return {}
    names: Iterable[str] = getattr(value, "__dict__", ())
    if dataclasses.is_dataclass(value):
        names = [each.name for each in dataclasses.fields(value)]
    elif attrs.has(type(value)):
        names = [each.name for each in attrs.fields(type(value))]
    there = (name for name in names if not name.startswith("_"))
    return {name: getattr(value, name) for name in there if hasattr(value, name)}


def _leads_there(output: Any, path: str, tensor: Tensor) -> bool:
    try:
        return at_path(output, path) is tensor
    except CaptureError:  # another key hides it
        return False
