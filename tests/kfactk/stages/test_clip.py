"""Clips: the protocol, and the stages that have its members."""

from __future__ import annotations

from typing import Any

from kfactk.stages import Clip
from tests.kfactk.stages.members import check, unlike


def test_our_clips_take_the_arguments_of_the_protocol() -> None:
    check("clip")


class Renamed:
    """A clip whose second argument has another name."""

    def clip(self, pairs: Any, product: Any) -> Any:
        raise NotImplementedError


class Missing:
    """A clip without its method."""


def test_other_arguments_are_seen() -> None:
    assert unlike(Clip, Renamed) == ["Renamed.clip"]
    assert unlike(Clip, Missing) == ["Missing.clip"]
