"""What an optimizer keeps between steps: shown in `state`, saved, and taken over."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from kfactk.errors import KfactkError
from kfactk.gathering import Control, brought, together
from kfactk.layerstate import PREFIX, STEP, all_or_nothing, completed_groups, split_entries
from kfactk.preconditioner import Preconditioner
from kfactk.verdicts import Verdicts


class StatefulOptimizer(torch.optim.Optimizer):
    """The part of `Optimizer` that deals with saved states."""

    _preconditioner: Preconditioner
    _inner: torch.optim.Optimizer
    _verdicts: Verdicts
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
        pre, brought = self._preconditioner, self._brought
        flat = {id(layer.tensors()["weight"]): pre.flat(layer.name) | brought.get(layer.name, {}) for layer in pre.layers()}
        for group in self.param_groups:
            for parameter in group["params"]:
                inner = self._inner.state.get(parameter, {})
                if parameter.requires_grad or inner:
                    self.state[parameter] = {**inner, STEP: self._step, **flat.get(id(parameter), {})}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change of curvature: `state` does not show it, lest old tensors live there beside the new ones."""
        layers = self._preconditioner.layers() if self._preconditioner.plan(int(self._step)).due() else []
        weights = [weight for layer in layers if (weight := layer.tensors()["weight"]) in self.state]
        for weight in weights:  # saved states hold the entries themselves
            self.state[weight] = {key: value for key, value in self.state[weight].items() if key == STEP or not key.startswith(PREFIX)}
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
        device = next((parameter.device for group in self.param_groups for parameter in group["params"]), torch.device("cpu"))
        self._brought = brought(flat, pre.ranks, to, device)

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
        with together(self._preconditioner.ranks) as agree:
            ours, theirs, step = split_entries(state_dict, self.param_groups)
            groups = completed_groups(state_dict["param_groups"], self.param_groups, self.defaults, self._inner.defaults)
            states = self._preconditioner.loaded(ours)
            with all_or_nothing(self, self._inner):
                super().load_state_dict({**state_dict, "state": theirs, "param_groups": groups})
                self._inner.__setstate__({"state": defaultdict(dict, self.state), "param_groups": self.param_groups})
                agree(Control.of(step, states))
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
