"""Mini-batches: order and augmentation are drawn from (seed, epoch), so an epoch can be repeated without replaying those before it, and
processes that share a batch need not talk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data import Images

SHIFT = 4
"""Pixels by which an augmented image moves at most."""


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
    """Every image once, in random order; of each batch an equal part for each of several processes.

    Left out are images of the last batch that cannot be divided equally, and a last batch of one image, since BatchNorm cannot learn
    from it.

    Args:
        images: What there is.
        batch_size: Images of all parts of a batch; a multiple of `ranks`.
        seed: Of the run.
        epoch: Index of the epoch.
        augment: Whether images are shifted and mirrored.
        rank: Which part.
        ranks: How many parts.
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
        yield (
            moved(pixels, *(draws[:, part] for draws in moves(len(index), generator)))
            if augment
            else pixels,
            images.labels[chosen],
        )


def steps(count: int, batch_size: int, ranks: int = 1) -> int:
    """Number of batches that `shuffled` gives."""
    return count // batch_size + (count % batch_size // ranks * ranks > 1)


def in_order(images: Images, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, as they lie."""
    yield from zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True)


def moves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """How images are augmented: shifts from 0 to twice `SHIFT`, `[2, N]`, and whether each is mirrored, `[1, N]`, by chance.

    Args:
        count: Number N of images.
        generator: On the CPU, so that every device draws the same.
    """
    offsets = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)[..., 0]
    return offsets, torch.randint(0, 2, (count, 1), generator=generator).bool().T


def moved(pixels: Tensor, offsets: Tensor, mirror: Tensor) -> Tensor:
    """Shift each image `[N, C, H, W]` by up to `SHIFT` pixels (zeros move in), and mirror it, as `moves` has drawn."""
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
