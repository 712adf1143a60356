"""A state whose parts lie on several ranks: made whole on one of them, and taken over by all of them or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.packing import TensorSpec, buckets
from kfactk.errors import OptionError, StateError
from kfactk.preconditioner.state import BlockState
from kfactk.statistics import join_key, split_key

Flat = Mapping[str, Mapping[str, Tensor]]
"""Of each layer, the flat form of its state."""


@attrs.frozen
class Control:
    """What ranks must have in common to go on together: all that their messages follow from.

    Args:
        step: The number of steps taken.
        layers: Of each layer that has a state, whether it is ready, and what it owes.
    """

    step: int
    layers: Mapping[str, tuple[bool, tuple[bool, bool, bool]]]

    @classmethod
    def of(cls, step: int, states: Mapping[str, BlockState]) -> Control:
        """What is in these states."""
        return cls(
            step,
            {name: (state.ready, attrs.astuple(state.overdue)) for name, state in states.items()},
        )


@contextlib.contextmanager
def agreed_load(ranks: Communicator) -> Iterator[Callable[[Control], None]]:
    """Around the taking over of a state by every rank: what fails on one rank fails on all.

    Gives a function to be called with what this rank would go on with, before anything is final; it raises where another rank cannot.

    Raises:
        StateError: Another rank failed, or would go on with something else.
    """
    told = False

    def agree(control: Control) -> None:
        nonlocal told
        told = True
        reports: list[tuple[str, Control | None]] = ranks.gathered(("", control))
        for rank, (fault, _) in enumerate(reports):
            if fault:
                raise StateError(
                    f"rank {rank} cannot take over the saved state, and so no rank does: {fault}"
                )
        if others := [rank for rank, (_, theirs) in enumerate(reports) if theirs != reports[0][1]]:
            steps = ", ".join(
                f"rank {rank} at step {theirs.step}"
                for rank, (_, theirs) in enumerate(reports)
                if theirs is not None
            )
            raise StateError(
                f"the ranks were given different states ({steps}; what layers owe differs from rank 0 on rank "
                f"{', '.join(map(str, others))}). Load the same checkpoint on every rank."
            )

    try:
        yield agree
    except Exception as error:
        if not told:
            ranks.gathered((f"{type(error).__name__}: {error}", None))
        raise


def gathered_state(
    parts: Flat, ranks: Communicator, to: int | None, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """What other ranks have of the layers' states and this one has not; a collective call.

    It arrives as it is, whatever precision the recipe's messages have, in the memory of the CPU.

    Args:
        parts: What this rank has.
        ranks: Those that share the layers.
        to: The rank that asks; `None` for every one. The others get nothing.
        device: Where messages are made.

    Raises:
        OptionError: There is no such rank.
    """
    if to is not None and to not in ranks.everyone:
        raise OptionError(
            f"to={to!r} is no rank: give one of 0 to {ranks.size - 1}, counted within the placement's process group, or None."
        )
    mine = {
        join_key(layer, key): tensor.detach()
        for layer, flat in parts.items()
        for key, tensor in flat.items()
    }
    offers: list[dict[str, TensorSpec | Tensor]] = ranks.gathered(
        {key: _offer(tensor) for key, tensor in mine.items()}
    )
    asking = [offers[rank] for rank in (ranks.everyone if to is None else (to,))]
    wanted = {key for offer in offers for key in offer if any(key not in asked for asked in asking)}
    carrier = Communicator(
        ranks.group
    )  # without the recipe's wire_dtype, and the record of its bytes
    arrived: dict[str, Tensor] = {}
    for source, offer in enumerate(offers):
        given = {key: offer[key] for key in sorted(wanted & offer.keys())}
        wanted -= given.keys()
        arrived |= {key: what for key, what in given.items() if isinstance(what, Tensor)}
        specs = {key: what for key, what in given.items() if isinstance(what, TensorSpec)}
        for run in buckets(specs):
            these = {key: specs[key] for key in run}
            tensors = {key: mine[key].to(device) for key in run} if source == ranks.rank else {}
            for message in carrier.send(tensors, these, source, ranks.everyone, "state", device):
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
    """What is told of a tensor that others may want: a single number itself."""
    return TensorSpec.of(tensor) if tensor.ndim else tensor.detach().cpu()
