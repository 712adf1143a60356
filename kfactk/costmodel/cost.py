"""Cost of a training step on many ranks: seconds, bytes of memory and bytes moved.

A step is a sequence of parts. The amount of a part on one rank is counted in FLOPs, bytes of memory
and launches. Its seconds are their sum, each at the rate of the machine, on the slowest rank. The
messages of a part follow one another. A part that is due every few steps counts in a mean step with
its share, and in the worst step in full: at step 0, and wherever the periods meet, everything is
due. Pure: no process, no tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import attrs

from kfactk.assignment import (
    Assignment,
    Work,
    Workload,
    assign_slots,
    is_square,
    layers_near_output,
)
from kfactk.costmodel.communication import (
    KINDS,
    Frequency,
    Message,
    Sizes,
    bytes_per_step,
    messages,
)
from kfactk.costmodel.hardware import Machine
from kfactk.stages import ControlRates

AVERAGING = "averaging gradients"
"""The part in which ranks average their gradients, as DistributedDataParallel does."""


@attrs.frozen
class Amount:
    """Operations and bytes of a computation.

    Args:
        products: FLOPs in matrix products.
        convolutions: FLOPs in convolutions.
        bytes: Bytes read and written.
        launches: Operations started.
        triangular: FLOPs in triangular solves.
    """

    products: float = 0.0
    convolutions: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    triangular: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(*map(operator.add, attrs.astuple(self), attrs.astuple(other)))

    def times(self, factor: float) -> Amount:
        """Return the amount multiplied by `factor`.

        Example:
            >>> Amount(products=10.0, launches=3.0).times(2)
            Amount(products=20.0, convolutions=0.0, bytes=0.0, launches=6.0, triangular=0.0)
        """
        return Amount(*(factor * part for part in attrs.astuple(self)))

    def seconds(self, machine: Machine, precision: str = "float32") -> float:
        """Return the seconds at the machine's rates; half precision takes half of the bytes."""
        rate = machine.rate(precision)
        slower = self.convolutions / machine.convolutions + self.triangular / machine.triangular
        arithmetic = (self.products + slower) / rate
        share = 0.5 if precision in ("bfloat16", "float16") else 1.0
        return arithmetic + share * self.bytes / machine.bandwidth + self.launches * machine.launch


NOTHING = Amount()


@attrs.frozen
class LayerCost:
    """Cost of the curvature of one layer.

    Args:
        factors: Amount to sum its factors over the mini-batch.
        scale: Amount to measure its moments on the mini-batch.
        precondition: Amount to precondition its gradient.
        sizes: Numbers of it that travel and are kept.
        retained: Numbers of the mini-batch that are kept until `step()` where its basis is due.
        solver: How its matrices are decomposed: "eigh", "cholesky", or "" for without cost.
        transport: Amount to carry its moments into a new basis.
    """

    factors: Amount
    scale: Amount
    precondition: Amount
    sizes: Sizes
    retained: float
    solver: str
    transport: Amount = NOTHING

    @classmethod
    def of(
        cls,
        work: Work,
        workload: Workload,
        *,
        positions: int = 1,
        batch: int = 0,
        solver: str = "eigh",
    ) -> LayerCost:
        """Return the cost for factors A and G and a diagonal in their basis, from shapes.

        FLOPs for each group, with N examples, T positions, o = d_out, i = d_in:

            factors         2 N T (i^2 + o^2)
            scale           N (2 T o i + 2 o^2 min(T, i) + 2 i^2 min(T, o)),
                            which is 2 N (o i + o^2 + i^2) for T = 1
            precondition    4 o i (o + i) with eigenvectors, half of it with two triangular solves
            transport       2 (i^3 + o^3) + 2 o i (o + i)

        Args:
            work: The layer's work.
            workload: The work of all layers.
            positions: T.
            batch: N.
            solver: "eigh" or "cholesky".
        """
        (o, i), item, t = work.gradient[-2:], workload.itemsize, positions
        groups, once = math.prod(work.gradient[:-2]), float(batch > 0)
        many = 2.0 * batch * groups
        sizes = Sizes.of(work, sampled=workload.sampled)
        rows = float(batch * groups * t * (o + i))
        touched = item * (2.0 * sum(sizes.kept.values()) + 8.0 * math.prod(work.gradient))
        precondition = 2.0 * groups * o * i * (o + i)
        factors = Amount(many * t * (i * i + o * o), 0.0, item * 6.0 * rows, 8 * once)
        scale = transport = NOTHING
        if workload.sampled:
            products = many * (t * o * i + o * o * min(t, i) + i * i * min(t, o))
            scale = Amount(products, 0.0, item * 8.0 * rows, 20 * once)
            products = groups * 2.0 * (i**3 + o**3 + o * i * (o + i))
            transport = Amount(products, 0.0, touched, 10)
        solving = Amount(bytes=touched, launches=10)
        if solver == "eigh":
            solving = attrs.evolve(solving, products=2 * precondition)
        else:
            solving = attrs.evolve(solving, triangular=precondition)
        return cls(factors, scale, solving, sizes, rows, solver, transport)

    def decomposition_seconds(self, shape: tuple[int, ...], machine: Machine) -> float:
        """Return the seconds to decompose one of its matrices."""
        if not self.solver or not is_square(shape):
            return 0.0
        return math.prod(shape[:-2]) * machine.solvers[self.solver](shape[-1])


