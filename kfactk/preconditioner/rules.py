"""Which stages treat which layers."""

from __future__ import annotations

import fnmatch

import attrs

from kfactk.stages import Basis, Curvature


@attrs.frozen
class BlockRule:
    """A curvature, the basis of its blocks, and the layers it may take.

    Args:
        curvature: The curvature stage.
        basis: The basis stage.
        layers: Shell-style patterns of module names; empty for all modules.
        label: The names of both stages, for tables: "conv_kfac, ekfac".
    """

    curvature: Curvature
    basis: Basis
    layers: tuple[str, ...] = ()
    label: str = ""

    def allows(self, name: str) -> bool:
        """Return whether the rule may take the module of this name."""
        return not self.layers or any(within(name, pattern) for pattern in self.layers)


def within(name: str, pattern: str) -> bool:
    """Return whether a pattern matches the name of a module or of one that contains it.

    Example:
        >>> within("encoder.0.fc", "encoder"), within("encoder.0.fc", "*.fc"), within("fc", "f")
        (True, True, False)
    """
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes)
