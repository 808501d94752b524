"""Slopes of the secant method, from numbers written by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import parataxis as px
import problems
from problems import frame_at

GAUSSIAN, BEFORE, MEASURED = 0.6, 0.7, 0.8  # growth of each kind of slope


def growth(*, move=0.1, evaluated_until=19, finite=None, change=None, **others):
    """Return the growth of each step by the slopes that a round with such moves gives."""
    frame = frame_at(14, evaluated_until)
    kinds = {kind: frame.slopes_for_growth(np.full_like(frame.a, kind)) for kind in (GAUSSIAN, BEFORE, MEASURED)}
    dx = move * frame.rms
    df = dx * kinds[MEASURED]
    if change is not None:
        df[0, 2] = change
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        pairs = np.stack([dx * dx, df * dx, df * dx, df * df], -1).reshape(1, -1, 2, 2)
        window = SimpleNamespace(
            W=frame.W,
            a=frame.a,
            rms=frame.rms,
            rms_ratio=frame.rms_ratio,
            evaluated=frame.evaluated,
            slopes=kinds[BEFORE],
            strided="coarse" in others,
            errors=SimpleNamespace(smallest_move=1e-5),
            gaussian_slopes=lambda: kinds[GAUSSIAN],
            growth=frame.growth,
            slopes_for_growth=frame.slopes_for_growth,
            **others,
        )
        slopes = px.Secant(window=frame.W).slopes(window, SimpleNamespace(pairs=pairs, finite=finite))
    return frame.growth(slopes)[0]


def test_slopes_are_secants():
    assert growth() == pytest.approx(MEASURED)


def test_a_step_that_hardly_moved_keeps_its_slope():
    """What its output did is rounding; a step that is new was not there before, so its move is from the origin."""
    assert growth(move=1e-6) == pytest.approx(BEFORE)
    assert growth(move=1e-6, evaluated_until=16) == pytest.approx([BEFORE, BEFORE, MEASURED, MEASURED, MEASURED])
    assert growth(move=0.0, evaluated_until=16) == pytest.approx([BEFORE, BEFORE, GAUSSIAN, GAUSSIAN, GAUSSIAN])


@pytest.mark.parametrize("change", [np.nan, np.inf, 1e200])
def test_outputs_that_are_not_finite_or_overflow_give_no_slope(change):
    """The slope is that of the exact network for Gaussian data, in that step only."""
    assert growth(change=change) == pytest.approx([MEASURED, MEASURED, GAUSSIAN, MEASURED, MEASURED])


def test_repaired_and_interpolated_outputs_give_no_slope():
    finite = np.array([[True, False, True, True, True]])
    assert growth(finite=finite) == pytest.approx([MEASURED, GAUSSIAN, MEASURED, MEASURED, MEASURED])
    assert growth(coarse=np.array([True])) == pytest.approx(GAUSSIAN)
    assert growth(coarse=np.array([False])) == pytest.approx(MEASURED)


def test_growth_stays_in_its_bounds():
    """A negative growth is 0, and a large one 1.3 times that of the expected rms."""
    largest = 1.3 * frame_at(14, 19).rms_ratio[0, 2]
    bounds = growth(change=-1e3)[2], growth(change=1e3)[2]  # which is which depends on the sign of the output's weight
    assert sorted(bounds) == pytest.approx([0.0, largest], abs=1e-9)


def test_outputs_that_were_repaired_are_named_to_a_method():
    """In the round in which the network returned NaN for a guess, and in no other."""
    rounds = []

    class Watching(px.Secant):
        def slopes(self, window, measured):
            rounds.append(None if measured.finite is None else measured.finite.tolist())
            return super().slopes(window, measured)

    def network(x, t):
        outputs = 0.3 * torch.tanh(x)
        if not rounds:
            outputs[3] = torch.nan
        return outputs

    px.sample(network, problems.noise(1), px.samplers.ddim(steps=12), Watching(window=6))
    assert rounds[0] == [[True, True, True, False, True, True]]
    assert not any(rounds[1:])
