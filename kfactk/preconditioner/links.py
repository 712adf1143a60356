"""`Links`: the layers that a link joins, what it measures of them together, and its correction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs
from torch import Tensor

from kfactk.errors import CaptureError, CombinationError, PluginError
from kfactk.preconditioner.block import Block, LazyMatrices
from kfactk.preconditioner.coverage import Coverage, Row
from kfactk.preconditioner.damage import Damage
from kfactk.preconditioner.forms import precise
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.planner import StepPlan
from kfactk.preconditioner.state import PREFIX, BlockState
from kfactk.samples import Samples, Statistic
from kfactk.stages import Layer, Link, LinkedLayer, Tensors
from kfactk.statistics import RunningMean, add_prefix, add_sums, drop_nonfinite
from kfactk.timing import StageTimer
from kfactk.validation import attribute_errors, check_statistics, stage_label

LINK = "link"
"""Kind of the link's statistics among those of the block that they are saved with."""


class Links:
    """What the link of a recipe does with the blocks of one model.

    In a forward: `follow`, `plan`, `take` for each layer, `end_pass`, `commit`. In a step:
    `hand_over`, then `correct`, then `finish`.

    Args:
        link: The stage; `None` where the recipe has none, and nothing is done.
        placement: Says who holds what.
        timer: Times the stages.
    """

    def __init__(self, link: Link | None, placement: BlockPlacement, timer: StageTimer) -> None:
        self._link, self._placement, self._timer = link, placement, timer
        self.blocks: tuple[Block, ...] = ()
        self._found_in: list[Block] | None = None
        self._measured: tuple[Block, ...] = ()
        self._due = False
        self._rows: dict[object, dict[str, Tensors]] = {}
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
        block_of = {block.layer: block for block in blocks}
        self.blocks = tuple(block_of[layer] for layer in ordered(self._link, list(block_of)))
        self._found_in = list(blocks)

    def check_holders(self) -> None:
        """Check that every rank preconditions, and keeps what the link reads of, each layer.

        Raises:
            CombinationError: Other ranks hold a layer.
        """
        for block in self.blocks:
            ranks = self._placement.gradient_workers(block.name)
            kept = {
                name: self._placement.factor_workers(block.name, name)
                for name in self._stage.requires
            }
            whole = self._placement.everywhere(block.name)
            if whole and all(len(each) == len(ranks) for each in kept.values()):
                continue
            strategy = self._placement.assignment.strategy
            raise CombinationError(
                f"{stage_label('link', self._link)} joins layers, so every rank must hold all of "
                f"them, and the placement {strategy!r} has layer {block.name!r} on some ranks "
                "alone. Use placement='replicated', or leave out the link."
            )

    def _layers(self, dampings: Mapping[str, float] | None = None) -> list[LinkedLayer]:
        known = dampings or {}
        return [_linked(block, known.get(block.name, block.damping)) for block in self.blocks]

    # ------------------------------------------------------------------------------- measuring

    def plan(self, plan: StepPlan) -> None:
        """Note whether the step measures the layers together: where it refreshes all factors."""
        plans = plan.plans
        self._due = bool(self.blocks) and all(b in plans and plans[b].factors for b in self.blocks)

    def take(self, number: object, block: Block, samples: Samples) -> None:
        """Keep what the link needs of one layer in one pass.

        Args:
            number: What tells the pass from others that are not at their end.
            block: The layer's block.
            samples: What the layer saw.
        """
        if not self._due or block not in self.blocks:
            return
        layer = _linked(block, block.damping)
        with self._timer.timed("factors"), self._errors(f"on layer {block.name!r}"):
            self._rows.setdefault(number, {})[block.name] = dict(self._stage.rows(layer, samples))

    def end_pass(self, number: object, num_terms: Tensor | float) -> None:
        """Sum up what the layers of one pass give together.

        Args:
            number: As for `take`.
            num_terms: Number of likelihood terms of the forward; 0 on later passes over it.

        Raises:
            CaptureError: Layers do not have the same examples.
        """
        rows = self._rows.pop(number, {})
        if not self._due:
            return
        self._check_examples(rows)
        with self._timer.timed("factors"):
            add_sums(self._staged, self._sums(rows, num_terms))

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
            self._pending.clear()
            return
        names = {layer.name for layer in layers}
        for rows in self._rows.values():
            for name in names & rows.keys():
                del rows[name]

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
        self._pending.clear()
        self._staged, self._due = {}, False

    # ------------------------------------------------------------------------------ correcting

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
            preconditioned: What the blocks made of them.
            dampings: By layer name; `None` for those of the current step.
        """
        found = dict(preconditioned)
        here = [b for b in self.blocks if b.name in gradients and b.name in preconditioned]
        if not here or self._measured != self.blocks or not all(b.ready for b in here):
            return found
        statistics = self.blocks[0].state.link_values()
        if not statistics:
            return found
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
            self.blocks[0].invalidate()

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
                state.links = {}
        if not self.blocks or owner not in states or not states[owner].links:
            return False
        saved = states[owner].links
        blank = {key.partition(".")[2]: each for key, each in self._sums({}, 0.0).items()}
        shapes = {n: tuple(each.total.shape) for n, each in blank.items() if each.total is not None}
        found = {n: tuple(each.value.shape) for n, each in saved.items() if each.value is not None}
        if shapes != found or any(block.name not in states for block in self.blocks):
            states[owner].links = {}
            return True
        for name, mean in saved.items():
            where = f"{PREFIX}{LINK}.{name} of layer {owner!r}"
            if mean.value is None or not precise(where, mean.value, damage):
                continue
            if blank[name].symmetric:
                damage.check_form(where, mean.value, "semidefinite")
        return False

    def loaded(self) -> None:
        """Take note that the blocks go on from other states, which fit the layers joined now."""
        self._measured = self.blocks
        self.finish()

    def _errors(self, where: str) -> attribute_errors:
        return attribute_errors(LINK, self._link, where)


def _linked(block: Block, damping: float) -> LinkedLayer:
    return LinkedLayer(block.layer, block.shape, damping, LazyMatrices(block))


def ordered(link: Link, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers that a link joins, in its order, checked.

    Raises:
        PluginError: It names others, or one twice.
    """
    with attribute_errors(LINK, link, "choosing its layers"):
        found = list(link.order(layers))
    if len(set(found)) < len(found) or not set(found) <= set(layers):
        raise PluginError(
            f"{stage_label('link', link)} chose {[each.name for each in found]} of the layers "
            f"{[each.name for each in layers]}; it must choose some of them, each once. Report it "
            "to its authors, or leave out the link."
        )
    return found


def with_link(
    coverage: Coverage, link: Link | None, label: str, layers: Sequence[Layer]
) -> Coverage:
    """Return a coverage table that says which blocks are joined.

    Args:
        coverage: The table.
        link: The link; `None` for none.
        label: Its name.
        layers: Those that blocks precondition.

    Raises:
        CombinationError: The link cannot join these layers.
    """
    joined = set() if link is None else {layer.name for layer in ordered(link, layers)}

    def row(row: Row) -> Row:
        return attrs.evolve(row, linked=label) if row.block in joined else row

    return Coverage(tuple(map(row, coverage)))
