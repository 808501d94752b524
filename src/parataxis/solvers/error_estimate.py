r"""When are states accepted? The error estimate and the acceptance rule, pure functions of (S, W) arrays.

Column j belongs to step lo + j of a window, or to the state behind it where it says so. What is estimated is the error
that the sample would have if the states up to j were accepted as they are now corrected. In words: an *absolute* error
is carried from state to state. What a correction missed enters it as the error of a slope times the move of the input.
The growth that was measured, never below 1, multiplies it.

With c_j = |new - old| of the state behind step j, du its input's move since the evaluation before, and the measured

    G_j = |A du + B df| / |du|   the growth of a change through step j, the largest over the rounds,
    m_j = |r_j| / |du|           what the slope of step j missed, per unit that its input was moved,

    local error       P_j = g_j P_{j-1} + m_j c_{j-1},  P_0 = 0,     g = max(G, growth for Gaussian data, |J|)
    at most           K_j = max(c_j, g_j K_{j-1}),      K_0 = c_0
    what remains      left_j = min(K_j, max(s P_j, 0.01 c_j, 0.001 K_j)),  left_0 = 0
    carried           E_j = E gamma_0 .. gamma_j,       gamma = max(1, G), where steps add noise max(1, g)
    to the sample     gain_j = gamma_{j+1} .. gamma_{h-1} times what may happen from state h on, where nothing is
    measured

The first state comes from an accepted input and has no local error. Moves above :data:`MAX_TRUSTED_MOVE` measure
neither G nor m. But a denoiser that jumps from one answer to another looks flat to every small move, so what the slope
missed in such a move, |r_j| / |du|, counts for the next one in proportion to its size: m_j is at least
|r_j| c_{j-1} / |du|^2.

A network in few bits answers moves with its rounding: below some size they do not fall any more. What its outputs
differ by, whatever their inputs do, is measured (s, see :func:`output_noise`) and taken out of the moves, of m and of
G: no round makes it smaller, so it does not keep states from being accepted. It is added to their error instead:

    floor             F_j^2 = sum_{i <= j} (gamma_{i+1} .. gamma_j |B_i| s)^2

Measured on six trained networks
(docs/research.md): the local error is P within a factor of 0.9 to 1.3 in the median, and the growth behind a state is
0.7 to 1.7 times the product of gamma, while average slopes say up to 590 times too little.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Indices

__all__ = [
    "Estimate",
    "accumulated",
    "carried",
    "choose_accepted",
    "choose_passed",
    "gain_to_sample",
    "local_error",
    "lower_median",
    "output_noise",
    "without_noise",
]

Flags = NDArray[np.bool_]

SLOPE_ERROR_SAFETY = 4.0  # s: 90 % of local errors were below 1.4 to 4.6 times P, over six networks
MIN_REMAINING = 0.01  # of the move itself: rounding of the network is not in P
MIN_BEHIND_A_MOVE = 1e-3  # of the largest move that can have reached a state: 0 only where nothing moved at all
PLANNED = 2.5  # times the estimate, so that growth found later changes the report instead of being missed
EARLY = 10.0  # times better, for states of a full sweep that do not complete it: else 6 % of them are flagged in vain
REPORTED = 3.0  # times the estimate: 99 % of 512 runs of third-party networks then stayed below it
REACH = (
    4.0  # over alpha: all that a state u can say of the data is u / alpha; with 2, 6 of 48 runs on digits were above
)
REACH_OF_NOISE = 20.0  # at most, where noise takes the place of an error: early in DDPM, 18 was seen on digits
REACH_UNKNOWN = 16.0  # instead, where the schedule is unknown
MAX_TRUSTED_MOVE = 0.1  # of a state: a larger move says nothing of slopes at smaller ones
TELLING = 0.3  # of the largest move by which the growth of a step was measured: smaller ones measure rounding
SMOOTH = 2.0  # times the smallest |df| / |du| of a step: what moves df beyond that is not the move of its input
FINE = 2.0**-20  # rounding of outputs below which a network counts as smooth
ROUNDINGS = 2.0  # of outputs, relative to them, that noise is at most; in bfloat16 1.5 were seen
FLOOR_SHARE = 0.5  # of the floor that is reported three times: it is measured, and its parts are independent
NOISE_SAFETY = 1.25  # times the noise that is taken out of a move; what is left of 97 % of noisy moves is then nothing
CLEAR = 2.0  # times the square of the noise in it: a smaller square measures nothing
UNMEASURED = 1e100  # a slope error that has not been measured: the whole move may remain
TINY = 1e-300


def logs(values: Array) -> Array:
    """Return logarithms, with 0 as something very small."""
    return np.log(np.maximum(values, TINY))


def local_error(slope_errors: Array, growth: Array, moves: Array, safety: float) -> Array:
    """Return left (S, W): how far from right each state may be after this correction, from the slopes of the window.

    Args:
        slope_errors: (S, W) m.
        growth: (S, W) g.
        moves: (S, W) c; infinite where nothing is known.
        safety: s.
    """
    if moves.shape[1] == 1:
        return np.zeros_like(moves)
    level = np.add.accumulate(logs(growth), 1)  # log of the growth from the first state on
    shares = logs(moves) - level
    cap = np.exp(level + np.maximum.accumulate(shares, 1))
    missed = logs(slope_errors[:, 1:] * np.minimum(moves[:, :-1], UNMEASURED)) - level[:, 1:]
    left = np.zeros_like(moves)
    local = safety * np.exp(level[:, 1:] + np.logaddexp.accumulate(missed, 1))
    smallest = np.maximum(MIN_REMAINING * moves[:, 1:], MIN_BEHIND_A_MOVE * cap[:, 1:])
    # Where nothing has moved, nothing remains: logarithms would leave a trace.
    moved = np.logical_or.accumulate(moves > 0, 1)[:, 1:]
    np.multiply(np.minimum(cap[:, 1:], np.maximum(local, smallest)), moved, out=left[:, 1:])
    return left


def accumulated(sources: Array, growth: Array) -> Array:
    """Return (S, W) root sums of squares: what independent errors (S, W) of the steps have grown to behind each."""
    level = np.add.accumulate(logs(growth), 1)
    return np.exp(level + np.logaddexp.accumulate(2 * (logs(sources) - level), 1) / 2) * sources.any(1, keepdims=True)


def without_noise(values: Array, noise: Array) -> Array:
    """Return norms of which the noise in them, (S, W) as well, is taken out; infinite ones stay."""
    return values * np.sqrt(np.maximum(1 - (noise / np.maximum(values, TINY)) ** 2, 0.0))


def output_noise(changes: Array, moves: Array, smoothness: Array, near: Flags, noise: Array) -> Array:
    """Return s (S,): the norm by which two outputs differ though their inputs hardly do.

    A change of an output beyond :data:`SMOOTH` times what the move of its input was once seen to explain is noise, if
    most steps of the window have it. Once seen it stays, but it is never more than most outputs change by now.

    Args:
        changes: (S, W) |df|.
        moves: (S, W) |du|.
        smoothness: (S, W) the smallest |df| / |du| that was seen of each step before, or NaN.
        near: (S, W) the steps whose moves count.
        noise: (S,) s of the last round.
    """
    seen = near & np.isfinite(smoothness)
    excess = lower_median(without_noise(changes, SMOOTH * smoothness * moves), seen)
    return np.where(seen.sum(1) >= 3, np.fmin(np.fmax(noise, excess), lower_median(changes, seen)), noise)


def lower_median(values: Array, counted: Flags) -> Array:
    """Return (S,) the largest number that at least half of the counted values reach, or NaN if none counts."""
    count = counted.sum(1)
    ordered = np.sort(np.where(counted, values, np.nan), 1)
    return ordered[np.arange(len(values)), np.maximum(count - 1, 0) // 2]


def gain_to_sample(gamma: Array, measured: Flags, reach: Array, at_end: Flags) -> Array:
    """Return (S, W) how much of an error of the state behind each step reaches the sample.

    Args:
        gamma: (S, W) growth of a carried error through each step; 1 beyond the end of a window.
        measured: (S, W) steps whose growth has been measured, and entries beyond a window.
        reach: (S, W) what may become of an error of the state behind each step on the whole way to the sample.
        at_end: (S, W) whether that state is the sample.
    """
    # A state gains what the measured steps behind it make of it, then what may happen from the first that is not.
    samples, width = gamma.shape
    behind = np.ones_like(gamma)
    np.multiply.accumulate(gamma[:, :0:-1], 1, out=behind[:, -2::-1])
    whole = np.where(at_end, 1.0, reach)
    # Up to the first step that was never measured: its input state has index first - 1. Where all are, first is 0 too,
    # and the last state counts; where already the first is not, its own does.
    last = np.where(measured[:, 0], (np.argmin(measured, 1) - 1) % width, 0)
    at = np.arange(samples) * width + last
    gain = behind * (whole.take(at) / behind.take(at))[:, None]
    return np.where(np.arange(width) <= last[:, None], gain, whole)


def carried(error: Array, gamma: Array) -> Array:
    """Return E (S, W): the accepted error of the first state of a window, carried to the state behind each step.

    Args:
        error: (S,) absolute.
        gamma: (S, W).
    """
    return error[:, None] * np.multiply.accumulate(gamma, 1)


class Estimate:
    """The estimate of a round.

    Attributes:
        accepted: (S, W) T, absolute error of the state behind each step, if it is accepted.
        relative: (S, W) i, planned relative error of the sample by the local error of each state alone.
        planned: (S, W) the same with the error that is carried.
        reported: (S, W) relative error of the sample that is reported, if each state were the last to be accepted.
    """

    __slots__ = ("accepted", "planned", "relative", "reported")

    def __init__(
        self, left: Array, carry: Array, gain: Array, size: Array, at_end: Flags, floor: Array | float = 0.0
    ) -> None:
        share = gain / size[:, None]
        self.relative = np.where(at_end, left, PLANNED * left) * share
        self.planned = np.hypot(carry * share, self.relative)
        self.accepted = np.hypot(np.hypot(carry, left), FLOOR_SHARE * floor)
        self.reported = REPORTED * self.accepted * share
        if not np.isfinite(self.reported.sum()):
            for values in (self.relative, self.planned, self.accepted, self.reported):
                values[np.isnan(values)] = np.inf  # of an overflow nothing is known


def choose_accepted(
    estimate: Estimate, tolerance: float, share: Array, fresh: Array, width: Indices, last: Flags, *, whole: bool
) -> Indices:
    """Return (S,) how many states to accept: the longest prefix whose estimated error fits in the tolerance's share.

    The last step stays for another evaluation, which measures the error of its slope, unless it ends the loop. A window
    over the whole loop need not move on: unless all of it is accepted, what is accepted saves evaluations but no
    rounds, and it has to be :data:`EARLY` times better.

    Args:
        estimate: Of this round.
        tolerance: Relative error allowed in the sample.
        share: (S, W) sqrt of the part of the loop up to each state.
        fresh: (S, W) sqrt of the part of the loop between the accepted state and each state.
        width: (S,) states of each window.
        last: (S,) whether the window ends at the sample, or has no step to keep back.
        whole: Whether the windows reach over the whole loop.
    """
    count = _longest_prefix(estimate, tolerance / REPORTED, share, fresh, width)
    if whole and (count < width).any():
        early = _longest_prefix(estimate, tolerance / REPORTED / EARLY, share, fresh, width)
        count = np.where(count < width, early, count)
    return np.where((count == width) & ~last, np.maximum(count - 1, 1), count)


def _longest_prefix(estimate: Estimate, allowed: float, share: Array, fresh: Array, width: Indices) -> Indices:
    """Return (S,) how many leading states of each window are within the shares of an error."""
    relative = estimate.relative
    fits = (relative == 0) | (
        (relative <= allowed) & ((estimate.planned <= allowed * share) | (relative <= allowed / 2 * fresh))
    )
    fits[:, 0] = True
    count = np.minimum(np.logical_and.accumulate(fits, 1).sum(1), width)
    return np.asarray(count)


def choose_passed(passed: Flags, width: Indices) -> Indices:
    """Return (S,) how many states a published test accepts: those that passed, and the first that did not."""
    return np.minimum(np.logical_and.accumulate(passed, 1).sum(1) + 1, width)
