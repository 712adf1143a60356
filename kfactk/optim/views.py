"""What researchers read: each block as the optimizer sees it now, and products with it."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator, Members
from kfactk.distributed.sharding import full_tensor, is_sharded, sharded_like
from kfactk.errors import KfactkError, OptionError
from kfactk.operators import CurvatureOperator
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.stages import Layer


@attrs.frozen(eq=False)
class BlockView:
    """One block as the optimizer sees it now. Tensors are the optimizer's own: read, do not write.

    Args:
        block: The block.
        damping: The damping tau it is preconditioned with now.
    """

    block: Block
    damping: float
    _placement: BlockPlacement
    _communicator: Communicator

    @property
    def layer(self) -> Layer:
        """The layer."""
        return self.block.layer

    @property
    def factors(self) -> dict[str, Tensor]:
        """Averaged matrices by name, undamped; empty before the first step.

        K-FAC's are A `[..., d_in, d_in]` and G `[..., d_out, d_out]`.
        """
        return self.block.matrices() if self.block.state.ready else {}

    @property
    def decomposition(self) -> dict[str, dict[str, Tensor]]:
        """For each matrix, what the basis made of it at its last refresh."""
        return dict(self.block.state.decomposition) if self.block.state.ready else {}

    @property
    def scale(self) -> dict[str, Tensor]:
        """Moments of the basis by name (EKFAC: "scale", `[..., d_out, d_in]`)."""
        return self.block.state.moment_values()

    @property
    def operator(self) -> CurvatureOperator:
        """F of the block, with its damping.

        Raises:
            KfactkError: No curvature has been measured yet, or other ranks have it.
        """
        self._check_workers("decompositions", self._holders(), {})
        return self.block.operator(self.damping)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join tensors shaped like the layer's parameters into its matrix `[..., d_out, d_in]`.

        Sharded tensors are made whole: a collective call then, here and below.
        """
        return self.block.matrix({name: full_tensor(tensor) for name, tensor in tensors.items()})

    def fisher_product(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `F v` for v shaped like the layer's parameters; missing ones count as zero.

        The result is sharded where any of v is, like the parameters.

        Raises:
            KfactkError: No curvature has been measured yet, or other ranks have it.
        """
        requires, name = self.block.basis.requires, self.layer.name
        workers = {matrix: self._placement.factor_workers(name, matrix) for matrix in requires}
        self._check_workers("factors", workers, tensors)
        return self._split(self.block.multiply(self.matrix(tensors), self.damping), tensors)

    def precondition(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `P v = (F + damping I)^-1 v`, likewise.

        Raises:
            KfactkError: No curvature has been measured yet, or other ranks have it.
        """
        self._check_workers("decompositions", self._holders(), tensors)
        return self._split(self.block.solve(self.matrix(tensors), self.damping), tensors)

    def condition(self) -> Tensor | None:
        """Return the condition number of the damped curvature, exact or a lower bound.

        It is `None` before anything was measured, and on ranks that do not hold the layer.
        """
        state = self.block.state
        measured = state.ready and state.decomposition
        return self.block.condition(self.damping) if measured else None

    def _holders(self) -> dict[str, Members]:
        return {"": self._placement.gradient_workers(self.layer.name)}

    def _check_workers(
        self, what: str, workers: Mapping[str, Members], given: Mapping[str, Tensor]
    ) -> None:
        """Refuse what this rank, or for sharded tensors any rank, cannot answer.

        Raises:
            KfactkError: No curvature has been measured yet, or other ranks have it.
        """
        layer = f"layer {self.layer.name!r}"
        if not self.block.state.ready:
            raise KfactkError(f"{layer} has no curvature yet: take a step() with a gradient first.")
        rank, size = self._communicator.rank, self._communicator.size
        common = sorted(set.intersection(*map(set, workers.values())))
        told = []
        for name, members in sorted(workers.items()):
            ranks = f"on rank {', '.join(map(str, members))}"
            told.append(f"{name} {ranks}" if name else ranks)
        where = f"{', '.join(told)}; placement {self._placement.assignment.strategy!r}"
        if any(is_sharded(tensor) for tensor in given.values()) and len(common) < size:
            raise KfactkError(
                f"the {what} of {layer} are not on every rank ({where}), and sharded tensors need "
                "all ranks to answer together. Use placement='replicated', or ask with whole "
                "tensors."
            )
        if not common:
            raise KfactkError(
                f"the {what} of {layer} are on different ranks ({where}), so no rank can answer. "
                "Use placement='replicated'."
            )
        if rank not in common:
            raise KfactkError(
                f"this rank, {rank}, does not have the {what} of {layer} ({where}). Ask on rank "
                f"{', '.join(map(str, common))}, or use placement='replicated'."
            )

    def _split(self, matrix: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a matrix as tensors shaped like the layer's parameters."""
        tensors, parameters = self.block.tensors(matrix), self.layer.tensors()
        if not any(is_sharded(tensor) for tensor in given.values()):
            return tensors
        return {name: sharded_like(part, parameters[name]) for name, part in tensors.items()}


def conditions(
    views: Mapping[str, BlockView], communicator: Communicator
) -> dict[str, Tensor | float]:
    """Return the largest and the median condition number of the measured layers, on any rank.

    It is empty before the first measurement. A collective call where several ranks share layers.
    """
    known = {
        n: float(value) for n, view in views.items() if (value := view.condition()) is not None
    }
    everyone = communicator.gathered(known)
    known = {name: value for theirs in everyone for name, value in theirs.items()}
    if not known:
        return {}
    stacked = torch.tensor([known[name] for name in views if name in known], dtype=torch.float64)
    return {"condition_max": stacked.max(), "condition_median": stacked.median()}


def by_layer(
    views: Mapping[str, BlockView], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Group tensors named like the model's parameters by layer.

    Raises:
        OptionError: A name belongs to no covered layer.
    """
    owner = {
        _qualified(view.layer, key): (name, key)
        for name, view in views.items()
        for key in view.layer.parameters
    }
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name not in owner:
            shown = f"{', '.join(list(owner)[:8])}{' ...' if len(owner) > 8 else ''}"
            raise OptionError(
                f"{name!r} is not a preconditioned parameter, so it has no block. See "
                f"recipe.coverage(model). Covered are: {shown}."
            )
        layer, key = owner[name]
        grouped.setdefault(layer, {})[key] = tensor
    return grouped


def by_parameter(
    views: Mapping[str, BlockView], found: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return tensors grouped by layer under the names of the model's parameters."""
    return {
        _qualified(views[name].layer, key): tensor
        for name, group in found.items()
        for key, tensor in group.items()
    }


def _qualified(layer: Layer, key: str) -> str:
    return f"{layer.path}.{key}" if layer.path else key
