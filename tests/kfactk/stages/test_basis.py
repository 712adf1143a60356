"""What the base class of bases gives their authors."""

from __future__ import annotations

from typing import Any

import torch

from kfactk.stages import Basis


class Least(Basis):
    """A basis with its abstract members alone."""

    requires = frozenset({"A"})

    def decompose(self, name: str, matrix: Any, context: Any) -> Any:
        raise NotImplementedError

    def operator(self, decomposition: Any, moments: Any, damping: float, matrices: Any) -> Any:
        raise NotImplementedError


def test_a_basis_claims_no_law_and_has_no_moments_by_default() -> None:
    basis, nothing = Least(), {"A": {}}
    assert (basis.laws, basis.moments_from, basis.moment_decay) == (frozenset(), None, 0.0)
    assert basis.moments(nothing, None) == {}  # type: ignore[arg-type]
    assert basis.gradient_moments(nothing, torch.ones(1, 1), 1.0) == {}
    assert basis.transport({"scale": torch.ones(1)}, nothing, nothing) == {}
