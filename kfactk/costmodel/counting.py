"""Count what training a model with a recipe costs, without data.

Forward, backward and stages run on the meta device, where tensors have shapes and no numbers. So
models of any size are counted on any machine, with any stage of a plugin. Decompositions need
numbers: a small corner of each matrix is decomposed instead, which tells the solver and the shapes
of the result.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from kfactk.assignment import Work
from kfactk.capture.heads import Head
from kfactk.capture.hooks import call_tensors, with_rows
from kfactk.capture.replay import (
    CallContext,
    RecordedReplay,
    followed,
    recorded_arguments,
    tensors_of,
)
from kfactk.costmodel.communication import Sizes, numbers_sent
from kfactk.costmodel.controlling import control_cost
from kfactk.costmodel.cost import NOTHING, LayerCost, TrainingLoad
from kfactk.costmodel.linking import link_cost
from kfactk.costmodel.metering import Meter
from kfactk.errors import CombinationError, OptionError
from kfactk.optim.predicted import longest_interval
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.coverage import ModelSurvey
from kfactk.preconditioner.footprint import decompose_corners
from kfactk.preconditioner.pace_state import LONGEST
from kfactk.preconditioner.placement import workload_of
from kfactk.recipe import Recipe
from kfactk.samples import LayerCall, Statistic
from kfactk.stages import Fisher
from kfactk.statistics import RunningMean


def _blocks(model: nn.Module, recipe: Recipe) -> list[Block]:
    survey = ModelSurvey(model, recipe.rules, recipe.exclude)
    layers = survey.layers({id(parameter) for parameter in model.parameters()})
    if not layers:
        raise CombinationError(
            "no layer of the model is preconditioned, so there is nothing to place. "
            "See print(recipe.coverage(model)) for the reasons."
        )
    return [Block(layer, rule.curvature, rule.basis) for layer, rule in layers]


def training_load(model: nn.Module, recipe: Recipe, batch: Tensor) -> TrainingLoad:
    """Return what training a model with a recipe costs one rank.

    Args:
        model: The model, on the meta device.
        recipe: The recipe.
        batch: A rank's mini-batch, on the meta device.

    Raises:
        CombinationError: The model's forward fails without numbers.
    """
    blocks = _blocks(model, recipe)
    workload = workload_of(blocks, recipe.schedule)
    recorded: dict[Block, list[MetaCall]] = {block: [] for block in blocks}
    sites: dict[nn.Module, list[Block]] = {}
    for block in (block for block in blocks if not block.of_gradient):
        for site in block.layer.sites:
            sites.setdefault(site, []).append(block)
    model.train()
    with contextlib.ExitStack() as hooks, Meter() as forward:
        for site, inside in sites.items():
            recording = functools.partial(_record, recorded, inside)
            hooks.enter_context(site.register_forward_hook(recording, with_kwargs=True))
        returned = _run(model, batch)
    located = (head.locate(returned) for head in recipe.heads)
    heads = [output for output in located if output is not None]
    empty = [torch.empty_like(output) for output in heads]
    all_calls = [call for found in recorded.values() for call in found]
    for replay in (call.replay for call in all_calls if call.replay is not None):
        replay.count_examples(len(batch))
    passed = [c for block in blocks if not block.inputs_suffice for c in recorded[block]]
    outputs = {id(each): each for call in passed for each in call.outputs if each.requires_grad}
    with Meter() as fisher:
        if outputs:
            torch.autograd.grad(
                heads, list(outputs.values()), empty, retain_graph=True, allow_unused=True
            )
        calls = {
            block: [inner for call in found for inner in call.layer_calls(block.layer.part)]
            for block, found in recorded.items()
        }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with Meter() as backward:
        torch.autograd.grad(heads, trained, empty, allow_unused=True)
    costs = {}
    for block, work in zip(blocks, workload.works, strict=True):
        averages = recipe.first_moment.decay > 0
        costs[block.name] = _layer_cost(block, work, calls[block], averages=averages)
    pace, longest = recipe.pace, 1
    if pace is not None:
        longest = longest_interval(pace) or LONGEST
    return TrainingLoad(
        workload,
        costs,
        forward_backward=forward.amount + backward.amount,
        fisher_pass=fisher.amount,
        passes=_passes(recipe, returned) if outputs else 0,
        parameters=sum(parameter.numel() for parameter in trained),
        state=_state_per_parameter(recipe),
        activations=float(forward.written),
        slots=recipe.schedule.slots,
        keeps=0 if pace is None else pace.keeps,
        longest=longest,
        lag=recipe.lag,
        link=link_cost(recipe, blocks, calls),
        control=control_cost(recipe, model, batch, returned),
    )


def _run(model: nn.Module, batch: Tensor) -> Any:
    try:
        return model(batch)
    except Exception as error:  # a model may raise anything
        raise CombinationError(
            "the model could not run without data, on the meta device and an input of shape "
            f"{tuple(batch.shape)} ({str(error).partition(chr(10))[0]}). Check input=. A forward "
            "that reads values (.item(), if on a tensor, masks made of data) cannot be planned; "
            "give a variant of the model that does not."
        ) from error


@attrs.frozen(eq=False)
class MetaCall:
    """One call of a module, without numbers.

    Args:
        call: The call, with a gradient of its output.
        outputs: The followed tensors of its output.
        replay: Runs the call again, where layers lie inside the module.
    """

    call: LayerCall
    outputs: Sequence[Tensor]
    replay: RecordedReplay | None

    def layer_calls(self, part: str) -> list[LayerCall]:
        """Return the calls of one part of the module."""
        if self.replay is not None:
            return self.replay.calls(part, {0: self.call.gradient})
        return [self.call]


def _record(
    recorded: Mapping[Block, list[MetaCall]],
    blocks: Sequence[Block],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    ones, args, kwargs, output = with_rows(args, kwargs, output)
    replay, again, outputs = blocks[0].layer.replay, None, [output]
    if replay is not None:
        outputs = list(replay.outputs(output))
        again = RecordedReplay(
            blocks[0].layer.path,
            recorded_arguments(module, args, kwargs),
            CallContext.now(tensors_of(args, kwargs)[0].device),
            replay,
            followed(outputs),
            [block.layer.part for block in blocks],
        )
    inputs, arguments = call_tensors(module, args, kwargs, inside=replay is not None)
    gradient = torch.empty_like(outputs[0]).detach()
    call = LayerCall(inputs, gradient, module=module, arguments=arguments, ones=ones)
    for block in blocks:
        recorded[block].append(MetaCall(call, outputs, again))


def _layer_cost(
    block: Block, work: Work, calls: Sequence[LayerCall], *, averages: bool
) -> LayerCost:
    """Count what the stages do for one layer.

    Args:
        block: Its block.
        work: Its work.
        calls: Its calls in a forward.
        averages: Whether gradients are averaged before they are preconditioned.
    """
    sums, shapes = block.blank_factors(), {**work.matrices, **work.beside}
    if block.curvature.row_factors and calls:
        rows = block.factors(block.samples(calls, num_terms=1.0, first=True))
        sums = {name.removeprefix("factor."): each for name, each in rows.items()}
        shapes = {n: tuple(s.total.shape) for n, s in sums.items() if s.total is not None}
    with Meter() as meter:
        parts = decompose_corners(block, shapes)
    solver = meter.solver()
    block.state.decomposition, block.state.ready = parts, True  # a basis may weigh by it
    gradient = torch.empty(work.gradient, device="meta")
    factors = scale = NOTHING
    moments: dict[str, Statistic] = {}
    if block.of_gradient:
        with Meter() as meter:
            if not block.measures_nothing:
                block.factors_of_gradient(gradient)
            moments = block.gradient_moments(gradient, 1.0) if block.moments_of_gradient else {}
        factors = meter.amount  # moments need no Fisher pass either, and have the same usual period
    else:
        samples = (
            block.samples(calls, num_terms=1.0, first=True) if calls else block.blank_samples()
        )
        if calls:
            block.factors(samples)  # makes what is cached, which is no part of a step
            with Meter() as meter:
                block.factors(samples)
            factors = meter.amount
        if block.sampled:
            with Meter() as meter:
                moments = block.moments(parts, samples)
            scale = meter.amount if calls else NOTHING
        elif block.moments_of_gradient:
            moments = block.gradient_moments(gradient, 1.0)
    for key, found in moments.items():
        if found.total is not None:
            block.state.moments[key.removeprefix("moment.")] = RunningMean(found.total, 1.0)
    with Meter() as transport:
        block.adopt(parts)
    block.operator(1.0)
    turned = None
    if averages and block.moments_of_gradient:  # the mean is turned where the basis is new
        block.gradient_moments(gradient, 1.0)
        turned = block.state.turned.averaged = block.state.turned.measured
    with Meter() as meter:
        block.solve(gradient, 1.0)
    sizes = Sizes(
        _sums(work, sums),
        {name: sum(part.numel() for part in found.values()) for name, found in parts.items()},
        sum(moment.numel() for moment in block.state.moment_values().values()),
        mean=gradient.numel() if averages else 0,
        turned=0 if turned is None else turned[1].numel(),
    )
    retained = float(sum(call.inputs.numel() + call.gradient.numel() for call in calls))
    return LayerCost(factors, scale, meter.amount, sizes, retained, solver, transport.amount)


def _sums(work: Work, blank: Mapping[str, Statistic]) -> dict[str, int]:
    """Return how many numbers of a layer's statistics travel."""
    if work.of_gradient:
        return {}
    sizes = {
        name: numbers_sent(tuple(statistic.total.shape), symmetric=statistic.symmetric)
        for name, statistic in blank.items()
        if statistic.total is not None
    }
    return {"": sum(sizes.values())} if work.indivisible else {n: sizes[n] for n in sorted(sizes)}


