"""`python -m kfactk plan`: predict what training a model on many devices costs, without data."""

from __future__ import annotations

import argparse
import importlib
import json
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import nn

from kfactk.costmodel.cost import Costs, TrainingLoad, cost
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.costmodel.hardware import Machine, calibrate, machine_named
from kfactk.errors import OptionError, near_names
from kfactk.recipe import Recipe, build
from kfactk.registry.registry import registry
from kfactk.registry.serialization import import_path
from kfactk.stages import Placement

STAGES = ("curvature", "basis", "fisher", "likelihood", "update")
PERIODS = ("factor_every", "scale_every", "basis_every")
IMAGE = "3x224x224"
WIDTH = 100
LEGEND = (
    "compute, messages, step: seconds of a mean step; worst step: seconds of the most expensive "
    "step; moved: bytes of curvature that all ranks move in a mean step; curvature, memory: bytes "
    "on the rank that needs most, memory at its peak; *: recommended, the fastest that fits"
)


@attrs.frozen
class Row:
    """One placement on one number of ranks.

    Args:
        placement: The placement, with the strategy that it chose where that has another name.
        costs: Its cost.
        fits: Whether it fits into the memory of a device.
        recommended: Whether it is the fastest one that fits.
    """

    placement: str
    costs: Costs
    fits: bool
    recommended: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--model",
        required=True,
        help="name of a torchvision model, or package.module:callable that makes a model",
    )
    parser.add_argument(
        "--input",
        metavar="SHAPE[:DTYPE]",
        help=f"one example: {IMAGE} (torchvision's default), 512:int64",
    )
    parser.add_argument(
        "--batch", type=_count, default=32, help="examples of a rank in a step; 32 by default"
    )
    parser.add_argument(
        "--ranks",
        type=_counts,
        default=(1,),
        help="numbers of devices, such as 8 or 1,8,64; 1 by default",
    )
    parser.add_argument(
        "--device", default="h100", help="machine profile: h100 (default), a100, cpu"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure the processor of this machine instead, in a few seconds",
    )
    parser.add_argument(
        "--precision",
        help="precision of the model: float32, tf32, bfloat16; by default that of the profile",
    )
    parser.add_argument(
        "--placement",
        action="append",
        help="name of a placement, or JSON with its options; may be repeated; all by default",
    )
    for family in STAGES:
        parser.add_argument(
            f"--{family}", help=f"the recipe's {family}: a name, or JSON with its options"
        )
    for period in PERIODS:
        parser.add_argument(
            f"--{period.replace('_', '-')}", type=_count, help=f"the recipe's {period}"
        )
    parser.add_argument(
        "--stagger",
        action="store_true",
        help="the recipe's stagger: layers are decomposed in different steps",
    )
    parser.add_argument(
        "--exclude", action="append", help="names of modules to leave alone; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output")


def run(arguments: argparse.Namespace) -> str:
    """Run the command, and return its output.

    Raises:
        OptionError: An argument cannot be used.
        CombinationError: The model cannot be planned.
    """
    recipe = _recipe(arguments)
    machine = calibrate() if arguments.calibrate else machine_named(arguments.device)
    if arguments.input is None and ":" in arguments.model:
        raise OptionError(
            "plan needs input=, the shape of one example, for a model of your own: --input "
            "3x224x224, or --input 512:int64."
        )
    load = training_load(
        model_on_meta(arguments.model),
        recipe,
        meta_batch(arguments.input or IMAGE, arguments.batch),
    )
    precision = arguments.precision or machine.precision
    machine.rate(precision)
    placements = (
        [_stage_value(text) for text in arguments.placement]
        if arguments.placement
        else _all_placements()
    )
    rows = [
        row
        for ranks in arguments.ranks
        for row in compare(load, recipe, placements, ranks, machine, precision)
    ]
    if arguments.json:
        return json.dumps(
            {
                "machine": attrs.asdict(machine),
                "precision": precision,
                "rows": [_as_dict(row) for row in rows],
            },
            indent=2,
        )
    head = (
        f"{arguments.model}: {load.parameters:,} parameters, {len(load.layers)} layers "
        f"preconditioned, {arguments.batch} examples a rank; {machine.name}, {precision}"
    )
    return "\n".join([head, repr(recipe), "", *_table(rows), "", *_advice(rows, machine)])


def compare(
    load: TrainingLoad,
    recipe: Recipe,
    placements: Sequence[Any],
    ranks: int,
    machine: Machine,
    precision: str,
) -> list[Row]:
    """Return one row for each placement, on this number of ranks."""
    rows = []
    workload = attrs.evolve(load.workload, device=machine.kind)
    for value in placements:
        placement: Placement = recipe.evolve(placement=value).placement
        assignment = placement.assign(workload, ranks).check(workload, ranks)
        wire = None
        if placement.wire_dtype is not None:
            wire = float(getattr(torch, placement.wire_dtype).itemsize)
        costs = cost(load, assignment, ranks, machine, precision=precision, wire=wire)
        label = value if isinstance(value, str) else json.dumps(value)
        if assignment.strategy not in label:
            label += f": {assignment.strategy}"
        widths = {len(share.gradient_workers) for share in assignment.shares.values()}
        if len(widths) == 1 and 1 < min(widths) < ranks:
            label += f", rows of {min(widths)}"
        rows.append(Row(label, costs, costs.memory.total <= machine.memory))
    fitting = [row for row in rows if row.fits]
    best = min(fitting, key=lambda row: row.costs.seconds) if fitting else None
    return [attrs.evolve(row, recommended=row is best) for row in rows]


