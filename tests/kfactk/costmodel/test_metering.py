"""The meter counts what torch runs: closed forms of products and solves."""

import pytest
import torch
from torch import nn

from kfactk.costmodel.metering import Meter

META = torch.device("meta")


def test_meter_counts_no_views() -> None:
    tensor = torch.empty(4, 6, device=META)
    with Meter() as meter:
        tensor.T.reshape(2, 12).t()
    assert meter.amount.bytes == 4 * 24 * 2  # reshape copies a transpose
    with Meter() as meter:
        torch.linalg.solve_triangular(
            torch.empty(3, 3, device=META), torch.empty(3, 5, device=META), upper=False
        )
        torch.cholesky_solve(torch.empty(3, 5, device=META), torch.empty(3, 3, device=META))
    assert (meter.amount.triangular, meter.amount.products) == (9 * 5 + 2 * 9 * 5, 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_meter_counts_the_products_of_grouped_convolutions(groups: int) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=False, device="meta")
    x = torch.empty(2, 4, 5, 6, device="meta", requires_grad=True)
    y = conv(x)
    with Meter() as meter:
        torch.autograd.grad(y, [x, conv.weight], torch.empty_like(y))
    multiplied = 2 * 8 * 5 * 6 * (4 // groups) * 9  # outputs by the inputs that each is made of
    assert meter.amount.convolutions == 2 * 2 * multiplied
