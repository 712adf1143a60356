"""The reading interface for researchers: what the optimizer knows of each layer, and products with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator, Members
from kfactk.distributed.sharding import is_sharded, sharded_like, whole
from kfactk.errors import KfactkError, OptionError
from kfactk.preconditioner.preconditioner import Preconditioner
from kfactk.preconditioner.state import BlockState
from kfactk.stages import Layer
from kfactk.validation import attribute_errors


@attrs.frozen(eq=False)
class BlockView:
    """One layer as the optimizer sees it now. Tensors are the optimizer's own: read, do not write.

    Args:
        layer: The layer.
        damping: The damping tau it is preconditioned with now.
    """

    layer: Layer
    damping: float
    _preconditioner: Preconditioner

    @property
    def factors(self) -> dict[str, Tensor]:
        """Averaged matrices by name, undamped: A `[..., d_in, d_in]`, G `[..., d_out, d_out]`; empty before the first step."""
        return self._preconditioner.matrices(self.layer) if self._state.ready else {}

    @property
    def decomposition(self) -> dict[str, dict[str, Tensor]]:
        """For each matrix, what the basis made of it at its last refresh."""
        return dict(self._state.decomposition) if self._state.ready else {}

    @property
    def scale(self) -> dict[str, Tensor]:
        """Moments of the basis by name (EKFAC: "scale", `[..., d_out, d_in]`); empty for a basis without any."""
        return self._state.moment_values()

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors shaped like the layer's parameters ("weight", "bias") as its matrix `[..., d_out, d_in]`.

        Sharded tensors are made whole: a collective call then, here and below.
        """
        return self._preconditioner.blocks.joined(
            self.layer, {name: whole(tensor) for name, tensor in tensors.items()}
        )

    def fisher_product(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`F v` for v shaped like the layer's parameters; missing ones count as zero. Sharded where any of v is, like the parameters.

        Raises:
            KfactkError: No curvature has been measured yet, or it is other ranks that have it.
        """
        self._measured()
        pre = self._preconditioner
        self._check_answer(
            "factors",
            {
                matrix: pre.places.factor_workers(self.layer.name, matrix)
                for matrix in pre.basis.requires
            },
            tensors,
        )
        vector = self.matrix(tensors)
        with attribute_errors("basis", pre.basis, f"on layer {self.layer.name!r}"):
            product = pre.operator(self.layer, self.damping).multiply(vector)
        return self._parted(product, tensors)

    def precondition(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`P v = (F + damping I)^-1 v`, likewise.

        Raises:
            KfactkError: No curvature has been measured yet, or it is other ranks that have it.
        """
        self._measured()
        pre = self._preconditioner
        self._check_answer(
            "decomposition", {"": pre.places.gradient_workers(self.layer.name)}, tensors
        )
        return self._parted(
            pre.preconditioned(self.layer, self.matrix(tensors), self.damping), tensors
        )

    def condition(self) -> Tensor | None:
        """Condition number of the damped curvature (exact or a lower bound, as the basis documents); `None` before it is measured, and on
        ranks that do not hold the layer."""
        state, basis = self._state, self._preconditioner.basis
        if not (state.ready and state.decomposition):
            return None
        with attribute_errors("basis", basis, f"on layer {self.layer.name!r}"):
            return self._preconditioner.operator(self.layer, self.damping).condition()

    def _check_answer(
        self, what: str, lies: Mapping[str, Members], given: Mapping[str, Tensor]
    ) -> None:
        """Refuse what this rank, or for sharded tensors any rank, cannot answer; before anything is sent."""
        ranks, places = self._preconditioner.ranks, self._preconditioner.places
        common = sorted(set.intersection(*map(set, lies.values())))
        where = ", ".join(
            f"{name} on rank {', '.join(map(str, members))}".removeprefix(" on ")
            for name, members in sorted(lies.items())
        )
        layer, strategy = self.layer.name, places.assignment.strategy
        if any(is_sharded(tensor) for tensor in given.values()) and len(common) < ranks.size:
            raise KfactkError(
                f"the {what} of layer {layer!r} are not on every rank ({where}; placement {strategy!r}), and sharded tensors "
                "need all ranks to answer together: use placement='replicated', or ask with whole tensors."
            )
        if not common:
            raise KfactkError(
                f"the {what} of layer {layer!r} lie apart ({where}; placement {strategy!r}), so no rank can answer: use "
                "placement='replicated'."
            )
        if ranks.rank not in common:
            raise KfactkError(
                f"the {what} of layer {layer!r} can be found on rank {', '.join(map(str, common))} (placement {strategy!r}), and this is "
                f"rank {ranks.rank}: ask there, or use placement='replicated'."
            )

    def _parted(self, matrix: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts, parameters = (
            self._preconditioner.blocks.parted(self.layer, matrix),
            self.layer.tensors(),
        )
        if not any(is_sharded(tensor) for tensor in given.values()):
            return parts
        return {name: sharded_like(part, parameters[name]) for name, part in parts.items()}

    @property
    def _state(self) -> BlockState:
        return self._preconditioner.states[self.layer.name]

    def _measured(self) -> BlockState:
        if not self._state.ready:
            raise KfactkError(
                f"layer {self.layer.name!r} has no curvature yet: take a step() with a gradient first."
            )
        return self._state


def conditions(views: Mapping[str, BlockView], ranks: Communicator) -> dict[str, Tensor | float]:
    """The largest and the median condition number of the layers measured so far, on whatever rank; empty before the first. A collective
    call where several ranks share the layers."""
    known = {
        name: float(value)
        for name, view in views.items()
        if (value := view.condition()) is not None
    }
    known = {name: value for theirs in ranks.gathered(known) for name, value in theirs.items()}
    if not known:
        return {}
    stacked = torch.tensor([known[name] for name in views if name in known], dtype=torch.float64)
    return {"condition_max": stacked.max(), "condition_median": stacked.median()}


Product = Callable[[BlockView, Mapping[str, Tensor]], dict[str, Tensor]]


def products(
    views: Mapping[str, BlockView], tensors: Mapping[str, Tensor], product: Product
) -> dict[str, Tensor]:
    """`product` layer by layer over tensors named like the model's parameters.

    Raises:
        OptionError: A name belongs to no covered layer.
    """
    out = {}
    for name, group in by_layer(views, tensors).items():
        for key, tensor in product(views[name], group).items():
            out[f"{name}.{key}" if name else key] = tensor
    return out


def by_layer(
    views: Mapping[str, BlockView], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Group tensors named like the model's parameters by layer.

    Raises:
        OptionError: A name belongs to no covered layer.
    """
    owner = {
        (f"{name}.{key}" if name else key): (name, key)
        for name, view in views.items()
        for key in view.layer.parameters
    }
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name not in owner:
            raise OptionError(
                f"{name!r} is not a preconditioned parameter, so it has no curvature block. See recipe.coverage(model); covered are: "
                f"{', '.join(list(owner)[:8])}{' ...' if len(owner) > 8 else ''}."
            )
        layer, key = owner[name]
        grouped.setdefault(layer, {})[key] = tensor
    return grouped