def _passes(recipe: Recipe, output: Any) -> int:
    """Return the number of Fisher passes that the framework makes over one forward."""
    if not recipe.fisher.own_pass:
        return 0
    return sum(_passes_of(recipe.fisher, head, output) for head in recipe.heads)


def _passes_of(fisher: Fisher, head: Head, output: Any) -> int:
    """Return the number of passes for one head."""
    located = head.locate(output)
    if located is None:
        return 0
    view = head.likelihood.view(located)
    num_terms, width = int(view.shape[1]), int(view.shape[2])

    def losses(positions: int) -> int:
        few = torch.zeros(1, positions, width, requires_grad=True)
        return sum(1 for _ in fisher.losses(few, head.likelihood, None, torch.Generator()))

    one = losses(1)
    return one if num_terms == 1 else one + (losses(2) - one) * (num_terms - 1)


def _state_per_parameter(recipe: Recipe) -> float:
    """Return how many numbers the update rule keeps for each parameter."""
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = recipe.update.make([{"params": [parameter]}], lr=0.0, weight_decay=0.0)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = (each for each in optimizer.state[parameter].values() if isinstance(each, Tensor))
    return sum(each.numel() for each in kept if each.numel() > 1) / parameter.numel()


def meta_batch(text: str, size: int) -> Tensor:
    """Return a mini-batch on the meta device.

    Args:
        text: Shape of one example as `SHAPE` or `SHAPE:DTYPE`, with x between sizes.
        size: Number of examples.

    Raises:
        OptionError: The text has another form, or the sizes are out of range.

    Example:
        >>> meta_batch("3x224x224", 2).shape, meta_batch("512:int64", 2).dtype
        (torch.Size([2, 3, 224, 224]), torch.int64)
    """
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    sides = r"0*[1-9][0-9]*"
    if not isinstance(dtype, torch.dtype) or not re.fullmatch(f"{sides}(x{sides})*", shape):
        raise OptionError(
            f"the input {text!r} is no shape of an example: write 3x224x224 for an image, or "
            "512:int64 for 512 tokens."
        )
    try:
        return torch.empty(size, *map(int, shape.split("x")), dtype=dtype, device="meta")
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise OptionError(
            f"{size} examples of the input {text[:100]!r} are more than a tensor can hold. Give a "
            "smaller input or batch."
        ) from error
