"""`Links`: the layers that a link joins, what it measures of them together, and its correction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs
from torch import Tensor

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.packing import TensorSpec, sum_of_bits
from kfactk.errors import (
    CaptureError,
    CombinationError,
    DecompositionError,
    KfactkError,
    PluginError,
)
from kfactk.preconditioner.block import Block, LazyMatrices
from kfactk.preconditioner.coverage import Coverage, Row
from kfactk.preconditioner.damage import Damage
from kfactk.preconditioner.forms import precise
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.planner import StepPlan
from kfactk.preconditioner.state import PREFIX, PREPARED, BlockState
from kfactk.samples import LayerCall, Samples, Statistic
from kfactk.stages import Layer, Link, LinkedLayer, Tensors
from kfactk.statistics import RunningMean, add_prefix, add_sums, drop_nonfinite
from kfactk.timing import StageTimer
from kfactk.validation import attribute_errors, check_statistics, stage_label

LINK = "link"
"""Kind of the link's statistics among those of the block that they are saved with."""


class Links:
    """What the link of a recipe does with the blocks of one model.

    In a forward: `follow`, `plan`, `take` for each layer, `end_pass`, `commit`. In a step:
    `hand_over`, `prepare`, then `correct`, then `finish`.

    Args:
        link: The stage; `None` where the recipe has none, and nothing is done.
        placement: Says who holds what.
        communicator: Joins the ranks.
        timer: Times the stages.
    """

    def __init__(
        self,
        link: Link | None,
        placement: BlockPlacement,
        communicator: Communicator,
        timer: StageTimer,
    ) -> None:
        self._link, self._placement, self._timer = link, placement, timer
        self._communicator = communicator
        self.blocks: tuple[Block, ...] = ()
        self._found_in: list[Block] | None = None
        self._measured: tuple[Block, ...] = ()
        self._due = False
        self._rows: dict[object, dict[str, Tensors]] = {}
        self._places: dict[object, dict[str, list[int]]] = {}
        self._staged: dict[str, Statistic] = {}
        self._pending: dict[tuple[Block, ...], dict[str, Statistic]] = {}

    @property
    def _stage(self) -> Link:
        assert self._link is not None
        return self._link

    # ---------------------------------------------------------------------------- which layers

    def follow(self, blocks: Sequence[Block]) -> None:
        """Find which of the blocks are joined now."""
        if self._link is None or self._found_in == list(blocks):
            return
        self.blocks = tuple(ordered(self._link, blocks))
        self._found_in = list(blocks)

    @property
    def joins_none(self) -> bool:
        """Whether there is a link, and no two layers that it joins: it leaves one as it is."""
        return self._link is not None and len(self.blocks) < 2

    def check_holders(self) -> None:
        """Check that every rank preconditions, and keeps what the link reads of, each layer.

        Raises:
            CombinationError: Other ranks hold a layer, or nobody keeps what the link reads of it,
                or measures gradients of it.
        """
        for block in self.blocks:
            if block.inputs_suffice:
                raise CombinationError(
                    f"{stage_label('link', self._link)} measures layers on gradients of samples, "
                    f"and layer {block.name!r} has a basis that requires its inputs alone. Choose "
                    "another basis for it, or leave out the link."
                )
            if missing := sorted(self._stage.requires - block.requires):
                raise CombinationError(
                    f"{stage_label('link', self._link)} reads {', '.join(missing)} of layer "
                    f"{block.name!r}, which its basis does not require, so that nobody keeps it. "
                    "Choose another basis for it, or leave out the link."
                )
            ranks = self._placement.gradient_workers(block.name)
            kept = {
                name: self._placement.factor_workers(block.name, name)
                for name in self._stage.requires
            }
            whole = self._placement.everywhere(block.name)
            apart = [name for name, each in sorted(kept.items()) if len(each) < len(ranks)]
            if whole and not apart:
                continue
            strategy = self._placement.assignment.strategy
            if whole:
                raise CombinationError(
                    f"{stage_label('link', self._link)} reads {' and '.join(apart)} of layer "
                    f"{block.name!r}, so every rank must keep them, and the placement {strategy!r} "
                    "keeps them on some ranks alone. Use placement='replicated', or leave out the "
                    "link."
                )
            raise CombinationError(
                f"{stage_label('link', self._link)} joins layers, so every rank must hold all of "
                f"them, and the placement {strategy!r} has layer {block.name!r} on some ranks "
                "alone. Use placement='replicated', or leave out the link."
            )

    def _layers(self, dampings: Mapping[str, float] | None = None) -> list[LinkedBlock]:
        known = dampings or {}
        return [linked(block, known.get(block.name, block.damping)) for block in self.blocks]

    # ------------------------------------------------------------------------------- measuring

    def plan(self, plan: StepPlan) -> None:
        """Note whether the step measures the layers together: where it refreshes all factors."""
        plans = plan.plans
        self._due = bool(self.blocks) and all(b in plans and plans[b].factors for b in self.blocks)

    def take(
        self, number: object, block: Block, samples: Samples, calls: Sequence[LayerCall]
    ) -> None:
        """Keep what the link needs of one layer in one pass.

        Args:
            number: What tells the pass from others that are not at their end.
            block: The layer's block.
            samples: What the layer saw.
            calls: The calls that the samples are of.
        """
        if not self._due or block not in self.blocks:
            return
        layer = linked(block, block.damping)
        with self._timer.timed("factors"), self._errors(f"on layer {block.name!r}"):
            self._rows.setdefault(number, {})[block.name] = dict(self._stage.rows(layer, samples))
        places = [call.place for call in calls if call.place is not None]
        self._places.setdefault(number, {})[block.name] = places

    def end_pass(self, number: object, num_terms: Tensor | float) -> str | None:
        """Sum up what the layers of one pass give together.

        Args:
            number: As for `take`.
            num_terms: Number of likelihood terms of the forward; 0 on later passes over it.

        Returns:
            What the user should know of how the layers ran, if anything.

        Raises:
            CaptureError: Layers do not have the same examples, or cannot be joined as they ran.
        """
        rows, places = self._rows.pop(number, {}), self._places.pop(number, {})
        if not self._due:
            return None
        self._check_examples(rows)
        with self._errors("on its layers"):
            told = self._stage.remark(self._layers(), rows, places)
        with self._timer.timed("factors"):
            add_sums(self._staged, self._sums(rows, num_terms))
        return told

    def _sums(self, rows: Mapping[str, Tensors], num_terms: Tensor | float) -> dict[str, Statistic]:
        with self._errors("on its layers"):
            found = self._stage.statistics(self._layers(), rows, num_terms)
        checked = check_statistics(LINK, self._link, "on its layers", found, required=False)
        return add_prefix(LINK, checked)

    def _check_examples(self, rows: Mapping[str, Tensors]) -> None:
        counts = {
            name: len(tensor) for name, tensors in rows.items() for tensor in tensors.values()
        }
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name!r} {count}" for name, count in counts.items())
            raise CaptureError(
                f"{stage_label('link', self._link)} pairs the layers' examples, and layers have "
                f"different numbers of them: {told}. Tell the curvature which dimension counts the "
                "examples (batch_dim), leave layers out by exclude=[...], or leave out the link."
            )

    def commit(self) -> None:
        """End a forward: add its sums to those of the step, or nothing if any is not finite."""
        if self._staged:
            flags = self.blocks[0].state.nonfinite
            mine = self._pending.setdefault(self.blocks, {})
            add_sums(mine, drop_nonfinite(self._staged, flags))
        self._staged = {}

    def rollback(self) -> None:
        """Drop what the forward under way has given."""
        self._staged = {}

    def drop(self, layers: Collection[Layer] | None = None) -> None:
        """Drop what these layers (`None`: all) have given in this step."""
        if layers is None:
            self._rows.clear()
            self._places.clear()
            self._pending.clear()
            return
        names = {layer.name for layer in layers}
        for number, rows in self._rows.items():
            for name in names & rows.keys():
                del rows[name], self._places[number][name]

    def hand_over(self) -> None:
        """Give the sums of the step to the block that they are saved with, to be reduced.

        Where other layers are joined than before, what was measured of these is dropped.
        """
        if not self._due:
            return
        if self._measured != self.blocks:
            for block in self.blocks:
                block.drop_links()
            self._measured = self.blocks
        self.blocks[0].state.pending.update(self._pending.get(self.blocks, {}))

    def finish(self) -> None:
        """End a step: drop what is pending."""
        self._rows.clear()
        self._places.clear()
        self._pending.clear()
        self._staged, self._due = {}, False

    # ------------------------------------------------------------------------------- preparing

    def prepare(self, renewed: Collection[Block]) -> Sequence[str]:
        """Prepare what the correction needs, where a basis of a joined layer was due.

        A collective call where there are several ranks: they go on with the same bits.

        Args:
            renewed: The blocks whose basis was due.

        Returns:
            What failed; what was prepared last stays in use.

        Raises:
            KfactkError: The stage failed otherwise, on this rank or another.
        """
        statistics = self._statistics()
        due = any(block in renewed for block in self.blocks)
        if not statistics or not due or not all(block.ready for block in self.blocks):
            return ()
        found: Mapping[str, Tensor] | None = None
        failures: tuple[str, ...] = ()
        fault: Exception | None = None
        try:
            with self._timer.timed("basis"), self._errors("preparing its correction"):
                made = self._stage.prepare(self._layers(), statistics)
                found = {name: tensor.contiguous() for name, tensor in made.tensors.items()}
            failures = tuple(made.failures)
        except DecompositionError as error:
            failures = (f"{stage_label('link', self._link)}: {error}",)
        except Exception as error:  # other ranks would wait for this one
            if self._communicator.size == 1:
                raise
            fault = error
        if self._communicator.size > 1:
            found = self._agreed(found, fault)
        if found is not None:
            self.blocks[0].keep_prepared(found)
        return failures

    @property
    def prepared(self) -> Tensors:
        """What `prepare` has made last; empty before."""
        return self.blocks[0].state.prepared if self.blocks else {}

    def keep_prepared(self, prepared: Tensors) -> None:
        """Go on with what was prepared before."""
        if prepared:
            self.blocks[0].keep_prepared(prepared)

    def prepare_for_damping(self) -> None:
        """Prepare again for dampings that are tried, where the link's `prepare` reads them.

        A collective call where there are several ranks. What cannot be prepared stays as it was.
        """
        if self._link is not None and self._link.damped_at == "refresh" and self.prepared:
            self.prepare(self.blocks)

    def _agreed(
        self, mine: Mapping[str, Tensor] | None, fault: Exception | None
    ) -> Mapping[str, Tensor] | None:
        """Return what the first rank made that made anything, the same on every rank.

        Raises:
            KfactkError: Another rank failed for a reason of its own.
        """
        bits = None if mine is None else {name: sum_of_bits(each) for name, each in mine.items()}
        told = None if fault is None else f"{type(fault).__name__}: {fault}"
        if self._communicator.same(repr((bits, told))) and fault is None:
            return mine
        specs = {name: TensorSpec.of(each) for name, each in (mine or {}).items()}
        reports = self._communicator.gathered((None if mine is None else specs, told))
        if fault is not None:
            raise fault
        for rank, (_, theirs) in enumerate(reports):
            if theirs is not None:
                raise KfactkError(
                    f"rank {rank} failed while it prepared what its link needs ({theirs}), and so "
                    "all ranks stop. Correct the cause on that rank, and start again."
                )
        source = next(rank for rank, (each, _) in enumerate(reports) if each is not None)
        device = self.blocks[0].layer.anchor.device
        everyone, found = self._communicator.everyone, dict(mine or {})
        for message in self._communicator.send(
            found, reports[source][0], source, everyone, "decompositions", device
        ):
            found |= message.wait()
        return found

    def _statistics(self) -> dict[str, Tensor]:
        """Return the averaged statistics; nothing before all layers have been measured together."""
        if not self.blocks or self._measured != self.blocks:
            return {}
        return self.blocks[0].state.link_values()

    # ------------------------------------------------------------------------------ correcting

    def solved(self, gradients: Collection[str]) -> frozenset[str]:
        """Return the names of the layers that the link solves for by itself."""
        alone = self._link is not None and self._link.solves
        if not alone or not self._statistics() or not self.blocks[0].state.prepared:
            return frozenset()
        here = [block for block in self.blocks if block.name in gradients]
        return frozenset(block.name for block in here if all(each.ready for each in here))

    def correct(
        self,
        gradients: Mapping[str, Tensor],
        preconditioned: Mapping[str, Tensor],
        dampings: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Return the preconditioned gradients with those of joined layers corrected.

        They stay as they are until the layers have been measured together.

        Args:
            gradients: By layer name, `[..., d_out, d_in]`.
            preconditioned: What the blocks made of them; gradients for those of `solved`.
            dampings: By layer name; `None` for those of the current step.
        """
        found = dict(preconditioned)
        here = [b for b in self.blocks if b.name in gradients and b.name in preconditioned]
        statistics = self._statistics()
        if not here or not statistics or not all(block.ready for block in here):
            return found
        statistics |= self.blocks[0].state.prepared
        names = [block.name for block in here]
        with self._errors("on the preconditioned gradients"):
            made = self._stage.correct(
                self._layers(dampings),
                {name: gradients[name] for name in names},
                {name: preconditioned[name] for name in names},
                statistics,
            )
        shapes = {name: tuple(each.shape) for name, each in made.items()}
        if shapes != {name: tuple(preconditioned[name].shape) for name in names}:
            raise PluginError(
                f"{stage_label('link', self._link)} gave shapes {shapes} for gradients of the "
                f"layers {names}. Report it to its authors, or leave out the link."
            )
        return found | dict(made)

    # ----------------------------------------------------------------------------------- state

    def allocate(self, names: Collection[str]) -> None:
        """Create the statistics without data, where a checkpoint can be loaded into them."""
        if self.blocks and self.blocks[0].name in names and not self.blocks[0].state.links:
            blank = self._sums({}, 0.0)
            means = {
                key.partition(".")[2]: RunningMean(each.total, 0.0) for key, each in blank.items()
            }
            self.blocks[0].state.links = means
            self.blocks[0].keep_prepared(self._blank_prepared(blank))
            self.blocks[0].invalidate()

    def _blank_prepared(self, sums: Mapping[str, Statistic]) -> Tensors:
        """Return what the link prepares without data."""
        layers = self._layers()
        if self._stage.requires:
            layers = [attrs.evolve(e, matrices=e.block.blank_matrices()) for e in layers]
        means = {n.partition(".")[2]: s.total for n, s in sums.items() if s.total is not None}
        with self._errors("preparing its correction"):
            return self._stage.prepare(layers, means).tensors

    def fit(self, states: Mapping[str, BlockState], damage: Damage) -> bool:
        """Keep of saved states what fits the layers that are joined now; check its values.

        Args:
            states: By layer name; changed in place.
            damage: Receives what is wrong with a tensor's values.

        Returns:
            Whether statistics were dropped, because they are of other layers.
        """
        owner = self.blocks[0].name if self.blocks else ""
        for name, state in states.items():
            if name != owner or self._link is None:
                state.links, state.prepared = {}, {}
        if not self.blocks or owner not in states or not states[owner].links:
            return False
        saved, sums = states[owner].links, self._sums({}, 0.0)
        blank = {key.partition(".")[2]: each for key, each in sums.items()}
        shapes = {n: tuple(each.total.shape) for n, each in blank.items() if each.total is not None}
        found = {n: tuple(each.value.shape) for n, each in saved.items() if each.value is not None}
        if shapes != found or any(block.name not in states for block in self.blocks):
            states[owner].links, states[owner].prepared = {}, {}
            return True
        self._fit_prepared(states[owner], sums, damage)
        for name, mean in saved.items():
            where = f"{PREFIX}{LINK}.{name} of layer {owner!r}"
            if mean.value is None or not precise(where, mean.value, damage):
                continue
            if blank[name].symmetric:
                damage.check_form(where, mean.value, "semidefinite")
        return False

    def _fit_prepared(
        self, state: BlockState, sums: Mapping[str, Statistic], damage: Damage
    ) -> None:
        """Check the shapes and dtypes of what the link had prepared, if anything."""
        owner, wanted = self.blocks[0].name, self._blank_prepared(sums)
        if state.prepared and state.prepared.keys() != wanted.keys():
            damage.note(
                f"{PREFIX}{PREPARED} of layer {owner!r} has the parts {sorted(state.prepared)}, "
                f"where the link makes {sorted(wanted)}"
            )
            return
        for name, tensor in state.prepared.items():
            where = f"{PREFIX}{PREPARED}.{name} of layer {owner!r}"
            if precise(where, tensor, damage) and tensor.shape != wanted[name].shape:
                damage.note(
                    f"{where} has the shape {tuple(tensor.shape)}, where the link makes "
                    f"{tuple(wanted[name].shape)}"
                )

    def loaded(self) -> None:
        """Take note that the blocks go on from other states, which fit the layers joined now."""
        self._measured = self.blocks
        self.finish()

    def _errors(self, where: str) -> attribute_errors:
        return attribute_errors(LINK, self._link, where)


@attrs.frozen(eq=False)
class LinkedBlock(LinkedLayer):
    """A layer as a link sees it, with its block, which attributes errors to the curvature."""

    block: Block = attrs.field(kw_only=True)

    @property
    def has_rows(self) -> bool:
        """Whether its curvature gives `factor_rows`."""
        return (
            not self.block.of_gradient
            and self.block.factor_rows(self.block.blank_samples()) is not None
        )

    def factor_rows(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return what `Curvature.factor_rows` gives of all examples."""
        found = self.block.factor_rows(samples)
        return LinkedLayer.factor_rows(self, samples) if found is None else found


def linked(block: Block, damping: float) -> LinkedBlock:
    """Return a block's layer as a link sees it."""
    return LinkedBlock(block.layer, block.shape, damping, LazyMatrices(block), block=block)


def ordered(link: Link, blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks whose layers a link joins, in its order, checked.

    Raises:
        CombinationError: It cannot join them.
        PluginError: It names others, or one twice.
    """
    block_of: dict[LinkedLayer, Block] = {linked(b, b.damping): b for b in blocks}
    with attribute_errors(LINK, link, "choosing its layers"):
        found = list(link.order(list(block_of)))
    if len(set(found)) < len(found) or not set(found) <= block_of.keys():
        raise PluginError(
            f"{stage_label('link', link)} chose {[each.name for each in found]} of the layers "
            f"{[each.name for each in blocks]}; it must choose some of them, each once. Report it "
            "to its authors, or leave out the link."
        )
    return [block_of[each] for each in found]


def with_link(
    coverage: Coverage, link: Link | None, label: str, blocks: Sequence[Block]
) -> Coverage:
    """Return a coverage table that says which blocks are joined.

    Args:
        coverage: The table.
        link: The link; `None` for none.
        label: Its name.
        blocks: The blocks.

    Raises:
        CombinationError: The link cannot join their layers.
    """
    joined = set() if link is None else {block.name for block in ordered(link, blocks)}

    def row(row: Row) -> Row:
        return attrs.evolve(row, linked=label) if row.block in joined else row

    return attrs.evolve(coverage, rows=tuple(map(row, coverage)))
