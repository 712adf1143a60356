"""Products of pixels that taps see together, by hand."""

import pytest
import torch
from torch import nn

from kfactk_stages.curvature._lags import lag_sums
from kfactk_stages.curvature._unfold import Window

PIXELS = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]])
NEXT, SECOND, FOURTH = 2 + 6 + 12 + 20, 3 + 8 + 15, 5
"""Sums of products of pixels that are 1, 2 and 4 apart."""


@pytest.mark.parametrize(
    ("dilation", "spacing", "expected"),
    [
        (1, 1, [NEXT, SECOND]),
        (2, 1, [SECOND, FOURTH]),
        (2, 2, [NEXT, SECOND]),
        (1, 2, [0, NEXT]),
        (4, 3, [0, 0]),
        (3, 3, [NEXT, SECOND]),
        (6, 1, [0, 0]),
    ],
)
def test_taps_see_pixels_that_are_as_far_apart(dilation, spacing, expected):
    window = Window.of(nn.Conv1d(1, 1, 3, dilation=dilation))
    assert lag_sums(PIXELS, window, [spacing], 1).tolist() == expected


def test_each_axis_and_each_group_has_its_own():
    images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 5.0]]]])
    window = Window.of(nn.Conv2d(2, 2, 2, groups=2))
    assert lag_sums(images, window, [1, 1], 2).tolist() == [[11, 14], [6, 6]]
