"""Likelihoods: the protocol, and the stages that have its members."""

from __future__ import annotations

from tests.kfactk.stages.members import check


def test_our_likelihoods_take_the_arguments_of_the_protocol() -> None:
    check("likelihood")
