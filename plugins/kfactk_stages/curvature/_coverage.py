"""Which modules a curvature can treat exactly, and the reasons against the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
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
    if reason is None and "forward" in vars(module):
        reason = "its forward was replaced on the instance, so what it computes is not known"
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
    if isinstance(module, _ConvTransposeNd):
        return f"no curvature for transposed convolutions ({cls.__name__})"
    if cls.__name__ == "NonDynamicallyQuantizableLinear":
        return (
            "no curvature for attention's out_proj by itself: nn.MultiheadAttention reads its "
            "weight and never calls its forward; curvature='attention' covers it with that module"
        )
    if cls.__module__.split(".")[0] == "transformers" and cls.__name__ == "Conv1D":
        return (
            "no curvature for transformers' Conv1D, a linear layer that holds its weight as "
            "[d_in, d_out]"
        )
    for base in covered:
        if isinstance(module, base):
            return (
                f"{cls.__name__} is a subclass of {base.__name__} whose forward may differ; only "
                "the exact class is covered"
            )
    if cls is nn.MultiheadAttention:
        return "no curvature for MultiheadAttention here; curvature='attention' covers it"
    if isinstance(module, CONVOLUTIONS):
        return f"no curvature for {cls.__name__} here; curvature='conv_kfac' covers convolutions"
    return f"no curvature for {cls.__name__}"


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
