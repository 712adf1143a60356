"""What researchers read: each block as the optimizer sees it now, and products with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from kfactk.distributed.communicator import Communicator, Members
from kfactk.distributed.sharding import full_tensor, is_sharded, sharded_like
from kfactk.errors import KfactkError, OptionError, near_names
from kfactk.operators import CurvatureOperator
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.links import Links
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.samples import working_dtype
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
    def interval(self) -> int | None:
        """The interval to the next refresh, in units of `factor_every`; `None` without a pace.

        It is 0 before the first refresh.
        """
        pace = self.block.state.pace
        return None if self.block.pace is None else next(iter(pace.intervals), 0)

    @property
    def refreshes(self) -> int | None:
        """How often the statistics were refreshed; `None` without a pace, which counts them."""
        return None if self.block.pace is None else self.block.state.pace.refreshes

    @property
    def operator(self) -> CurvatureOperator:
        """F of the block, with its damping.

        Raises:
            KfactkError: No curvature has been measured yet, or other ranks have it.
        """
        self._check_workers("decompositions", self._holders(), {})
        return self.block.operator(self.damping)

    def matrix(self, tensors: Mapping[str, Tensor], *, strict: bool = True) -> Tensor:
        """Join tensors shaped like the layer's parameters into its matrix `[..., d_out, d_in]`.

        Sharded tensors are made whole: a collective call then, here and below.

        Args:
            tensors: By parameter name, each with the shape, the device and the dtype of its
                parameter (float32, too, where that is a half precision). Missing ones count as
                zero.
            strict: Refuse names of the module's parameters that the block does not treat, such as a
                frozen bias. With `False` they are skipped.

        Raises:
            OptionError: A name or a tensor does not fit.
        """
        return self._matrix(self._checked(tensors, strict))

    def fisher_product(
        self, tensors: Mapping[str, Tensor], *, strict: bool = True
    ) -> dict[str, Tensor]:
        """Return `F v` for v shaped like the layer's parameters; missing ones count as zero.

        The result is sharded where any of v is, like the parameters.

        Args:
            tensors: v by parameter name; see `matrix`.
            strict: Likewise.

        Raises:
            OptionError: A name or a tensor does not fit.
            KfactkError: No curvature has been measured yet, or other ranks have it.
        """
        tensors = self._checked(tensors, strict)
        requires, name = self.block.requires, self.layer.name
        if "fisher" in self.block.basis.waives:
            raise KfactkError(
                f"layer {name!r} has the basis {type(self.block.basis).__name__}, which is no "
                "inverse of a curvature: there is no F to multiply by. Leave its parameters out."
            )
        workers = {matrix: self._placement.factor_workers(name, matrix) for matrix in requires}
        self._check_workers("factors", workers, tensors)
        return self.split(self.block.multiply(self._matrix(tensors), self.damping), tensors)

    def precondition(
        self, tensors: Mapping[str, Tensor], *, strict: bool = True
    ) -> dict[str, Tensor]:
        """Return `P v = (F + damping I)^-1 v`, likewise.

        Args:
            tensors: v by parameter name; see `matrix`.
            strict: Likewise.

        Raises:
            OptionError: A name or a tensor does not fit.
            KfactkError: No curvature has been measured yet, or other ranks have it.
        """
        tensors = self._checked(tensors, strict)
        self._check_workers("decompositions", self._holders(), tensors)
        return self.split(self.block.solve(self._matrix(tensors), self.damping), tensors)

    def condition(self) -> Tensor | None:
        """Return the condition number of the damped curvature, exact or a lower bound.

        It is `None` before anything was measured, on ranks that do not hold the layer, and for a
        basis that is no inverse of a curvature.
        """
        state = self.block.state
        measured = state.ready and state.decomposition
        return self.block.condition(self.damping) if measured else None

    def _checked(self, tensors: Mapping[str, Tensor], strict: bool) -> dict[str, Tensor]:
        """Return tensors given by parameter name, checked."""
        known, found = self.layer.tensors(), {}
        present = dict(self.layer.module.named_parameters())
        for name, tensor in _items(tensors):
            if name in known:
                check_tensor(name, tensor, known[name])
                found[name] = tensor
            elif name not in present:
                raise OptionError(
                    f"layer {self.layer.name!r} has no parameter {name!r}."
                    f"{near_names(str(name), known)} Use one of: {', '.join(known)}."
                )
            elif strict:
                raise OptionError(
                    f"the block of layer {self.layer.name!r} does not treat the parameter {name!r} "
                    f"(it treats {', '.join(known)}). Leave it out, or skip such names with "
                    "strict=False."
                )
        return found

    def _matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.block.matrix({name: full_tensor(tensor) for name, tensor in tensors.items()})

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
        if not self.block.ready:
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

    def split(self, matrix: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a matrix as tensors shaped like the layer's parameters, in shards like `given`."""
        tensors, parameters = self.block.tensors(matrix), self.layer.tensors()
        if not any(is_sharded(tensor) for tensor in given.values()):
            return tensors
        return {name: sharded_like(part, parameters[name]) for name, part in tensors.items()}


