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
from kfactk.preconditioner.coverage import told_seconds
from kfactk.preconditioner.pace_state import LONGEST
from kfactk.recipe import PRESETS, Recipe, preset
from kfactk.registry.registry import registry
from kfactk.registry.serialization import import_path
from kfactk.stages import Placement

STAGES = (
    *("curvature", "basis", "fisher", "likelihood"),
    *("link", "update", "controller", "pace"),
)
PERIODS = ("factor_every", "scale_every", "basis_every")
IMAGE = "3x224x224"
OWN_MODEL = "name a model of your own as package.module:callable"
WIDTH = 100
SLOW = 60.0
"""Seconds of a worst step from which a plan says no."""
MOST_RANKS = 100_000
"""A plan of more would take hours."""
COLUMNS: tuple[str, ...] = (
    *("", "ranks", "placement", "compute", "messages", "step", "worst step"),
    *("moved", "curvature", "memory", "fits"),
)
LEGEND = (
    "compute, messages, step: seconds of a mean step; worst step: seconds of the most expensive "
    "step; moved: bytes of curvature that all ranks move in a mean step; curvature, memory: bytes "
    "on the rank that needs most, memory at its peak; fits: whether it fits, and no step takes "
    "minutes; *: recommended, the fastest that fits"
)


@attrs.frozen
class Row:
    """One placement on one number of ranks.

    Args:
        placement: The placement, with the strategy that it chose where that has another name.
        costs: Its cost.
        fits: Whether it fits into the memory of a device.
        slow: Why its worst step takes minutes, and the remedy; "" where it does not.
        refused: Why `bind` would refuse it; "" where it would not.
        least: Seconds of a mean step where a pace has its longest intervals; `None` without one.
        recommended: Whether it is the fastest one that fits and is not slow.
    """

    placement: str
    costs: Costs
    fits: bool
    slow: str = ""
    refused: str = ""
    least: float | None = None
    recommended: bool = False

    @property
    def works(self) -> bool:
        """Whether one would train like this."""
        return self.fits and not self.slow and not self.refused

    @property
    def verdict(self) -> str:
        """Whether one would, and what is against it, in a word."""
        if self.refused:
            return "no: link"
        return "yes" if self.works else "no: slow" if self.fits else "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add, named = parser.add_argument, "a name, or JSON with its options"
    add("--model", required=True, help="a torchvision model, or package.module:callable")
    example = f"one example: {IMAGE} (torchvision's default), 512:int64"
    add("--input", metavar="SHAPE[:DTYPE]", help=example)
    add("--batch", type=_count, default=32, help="examples of a rank in a step; 32 by default")
    devices = "numbers of devices, such as 8 or 1,8,64; 1 by default"
    add("--ranks", type=_counts, default=(1,), help=devices)
    add("--device", default="h100", help="machine profile: h100 (default), a100, cpu")
    add("--calibrate", action="store_true", help="measure the processor of this machine instead")
    add("--precision", help="of the model: float32, tf32, bfloat16; by default the profile's")
    add("--placement", action="append", help=f"{named}; may be repeated; all by default")
    names = ", ".join(PRESETS)
    add(
        "--preset",
        default="thesis",
        help=f"what the recipe begins with: {names}; thesis by default",
    )
    for family in STAGES:
        add(f"--{family}", help=f"the recipe's {family}: {named}")
    for period in PERIODS:
        add(f"--{period.replace('_', '-')}", type=_count, help=f"the recipe's {period}")
    add(
        "--stagger",
        action="store_true",
        help="the recipe's stagger: layers are decomposed in different steps",
    )
    add("--lag", type=_count, default=0, help="the recipe's lag")
    add("--exclude", action="append", help="names of modules to leave alone; may be repeated")
    add("--json", action="store_true", help="JSON on standard output")


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
            "plan needs the shape of one example for a model of your own: "
            "give --input 3x224x224, or --input 512:int64."
        )
    batch = meta_batch(arguments.input or IMAGE, arguments.batch)
    load = training_load(model_on_meta(arguments.model), recipe, batch)
    precision = arguments.precision or machine.precision
    machine.rate(precision)
    usable = (i for i in registry().stages("placement") if not (i.blocked or i.conflict))
    placements = arguments.placement or [info.name for info in usable]
    rows: list[Row] = []
    for ranks in arguments.ranks:
        stages = map(_stage_value, placements)
        rows += compare(load, recipe, list(stages), ranks, machine, precision)
    if arguments.json:
        shown = {"machine": attrs.asdict(machine), "precision": precision}
        shown |= {"untold": list(load.untold), "rows": [_as_dict(row) for row in rows]}
        return json.dumps(shown, indent=2)
    head = (
        f"{arguments.model}: {load.parameters:,} parameters, {len(load.layers)} layers "
        f"preconditioned, {arguments.batch} examples a rank; {machine.name}, {precision}"
    )
    notes = [line for note in _notes(load, recipe) for line in textwrap.wrap(note, WIDTH)]
    lines = [head, repr(recipe), "", *_table(rows), "", *_advice(rows, machine)]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


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
        dtype = placement.wire_dtype
        wire = getattr(torch, dtype).itemsize if dtype else None
        costs = cost(load, assignment, ranks, machine, precision=precision, wire=wire)
        label = value if isinstance(value, str) else json.dumps(value)
        if assignment.strategy not in label:
            label += f": {assignment.strategy}"
        width, *others = {len(share.gradient_workers) for share in assignment.shares.values()}
        label += f", rows of {width}" if not others and 1 < width < ranks else ""
        row = Row(label, costs, costs.memory.total <= machine.memory)
        refused = "" if load.link is None else load.link.refused(assignment, ranks)
        least = None
        if recipe.pace is not None:
            seldom = load.at_longest_intervals()
            least = cost(seldom, assignment, ranks, machine, precision=precision, wire=wire).seconds
        slow = _slow(load, recipe, machine, costs)
        rows.append(attrs.evolve(row, slow=slow, refused=refused, least=least))
    fitting = [row for row in rows if row.works]
    best = min(fitting, key=lambda row: row.costs.seconds) if fitting else None
    return [attrs.evolve(row, recommended=row is best) for row in rows]


