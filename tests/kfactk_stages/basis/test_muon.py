"""Muon: the laws that are left; the orthogonal factor against a singular value decomposition."""

from __future__ import annotations

from typing import Any, ClassVar

from kfactk.testing import BasisLaws


class TestMuon(BasisLaws):
    stage: ClassVar[Any] = {"name": "muon", "precision": "full"}
    curvature: ClassVar[Any] = "gradient"