def preconditioned(
    views: Mapping[str, BlockView], grouped: Mapping[str, Mapping[str, Tensor]], links: Links
) -> dict[str, dict[str, Tensor]]:
    """Return `P v` for v given by layer, corrected by the link.

    Args:
        views: The blocks by layer name.
        grouped: v by layer, and by the parameter's own name.
        links: The link; layers that it joins with those of v count as zero in v.

    Raises:
        OptionError: A name or a tensor does not fit.
        KfactkError: No curvature has been measured yet, or other ranks have it.
    """
    found = {name: views[name].precondition(group) for name, group in grouped.items()}
    joined = [block.name for block in links.blocks]
    if not set(joined) & grouped.keys():
        return found
    given = {name: grouped.get(name, {}) for name in joined}
    vectors = {name: views[name].matrix(group) for name, group in given.items()}
    alone = {
        name: views[name].matrix(found[name]) if name in found else torch.zeros_like(vector)
        for name, vector in vectors.items()
    }
    dampings = {name: view.damping for name, view in views.items()}
    corrected = links.correct(vectors, alone, dampings)
    return found | {name: views[name].split(corrected[name], given[name]) for name in joined}


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
    stacked = torch.tensor(
        [known[name] for name in views if name in known], dtype=torch.float64, device="cpu"
    )
    return {"condition_max": stacked.max(), "condition_median": stacked.median()}


def intervals(views: Mapping[str, BlockView]) -> dict[str, Tensor | float]:
    """Return the mean and the longest interval of the paced layers, and all their refreshes.

    It is empty without a pace, and before the first refresh. Every rank knows all of it.
    """
    found = [(view.interval, view.refreshes or 0) for view in views.values() if view.interval]
    known = [interval for interval, _ in found if interval]
    if not known:
        return {}
    return {
        "interval_mean": sum(known) / len(known),
        "interval_max": float(max(known)),
        "refreshes": float(sum(refreshes for _, refreshes in found)),
    }


def check_tensor(name: str, given: Any, parameter: Tensor) -> None:
    """Check that a tensor may stand for a parameter in a product with its curvature.

    Args:
        name: The name it is given by.
        given: What was given.
        parameter: The parameter.

    Raises:
        OptionError: It is no dense tensor with the shape, device and dtype of the parameter.
    """
    what = f"{name!r} is given"
    if given is None:
        raise OptionError(
            f"{what} as None. Leave the name out: parameters of a layer that are left out count as "
            "zero."
        )
    if not isinstance(given, Tensor):
        raise OptionError(
            f"{what} as {type(given).__name__}; it must be a tensor like the parameter: "
            f"{_look(parameter)}. Convert it with torch.as_tensor(value, dtype=parameter.dtype, "
            "device=parameter.device)."
        )
    dtypes = {parameter.dtype, working_dtype(parameter.dtype)}
    fits = (
        given.shape == parameter.shape
        and given.device == parameter.device
        and given.dtype in dtypes
        and given.layout == torch.strided
    )
    if not fits:
        raise OptionError(
            f"{what} as a tensor of {_look(given)}; it must be like the parameter: "
            f"{_look(parameter)}. Permute, convert or move it first (.to(parameter), .to_dense())."
        )
    if is_sharded(given) and not is_sharded(parameter):
        raise OptionError(
            f"{what} sharded, and the parameter is whole on each rank. Give it whole: "
            ".full_tensor()."
        )


def _look(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
    return f"shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}{layout}"


def _items(tensors: Any) -> list[tuple[str, Any]]:
    if not isinstance(tensors, Mapping):
        raise OptionError(
            f"tensors are given as {type(tensors).__name__}; give a dict from parameter names to "
            "tensors, such as {'weight': tensor}."
        )
    return list(tensors.items())


def by_layer(
    views: Mapping[str, BlockView],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    *,
    strict: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """Group tensors named like the model's parameters by layer.

    Args:
        views: The blocks by layer name.
        tensors: By parameter name.
        model: The model.
        strict: Refuse parameters without a block. With `False` they are left out.

    Raises:
        OptionError: A name is not a parameter's, or (with `strict`) the parameter has no block; or
            a tensor is not like its parameter.
    """
    owner = {
        _qualified(view.layer, key): (name, key)
        for name, view in views.items()
        for key in view.layer.parameters
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own_name = {id(parameters[name]): name for name in owner if name in parameters}
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _items(tensors):
        if name in owner:
            layer, key = owner[name]
            check_tensor(name, tensor, views[layer].layer.tensors()[key])
            grouped.setdefault(layer, {})[key] = tensor
            continue
        shown = f"{', '.join(list(owner)[:8])}{' ...' if len(owner) > 8 else ''}"
        if name not in parameters:
            raise OptionError(
                f"{name!r} is not a parameter of the bound model.{near_names(str(name), owner)} "
                f"Use the names of model.named_parameters(). Covered are: {shown}."
            )
        if id(parameters[name]) in own_name:
            raise OptionError(
                f"{name!r} is the same parameter as {own_name[id(parameters[name])]!r}: give it by "
                "that name."
            )
        if strict:
            raise OptionError(
                f"{name!r} is not a preconditioned parameter, so it has no block. See "
                f"recipe.coverage(model). Leave it out, or skip such names with strict=False. "
                f"Covered are: {shown}."
            )
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
