"""What a curvature covers: a layer, and how calls of its module run again."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
"""Named tensors: factors, one decomposed factor, or moments."""


@attrs.frozen(eq=False)
class Layer:
    """One layer that a curvature covers: the parameters that are preconditioned together.

    Args:
        name: Unique name: the module's path in the model, followed by `[part]` where there is one.
        module: The module. Read parameters through `tensors`, since wrappers may replace them.
        parameters: Names of the trained parameters, the anchor first; those of a module inside have
            its name in front, as "out_proj.weight". A frozen bias is not among them: the layer's
            matrix then has no bias column.
        part: Which part of the module this is; "" where the module is one layer.
        sites: All modules that hold these parameters; several where modules are tied.
        replay: How a call of the module runs again, where the layer lies inside the module; `None`
            where the module's own calls are the layer's.

    Example:
        >>> layer = Layer("fc", nn.Linear(2, 3), ("weight", "bias"))
        >>> layer.anchor.shape, layer.bias, layer.path
        (torch.Size([3, 2]), True, 'fc')
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]
    part: str = ""
    sites: tuple[nn.Module, ...] = attrs.field(
        default=attrs.Factory(lambda self: (self.module,), takes_self=True)
    )
    replay: Replay | None = None

    @property
    def bias(self) -> bool:
        """Whether the layer's matrix has a bias column."""
        return "bias" in self.parameters

    @property
    def path(self) -> str:
        """The module's path in the model."""
        return self.name.removesuffix(f"[{self.part}]") if self.part else self.name

    @property
    def anchor(self) -> nn.Parameter:
        """The parameter under which the layer's curvature is saved."""
        return self.tensors()[self.parameters[0]]

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return the parameters themselves, by name."""
        return {name: operator.attrgetter(name)(self.module) for name in self.parameters}


def parameter_at(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter of a module, or of one inside ("out_proj.weight"); `None` for none.

    Example:
        >>> parameter_at(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape
        torch.Size([3, 2])
    """
    try:
        owner, key = owner_of(module, name)
    except AttributeError:  # there is no such module inside
        return None
    return owner._parameters.get(key)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter of this name, and the name there."""
    path, _, key = name.rpartition(".")
    return module.get_submodule(path) if path else module, key


@attrs.frozen(eq=False)
class ModuleCall:
    """One call of a module, with all that it takes to run it again.

    Args:
        module: The module. Read settings from it, and parameters from here.
        args: Its arguments, tensors detached.
        kwargs: Its keyword arguments, likewise.
        parameters: All parameters that the call could use, by name, detached: those of modules
            inside too, as "out_proj.weight".
        training: Whether the module was in training mode.
        examples: Number of examples of the model's output; `None` where it is not known. A module
            that gets the rows of all examples in one dimension needs it.
        interleaved: Whether such a row r belongs to example `r % examples`; else rows of an example
            are next to each other.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    parameters: Tensors
    training: bool
    examples: int | None = None
    interleaved: bool = False


@attrs.frozen(eq=False)
class InnerCall:
    """One product of inputs and parameters inside a module's call.

    Args:
        part: The part of the module whose parameters it uses.
        inputs: In the form that the curvature's `samples` takes.
        output: Its output, part of the graph of the module's output.
        tag: What `LayerCall.tag` says of it.
    """

    part: str
    inputs: Tensor
    output: Tensor
    tag: str = ""


@attrs.frozen(eq=False)
class Replayed:
    """What a call of a module gave when it ran again.

    Args:
        outputs: The tensors of the module's output that are followed.
        inner: The products inside; each output leads to one of `outputs`.
    """

    outputs: Sequence[Tensor]
    inner: Sequence[InnerCall]


class Replay(Protocol):
    """Runs calls of a module again, to read gradients inside of it.

    The framework calls `run` where the gradients of the module's outputs arrive, with gradients
    enabled, and with the random state, the autocast and the attention kernels of the call. It then
    differentiates `outputs` with respect to the output of each product. The user's own forward and
    the global random state stay as they are.

    Laws: `run(call).outputs` equal what the call itself returned, which is checked each time. Where
    the module computes one of them from another, so does `run`, from the tensor that it returns.

    Where the module gets the rows of all examples in the first dimension, `run` needs
    `ModuleCall.examples` and `interleaved`. A class then says so by `joins_examples = True`, and
    the framework finds out in which order they are.
    """

    def outputs(self, output: Any) -> Sequence[Any]:
        """Return the tensors in the module's output that are followed, always in the same order.

        Where the loss depends on others too, the guard refuses the layers.
        """

    def run(self, call: ModuleCall) -> Replayed:
        """Compute the outputs again, from `call.parameters`."""
