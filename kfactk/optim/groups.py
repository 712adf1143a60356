"""`ParameterGroups`: the group of each parameter, and the damping of each group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kfactk.errors import OptionError
from kfactk.optim.settings import Settings
from kfactk.options import number_at, plain

Groups = Sequence[dict[str, Any]]
CHECKED = ("lr", "damping", "weight_decay")
"""Numbers that a new group may give."""


class ParameterGroups:
    """What an optimizer knows of its parameter groups, beside what they hold.

    The groups themselves are the update rule's, and are given to each method. An optimizer and its
    wrappers share this object.

    Args:
        recipe: Its damping and weight decay are those of groups without their own.

    Example:
        >>> import kfactk
        >>> known, weight = ParameterGroups(kfactk.build(damping=0.01)), nn.Parameter(Tensor(2))
        >>> groups = [{"params": [weight], "lr": 0.1}]
        >>> known.index(groups)
        >>> known.by_parameter[id(weight)]["damping"]
        0.01
    """

    def __init__(self, recipe: Settings) -> None:
        self._recipe = recipe
        self.damping = number_at("damping", recipe.damping, 0)
        """What the recipe's damping was last."""
        self.by_parameter: dict[int, dict[str, Any]] = {}
        """The group of each trained parameter, by the parameter's id. It stays the same object."""
        self._own_damping: list[tuple[dict[str, Any], bool]] = []

    def join(self, group: dict[str, Any], *, own: bool) -> None:
        """Note a new group.

        Args:
            group: The group.
            own: Whether its damping is its own.
        """
        self._own_damping.append((group, own))

    def index(self, groups: Groups) -> None:
        """Note the group of each parameter, by the parameters and groups as they are now."""
        known = {id(group): own for group, own in self._own_damping}
        self._own_damping = []
        for group in groups:
            group.setdefault("damping", self.damping)
            group.setdefault("weight_decay", self._recipe.weight_decay)
            own = known.get(id(group), bool(group["damping"] != self.damping))
            self._own_damping.append((group, own))
        self.by_parameter.clear()
        self.by_parameter.update((id(p), group) for group in groups for p in group["params"])

    def replace(self, groups: Groups) -> None:
        """Take groups in place of as many others: a state was loaded."""
        owns = [own for _, own in self._own_damping]
        self._own_damping = list(zip(groups, owns, strict=True))

    def set_damping(self, step: int) -> None:
        """Set each group's damping where the recipe's is a function of the step; check it.

        Args:
            step: Index of the step.
        """
        varies = callable(self._recipe.damping)
        if varies:
            self.damping = number_at("damping", self._recipe.damping, step)
        for group, own in self._own_damping:
            if varies and not own:
                group["damping"] = self.damping
            number_at("damping of a parameter group", plain(group["damping"]), step)


def check_group_numbers(group: Mapping[str, Any]) -> None:
    """Check the numbers that a new group gives.

    Raises:
        OptionError: One is no number that it can be.
    """
    for name in CHECKED:
        if name in group:
            number_at(f"{name} of a parameter group", plain(group[name]), 0)


def check_averaged_once(groups: Groups, first_moment: float, usual: Any) -> None:
    """Refuse a momentum that was written into groups beside a first moment.

    Schedulers write it where a rule has such an option, at 0 too. Each of both averages, and their
    steps add up.

    Args:
        groups: The groups.
        first_moment: Decay of the recipe's first moment.
        usual: The momentum that the update rule was made with; `None` for a rule without.

    Raises:
        OptionError: A group has a momentum, and the rule was made without.
    """
    if not first_moment or usual is None or float(usual):
        return
    for group in groups:
        if momentum := float(group.get("momentum") or 0):
            raise OptionError(
                f"a parameter group has momentum={momentum:.3g}, beside first_moment="
                f"{first_moment:g} of the recipe: gradients would be averaged twice, and steps be "
                "many times as long. If a scheduler wrote it (OneCycleLR, CyclicLR), give it "
                "cycle_momentum=False. If you want both, name the rule: update={'name': "
                f"'momentum', 'momentum': {momentum:.3g}}}."
            )


def trained(groups: Groups) -> Iterator[nn.Parameter]:
    """Yield the parameters of groups."""
    return (parameter for group in groups for parameter in group["params"])


def without_lr(groups: Groups) -> bool:
    """Return whether every learning rate is zero, as far as that is known without a device."""
    rates = [group["lr"] for group in groups]
    on_device = any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates)
    return not on_device and all(float(lr) == 0 for lr in rates)
