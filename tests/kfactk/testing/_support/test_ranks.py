"""Worker processes: what one job does to its process does not reach the next."""

from __future__ import annotations

import os

import pytest

from kfactk.testing._support.ranks import shared_workers

pytestmark = pytest.mark.xdist_group("ranks")


def leaves_a_variable(rank: int) -> str | None:
    found = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = "7"
    return found


def test_a_job_leaves_no_variables_to_the_next() -> None:
    for _ in range(2):
        assert (
            shared_workers().run(2, leaves_a_variable) == [os.environ.get("LOCAL_WORLD_SIZE")] * 2
        )
