"""Forwards that run again: how the output moves along a direction of the parameters."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from kfactk.capture.heads import Head, HeadView, terms_of
from kfactk.capture.replay import CallContext, deviation_of
from kfactk.capture.torch_modes import full_precision
from kfactk.errors import CaptureError

UNSUPPORTED = ("forward AD", "forward-mode", "jvp", "make_dual")
"""Parts of what torch says where an operation has no derivative in forward mode."""
Locate = Callable[[Any], list[tuple[Head, Tensor]]]
"""Returns the heads that an output of the model has, each with its part."""


@attrs.frozen(eq=False)
class ModelContext:
    """What the numbers of a model depend on besides its arguments and parameters.

    Args:
        call: Random states of torch, autocast and kernels.
        python: The random states of Python, and of NumPy where that is loaded.
        buffers: For each buffer, the module that has it, its name there, the tensor, and a copy.
    """

    call: CallContext
    python: tuple[Any, ...]
    buffers: tuple[tuple[nn.Module, str, Tensor, Tensor], ...]

    @classmethod
    def now(cls, model: nn.Module) -> ModelContext:
        """Return the context of a forward that begins now."""
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        buffers = tuple(
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        )
        return cls(CallContext.now(device), _python_states(), buffers)

    @contextlib.contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """Surround what runs again; then everything is as it was before."""
        before = ModelContext.now(model)
        with self.call.restored():
            try:
                self._put()
                yield
            finally:
                before._put()

    def _put(self) -> None:
        """Set the random states of Python, and the buffers."""
        _set_python_states(self.python)
        with torch.no_grad():
            for module, name, buffer, copy in self.buffers:
                module._buffers[name] = buffer
                buffer.copy_(copy)


@attrs.frozen(eq=False)
class KnownForward:
    """A forward of a model that can run again.

    Args:
        model: The model.
        again: Makes the same call.
        context: What else its numbers depend on.
        batch: Its arguments by name, and what `observe` was given.
        locate: Finds the heads in an output.
        outputs: The tensors of the heads, each with its version.
        given: The tensors that it was given, each with its version.
    """

    model: nn.Module
    again: Callable[[], Any]
    context: ModelContext
    batch: Mapping[str, Any]
    locate: Locate
    outputs: tuple[tuple[Tensor, int], ...]
    given: tuple[tuple[Tensor, int], ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        again: Callable[[], Any],
        context: ModelContext,
        output: Any,
        batch: Mapping[str, Any],
        locate: Locate,
    ) -> KnownForward:
        """Return a forward that has just run."""
        heads = [each.detach() for _, each in locate(output)]
        outputs = tuple((each, each._version) for each in heads)
        return cls(model, again, context, batch, locate, outputs, with_versions(batch))

    def derivatives(self, directions: Sequence[Mapping[int, Tensor]]) -> list[HeadDerivatives]:
        """Return J v of each head along each direction v.

        Args:
            directions: By the id of a parameter, what it moves by. Others stay.

        Raises:
            CaptureError: The model cannot run again, or has operations without such a derivative.
        """
        if any(each._version != version for each, version in self.given):
            raise CaptureError(
                "an argument of the model was modified in place after its forward, so a controller "
                "cannot run it again. Give the model a copy, or write h = h + x in place of h += x."
            )
        found: list[list[Tensor]] = []
        heads: list[HeadView] = []
        for direction in directions:
            heads, moved = self._along(direction)
            found.append(moved)
        return [
            HeadDerivatives(head, [each[number] for each in found])
            for number, head in enumerate(heads)
        ]

    def _along(self, direction: Mapping[int, Tensor]) -> tuple[list[HeadView], list[Tensor]]:
        """Return the heads, without what they hang on, and what they move by."""
        with forward_mode(), self.context.restored(self.model):
            output = run_along(self.model, self.again, direction)
            return self._taken_apart(self.locate(output))

    def _taken_apart(
        self, located: Sequence[tuple[Head, Tensor]]
    ) -> tuple[list[HeadView], list[Tensor]]:
        """Return heads as they are, and their derivatives; check that they are the same."""
        plain, moved = [], []
        for (head, output), (before, version) in zip(located, self.outputs, strict=True):
            now, tangent = unpack_dual(output)
            if before._version == version and not before.is_meta:
                self._compare(now, before)
            again = now.detach().requires_grad_()  # likelihoods want to see an output of a forward
            with torch.enable_grad(), full_precision({now.device.type}):
                dual = again if tangent is None else make_dual(again, tangent)
                found = head.read(dual, self.batch)
            view, along = unpack_dual(found.view)
            view = view.detach()
            plain.append(attrs.evolve(found, output=now, view=view))
            moved.append(torch.zeros_like(view) if along is None else along.detach())
        return plain, moved

    def _compare(self, now: Tensor, before: Tensor) -> None:
        """Check that an output is the same again, up to rounding.

        Raises:
            CaptureError: It is not.
        """
        dtypes = {now.dtype, before.dtype, *self.context.call.precisions}
        off = deviation_of(now, before, dtypes)
        if off is not None:
            raise CaptureError(
                "the model gave another output when its forward ran again (relative difference "
                f"{off:.2g}), so a controller cannot tell how it moves. Likely causes: it draws "
                "random numbers from a generator of its own, keeps state that is no buffer, or has "
                "attention with dropout on a GPU, where another kernel drew other numbers. Change "
                "that, or leave out the controller."
            )


@attrs.frozen(eq=False)
class HeadDerivatives:
    """How the output of one head moves along some directions.

    Args:
        head: The head.
        moved: For each direction J v, `[N, S, C]`.
    """

    head: HeadView
    moved: Sequence[Tensor]

    def products(self, terms: Tensor | float) -> Tensor:
        """Return `(J v)^T H (J w)` of all pairs of directions, `[k, k]`, summed over terms.

        H is the Fisher information of the output, as the likelihood's root gives it.

        Args:
            terms: What the sums of all heads are divided by.
        """
        likelihood, weights = self.head.likelihood, self.head.weights
        number = len(self.moved)
        total = torch.zeros(number, number, dtype=torch.float64, device=self.head.view.device)
        for column in likelihood.root(self.head.view):
            along = torch.stack([(column * each).sum(-1).double() for each in self.moved])
            weighted = along if weights is None else along * weights
            total += weighted.flatten(1) @ along.flatten(1).T
        return total * float(self.head.factor(terms)) ** 2


def fisher_products(
    forwards: Sequence[KnownForward], directions: Sequence[Mapping[int, Tensor]]
) -> tuple[Tensor, float]:
    """Return `M v^T F w` of all pairs of directions, `[k, k]`, and M.

    F is the exact Fisher matrix of all parameters together, over the likelihood terms of these
    forwards. Where examples influence each other, as in BatchNorm in training mode, it is the
    generalised Gauss-Newton matrix of the mini-batch loss.

    Args:
        forwards: The forwards.
        directions: By the id of a parameter, what it moves by.
    """
    shape, count = (len(directions), len(directions)), 0.0
    total = torch.zeros(shape, dtype=torch.float64, device="cpu")
    for forward in forwards:
        found = forward.derivatives(directions)
        terms = terms_of([each.head for each in found])
        for each in found:
            total += each.products(terms).cpu()
        count += float(terms)
    return total, count


def same_arguments(one: KnownForward, batch: Mapping[str, Any]) -> bool:
    """Return whether a forward was given the same tensors as another one."""
    mine, theirs = tree_leaves(dict(one.batch)), tree_leaves(dict(batch))
    return len(mine) == len(theirs) and all(map(_equal, mine, theirs))


def with_versions(trees: Any) -> tuple[tuple[Tensor, int], ...]:
    """Return the tensors in nested containers, each with how often it was written to."""
    tensors = (each for each in tree_leaves(trees) if isinstance(each, Tensor))
    return tuple((each, each._version) for each in tensors)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Surround forwards that run along a direction.

    Raises:
        CaptureError: An operation of the model has no such derivative.
    """
    try:
        with torch.no_grad(), forward_ad.dual_level():
            yield
    except (NotImplementedError, RuntimeError) as error:
        if not any(word in str(error) for word in UNSUPPORTED):
            raise
        said = str(error).partition("\n")[0].rstrip(".")
        raise CaptureError(
            "the controller needs the derivative of the model's output along a direction "
            f"(forward-mode differentiation), and an operation of the model has none: {said}. "
            "Write it with operations that have one, or leave out the controller."
        ) from error


