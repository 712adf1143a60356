"""What a training step takes on many ranks: seconds, bytes of memory and bytes moved, from shapes and a machine's rates.

A step is a sequence of parts. What a part takes on one rank is counted in floating-point operations, bytes of memory and launches; its
seconds are the sum of the three, each at the machine's rate, and a part ends when the slowest rank has ended it. Messages of a part go one
after the other. Parts that come every so many steps count in a mean step with their share, and in the worst step whole: at step 0, and
whenever the periods meet, everything is due at once. Pure: no process, no tensor.
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
from kfactk.costmodel.communication import KINDS, Frequency, Message, Sizes, bytes_a_step, messages
from kfactk.costmodel.hardware import Machine

AVERAGING = "averaging gradients"
"""The part in which ranks average their gradients, as DistributedDataParallel does, whatever optimizer follows."""


@attrs.frozen
class Amount:
    """Work of one kind of device.

    Args:
        products: FLOPs in matrix products.
        convolutions: FLOPs in convolutions.
        bytes: Bytes read and written.
        launches: Operations started.
    """

    products: float = 0.0
    convolutions: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(*map(operator.add, attrs.astuple(self), attrs.astuple(other)))

    def times(self, often: float) -> Amount:
        """That often.

        Example:
            >>> Amount(products=10.0, launches=3.0).times(2)
            Amount(products=20.0, convolutions=0.0, bytes=0.0, launches=6.0)
        """
        return Amount(*(often * part for part in attrs.astuple(self)))

    def seconds(self, machine: Machine, precision: str = "float32") -> float:
        """Seconds at the machine's rates; bytes are those of float32, of which half precision takes half."""
        rate = machine.rate(precision)
        arithmetic = self.products / rate + self.convolutions / (rate * machine.convolutions)
        share = 0.5 if precision in ("bfloat16", "float16") else 1.0
        return arithmetic + share * self.bytes / machine.bandwidth + self.launches * machine.launch


NOTHING = Amount()


