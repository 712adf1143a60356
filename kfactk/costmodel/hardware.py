"""Rates of a machine: profiles of known devices, and the measurement of this one.

A profile holds rates that programs reach. For known devices they are the peak of the data sheet
times an assumed share; `calibrate` measures them instead.
"""

from __future__ import annotations

import bisect
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist

from kfactk import linalg
from kfactk.errors import OptionError, near_names
from kfactk.timing import SOLVER_RATES, SolverRates

GIGA, TERA = 1e9, 1e12


@attrs.frozen
class Link:
    """A network, as one rank sees it.

    Args:
        bandwidth: Bytes a second, in one direction.
        latency: Seconds until the first byte arrives.
    """

    bandwidth: float
    latency: float


@attrs.frozen
class Curve:
    """Seconds as a function of the side n of a matrix.

    It is linear in logarithms between the points, proportional to n before and to n^3 after them.

    Args:
        points: Pairs (n, seconds), ascending.

    Example:
        >>> curve = Curve(((10, 1.0), (100, 100.0)))
        >>> curve(5), round(curve(20), 6), curve(200)
        (0.5, 4.0, 800.0)
    """

    points: tuple[tuple[int, float], ...]

    def __call__(self, n: int) -> float:
        """Return the seconds for side n."""
        right = bisect.bisect_left(self.points, (n,))
        if right == 0:
            return self.points[0][1] * n / self.points[0][0]
        low, before = self.points[right - 1]
        if right == len(self.points):
            return before * (n / low) ** 3
        high, after = self.points[right]
        return float(before * (after / before) ** (math.log(n / low) / math.log(high / low)))