def run_along(model: nn.Module, again: Callable[[], Any], direction: Mapping[int, Tensor]) -> Any:
    """Return what a forward returns, as dual tensors; see `forward_mode`.

    Args:
        model: The model.
        again: Makes the call.
        direction: By the id of a parameter, what it moves by. Others stay.
    """
    names = {id(each): name for name, each in model.named_parameters()}
    duals = {
        f"model.{names[key]}": make_dual(model.get_parameter(names[key]).detach(), tangent)
        for key, tangent in direction.items()
        if key in names
    }
    with _plain_kernels(model):
        return torch.func.functional_call(_Called(model, again), duals, ())


def make_dual(tensor: Tensor, tangent: Tensor) -> Tensor:
    """Return a tensor that moves by a tangent."""
    dual: Tensor = forward_ad.make_dual(tensor, tangent)  # type: ignore[no-untyped-call]
    return dual


def unpack_dual(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a tensor, and what it moves by; `None` where it does not."""
    primal, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return primal, tangent


@contextlib.contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Surround a forward: attention and recurrent layers run as operations that have derivatives.

    Other layers keep their kernels where the model has no recurrent one.
    """
    recurrent = any(isinstance(each, nn.RNNBase) for each in model.modules())
    libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn) if recurrent else ()
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled


class _Called(nn.Module):
    """Holds a model whose parameters are exchanged during one call."""

    def __init__(self, model: nn.Module, again: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self._again = model, again

    def forward(self) -> Any:
        """Make the call."""
        return self._again()


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return isinstance(other, Tensor) is False
    return one is other or (
        isinstance(other, Tensor)
        and one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(one, other)
    )


def _python_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_python_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
