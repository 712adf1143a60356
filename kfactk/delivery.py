"""Preconditioned gradients, from the ranks that hold a layer to all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfactk.messages import Pending
from kfactk.packing import Form, buckets
from kfactk.places import Places
from kfactk.ranks import Members, Ranks

PRESENT = "present"
"""Name of the flags, one a layer, by which a holder tells which layers it has a gradient for."""


def deliver(
    names: Sequence[str],
    forms: Mapping[str, Form],
    precondition: Callable[[str], Tensor | None],
    places: Places,
    ranks: Ranks,
    device: torch.device,
) -> dict[str, Tensor]:
    """Precondition what this rank holds, and receive the rest.

    Messages leave while the next layers are still being preconditioned. What is sent follows from the layers that are ready, never from
    whose gradients are there.

    Args:
        names: The layers that are ready, the same on every rank.
        forms: Of their gradients as matrices.
        precondition: Gives a layer's preconditioned gradient; `None` where it has no gradient here.
        places: Who holds what.
        ranks: How it is moved.
        device: Where it is wanted.

    Returns:
        By layer name; layers without a gradient on their holder are left out.
    """
    found: dict[str, Tensor] = {}
    messages: list[tuple[list[str], list[Pending]]] = []
    for holder, members, run in _runs(names, forms, places, ranks):
        mine: dict[str, Tensor] = {}
        if holder == ranks.rank:
            mine = {name: tensor for name in run if (tensor := precondition(name)) is not None}
            found |= mine
        if len(members) > 1 and ranks.rank in members:
            messages.append((run, _sent(run, forms, mine, holder, members, ranks, device)))
    for run, pending in messages:
        arrived: dict[str, Tensor] = {}
        for message in pending:
            arrived |= message.wait()
        present = dict(zip(run, arrived.pop(PRESENT).tolist(), strict=True))
        found |= {name: tensor for name, tensor in arrived.items() if present[name]}
    return found


def _runs(names: Sequence[str], forms: Mapping[str, Form], places: Places, ranks: Ranks) -> list[tuple[int, Members, list[str]]]:
    """Messages in the order in which every rank sends them: the first bucket of each holder, then the second of each."""
    routes: dict[tuple[int, Members], dict[str, Form]] = {}
    for name in names:
        share = places.share(name)
        for holder in share.holders:
            routes.setdefault((holder, places.audience(share, holder)), {})[name] = forms[name]
    runs = [(number, route, run) for route, these in routes.items() for number, run in enumerate(buckets(these))]
    return [(holder, members, run) for _, (holder, members), run in sorted(runs, key=lambda each: (each[0], each[1]))]


def _sent(
    run: Sequence[str],
    forms: Mapping[str, Form],
    mine: Mapping[str, Tensor],
    holder: int,
    members: Members,
    ranks: Ranks,
    device: torch.device,
) -> list[Pending]:
    these = {name: forms[name] for name in run}
    flags = torch.tensor([float(name in mine) for name in run], dtype=forms[run[0]].dtype, device=device)
    given: dict[str, Tensor] = {}
    if holder == ranks.rank:
        given = {name: mine[name] if name in mine else forms[name].blank(device).zero_() for name in run} | {PRESENT: flags}
    return ranks.send(given, these | {PRESENT: Form.of(flags)}, holder, members, "gradients", device)
