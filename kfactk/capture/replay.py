"""Calls that run again: gradients inside a module that computes as a whole, such as attention.

The forward of the user's stays as it is. Only the call's arguments are kept, and what else its
numbers depend on. Where the gradient of its output arrives, the call runs again by itself, and the
gradients inside are taken from that small graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from kfactk.capture.outputs import RecordedOutput
from kfactk.capture.torch_modes import full_precision
from kfactk.errors import CaptureError
from kfactk.samples import LayerCall
from kfactk.stages import InnerCall, ModuleCall, Replay
from kfactk.validation import (
    attribute_errors,
    input_modified_message,
    replay_differs_message,
    ungathered_message,
)

KERNELS = ("flash", "mem_efficient", "math", "cudnn")
"""Kernels of attention that torch chooses from: with dropout they draw different numbers."""


@attrs.frozen(eq=False)
class CallContext:
    """What the numbers of a call depend on besides its arguments and parameters.

    Args:
        device: Where it ran.
        random: Random state of the CPU.
        device_random: Random state of the device, where that is another one.
        autocast: For each kind of device, whether autocast is on, and its precision.
        kernels: Which of `KERNELS` may be chosen.
    """

    device: torch.device
    random: Tensor
    device_random: Tensor | None
    autocast: Mapping[str, tuple[bool, torch.dtype]]
    kernels: tuple[bool, ...]

    @classmethod
    def now(cls, device: torch.device) -> CallContext:
        """Return the context of a call that begins now."""
        kinds = {kind for kind in ("cpu", device.type) if torch.amp.is_autocast_available(kind)}
        return cls(
            device,
            torch.get_rng_state(),
            _random_state(device),
            {k: (torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds},
            _kernels(),
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Surround a call that runs again; then everything is as it was before."""
        before = CallContext.now(self.device)
        with contextlib.ExitStack() as stack:
            for name, (enabled, dtype) in sorted(self.autocast.items()):
                if enabled or torch.is_autocast_enabled(name):
                    stack.enter_context(torch.autocast(name, dtype=dtype, enabled=enabled))
            stack.callback(before._choose)
            self._choose()
            yield

    @property
    def precisions(self) -> set[torch.dtype]:
        """The precisions of autocast, where it is on."""
        return {dtype for enabled, dtype in self.autocast.values() if enabled}

    def _choose(self) -> None:
        """Set random states and kernels."""
        torch.set_rng_state(self.random)
        if self.device_random is not None:
            module = torch.get_device_module(self.device)
            where = () if self.device.type == "mps" else (self.device,)
            module.set_rng_state(self.device_random, *where)
        for name, enabled, current in zip(KERNELS, self.kernels, _kernels(), strict=True):
            if enabled != current:
                getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)


@attrs.frozen(eq=False)
class FollowedOutput:
    """One tensor of what a call returned.

    Args:
        place: Its place in `Replay.outputs`.
        tensor: The tensor, detached.
        recorded: What it looked like, and how its gradient is read.
    """

    place: int
    tensor: Tensor
    recorded: RecordedOutput


def followed(outputs: Sequence[Tensor]) -> list[FollowedOutput]:
    """Return outputs whose gradients are given as they are."""
    return [
        FollowedOutput(place, each.detach(), RecordedOutput(each.dtype, each.shape))
        for place, each in enumerate(outputs)
    ]


