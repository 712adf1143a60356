"""Mini-batches: order and augmentation are drawn from (seed, epoch), so an epoch can be repeated without replaying those before it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data import Images

SHIFT = 4
"""Pixels by which an augmented image moves at most."""


def shuffled(images: Images, batch_size: int, *, seed: int, epoch: int, augment: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in random order; a last batch of one image is left out, since BatchNorm cannot learn from it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    for index in order.split(batch_size):
        if len(index) == 1:
            continue
        chosen = index.to(images.pixels.device)
        pixels = images.pixels[chosen]
        yield shifted_and_mirrored(pixels, generator) if augment else pixels, images.labels[chosen]


def steps(count: int, batch_size: int) -> int:
    """Number of batches that `shuffled` gives."""
    return count // batch_size + (count % batch_size > 1)


def in_order(images: Images, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, as they lie."""
    yield from zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True)


def shifted_and_mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `SHIFT` pixels (zeros move in), and mirror every other one by chance.

    Args:
        pixels: `[N, C, H, W]`.
        generator: On the CPU, so that every device draws the same.
    """
    count, _, height, width = pixels.shape
    offsets = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator).to(pixels.device)
    mirror = torch.randint(0, 2, (count, 1), generator=generator).bool().to(pixels.device)
    rows = torch.arange(height, device=pixels.device) + offsets[0]
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(mirror, columns.flip(0), columns) + offsets[1]
    padded = functional.pad(pixels, (SHIFT, SHIFT, SHIFT, SHIFT))
    example = torch.arange(count, device=pixels.device)
    return padded[example[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
