"""Placement that chooses among the others by their estimated costs."""

from __future__ import annotations

import attrs

from kfactk import Assignment, Workload, grid, hookimpl
from kfactk.costmodel.cost import Costs, TrainingLoad, cost
from kfactk.costmodel.hardware import MACHINES, machine_named
from kfactk.options import choice, number
from kfactk_stages.placement._options import PlacementOptions

WIRE_BYTES = {None: None, "float32": 4.0, "bfloat16": 2.0}
"""Bytes of a number on the wire; `None` for its own precision."""


@attrs.frozen
class Auto(PlacementOptions):
    """Take the fastest placement that fits into memory, by the cost model.

    The candidates are `replicated`, `comm_opt`, `hybrid` of every width, and `mem_opt`. The
    comparison covers the parts of a mean step that depend on the placement: decompositions,
    preconditioning and messages. The answer depends on shapes, periods and the machine's profile,
    not on a measurement, so every rank and every run gets the same. `optimizer.placement` tells the
    choice and the reason.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It
            cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for smaller messages; `None` for each tensor's own
            precision.
        machine: Profile for the estimates: "h100", "a100" or "cpu"; `None` for the profile of the
            parameters' device.
        memory: Bytes that curvature may take on each rank between steps; `None` for the memory of
            the device.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> from kfactk import Work
        >>> workload = Workload((Work("fc", {"A": (9, 9), "G": (2, 2)}, (2, 9)),))
        >>> Auto().assign(workload, ranks=2).strategy
        'replicated'

    References:
        Pauloski et al. 2021, "KAISA: An adaptive second-order optimizer framework for deep neural
        networks", arXiv:2107.01739.
    """

    machine: str | None = attrs.field(
        default=None,
        validator=choice(*MACHINES, None, hint=", the profile that estimates costs"),
    )
    memory: float | None = attrs.field(
        default=None,
        validator=number(low=0, low_open=True, optional=True, hint=", in bytes, such as 4e9,"),
    )

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Return the cheapest assignment."""
        if ranks == 1:
            return grid(
                workload, 1, 1, "replicated", "auto: one rank does everything", everyone=True
            )
        machine = machine_named(self.machine, workload.device)
        load = TrainingLoad.of(workload)
        candidates = [
            cost(load, each, ranks, machine, wire=WIRE_BYTES[self.wire_dtype])
            for each in _candidates(workload, ranks)
        ]
        bound = machine.memory if self.memory is None else self.memory
        fitting = [costs for costs in candidates if max(costs.held) <= bound]
        if fitting:
            chosen = min(fitting, key=lambda costs: costs.seconds)
        else:
            chosen = min(candidates, key=lambda costs: max(costs.held))
        return attrs.evolve(
            chosen.assignment,
            reason=_reason(chosen, candidates, bool(fitting), bound, machine.name),
        )


def _candidates(workload: Workload, ranks: int) -> list[Assignment]:
    """Return the assignments to compare, the simplest first: it wins among equals."""
    widths = [width for width in range(ranks - 1, 1, -1) if ranks % width == 0]
    return [
        grid(workload, ranks, ranks, "replicated", everyone=True),
        grid(workload, ranks, ranks, "comm_opt"),
        *(grid(workload, ranks, width, "hybrid", f"groups of {width}") for width in widths),
        grid(workload, ranks, 1, "mem_opt"),
    ]


def _reason(chosen: Costs, candidates: list[Costs], fits: bool, bound: float, machine: str) -> str:
    limit = f"{bound / 1e9:.3g} GB of curvature on each rank"
    why = f"the fastest within {limit}" if fits else f"the smallest, since none fits into {limit}"
    others = "; ".join(
        _describe(costs)
        for costs in candidates
        if costs is not chosen and costs.assignment.strategy != "hybrid"
    )
    return f"auto: {why}, by the profile {machine!r}: {_describe(chosen)}; the others: {others}"


def _describe(costs: Costs) -> str:
    name = f"{costs.assignment.strategy} {costs.assignment.reason}".strip()
    return f"{name} ({1e3 * costs.seconds:.3g} ms a step, {max(costs.held) / 1e6:.3g} MB)"


@hookimpl
def kfactk_placements() -> dict[str, type[Auto]]:
    """Register the placement `auto`."""
    return {"auto": Auto}