class RecordedReplay:
    """One call that can run again, shared by the layers inside its module.

    Args:
        path: The module's path in the model, for messages.
        call: The call.
        context: What else its numbers depend on.
        replay: Runs it.
        outputs: The followed tensors of its output.
        parts: The parts of the module that are followed.
    """

    def __init__(
        self,
        path: str,
        call: ModuleCall,
        context: CallContext,
        replay: Replay,
        outputs: Sequence[FollowedOutput],
        parts: Collection[str],
    ) -> None:
        self._path, self._call, self._context, self._replay = path, call, context, replay
        self._parts = frozenset(parts)
        self._given = [(each, each._version) for each in tensors_of(call.args, call.kwargs)]
        self._recorded = [(each.place, each.recorded) for each in outputs]
        self._outputs = [(each.place, each.tensor, each.tensor._version) for each in outputs]
        self._gradients: Mapping[int, Tensor] | None = None
        self._found: dict[str, list[LayerCall]] = {}

    def count_examples(self, examples: int, *, interleaved: bool = False) -> None:
        """Note how many examples the model's output has, and how rows are ordered by them."""
        self._call = attrs.evolve(self._call, examples=examples, interleaved=interleaved)

    @property
    def joins_examples(self) -> bool:
        """Whether the module gets the rows of all examples in its first dimension."""
        return bool(getattr(self._replay, "joins_examples", False))

    def check(self) -> None:
        """Check that the arguments are those of the call.

        Raises:
            CaptureError: One was modified in place since.
        """
        if any(each._version != version for each, version in self._given):
            raise CaptureError(input_modified_message(self._path))

    def calls(self, part: str, gradients: Mapping[int, Tensor]) -> list[LayerCall]:
        """Return the calls of one part inside the module, with their gradients.

        The call runs again once for all parts that ask with the same gradients.

        Args:
            part: The part.
            gradients: What arrived at followed outputs, by their number, where the scale of the
                result is 1. The others have none.

        Raises:
            CaptureError: The call cannot run again, or gives something else.
        """
        known = self._gradients is not None and _same(self._gradients, gradients)
        if not known or part not in self._found:
            self._found, self._gradients = self._run(gradients), gradients
        found = self._found.pop(part, [])
        if not self._found:
            self._gradients = None
        return found

    def _run(self, gradients: Mapping[int, Tensor]) -> dict[str, list[LayerCall]]:
        self.check()
        if any(_is_freed(each) for each in self._call.parameters.values()):
            raise CaptureError(ungathered_message(self._path))
        where = f"when it ran {self._path!r} again"
        with torch.enable_grad(), attribute_errors("curvature", self._replay, where):
            with self._context.restored():
                again = self._replay.run(self._call)
            inner = [each for each in again.inner if each.part in self._parts]
            self._compare([each.detach() for each in again.outputs])
            with full_precision([self._context.device.type]):
                found = self._differentiate(again.outputs, inner, gradients)
        calls: dict[str, list[LayerCall]] = {part: [] for part in self._parts}
        for each, its in zip(inner, found, strict=True):
            calls[each.part].append(self._layer_call(each, its))
        return calls

    def _differentiate(
        self,
        outputs: Sequence[Tensor],
        inner: Sequence[InnerCall],
        gradients: Mapping[int, Tensor],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the products inside.

        What arrived at an output that another one was computed from holds what came through that
        one. There it stands in place of what comes through that one now.
        """
        starts, ends, handles = [], [], []
        for number, gradient in gradients.items():
            place, recorded = self._recorded[number]
            output = outputs[place]
            its = recorded.read(gradient).to(output.dtype)
            if recorded.whole:
                handles.append(output.register_hook(_Constant(its)))  # type: ignore[no-untyped-call]
            starts.append(output)
            ends.append(its)
        try:
            wanted = [each.output for each in inner]
            return torch.autograd.grad(starts, wanted, ends, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()

    def _layer_call(self, inner: InnerCall, gradient: Tensor | None) -> LayerCall:
        if gradient is None:
            gradient = torch.zeros_like(inner.output)
        inputs = inner.inputs.detach() if inner.inputs.requires_grad else inner.inputs
        return LayerCall(inputs, gradient.detach(), training=self._call.training, tag=inner.tag)

    def _compare(self, again: Sequence[Tensor]) -> None:
        """Check once that the call gave the same as before, up to rounding.

        Raises:
            CaptureError: It did not.
        """
        kept, self._outputs = self._outputs, []
        for place, output, version in kept:
            if output._version != version or output.is_meta:
                continue
            dtypes = {output.dtype, again[place].dtype, *self._context.precisions}
            deviation = deviation_of(again[place], output, dtypes)
            if deviation is not None:
                raise CaptureError(replay_differs_message(self._path, deviation))


@attrs.frozen(eq=False)
class _Constant:
    """Hook on a tensor that gives it another gradient."""

    gradient: Tensor

    def __call__(self, _: Tensor) -> Tensor:
        """Run as a hook of a tensor."""
        return self.gradient


def recorded_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ModuleCall:
    """Return a call that a module has just made, so that it can run again.

    The same tensor stays the same tensor: what attends to itself is known by that.
    """
    detached: dict[int, Tensor] = {}

    def detach(tensor: Tensor) -> Tensor:
        if id(tensor) not in detached:
            detached[id(tensor)] = tensor.detach()
        return detached[id(tensor)]

    own_args, own_kwargs = tree_map_only(Tensor, detach, (args, dict(kwargs)))
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return ModuleCall(module, own_args, own_kwargs, parameters, module.training)


def tensors_of(*trees: Any) -> list[Tensor]:
    """Return the tensors in arguments, those inside containers too."""
    return [each for each in tree_leaves(trees) if isinstance(each, Tensor)]


def deviation_of(again: Tensor, output: Tensor, dtypes: Iterable[torch.dtype]) -> float | None:
    """Return how far an output is from what it was, relatively; `None` within rounding.

    Args:
        again: The output now.
        output: What it was.
        dtypes: The precisions in which a part of it may have been computed.
    """
    if again.shape != output.shape:
        return float("inf")
    wide = torch.promote_types(output.dtype, torch.float32)
    size, off = output.to(wide).norm(), (again.to(wide) - output.to(wide)).norm()
    if bool(off > max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5 * size):
        return float(off / size)
    return None


def _same(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> bool:
    """Return whether gradients are the same numbers in the same memory."""
    return one.keys() == other.keys() and all(_same_memory(one[n], other[n]) for n in one)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same numbers in the same memory."""
    return one is other or (
        one.data_ptr() == other.data_ptr() != 0
        and one._version == other._version
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def _is_freed(parameter: Tensor) -> bool:
    """Return whether a wrapper took the memory of a parameter, as `fully_shard` does."""
    return parameter.numel() > 0 and parameter.untyped_storage().size() == 0


def _random_state(device: torch.device) -> Tensor | None:
    """Return the random state of a device; `None` where it has none of its own."""
    if device.type in ("cpu", "meta"):
        return None
    where = () if device.type == "mps" else (device,)  # there is one of these
    state: Tensor = torch.get_device_module(device).get_rng_state(*where)
    return state


def _kernels() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return tuple(bool(getattr(cuda, f"{name}_sdp_enabled")()) for name in KERNELS)
