"""The error estimate, tested alone: small arrays in, numbers out."""

from __future__ import annotations

import numpy as np

from parataxis.solvers import error_estimate as estimates


def test_nothing_remains_where_nothing_moved():
    """An estimate of 0 means that no state moved at all."""
    ones, zeros = np.ones((1, 4)), np.zeros((1, 4))
    assert not estimates.local_error(ones, ones, zeros, 4.0).any()


def test_a_state_behind_one_that_moved_has_an_error():
    """Even if it stood still, and if the slope between them was measured without an error."""
    moves = np.array([[0.0, 1e-3, 0.0, 0.0]])
    left = estimates.local_error(np.zeros((1, 4)), np.ones((1, 4)), moves, 4.0)
    assert left[0, 0] == 0
    assert (left[0, 1:] > 0).all()


def test_the_first_state_has_no_local_error():
    """It comes from an accepted input."""
    left = estimates.local_error(np.full((1, 3), 1e100), np.ones((1, 3)), np.ones((1, 3)), 4.0)
    assert left[0, 0] == 0
    assert np.allclose(left[0, 1:], 1)  # of the others no more than the largest move


def test_errors_of_slopes_add_up_along_the_window():
    """Two steps that each miss a tenth of the move of their input, with a growth of two."""
    moves, missed, growth = np.ones((1, 3)), np.full((1, 3), 0.01), np.full((1, 3), 2.0)
    left = estimates.local_error(missed, growth, moves, 1.0)
    assert np.allclose(left[0], [0, 0.01, 0.03])


def test_gain_is_measured_as_far_as_it_can_be():
    """Up to the first step that was never measured its growth counts, behind it what may happen."""
    gamma = np.array([[1.0, 2.0, 3.0, 1.0]])
    measured = np.array([[True, True, True, False]])
    reach = np.array([[50.0, 40.0, 30.0, 20.0]])
    gain = estimates.gain_to_sample(gamma, measured, reach, np.zeros((1, 4), bool))
    assert np.allclose(gain[0], [2 * 3 * 30, 3 * 30, 30, 20])


def test_gain_to_the_sample_itself_is_one():
    """A window that ends at the sample needs no guess of what lies behind it."""
    gamma, measured = np.array([[2.0, 2.0, 2.0]]), np.ones((1, 3), bool)
    gain = estimates.gain_to_sample(gamma, measured, np.full((1, 3), 9.0), np.array([[False, False, True]]))
    assert np.allclose(gain[0], [4, 2, 1])


def estimate_of(left, carry=0.0):
    left = np.array([left])
    ones, nowhere = np.ones_like(left), np.zeros(left.shape, bool)
    return estimates.Estimate(left, np.full_like(left, carry), ones, np.ones(1), nowhere)


def accepted(estimate, tolerance, share=1.0, ends=True, whole=False):
    """Return how many states of a window are accepted that ends at the sample, or does not, or is the whole loop."""
    left = estimate.relative
    shares, last, width = np.full_like(left, share), np.array([ends]), np.array([left.shape[1]])
    return int(estimates.choose_accepted(estimate, tolerance, shares, shares, width, last, whole=whole)[0])


def test_the_longest_prefix_within_the_tolerance_is_accepted():
    """Its last step stays for another evaluation, unless it ends the loop."""
    small = estimate_of([0.0, 1e-4, 1e-4, 1e-4])
    assert accepted(small, 1e-2, ends=False) == 3
    assert accepted(small, 1e-2) == 4
    late = estimate_of([0.0, 1e-4, 1.0, 1e-4])
    assert accepted(late, 1e-2) == accepted(late, 1e-2, ends=False) == 2
    assert accepted(late, 0.0) == 1


def test_states_of_a_full_sweep_that_has_to_wait_are_accepted_with_caution():
    """No round is saved by them, and what grows later can still be corrected. A narrow window has to move on."""
    waiting, ready = estimate_of([0.0, 1e-3, 1e-3, 1.0]), estimate_of([0.0, 1e-3, 1e-3, 1e-3])
    assert accepted(waiting, 1e-2) == accepted(waiting, 1e-2, ends=False) == 3
    assert accepted(waiting, 1e-2, whole=True) == 1
    assert accepted(ready, 1e-2, whole=True) == 4