def _slow(load: TrainingLoad, recipe: Recipe, machine: Machine, costs: Costs) -> str:
    """Return why the worst step takes minutes, with the layer and the remedy; "" if it does not."""
    if costs.worst < SLOW:
        return ""
    told = f"a worst step of {told_seconds(costs.worst)}"
    seconds = {
        (work.layer, name): load.layers[work.layer].decomposition_seconds(shape, machine)
        for work in load.workload.works
        for name, shape in work.matrices.items()
    }
    layer, name = max(seconds, key=seconds.__getitem__)
    if costs.compute["decomposition"].worst < costs.worst / 2:
        return f"{told}, most of it not in decompositions: take a smaller batch"
    shapes = {work.layer: work.matrices for work in load.workload.works}
    side = shapes[layer][name][-1]
    remedies = [f"leave the layer out (--exclude {layer})"] if layer else []
    curvature = recipe.written("curvature")
    if isinstance(curvature, dict) and _has_longest_side(recipe):
        written = json.dumps({**curvature, "max_side": max(64, side // 4)})
        remedies.insert(0, f"keep shorter sides whole (--curvature '{written}')")
    if load.slots == 1 and len(shapes) > 1:
        remedies.append("decompose layers in different steps (--stagger)")
    return (
        f"{told}: {name} of layer {layer or '(root)'} ({side} x {side}) alone takes "
        f"{told_seconds(seconds[layer, name])} to decompose. To lower it, "
        f"{', or '.join(remedies) or 'choose a basis of smaller matrices'}"
    )


def _has_longest_side(recipe: Recipe) -> bool:
    kind = type(recipe.rules[0].curvature)
    field = attrs.fields_dict(kind).get("max_side") if attrs.has(kind) else None
    return field is not None and field.init


def model_on_meta(name: str) -> nn.Module:
    """Return a model on the meta device.

    Args:
        name: Name of a torchvision model, or `package.module:callable`.

    Raises:
        OptionError: There is no such model, or the callable does not return one.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the initialisation of meta tensors
        found = _made(name) if ":" in name else _from_torchvision(name)
    if not isinstance(found, nn.Module):
        raise OptionError(
            f"the model {name!r} gave {type(found).__name__}; name a function or class that gives "
            "a torch.nn.Module."
        )
    return found.to("meta")


def _made(name: str) -> Any:
    make = import_path(name)
    try:
        return make()
    except (Exception, SystemExit) as error:  # it is the user's code, and may raise anything
        raise OptionError(
            f"the model {name!r} cannot be made ({type(error).__name__}: {error}). It is called "
            "without arguments, on the meta device: name a function that needs no data."
        ) from error


def _from_torchvision(name: str) -> Any:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise OptionError(
            f"the model {name!r} is one of torchvision, which cannot be imported ({error}). "
            f"Install it (pip install torchvision), or {OWN_MODEL}."
        ) from error
    if name not in models.list_models():
        raise OptionError(
            f"torchvision has no model {name!r}.{near_names(name, models.list_models())} "
            f"Choose one of torchvision.models.list_models(), or {OWN_MODEL}."
        )
    return models.get_model(name, weights=None)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    given = {name: getattr(arguments, name) for name in (*STAGES, *PERIODS)}
    given = {name: _stage_value(value) for name, value in given.items() if value is not None}
    flags = {name: getattr(arguments, name) for name in ("stagger", "lag", "exclude")}
    return preset(arguments.preset, **given, **{n: value for n, value in flags.items() if value})


def _stage_value(text: Any) -> Any:
    """Return a stage of the command line: a name, or a dict from JSON."""
    if not str(text).lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(
            f"{text!r} is no JSON ({error}); write a stage with options as "
            """'{"name": "...", "option": 1}'."""
        ) from error


def _count(text: str, most: int = 2**31 - 1) -> int:
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(most))
    if not (digits and 0 < int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part, MOST_RANKS) for part in text.split(","))


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [COLUMNS]
    for row in rows:
        costs = row.costs
        seconds = [
            sum(part.mean for part in costs.compute.values()),
            sum(part.mean for part in costs.communication.values()),
        ]
        whole = _seconds(costs.seconds)
        whole += "" if row.least is None else f" ({_seconds(row.least)})"
        sizes = [sum(costs.moved.values()), costs.memory.curvature, costs.memory.total]
        first = ("*" if row.recommended else "", str(costs.ranks), row.placement)
        times = *map(_seconds, seconds), whole, _seconds(costs.worst)
        cells.append((*first, *times, *map(_bytes, sizes), row.verdict))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust if name in ("", "placement") else str.rjust for name in COLUMNS]
    lines = []
    for line in cells:
        padded = (side(c, w) for side, c, w in zip(sides, line, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return lines


def _advice(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Return the legend, and the recommendation for each number of ranks."""
    lines = [*textwrap.wrap(LEGEND, WIDTH), ""]
    for ranks in dict.fromkeys(row.costs.ranks for row in rows):
        reason = _recommendation([row for row in rows if row.costs.ranks == ranks], machine)
        lines += textwrap.wrap(f"{ranks} rank{'s' if ranks > 1 else ''}: {reason}", WIDTH)
    return lines


def _recommendation(rows: Sequence[Row], machine: Machine) -> str:
    """Return the recommended row of one number of ranks, and why."""
    best = next((row for row in rows if row.recommended), None)
    if all(row.refused for row in rows):
        return f"no: {rows[0].refused}. Add --placement replicated, or leave out the link."
    if best is None and any(row.fits for row in rows):
        return f"no: {min(rows, key=lambda row: (not row.fits, row.costs.worst)).slow}."
    if best is None:
        least = min(rows, key=lambda row: row.costs.memory.total)
        needed = least.costs.memory
        return (
            f"nothing fits into {_bytes(machine.memory)}; {least.placement} comes nearest with "
            f"{_bytes(needed.total)}, of which {_bytes(needed.activations)} are activations. "
            "Take a smaller batch, or more ranks."
        )
    memory = f"{_bytes(best.costs.memory.total)} of {_bytes(machine.memory)}"
    text = f"{best.placement}, {_seconds(best.costs.seconds)} a step and {memory}"
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
    text += f"; {', '.join(too_large)} would not fit" if too_large else ""
    refused = [row.placement for row in others if row.refused]
    text += f"; {', '.join(refused)} would be refused, as the link joins layers" if refused else ""
    too_slow = [row.placement for row in others if row.fits and row.slow]
    return f"{text}; {', '.join(too_slow)} would take minutes" if too_slow else text


def _notes(load: TrainingLoad, recipe: Recipe) -> list[str]:
    """Return what the table cannot say of link, controller, pace and lag."""
    notes = []
    if recipe.pace is not None:
        most = "grow without a limit" if load.longest >= LONGEST else f"end at {load.longest}"
        notes.append(
            "pace: the table has intervals of 1, which is the most that it costs. Where nothing "
            f"changes, intervals {most}, and a mean step comes near the seconds in brackets"
        )
    if load.lag:
        notes.append(
            f"lag: decompositions run beside {load.lag} steps; the first, which is made at once, "
            "is left out of the worst step"
        )
    if load.control is not None:
        rates = load.control.rates
        notes.append(
            f"controller: in a mean step {rates.directions:.3g} forwards with derivatives, "
            f"{rates.evaluations:.3g} more forwards and backwards, and {rates.mean_tries - 1:.3g} "
            "more times what preconditions"
        )
    if load.untold:
        notes.append(
            f"not told: {', '.join(load.untold)}. Neither seconds nor bytes of it are in the "
            "table, so that all of these are more"
        )
    return notes


def _as_dict(row: Row) -> dict[str, Any]:
    costs = row.costs
    assignment = {"strategy": costs.assignment.strategy, "reason": costs.assignment.reason}
    numbers = attrs.asdict(costs, filter=lambda field, _: field.name != "assignment")
    numbers |= {"seconds": costs.seconds, "worst_seconds": costs.worst}
    numbers["memory"] |= {"total": costs.memory.total}
    verdict = {"fits": row.fits, "slow": row.slow, "recommended": row.recommended}
    verdict |= {"refused": row.refused, "least_seconds": row.least}
    return {"placement": row.placement, **assignment, **numbers, **verdict}


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