@attrs.frozen
class LinkCost:
    """Cost of a link; it is the same on every rank.

    Args:
        label: The link in words, for what is not told.
        layers: Names of the layers that it joins.
        measure: Amount to measure the layers in one Fisher pass.
        prepare: Amount of a preparation, without decompositions.
        decomposed: Sides of the matrices that a preparation decomposes, by solver.
        slowdown: What seconds of these are multiplied by, for their precision.
        correct: Amount of a correction.
        sums: Bytes that travel where factors are refreshed.
        kept: Bytes of statistics, and of what is prepared.
        prepared: Bytes of the latter.
        gathered: Bytes of rows that are kept until the pass ends.
        workspace: Bytes that a preparation needs besides.
        solves: Whether it solves in place of the blocks.
        per_damping: Whether it is prepared for each damping that a controller tries.
        requires: Names of the matrices that every rank must keep.
        untold: What is not told, so that it is in none of the numbers.
    """

    label: str
    layers: frozenset[str]
    measure: Amount = NOTHING
    prepare: Amount = NOTHING
    decomposed: Mapping[str, Sequence[int]] = attrs.field(factory=dict)
    slowdown: float = 1.0
    correct: Amount = NOTHING
    sums: float = 0.0
    kept: float = 0.0
    prepared: float = 0.0
    gathered: float = 0.0
    workspace: float = 0.0
    solves: bool = False
    per_damping: bool = False
    requires: frozenset[str] = frozenset()
    untold: tuple[str, ...] = ()

    def preparation_seconds(self, machine: Machine) -> float:
        """Return the seconds of a preparation."""
        solved = sum(machine.solvers[name](n) for name, ns in self.decomposed.items() for n in ns)
        return self.prepare.seconds(machine) + self.slowdown * solved

    def refused(self, assignment: Assignment, ranks: int) -> str:
        """Return why an assignment cannot be, as not every rank holds a layer; "" where it can."""
        for name in sorted(self.layers):
            share = assignment.shares[name]
            kept = {m: share.inverse_workers.get(m, ()) for m in self.requires}
            if len(share.gradient_workers) < ranks or any(len(g) < ranks for g in kept.values()):
                return f"{self.label} needs layer {name!r} whole on every rank"
        return ""


@attrs.frozen
class ControlCost:
    """Cost of a controller.

    Args:
        rates: How often it wants more work.
        direction: Amount of one forward along a direction.
        products: By number of dampings that are tried, the amount of inner products with F, and of
            the directions.
        copies: Amount to keep and to restore what an evaluation of the loss changes.
        moved: Bytes of one direction.
        stacked: By number of dampings, bytes of the directions of the largest parameter.
    """

    rates: ControlRates
    direction: Amount
    products: Mapping[int, Amount]
    copies: Amount = NOTHING
    moved: float = 0.0
    stacked: Mapping[int, float] = attrs.field(factory=dict)

    @property
    def temporary(self) -> float:
        """Bytes of a step at their most: directions, or copies of parameters, steps, gradients."""
        most = self.rates.most_tries
        evaluating = 4 * self.moved if self.rates.evaluations else 0.0
        return max(2 * most * self.moved + self.stacked.get(most, 0.0), evaluating)


