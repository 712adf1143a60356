"""What an optimizer keeps between steps: shown in `state`, saved, and taken over."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kfactk.distributed.gathering import Progress, gather_state, load_on_all_ranks
from kfactk.errors import KfactkError, StateError
from kfactk.optim.nonfinite import NonFiniteGuard
from kfactk.options import number_at, plain
from kfactk.preconditioner.preconditioner import Preconditioner
from kfactk.preconditioner.state import PREFIX, STEP

Groups = Sequence[Mapping[str, Any]]


def split_entries(
    state_dict: Mapping[str, Any], groups: Groups
) -> tuple[dict[int, dict[str, Tensor]], dict[int, dict[str, Any]], int]:
    """Divide a saved optimizer state.

    Args:
        state_dict: As `torch.optim.Optimizer.state_dict` gives it.
        groups: The parameter groups it is to be loaded into.

    Returns:
        The curvature's entries by parameter id, the update rule's by parameter number, and the number of steps taken.

    Raises:
        StateError: It has not the form of an optimizer's state.
    """
    _check_form(state_dict)
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    ours, theirs, step = {}, {}, 0
    for number, parameter in zip(
        numbers, parameters, strict=False
    ):  # torch refuses groups of other sizes
        entry = state_dict["state"].get(number, {})
        step = int(entry.get(STEP, step))
        if flat := {
            key: value for key, value in entry.items() if key.startswith(PREFIX) and key != STEP
        }:
            ours[id(parameter)] = flat
        if rest := {key: value for key, value in entry.items() if not key.startswith(PREFIX)}:
            theirs[number] = rest
            if wrong := sorted(
                key
                for key, value in rest.items()
                if isinstance(value, Tensor) and bool(torch.isnan(value).any())
            ):
                raise StateError(
                    f"the saved state is damaged: the update rule's {', '.join(wrong)} holds NaN. Load an earlier one."
                )
    return ours, theirs, step


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Hold the form that torch gives to an optimizer's state, as far as it is read here."""
    entries, groups = (
        state_dict.get(name) if isinstance(state_dict, Mapping) else None
        for name in ("state", "param_groups")
    )
    steps = (
        [e.get(STEP, 0) for e in entries.values() if isinstance(e, Mapping)]
        if isinstance(entries, Mapping)
        else []
    )
    good = isinstance(entries, Mapping) and all(
        isinstance(entry, Mapping) for entry in entries.values()
    )
    good = (
        good
        and isinstance(groups, list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
    )
    if not good or not all(_is_count(step) for step in steps):
        raise StateError(
            'the saved state is damaged: it must hold "state", a dict of dicts, and "param_groups", a list of dicts with "params", with a '
            "number of steps in each entry, as Optimizer.state_dict() gives them. Load an earlier one."
        )


def _is_count(step: Any) -> bool:
    if isinstance(step, Tensor):
        return step.numel() == 1 and bool(torch.isfinite(step).all()) and bool((step >= 0).all())
    return isinstance(step, int) and step >= 0


@contextlib.contextmanager
def all_or_nothing(*optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Around the taking over of a saved state: when it fails, the optimizers have the state and groups they had.

    Raises:
        StateError: An update rule does not find in the state what it needs.
    """
    before = [(optimizer, optimizer.state, optimizer.param_groups) for optimizer in optimizers]
    try:
        yield
    except BaseException as error:
        for optimizer, state, groups in before:
            optimizer.state, optimizer.param_groups = state, groups
        if isinstance(error, AttributeError | LookupError | TypeError):
            raise StateError(
                f"the update rule cannot take over the saved state ({type(error).__name__}: {error}): something of it is missing or is "
                "another rule's. Bind the recipe it was saved with, or load an earlier one."
            ) from error
        raise


def completed_groups(
    saved: Groups, current: Groups, known: Mapping[str, Any], rule: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Saved parameter groups, with the current values of what a bare update rule's, or an older torch's, do not have.

    Args:
        saved: From the state to be loaded.
        current: The groups it is loaded into.
        known: All hyperparameters there are.
        rule: Those of the update rule. Numbers among them have always been there, so that groups without them are another rule's.

    Raises:
        StateError: The groups are another update rule's.
        OptionError: A learning rate, damping or weight decay is no such number.
    """
    numbers = [
        name
        for name, value in rule.items()
        if isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
    ]
    for group in saved:
        if lacking := sorted(name for name in numbers if name not in group):
            raise StateError(
                f"the saved state is another update rule's: its parameter groups have no {', '.join(lacking)}. Bind the recipe it was "
                "saved with."
            )
        for name in ("lr", "damping", "weight_decay"):
            if name in group:
                number_at(f"{name} of a saved parameter group", plain(group[name]), 0)
    if len(saved) != len(current):  # torch says so
        return [dict(group) for group in saved]
    return [
        {**{name: own[name] for name in known if name in own}, **group}
        for own, group in zip(current, saved, strict=True)
    ]


class StatefulOptimizer(torch.optim.Optimizer):
    """The part of `Optimizer` that deals with saved states."""

    _preconditioner: Preconditioner
    _inner: torch.optim.Optimizer
    _verdicts: NonFiniteGuard
    _step: Tensor
    _brought: dict[str, dict[str, Tensor]]
    """Of each layer what came from other ranks, between `consolidate_state_dict` and the next step."""

    def _taken_over(self) -> None:
        """What there is to do after a state was loaded."""
        raise NotImplementedError

    def _prepare_places(self) -> None:
        """Let layers that were added since find their places; a collective call."""
        raise NotImplementedError

    def _show_state(self) -> None:
        """Bring `state` up to date: the update rule's entries by reference, and the curvature's."""
        pre, gathered_state = self._preconditioner, self._brought
        flat = {
            id(layer.tensors()["weight"]): pre.flat(layer.name) | gathered_state.get(layer.name, {})
            for layer in pre.layers()
        }
        for group in self.param_groups:
            for parameter in group["params"]:
                inner = self._inner.state.get(parameter, {})
                if parameter.requires_grad or inner:
                    self.state[parameter] = {
                        **inner,
                        STEP: self._step,
                        **flat.get(id(parameter), {}),
                    }

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change of curvature: `state` does not show it, lest old tensors live there beside the new ones."""
        layers = (
            self._preconditioner.layers()
            if self._preconditioner.plan(int(self._step)).due()
            else []
        )
        weights = [
            weight for layer in layers if (weight := layer.tensors()["weight"]) in self.state
        ]
        for weight in weights:  # saved states hold the entries themselves
            self.state[weight] = {
                key: value
                for key, value in self.state[weight].items()
                if key == STEP or not key.startswith(PREFIX)
            }
        try:
            yield
        finally:
            if weights:
                self._show_state()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as torch's own optimizers give it: take it between steps.

        Where ranks share the curvature this is the part of this rank. `torch.distributed.checkpoint` puts parts together; for one file,
        call `consolidate_state_dict` before.
        """
        self._verdicts.read()
        if int(self._step) or self._inner.state:
            self._show_state()
        return super().state_dict()

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Bring what other ranks have of the curvature to one rank, so that its `state_dict()` is the whole, until the next step.

        Every rank calls it. In one process, and where every rank has everything (placement `replicated`), nothing is moved. What arrives
        lies in the memory of the CPU. The update rule's state is on every rank already; with `fully_shard` it stays in shards. The
        method is that of `torch.distributed.optim.ZeroRedundancyOptimizer`, and Lightning calls it by itself.

        Args:
            to: The rank whose `state_dict()` is to be whole, counted within the placement's process group; `None` for all ranks.

        Raises:
            OptionError: There is no such rank.

        Example:
            >>> import kfactk, torch
            >>> optimizer = kfactk.build().bind(torch.nn.Linear(3, 2))
            >>> optimizer.consolidate_state_dict()  # on every rank; then on rank 0:
            >>> saved = optimizer.state_dict()
        """
        pre = self._preconditioner
        flat = {layer.name: pre.states[layer.name].flat() for layer in pre.layers()}
        device = next(
            (parameter.device for group in self.param_groups for parameter in group["params"]),
            torch.device("cpu"),
        )
        self._brought = gather_state(flat, pre.ranks, to, device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; that of the bare update rule (say, a plain Adam run) is welcome too.

        A whole state can be loaded under any placement and on any number of ranks: each takes what it needs. Every rank calls it, and
        all of them take over or none.

        Raises:
            StateError: Its curvature or its update rule is not this model's and recipe's, or something of it is missing, on this rank or
                another; nothing has been changed.
            ValueError: The parameter groups do not fit (torch's own check).
        """
        self._prepare_places()
        with load_on_all_ranks(self._preconditioner.ranks) as agree:
            ours, theirs, step = split_entries(state_dict, self.param_groups)
            groups = completed_groups(
                state_dict["param_groups"], self.param_groups, self.defaults, self._inner.defaults
            )
            states = self._preconditioner.loaded(ours)
            with all_or_nothing(self, self._inner):
                super().load_state_dict({**state_dict, "state": theirs, "param_groups": groups})
                self._inner.__setstate__(
                    {"state": defaultdict(dict, self.state), "param_groups": self.param_groups}
                )
                agree(Progress.of(step, states))
        self.state = defaultdict(dict)
        self._step = torch.tensor(step, dtype=torch.int64)
        self._brought = {}
        self._preconditioner.adopt(states)
        if state_dict["state"]:
            self._show_state()
        self._taken_over()

    def __reduce__(self) -> NoReturn:
        raise KfactkError(
            "an optimizer cannot be copied or pickled: it is bound to its model by hooks. Save optimizer.state_dict(), and load it into "
            "recipe.bind(model) where it is wanted."
        )
