"""Messages under way: their order, how many at a time, and the error of one that fails."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kfactk import KfactkError
from kfactk.distributed.messages import (
    MAX_IN_FLIGHT,
    PendingMessage,
    explain_failures,
    receive_in_order,
)


class Work:
    """A collective that is over when somebody waits for it."""

    under_way = 0
    most = 0

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        Work.under_way += 1
        Work.most = max(Work.most, Work.under_way)

    def wait(self) -> None:
        Work.under_way -= 1
        if self.fails:
            raise RuntimeError("connection closed by peer. This is typically a crash\nmore lines")


class Numbered(PendingMessage):
    def __init__(self, number: int, work: Work | None = None) -> None:
        super().__init__(work)
        self.number = number

    def tensors(self) -> dict[str, Tensor]:
        return {"number": torch.tensor(self.number)}


@pytest.mark.parametrize("count", [0, 1, MAX_IN_FLIGHT, 3 * MAX_IN_FLIGHT + 1])
def test_messages_arrive_in_order_with_a_bounded_number_under_way(count: int) -> None:
    Work.under_way = Work.most = 0
    messages: Iterator[PendingMessage] = (Numbered(number, Work()) for number in range(count))
    found = [int(tensors["number"]) for tensors in receive_in_order(messages)]
    assert found == list(range(count))
    assert Work.most == min(count, MAX_IN_FLIGHT)
    assert Work.under_way == 0


def test_message_without_work_brings_its_tensors_at_once() -> None:
    assert Numbered(7).wait() == {"number": torch.tensor(7)}


def test_failed_message_names_the_likely_cause() -> None:
    with pytest.raises(
        KfactkError, match=r"exchange curvature \(connection closed by peer\.\)\. Most likely"
    ):
        Numbered(0, Work(fails=True)).wait()


def test_explain_failures_names_the_likely_cause() -> None:
    with (
        pytest.raises(KfactkError, match=r"Connection closed\b.*look at its output") as caught,
        explain_failures(),
    ):
        raise RuntimeError("Connection closed\nby peer")
    assert "by peer" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match="mine"), explain_failures():
        raise ValueError("mine")
