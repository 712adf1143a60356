"""Placement that chooses among the others, by what each would cost."""

from __future__ import annotations

import math

import attrs

from kfactk import Assignment, OptionError, Workload, grid, hookimpl
from kfactk.costmodel.cost import Costs, TrainingLoad, cost
from kfactk.costmodel.hardware import MACHINES, machine_named
from kfactk_stages.placement._options import Travelling

WIRE_BYTES = {None: None, "float32": 4.0, "bfloat16": 2.0}


def _machine(placement: Auto, attribute: attrs.Attribute[str | None], value: str | None) -> None:
    if value is not None and value not in MACHINES:
        raise OptionError(
            f"machine is {value!r}; it names the profile that costs are estimated with, one of {', '.join(map(repr, MACHINES))}, or None "
            "for the one that stands for the parameters' device."
        )


def _memory(placement: Auto, attribute: attrs.Attribute[float | None], value: float | None) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
    ):
        raise OptionError(
            f"memory is {value!r}; it is the number of bytes that curvature may take on each rank, such as 4e9, or None."
        )


@attrs.frozen
class Auto(Travelling):
    """Take the fastest of `replicated`, `comm_opt`, `hybrid` of any width and `mem_opt` that fits into memory, by a model of their costs.

    Compared are the parts of a mean step that a placement changes: decomposing, preconditioning, and messages. The answer depends on
    shapes, periods and the machine's profile, never on a measurement, so that it is the same on every rank and in every run;
    `optimizer.placement` tells what was chosen, and why.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for what travels; `None` for its own precision.
        machine: Profile to estimate with: "h100", "a100", "cpu"; `None` for the one that stands for the parameters' device.
        memory: Bytes that curvature may take on each rank between steps; `None` for all that a device has.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> from kfactk import Work
        >>> Auto().assign(Workload((Work("fc", {"A": (9, 9), "G": (2, 2)}, (2, 9)),)), ranks=2).strategy
        'replicated'

    References:
        Pauloski et al. 2021, "KAISA", arXiv:2107.01739.
    """

    machine: str | None = attrs.field(default=None, validator=_machine)
    memory: float | None = attrs.field(default=None, validator=_memory)

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """The cheapest assignment."""
        if ranks == 1:
            return grid(
                workload, 1, 1, "replicated", "auto: one rank does everything", everyone=True
            )
        machine = machine_named(self.machine, workload.device)
        job = TrainingLoad.of(workload)
        found = [
            cost(job, each, ranks, machine, wire=WIRE_BYTES[self.wire_dtype])
            for each in _candidates(workload, ranks)
        ]
        bound = machine.memory if self.memory is None else self.memory
        fitting = [costs for costs in found if max(costs.held) <= bound]
        chosen = (
            min(fitting, key=lambda costs: costs.seconds)
            if fitting
            else min(found, key=lambda costs: max(costs.held))
        )
        others = "; ".join(
            _told(costs)
            for costs in found
            if costs is not chosen and costs.assignment.strategy != "hybrid"
        )
        why = "the fastest" if fitting else "the smallest, since none does,"
        reason = f"auto: {why} that keeps within {bound / 1e9:.3g} GB of curvature a rank, by the profile {machine.name!r}: {_told(chosen)}"
        return attrs.evolve(chosen.assignment, reason=f"{reason}; beside it {others}")


def _candidates(workload: Workload, ranks: int) -> list[Assignment]:
    """What is compared; the simplest first, which wins among equals."""
    widths = [width for width in range(ranks - 1, 1, -1) if ranks % width == 0]
    return [
        grid(workload, ranks, ranks, "replicated", everyone=True),
        grid(workload, ranks, ranks, "comm_opt"),
        *(grid(workload, ranks, width, "hybrid", f"rows of {width}") for width in widths),
        grid(workload, ranks, 1, "mem_opt"),
    ]


def _told(costs: Costs) -> str:
    named = f"{costs.assignment.strategy} {costs.assignment.reason}".strip()
    return f"{named} ({1e3 * costs.seconds:.3g} ms a step, {max(costs.held) / 1e6:.3g} MB)"


@hookimpl
def kfactk_placements() -> dict[str, type[Auto]]:
    """The placement `auto`."""
    return {"auto": Auto}
