"""What ranks send, hold and compute under each placement, measured on gloo ranks of this machine.

The first table has the bytes that all ranks send in a step, against the least possible
(`kfactk.costmodel.communication.least_bytes`). The second table has the largest value of all ranks:

- held: bytes of factors, decompositions and moments;
- peak: peak of the resident set of the process, above that of the same steps under SGD;
- refresh: processor seconds of a step where everything is due;
- decompositions: their operations, n^3 each.

Wall time is left out, since ranks share the cores of the machine.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kfactk
from kfactk.assignment import Work, Workload
from kfactk.costmodel.communication import Frequency, Sizes
from kfactk.testing._support.ranks import Workers

PLACEMENTS: tuple[Any, ...] = (
    "replicated",
    "comm_opt",
    {"name": "hybrid", "fraction": 0.5},
    "mem_opt",
)
PERIODS = {"factor_every": 2, "scale_every": 2, "basis_every": 4}
BATCH = 64


def least_bytes(
    workload: Workload,
    ranks: int,
    gradient_workers: int,
    inverse_workers: int = 1,
    itemsize: float | None = None,
) -> dict[str, float]:
    """Return the least bytes that any exchange moves in a mean step on all ranks, by kind.

    Of R ranks h hold a layer and d decompose each of its matrices. Sums of f bytes over R ranks
    need R - 1 messages to meet in one place, and one more for each further place; so do the moments
    of m bytes. Decompositions of b bytes reach h ranks, or all R where moments are sampled.
    Preconditioned gradients of v bytes reach the R - h ranks that do not hold the layer:

        sums            (R + d - 2) f / T_factors
        decompositions  (max(h, d) - d) b / T_basis
                        sampled:  (R - d) b / T_basis + (R - h) b (1/T_scale - 1/T_basis)
        moments         sampled:  (R + h - 2) m / T_scale
        gradients       (R - h) v

    where 1/T_scale counts the steps in which scale or basis is due.

    Args:
        workload: The work.
        ranks: R.
        gradient_workers: h.
        inverse_workers: d, which are gradient workers, or have gradient workers among them.
        itemsize: Bytes of a number on the wire; `None` for the workload's.
    """
    sizes = [Sizes.of(work, sampled=workload.sampled) for work in workload.works]
    itemsize, often = itemsize or workload.itemsize, Frequency.of(workload)
    f = itemsize * sum(sum(size.sums.values()) for size in sizes)
    b = itemsize * sum(sum(size.kept.values()) for size in sizes)
    m = itemsize * sum(size.moments for size in sizes)
    v = itemsize * sum(math.prod(work.gradient) for work in workload.works)
    outside = ranks - gradient_workers
    reached = ranks if workload.sampled else max(gradient_workers, inverse_workers)
    return {
        "sums": (ranks + inverse_workers - 2) * f * often.factors,
        "decompositions": (reached - inverse_workers) * b * often.basis
        + outside * b * often.scale_alone,
        "moments": (ranks + gradient_workers - 2) * m * often.scale,
        "gradients": float(outside * v),
    }


def network(width: int, depth: int) -> nn.Module:
    """Return equal linear layers, so that work divides evenly among 2 and 4 ranks."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers)