@attrs.frozen
class Machine:
    """The device of one rank, and the network between ranks.

    Args:
        name: Its name.
        kind: Type of device, as torch calls it.
        products: FLOP/s of large matrix products, by precision: "float32", "tf32", "bfloat16".
        convolutions: Share of them that convolutions reach.
        triangular: Share of them that solves with triangular matrices reach.
        precision: Precision that a model computes in by default. Curvature is always in float32.
        bandwidth: Bytes a second to and from the device's memory.
        launch: Least seconds of an operation.
        solvers: Seconds to decompose one float32 matrix, for "eigh" and "cholesky".
        intra_node: The network within a node.
        inter_node: The network between nodes.
        ranks_per_node: Ranks in a node.
        memory: Bytes of one device.
        overlaps: Whether messages travel while the device computes.
    """

    name: str
    kind: str
    products: Mapping[str, float]
    convolutions: float
    triangular: float
    precision: str
    bandwidth: float
    launch: float
    solvers: Mapping[str, Curve]
    intra_node: Link
    inter_node: Link
    ranks_per_node: int
    memory: float
    overlaps: bool

    def rate(self, precision: str) -> float:
        """Return the FLOP/s of products in a precision.

        Raises:
            OptionError: The profile does not have this precision.
        """
        if precision not in self.products:
            raise OptionError(
                f"the machine {self.name!r} has no rate for the precision {precision!r}."
                f"{near_names(precision, self.products)} Choose one of {', '.join(self.products)}."
            )
        return self.products[precision]

    def link(self, members: Sequence[int]) -> Link:
        """Return the slowest network between these ranks, which ascend."""
        first, last = (rank // self.ranks_per_node for rank in (members[0], members[-1]))
        return self.intra_node if first == last else self.inter_node


def _assumed_solvers(rates: SolverRates) -> dict[str, Curve]:
    """Return the seconds of decompositions at these rates."""
    sizes = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    return {
        solver: Curve(tuple((n, rates.seconds(solver, n)) for n in sizes))
        for solver in ("eigh", "cholesky")
    }


H100 = Machine(
    name="h100",
    kind="cuda",
    products={"float32": 0.75 * 67 * TERA, "tf32": 0.7 * 495 * TERA, "bfloat16": 0.7 * 989 * TERA},
    convolutions=0.5,
    triangular=0.5,
    precision="tf32",
    bandwidth=0.8 * 3.35 * TERA,
    launch=4e-6,
    solvers=_assumed_solvers(SOLVER_RATES["cuda"]),
    intra_node=Link(0.75 * 450 * GIGA, 10e-6),
    inter_node=Link(0.75 * 50 * GIGA, 20e-6),
    ranks_per_node=8,
    memory=80 * GIGA,
    overlaps=True,
)
"""NVIDIA H100 SXM5 80 GB, eight in a node (DGX H100).

    peak in the data sheets                                assumed share
    67 TFLOP/s float32                                     75 %
    495 TFLOP/s TF32, 989 TFLOP/s bfloat16, both dense     70 % in products, half in convolutions
    3.35 TB/s HBM3, 80 GB                                  80 %
    NVLink 900 GB/s in both directions                     75 % of 450 GB/s in one direction
    eight 400 Gbit/s network ports in a node               75 % of 50 GB/s for each device

Assumed without a data sheet: latencies, 4 microseconds for a launch, 40 microseconds for each
column of an eigendecomposition, and half of the rate of products for triangular solves.

References:
    NVIDIA, "H100 Tensor Core GPU" and "DGX H100" data sheets.
"""

A100 = Machine(
    name="a100",
    kind="cuda",
    products={
        "float32": 0.75 * 19.5 * TERA,
        "tf32": 0.7 * 156 * TERA,
        "bfloat16": 0.7 * 312 * TERA,
    },
    convolutions=0.5,
    triangular=0.5,
    precision="tf32",
    bandwidth=0.8 * 2.039 * TERA,
    launch=5e-6,
    solvers=_assumed_solvers(SolverRates(50e-6, 0.8 * 2.039 * TERA, 0.75 * 19.5 * TERA)),
    intra_node=Link(0.75 * 300 * GIGA, 10e-6),
    inter_node=Link(0.75 * 25 * GIGA, 20e-6),
    ranks_per_node=8,
    memory=80 * GIGA,
    overlaps=True,
)
"""NVIDIA A100 SXM4 80 GB, eight in a node (DGX A100).

    peak in the data sheets                                assumed share
    19.5 TFLOP/s float32                                   75 %
    156 TFLOP/s TF32, 312 TFLOP/s bfloat16, both dense     70 % in products, half in convolutions
    2.039 TB/s HBM2e, 80 GB                                80 %
    NVLink 600 GB/s in both directions                     75 % of 300 GB/s in one direction
    eight 200 Gbit/s network ports in a node               75 % of 25 GB/s for each device

The rest is assumed as for `H100`, a little slower. For ResNet-50 in batches of 256 the profile
gives 1073 images a second in TF32 and 2128 in bfloat16. NVIDIA published 938, and 2470 in mixed
precision, for one such device.

References:
    NVIDIA, "A100 Tensor Core GPU" and "DGX A100" data sheets.
    NVIDIA DeepLearningExamples, ResNet50 v1.5 for PyTorch.
"""

CPU = Machine(
    name="cpu",
    kind="cpu",
    products={"float32": 0.7 * 64 * GIGA},
    convolutions=0.5,
    triangular=0.4,
    precision="float32",
    bandwidth=0.5 * 20 * GIGA,
    launch=5e-6,
    solvers=_assumed_solvers(SOLVER_RATES["cpu"]),
    intra_node=Link(1 * GIGA, 100e-6),
    inter_node=Link(0.7 * 1.25 * GIGA, 200e-6),
    ranks_per_node=8,
    memory=4 * GIGA,
    overlaps=False,
)
"""One core of a server, for a machine that has not been measured.

    peak                                                   assumed share
    64 GFLOP/s float32: 2 GHz, one 512-bit multiply-add    70 % in products, half in convolutions
    20 GB/s memory, 4 GB for each rank                     50 %
    10 Gbit/s Ethernet between nodes                       70 %

Triangular solves were measured beside products on one core: they reach 0.36 of their rate with a
side of 257, 0.45 with 513 and 0.56 with 1025.

Processors differ by more than a factor of ten: measure with `calibrate`
(`python -m kfactk plan --calibrate`) where you can.

References:
    Intel, "Intel 64 and IA-32 Architectures Optimization Reference Manual".
"""

MACHINES = {machine.name: machine for machine in (H100, A100, CPU)}
"""Profiles by name."""


def machine_named(name: str | None, device: str = "cpu") -> Machine:
    """Return a profile by name.

    Without a name it is the default of the type of device: "cpu" for "cpu", "h100" for others.

    Raises:
        OptionError: There is no such profile.

    Example:
        >>> machine_named("a100").name, machine_named(None, "cuda").name
        ('a100', 'h100')
    """
    if name is None:
        return CPU if device == "cpu" else H100
    if name not in MACHINES:
        raise OptionError(
            f"there is no machine profile {name!r}.{near_names(name, MACHINES)} Use one of: "
            f"{', '.join(MACHINES)}; or measure this machine: python -m kfactk plan --calibrate."
        )
    return MACHINES[name]


DECOMPOSITIONS: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "eigh": linalg.eigh,
    "cholesky": functools.partial(linalg.cholesky, shift=1.0),
}
"""By solver, what blocks call: torch's own, and the checks around it."""