@attrs.frozen
class TrainingLoad:
    """What training a model costs one rank.

    Args:
        workload: The work that is placed.
        layers: Cost of each layer's curvature, by name.
        forward_backward: Amount of forward and backward over the rank's mini-batch.
        fisher_pass: Amount of one Fisher pass over it.
        passes: Fisher passes in a step that needs samples.
        parameters: Number of trained parameters.
        state: Numbers that the update rule keeps for each parameter.
        activations: Bytes kept between forward and backward.
        slots: Slots of the staggered schedule; 1 where all layers are decomposed at once.
        keeps: Sets of earlier factors that a pace compares with.
        longest: Longest interval of a pace, in units of `factor_every`; 1 without a pace.
        lag: Steps that a decomposition runs beside; 0 where a step waits for it.
        link: Cost of the link; `None` without one.
        control: Cost of the controller; `None` without one.
    """

    workload: Workload
    layers: Mapping[str, LayerCost]
    forward_backward: Amount = NOTHING
    fisher_pass: Amount = NOTHING
    passes: int = 1
    parameters: int = 0
    state: float = 2.0
    activations: float = 0.0
    slots: int = 1
    keeps: int = 0
    longest: int = 1
    lag: int = 0
    link: LinkCost | None = None
    control: ControlCost | None = None

    @property
    def untold(self) -> tuple[str, ...]:
        """What no stage tells, so that it is in none of the numbers."""
        return () if self.link is None else self.link.untold

    def at_longest_intervals(self) -> TrainingLoad:
        """Return the load where every interval of the pace is the longest: the least there can be.

        Example:
            >>> load = TrainingLoad(Workload((), 10, 10, 10), {}, longest=8)
            >>> load.at_longest_intervals().workload.factor_every
            80
        """
        periods = {
            name: self.longest * getattr(self.workload, name)
            for name in ("factor_every", "scale_every", "basis_every")
        }
        return attrs.evolve(self, workload=attrs.evolve(self.workload, **periods), longest=1)

    def works_by_slot(self) -> list[list[Work]]:
        """Return the works that are decomposed in each slot."""
        works = self.workload.works
        slot_of = assign_slots({work.layer: work.cost for work in works}, self.slots)
        return [[w for w in works if slot_of[w.layer] == slot] for slot in range(self.slots)]

    @classmethod
    def of(
        cls,
        workload: Workload,
        *,
        positions: Mapping[str, int] | None = None,
        batch: int = 0,
        forward: float = 0.0,
        solver: str = "eigh",
    ) -> TrainingLoad:
        """Return the load that follows from shapes.

        Without a batch it has only what a placement changes.

        Args:
            workload: The work.
            positions: T of each layer, by name; 1 for other layers.
            batch: Examples of a rank in a step.
            forward: FLOPs of the model's forward on one example. A backward takes twice that, a
                Fisher pass once.
            solver: "eigh" or "cholesky".
        """
        layers = {}
        for work in workload.works:
            t = (positions or {}).get(work.layer, 1)
            layers[work.layer] = LayerCost.of(
                work, workload, positions=t, batch=batch, solver=solver
            )
        size = sum(math.prod(work.gradient) for work in workload.works) if batch else 0
        step, fisher = Amount(3 * batch * forward), Amount(batch * forward)
        return cls(workload, layers, step, fisher, parameters=size)


@attrs.frozen
class Part:
    """One part of a step, on the slowest rank.

    Args:
        mean: Seconds in a mean step.
        worst: Seconds in the most expensive step.
    """

    mean: float
    worst: float

    def times(self, mean: float, worst: float) -> Part:
        """Return the part so many times, in a mean step and in the most expensive one."""
        return Part(mean * self.mean, worst * self.worst)


