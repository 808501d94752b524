"""What the rounds so far have shown of the errors of S windows, and the estimate that follows from it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..arrays import Array, Indices
from . import error_estimate as estimates
from .error_estimate import Estimate
from .frame import Flags, Frame, PerSample

__all__ = ["ErrorRecord"]

NOISY = 0.3  # signal below which a data prediction is mostly the network's error
NEAR_NOISE = 0.05  # alpha below which it is that error divided by alpha
SMALL = 1e-12  # growth for Gaussian data below which no ratio to it is taken
GROWTH, SIZE, SLOPES = 1, 3, 5


class ErrorRecord(PerSample):
    """What is known of the errors of S windows. Arrays have an entry for every sample.

    Attributes:
        used: (S,) error of the sample that has been accepted, as it is reported.
        carried: (S,) absolute error of the accepted state of each window.
        variance: (S,) mean square of the data prediction; ``variances`` (S, 3) in the last rounds.
        noise: (S,) norm by which two outputs differ though their inputs hardly do.
        output_size: (S,) norm of an output.
        smallest_slope_error: (S,) the smallest that most steps of a round had.
        known: (S, 6, 2 W) of the steps lo - W .. lo + W - 1, or NaN: the error of their slopes as last measured, the
            largest growth that was measured, that over the growth for Gaussian data, the largest move, over the
            expected rms, by which growth was measured, and the smallest change of an output over that of its input;
            and in the first W entries their slopes.
        slopes: (S, W) of the last round, or NaN; a view.
    """

    STATES: ClassVar[dict[str, Any]] = {
        "used": 0.0,
        "carried": 0.0,
        "variance": 1.0,
        "variances": np.inf,
        "noise": 0.0,
        "output_size": 0.0,
        "smallest_slope_error": np.inf,
        "known": np.nan,
    }

    def __init__(self, frame: Frame) -> None:
        problem, self.W = frame.problem, frame.W
        self.problem, self.tables = problem, frame.tables
        # Whether the data prediction and the size of data are known.
        self.predicts = self.tables.alpha is not None and self.tables.predicts
        self.near_noise = None if self.tables.alpha is None else self.tables.alpha < NEAR_NOISE
        self.adds_noise = problem.coefficients.stochastic
        self.norm = float(np.sqrt(problem.dim))
        self.smallest_move = 10 * problem.rounding * self.norm  # over the expected rms: less is rounding
        self.largest_move = estimates.MAX_TRUSTED_MOVE * self.norm if self.tables.alpha is not None else np.inf
        self.seat(len(frame.places))

    def seat(self, count: int) -> None:
        """Begin anew with so many samples."""
        self.used, self.carried, self.variance = np.zeros(count), np.zeros(count), np.ones(count)
        self.variances = np.full((count, 3), np.inf)
        self.noise, self.output_size = np.zeros(count), np.zeros(count)
        self.smallest_slope_error = np.full(count, np.inf)
        # The room of W more entries is for shifts.
        self.room = np.full((count, 6, 3 * self.W), np.nan)
        self.slopes = self.room[:, SLOPES, : self.W]
        self.shifted = np.lib.stride_tricks.sliding_window_view(self.room, 2 * self.W, 2)

    @property
    def known(self) -> Array:
        """See the class."""
        return self.room[:, :, : 2 * self.W]

    @known.setter
    def known(self, values: Array) -> None:
        self.room[:, :, : 2 * self.W] = values

    def growth(self) -> tuple[Array, Array]:
        """Return (S, W) the largest growth that moves of each step have shown, or NaN, and their size over rms."""
        known = self.room[:, :, self.W : 2 * self.W]
        return known[:, GROWTH], known[:, SIZE] / self.norm

    def note_size(self, frame: Frame, norms: Array) -> None:
        """Take the mean square of the data prediction, from its norms (2, S) at the last and the first step.

        A trajectory that still diverges would make every error look small. The prediction at the accepted state does
        not diverge, but shows less than the whole sample while there is much noise: so the last one counts up to the
        expected size of data, 1, or to the first one where that is larger.
        """
        if self.W == 1:  # errors of a single state are not estimated
            return
        variance, first = norms * norms / self.problem.dim
        known = (variance > 0) & (variance < np.inf)
        if not frame.uniform:
            known &= frame.width > 0
        if self.predicts:
            # Near pure noise the data prediction is mostly the network's error divided by alpha.
            assert self.near_noise is not None
            limit = np.where(self.near_noise[frame.lo], 1.0, np.fmax(first, 1.0))
            self.variance = np.where(known, np.minimum(variance, limit), self.variance)
        else:
            self.variance = np.where(known, np.minimum(variance, np.where(first > 0, first, 1.0)), 1.0)
        self.variances[:, 1:] = self.variances[:, :-1]
        self.variances[:, 0] = self.variance

    def smallest_variance(self, frame: Frame) -> Array:
        """Return (S,) the smallest mean square of the data prediction in the last three rounds, at most 1 near noise.

        A prediction that still diverges would make every error look small.
        """
        smallest = self.variances.min(1)
        if self.tables.signal is None:
            return smallest
        return np.where(self.tables.signal[frame.hi] < NOISY, np.minimum(smallest, 1.0), smallest)

    def note_moves(
        self, frame: Frame, pairs: Array, residuals: Array, gaussian: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """Note what a round says of slopes and growth, where moves were large enough to say something.

        Args:
            frame: Where the windows stand.
            pairs: (S, W, 2, 2) inner products of (dx, df).
            residuals: (S, W) their norms.
            gaussian: (S, W) growth for Gaussian data.

        Returns:
            (S, W) the error of the slopes and the growth, NaN where unknown; the bend, by how much the slope of a step
            misses more for each unit of a move, from moves too large to count; and the noise of each step's result, or
            None.
        """
        a, b, rms = frame.a, frame.b_sum, frame.rms
        dx_dx = pairs[..., 0, 0]
        moved = np.sqrt(dx_dx)
        size = moved / rms
        square = a * a * dx_dx + 2 * a * b * pairs[..., 0, 1] + b * b * pairs[..., 1, 1]
        missed = residuals / moved
        near = frame.evaluated & (size > self.smallest_move) & np.isfinite(square + missed)
        if frame.strided:
            near &= ~frame.coarse[:, None]
        far = near & (size >= self.largest_move)
        near &= ~far
        bend = np.where(far, missed / moved, 0.0)
        slope_error, growth, ratio, largest, _ = self.room[:, :SLOPES, self.W : 2 * self.W].transpose(1, 0, 2)
        noise = self.note_noise(frame, pairs[..., 1, 1], moved, residuals, near)
        # What a network in few bits makes of a small move is its rounding: smaller moves than before say nothing of
        # growth.
        # But where a loop goes one way or another, its error grows by what the smallest moves say.
        exact = frame.batch.recurrence.replays and frame.batch.output_rounding <= estimates.FINE
        telling = near.copy() if exact else near & ~(size < estimates.TELLING * largest)
        if noise is not None:
            # Of a residual that is mostly noise, the error of the slope is at most what it says.
            clear = residuals**2 > estimates.CLEAR * noise**2
            missed = np.where(clear, estimates.without_noise(residuals, noise) / moved, np.fmin(missed, slope_error))
            telling &= square > 2 * estimates.CLEAR * noise**2
            square = square - noise**2
        np.copyto(slope_error, missed, where=near)
        np.fmax(growth, np.sqrt(np.maximum(square, 0.0)) / moved, out=growth, where=telling)
        np.fmax(largest, size, out=largest, where=telling)
        np.divide(growth, np.maximum(gaussian, SMALL), out=ratio)
        return slope_error, growth, bend, noise

    def note_noise(self, frame: Frame, df_df: Array, moved: Array, residuals: Array, near: Flags) -> Array | None:
        """Note what rounding of the network does to its outputs; return (S, W) what it adds to the result of each step.

        Args:
            frame: Where the windows stand.
            df_df: (S, W) squared norms of df.
            moved: (S, W) norms of du.
            residuals: (S, W) their norms.
            near: (S, W) steps whose moves count.
        """
        rounding = frame.batch.output_rounding
        if rounding <= estimates.FINE or self.problem.tolerance == 0:  # with 0 every move counts
            return None
        changes, smoothness = np.sqrt(df_df), self.room[:, SLOPES - 1, self.W : 2 * self.W]
        size = estimates.lower_median(changes, frame.inside & ~frame.evaluated)  # moves from the origin
        self.output_size = np.where(np.isfinite(size), size, self.output_size)
        noise = estimates.output_noise(changes, moved, smoothness, near, self.noise)
        self.noise = np.fmin(noise, estimates.ROUNDINGS * rounding * self.output_size)
        np.fmin(smoothness, changes / moved, out=smoothness, where=near)
        typical = estimates.lower_median(residuals / moved, near)
        self.smallest_slope_error = np.fmin(self.smallest_slope_error, typical)
        noise = np.sqrt(np.square(frame.b).sum(2)) * self.noise[:, None]
        # Steps differ in their noise: once there is some, all of a residual that slopes do not explain is taken for it.
        explained = estimates.SMOOTH * self.smallest_slope_error[:, None] * moved
        unexplained = np.where(near & (noise > 0), estimates.without_noise(residuals, explained), 0.0)
        return np.fmax(noise, unexplained)

    def estimate(self, frame: Frame, pairs: Array, residuals: Array, moves: Array, growth: Array) -> Estimate:
        """Return the estimate of a round, behind its correction; see error_estimate.py.

        Args:
            frame: Where the windows stand.
            pairs: (S, W, 2, 2) inner products of (dx, df).
            residuals: (S, W) norms of the residuals.
            moves: (S, W) norms of the corrections.
            growth: (S, W) of the slopes of the correction.
        """
        at_end = frame.steps >= self.problem.steps - 1
        if self.W == 1:
            nothing = np.zeros((len(moves), 1))
            return Estimate(nothing, nothing, nothing, np.ones(len(moves)), at_end)
        gaussian = frame.gaussian_growth(self.variance)
        slope_error, measured, bend, noise = self.note_moves(frame, pairs, residuals, gaussian)
        # New steps take the largest that is known of the steps before them.
        largest = np.fmax.reduce(self.room[:, :SIZE, : 2 * self.W], axis=2)[..., None]
        missed_before, growth_before, ratio_before = largest[:, 0], largest[:, 1], largest[:, 2]
        unknown = np.isnan(measured)
        worst = np.where(missed_before > 0, missed_before, estimates.UNMEASURED)
        missed = np.where(np.isnan(slope_error), worst, slope_error)
        # Where outputs jump between two answers, small moves on one side showed nothing of it, but the last one did.
        missed[:, 1:] = np.fmax(missed[:, 1:], bend[:, 1:] * moves[:, :-1])
        local = np.fmax(np.where(unknown, ratio_before * gaussian, measured), np.maximum(gaussian, np.abs(growth)))
        gamma = np.fmax(np.where(unknown, growth_before, measured), 1.0)
        # Moves are mostly those of the noise: along others an error grows as slopes and Gaussian data say. Slopes of a
        # network in few bits are those of its rounding, too.
        if self.adds_noise and noise is None:
            gamma = np.fmax(gamma, local)
        if not frame.uniform:
            local, gamma = np.where(frame.inside, local, 1.0), np.where(frame.inside, gamma, 1.0)
            unknown &= frame.inside
        floor: Array | float = 0.0
        if noise is not None:
            carrying = np.where(frame.inside, np.abs(growth), 1.0)
            moves = estimates.without_noise(moves, estimates.NOISE_SAFETY * estimates.accumulated(noise, carrying))
            # The same input gives the same output: a step from an exact state adds nothing.
            noise[:, 0] = np.where(self.carried > 0, noise[:, 0], 0.0)
            floor = estimates.accumulated(noise, gamma)
        left = estimates.local_error(missed, local, moves, estimates.SLOPE_ERROR_SAFETY)
        gain = estimates.gain_to_sample(gamma, ~unknown, frame.reach, at_end)
        carry = estimates.carried(self.carried, gamma)
        estimate = Estimate(left, carry, gain, self.norm * np.sqrt(self.smallest_variance(frame)), at_end, floor)
        if frame.strided:
            for values in (estimate.relative, estimate.planned):
                values[:, 1:] = np.where(frame.coarse[:, None], np.inf, values[:, 1:])
        return estimate

    def take(self, frame: Frame, estimate: Estimate, count: Indices) -> None:
        """Take the error of the states that are accepted: absolute, to be carried on, and as it is reported."""
        at = np.maximum(count - 1, 0)
        carried, used = estimate.accepted[frame.rows, at], estimate.reported[frame.rows, at]
        if not frame.uniform:
            carried, used = np.where(count > 0, carried, self.carried), np.where(count > 0, used, self.used)
        self.carried, self.used = carried, used

    def shift(self, frame: Frame, count: Indices) -> None:
        """Move with the windows."""
        self.known = self.shifted[frame.rows, :, count]
