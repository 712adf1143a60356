"""What changes while an optimizer runs is one object, which a wrapper shares."""

from __future__ import annotations

import copy

import torch

from kfactk.optim.run import RunState
from tests.kfactk.small import batch, bound, net, train


def test_a_run_begins_at_step_zero_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        run = RunState()
    assert (int(run.step), run.step.device.type) == (0, "cpu")
    assert (run.gathered, run.recorded, run.closed) == ({}, False, False)


def test_a_wrapper_that_copies_attributes_shares_the_run() -> None:
    """As Lightning and Fabric do: their wrappers take over `__dict__`."""
    model = net()
    optimizer = bound(model)
    wrapper = copy.copy(optimizer.__dict__)
    train(optimizer, model, batch())
    assert int(wrapper["_run"].step) == optimizer.steps == 1
    optimizer.close()
    assert wrapper["_run"].closed