@attrs.frozen
class Memory:
    """Bytes on the rank that needs most.

    Args:
        model: Parameters, their gradients and the update rule's state.
        activations: What the forward keeps for the backward.
        curvature: Factors, decompositions, moments and means of gradients kept between steps.
        temporary: Sums and samples that the worst step adds.
    """

    model: float
    activations: float
    curvature: float
    temporary: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.model + self.activations + self.curvature + self.temporary


EVENTS = (
    ("factors", "sums"),
    ("Fisher pass", "scale", "sums", "decompositions", "moments"),
    ("decomposition", "decompositions"),
)
"""Parts that are due in the same step of a staggered schedule.

Output factors are small, and are counted with those of inputs."""


@attrs.frozen
class Costs:
    """Cost of a step under one assignment.

    Args:
        assignment: Which ranks do which work.
        ranks: Number of ranks.
        compute: Seconds of each part of the computation.
        communication: Seconds of each kind of message.
        moved: Bytes of curvature that all ranks move in a mean step, by kind.
        worst_moved: The same in the worst step.
        held: Bytes of curvature kept between steps, by rank.
        refresh_seconds: Seconds of one refresh of the basis, by rank.
        memory: Bytes on the rank that needs most.
        staggered: Whether factors, scale and decompositions are due in different steps.
    """

    assignment: Assignment
    ranks: int
    compute: Mapping[str, Part]
    communication: Mapping[str, Part]
    moved: Mapping[str, float]
    worst_moved: Mapping[str, float]
    held: tuple[float, ...]
    refresh_seconds: tuple[float, ...]
    memory: Memory
    staggered: bool = False

    @property
    def seconds(self) -> float:
        """Seconds of a mean step."""
        return sum(part.mean for part in (*self.compute.values(), *self.communication.values()))

    @property
    def worst(self) -> float:
        """Seconds of the most expensive step.

        Everything is due in it; in a staggered schedule, the most expensive of `EVENTS`.
        """
        worst = {n: part.worst for n, part in {**self.compute, **self.communication}.items()}
        if not self.staggered:
            return sum(worst.values())
        rare = {name for event in EVENTS for name in event}
        worst_event = max(sum(worst.get(name, 0.0) for name in event) for event in EVENTS)
        return worst_event + sum(seconds for name, seconds in worst.items() if name not in rare)


def cost(
    load: TrainingLoad,
    assignment: Assignment,
    ranks: int,
    machine: Machine,
    *,
    precision: str | None = None,
    wire: float | None = None,
) -> Costs:
    """Return the cost of a step.

    Args:
        load: What training the model costs one rank.
        assignment: Which ranks do which work.
        ranks: Number of ranks.
        machine: The machine of each rank.
        precision: Precision of the model; `None` for the machine's usual one.
        wire: Bytes of a number of curvature on the wire; `None` for those of the workload.

    Example:
        >>> from kfactk.assignment import grid
        >>> from kfactk.costmodel.hardware import H100
        >>> matrices = {"A": (4096, 4096), "G": (1024, 1024)}
        >>> works = [Work(f"fc{i}", matrices, (1024, 4096)) for i in range(8)]
        >>> load = TrainingLoad.of(Workload(tuple(works)))
        >>> alone = cost(load, grid(load.workload, 1, 1, "mem_opt"), 1, H100)
        >>> divided = cost(load, grid(load.workload, 8, 1, "mem_opt"), 8, H100)
        >>> divided.memory.curvature / alone.memory.curvature
        0.125
    """
    workload, frequency = load.workload, Frequency.of(load.workload)
    precision = precision or machine.precision
    slots = load.works_by_slot()
    refreshes = [_refresh_seconds(load, slot, assignment, ranks, machine) for slot in slots]
    held, preconditioning = _held_and_preconditioning(load, assignment, ranks, machine)
    compute = _compute_parts(load, machine, precision, frequency)
    solving = max(preconditioning)
    compute["preconditioning"] = Part(solving, solving)
    compute |= _link_parts(load, machine, frequency)
    compute |= _control_parts(load, machine, precision, solving)
    slowest = [max(each) for each in refreshes]
    compute["decomposition"] = _decomposition_part(load, machine, slowest, frequency, compute)
    traffic = _Traffic.of(load, slots, assignment, ranks, wire or workload.itemsize)
    communication = traffic.parts(machine, ranks, frequency)
    backward = compute["forward and backward"].mean * 2 / 3
    averaging = _averaging_part(load, machine, ranks, backward)
    communication[AVERAGING] = averaging.times(*_evaluations(load))
    return Costs(
        assignment,
        ranks,
        compute,
        communication,
        moved=traffic.moved(workload),
        worst_moved=traffic.worst_moved(),
        held=tuple(held),
        refresh_seconds=tuple(map(sum, zip(*refreshes, strict=True))),
        memory=_memory(load, max(held)),
        staggered=load.slots > 1,
    )


