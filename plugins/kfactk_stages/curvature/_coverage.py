"""Which modules a curvature can treat exactly, and the reasons against the others."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[nn.Module], ...] = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
RECURRENT: tuple[type[nn.Module], ...] = (nn.RNN, nn.LSTM, nn.GRU)
CELLS: tuple[type[nn.Module], ...] = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
HARMLESS = {
    *("__init__", "__new__", "__init_subclass__", "__repr__", "__doc__", "__constants__"),
    *("__module__", "__qualname__", "__firstlineno__", "__static_attributes__", "__slots__"),
    *("__annotations__", "__annotate_func__", "__annotations_cache__", "__weakref__"),
    *("__dict__", "__parameters__", "__orig_bases__", "__setstate__", "extra_repr"),
    *("reset_parameters", "_load_from_state_dict", "_save_to_state_dict"),
}
"""What a subclass may replace of a layer's class, and compute the same in its forward."""
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def reason_against(
    module: nn.Module,
    covered: tuple[type[nn.Module], ...],
    parameters: Sequence[str] = ("weight", "bias"),
) -> str | None:
    """Return why a curvature for the classes `covered` cannot treat `module` exactly, or `None`.

    Args:
        module: The module.
        covered: Classes that the curvature knows.
        parameters: Names of the parameters to examine; the first one must be there.

    Example:
        >>> reason_against(nn.Linear(2, 2), (nn.Linear,)) is None
        True
        >>> reason_against(nn.LayerNorm(2), (nn.Linear,))
        'no curvature for LayerNorm'
    """
    reason = _against_class(module, covered)
    if reason is None:
        for name in ("forward", "_conv_forward", "_output_padding"):
            if name in vars(module):
                reason = (
                    f"its {name} was replaced on the instance, so what it computes is not known"
                )
    if reason is not None:
        return reason
    reasons = (
        reason_against_parameter(module, name, required=not number)
        for number, name in enumerate(parameters)
    )
    return next((each for each in reasons if each is not None), None)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, without the subclass that `fully_shard` puts in its place.

    That subclass keeps the forward.
    """
    return next(
        cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed.")
    )


def conv1d() -> tuple[type[nn.Module], ...]:
    """Return the class Conv1D of transformers: a linear layer whose weight is `[d_in, d_out]`.

    It is the class itself, not its name. Where transformers is not loaded, no model has it.
    """
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (found,) if isinstance(found, type) and issubclass(found, nn.Module) else ()


def replaced(cls: type[nn.Module], base: type[nn.Module]) -> list[str]:
    """Return what a subclass replaces of its base that the forward may read.

    These are methods and class attributes of the base, and properties in place of what the base
    keeps on the instance. A subclass that only adds to them, or initialises otherwise, computes the
    same.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def reset_parameters(self): nn.init.zeros_(self.weight)
        ...     def forward(self, x): return 2 * super().forward(x)
        >>> replaced(Scaled, nn.Linear)
        ['forward']
    """
    kept = {name for each in base.__mro__ for name in inspect.get_annotations(each)}
    kept |= {"weight", "bias"}.union(
        *(vars(each).get("__constants__", ()) for each in base.__mro__)
    )
    found = []
    for name in dict.fromkeys(n for each in cls.__mro__ for n in vars(each)):
        if name in HARMLESS or not (hasattr(base, name) or name in kept):
            continue
        if inspect.getattr_static(cls, name) is not inspect.getattr_static(base, name, None):
            found.append(name)
    return found


def _against_class(module: nn.Module, covered: tuple[type[nn.Module], ...]) -> str | None:
    cls = plain_class(module)
    if parametrize.is_parametrized(module):
        names = (
            " and ".join(
                name for name in ("weight", "bias") if parametrize.is_parametrized(module, name)
            )
            or "state"
        )
        return (
            f"its {names} is parametrized (torch.nn.utils.parametrize): what is trained is not the "
            "layer's own matrix"
        )
    if isinstance(module, LazyModuleMixin) and module.cls_to_become in covered:
        return f"{cls.__name__} is not initialised yet; run one forward before binding"
    if cls in covered:
        return None
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return (
            "no curvature for attention's out_proj by itself: nn.MultiheadAttention reads its "
            "weight and never calls its forward; curvature='attention' covers it with that module"
        )
    base = next((base for base in cls.__mro__ if base in covered), None)
    if base is not None:
        own = ", ".join(replaced(cls, base))
        return (
            f"{cls.__name__} is a subclass of {base.__name__} with its own {own}, so what it "
            f"computes is not known; with that of {base.__name__} it is covered"
            if own
            else None
        )
    if cls is nn.MultiheadAttention:
        return "no curvature for MultiheadAttention here; curvature='attention' covers it"
    if cls in (*RECURRENT, *CELLS):
        return f"no curvature for {cls.__name__} here; curvature='rnn' covers it"
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return f"no curvature for {cls.__name__} here; curvature='conv_kfac' covers convolutions"
    if stacks_experts(module):
        return f"no curvature for {cls.__name__} here; curvature='experts' covers stacked experts"
    return f"no curvature for {cls.__name__}"


def stacks_experts(module: nn.Module) -> bool:
    """Return whether a module holds matrices `[experts, ...]`, as those of transformers do."""
    experts = vars(module).get("num_experts")
    own = [each for each in module._parameters.values() if each is not None and not is_lazy(each)]
    return isinstance(experts, int) and any(p.ndim == 3 and len(p) == experts for p in own)


def reason_against_parameter(module: nn.Module, name: str, *, required: bool = False) -> str | None:
    """Return why a parameter of a module is none that a matrix can be made of, or `None`.

    Args:
        module: The module.
        name: The parameter's name.
        required: Whether it must be there.
    """
    if name not in module._parameters and (required or hasattr(module, name)):
        return (
            f"its {name} is computed from other parameters (weight_norm, spectral_norm, "
            "pruning) and is no parameter itself; remove the reparametrization to cover it"
        )
    parameter = module._parameters.get(name)
    if parameter is None:
        return f"it has no {name}" if required else None
    if not parameter.numel() and required:
        return f"its {name} is empty"
    if parameter.dtype not in PRECISIONS:
        known = ", ".join(str(precision) for precision in PRECISIONS)
        return f"its {name} is {parameter.dtype}; curvature needs a real floating type: {known}"
    return None
