"""`CoverageWatch`: tells when trained parameters have lost their block after bind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from torch import nn

from kfactk.preconditioner.coverage import ModelSurvey

SHOWN_NAMES = 6
"""How many names a warning gives."""


class CoverageWatch:
    """Compares what is preconditioned before and after each change of the model or of the groups.

    Who freezes a parameter, or takes it out of `param_groups`, knows of it. Who replaces parameters
    in the model, or in the groups, may not.

    Args:
        survey: Finds the layers.
    """

    def __init__(self, survey: ModelSurvey) -> None:
        self._survey = survey
        self._seen: tuple[Any, ...] | None = None
        self._model: dict[int, str] = {}
        self._trained: frozenset[int] = frozenset()
        self._covered: dict[int, tuple[str, nn.Parameter]] = {}
        self._any = False

    def look(self, trained: Sequence[nn.Parameter], *, any_layer: bool) -> str:
        """Return what was lost since the last look, and what to do; empty where nothing was.

        Args:
            trained: The parameters that the optimizer trains.
            any_layer: Whether any layer is preconditioned now.
        """
        ids = [id(parameter) for parameter in trained]
        seen = self._survey.tracker.signature, ids
        had_any, self._any = self._any, any_layer
        if seen == self._seen and (any_layer or not had_any):
            return ""
        before, before_trained, first = self._covered, self._trained, self._seen is None
        same_model = self._seen is not None and self._seen[0] == seen[0]
        known = self._model.keys()
        self._seen, self._trained = seen, frozenset(ids)
        self._model = {id(p): name for name, p in self._survey.parameters()}
        self._covered = self._covered_now()
        if first:
            return ""
        told = [
            *self._replaced(before, known),
            *self._strangers(before, before_trained),
            *self._without_block(before),
        ]
        if not told and had_any and not any_layer and not same_model:
            told = self._all_lost()
        if not told:
            return ""
        return (
            f"the model or param_groups changed after bind: {'; '.join(told)}. See "
            "print(optimizer.coverage())"
        )

    def _covered_now(self) -> dict[int, tuple[str, nn.Parameter]]:
        """Return the trained parameters that have a block while they are not frozen."""
        return {
            id(parameter): (name, parameter)
            for name, parameter in self._survey.candidate_parameters()
            if id(parameter) in self._trained
        }

    def _replaced(
        self, before: Mapping[int, tuple[str, nn.Parameter]], known: Set[int]
    ) -> list[str]:
        """Tell of parameters that are trained, where the model has others instead of them.

        Args:
            before: What had a block.
            known: Ids of the parameters that the model had.
        """
        gone = [
            name
            for key, (name, _) in before.items()
            if key in self._trained and key not in self._model
        ]
        new = [
            name
            for key, name in self._model.items()
            if key not in self._trained
            and key not in known
            and any(name.startswith(old[: old.rfind(".") + 1]) for old in gone)
        ]
        if not new:
            return []
        return [
            f"{_listed(new)} of the model are new parameters, and the optimizer still trains the "
            "old ones, which the model no longer has (load_state_dict(assign=True), weight_norm "
            "and model surgery do that). Bind after such a change, or put the new parameters in "
            "param_groups"
        ]

    def _strangers(
        self, before: Mapping[int, tuple[str, nn.Parameter]], before_trained: frozenset[int]
    ) -> list[str]:
        """Tell of parameters that have come into the groups and are not the model's."""
        lost = [name for key, (name, _) in before.items() if key not in self._trained]
        new = self._trained - before_trained - self._model.keys()
        if not lost or not new:
            return []
        return [
            f"param_groups hold {len(new)} tensors that are not the model's, in place of "
            f"{_listed(lost)} (a wrapper that flattens parameters does that, such as DeepSpeed's "
            "ZeRO). The update rule alone trains them. Use DistributedDataParallel or fully_shard, "
            "which leave parameters their form"
        ]

    def _without_block(self, before: Mapping[int, tuple[str, nn.Parameter]]) -> list[str]:
        """Tell of trained parameters whose layer can have no block any more, with the reason."""
        lost: dict[str, list[str]] = {}
        for key, (_, parameter) in before.items():
            trained = key in self._trained and parameter.requires_grad
            if trained and key in self._model and key not in self._covered:
                name = self._model[key]
                lost.setdefault(self._survey.why_not(name), []).append(name)
        if not lost:
            return []
        listed = ", ".join(f"{_listed(names)} ({reason})" for reason, names in lost.items())
        return [
            f"{listed} have lost their block, and train with the plain gradient. Undo the change, "
            "or bind anew to choose another curvature"
        ]

    def _all_lost(self) -> list[str]:
        """Tell that no layer is left, and which parameters the optimizer does not train."""
        outside = [
            name
            for name, parameter in self._survey.parameters()
            if id(parameter) not in self._trained and parameter.requires_grad
        ]
        whose = f", and not {_listed(outside)} of the model" if outside else ""
        return [
            "no layer is preconditioned any more. The optimizer's parameters are frozen, or no "
            f"longer the model's{whose} (adapters such as peft's do that). Bind after such a "
            "change, or put the new parameters in param_groups"
        ]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
