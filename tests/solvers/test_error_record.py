"""What is remembered of the errors of a window: rounds are written by hand, no network is called."""

from __future__ import annotations

import numpy as np
import pytest

from parataxis.solvers import error_estimate as estimates
from parataxis.solvers.error_record import ErrorRecord
from problems import frame_at

WIDTH, DIM = 5, 16
SLOPE_ERROR, GROWTH = 0, 1


def round_of(record, frame, move, growth=0.5, residual=0.01, assumed=None):
    """Let every step move by this share of the expected rms, with this growth; return the estimate.

    The solver's slopes assume the same growth, or another.
    """
    moved = move * frame.rms
    df = (growth - frame.a) / frame.b_sum  # over dx, along it
    pairs = np.stack([np.ones_like(df), df, df, df * df], -1).reshape(*df.shape, 2, 2) * (moved**2)[..., None, None]
    moves = np.full_like(moved, move)
    return record.estimate(frame, pairs, residual * moved, moves, np.full_like(moved, assumed or growth))


def known(record, what):
    """Return what is known of the steps of the window."""
    return record.known[0, what, WIDTH:]


def test_slope_errors_and_growth_are_measured_of_steps_that_were_evaluated():
    """Of the others the move is no difference of two evaluations."""
    frame = frame_at(3, 6)
    record = ErrorRecord(frame)
    round_of(record, frame, 0.1)
    assert known(record, SLOPE_ERROR)[:3] == pytest.approx(0.01)
    assert known(record, GROWTH)[:3] == pytest.approx(0.5)
    assert np.isnan(known(record, SLOPE_ERROR)[3:]).all()
    assert np.isnan(known(record, GROWTH)[3:]).all()


def test_moves_of_the_size_of_rounding_or_of_the_state_measure_nothing():
    """The first say nothing of the network, the others nothing of slopes at smaller moves."""
    frame = frame_at(3, 8)
    for move in (1e-7, 5.0):
        record = ErrorRecord(frame)
        round_of(record, frame, move)
        assert np.isnan(known(record, SLOPE_ERROR)).all()
        assert np.isnan(known(record, GROWTH)).all()


def test_largest_growth_is_remembered():
    """A later and smaller one does not take its place; the slope error is the last."""
    frame = frame_at(3, 8)
    record = ErrorRecord(frame)
    for growth, residual in ((0.5, 0.01), (0.9, 0.02), (0.2, 0.03)):
        round_of(record, frame, 0.1, growth, residual)
    assert known(record, GROWTH) == pytest.approx(0.9)
    assert known(record, SLOPE_ERROR) == pytest.approx(0.03)


def test_what_is_known_moves_with_the_window():
    """Two steps on, the last two are new."""
    frame = frame_at(3, 8)
    record = ErrorRecord(frame)
    round_of(record, frame, 0.1)
    record.shift(frame, np.array([2]))
    assert np.isfinite(known(record, GROWTH)).tolist() == [True] * 3 + [False] * 2


def test_growth_for_gaussian_data_is_a_floor_of_the_growth_that_is_measured():
    """Moves that seem to die out do not make what is left of them small."""
    frame = frame_at(14, 19)
    quiet, still = ErrorRecord(frame), ErrorRecord(frame)
    for record, growth in ((quiet, 0.9), (still, 0.0)):
        round_of(record, frame, 0.1, growth)
    gaussian = frame.gaussian_growth(np.ones(1))
    missed, moves = np.full((1, WIDTH), 0.01), np.full((1, WIDTH), 0.1)
    expected = estimates.local_error(missed, gaussian, moves, estimates.SLOPE_ERROR_SAFETY)
    estimate = round_of(still, frame, 0.1, 0.0)
    assert (gaussian > 0.5).all()
    assert (estimate.accepted >= 0.99 * expected).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_accepted_errors_grow_as_slopes_say_where_noise_is_added(eta):
    """Moves are mostly those of the noise: growth along them is not all."""
    frame = frame_at(3, 8, eta=eta)
    record = ErrorRecord(frame)
    record.carried[:] = 1e6  # beside which the errors of this round are nothing
    steep = round_of(record, frame, 0.1, growth=0.5, assumed=1.2)
    expected = 1.2 ** np.arange(1, WIDTH + 1) if eta else np.ones(WIDTH)
    assert steep.accepted[0] == pytest.approx(1e6 * expected)


def test_noise_makes_a_loop_forget():
    """So what may become of an early error is bounded, the more noise the better."""
    without, some, much = (frame_at(0, 0, eta=eta).reach[0] for eta in (0.0, 0.3, 1.0))
    assert (without > some).all()
    assert (some > much).all()
    assert much == pytest.approx(estimates.REACH_OF_NOISE)


def test_data_prediction_that_has_become_larger_is_not_trusted_at_once():
    """One that still diverges would make every error look small."""
    frame = frame_at(14, 19)
    record = ErrorRecord(frame)
    for norm in (1.0, 2.0, 4.0):
        record.note_size(frame, np.full((2, 1), norm * np.sqrt(DIM)))
    assert record.variance == pytest.approx(16.0)
    assert record.smallest_variance(frame) == pytest.approx(1.0)
