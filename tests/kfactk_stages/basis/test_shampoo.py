"""Shampoo: the laws; the roots of both sides against dense algebra."""

from __future__ import annotations

from typing import Any, ClassVar

from kfactk.testing import BasisLaws


class TestShampoo(BasisLaws):
    stage = "shampoo"
    curvature: ClassVar[Any] = "gradient"

    def turned(self, name, matrix, left, right):
        rotation = left if name == "L" else right
        return rotation @ matrix @ rotation.mT