@attrs.frozen
class _Traffic:
    """The messages of curvature, of a whole period and of its most expensive steps.

    Args:
        every: The messages of all layers.
        due: By slot, those of a step that decomposes the layers of the slot. For all other layers
            such a step refreshes the scale alone.
        tries: How often gradients travel, in a mean step and at the most.
    """

    every: Sequence[Message]
    due: Sequence[Sequence[Message]]
    tries: tuple[float, float]

    @classmethod
    def of(
        cls,
        load: TrainingLoad,
        slots: Sequence[list[Work]],
        assignment: Assignment,
        ranks: int,
        item: float,
    ) -> _Traffic:
        """Return the messages of a load.

        Args:
            load: The load.
            slots: The works that are decomposed in each slot.
            assignment: Which ranks do which work.
            ranks: Number of ranks.
            item: Bytes of a number on the wire.
        """
        whole = list(load.workload.works)
        found = _messages(load, whole, assignment, ranks, item)
        due = []
        for slot in slots:
            own = found if slot == whole else _messages(load, slot, assignment, ranks, item)
            others = [work for work in whole if work not in slot]
            rest = _messages(load, others, assignment, ranks, item)
            due.append(
                [message for message in own if message.when != "scale_alone"]
                + [message for message in rest if message.when != "basis"]
            )
        return cls(found, due, _tries(load))

    def parts(self, machine: Machine, ranks: int, frequency: Frequency) -> dict[str, Part]:
        """Return the seconds of each kind of message."""
        found = {}
        for kind in KINDS:
            every, *due = ([m for m in each if m.kind == kind] for each in (self.every, *self.due))
            mean = _message_seconds(every, machine, ranks, frequency)
            worst = max(_message_seconds(each, machine, ranks) for each in due)
            found[kind] = Part(mean, worst).times(*self._times(kind))
        return found

    def moved(self, workload: Workload) -> dict[str, float]:
        """Return the bytes that all ranks move in a mean step, by kind."""
        sizes = bytes_per_step(list(self.every), workload)
        return {kind: size * self._times(kind)[0] for kind, size in sizes.items()}

    def worst_moved(self) -> dict[str, float]:
        """Return the bytes that all ranks move in the most expensive step, by kind."""
        return {
            kind: max(sum(m.moved for m in each if m.kind == kind) for each in self.due)
            * self._times(kind)[1]
            for kind in KINDS
        }

    def _times(self, kind: str) -> tuple[float, float]:
        return self.tries if kind == "gradients" else (1.0, 1.0)


def _messages(
    load: TrainingLoad, works: Sequence[Work], assignment: Assignment, ranks: int, item: float
) -> list[Message]:
    """Return the messages of some layers; with any of them, those of the link."""
    part = attrs.evolve(load.workload, works=tuple(works))
    sizes = {name: layer.sizes for name, layer in load.layers.items()}
    found = messages(part, sizes, assignment, ranks, item)
    if not works or load.link is None or ranks == 1:
        return found
    size = load.link.sums * item / load.workload.itemsize
    return [*found, Message("sums", "factors", "all-reduce", tuple(range(ranks)), size)]


