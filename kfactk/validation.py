"""Faults of stages, told with the stage, the layer and what was expected: a stranger's stage must not fail silently, nor without a name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from kfactk.errors import KfactkError, PluginError
from kfactk.samples import Statistic

KRONECKER = frozenset({"A", "G"})
"""Names that mean the Kronecker factors of the input and the output side."""


def label_of(family: str, stage: object) -> str:
    """A stage in words, such as `curvature kfactk_stages.curvature.kfac:Kfac`."""
    return f"{family} {type(stage).__module__}:{type(stage).__qualname__}"


class attribute_errors:
    """A context that turns what a stage raises, or returns in a form nobody can use, into a `PluginError` that names it.

    Errors of kfactk and exhausted memory pass through. A class, since a generator costs more than many of the calls it surrounds.

    Args:
        family: Family of the stage.
        stage: The stage.
        where: What it was doing, in words that follow "failed".
    """

    __slots__ = ("_family", "_stage", "_where")

    def __init__(self, family: str, stage: object, where: str) -> None:
        self._family, self._stage, self._where = family, stage, where

    def __enter__(self) -> None:
        """Nothing is needed before."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Tell the stage apart from what it raised."""
        if (
            error is None
            or isinstance(error, KfactkError | torch.OutOfMemoryError)
            or not isinstance(error, Exception)
        ):
            return
        what = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"{label_of(self._family, self._stage)} failed {self._where} ({what}). Report it to its authors, or use another {self._family}."
        ) from error


@contextlib.contextmanager
def note_stage(family: str, stage: object, where: str) -> Iterator[None]:
    """Note on whatever a stage raises which stage it was, where errors of the libraries below it have to keep their kind."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"raised by {label_of(family, stage)} {where}")
        raise


def check_statistics(
    family: str, stage: object, where: str, found: Any, *, required: bool
) -> dict[str, Statistic]:
    """What a stage summed up, checked.

    Raises:
        PluginError: It is no mapping of names to `Statistic`, or empty though something is required.
    """
    good = isinstance(found, Mapping) and all(
        isinstance(k, str) and isinstance(v, Statistic) for k, v in found.items()
    )
    if not good or (required and not found):
        gave = (
            "nothing"
            if good
            else repr(found)
            if not isinstance(found, Mapping)
            else {k: type(v).__name__ for k, v in found.items()}
        )
        raise PluginError(
            f"{label_of(family, stage)} gave {gave} {where}, where names with a kfactk.Statistic each are due. Report it."
        )
    return dict(found)


def check_matrices(
    stage: object, where: str, found: Mapping[str, Tensor], required: Set[str]
) -> dict[str, Tensor]:
    """The assembled matrices that are required, checked; others are not asked for, since asking may make them.

    Raises:
        PluginError: One that the basis requires is missing, or a Kronecker factor is not square.
    """
    there = {name: found[name] for name in sorted(required) if name in found}
    oblong = {
        name: tuple(matrix.shape)
        for name, matrix in there.items()
        if name in KRONECKER and not square(matrix)
    }
    if oblong or len(there) < len(required):
        but = (
            f"; Kronecker factors are square in their last two dimensions, not {oblong}"
            if oblong
            else ""
        )
        raise PluginError(
            f"{label_of('curvature', stage)} assembled {', '.join(sorted(found)) or 'nothing'} {where}, where "
            f"{', '.join(sorted(required))} are due{but}. Report it to its authors."
        )
    return there


def square(matrix: Tensor) -> bool:
    """Whether the last two dimensions are equal."""
    return matrix.ndim >= 2 and matrix.shape[-1] == matrix.shape[-2]


def check_parted(parameters: Mapping[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a curvature made of a layer's matrix, checked.

    Raises:
        ValueError: Names or shapes are not those of the parameters.
    """
    if found.keys() != parameters.keys() or any(
        tensor.shape != parameters[name].shape for name, tensor in found.items()
    ):
        made, due = (
            {name: tuple(tensor.shape) for name, tensor in each.items()}
            for each in (found, parameters)
        )
        raise ValueError(
            f"`tensors` gave the shapes {made}, where those of the parameters are due: {due}"
        )
    return found


def check_clipped(
    stage: object, found: Any, given: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """What a clip gave, checked.

    Raises:
        PluginError: It is not a list of tensors, one of the same shape for each of the `given` preconditioned gradients, and a factor.
    """
    if not (
        isinstance(found, tuple)
        and len(found) == 2
        and isinstance(found[0], list)
        and len(found[0]) == len(given)
    ):
        raise PluginError(
            f"{label_of('clip', stage)} gave {type(found).__name__}, where a pair is due: a list of {len(given)} tensors, one for each "
            "it was given, and the factor as a tensor. Report it to its authors, or use another clip."
        )
    shapes = [
        (getattr(c, "shape", type(c).__name__), p.shape)
        for c, p in zip(found[0], given, strict=True)
    ]
    if wrong := next((f"{mine} for {theirs}" for mine, theirs in shapes if mine != theirs), ""):
        raise PluginError(
            f"{label_of('clip', stage)} changed the shape of a gradient: {wrong}. Report it, or use another clip."
        )
    return found


def overwritten(layer: str) -> str:
    """What to tell a user whose code changed a layer's input while its statistics still had to be taken."""
    return (
        f"the input of layer {layer!r} was modified in place after its forward, so its statistics would be wrong. Refill input buffers "
        "only after step(), or hand the model a copy."
    )


def silent_message(names: Sequence[str]) -> str:
    """What to tell a user whose layers were not seen although they have a gradient."""
    shown = ", ".join(repr(name) for name in names[:4]) + (
        f" and {len(names) - 4} more" if len(names) > 4 else ""
    )
    return (
        f"curvature is due, and layer {shown} has a gradient but gave no sample: preconditioning it would use wrong statistics. "
        "Likely causes: observe='manual' without optimizer.observe() between forward and backward; the bound model itself was not called "
        "(a submodule or a copy was); the forward ran in evaluation mode (use observe='manual'), under reentrant activation checkpointing "
        "(use use_reentrant=False) or compiled before bind; the layer does not lead to the output that the likelihood sees (name it "
        "with output=, or leave a head with a loss of its own alone with exclude=). Nothing was changed by this step."
    )
