"""Which models can be followed, and where the likelihood's parameters are in their output."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfactk.errors import CaptureError, CombinationError, OptionError
from kfactk.jets import Jet

NO_LIKELIHOOD = "For a loss without a likelihood, give fisher={'name': 'empirical', 'terms': ...}."
"""What else the message for an output without logits says."""


def model_output(output: Any) -> Tensor:
    """Return the tensor that holds the likelihood's parameters.

    It is the output itself, its `.logits`, its item "logits", or its first element.

    Raises:
        CaptureError: It is none of these.
    """
    if isinstance(output, Tensor):
        return output
    found: Any = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    elif found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Jet):
        raise CaptureError(
            "the model returned a kfactk.Jet. Return the residual, which is a tensor made of "
            "u.value, u.gradient, u.laplacian or u.second; or say what it is: build(..., "
            "output=lambda u: u.laplacian)."
        )
    raise CaptureError(
        f"{no_logits(output)}. Say where they are: build(..., "
        f"output=lambda out: out['prediction']). {NO_LIKELIHOOD}"
    )


def no_logits(output: Any) -> str:
    """Return the beginning of the message for an output in which no logits were found."""
    parts = output.items() if isinstance(output, Mapping) else ()
    keys = [repr(str(key)) for key, value in parts if isinstance(value, Tensor)]
    there = f" with tensors at {', '.join(keys)}" if keys else ""
    return f"the model returned {type(output).__name__}{there}, in which no logits were found"


def supported_model(model: nn.Module) -> nn.Module:
    """Return the module whose forwards are followed.

    It is the model, or what DistributedDataParallel wraps.

    Raises:
        CombinationError: Hooks do not see its layers, or not the whole of a layer.
        OptionError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"bind() wants the model, a torch.nn.Module, and was given {type(model).__name__}. "
            "Give it the model; parameters go to params=."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CombinationError(
            "a scripted or traced model has no hooks on its layers. Bind the nn.Module it was made "
            "from."
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise CombinationError(
                "nn.DataParallel copies the model at each forward, so no hook sees its layers. Use "
                "DistributedDataParallel."
            )
        if fsdp is not None and isinstance(module, getattr(fsdp, "FullyShardedDataParallel", ())):
            raise CombinationError(
                "FullyShardedDataParallel keeps flat pieces of parameters, in which no layer's "
                "matrix can be found. Use torch.distributed.fsdp.fully_shard, or "
                "DistributedDataParallel."
            )
        if getattr(module, "_distribute_module_applied", False):
            raise CombinationError(tensor_parallel(name))
    return _unwrapped(model)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return what DistributedDataParallel wraps, compiled or not; the model where nothing does."""
    found = inner = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            found = inner = inner.module
        elif isinstance(compiled := inner._modules.get("_orig_mod"), nn.Module):
            inner = compiled
        else:
            return found


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a `DTensor`, of which this process has a part only."""
    return hasattr(tensor, "device_mesh")


def tensor_parallel(layer: str) -> str:
    """Return the message for a layer that is spread over ranks while it runs."""
    return (
        f"layer {layer!r} is spread over ranks while it runs, as tensor parallelism does "
        "(parallelize_module, distribute_module): no rank sees its inputs and gradients whole. "
        "Have every rank run whole layers: use DistributedDataParallel, or, where memory is short, "
        "torch.distributed.fsdp.fully_shard."
    )


def check_engine() -> None:
    """Refuse forwards of an engine whose other ranks would wait for curvature, or mix it.

    Raises:
        CombinationError: The engine is such a one.
    """
    wrapper = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    join = getattr(wrapper, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise CombinationError(
            "the model runs under join(). Its ranks stop calling step() when they run out of data, "
            "and the others would wait for their curvature. Give all ranks as many batches "
            "(DistributedSampler does), or join with throw_on_early_termination=True."
        )
    stage = "torch.distributed.pipelining.stage"
    if stage in sys.modules and _called_from("torch.distributed.pipelining."):
        raise CombinationError(
            "the model runs as a stage of a pipeline (torch.distributed.pipelining). The ranks "
            "hold different layers, and only the last stage's output is the likelihood's. Keep the "
            "whole model on every rank: use DistributedDataParallel, or, where memory is short, "
            "torch.distributed.fsdp.fully_shard."
        )


def _called_from(package: str) -> bool:
    """Return whether code of a package is among the callers."""
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(package):
            return True
        frame = frame.f_back
    return False
