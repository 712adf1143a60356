"""Sums that travel while the user's backward pass runs: begun after the forward, and waited for in `step()`.

Where every rank made exactly one forward in the last step that took statistics, the same is expected of the next one. Then the sums leave
right after the Fisher pass. A rank that makes no forward begins them in `step()`, with nothing to add; sums of further forwards follow in
`step()` as usual. So what is begun, and with which names, is the same on all ranks whatever they do in between.

The last bit of a sum depends on where in a message it lies. So messages are made up alike whether they leave early or not, and whatever
was learnt when: a resumed run, which has yet to learn, does what the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kfactk.layerstate import LayerState
from kfactk.packing import Form
from kfactk.plan import Plan
from kfactk.ranks import Members, Ranks
from kfactk.samples import Statistic
from kfactk.sums import Joined, unkeyed


class Early:
    """The early sums of one optimizer.

    Args:
        ranks: Moves them.
        wanted: For a name, the ranks that want its total.
    """

    def __init__(self, ranks: Ranks, wanted: Callable[[str], Members]) -> None:
        self._ranks, self._wanted = ranks, wanted
        self._forms: dict[str, Form | None] = {}
        self._device = torch.device("cpu")
        self._expected = False
        self._under_way: Callable[[], dict[str, Joined]] | None = None

    def learn(self, forms: Mapping[str, Form | None], device: torch.device) -> None:
        """Take note of the names and forms that all ranks' sums had."""
        self._forms.update(forms)
        self._device = device

    def expect(self, one_forward_each: bool) -> None:
        """Whether, in the step just begun to end, every rank made one forward; the same on every rank."""
        self._expected = one_forward_each
        if one_forward_each:
            self._ranks.stand_aside()

    def begin(self, plan: Plan, states: Mapping[str, LayerState]) -> None:
        """Let this step's sums leave, if that is expected and has not happened; they are not pending any more."""
        if not self._expected or self._under_way is not None or not self._knows(plan, states):
            return
        forms = {key: self._forms[key] for key in sorted(self._forms) if self._gathered(key, plan)}
        sums: dict[str, Statistic] = {}
        for key, form in forms.items():
            layer, rest = unkeyed(key)
            states[layer].settle()
            pending = states[layer].pending
            if rest in pending and _fits(pending[rest], form):
                sums[key] = pending.pop(rest)
        self._under_way = self._ranks.begin(sums, forms, self._device, self._wanted, "sums")

    def finish(self, plan: Plan, states: Mapping[str, LayerState]) -> dict[str, Joined]:
        """What has arrived by now; every rank calls it once a step, before anything else is agreed on."""
        self.begin(plan, states)
        under_way, self._under_way = self._under_way, None
        return under_way() if under_way is not None else {}

    def drop(self) -> None:
        """Wait for what is under way, and forget it."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way()

    def _knows(self, plan: Plan, states: Mapping[str, LayerState]) -> bool:
        """Whether nothing would be left behind: of every layer that has run, the forms of what is gathered are known."""
        known = {(layer, rest.partition(".")[0]) for layer, rest in map(unkeyed, self._forms)}
        ready = {name: need for name, need in plan.needs.items() if states[name].ready}
        return all(
            ((name, "factor") in known or not (need.factors or need.inputs)) and ((name, "moment") in known or not need.scale or need.late)
            for name, need in ready.items()
        )

    @staticmethod
    def _gathered(key: str, plan: Plan) -> bool:
        layer, rest = unkeyed(key)
        need = plan.needs.get(layer)
        return need is not None and need.gathers(rest)


def _fits(statistic: Statistic, form: Form | None) -> bool:
    """Whether it can travel in the place of that form: what has changed since follows in `step()`."""
    if statistic.total is None:
        return True
    return (
        form is not None
        and tuple(statistic.total.shape) == form.shape
        and statistic.total.dtype == form.dtype
        and statistic.symmetric == form.symmetric
    )


def with_early(early: Mapping[str, Joined], late: Mapping[str, Joined]) -> dict[str, Joined]:
    """Both sums together, name by name."""
    found = dict(early)
    for name, other in late.items():
        one = found.get(name)
        if one is None:
            found[name] = other
        else:
            totals = [each.total for each in (one, other) if each.total is not None]
            total = None if not totals else totals[0] if len(totals) == 1 else totals[0] + totals[1]
            found[name] = Joined(total, one.count + other.count, one.exists or other.exists)
    return found
