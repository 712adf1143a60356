"""Soap: the laws; the root of the second moment in the eigenbasis, and how it is carried over."""

from __future__ import annotations

from typing import Any, ClassVar

from kfactk.testing import BasisLaws


class TestSoap(BasisLaws):
    stage = "soap"
    curvature: ClassVar[Any] = "gradient"


class TestSoapByEigh(BasisLaws):
    stage: ClassVar[Any] = {"name": "soap", "refresh": "eigh", "eps": None, "power": 1.0}
    curvature: ClassVar[Any] = "gradient"
