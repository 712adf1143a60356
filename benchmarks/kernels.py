"""Kernels of a convolution's curvature against their plain forms, which unfold the input.

Both forms run in turn and must agree up to rounding. The floor is that of our own form. It is the
longer of two times: its multiplications at the rate of a large square GEMM in that precision, and
its reads and writes at the rate of a large copy. Both rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import heap
from kfactk import Layer, LayerCall, Samples
from kfactk_stages.curvature import _spectral
from kfactk_stages.curvature._plan import cheapest
from kfactk_stages.curvature._rows import ConvRows, JoinedSamples
from kfactk_stages.curvature._slabs import slabs_of
from kfactk_stages.curvature.conv_kfac import ConvKfac


@attrs.frozen
class Shape:
    """A square convolution, padded by half its kernel.

    Args:
        channels: Channels in.
        outputs: Channels out.
        side: Side of the images.
        kernel: Side of the kernel.
        stride: Stride of the convolution.
        groups: Groups of the convolution.
    """

    channels: int
    outputs: int
    side: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        grouped = f" / {self.groups}" if self.groups > 1 else ""
        kernel = f"{self.kernel} x {self.kernel}"
        return f"{self.channels} > {self.outputs}{grouped}, {self.side}, {kernel}, {self.stride}"

    def samples(self, batch: int) -> JoinedSamples:
        """Return samples of random images."""
        options: dict[str, Any] = {
            "padding": self.kernel // 2,
            "stride": self.stride,
            "groups": self.groups,
            "bias": False,
        }
        conv = nn.Conv2d(self.channels, self.outputs, self.kernel, **options)
        inputs = torch.randn(batch, self.channels, self.side, self.side)
        with torch.no_grad():
            gradient = torch.randn_like(conv(inputs))
        found = ConvKfac().samples(
            Layer("conv", conv, ("weight",)),
            [LayerCall(inputs, gradient)],
            num_terms=batch,
            first=True,
        )
        assert isinstance(found, JoinedSamples)
        return found


FACTORS = (
    Shape(3, 16, 32),
    Shape(16, 16, 32),
    Shape(16, 32, 32, stride=2),
    Shape(16, 32, 32, 1, stride=2),
    Shape(32, 32, 16),
    Shape(32, 64, 16, stride=2),
    Shape(32, 64, 16, 1, stride=2),
    Shape(64, 64, 8),
    Shape(64, 64, 8, 1),
    Shape(64, 64, 4),
    Shape(16, 16, 32, 5),
    Shape(16, 16, 16, 5, stride=2),
    Shape(64, 64, 16, groups=64),
    Shape(64, 64, 32),
    Shape(64, 128, 32, stride=2),
    Shape(128, 128, 16),
    Shape(256, 256, 4),
)
"""Shapes for the input factor: ResNet-8 at two widths, other kernels, small images."""
SCALES = (
    Shape(3, 16, 32),
    Shape(16, 16, 32),
    Shape(16, 32, 32, stride=2),
    Shape(32, 32, 16),
    Shape(32, 64, 16, stride=2),
    Shape(64, 64, 8),
    Shape(64, 64, 4),
    Shape(64, 64, 32),
    Shape(128, 256, 16, stride=2),
)
"""Shapes for per-example gradients and the scale."""
Kernel = Callable[[Samples], Tensor]


@attrs.frozen
class Rates:
    """What the machine does in a second.

    Args:
        gemm: Multiplications of a large GEMM, by precision.
        copy: Bytes that a large copy reads and writes.
    """

    gemm: dict[torch.dtype, float]
    copy: float

    @classmethod
    def measured(cls, repeats: int) -> Rates:
        """Measure matrices of side 2048, and a copy of 64 MiB."""
        one, other = torch.randn(2048, 2048), torch.randn(2048, 2048)
        low = one.bfloat16(), other.bfloat16()
        source, target = torch.randn(2**24), torch.empty(2**24)
        taken = seconds(
            [lambda: one @ other, lambda: low[0] @ low[1], lambda: target.copy_(source)], repeats
        )
        return cls(
            {torch.float32: 2048**3 / taken[0], torch.bfloat16: 2048**3 / taken[1]},
            2 * source.nbytes / taken[2],
        )

    def floor(
        self, multiplications: float, rotating: float, numbers: float, precision: torch.dtype
    ) -> float:
        """Return the longer of the seconds of arithmetic and of moving float32 numbers.

        Args:
            multiplications: All of them.
            rotating: Those among them that rotate, in `precision`.
            numbers: Numbers that are moved.
            precision: Precision of rotations.
        """
        arithmetic = (multiplications - rotating) / self.gemm[torch.float32] + rotating / self.gemm[
            precision
        ]
        return max(arithmetic, 4 * numbers / self.copy)


def seconds(ways: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median seconds of each way; they take turns.

    With one thread, only the time that the thread ran counts.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for way, found in zip(ways, taken, strict=True):
            start = clock()
            way()
            if turn:
                found.append(clock() - start)
    return [statistics.median(found) for found in taken]


def total(statistic: Any) -> Tensor:
    """Return the sum of a statistic that is not empty."""
    assert statistic.total is not None
    return statistic.total  # type: ignore[no-any-return]


def dense_square(samples: Samples, left: Tensor, right: Tensor) -> Tensor:
    """Return the scale in the plain way: unfold, rotate per-example gradients, square, sum."""
    assert isinstance(samples, JoinedSamples)
    call = samples.calls[0]
    assert isinstance(call, ConvRows)
    patches = F.unfold(
        call.inputs,
        call.window.kernel,
        padding=call.window.padding[0][0],
        stride=call.window.stride,
    )
    matrices = torch.einsum("not,nit->noi", call.gradient.flatten(2), patches)
    return torch.einsum("ok,noi,il->nkl", left, matrices, right).square().sum(0)


def factor_cost(samples: JoinedSamples) -> tuple[float, float, float]:
    """Return the cost of the input factor, in the way that is chosen.

    Returns:
        All multiplications, those that rotate, and the least number of numbers moved.
    """
    call = samples.calls[0]
    assert isinstance(call, ConvRows)
    sizes, n = tuple(call.inputs.shape[2:]), samples.examples * call.groups
    way = cheapest(call.window, sizes, call.channels, n)
    slabs, positions = slabs_of(call.window, sizes), samples.positions
    transforms, products, transformed = _spectral.work(call.window, sizes, call.channels, n)
    made = {
        "correlation": (transforms + products, 2.0 * transformed),
        "slabs": (n * slabs.products * call.channels**2, 2.0 * n * slabs.numbers * call.channels),
        "pixels": (float(n * positions * call.columns**2), 0.0),
        "patches": (float(n * positions * call.columns**2), 2.0 * n * positions * call.columns),
    }[way]
    return made[0], 0.0, call.inputs.numel() + made[1] + call.groups * call.columns**2


def gradient_cost(samples: JoinedSamples) -> tuple[float, float, float]:
    """Return the cost of per-example gradients, likewise."""
    n, t, i, o = samples.examples * samples.groups, samples.positions, samples.d_in, samples.d_out
    return n * t * i * o, 0.0, samples.calls[0].inputs.numel() + n * o * (t + i)


def scale_cost(samples: JoinedSamples) -> tuple[float, float, float]:
    """Return the cost of the scale, likewise, each side rotated where that is cheaper."""
    n, t, i, o = samples.examples * samples.groups, samples.positions, samples.d_in, samples.d_out
    rotating = n * (min(t, i) * o * o + min(t, o) * i * i)
    return n * t * i * o + rotating, rotating, samples.calls[0].inputs.numel() + n * o * t + i * i


def rows_of(batch: int, repeats: int, rates: Rates) -> list[dict[str, Any]]:
    """Measure everything; return one row of the table for each measurement."""
    single, low = torch.float32, torch.bfloat16
    tasks: list[
        tuple[
            str,
            Shape,
            Callable[[JoinedSamples], tuple[float, float, float]],
            torch.dtype,
            Kernel,
            Kernel,
        ]
    ] = []
    for shape in FACTORS:
        tasks.append(
            (
                "input factor",
                shape,
                factor_cost,
                single,
                lambda s: total(s.input_moment()),
                lambda s: total(Samples.input_moment(s)),
            )
        )
    for shape in SCALES:
        plain = Samples.per_example_gradients
        tasks.append(
            (
                "per-example gradients",
                shape,
                gradient_cost,
                single,
                lambda s: s.per_example_gradients(),
                plain,
            )
        )
    for shape in SCALES:
        d_in, d_out = shape.channels * shape.kernel**2, shape.outputs
        left, right = (torch.linalg.qr(torch.randn(side, side)).Q for side in (d_out, d_in))
        dense = partial(dense_square, left=left, right=right)
        for precision in (single, low):
            ours = partial(_square, left=left, right=right, precision=precision)
            tasks.append(
                (
                    f"scale, {precision}".replace("torch.", ""),
                    shape,
                    scale_cost,
                    precision,
                    ours,
                    dense,
                )
            )
    return [_measured(*task, batch, repeats, rates) for task in tasks]


def _square(samples: Samples, left: Tensor, right: Tensor, precision: torch.dtype) -> Tensor:
    return total(samples.projected_square(left, right, precision=precision))


def _measured(
    name: str,
    shape: Shape,
    cost: Callable[[JoinedSamples], tuple[float, float, float]],
    precision: torch.dtype,
    ours: Kernel,
    plain: Kernel,
    batch: int,
    repeats: int,
    rates: Rates,
) -> dict[str, Any]:
    samples = shape.samples(batch)
    one, other = ours(samples), plain(samples)
    deviation = float((one - other).abs().max() / other.abs().max())
    mine, theirs = seconds([partial(ours, samples), partial(plain, samples)], repeats)
    floor = rates.floor(*cost(samples), precision)
    row = {
        "kernel": name,
        "shape": str(shape),
        "ours": mine,
        "plain": theirs,
        "ratio": theirs / mine,
        "floor": floor,
        "deviation": deviation,
    }
    times = f"{1000 * mine:10.2f}{1000 * theirs:11.2f}{theirs / mine:8.1f}"
    against = f"{1000 * floor:11.2f}{mine / floor:8.1f}{deviation:11.0e}"
    print(f"{name:24}{shape!s:>30}{times}{against}", flush=True)
    return row


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description="Kernels of convolutions against their plain forms."
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=1, help="seconds are those of the wall with more than one"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write what was measured, in seconds, there too"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    heap.keep_freed()
    rates = Rates.measured(arguments.repeats)
    gemm = {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.gemm.items()}
    speeds = ", ".join(f"{2 * rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in gemm.items())
    copy = f"{rates.copy / 1e9:.1f} GB/s"
    print(f"{arguments.batch} images; a large GEMM runs at {speeds}, a large copy at {copy}")
    print(f"{'':24}{'channels, side, kernel, stride':>30}", end="")
    print(f"{'ours, ms':>10}{'plain, ms':>11}{'ratio':>8}", end="")
    print(f"{'floor, ms':>11}{'/ floor':>8}{'deviation':>11}")
    rows = rows_of(arguments.batch, arguments.repeats, rates)
    if arguments.json:
        machine = {
            "batch": arguments.batch,
            "threads": arguments.threads,
            "multiplications": gemm,
            "bytes": rates.copy,
        }
        arguments.json.write_text(json.dumps({**machine, "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
