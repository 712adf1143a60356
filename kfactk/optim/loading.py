"""`StateLoader`: a saved state is checked as a whole before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from kfactk.optim import rule_state
from kfactk.optim.checkpoint import SavedState, completed_groups, fit
from kfactk.optim.saved_groups import check_groups
from kfactk.optim.settings import Settings
from kfactk.preconditioner.damage import Damage
from kfactk.preconditioner.preconditioner import Preconditioner
from kfactk.preconditioner.state import BlockState


@attrs.frozen(eq=False)
class CheckedState:
    """A saved state that fits the recipe and the model.

    Args:
        step: Number of steps taken.
        curvature: The states of blocks, by layer name.
        entries: The update rule's, by the parameter's number; they may be changed in place.
        groups: The parameter groups, completed.
        fits: Whether these have the sizes of the current ones. Where they do not, torch refuses
            them with its own error.
    """

    step: Tensor
    curvature: dict[str, BlockState]
    entries: dict[Any, Any]
    groups: list[dict[str, Any]]
    fits: bool


class StateLoader:
    """Checks saved states for one optimizer.

    Args:
        recipe: The recipe.
        model: The model.
        preconditioner: Takes the curvature.
        rule: The update rule.
        options: The names of its own options.
    """

    def __init__(
        self,
        recipe: Settings,
        model: nn.Module,
        preconditioner: Preconditioner,
        rule: torch.optim.Optimizer,
        options: Sequence[str],
    ) -> None:
        self._recipe, self._model, self._preconditioner = recipe, model, preconditioner
        self._rule, self._options = rule, tuple(options)

    def checked(self, state_dict: Mapping[str, Any]) -> CheckedState:
        """Return a saved state in its parts; nothing has changed yet.

        Raises:
            StateError: Its curvature or its update rule is not this model's and recipe's, or
                something of it is missing or damaged.
        """
        saved = SavedState.split(state_dict, self._rule.param_groups)
        step = torch.tensor(saved.step, dtype=torch.int64, device="cpu")
        groups, fits = self._groups(state_dict["param_groups"])
        damage = Damage()
        states = self._preconditioner.loaded(saved.curvature, damage) if fits else {}
        entries = self._entries(saved, groups, damage) if fits else saved.rule
        damage.refuse()
        return CheckedState(step, states, entries, groups, fits)

    def _groups(self, saved: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
        """Return saved groups, completed, and whether they have the sizes of the current ones.

        Raises:
            StateError: They are another update rule's, or damaged.
        """
        defaults, current = self._rule.defaults, self._rule.param_groups
        rule = {name: defaults[name] for name in self._options}
        damage = Damage()
        groups = completed_groups(saved, current, defaults, rule)
        controlled = frozenset[str]()
        if self._recipe.controller is not None:
            controlled, rule = frozenset({"lr"}), rule | dict(self._recipe.controller.numbers)
        check_groups(groups, current, type(self._rule), rule, damage, controlled)
        damage.refuse()
        return groups, fit(groups, current)

    def _entries(
        self, saved: SavedState, groups: list[dict[str, Any]], damage: Damage
    ) -> dict[Any, Any]:
        """Return the update rule's saved entries, which may be changed in place; check them."""
        current, modules = self._rule.param_groups, self._model.modules()
        sparse = frozenset(id(m.weight) for m in modules if getattr(m, "sparse", False))
        rule_state.check_entries(type(self._rule), saved.rule, groups, current, sparse, damage)
        pairs = zip(groups, current, strict=True)
        numbered = {
            number: parameter
            for old, new in pairs
            for number, parameter in zip(old["params"], new["params"], strict=True)
        }
        return rule_state.owned(saved.rule, numbered)
