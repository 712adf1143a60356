"""Mini-batches, whose order and augmentation depend on (seed, epoch) alone.

A run can therefore resume at any epoch, and processes that share a batch need not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data import Images

SHIFT = 4
"""Largest shift of an augmented image, in pixels."""


def shuffled(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augment: bool,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once, in random order; each process gets an equal part of each batch.

    Images of the last batch that cannot be divided equally are left out. So is a last batch of one
    image, since BatchNorm cannot learn from it.

    Args:
        images: All images.
        batch_size: Images in all parts of a batch; a multiple of `ranks`.
        seed: Seed of the run.
        epoch: Index of the epoch.
        augment: Whether to shift and mirror images.
        rank: Index of the part.
        ranks: Number of parts.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    for index in order.split(batch_size):
        each = len(index) // ranks
        if each * ranks < 2:
            continue
        part = slice(rank * each, (rank + 1) * each)
        chosen = index[part].to(images.pixels.device)
        pixels = images.pixels[chosen]
        if augment:
            moves = draw_moves(len(index), generator)
            pixels = apply_moves(pixels, *(draws[:, part] for draws in moves))
        yield pixels, images.labels[chosen]


def steps(count: int, batch_size: int, ranks: int = 1) -> int:
    """Return the number of batches that `shuffled` yields."""
    return count // batch_size + (count % batch_size // ranks * ranks > 1)


def in_sequence(images: Images, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once, in their own order."""
    yield from zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True)


def draw_moves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw offsets from 0 to twice `SHIFT`, `[2, N]`, and whether to mirror each image, `[1, N]`.

    Args:
        count: Number N of images.
        generator: On the CPU, so that every device draws the same.
    """
    offsets = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)[..., 0]
    return offsets, torch.randint(0, 2, (count, 1), generator=generator).bool().T


def apply_moves(pixels: Tensor, offsets: Tensor, mirror: Tensor) -> Tensor:
    """Shift images `[N, C, H, W]` by up to `SHIFT` pixels, zeros moving in, and mirror them.

    Args:
        pixels: The images.
        offsets: As `draw_moves` returns.
        mirror: As `draw_moves` returns.
    """
    count, _, height, width = pixels.shape
    offsets, mirror = offsets[..., None].to(pixels.device), mirror[0, :, None].to(pixels.device)
    rows = torch.arange(height, device=pixels.device) + offsets[0]
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(mirror, columns.flip(0), columns) + offsets[1]
    padded = functional.pad(pixels, (SHIFT, SHIFT, SHIFT, SHIFT))
    example = torch.arange(count, device=pixels.device)
    return (
        padded[example[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )
