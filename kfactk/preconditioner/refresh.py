"""The refresh of curvature, inside `step()`: sums over ranks, means over time, decompositions, and moments in the new basis.

    sums of every rank -> keepers: mean over time -> decomposers: decompose -> holders, and every rank that has samples: moments -> holders

What is done, and in which order messages go, follows from the plan of the step, which is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.messages import PendingMessage
from kfactk.distributed.packing import TensorSpec
from kfactk.errors import DecompositionError, KfactkError
from kfactk.preconditioner.block import Blocks, diagonals
from kfactk.preconditioner.exchange import OverlappedReduction, merged
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.plan import BlockPlan
from kfactk.preconditioner.state import BlockState, Kept
from kfactk.samples import Statistic
from kfactk.stages import Layer
from kfactk.statistics import ReducedStatistic, RunningMean, add_sums, join_key, means, split_key

Damping = Callable[[Layer], float]
States = Mapping[str, BlockState]
Parts = dict[str, dict[str, Tensor]]


@attrs.frozen(eq=False)
class Refresh:
    """Refreshes the states of all layers.

    Args:
        blocks: The stages.
        places: Who does what.
        ranks: How it is moved.
        early: Sums that travel before the refresh.
        factor_decay: Decay of the factors' running means.
        timed: Gives a context that times a stage.
        failed: Told of a layer that could not be decomposed, and why.
    """

    blocks: Blocks
    places: BlockPlacement
    ranks: Communicator
    early: OverlappedReduction
    factor_decay: float
    timed: Callable[[str], AbstractContextManager[None]]
    failed: Callable[[str, str], None]

    def run(
        self,
        needs: Mapping[str, BlockPlan],
        states: States,
        unseen: Set[str],
        damping: Damping,
        early: Mapping[str, ReducedStatistic],
    ) -> None:
        """Refresh what is needed.

        Args:
            needs: By layer name.
            states: Likewise; with what is pending.
            unseen: Layers that no rank's samples reached.
            damping: Of a layer.
            early: Sums that travelled before.
        """
        for name in needs:
            states[name].settle()
        sums = {
            join_key(name, key): value
            for name in needs
            for key, value in states[name].pending.items()
        }
        followed = any(need.follows for need in needs.values())
        averages = means(merged(early, self._reduced(sums, "sums"))) if followed else {}
        averages = {
            key: value for key, value in averages.items() if split_key(key)[0] not in unseen
        }
        with self._timed("factors", any(need.factors or need.inputs for need in needs.values())):
            self._average(states, averages, "factor")
        due = [need.layer for name, need in needs.items() if need.basis and name not in unseen]
        previous: dict[str, Kept] = {layer.name: states[layer.name].keep() for layer in due}
        try:
            with self._timed("basis", bool(due)):
                made = self._decompose(due, states, damping)
            with self._timed(
                "scale",
                any(
                    need.scale or (need.basis and self.blocks.basis.moments_from)
                    for need in needs.values()
                ),
            ):
                self._average(states, averages, "moment")
                self._measure(
                    {name: need for name, need in needs.items() if name not in unseen}, states, made
                )
            for name in needs:
                states[name].retained.clear()
        except BaseException:  # moments stay together with the basis they were measured in
            for name, kept in previous.items():
                states[name].put_back(kept)
            raise

    def _timed(self, stage: str, due: bool) -> AbstractContextManager[None]:
        return self.timed(stage) if due else nullcontext()

    # ------------------------------------------------------------------------------------------------------------ means

    def _reduced(self, sums: Mapping[str, Statistic], what: str) -> dict[str, ReducedStatistic]:
        return self.ranks.reduce(sums, self.places.wanted, what, self.early.learn)

    def _average(self, states: States, averages: Mapping[str, Tensor | None], kind: str) -> None:
        for key, value in averages.items():
            layer, rest = split_key(key)
            if value is not None and rest.startswith(f"{kind}.") and layer in states:
                state = states[layer]
                target, decay = (
                    (state.factors, self.factor_decay)
                    if kind == "factor"
                    else (state.moments, self.blocks.basis.moment_decay)
                )
                target.setdefault(rest.removeprefix(f"{kind}."), RunningMean()).update(value, decay)

    # --------------------------------------------------------------------------------------------------- decompositions

    def _decompose(
        self, due: Sequence[Layer], states: States, damping: Damping
    ) -> dict[str, Parts]:
        """Decompose what this rank decomposes; for each layer whose matrices all were, somewhere, this rank's part."""
        made: dict[str, Parts] = {}
        errors: dict[str, str] = {}
        fault: Exception | None = None
        known = self._diagonals([layer for layer in due if self.places.apart(layer.name)], states)
        try:
            for layer in due:
                matrices = self._matrices(layer, states[layer.name])
                if not matrices:
                    continue
                try:
                    context = known.get(layer.name) or diagonals(matrices)
                    needed = {
                        name: matrices[name] for name in self.places.decomposed_here(layer.name)
                    }
                    last = states[layer.name].decomposition if states[layer.name].ready else {}
                    made[layer.name] = self.blocks.decompose(
                        layer, needed, damping(layer), context, last
                    )
                except DecompositionError as error:
                    errors[layer.name] = str(error)
        except Exception as error:
            if not any(self.places.divided(layer.name) for layer in due):
                raise
            fault = error
        if any(self.places.divided(layer.name) for layer in due):
            made, errors = self._agreed(due, states, made, errors, fault)
        for name, reason in errors.items():
            self.failed(name, reason)
        return made

    def _matrices(self, layer: Layer, state: BlockState) -> dict[str, Tensor]:
        names = self.places.decomposed_here(layer.name)
        return (
            self.blocks.matrices(layer, state.factor_values(), names)
            if names and state.measured
            else {}
        )

    def _diagonals(self, layers: Sequence[Layer], states: States) -> dict[str, dict[str, Tensor]]:
        """The mean diagonals of layers whose matrices lie on different ranks, each rank telling its own."""
        numbers: list[float] = []
        spans: list[tuple[str, str, slice, tuple[int, ...]]] = []
        mine: dict[str, Tensor] = {}
        for layer in layers:
            matrices = self._matrices(layer, states[layer.name])
            if matrices:
                mine[layer.name] = next(iter(matrices.values()))
            found = diagonals(matrices)
            for name, shape in self.places.shapes(layer.name).items():
                if len(shape) < 2 or shape[-1] != shape[-2]:
                    continue
                size = torch.Size(shape[:-2]).numel()
                told = (
                    name in found
                    and self.places.share(layer.name).inverse_workers[name][0] == self.ranks.rank
                )
                spans.append(
                    (layer.name, name, slice(len(numbers), len(numbers) + size), shape[:-2])
                )
                numbers += found[name].double().reshape(-1).tolist() if told else [0.0] * size
        joined = self.ranks.total(numbers)
        result: dict[str, dict[str, Tensor]] = {}
        for layer_name, name, span, shape in spans:
            if (like := mine.get(layer_name)) is not None:
                result.setdefault(layer_name, {})[name] = like.new_tensor(joined[span]).reshape(
                    shape
                )
        return result

    def _agreed(
        self,
        due: Sequence[Layer],
        states: States,
        made: dict[str, Parts],
        errors: dict[str, str],
        fault: Exception | None,
    ) -> tuple[dict[str, Parts], dict[str, str]]:
        """Made and errors after every rank has told the others what became of its part."""
        specs = {
            layer: {name: _forms(parts) for name, parts in found.items()}
            for layer, found in made.items()
        }
        reports = self.ranks.gathered(
            (specs, errors, None if fault is None else f"{type(fault).__name__}: {fault}")
        )
        if fault is not None:
            raise fault
        for rank, (_, _, theirs) in enumerate(reports):
            if theirs is not None:
                raise KfactkError(
                    f"rank {rank} failed while it decomposed curvature ({theirs}), and so all ranks stop. Mend it there."
                )
        errors = {name: reason for _, theirs, _ in reports for name, reason in theirs.items()}
        whole: dict[str, Parts] = {}
        for layer in due:
            found: dict[str, dict[str, TensorSpec]] = {}
            for theirs, _, _ in reports:
                found |= theirs.get(layer.name, {})
            if layer.name not in errors and set(found) == set(self.blocks.basis.requires):
                states[layer.name].specs = found
                whole[layer.name] = made.get(layer.name, {})
        return whole, errors

    # ---------------------------------------------------------------------------------------------------------- moments

    def _measure(
        self, needs: Mapping[str, BlockPlan], states: States, made: Mapping[str, Parts]
    ) -> None:
        """Bring decompositions to where they are needed, and measure moments on the samples that were kept for them."""
        sampled = self.blocks.basis.moments_from == "samples"
        late = [
            name
            for name, need in needs.items()
            if name in made or (need.late and states[name].ready)
        ]
        if not all(self.places.everywhere(name) for name in late):
            self._learn_forms(late, states, made)
        sums: dict[str, Statistic] = {}
        carried: dict[str, dict[str, RunningMean]] = {}
        for name, whole in self._visits(late, states, made, needs):
            state, layer = states[name], needs[name].layer
            for samples in state.retained if sampled else ():
                if samples.first:
                    state.settle()
                add_sums(state.staged, self.blocks.moments(layer, whole, samples))
            state.settle()
            sums |= {
                join_key(name, key): value
                for key, value in state.pending.items()
                if key.startswith("moment.")
            }
            state.retained.clear()
            if name in made:
                if self.places.holds(name):
                    if state.decomposition and state.moments:
                        there = self.blocks.transport(
                            layer, state.moment_values(), state.decomposition, whole
                        )
                        carried[name] = {
                            n: RunningMean(there[n], mean.weight)
                            for n, mean in state.moments.items()
                            if n in there
                        }
                    state.decomposition = whole
                state.ready = True
        averages = means(self._reduced(sums, "moments")) if sampled and late else {}
        for name, moments in carried.items():
            states[name].moments = moments
        self._average(states, averages, "moment")

    def _visits(
        self,
        late: Sequence[str],
        states: States,
        made: Mapping[str, Parts],
        needs: Mapping[str, BlockPlan],
    ) -> Iterator[tuple[str, Parts]]:
        """Layers with their whole decomposition, as far as this rank needs it; the next layer's is under way meanwhile."""
        begun: list[tuple[str, Parts, list[PendingMessage]]] = []
        for name in late:
            own = made[name] if name in made else states[name].decomposition
            begun.append(
                (
                    name,
                    dict(own),
                    self._fetch(needs[name], states[name], own, refreshed=name in made),
                )
            )
            if len(begun) > 1:
                yield self._arrived(*begun.pop(0))
        for each in begun:
            yield self._arrived(*each)

    def _fetch(
        self, need: BlockPlan, state: BlockState, own: Parts, *, refreshed: bool
    ) -> list[PendingMessage]:
        found: list[PendingMessage] = []
        device = need.layer.tensors()["weight"].device
        messages: dict[tuple[int, tuple[int, ...]], list[str]] = {}
        for matrix, route in sorted(
            self.places.routes(need.layer.name, refreshed=refreshed, visiting=need.scale).items()
        ):
            if self.ranks.rank in route[1]:
                messages.setdefault(route, []).append(matrix)
        for (source, members), matrices in messages.items():
            specs = {
                f"{matrix}|{part}": form
                for matrix in matrices
                for part, form in state.specs[matrix].items()
            }
            mine = self.ranks.rank == source
            tensors = (
                {
                    f"{matrix}|{part}": own[matrix][part]
                    for matrix in matrices
                    for part in own[matrix]
                }
                if mine
                else {}
            )
            found += self.ranks.send(tensors, specs, source, members, "decompositions", device)
        return found

    @staticmethod
    def _arrived(name: str, own: Parts, messages: Sequence[PendingMessage]) -> tuple[str, Parts]:
        for message in messages:
            for key, tensor in message.wait().items():
                matrix, _, part = key.partition("|")
                own[matrix] = {**own.get(matrix, {}), part: tensor}
        return name, own

    def _learn_forms(self, late: Sequence[str], states: States, made: Mapping[str, Parts]) -> None:
        """After a state was loaded, ranks that hold nothing of a layer do not know what its decomposition looks like."""
        asked = [name for name in late if name not in made and not self.places.everywhere(name)]
        if not self.ranks.any(any(not states[name].specs for name in asked)):
            return
        mine = {
            name: {m: _forms(parts) for m, parts in states[name].decomposition.items()}
            for name in asked
        }
        for theirs in self.ranks.gathered(mine):
            for name, specs in theirs.items():
                states[name].specs = specs or states[name].specs


def _forms(parts: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in parts.items()}
