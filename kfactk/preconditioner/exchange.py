"""Sums that travel while the user's backward pass runs: begun after the forward, and waited for in `step()`.

Where every rank made exactly one forward in the last step that took statistics, the same is expected of the next one. Then the sums leave
right after the Fisher pass. A rank that makes no forward begins them in `step()`, with nothing to add; sums of further forwards follow in
`step()` as usual. So what is begun, and with which names, is the same on all ranks whatever they do in between.

The last bit of a sum depends on where in a message it lies. So messages are made up alike whether they leave early or not, and whatever
was learnt when: a resumed run, which has yet to learn, does what the uninterrupted one does.

Preconditioned gradients, from the ranks that hold a layer to all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator, Members
from kfactk.distributed.messages import PendingMessage
from kfactk.distributed.packing import TensorSpec, buckets
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.plan import Plan
from kfactk.preconditioner.state import BlockState
from kfactk.samples import Statistic
from kfactk.statistics import ReducedStatistic, split_key


class OverlappedReduction:
    """The early sums of one optimizer.

    Args:
        ranks: Moves them.
        wanted: For a name, the ranks that want its total.
    """

    def __init__(self, ranks: Communicator, wanted: Callable[[str], Members]) -> None:
        self._ranks, self._wanted = ranks, wanted
        self._forms: dict[str, TensorSpec | None] = {}
        self._device = torch.device("cpu")
        self._expected = False
        self._under_way: Callable[[], dict[str, ReducedStatistic]] | None = None

    def learn(self, specs: Mapping[str, TensorSpec | None], device: torch.device) -> None:
        """Take note of the names and forms that all ranks' sums had."""
        self._forms.update(specs)
        self._device = device

    def expect(self, one_forward_each: bool) -> None:
        """Whether, in the step just begun to end, every rank made one forward; the same on every rank."""
        self._expected = one_forward_each
        if one_forward_each:
            self._ranks.stand_aside()

    def begin(self, plan: Plan, states: Mapping[str, BlockState]) -> None:
        """Let this step's sums leave, if that is expected and has not happened; they are not pending any more."""
        if not self._expected or self._under_way is not None or not self._knows(plan, states):
            return
        specs = {key: self._forms[key] for key in sorted(self._forms) if self._gathered(key, plan)}
        sums: dict[str, Statistic] = {}
        for key, form in specs.items():
            layer, rest = split_key(key)
            states[layer].settle()
            pending = states[layer].pending
            if rest in pending and _fits(pending[rest], form):
                sums[key] = pending.pop(rest)
        self._under_way = self._ranks.begin(sums, specs, self._device, self._wanted, "sums")

    def finish(self, plan: Plan, states: Mapping[str, BlockState]) -> dict[str, ReducedStatistic]:
        """What has arrived by now; every rank calls it once a step, before anything else is agreed on."""
        self.begin(plan, states)
        under_way, self._under_way = self._under_way, None
        return under_way() if under_way is not None else {}

    def drop(self) -> None:
        """Wait for what is under way, and forget it."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way()

    def _knows(self, plan: Plan, states: Mapping[str, BlockState]) -> bool:
        """Whether nothing would be left behind: of every layer that has run, the forms of what is gathered are known."""
        known = {(layer, rest.partition(".")[0]) for layer, rest in map(split_key, self._forms)}
        ready = {name: need for name, need in plan.needs.items() if states[name].ready}
        return all(
            ((name, "factor") in known or not (need.factors or need.inputs))
            and ((name, "moment") in known or not need.scale or need.late)
            for name, need in ready.items()
        )

    @staticmethod
    def _gathered(key: str, plan: Plan) -> bool:
        layer, rest = split_key(key)
        need = plan.needs.get(layer)
        return need is not None and need.gathers(rest)


def _fits(statistic: Statistic, form: TensorSpec | None) -> bool:
    """Whether it can travel in the place of that form: what has changed since follows in `step()`."""
    if statistic.total is None:
        return True
    return (
        form is not None
        and tuple(statistic.total.shape) == form.shape
        and statistic.total.dtype == form.dtype
        and statistic.symmetric == form.symmetric
    )


def merged(
    early: Mapping[str, ReducedStatistic], late: Mapping[str, ReducedStatistic]
) -> dict[str, ReducedStatistic]:
    """Both sums together, name by name."""
    found = dict(early)
    for name, other in late.items():
        one = found.get(name)
        if one is None:
            found[name] = other
        else:
            totals = [each.total for each in (one, other) if each.total is not None]
            total = None if not totals else totals[0] if len(totals) == 1 else totals[0] + totals[1]
            found[name] = ReducedStatistic(
                total, one.count + other.count, one.exists or other.exists
            )
    return found


PRESENT = "present"
"""Name of the flags, one a layer, by which a holder tells which layers it has a gradient for."""


def broadcast_gradients(
    names: Sequence[str],
    specs: Mapping[str, TensorSpec],
    precondition: Callable[[str], Tensor | None],
    places: BlockPlacement,
    ranks: Communicator,
    device: torch.device,
) -> dict[str, Tensor]:
    """Precondition what this rank holds, and receive the rest.

    Messages leave while the next layers are still being preconditioned. What is sent follows from the layers that are ready, never from
    whose gradients are there.

    Args:
        names: The layers that are ready, the same on every rank.
        specs: Of their gradients as matrices.
        precondition: Gives a layer's preconditioned gradient; `None` where it has no gradient here.
        places: Who holds what.
        ranks: How it is moved.
        device: Where it is wanted.

    Returns:
        By layer name; layers without a gradient on their holder are left out.
    """
    found: dict[str, Tensor] = {}
    messages: list[tuple[list[str], list[PendingMessage]]] = []
    for gradient_worker, members, run in _runs(names, specs, places, ranks):
        mine: dict[str, Tensor] = {}
        if gradient_worker == ranks.rank:
            mine = {name: tensor for name in run if (tensor := precondition(name)) is not None}
            found |= mine
        if len(members) > 1 and ranks.rank in members:
            messages.append((run, _sent(run, specs, mine, gradient_worker, members, ranks, device)))
    for run, pending in messages:
        arrived: dict[str, Tensor] = {}
        for message in pending:
            arrived |= message.wait()
        present = dict(zip(run, arrived.pop(PRESENT).tolist(), strict=True))
        found |= {name: tensor for name, tensor in arrived.items() if present[name]}
    return found


def _runs(
    names: Sequence[str],
    specs: Mapping[str, TensorSpec],
    places: BlockPlacement,
    ranks: Communicator,
) -> list[tuple[int, Members, list[str]]]:
    """Messages in the order in which every rank sends them: the first bucket of each holder, then the second of each."""
    routes: dict[tuple[int, Members], dict[str, TensorSpec]] = {}
    for name in names:
        share = places.share(name)
        for gradient_worker in share.gradient_workers:
            routes.setdefault((gradient_worker, places.receivers(share, gradient_worker)), {})[
                name
            ] = specs[name]
    runs = [
        (number, route, run)
        for route, these in routes.items()
        for number, run in enumerate(buckets(these))
    ]
    return [
        (gradient_worker, members, run)
        for _, (gradient_worker, members), run in sorted(runs, key=lambda each: (each[0], each[1]))
    ]


def _sent(
    run: Sequence[str],
    specs: Mapping[str, TensorSpec],
    mine: Mapping[str, Tensor],
    gradient_worker: int,
    members: Members,
    ranks: Communicator,
    device: torch.device,
) -> list[PendingMessage]:
    these = {name: specs[name] for name in run}
    flags = torch.tensor(
        [float(name in mine) for name in run], dtype=specs[run[0]].dtype, device=device
    )
    given: dict[str, Tensor] = {}
    if gradient_worker == ranks.rank:
        given = {
            name: mine[name] if name in mine else specs[name].blank(device).zero_() for name in run
        } | {PRESENT: flags}
    return ranks.send(
        given,
        these | {PRESENT: TensorSpec.of(flags)},
        gradient_worker,
        members,
        "gradients",
        device,
    )