def _compute_parts(
    load: TrainingLoad, machine: Machine, precision: str, frequency: Frequency
) -> dict[str, Part]:
    """Return the parts of the computation that are equal on all ranks."""

    def part(amount: Amount, share: float, precision: str = "float32") -> Part:
        seconds = amount.seconds(machine, precision)
        return Part(share * seconds, seconds if share else 0.0)

    layers, passes = load.layers, max(1, load.passes)
    factors = sum((layer.factors for layer in layers.values()), NOTHING)
    # A staggered schedule measures the scale of the layers near the output in a pass of their own.
    near = layers_near_output(load.workload.works) if load.slots > 1 else frozenset()
    halves = {False: NOTHING, True: NOTHING}
    for name, layer in layers.items():
        halves[name in near] += layer.scale
    scales = [part(half.times(passes), frequency.scale) for half in halves.values()]
    touched = load.workload.itemsize * load.parameters * (4 + 2 * load.state)
    update = Amount(bytes=touched, launches=4.0 * len(layers) if load.parameters else 0.0)
    return {
        "forward and backward": part(load.forward_backward, 1.0, precision),
        "Fisher pass": part(load.fisher_pass.times(load.passes), frequency.passes, precision),
        "factors": part(factors.times(passes), frequency.factors),
        "scale": Part(sum(scale.mean for scale in scales), max(scale.worst for scale in scales)),
        "update": part(update, 1.0),
    }


def _link_parts(load: TrainingLoad, machine: Machine, frequency: Frequency) -> dict[str, Part]:
    """Return the parts of the link; nothing without one."""
    link = load.link
    if link is None:
        return {}
    measure = link.measure.times(max(1, load.passes)).seconds(machine)
    prepare, correct = link.preparation_seconds(machine), link.correct.seconds(machine)
    return {
        "link statistics": Part(measure * frequency.factors, measure),
        "link preparation": Part(prepare * frequency.basis, prepare),
        "link correction": Part(correct, correct),
    }


def _control_parts(
    load: TrainingLoad, machine: Machine, precision: str, solving: float
) -> dict[str, Part]:
    """Return the parts of the controller; nothing without one.

    Args:
        load: The load.
        machine: The machine.
        precision: That of the model.
        solving: Seconds of one preconditioning.
    """
    control, link = load.control, load.link
    if control is None:
        return {}
    rates, direction = control.rates, control.direction.seconds(machine, precision)
    seconds = {
        tries: (tries + 1) * direction + control.products[tries].seconds(machine)
        for tries in rates.tries
    }
    mean = sum(share * seconds[tries] for tries, share in rates.tries.items())
    if link is not None:
        solving += link.correct.seconds(machine)
        solving += link.preparation_seconds(machine) if link.per_damping else 0.0
    again = load.forward_backward.seconds(machine, precision) + control.copies.seconds(machine)
    once = Part(again, again if rates.evaluations else 0.0)
    return {
        "quadratic model": Part(mean, max(seconds.values())),
        "trials of damping": Part(solving, solving).times(
            rates.mean_tries - 1, rates.most_tries - 1
        ),
        "loss again": once.times(rates.evaluations, 1.0),
    }


def _tries(load: TrainingLoad) -> tuple[float, float]:
    """Return how often gradients are preconditioned, in a mean step and at the most."""
    rates = None if load.control is None else load.control.rates
    return (1.0, 1.0) if rates is None else (rates.mean_tries, float(rates.most_tries))


def _evaluations(load: TrainingLoad) -> tuple[float, float]:
    """Return how often the loss has a backward, in a mean step and at the most."""
    share = 0.0 if load.control is None else load.control.rates.evaluations
    return 1.0 + share, 1.0 + math.ceil(share)


def _decomposition_part(
    load: TrainingLoad,
    machine: Machine,
    slowest: Sequence[float],
    frequency: Frequency,
    others: Mapping[str, Part],
) -> Part:
    """Return the part of the decompositions that a step waits for.

    With a lag they run beside that many steps. A processor does the same work then, and a step
    takes at most twice as long, or waits for what is left at its end. A device with streams is
    taken to do both at once, so that what is left at the end alone is waited for. The first
    decomposition, which is made at once, is left out.

    Args:
        load: The load.
        machine: The machine.
        slowest: Seconds of the slowest rank, by slot.
        frequency: Share of steps in which they are due.
        others: The other parts of the computation.
    """
    mean, worst = sum(slowest), max(slowest)
    if load.lag:
        step = sum(part.mean for part in others.values())
        left = [max(0.0, seconds - load.lag * step) for seconds in slowest]
        if machine.kind != "cpu":
            return Part(sum(left) * frequency.basis, max(left))
        worst = max(*left, min(worst, sum(part.worst for part in others.values())))
    return Part(mean * frequency.basis, worst)