def model_on_meta(name: str) -> nn.Module:
    """Return a model on the meta device.

    Args:
        name: Name of a torchvision model, or `package.module:callable`.

    Raises:
        OptionError: There is no such model, or the callable does not return one.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the initialisation of meta tensors
        found = import_path(name)() if ":" in name else _from_torchvision(name)
    if not isinstance(found, nn.Module):
        raise OptionError(
            f"the model {name!r} gave {type(found).__name__}; name a function or class that gives "
            "a torch.nn.Module."
        )
    return found.to("meta")


def _from_torchvision(name: str) -> Any:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise OptionError(
            f"the model {name!r} is one of torchvision, which cannot be imported ({error}). "
            "Install it (pip install torchvision), or name a model of your own as "
            "package.module:callable."
        ) from error
    if name not in models.list_models():
        raise OptionError(
            f"torchvision has no model {name!r}.{near_names(name, models.list_models())} Name a "
            "model of your own as package.module:callable."
        )
    return models.get_model(name, weights=None)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    given: dict[str, Any] = {
        family: _stage_value(text)
        for family in STAGES
        if (text := getattr(arguments, family)) is not None
    }
    given |= {
        period: value for period in PERIODS if (value := getattr(arguments, period)) is not None
    }
    return build(**given, stagger=arguments.stagger, exclude=arguments.exclude or ())


def _stage_value(text: str) -> Any:
    """Return a stage of the command line: a name, or a dict from JSON."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(
            f"{text!r} is no JSON ({error}); write a stage with options as "
            '\'{"name": "...", "option": 1}\'.'
        ) from error


def _all_placements() -> list[str]:
    return [
        info.name
        for info in registry().stages("placement")
        if not info.blocked and not info.conflict
    ]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _table(rows: Sequence[Row]) -> list[str]:
    head = (
        "",
        "ranks",
        "placement",
        "compute",
        "messages",
        "step",
        "worst step",
        "moved",
        "curvature",
        "memory",
        "fits",
    )
    cells = [head]
    for row in rows:
        costs = row.costs
        compute, messages = (
            sum(part.mean for part in parts.values())
            for parts in (costs.compute, costs.communication)
        )
        cells.append(
            (
                "*" if row.recommended else "",
                str(costs.ranks),
                row.placement,
                _seconds(compute),
                _seconds(messages),
                _seconds(costs.seconds),
                _seconds(costs.worst),
                _bytes(sum(costs.moved.values())),
                _bytes(costs.memory.curvature),
                _bytes(costs.memory.total),
                "yes" if row.fits else "no",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = (0, 2)
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _advice(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Return the legend, and the recommendation for each number of ranks."""
    lines = [*textwrap.wrap(LEGEND, WIDTH), ""]
    for ranks in dict.fromkeys(row.costs.ranks for row in rows):
        reason = _recommendation([row for row in rows if row.costs.ranks == ranks], machine)
        lines += textwrap.wrap(f"{ranks} rank{'s' if ranks > 1 else ''}: {reason}", WIDTH)
    return lines


def _recommendation(rows: Sequence[Row], machine: Machine) -> str:
    """Return the recommended row of one number of ranks, and why."""
    least = min(rows, key=lambda row: row.costs.memory.total)
    best = next((row for row in rows if row.recommended), None)
    if best is None:
        return (
            f"nothing fits into {_bytes(machine.memory)}; {least.placement} comes nearest with "
            f"{_bytes(least.costs.memory.total)}, of which "
            f"{_bytes(least.costs.memory.activations)} are activations. Take a smaller batch, or "
            "more ranks."
        )
    text = (
        f"{best.placement}, {_seconds(best.costs.seconds)} a step and "
        f"{_bytes(best.costs.memory.total)} of {_bytes(machine.memory)}"
    )
    others = [row for row in rows if row is not best]
    slowest = max(others, key=lambda row: row.costs.seconds, default=None)
    if slowest is None or slowest.costs.seconds < 1.005 * best.costs.seconds:
        return f"{text}; the choice of placement matters little" if others else text
    fast, slow = ({**row.costs.compute, **row.costs.communication} for row in (best, slowest))
    part = max(slow, key=lambda name: slow[name].mean - fast[name].mean)
    text += (
        f"; {slowest.placement} takes {_seconds(slowest.costs.seconds)}, most of the difference in "
        f"its {part} ({_seconds(slow[part].mean)} instead of {_seconds(fast[part].mean)})"
    )
    too_large = [row.placement for row in others if not row.fits]
    return f"{text}; {', '.join(too_large)} would not fit" if too_large else text


def _as_dict(row: Row) -> dict[str, Any]:
    costs = row.costs
    return {
        "ranks": costs.ranks,
        "placement": row.placement,
        "strategy": costs.assignment.strategy,
        "reason": costs.assignment.reason,
        "seconds": costs.seconds,
        "worst_seconds": costs.worst,
        "compute": {name: attrs.asdict(part) for name, part in costs.compute.items()},
        "communication": {name: attrs.asdict(part) for name, part in costs.communication.items()},
        "moved": dict(costs.moved),
        "worst_moved": dict(costs.worst_moved),
        "held": list(costs.held),
        "refresh_seconds": list(costs.refresh_seconds),
        "memory": {**attrs.asdict(costs.memory), "total": costs.memory.total},
        "fits": row.fits,
        "recommended": row.recommended,
    }


def _seconds(seconds: float) -> str:
    for unit, size, digits in (("s", 1.0, 2), ("ms", 1e-3, 1)):
        if seconds >= size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds * 1e6:.0f} us" if seconds else "0"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.0f} kB"
