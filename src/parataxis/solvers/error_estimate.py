r"""When are states accepted? The error estimate and the acceptance rule, pure functions of (S, W) arrays.

Column j of an array belongs to the state behind step j of a window, or to the step itself where it says so. The first
state comes from an accepted input: it has no error. For the others the correction assumed slopes, and what it missed is
known of every step that is evaluated again: the residual that it leaves, per unit that its input was moved, is the
error m_i of the slope. A move c_i of this round then leaves about m_i c_i, carried on with the steps' growth J:

    eps_{j+1} = J_j eps_j + m_j c_j,     e_j = gain_j SLOPE_ERROR_SAFETY eps_j / sqrt(v)

gain_j carries an error of state j to the sample: the growth of the steps in the window, then that of the exact network
for Gaussian data of variance v, the mean square of the data prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Indices
from .correction import rows_of

__all__ = ["choose_accepted", "error_to_sample", "choose_passed", "gain_to_sample", "largest_slope_error", "remaining_error", "slope_error"]

# Errors are larger than their estimate by average slopes, because they lie along directions that grow more. The numbers
# are from trained networks and exact mixtures (benchmarks/estimates.py).
SLOPE_ERROR_SAFETY = 8.0  # in the error of a slope: 99 % of 288 runs stayed below their estimate
GROWTH_SAFETY = 24.0  # in the growth behind a window: errors of failed runs grew 5 to 60 times more than average slopes
MAX_GROWTH_TIMES_ALPHA = 1.5  # but no more than this over alpha: all that a state u can say of the data is u / alpha
MAX_TRUSTED_MOVE = 0.1  # of a state: a larger move says nothing of the error of a slope at smaller ones
SAFETY_UNKNOWN_SCHEDULE = 16.0  # where the schedule is unknown, or outputs are clipped and slopes not the network's
MIN_REMAINING = 0.1  # part of a move that may remain, at least
UNMEASURED = 1e100  # a slope error that has not been measured: the whole move may remain


def slope_error(residuals: Array, moves: Array, trusted: NDArray[np.bool_], known: Array) -> Array:
    """Return m of steps that are evaluated again, where their move can be trusted; elsewhere what was known.

    Args:
        residuals: (S, W) |r| behind each step.
        moves: (S, W) how far the input of each step has moved since its last evaluation.
        trusted: (S, W) moves that are neither rounding nor too large.
        known: (S, W) m as last measured, or NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        measured = residuals / moves
    return np.where(trusted & np.isfinite(measured), measured, known)


def largest_slope_error(slope_errors: Array, old: Indices) -> Array:
    """Return (S,) the largest m that is known of the last W steps that were evaluated before; UNMEASURED without any.

    Args:
        slope_errors: (S, 2 W) m of the steps lo - W .. lo + W - 1, or NaN.
        old: (S,) how many steps of the window were evaluated before.
    """
    width = slope_errors.shape[1] // 2
    age = np.arange(2 * width) - old[:, None]
    counts = np.isfinite(slope_errors) & (age >= 0) & (age < width)
    largest = np.where(counts, slope_errors, 0.0).max(1)
    return np.where(largest > 0, largest, UNMEASURED)


def remaining_error(slope_errors: Array, largest: Array, moves: Array, chunks: Sequence[Array]) -> Array:
    """Return eps (S, W): what the correction is expected to have missed.

    Args:
        slope_errors: (S, W) m of each step, or NaN where it has not been measured.
        largest: (S,) what is assumed of these.
        moves: (S, W) c of the states.
        chunks: M, how a missed residual of a state is carried on to those behind it; see :mod:`.correction`.
    """
    assumed = np.where(np.isfinite(slope_errors), slope_errors, largest[:, None])
    remaining = np.zeros_like(moves)
    remaining[:, 1:] = assumed[:, 1:] * np.minimum(moves[:, :-1], UNMEASURED)
    for rows, chunk in zip(rows_of(chunks), chunks, strict=True):
        known = remaining[:, rows.stop - chunk.shape[2] : rows.stop]
        remaining[:, rows] += (np.abs(chunk) @ known[:, :, None])[:, :, 0]
    return remaining


def gain_to_sample(growth: Array, behind: Array, least: Array, reach: Array | None, *, floor: bool) -> Array:
    """Return (S, W) how much of an error of each state reaches the sample.

    Args:
        growth: (S, W) J of the steps; 1 beyond the end of a window.
        behind: (S,) growth of all steps behind the window.
        least: (S, W) ratio of the expected sizes of the sample and of each state.
        reach: (S, W) what a state can say of the data: MAX_GROWTH_TIMES_ALPHA least / alpha; None for an unknown
            schedule.
        floor: Whether the gain is at least ``least`` (unknown schedules, clipped outputs).
    """
    gain = np.ones_like(growth)
    gain[:, :-1] = np.multiply.accumulate(np.abs(growth[:, :0:-1]), axis=1)[:, ::-1]
    gain *= np.abs(behind)[:, None]
    if reach is not None:
        gain = np.maximum(gain, np.minimum(reach, GROWTH_SAFETY * gain))
    return np.maximum(gain, least) if floor else gain


def error_to_sample(remaining: Array, moves: Array, gain: Array, size: Array, safety: float) -> Array:
    """Return e (S, W): the estimated relative error of the sample if each state were the last to be accepted.

    Args:
        remaining: (S, W) eps.
        moves: (S, W) c; no more than the whole move remains, and no less than MIN_REMAINING of it.
        gain: (S, W).
        size: (S,) norm of the data prediction.
        safety: Factor in eps.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # of an overflow nothing is known, whatever its gain
        errors = gain * np.clip(safety * remaining, MIN_REMAINING * moves, moves) / size[:, None]
    errors[:, 0] = 0.0
    return np.where(np.isnan(errors), np.inf, errors)


def choose_accepted(errors: Array, used: Array, share: Array, width: Indices, last: NDArray[np.bool_]) -> Indices:
    """Return (S,) how many states to accept: those whose errors fit in the tolerance's share up to their step.

    The last step stays for another evaluation, which measures the error of its slope, unless it ends the loop.

    Args:
        errors: (S, W) e.
        used: (S,) error accepted before.
        share: (S, W) part of the tolerance that may be used up to each state.
        width: (S,) states of each window.
        last: (S,) whether the window ends at the sample, or has no step to keep back.
    """
    allowed = (errors == 0) | (used[:, None] + errors <= share)
    allowed[:, 0] = True
    count = np.minimum(np.logical_and.accumulate(allowed, 1).sum(1), width)
    return np.where((count == width) & ~last, np.maximum(count - 1, 1), count)


def choose_passed(passed: NDArray[np.bool_], width: Indices) -> Indices:
    """Return (S,) how many states a published test accepts: those that passed, and the first that did not."""
    return np.minimum(np.logical_and.accumulate(passed, 1).sum(1) + 1, width)