def _refresh_seconds(
    load: TrainingLoad, slot: list[Work], assignment: Assignment, ranks: int, machine: Machine
) -> list[float]:
    """Return the seconds in which each rank decomposes, and carries moments into the new basis."""
    seconds = [0.0] * ranks
    for work in slot:
        share, layer = assignment.shares[work.layer], load.layers[work.layer]
        transport = layer.transport.seconds(machine)
        for rank in share.gradient_workers:
            seconds[rank] += transport
        for name, inverse_workers in share.inverse_workers.items():
            decomposition = layer.decomposition_seconds(work.matrices[name], machine)
            for rank in inverse_workers:
                seconds[rank] += decomposition

    return seconds


def _held_and_preconditioning(
    load: TrainingLoad, assignment: Assignment, ranks: int, machine: Machine
) -> tuple[list[float], list[float]]:
    """Return the bytes that each rank keeps, and its seconds of preconditioning."""
    held, preconditioning = [0.0] * ranks, [0.0] * ranks
    itemsize = load.workload.itemsize
    for work in load.workload.works:
        share, layer = assignment.shares[work.layer], load.layers[work.layer]
        for name, inverse_workers in share.inverse_workers.items():
            for rank in inverse_workers:
                held[rank] += itemsize * (1 + load.keeps) * math.prod(work.matrices[name])
        seconds = layer.precondition.seconds(machine)
        sizes = layer.sizes
        held = [each + itemsize * sizes.mean for each in held]
        kept = itemsize * (sum(sizes.kept.values()) + sizes.moments + sizes.turned)
        link = load.link
        by_link = link is not None and link.solves and work.layer in link.layers
        for rank in share.gradient_workers:
            held[rank] += kept
            preconditioning[rank] += 0.0 if by_link else seconds
    if load.link is not None:
        held = [each + load.link.kept for each in held]
    return held, preconditioning


def _message_seconds(
    found: list[Message], machine: Machine, ranks: int, frequency: Frequency | None = None
) -> float:
    """Return the seconds of messages, one after the other, on the busiest rank.

    Args:
        found: The messages.
        machine: The machine of each rank.
        ranks: Number of ranks.
        frequency: Weights for a mean step; `None` counts each message once.
    """
    shared, own = 0.0, [0.0] * ranks
    for message in found:
        share = getattr(frequency, message.when) if frequency else 1.0
        seconds = message.seconds(machine) * share
        if len(message.members) == ranks:
            shared += seconds
        else:
            for rank in message.members:
                own[rank] += seconds
    return shared + max(own)


def _averaging_part(load: TrainingLoad, machine: Machine, ranks: int, backward: float) -> Part:
    """Return the part of the gradients' all-reduce that a backward of so many seconds leaves."""
    if ranks == 1 or not load.parameters:
        return Part(0.0, 0.0)
    message = Message(AVERAGING, "step", "all-reduce", tuple(range(ranks)), 4.0 * load.parameters)
    seconds = max(0.0, message.seconds(machine) - (backward if machine.overlaps else 0.0))
    return Part(seconds, seconds)


def _memory(load: TrainingLoad, curvature: float) -> Memory:
    item, works, layers = load.workload.itemsize, load.workload.works, load.layers.values()
    sums = sum(math.prod(shape) for work in works for shape in work.matrices.values())
    moments = sum(layer.sizes.moments for layer in layers)
    retained = sum(layer.retained for layer in layers) if load.workload.sampled else 0.0
    model = item * load.parameters * (2 + load.state)
    temporary = item * (sums + moments + retained)
    if load.lag:  # copies of the factors, and decompositions that wait
        temporary += item * (sums + sum(sum(layer.sizes.kept.values()) for layer in layers))
    if load.link is not None:
        temporary += load.link.sums + load.link.gathered
        temporary += load.link.prepared + load.link.workspace
    if load.control is not None:
        temporary += load.control.temporary
    return Memory(model, load.activations, curvature, temporary)
