"""Kernels of a convolution's curvature against their plain forms, which unfold its input, in one run; equal to rounding, and how fast.

The floor is the time that the plain form's GEMM alone would take at the rate that a large square GEMM has here, measured in the same run:
what no way of multiplying unfolded patches gets below.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kfactk import Layer, Samples, Use
from kfactk_stages.curvature.conv_kfac import ConvKfac

SHAPES = ((16, 32), (32, 16), (64, 8), (64, 32), (128, 16), (256, 8), (64, 4), (256, 4))
"""Channels (as many out as in) and sides of images."""
PAIRS: dict[str, tuple[Callable[[Samples], Tensor | None], Callable[[Samples], Tensor | None]]] = {
    "input factor": (lambda samples: samples.input_moment().total, lambda samples: Samples.input_moment(samples).total),
    "output factor": (lambda samples: samples.grad_moment().total, lambda samples: Samples.grad_moment(samples).total),
    "per-example gradients": (lambda samples: samples.per_example_gradients(), lambda samples: Samples.per_example_gradients(samples)),
}
"""By name, ours and the plain form."""


def seconds(ways: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each way, taking turns."""
    taken: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for way, found in zip(ways, taken, strict=True):
            start = time.perf_counter()
            way()
            if turn:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in taken]


def rate(repeats: int) -> float:
    """FLOPs a second of a GEMM of side 2048."""
    one, other = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return float(2 * 2048**3 / seconds([lambda: one @ other], repeats)[0])


def samples_of(channels: int, side: int, batch: int, kernel: int) -> Samples:
    """Samples of a convolution of stride 1."""
    layer = Layer("conv", nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False), ("weight",))
    inputs, gradient = (torch.randn(batch, channels, side, side) for _ in range(2))
    return ConvKfac().samples(layer, [Use(inputs, gradient)], terms=batch, first=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Kernels of convolutions against their plain forms.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    speed, taps = rate(arguments.repeats), arguments.kernel**2
    print(f"{arguments.batch} images, kernels of {arguments.kernel} x {arguments.kernel}; a large GEMM runs at {speed / 1e9:.0f} GFLOP/s")
    print(f"{'':24}{'channels':>10}{'side':>6}{'ours, ms':>10}{'plain, ms':>11}{'ratio':>8}{'floor, ms':>11}{'deviation':>11}")
    for name, (ours, plain) in PAIRS.items():
        for channels, side in SHAPES:
            samples = samples_of(channels, side, arguments.batch, arguments.kernel)
            one, other = ours(samples), plain(samples)
            assert one is not None
            assert other is not None
            deviation = float((one - other).abs().max() / other.abs().max())
            mine, theirs = seconds([partial(ours, samples), partial(plain, samples)], arguments.repeats)
            rows, columns = arguments.batch * side * side, channels * taps
            flops = (
                2 * rows * (channels * channels if name == "output factor" else columns * (columns if name == "input factor" else channels))
            )
            line = f"{1000 * mine:10.2f}{1000 * theirs:11.2f}{theirs / mine:8.1f}{1000 * flops / speed:11.2f}{deviation:11.0e}"
            print(f"{name:24}{channels:10}{side:6}{line}", flush=True)


if __name__ == "__main__":
    main()
