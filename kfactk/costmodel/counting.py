"""Count what training a model with a recipe costs, without data.

Forward, backward and stages run on the meta device, where tensors have shapes and no numbers. So
models of any size are counted on any machine, with any stage of a plugin. Decompositions need
numbers: a small corner of each matrix is decomposed instead, which tells the solver and the shapes
of the result.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kfactk.assignment import Work, Workload
from kfactk.capture.support import model_output
from kfactk.costmodel.communication import Sizes, is_square
from kfactk.costmodel.cost import NOTHING, Amount, LayerCost, TrainingLoad
from kfactk.errors import CombinationError, OptionError
from kfactk.preconditioner.block import Blocks
from kfactk.preconditioner.coverage import ModelSurvey
from kfactk.recipe import Recipe
from kfactk.samples import LayerCall, Statistic, working_dtype
from kfactk.stages import Layer

SOLVERS = {"eigh": ("eigh", "svd", "eig", "qr", "inv", "lu"), "cholesky": ("cholesky",)}
"""For each solver of a machine profile, the operations counted as it: all but Cholesky as eigh."""
GROUPS, ROWS, COLUMNS = 3, 5, 7
"""Sides of a corner. They differ, so that each tells in the result which side it stands for."""
FREE = {
    "_unsafe_view",
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
"""Operations besides views that read and write nothing."""
TRIANGULAR = {torch.ops.aten.cholesky_solve, torch.ops.aten.linalg_solve_triangular}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that torch runs inside it, their FLOPs and bytes, without views.

    Example:
        >>> with Meter() as meter:
        ...     _ = torch.ones(2, 3, device="meta") @ torch.ones(3, 5, device="meta")
        >>> meter.amount.products
        60.0
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.amount = NOTHING
        self.written = 0
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        self.seen.add(packet.__name__)
        if func.is_view or packet.__name__ in FREE:
            return out
        flops = _flops(packet, args, kwargs or {}, out)
        is_convolution = "convolution" in packet.__name__
        written = sum(each.nbytes for each in tree_leaves(out) if isinstance(each, Tensor))
        read = sum(each.nbytes for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        self.written += written
        products, convolutions = (0, flops) if is_convolution else (flops, 0)
        self.amount += Amount(products, convolutions, read + written, 1)
        return out

    def solver(self) -> str:
        """Return the solver that decomposed matrices, or ""."""
        for solver, words in SOLVERS.items():
            if any(word in name.split("_") for name in self.seen for word in words):
                return solver
        return ""


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of one operation."""
    if packet in TRIANGULAR:  # n^2 for each column and triangle
        n, columns = out.shape[-2], out.numel() // out.shape[-2]
        return int((2 if packet is torch.ops.aten.cholesky_solve else 1) * n * n * columns)
    if packet is torch.ops.aten.convolution_backward:  # torch's own count ignores groups
        gradient, inputs, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        numbers = (inputs if transposed else gradient).numel()
        return int(2 * numbers * math.prod(weight.shape[1:]) * sum(wanted[:2]))
    if packet not in flop_registry:  # an in-place operation counts as the other one
        packet = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)
    if packet not in flop_registry:
        return 0
    return int(flop_registry[packet](*args, **kwargs, out_val=out))


def workload_of(model: nn.Module, recipe: Recipe) -> Workload:
    """Return the work that a recipe's placement divides, for all of a model's parameters.

    Args:
        model: On any device; on the meta device nothing is allocated.
        recipe: Its stages and periods.
    """
    return _workload(_layers(model, recipe), recipe)


def _layers(model: nn.Module, recipe: Recipe) -> Sequence[Layer]:
    found = ModelSurvey(model, recipe.curvature, recipe.exclude).layers(lambda parameter: True)
    if not found:
        raise CombinationError(
            "no layer of the model is preconditioned, so there is nothing to place. "
            "print(recipe.coverage(model)) gives the reasons."
        )
    return found