def test_published_rule_accepts_up_to_the_first_state_that_fails():
    """States that pass behind it rest on one that did not."""
    passed = np.array([[True, True, False, True, True], [False, True, True, True, True], [True] * 5])
    assert estimates.choose_passed(passed, np.array([5, 5, 5])).tolist() == [3, 1, 5]
    assert estimates.choose_passed(passed, np.array([2, 2, 2])).tolist() == [2, 1, 2]


def test_unknown_numbers_are_never_accepted():
    """NaN and infinity count as an error of any size."""
    unknown = estimate_of([0.0, np.nan, np.inf, 0.0])
    assert accepted(unknown, 1.0) == 1


def test_what_was_carried_is_reported():
    """The reported error holds what was accepted before."""
    assert np.allclose(estimate_of([0.0, 0.0], carry=0.1).reported, estimates.REPORTED * 0.1)


def test_noise_is_what_small_moves_do_not_explain():
    """Moves fall tenfold, outputs go on changing by one unit: that is noise. Where they fall along there is none."""
    near, smoothness = np.ones((1, 4), bool), np.ones((1, 4))
    moves = np.full((1, 4), 0.1)
    noise = estimates.output_noise(np.ones((1, 4)), moves, smoothness, near, np.zeros(1))
    assert 0.9 < noise[0] <= 1
    assert estimates.output_noise(1.5 * moves, moves, smoothness, near, np.zeros(1))[0] == 0


def test_noise_of_one_step_is_none_of_the_network():
    """A jump between two answers is met by few steps at a time."""
    changes = np.array([[0.1, 0.1, 5.0, 0.1]])
    noise = estimates.output_noise(changes, np.full((1, 4), 0.1), np.ones((1, 4)), np.ones((1, 4), bool), np.zeros(1))
    assert noise[0] == 0


def test_noise_is_no_more_than_outputs_change_by():
    """What was seen before is taken back once outputs change by less."""
    changes = np.full((1, 4), 1e-3)
    noise = estimates.output_noise(changes, changes, np.ones((1, 4)), np.ones((1, 4), bool), np.ones(1))
    assert noise[0] == 1e-3


def test_independent_errors_add_as_squares():
    """And grow along the window."""
    total = estimates.accumulated(np.full((1, 3), 3.0), np.array([[9.0, 1.0, 2.0]]))
    assert np.allclose(total[0], [3, np.sqrt(18), np.sqrt(81)])
    assert not estimates.accumulated(np.zeros((1, 3)), np.full((1, 3), 2.0)).any()


def test_the_first_state_is_accepted_whatever_is_known():
    """Even of a state without a number: it is the loop's own step, and every round must accept one."""
    unknown = estimate_of([np.nan, 0.0, 0.0])
    assert accepted(unknown, 1e-2) >= 1
    assert np.isinf(unknown.relative[0, 0])


def test_early_states_have_a_share_of_the_tolerance():
    """An error that the whole loop may have is too large for its first part."""
    small = estimate_of([0.0, 1e-3, 1e-3], carry=1e-3)
    assert accepted(small, 1e-2) == 3
    assert accepted(small, 1e-2, share=0.1) == 1


def test_something_of_a_move_remains():
    """However well slopes are known: a hundredth of the move itself."""
    moves = np.array([[1.0, 1.0, 0.5]])
    left = estimates.local_error(np.zeros((1, 3)), np.ones((1, 3)), moves, 4.0)
    assert np.allclose(left[0], [0, 0.01, 0.005])


def test_carried_errors_grow_along_the_window():
    """With the product of the growth of the steps."""
    assert np.allclose(estimates.carried(np.array([0.5]), np.array([[2.0, 3.0, 1.0]])), [[1, 3, 3]])
