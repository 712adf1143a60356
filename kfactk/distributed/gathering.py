"""Bring a state together whose parts lie on several ranks, and load one on all ranks or on none."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.packing import TensorSpec, buckets
from kfactk.errors import OptionError, StateError
from kfactk.statistics import join_key, split_key

FlatStates = Mapping[str, Mapping[str, Tensor]]
"""The state of each layer as tensors by name."""


@attrs.frozen
class Progress:
    """What must be equal on all ranks, because their next messages follow from it.

    Args:
        step: Number of steps taken.
        layers: For each layer with a state, whether it is ready, its overdue work, and the step
            at which its pace wants it.
    """

    step: int
    layers: Mapping[str, tuple[bool, tuple[bool, ...], int]]


class LoadOnAllRanks:
    """Context of the load of a state: what fails on one rank fails on all.

    Args:
        ranks: The ranks that share the layers.
    """

    def __init__(self, ranks: Communicator) -> None:
        self._ranks, self._reported = ranks, False

    def __enter__(self) -> LoadOnAllRanks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not self._reported:
            self._ranks.gathered((f"{type(error).__name__}: {error}", None))

    def agree(self, progress: Progress) -> None:
        """Compare the progress of the loaded states, before a load is final; a collective call.

        Raises:
            StateError: Another rank failed, or loaded a state with another progress.
        """
        self._reported = True
        reports: list[tuple[str, Progress | None]] = self._ranks.gathered(("", progress))
        for rank, (fault, _) in enumerate(reports):
            if fault:
                raise StateError(
                    f"rank {rank} cannot load the saved state, and so no rank loads it: {fault}"
                )
        others = [rank for rank, (_, theirs) in enumerate(reports) if theirs != reports[0][1]]
        if others:
            steps = ", ".join(
                f"rank {rank} at step {theirs.step}"
                for rank, (_, theirs) in enumerate(reports)
                if theirs is not None
            )
            raise StateError(
                f"the ranks were given different states ({steps}; rank "
                f"{', '.join(map(str, others))} differs from rank 0 in the step or in overdue "
                "work). Load the same checkpoint on every rank."
            )


def gather_state(
    parts: FlatStates, ranks: Communicator, to: int | None, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Return the parts of the layers' states that only other ranks have; a collective call.

    They arrive unrounded, whatever the recipe's `wire_dtype`, in the memory of the CPU.

    Args:
        parts: The parts that this rank has.
        ranks: The ranks that share the layers.
        to: The rank that receives; `None` for every one. The others get nothing.
        device: Where messages are made.

    Raises:
        OptionError: There is no such rank.
    """
    if to is not None and to not in ranks.everyone:
        raise OptionError(
            f"to={to!r} is not a rank of the placement's process group. Give a number from 0 to "
            f"{ranks.size - 1}, or None for every rank."
        )
    mine = {
        join_key(layer, key): tensor.detach()
        for layer, flat in parts.items()
        for key, tensor in flat.items()
    }
    offers: list[dict[str, TensorSpec | Tensor]] = ranks.gathered(
        {key: _offer(tensor) for key, tensor in mine.items()}
    )
    receivers = [offers[rank] for rank in (ranks.everyone if to is None else (to,))]
    wanted = {key for offer in offers for key in offer if any(key not in has for has in receivers)}
    # Without the recipe's wire_dtype, and without its record of bytes.
    communicator = Communicator(ranks.group)
    arrived: dict[str, Tensor] = {}
    for source, offer in enumerate(offers):
        given = {key: offer[key] for key in sorted(wanted & offer.keys())}
        wanted -= given.keys()
        arrived |= {key: what for key, what in given.items() if isinstance(what, Tensor)}
        specs = {key: what for key, what in given.items() if isinstance(what, TensorSpec)}
        for bucket in buckets(specs):
            these = {key: specs[key] for key in bucket}
            tensors = {key: mine[key].to(device) for key in bucket} if source == ranks.rank else {}
            for message in communicator.send(
                tensors, these, source, ranks.everyone, "state", device
            ):
                arrived |= {
                    key: tensor.cpu()
                    for key, tensor in message.wait().items()
                    if to in (None, ranks.rank) and key not in mine
                }
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in arrived.items() if to in (None, ranks.rank) else ():
        if key not in mine:
            layer, rest = split_key(key)
            found.setdefault(layer, {})[rest] = tensor
    return found


def _offer(tensor: Tensor) -> TensorSpec | Tensor:
    """Return what other ranks are told of a tensor: its spec, or the value of a single number."""
    return TensorSpec.of(tensor) if tensor.ndim else tensor.detach().cpu()
