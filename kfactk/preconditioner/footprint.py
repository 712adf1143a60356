"""What the curvature of each layer will take, before it is there: bytes, and seconds.

Shapes come from a call on zeros on the meta device, and from the decomposition of a small corner of
each matrix. Nothing large is allocated.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import nn

from kfactk.assignment import Work, is_square
from kfactk.errors import PluginError
from kfactk.preconditioner.ahead import Parts
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.coverage import Coverage, CoveredLayer, Row
from kfactk.preconditioner.links import linked, ordered
from kfactk.samples import working_dtype
from kfactk.sides import SIDES, groups_of_shape, is_diagonal, names_of, side_of, with_sides
from kfactk.stages import Link, Preparation
from kfactk.timing import SOLVER_RATES
from kfactk.validation import attribute_errors

GROUPS, ROWS, COLUMNS = 3, 5, 7
"""Sides of a corner. They differ, so that each tells in the result which side it stands for."""
DOUBLE = 2.0
"""How much longer operations take in double precision than in float32."""
WORKSPACE = {"eigh": 3, "cholesky": 4}
"""Copies of a matrix that its decomposition needs besides the result, as measured on a CPU."""


@attrs.frozen
class Footprint:
    """What the curvature of one layer takes.

    Args:
        layer: The layer's name.
        path: Its module's name.
        shapes: Shapes of its matrices by name.
        factors: Bytes of its averaged factors, and of those that its pace compares with.
        decomposition: Bytes of what its basis makes of them.
        moments: Bytes of its moments, one number for each parameter, and of the operator that is
            made of them.
        means: Bytes of the running mean of its gradient, which every rank keeps.
        turned: Bytes of that mean in the coordinates of the basis.
        workspace: Bytes that the decomposition of its largest matrix needs besides.
        seconds: Of its decomposition, predicted for one core of a server or an H100; `None` where
            the solver or the device is not known.
        wide: What stands for its wide sides, in words.
    """

    layer: str
    path: str
    shapes: Mapping[str, tuple[int, ...]]
    factors: int
    decomposition: int
    moments: int
    means: int
    turned: int
    workspace: int
    seconds: float | None
    wide: tuple[str, ...]

    @property
    def kept(self) -> int:
        """Bytes between steps."""
        return self.factors + self.decomposition + self.moments + self.means + self.turned

    @property
    def largest(self) -> str:
        """Its largest matrix in words, such as "G 8000 x 8000"."""
        if not self.shapes:
            return "no matrix"
        name = max(self.shapes, key=lambda each: math.prod(self.shapes[each]))
        return f"{name} {' x '.join(map(str, self.shapes[name]))}"


@attrs.frozen
class LinkFootprint:
    """What a link takes besides the blocks that it joins.

    Args:
        layers: Names of the layers that it joins.
        statistics: Bytes of its averaged statistics; `None` where it needs numbers to tell.
        prepared: Bytes of what it prepares; `None` where it does not tell.
        workspace: Bytes that a preparation needs besides; likewise.
        seconds: Of a preparation, predicted for one core of a server or an H100; `None` where it
            does not tell, or the device is not known.
    """

    layers: tuple[str, ...]
    statistics: int | None
    prepared: int | None
    workspace: int | None
    seconds: float | None

    @property
    def told(self) -> bool:
        """Whether all its bytes are known."""
        return self.statistics is not None and self.prepared is not None

    @property
    def kept(self) -> int:
        """Bytes between steps, as far as they are known."""
        return (self.statistics or 0) + (self.prepared or 0)


def link_footprint(link: Link, blocks: Sequence[Block]) -> LinkFootprint:
    """Return what a link will take for these blocks.

    Raises:
        CombinationError: It cannot join their layers.
        PluginError: It failed.
    """
    joined = ordered(link, blocks)
    if not joined:
        return LinkFootprint((), 0, 0, 0, 0.0)
    layers = [linked(on_meta(block), damping=1.0) for block in joined]
    statistics: int | None = None
    with needing_numbers(), attribute_errors("link", link, "on its layers"):
        sums = link.statistics(layers, {}, 0.0)
        totals = [each.total for each in sums.values() if each.total is not None]
        statistics = sum(total.nbytes for total in totals)
    told: Preparation | None = None
    with needing_numbers(), attribute_errors("link", link, "telling what it prepares"):
        told = link.preparation(layers)
    names = tuple(block.name for block in joined)
    if told is None:
        return LinkFootprint(names, statistics, None, None, None)
    anchor = joined[0].layer.anchor
    kept = working_dtype(anchor.dtype).itemsize * told.numbers
    seconds = _seconds_of(told, anchor.device.type)
    return LinkFootprint(names, statistics, kept, told.workspace, seconds)


def _seconds_of(told: Preparation, device: str) -> float | None:
    """Return the seconds of a preparation on a kind of device, where that is known."""
    rates = SOLVER_RATES.get(device)
    if rates is None:
        return None
    solved = {"eigh": told.eigh, "cholesky": told.cholesky}
    taken = sum(rates.seconds(name, n) for name, sides in solved.items() for n in sides)
    taken += (told.products + told.triangular) / rates.rate
    return (DOUBLE if told.double else 1.0) * taken


@contextlib.contextmanager
def needing_numbers() -> Iterator[None]:
    """Surround what a stage is asked without numbers: it ends where the stage needs them.

    Raises:
        PluginError: The stage failed otherwise.
    """
    try:
        yield
    except (PluginError, RuntimeError) as error:
        if not needs_numbers(error):
            raise


def needs_numbers(error: Exception) -> bool:
    """Return whether a stage failed because tensors on the meta device have no numbers."""
    cause = error.__cause__ or error
    return isinstance(cause, NotImplementedError) or "meta" in str(cause)


def on_meta(block: Block) -> Block:
    """Return a block like another one without numbers, on the meta device."""
    layer = block.layer
    assert isinstance(layer, CoveredLayer)
    held = {
        name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"))
        for name, p in layer.tensors().items()
    }
    return Block(attrs.evolve(layer, held=held), block.curvature, block.basis)


def footprint_of(block: Block, *, averages: bool = False) -> Footprint | None:
    """Return what the curvature of a block will take; `None` where a stage needs numbers to tell.

    Args:
        block: The block.
        averages: Whether gradients are averaged before they are preconditioned.

    Raises:
        CombinationError: The basis does not take the layer's stand-ins.
        PluginError: A stage failed.
    """
    requires = block.requires
    try:
        return _footprint(block, requires, averages=averages)
    except (PluginError, RuntimeError) as error:
        if needs_numbers(error):
            return None
        raise


def _footprint(block: Block, requires: frozenset[str], *, averages: bool) -> Footprint:
    layer, device = block.layer, block.layer.anchor.device
    blank = on_meta(block)
    sums = blank.blank_factors()
    work = blank.work(sums)
    parts = decompose_corners(blank, {**work.matrices, **work.beside})
    item = working_dtype(layer.anchor.dtype).itemsize
    solvers = {name: _solver(block, made) for name, made in parts.items()}
    return Footprint(
        layer.name,
        layer.path,
        work.matrices,
        item
        * (1 + block.keeps)
        * sum(s.total.numel() for s in sums.values() if s.total is not None),
        item * sum(part.numel() for made in parts.values() for part in made.values()),
        item * (2 * math.prod(work.gradient) if block.basis.moments_from else 0),
        item * math.prod(work.gradient) if averages else 0,
        item * _turned(block, parts, work.gradient) if averages else 0,
        item
        * max(
            (
                WORKSPACE.get(solvers[name], 0) * math.prod(shape[-2:])
                for name, shape in work.matrices.items()
            ),
            default=0,
        ),
        _seconds(work.matrices, solvers, device.type),
        tuple(_words(block, work, sums)),
    )


def _turned(block: Block, parts: Parts, shape: tuple[int, ...]) -> int:
    """Return how many numbers a gradient has in the coordinates of the basis; 0 without any."""
    if not block.moments_of_gradient:
        return 0
    with attribute_errors("basis", block.basis, f"on layer {block.name!r}"):
        turned = block.basis.coordinates(parts, torch.empty(shape, device="meta"))
    return 0 if turned is None else turned.numel()


def _solver(block: Block, made: Mapping[str, torch.Tensor]) -> str:
    """Return what decomposes a matrix, by the forms that the basis states: "" for nothing known."""
    forms = {block.basis.forms.get(name) for name in made}
    if forms & {"cholesky", "inverse"}:
        return "cholesky"
    return "eigh" if "eigenvectors" in forms else ""


def _seconds(
    shapes: Mapping[str, tuple[int, ...]], solvers: Mapping[str, str], device: str
) -> float | None:
    rates, total = SOLVER_RATES.get(device), 0.0
    for name, shape in shapes.items():
        if is_diagonal(name) or not is_square(shape):
            continue
        if rates is None or not solvers[name]:
            return None
        total += math.prod(shape[:-2]) * rates.seconds(solvers[name], shape[-1])
    return total


def _words(block: Block, work: Work, sums: Mapping[str, object]) -> Iterator[str]:
    """Yield what stands for each wide side, such as "output side 50257: diagonal".

    Of rows, tell that the bytes are those of one example.
    """
    if block.curvature.row_factors:
        yield "for each example, at least"
    stand_ins = block.curvature.stand_ins(block.layer)
    sizes = {"input": work.gradient[-1], "output": work.gradient[-2]}
    for side, called in SIDES.items():
        if side not in stand_ins or not names_of(side, block.requires):
            continue
        names, n = stand_ins[side], sizes[called]
        what = f"{len(names)} blocks"
        if len(names) == 1 and is_diagonal(names[0]):
            kept = [sums[name] for name in sums if is_diagonal(name) and _called(name) == called]
            totals = [total for each in kept if (total := getattr(each, "total", None)) is not None]
            what = "identity" if any(t.shape[-1] == 1 < n for t in totals) else "diagonal"
        yield f"{called} side {n}: {what}"


def _called(name: str) -> str:
    """Return what the side of a diagonal is called."""
    return SIDES[side_of(name)]


def decompose_corners(block: Block, shapes: Mapping[str, tuple[int, ...]]) -> Parts:
    """Return a block's decomposition without numbers, on the meta device.

    Decompositions need numbers: a small corner of each matrix is decomposed instead, which tells
    the shapes of the result.

    Args:
        block: The block.
        shapes: The shapes of its matrices, and of those that are read beside them, by name.
    """
    if block.curvature.row_factors:  # to scale rows is quick, whatever their number
        ones = {name: torch.ones(()).expand(shape) for name, shape in shapes.items()}
        scaled = block.decompose(1.0, ones)
        return {n: {k: t.to("meta") for k, t in each.items()} for n, each in scaled.items()}
    corners, means = {}, {}
    for name, shape in shapes.items():
        lead = groups_of_shape(name, shape)
        groups = (GROUPS,) * (len(shape) - 2 if lead is None else len(lead))
        if lead is None:
            corners[name] = torch.ones(*groups, *(ROWS, COLUMNS)[-len(shape) :])
            continue
        means[name] = torch.ones(groups)
        if is_diagonal(name):
            corners[name] = torch.ones(*groups, COLUMNS)
        else:
            corners[name] = torch.eye(COLUMNS).expand(*groups, COLUMNS, COLUMNS).clone()
    small = block.decompose(1.0, corners, with_sides(means, dict.fromkeys(means, COLUMNS)))
    parts: Parts = {}
    for name, found in small.items():
        shape = shapes[name]
        lead = groups_of_shape(name, shape)
        rows = shape[-2] if len(shape) > 1 else 1
        full = {
            GROUPS: math.prod(shape[:-2] if lead is None else lead),
            ROWS: rows,
            COLUMNS: shape[-1],
        }
        with attribute_errors("basis", block.basis, f"on layer {block.name!r}"):
            told = block.basis.shapes(name, shape)
        parts[name] = {}
        for key, part in found.items():
            sides = told.get(key) or tuple(full.get(side, side) for side in part.shape)
            parts[name][key] = torch.empty(sides, dtype=part.dtype, device="meta")
    return parts


def with_footprints(
    coverage: Coverage, blocks: Iterable[Block], *, averages: bool = False
) -> Coverage:
    """Return a coverage table with what the curvature of each block takes.

    Args:
        coverage: The table.
        blocks: The blocks.
        averages: Whether gradients are averaged before they are preconditioned.
    """
    found = {block.name: footprint_of(block, averages=averages) for block in blocks}

    def row(row: Row) -> Row:
        each = None if row.block is None else found.get(row.block)
        if each is None:
            return row
        return attrs.evolve(row, bytes=each.kept, seconds=each.seconds, wide=each.wide)

    return attrs.evolve(coverage, rows=tuple(map(row, coverage)))
