"""`Direction`: from gradients to what the update rule is given in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kfactk.distributed.sharding import ShardedProducts
from kfactk.optim import gradients
from kfactk.optim.control import Control, Decision, Replaced
from kfactk.optim.groups import ParameterGroups
from kfactk.optim.masks import Masks
from kfactk.optim.metrics import MetricsRecorder
from kfactk.optim.settings import Settings
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.preconditioner import Preconditioner
from kfactk.stages import GradientPair
from kfactk.timing import StageTimer
from kfactk.validation import attribute_errors, check_clipped


class Direction:
    """Preconditions, masks and clips the gradients of a step.

    Args:
        recipe: The recipe.
        preconditioner: Preconditions them, with the link's correction.
        masks: Multiply them.
        groups: Know the group of each parameter.
        recorder: Gets the clip factor.
        timer: Times the stages.
    """

    def __init__(
        self,
        recipe: Settings,
        preconditioner: Preconditioner,
        masks: Masks,
        groups: ParameterGroups,
        recorder: MetricsRecorder,
        timer: StageTimer,
    ) -> None:
        self._clip, self._decays = recipe.clip, recipe.weight_decay_at == "gradient"
        self._preconditioner, self._masks, self._known = preconditioner, masks, groups
        self._recorder, self._timer = recorder, timer

    def of(
        self,
        blocks: Sequence[Block],
        read: gradients.BlockGradients,
        groups: Sequence[dict[str, Any]],
    ) -> tuple[Replaced, list[GradientPair]]:
        """Precondition and clip: return what the update rule is given, and the pairs of blocks.

        Args:
            blocks: The blocks.
            read: Their gradients.
            groups: The parameter groups.
        """
        with self._timer.timed("precondition"):
            found = self._preconditioner.precondition(read.matrices)
            parameters, pairs = gradients.paired(blocks, read, found, self._known.by_parameter)
            pairs = self._masks.applied(parameters, pairs)
            local_pairs = gradients.local_parts(parameters, pairs)
        clipped = gradients.as_applied(parameters, self._clipped(parameters, local_pairs))
        rest = self._masks.rest(groups, parameters, decayed=self._decays)
        return [*zip(parameters, clipped, strict=True), *rest], pairs

    def decide(
        self,
        control: Control,
        blocks: Sequence[Block],
        read: gradients.BlockGradients,
        replaced: Replaced,
        dampings: Sequence[float],
        groups: Sequence[dict[str, Any]],
        state: Mapping[Any, Any],
    ) -> tuple[Replaced, Decision]:
        """Let a controller choose a damping, lr and momentum; return what the rule is given.

        Args:
            control: The controller's part of the steps.
            blocks: The blocks; they are left with the last of the dampings. A link is left with
                what it prepares for the chosen one.
            read: Their gradients.
            replaced: What the update rule would be given with the first damping.
            dampings: Those to try, the present one first.
            groups: The parameter groups.
            state: The update rule's.
        """
        trials, links = [replaced], self._preconditioner.links
        prepared = [links.prepared]
        for damping in dampings[1:]:
            for block in blocks:
                block.damping = damping
            links.prepare_for_damping()
            trials.append(self.of(blocks, read, groups)[0])
            prepared.append(links.prepared)
        whole = [gradients.completed(groups, each, decayed=self._decays) for each in trials]
        with self._timer.timed("control"):
            decision = control.decide(whole, groups, state, dampings)
        links.keep_prepared(prepared[decision.number])
        return trials[decision.number], decision

    def _clipped(
        self, parameters: Sequence[nn.Parameter], pairs: Sequence[GradientPair]
    ) -> list[Tensor]:
        """Return the clipped gradients, and record the clip factor."""
        with self._timer.timed("clip"):
            with attribute_errors("clip", self._clip, "on the preconditioned gradients"):
                answer = self._clip.clip(pairs, ShardedProducts(parameters))
            given = [pair.preconditioned for pair in pairs]
            clipped, factor = check_clipped(self._clip, answer, given)
        self._recorder.add({"clip_factor": factor})
        return clipped