def _workload(layers: Sequence[Layer], recipe: Recipe) -> Workload:
    blocks = Blocks(recipe.curvature, recipe.basis)
    weight = layers[0].tensors()["weight"]
    return Workload(
        tuple(blocks.work(layer) for layer in layers),
        *recipe.calendar.periods(0),
        sampled=recipe.basis.moments_from == "samples",
        itemsize=working_dtype(*(layer.tensors()["weight"].dtype for layer in layers)).itemsize,
        device=weight.device.type,
    )


def training_load(model: nn.Module, recipe: Recipe, batch: Tensor) -> TrainingLoad:
    """Return what training a model with a recipe costs one rank.

    Args:
        model: The model, on the meta device.
        recipe: The recipe.
        batch: A rank's mini-batch, on the meta device.

    Raises:
        CombinationError: The model's forward fails without numbers.
    """
    layers = _layers(model, recipe)
    workload = _workload(layers, recipe)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
    model.train()
    with _record_calls(layers, calls), Meter() as forward:
        output = _run(model, batch)
    called = {name: found for name, found in calls.items() if found}
    outputs = [out for found in called.values() for _, out in found if out.requires_grad]
    with Meter() as fisher:
        torch.autograd.grad(
            output, outputs, torch.empty_like(output), retain_graph=True, allow_unused=True
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with Meter() as backward:
        torch.autograd.grad(output, trained, torch.empty_like(output), allow_unused=True)
    costs = {}
    for layer, work in zip(layers, workload.works, strict=True):
        found = [
            LayerCall(given.detach(), torch.empty_like(out).detach())
            for given, out in called.get(layer.name, [])
        ]
        costs[layer.name] = _layer_cost(layer, work, recipe, workload, found)
    return TrainingLoad(
        workload,
        costs,
        forward.amount + backward.amount,
        fisher.amount,
        _passes(recipe, output),
        sum(parameter.numel() for parameter in trained),
        _state_per_parameter(recipe),
        float(forward.written),
        recipe.calendar.slots,
    )


def _run(model: nn.Module, batch: Tensor) -> Tensor:
    try:
        return model_output(model(batch))
    except (NotImplementedError, RuntimeError) as error:
        raise CombinationError(
            "the model could not run without data, on the meta device and an input of shape "
            f"{tuple(batch.shape)} ({str(error).partition(chr(10))[0]}). Check input=. A forward "
            "that reads values (.item(), if on a tensor, masks made of data) cannot be planned; "
            "give a variant of the model that does not."
        ) from error


@contextlib.contextmanager
def _record_calls(
    layers: Sequence[Layer], calls: Mapping[str, list[tuple[Tensor, Tensor]]]
) -> Iterator[None]:
    """Record the input and output of each call of these layers."""

    def recorder(name: str) -> Callable[..., None]:
        return lambda module, given, out: calls[name].append((given[0], out))

    handles = [layer.module.register_forward_hook(recorder(layer.name)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_cost(
    layer: Layer, work: Work, recipe: Recipe, workload: Workload, calls: Sequence[LayerCall]
) -> LayerCost:
    """Count what the stages do for one layer."""
    blocks = Blocks(recipe.curvature, recipe.basis)
    _, blank = blocks.blank(layer)
    parts, solver = _decompose_corners(blocks, layer, work)
    gradient = torch.empty(work.gradient, device="meta")
    factors = scale = NOTHING
    moments: dict[str, Statistic] = {}
    if calls:
        samples = blocks.samples(layer, calls, num_terms=1.0, first=True)
        blocks.factors(layer, samples)  # makes what is cached, which is no part of a step
        with Meter() as meter:
            blocks.factors(layer, samples)
        factors = meter.amount
        if workload.sampled:
            with Meter() as meter:
                moments = blocks.moments(layer, parts, samples)
            scale = meter.amount
    else:
        moments = blocks.moments(layer, parts, blocks.blank(layer)[0]) if workload.sampled else {}
    if recipe.basis.moments_from == "gradient":
        moments = blocks.gradient_moments(layer, parts, gradient, 1.0)
    totals = {
        key.partition(".")[2]: found.total
        for key, found in moments.items()
        if found.total is not None
    }
    with Meter() as transport:
        if totals:
            blocks.transport(layer, totals, parts, parts)
    operator = blocks.operator(layer, parts, totals, 1.0)
    with Meter() as meter:
        blocks.preconditioned(layer, operator, gradient)
    sizes = Sizes(
        _sums(work, blank),
        {name: sum(part.numel() for part in found.values()) for name, found in parts.items()},
        sum(total.numel() for total in totals.values()),
    )
    retained = float(sum(call.inputs.numel() + call.gradient.numel() for call in calls))
    return LayerCost(factors, scale, meter.amount, sizes, retained, solver, transport.amount)


def _sums(work: Work, blank: Mapping[str, Statistic]) -> dict[str, int]:
    """Return how many numbers of a layer's statistics travel."""
    sizes = {}
    for name, statistic in blank.items():
        if statistic.total is not None:
            shape = tuple(statistic.total.shape)
            n = shape[-1] if is_square(shape) and statistic.symmetric else 0
            groups = math.prod(shape) // (n * n) if n else 1
            sizes[name] = groups * (n * (n + 1) // 2) if n else math.prod(shape)
    if work.indivisible:
        return {"": sum(sizes.values())}
    return {name: sizes[name] for name in sorted(work.matrices)}


def _decompose_corners(
    blocks: Blocks, layer: Layer, work: Work
) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Return a layer's decomposition without numbers, and its solver."""
    corners = {}
    for name, shape in work.matrices.items():
        last = (COLUMNS, COLUMNS) if is_square(shape) else (ROWS, COLUMNS)
        sides = (GROUPS,) * (len(shape) - 2) + last[-len(shape) :]
        corners[name] = (
            torch.eye(COLUMNS).expand(sides).clone() if is_square(shape) else torch.ones(sides)
        )
    means = {
        name: corner.new_ones(corner.shape[:-2])
        for name, corner in corners.items()
        if is_square(tuple(corner.shape))
    }
    with Meter() as meter:
        small = blocks.decompose(layer, corners, 1.0, means)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, found in small.items():
        shape = work.matrices[name]
        full = {
            GROUPS: math.prod(shape[:-2]),
            COLUMNS: shape[-1],
            ROWS: shape[-2] if len(shape) > 1 else 1,
        }
        parts[name] = {
            key: torch.empty(
                [full.get(side, side) for side in part.shape], dtype=part.dtype, device="meta"
            )
            for key, part in found.items()
        }
    return parts, meter.solver()


def _passes(recipe: Recipe, output: Tensor) -> int:
    """Return the number of Fisher passes that the framework makes over one forward."""
    view = recipe.likelihood.view(output)
    num_terms, width = int(view.shape[1]), int(view.shape[2])
    if not recipe.fisher.own_pass:
        return 0

    def losses(positions: int) -> int:
        few = torch.zeros(1, positions, width, requires_grad=True)
        return sum(1 for _ in recipe.fisher.losses(few, recipe.likelihood, None, torch.Generator()))

    one = losses(1)
    return one if num_terms == 1 else one + (losses(2) - one) * (num_terms - 1)


def _state_per_parameter(recipe: Recipe) -> float:
    """Return how many numbers the update rule keeps for each parameter."""
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = recipe.update.make([{"params": [parameter]}], lr=0.0, weight_decay=0.0)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    numbers = sum(
        value.numel()
        for value in optimizer.state[parameter].values()
        if isinstance(value, Tensor) and value.numel() > 1
    )
    return numbers / parameter.numel()


def meta_batch(text: str, size: int) -> Tensor:
    """Return a mini-batch on the meta device.

    Args:
        text: Shape of one example as `SHAPE` or `SHAPE:DTYPE`, with x between sizes.
        size: Number of examples.

    Raises:
        OptionError: The text has another form.

    Example:
        >>> meta_batch("3x224x224", 2).shape, meta_batch("512:int64", 2).dtype
        (torch.Size([2, 3, 224, 224]), torch.int64)
    """
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    sizes = shape.split("x")
    if not isinstance(dtype, torch.dtype) or not all(
        each.isascii() and each.isdigit() and int(each) for each in sizes
    ):
        raise OptionError(
            f"the input {text!r} is no shape of an example: write 3x224x224 for an image, or "
            "512:int64 for 512 tokens."
        )

    return torch.empty(size, *map(int, sizes), dtype=dtype, device="meta")