@attrs.frozen
class LayerCost:
    """What the curvature of one layer takes.

    Args:
        factors: To sum up its factors over the mini-batch.
        scale: To measure its moments on the mini-batch.
        precondition: To precondition its gradient.
        sizes: What of it travels and is kept.
        retained: Numbers kept of the mini-batch until `step()` when its basis is due.
        solver: How its matrices are decomposed: "eigh", "cholesky", or "" for at no cost.
        transport: To carry its moments into a new basis.
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
        """What follows from shapes, T positions and N examples, for Kronecker factors A and G and a diagonal in their basis.

        FLOPs for each group, with o = d_out, i = d_in:

            factors         2 N T (i^2 + o^2)
            scale           N (2 T o i + 2 o^2 min(T, i) + 2 i^2 min(T, o)),  or 2 N (o i + o^2 + i^2) with T = 1
            precondition    4 o i (o + i) with eigenvectors, half of it by two solves with triangles
            transport       2 (i^3 + o^3) + 2 o i (o + i)
        """
        (o, i), item, t = work.gradient[-2:], workload.itemsize, positions
        groups, once = math.prod(work.gradient[:-2]), float(batch > 0)
        many = 2.0 * batch * groups
        sizes = Sizes.of(work, sampled=workload.sampled)
        rows = float(batch * groups * t * (o + i))
        touched = item * (2.0 * sum(sizes.kept.values()) + 8.0 * math.prod(work.gradient))
        precondition = (4.0 if solver == "eigh" else 2.0) * groups * o * i * (o + i)
        factors = Amount(many * t * (i * i + o * o), 0.0, item * 6.0 * rows, 8 * once)
        scale = transport = NOTHING
        if workload.sampled:
            products = many * (t * o * i + o * o * min(t, i) + i * i * min(t, o))
            scale = Amount(products, 0.0, item * 8.0 * rows, 20 * once)
            products = groups * 2.0 * (i**3 + o**3 + o * i * (o + i))
            transport = Amount(products, 0.0, touched, 10)
        solving = Amount(precondition, 0.0, touched, 10)
        return cls(factors, scale, solving, sizes, rows, solver, transport)

    def decomposing(self, shape: tuple[int, ...], machine: Machine) -> float:
        """Seconds to decompose one of its matrices."""
        if not self.solver or not is_square(shape):
            return 0.0
        return math.prod(shape[:-2]) * machine.solvers[self.solver](shape[-1])


@attrs.frozen
class Job:
    """A model in training, as one rank sees it.

    Args:
        workload: The work that is placed.
        layers: What each layer's curvature takes.
        step: Forward and backward of the rank's mini-batch.
        fisher: One Fisher pass over it.
        passes: Fisher passes when samples are wanted.
        parameters: Numbers that are trained.
        state: Numbers that the update rule keeps for each of them.
        activations: Bytes kept between forward and backward.
        slots: Number of slots that layers are decomposed in, where staggered; 1 for all at once.
    """

    workload: Workload
    layers: Mapping[str, LayerCost]
    step: Amount = NOTHING
    fisher: Amount = NOTHING
    passes: int = 1
    parameters: int = 0
    state: float = 2.0
    activations: float = 0.0
    slots: int = 1

    def works_by_slot(self) -> list[list[Work]]:
        """Return the works of each slot."""
        works = self.workload.works
        placed = assign_slots({work.layer: work.cost for work in works}, self.slots)
        return [[w for w in works if placed[w.layer] == slot] for slot in range(self.slots)]

    @classmethod
    def of(
        cls,
        workload: Workload,
        *,
        positions: Mapping[str, int] | None = None,
        batch: int = 0,
        forward: float = 0.0,
        solver: str = "eigh",
    ) -> Job:
        """What shapes alone tell; without a batch, only what a placement changes.

        Args:
            workload: The work.
            positions: T of each layer; 1 where it is left out.
            batch: Examples a rank and step.
            forward: FLOPs of the model's forward on one example. Its backward takes twice that, a Fisher pass once.
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
        worst: Seconds in a step in which everything is due.
    """

    mean: float
    worst: float


@attrs.frozen
class Memory:
    """Bytes on the rank that needs most.

    Args:
        model: Parameters, their gradients and the update rule's state.
        activations: What the forward keeps for the backward.
        curvature: Factors, decompositions and moments kept between steps.
        passing: What the worst step adds: sums before they leave, and samples kept until the basis is there.
    """

    model: float
    activations: float
    curvature: float
    passing: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.model + self.activations + self.curvature + self.passing


EVENTS = (
    ("factors", "sums"),
    ("Fisher pass", "scale", "sums", "decompositions", "moments"),
    ("decomposition", "decompositions"),
)
"""What comes together in a step where things are staggered; output factors, which are small, are counted with those of inputs."""


@attrs.frozen
class Costs:
    """What a step takes under one assignment.

    Args:
        assignment: Who does what.
        ranks: Number of ranks.
        compute: Seconds by part.
        communication: Seconds by part.
        moved: Bytes of curvature moved in a mean step, all ranks together, by kind.
        worst_moved: The same in the worst step.
        held: Bytes of curvature kept between steps, by rank.
        decomposing: Seconds of one refresh of the basis, by rank.
        memory: Bytes on the fullest rank.
        staggered: Whether factors, scale and decompositions fall on different steps.
    """

    assignment: Assignment
    ranks: int
    compute: Mapping[str, Part]
    communication: Mapping[str, Part]
    moved: Mapping[str, float]
    worst_moved: Mapping[str, float]
    held: tuple[float, ...]
    decomposing: tuple[float, ...]
    memory: Memory
    staggered: bool = False

    @property
    def seconds(self) -> float:
        """Of a mean step."""
        return sum(part.mean for part in (*self.compute.values(), *self.communication.values()))

    @property
    def worst(self) -> float:
        """Of the dearest step: one in which everything is due or, staggered, the dearest thing."""
        every = {**self.compute, **self.communication}
        worst = {name: part.worst for name, part in every.items()}
        if not self.staggered:
            return sum(worst.values())
        rare = {name for event in EVENTS for name in event}
        dearest = max(sum(worst.get(name, 0.0) for name in event) for event in EVENTS)
        return dearest + sum(seconds for name, seconds in worst.items() if name not in rare)


def cost(
    job: Job,
    assignment: Assignment,
    ranks: int,
    machine: Machine,
    *,
    precision: str | None = None,
    wire: float | None = None,
) -> Costs:
    """What a step takes.

    Args:
        job: The model in training.
        assignment: Who does what.
        ranks: Number of ranks.
        machine: What each rank runs on.
        precision: In which the model computes; `None` for the machine's usual one.
        wire: Bytes of a number of curvature on the wire; `None` for those of the workload.

    Example:
        >>> from kfactk.assignment import grid
        >>> from kfactk.costmodel.hardware import H100
        >>> job = Job.of(Workload(tuple(Work(f"fc{i}", {"A": (4096, 4096), "G": (1024, 1024)}, (1024, 4096)) for i in range(8))))
        >>> alone, divided = (cost(job, grid(job.workload, ranks, 1, "mem_opt"), ranks, H100) for ranks in (1, 8))
        >>> divided.memory.curvature / alone.memory.curvature
        0.125
    """
    workload, often = job.workload, Frequency.of(job.workload)
    sizes = {name: each.sizes for name, each in job.layers.items()}

    def sent(works: Sequence[Work]) -> list[Message]:
        part = attrs.evolve(workload, works=tuple(works))
        return messages(part, sizes, assignment, ranks, wire or workload.itemsize)

    slots, found = job.works_by_slot(), sent(workload.works)
    due = [
        [m for m in sent(slot) if m.when != "scale_alone"]
        + [m for m in sent([w for w in workload.works if w not in slot]) if m.when != "basis"]
        for slot in slots
    ]
    refreshes = [_decomposing(job, slot, assignment, ranks, machine) for slot in slots]
    held, preconditioning = _by_rank(job, assignment, ranks, machine)
    compute = _computing(job, machine, precision or machine.precision, often)
    slowest = [max(each) for each in refreshes]
    compute["decomposition"] = Part(sum(slowest) * often.basis, max(slowest))
    compute["preconditioning"] = Part(max(preconditioning), max(preconditioning))
    communication, worst_moved = {}, {}
    for kind in KINDS:
        every, *each_due = ([m for m in each if m.kind == kind] for each in (found, *due))
        worst = max(_sending(each, machine, ranks) for each in each_due)
        communication[kind] = Part(_sending(every, machine, ranks, often), worst)
        worst_moved[kind] = max(sum(m.moved for m in each) for each in each_due)
    communication[AVERAGING] = _averaging(job, machine, ranks, compute["forward and backward"].mean)
    return Costs(
        assignment,
        ranks,
        compute,
        communication,
        moved=bytes_a_step(found, workload),
        worst_moved=worst_moved,
        held=tuple(held),
        decomposing=tuple(map(sum, zip(*refreshes, strict=True))),
        memory=_memory(job, max(held)),
        staggered=job.slots > 1,
    )


def _computing(job: Job, machine: Machine, precision: str, often: Frequency) -> dict[str, Part]:
    """The parts that every rank does alike."""

    def part(amount: Amount, share: float, precision: str = "float32") -> Part:
        seconds = amount.seconds(machine, precision)
        return Part(share * seconds, seconds if share else 0.0)

    factors = sum((layer.factors for layer in job.layers.values()), NOTHING)
    late = layers_near_output(job.workload.works) if job.slots > 1 else frozenset()
    halves = {False: NOTHING, True: NOTHING}
    for name, layer in job.layers.items():
        halves[name in late] += layer.scale
    scales = [part(half.times(max(1, job.passes)), often.scale) for half in halves.values()]
    touched = job.workload.itemsize * job.parameters * (4 + 2 * job.state)
    update = Amount(bytes=touched, launches=4.0 * len(job.layers) if job.parameters else 0.0)
    return {
        "forward and backward": part(job.step, 1.0, precision),
        "Fisher pass": part(job.fisher.times(job.passes), often.passes, precision),
        "factors": part(factors.times(max(1, job.passes)), often.factors),
        "scale": Part(sum(scale.mean for scale in scales), max(scale.worst for scale in scales)),
        "update": part(update, 1.0),
    }


def _decomposing(
    job: Job, works: list[Work], assignment: Assignment, ranks: int, machine: Machine
) -> list[float]:
    """Seconds that each rank decomposes, and carries the moments that it holds into the new basis."""
    seconds = [0.0] * ranks
    for work in works:
        share, layer = assignment.shares[work.layer], job.layers[work.layer]
        for rank in share.gradient_workers:
            seconds[rank] += layer.transport.seconds(machine)
        for name, inverse_workers in share.inverse_workers.items():
            taken = layer.decomposing(work.matrices[name], machine)
            for rank in inverse_workers:
                seconds[rank] += taken
    return seconds


def _by_rank(
    job: Job, assignment: Assignment, ranks: int, machine: Machine
) -> tuple[list[float], list[float]]:
    """Bytes held, and seconds of preconditioning, of each rank."""
    held, preconditioning = [0.0] * ranks, [0.0] * ranks
    for work in job.workload.works:
        share, layer = assignment.shares[work.layer], job.layers[work.layer]
        for name, inverse_workers in share.inverse_workers.items():
            for rank in inverse_workers:
                held[rank] += job.workload.itemsize * math.prod(work.matrices[name])
        seconds = layer.precondition.seconds(machine)
        kept = job.workload.itemsize * (sum(layer.sizes.kept.values()) + layer.sizes.moments)
        for rank in share.gradient_workers:
            held[rank] += kept
            preconditioning[rank] += seconds
    return held, preconditioning


def _sending(
    found: list[Message], machine: Machine, ranks: int, often: Frequency | None = None
) -> float:
    """Seconds of messages one after the other, as the busiest rank sees them: each once, or as often as it comes in a mean step."""
    shared, own = 0.0, [0.0] * ranks
    for message in found:
        seconds = message.seconds(machine) * (getattr(often, message.when) if often else 1.0)
        if len(message.members) == ranks:
            shared += seconds
        else:
            for rank in message.members:
                own[rank] += seconds
    return shared + max(own)


def _averaging(job: Job, machine: Machine, ranks: int, computing: float) -> Part:
    """What is left of the gradients' all-reduce, of which two thirds of the step's computation, its backward, may hide a part."""
    if ranks == 1 or not job.parameters:
        return Part(0.0, 0.0)
    message = Message(AVERAGING, "step", "all-reduce", tuple(range(ranks)), 4.0 * job.parameters)
    seconds = max(0.0, message.seconds(machine) - (computing * 2 / 3 if machine.overlaps else 0.0))
    return Part(seconds, seconds)


def _memory(job: Job, curvature: float) -> Memory:
    item = job.workload.itemsize
    sums = sum(math.prod(shape) for work in job.workload.works for shape in work.matrices.values())
    moments = sum(layer.sizes.moments for layer in job.layers.values())
    retained = sum(layer.retained for layer in job.layers.values()) if job.workload.sampled else 0.0
    model = item * job.parameters * (2 + job.state)
    return Memory(model, job.activations, curvature, item * (sums + moments + retained))
