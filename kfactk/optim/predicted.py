"""What a recipe will do in its steps, asked of its stages before there are any.

A controller says by itself in which steps it tries dampings and evaluates the loss again, and a
pace how long its intervals may become. So their work is known without a run. A controller is asked
with the numbers that it begins with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs
import torch
from torch import nn

from kfactk.errors import PluginError
from kfactk.optim.settings import Settings, name_of
from kfactk.options import plain
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.coverage import Coverage, told_bytes, told_seconds
from kfactk.preconditioner.footprint import LinkFootprint, footprint_of, link_footprint
from kfactk.preconditioner.pace_state import LONGEST
from kfactk.stages import ControlRates, Pace
from kfactk.validation import attribute_errors, stage_label

STEPS = 1000
"""Steps that a controller is asked about, and refreshes that a pace is."""


def control_rates(recipe: Settings) -> ControlRates:
    """Return how often the controller of a recipe wants more work.

    Raises:
        PluginError: It fails, or tries nothing.
    """
    controller = recipe.controller
    assert controller is not None
    rule = recipe.update.make(
        [{"params": [nn.Parameter(torch.zeros(1))]}], lr=recipe.lr, weight_decay=0.0
    )
    numbers = {name: float(plain(rule.defaults.get(name, 0.0))) for name in ("lr", "momentum")}
    with attribute_errors("controller", controller, "telling what it does in its steps"):
        numbers |= {"damping": float(plain(recipe.damping)), **controller.numbers}
        tries = Counter(len(controller.dampings(step, numbers)) for step in range(STEPS))
        again = sum(bool(controller.evaluates(step)) for step in range(STEPS))
    if not min(tries):
        raise PluginError(
            f"{stage_label('controller', controller)} tries no damping in some steps; the present "
            "one is always among them. Report it to its authors, or give controller=None."
        )
    return ControlRates({n: count / STEPS for n, count in sorted(tries.items())}, again / STEPS)


def longest_interval(pace: Pace) -> int | None:
    """Return the interval of a pace, in its units, where nothing ever changes; `None` if it grows.

    It is the longest one: larger changes never give a longer one.

    Raises:
        PluginError: It fails.
    """
    with attribute_errors("pace", pace, "telling how long its intervals become"):
        found: list[int] = []
        for _ in range(STEPS):
            known = found[: pace.keeps]
            found.insert(0, int(pace.interval([0.0] * len(known), known)))
            if found[0] >= LONGEST:
                return None
    return found[0] if len(set(found[: STEPS // 2])) == 1 else None


def with_notes(coverage: Coverage, recipe: Settings, blocks: Sequence[Block]) -> Coverage:
    """Return a coverage table with what link, controller, pace and lag of a recipe take.

    Args:
        coverage: The table.
        recipe: The recipe.
        blocks: The blocks.

    Raises:
        CombinationError: The link cannot join their layers.
        PluginError: A stage failed.
    """
    notes = []
    if recipe.link is not None:
        notes.append(_of_link(recipe.link_name, link_footprint(recipe.link, blocks)))
    if recipe.controller is not None:
        notes.append(_of_controller(recipe))
    if recipe.pace is not None:
        longest = longest_interval(recipe.pace)
        bound = "without a limit" if longest is None else f"at most {longest}"
        notes.append(
            f"pace {name_of('pace', recipe.pace)}: intervals from 1 unit of factor_every on, "
            f"{bound}; the bytes of blocks count {recipe.pace.keeps} more sets of factors"
        )
    if recipe.lag:
        known = [footprint_of(block) for block in blocks]
        size = told_bytes(sum(each.factors + each.decomposition for each in known if each))
        notes.append(
            f"lag {recipe.lag}: decompositions run beside so many steps, with {size} of copies and "
            "results that wait"
        )
    return attrs.evolve(coverage, notes=tuple(notes))


def _of_link(name: str, found: LinkFootprint) -> str:
    layers = f"link {name}: {len(found.layers)} layers"
    if not found.layers:
        return layers
    if found.told:
        time = "" if not found.seconds else f", {told_seconds(found.seconds)} a preparation"
        return f"{layers}, {told_bytes(found.kept)} between steps{time}"
    known = "" if found.statistics is None else f"{told_bytes(found.statistics)} of statistics; "
    what = "its statistics" if found.prepared is not None else "what it prepares"
    what = "its bytes" if found.statistics is None and found.prepared is None else what
    return f"{layers}, {known}{what} and their seconds are not told"


def _of_controller(recipe: Settings) -> str:
    rates = control_rates(recipe)
    return (
        f"controller {name_of('controller', recipe.controller)}: in a mean step "
        f"{rates.directions:.3g} forwards with derivatives, {rates.evaluations:.3g} more forwards "
        f"and backwards, {rates.mean_tries - 1:.3g} more solves of each block"
    )