def calibrate(
    device: torch.device | str = "cpu",
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Machine:
    """Measure this machine, in a few seconds; a collective call within a process group.

    All ranks measure at the same time and get the same result, so the rates include contention for
    processors and memory. The network between ranks is taken to be uniform.

    Args:
        device: The device to measure.
        repeats: Number of measurements, of which the median counts.
        clock: Returns seconds; `time.process_time` leaves out what other processes take.
    """
    device = torch.device(device)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    timer = _Timer(device, repeats, clock, ranks)
    precisions = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)
    products = {name: timer.products(getattr(torch, name)) for name in precisions}
    sizes = (32, 128, 384) if device.type == "cpu" else (64, 512, 2048)
    solvers = {}
    for name, solve in DECOMPOSITIONS.items():
        solvers[name] = Curve(tuple((n, timer.solver(solve, n)) for n in sizes))
    base = machine_named(None, device.type)
    measured = attrs.evolve(
        base,
        name="this machine",
        kind=device.type,
        products=products,
        convolutions=timer.convolutions() / products["float32"],
        triangular=timer.triangular(sizes) / products["float32"],
        precision="float32",
        bandwidth=timer.bandwidth(),
        launch=timer.launch(),
        solvers=solvers,
        ranks_per_node=int(
            os.environ.get("LOCAL_WORLD_SIZE", ranks if ranks > 1 else base.ranks_per_node)
        ),
        memory=_memory(device, ranks),
    )
    if ranks == 1:
        return measured
    link = timer.link()
    return attrs.evolve(measured, intra_node=link, inter_node=link)


@attrs.frozen
class _Timer:
    """Times operations on one device, as the mean over the ranks of a process group."""

    device: torch.device
    repeats: int
    clock: Callable[[], float]
    ranks: int

    def seconds(self, run: Callable[[], Any], times: int = 1) -> float:
        """Return the median seconds of one run, out of `times` runs in a row, after a warm-up."""
        run()
        found = []
        for _ in range(self.repeats):
            self._synchronize()
            start = self.clock()
            for _ in range(times):
                run()
            self._synchronize()
            found.append((self.clock() - start) / times)
        mean = torch.tensor(statistics.median(found), dtype=torch.float64, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(mean)
        return float(mean) / self.ranks

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=dtype)

    def products(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s of a large matrix product."""
        n = 512 if self.device.type == "cpu" else 8192
        matrix = self._random(n, n, dtype=dtype)
        return 2 * n**3 / self.seconds(lambda: matrix @ matrix)

    def convolutions(self) -> float:
        """Return the FLOP/s of 3x3 convolutions of three shapes, forward and backward."""
        examples, flops, seconds = (8 if self.device.type == "cpu" else 128), 0, 0.0
        for channels, outputs, side in ((3, 32, 32), (32, 64, 16), (64, 64, 8)):
            images = self._random(examples, channels, side, side).requires_grad_()
            weight = self._random(outputs, channels, 3, 3).requires_grad_()
            seconds += self.seconds(functools.partial(_convolve, images, weight))
            flops += 3 * 2 * examples * side * side * channels * outputs * 9
        return flops / seconds

    def triangular(self, sizes: Sequence[int]) -> float:
        """Return the FLOP/s of solves with the two triangles of a Cholesky factor."""
        seconds = 0.0
        for n in sizes:
            lower = torch.linalg.cholesky(self._definite(n))
            columns = self._random(n, n)
            seconds += self.seconds(functools.partial(torch.cholesky_solve, columns, lower))
        return sum(2 * n**3 for n in sizes) / seconds

    def bandwidth(self) -> float:
        """Return the bytes a second of a sum that reads two tensors and writes one."""
        numbers = 2**24 if self.device.type == "cpu" else 2**28
        one, other = self._random(numbers), self._random(numbers)
        out = torch.empty_like(one)
        return 12 * numbers / self.seconds(lambda: torch.add(one, other, out=out))

    def launch(self) -> float:
        """Return the seconds of a tiny operation of autograd; a linear layer has four."""
        layers = 20
        model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(layers))).to(self.device)
        parameters, rows = list(model.parameters()), self._random(2, 2)
        seconds = self.seconds(lambda: torch.autograd.grad(model(rows).sum(), parameters), times=20)
        return seconds / (4 * layers)

    def solver(self, solve: Callable[[torch.Tensor], Any], n: int) -> float:
        """Return the seconds to decompose a matrix of side n."""
        matrix = self._definite(n)
        return self.seconds(lambda: solve(matrix), times=max(1, 128 // n))

    def _definite(self, n: int) -> torch.Tensor:
        rows = self._random(2 * n, n)
        return rows.T @ rows / n + torch.eye(n, device=self.device)

    def link(self) -> Link:
        """Return the network that explains the seconds of a small and of a large all-reduce."""
        small, large = self._random(8), self._random(2**20)
        latency = self.seconds(lambda: dist.all_reduce(small), times=8)
        total = self.seconds(lambda: dist.all_reduce(large))
        hops = 2 * math.ceil(math.log2(self.ranks))
        moved = 2 * (self.ranks - 1) / self.ranks * 4 * 2**20
        return Link(moved / max(total - latency, 1e-9), latency / hops)


def _convolve(images: torch.Tensor, weight: torch.Tensor) -> None:
    out = torch.nn.functional.conv2d(images, weight, padding=1)
    torch.autograd.grad(out, (images, weight), torch.ones_like(out))


def _memory(device: torch.device, ranks: int) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / ranks
