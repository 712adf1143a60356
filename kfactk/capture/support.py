"""Which models can be followed, and where their output is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfactk.errors import CaptureError, CombinationError, OptionError


def model_output(output: Any) -> Tensor:
    """The tensor that holds the likelihood's parameters: the output itself, its `.logits`, its "logits" item, or its first element.

    Raises:
        CaptureError: None of these; says what was returned and how to tell (`output=`).
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
    keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise CaptureError(
        f"the model returned {type(output).__name__}{keys}, in which no logits were found. Say where they are: "
        "build(..., output=lambda out: out['prediction'])."
    )


def supported_model(model: nn.Module) -> nn.Module:
    """The module whose forwards can be followed: the model, or what DistributedDataParallel wraps.

    Raises:
        CombinationError: Its layers cannot be seen by hooks, or what they see is not the whole of a layer.
        OptionError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"bind() wants the model, a torch.nn.Module, and was given {type(model).__name__}; parameters go to params=."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CombinationError(
            "a scripted or traced model has no hooks on its layers; bind the nn.Module it was made from."
        )
    sharding = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise CombinationError(
                "nn.DataParallel copies the model at each forward, so no hook sees its layers; use DistributedDataParallel."
            )
        if sharding is not None and isinstance(
            module, getattr(sharding, "FullyShardedDataParallel", ())
        ):
            raise CombinationError(
                "FullyShardedDataParallel keeps flat pieces of parameters, in which no layer's matrix is to be found; use "
                "torch.distributed.fsdp.fully_shard, or DistributedDataParallel."
            )
        if getattr(module, "_distribute_module_applied", False):
            raise CombinationError(tensor_parallel(name))
    return _wrapped(model)


def _wrapped(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel wraps, compiled before or after or not at all; the model itself where nothing does."""
    found = inner = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            found = inner = inner.module
        elif isinstance(compiled := inner._modules.get("_orig_mod"), nn.Module):
            inner = compiled
        else:
            return found


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`, of which this process has a part only."""
    return hasattr(tensor, "device_mesh")


def tensor_parallel(layer: str) -> str:
    """What to tell a user whose layer is spread over ranks while it runs."""
    return (
        f"layer {layer!r} is spread over ranks while it runs, as tensor parallelism does (parallelize_module, distribute_module): no rank "
        "sees its inputs and gradients whole. Have every rank run whole layers: use DistributedDataParallel, or, where memory is short, "
        "torch.distributed.fsdp.fully_shard."
    )


def check_engine() -> None:
    """Refuse forwards that an engine runs whose other ranks would wait for curvature, or mix it, for ever.

    Raises:
        CombinationError: It does.
    """
    wrapper = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    join = getattr(wrapper, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise CombinationError(
            "the model runs under join(), whose ranks stop calling step() when they run out of data, and the others would wait for their "
            "curvature. Give all ranks as many batches (DistributedSampler does), or join with throw_on_early_termination=True."
        )
    if "torch.distributed.pipelining.stage" in sys.modules and _inside(
        "torch.distributed.pipelining."
    ):
        raise CombinationError(
            "the model runs as a stage of a pipeline (torch.distributed.pipelining): the ranks hold different layers, and the output of "
            "all stages but the last is no likelihood's. Keep the whole model on every rank: use DistributedDataParallel, or, where memory "
            "is short, torch.distributed.fsdp.fully_shard."
        )


def _inside(package: str) -> bool:
    """Whether code of the package is what called."""
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(package):
            return True
        frame = frame.f_back
    return False
