"""Image grids."""

from __future__ import annotations

import pytest
import torch

from parataxis import plots


def test_grids_refuse_what_is_no_picture():
    with pytest.raises(ValueError, match=r"images must be \(B, 1 or 3, height, width\), got \(2, 5\)"):
        plots.image_grid(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="no round to show"):
        plots.trace_grid([])
    assert plots.image_grid(torch.zeros(5, 3, 4, 6), columns=3, zoom=1).size == (3 * 7 - 1, 2 * 5 - 1)
