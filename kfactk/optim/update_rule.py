"""The update rule of an optimizer: before there is one, and its step."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import attrs
import torch

from kfactk.optim import gradients
from kfactk.optim.control import Control, Decision, Replaced
from kfactk.optim.metrics import MetricsRecorder
from kfactk.optim.nonfinite import Verdict
from kfactk.optim.settings import Settings
from kfactk.timing import StageTimer
from kfactk.validation import note_stage

MODES = ("train", "eval")
"""Methods that an update rule may have beyond torch's, and that loops call where they are."""


@attrs.define(eq=False)
class UnboundRule:
    """Holds what an update rule will have, until there is one."""

    defaults: dict[str, Any] = attrs.Factory(dict)
    param_groups: list[dict[str, Any]] = attrs.Factory(list)
    state: defaultdict[Any, Any] = attrs.Factory(lambda: defaultdict(dict))


class RuleStep:
    """Lets the update rule take its step, on the gradients that it is given.

    Args:
        rule: The update rule.
        recipe: The recipe.
        control: What a controller does with the steps; `None` without one.
        recorder: Gets the numbers of the controller.
        timer: Times the stages.
    """

    def __init__(
        self,
        rule: torch.optim.Optimizer,
        recipe: Settings,
        control: Control | None,
        recorder: MetricsRecorder,
        timer: StageTimer,
    ) -> None:
        self._rule, self._update, self._control = rule, recipe.update, control
        self._decays = recipe.weight_decay_at == "gradient"
        self._recorder, self._timer = recorder, timer

    def take(
        self,
        verdict: Verdict,
        replaced: Replaced,
        decision: Decision | None,
        closure: Callable[[], Any] | None,
        step: int,
    ) -> None:
        """Let the update rule step, with the numbers that the controller decided on.

        Args:
            verdict: Surrounds the step.
            replaced: Parameters, each with its gradient.
            decision: What the controller decided, where it did.
            closure: The user's; it may run once more.
            step: Index of the step.
        """
        control, groups = self._control, self._rule.param_groups
        if control is None or decision is None or closure is None:
            with verdict.around:
                self._run(replaced)
            return
        evaluates = control.evaluates(step)
        with control.writing(decision, groups, self._rule.state, evaluates=evaluates):
            with verdict.around:
                self._run(replaced)
            self._recorder.add(control.recorded(decision))
            if evaluates:
                with self._timer.timed("control"):
                    self._recorder.add(control.adapt(decision, closure, groups))

    def _run(self, replaced: Replaced) -> None:
        """Run the update rule with these gradients in place of the user's."""
        swapped = gradients.swapped(self._rule.param_groups, replaced, decayed=self._decays)
        noted = note_stage("update", self._update, "taking the step")
        with swapped, self._timer.timed("update"), noted:
            without_global_hooks(self._rule)()


def without_global_hooks(rule: torch.optim.Optimizer) -> Callable[[], Any]:
    """Return the step of an update rule without the hooks of `register_optimizer_step_pre_hook`.

    torch runs these, and their likes after the step, around the step of every class of optimizers:
    they have run, or will run, for the optimizer that the user sees.
    """
    step = type(rule).step
    if "step" not in vars(rule) and getattr(step, "hooked", False):
        step = getattr(step, "__wrapped__", step)
        return functools.partial(step, rule)
    return rule.step
