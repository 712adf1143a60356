"""Which stages treat which layers."""

from __future__ import annotations

import fnmatch

import attrs
import torch

from kfactk.stages import Basis, Curvature, Layer, Pace
from kfactk.validation import attribute_errors


@attrs.frozen
class BlockRule:
    """A curvature, the basis of its blocks, and the layers it may take.

    Args:
        curvature: The curvature stage.
        basis: The basis stage.
        layers: Shell-style patterns of module names; empty for all modules.
        label: The names of both stages, for tables: "conv_kfac, ekfac".
        pace: What decides when its blocks are due; `None` for the periods of the recipe.
    """

    curvature: Curvature
    basis: Basis
    layers: tuple[str, ...] = ()
    label: str = ""
    pace: Pace | None = None

    @property
    def of_gradient(self) -> bool:
        """Whether its curvature takes statistics of the user's gradient."""
        return self.curvature.statistics_from == "gradient"

    def refuses(self, layer: Layer) -> str | None:
        """Return why the basis cannot treat a layer that the curvature takes, or `None`."""
        with attribute_errors("curvature", self.curvature, f"on layer {layer.name!r}"):
            blank = {  # plain, also of a parameter that is spread over ranks
                name: torch.empty(each.shape, dtype=each.dtype, device="meta")
                for name, each in layer.tensors().items()
            }
            shape = tuple(self.curvature.matrix(layer, blank).shape)
        with attribute_errors("basis", self.basis, f"on layer {layer.name!r}"):
            return self.basis.unsupported(shape)

    def takes_all_of(self, other: BlockRule) -> bool:
        """Return whether it leaves no layer to another rule that comes after it.

        That is certain for the same curvature, where the basis treats all shapes.
        """
        everywhere = not self.layers or (bool(other.layers) and {*other.layers} <= {*self.layers})
        whole = type(self.basis).unsupported is Basis.unsupported
        return self.curvature == other.curvature and everywhere and whole

    def allows(self, name: str) -> bool:
        """Return whether the rule may take the module of this name."""
        return not self.layers or any(within(name, pattern) for pattern in self.layers)


WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Names of what torch's wrappers hold: `torch.compile` and those of activation checkpointing."""


def within(name: str, pattern: str) -> bool:
    """Return whether a pattern matches the name of a module or of one that contains it.

    It may leave out the names of wrappers.

    Example:
        >>> within("encoder.0.fc", "encoder"), within("encoder.0.fc", "*.fc"), within("fc", "f")
        (True, True, False)
        >>> within("_orig_mod.fc", "fc"), within("_orig_mod.fc", "_orig_mod.fc")
        (True, True)
    """
    return any(
        fnmatch.fnmatchcase(".".join(parts[:end]), pattern)
        for parts in (name.split("."), unwrapped_name(name).split("."))
        for end in range(1, len(parts) + 1)
    )


def unwrapped_name(name: str) -> str:
    """Return the name of a module as it is without wrappers.

    Example:
        >>> unwrapped_name("_orig_mod.blocks.0._checkpoint_wrapped_module.mlp")
        'blocks.0.mlp'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