def batch(width: int, step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's part of one batch of noise."""
    generator = torch.Generator().manual_seed(step)
    x, y = (
        torch.randn(BATCH, width, generator=generator),
        torch.randint(width, (BATCH,), generator=generator),
    )
    return x[rank::ranks], y[rank::ranks]


def measure(
    rank: int, ranks: int, placement: Any, basis: str, width: int, depth: int
) -> dict[str, Any]:
    """Measure one rank over the second period of refreshes."""
    peak_of_sgd = _train(rank, ranks, width, depth, None)["peak"]
    found = _train(rank, ranks, width, depth, {"placement": placement, "basis": basis})
    return {**found, "peak": max(0, found["peak"] - peak_of_sgd)}


def _train(
    rank: int, ranks: int, width: int, depth: int, stages: dict[str, Any] | None
) -> dict[str, Any]:
    first: dict[str, float] = {}
    model = network(width, depth)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer: torch.optim.Optimizer
    if stages is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    else:
        optimizer = kfactk.build(update="momentum", lr=1e-3, damping=0.1, **PERIODS, **stages).bind(
            wrapped
        )
    period, seconds = math.lcm(*PERIODS.values()), 0.0
    _forget_peak()
    before = _resident("VmRSS")
    for step in range(2 * period):
        x, y = batch(width, step, rank, ranks)
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        start = time.process_time()
        optimizer.step()
        if step == period:  # everything is due
            seconds = time.process_time() - start
        if step == period - 1 and isinstance(optimizer, kfactk.Optimizer):
            first = optimizer.moved_bytes
    peak = _resident("VmHWM") - before
    if stages is None:
        return {"peak": peak}
    assert isinstance(optimizer, kfactk.Optimizer)
    held = [
        tensor
        for entry in optimizer.state_dict()["state"].values()
        for key, tensor in entry.items()
        if key.startswith("kfactk.")
    ]
    operations = _operations(optimizer, model, rank)
    moved = optimizer.moved_bytes
    optimizer.close()
    return {
        "bytes": {name: (value - first.get(name, 0.0)) / period for name, value in moved.items()},
        "held": sum(tensor.numel() * tensor.itemsize for tensor in held),
        "peak": peak,
        "seconds": seconds,
        "operations": operations,
    }


def _operations(optimizer: kfactk.Optimizer, model: nn.Module, rank: int) -> float:
    """Sum n^3 over the matrices that a rank decomposes."""
    total, shares = 0.0, optimizer.placement.shares
    for work in works(model):
        mine = (
            work.matrices
            if not shares
            else [
                name for name, ranks in shares[work.layer].inverse_workers.items() if rank in ranks
            ]
        )
        total += sum(work.flops(name) for name in mine)
    return total


def works(model: nn.Module) -> tuple[Work, ...]:
    """Return the work of a network of linear layers."""
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    return tuple(
        Work(
            name,
            {"A": (m.in_features + 1,) * 2, "G": (m.out_features,) * 2},
            (m.out_features, m.in_features + 1),
        )
        for name, m in linear.items()
    )


def _forget_peak() -> None:
    """Reset the peak of the resident set (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    """Return the bytes of the resident set, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _label(placement: Any) -> str:
    return (
        placement
        if isinstance(placement, str)
        else f"{placement['name']} {placement['fraction']:g}"
    )


def _gradient_workers(placement: Any, ranks: int) -> int:
    """Return how many ranks precondition a layer under each of `PLACEMENTS`, by definition."""
    return {"replicated": ranks, "comm_opt": ranks, "mem_opt": 1}.get(
        _label(placement), max(1, ranks // 2)
    )


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    width, depth = arguments.width, arguments.depth
    workload = {
        b: Workload(works(network(width, depth)), **PERIODS, sampled=b == "ekfac")
        for b in ("ekfac", "kfac")
    }
    wire, hold = [], []
    for basis in ("ekfac", "kfac"):
        for placement in PLACEMENTS:
            for ranks in arguments.ranks:
                with Workers() as workers:  # new processes, so that runs share no memory
                    found = workers.run(
                        ranks, measure, ranks, placement, basis, width, depth, patience=600.0
                    )
                name = f"{basis} {_label(placement)} {ranks}"
                if ranks > 1:
                    least = least_bytes(
                        workload[basis],
                        ranks,
                        _gradient_workers(placement, ranks),
                        ranks if placement == "replicated" else 1,
                    )
                    moved = {
                        kind: sum(each["bytes"].get(kind, 0.0) for each in found)
                        for kind in (*least, "agreements")
                    }
                    cells = [
                        f"{moved[kind] / 2**20:.2f} ({least[kind] / 2**20:.2f})" for kind in least
                    ]
                    cells += [
                        f"{moved['agreements'] / 2**20:.4f}",
                        f"{sum(moved.values()) / max(1.0, sum(least.values())):.4f}",
                    ]
                    wire.append([name, *cells])
                largest = {
                    key: max(each[key] for each in found)
                    for key in ("held", "peak", "seconds", "operations")
                }
                mib = [f"{largest[key] / 2**20:.1f}" for key in ("held", "peak")]
                hold.append(
                    [name, *mib, f"{largest['seconds']:.3f}", f"{largest['operations'] / 1e9:.2f}"]
                )
                print(name, flush=True)
    head = "MiB a step, all ranks (least)"
    _table(
        [head, "sums", "decompositions", "moments", "gradients", "agreements", "of the least"], wire
    )
    _table(
        [
            "largest of all ranks",
            "held, MiB",
            "peak, MiB",
            "refresh, CPU s",
            "decompositions, 1e9 operations",
        ],
        hold,
    )


def _table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    print()
    for row in [head, ["-" * width for width in widths], *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


if __name__ == "__main__":
    main()
