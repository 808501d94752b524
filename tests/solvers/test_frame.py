"""Where windows stand, and which of their steps are evaluated."""

from __future__ import annotations

import numpy as np
import pytest

from problems import frame_at


def test_window_ends_at_the_sample():
    """Beyond the end of the loop a window has no steps."""
    frame = frame_at(17, 0, width=5, steps=20)
    assert (frame.hi[0], frame.width[0]) == (20, 3)
    assert frame.inside.tolist() == [[True, True, True, False, False]]
    assert not frame.uniform
    assert frame_at(15, 0, width=5, steps=20).uniform


@pytest.mark.parametrize(
    ("rounds", "nodes", "coarse", "rough"),
    [
        (0, [0, 4, 8, 10], True, True),
        (1, [0, 2, 4, 6, 8, 10], True, True),
        (2, list(range(11)), False, True),  # the first round on all steps knows no slope of one that was
        (3, list(range(11)), False, False),
    ],
)
def test_rounds_on_some_steps_take_every_so_many_and_the_last(rounds, nodes, coarse, rough):
    """Then all steps are evaluated."""
    frame = frame_at(0, 0, width=11, steps=20, strides=(4, 2), rounds=rounds)
    assert np.flatnonzero(frame.nodes()[0]).tolist() == nodes
    assert (bool(frame.coarse[0]), bool(frame.rough[0])) == (coarse, rough)


def test_slopes_for_a_growth_give_that_growth():
    """Where an output enters the step."""
    frame = frame_at(3, 0)
    growth = np.full((1, 5), 0.7)
    assert frame.growth(frame.slopes_for_growth(growth)) == pytest.approx(growth)
