"""The iteration of all windowed solvers: evaluate, measure, decide, move.

A windowed solver is a window and a function from measured numbers to slopes. What is done with the slopes, which states
are accepted and which enter is the same for all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Indices
from ..samplers.coefficients import Coefficients
from . import correction
from . import error_estimate as estimates
from .base import Answer, Queries
from .batch import Batch
from .replayed import ReplayedWindow
from .window import Measured, Window

__all__ = ["Windowed", "estimate_errors", "iterate"]


class Windowed:
    """A solver with a sliding window. A subclass is a frozen dataclass with a field ``window`` and gives the slopes.

    Attributes:
        window: Steps evaluated in a round; None for all.
        measures_pairs: Whether slopes are made of :attr:`Measured.pairs`.
        entry: How states enter the window: ``extrapolate`` or ``copy``.
    """

    window: int | None
    measures_pairs = False
    entry = "extrapolate"
    adopts = True  # samples that begin later join the same windows

    def slopes(self, window: Window, measured: Measured) -> Array:
        """Return d (S, W): how each output is assumed to move with its input."""
        raise NotImplementedError

    def error_slopes(self, window: Window) -> Array:
        """Return d (S, W) by which the growth of errors is judged: those of the correction."""
        return window.slopes

    def passed(self, window: Window) -> NDArray[np.bool_] | None:
        """Return (S, W) which states pass a published acceptance test, or None to accept by the error estimate."""
        return None

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """Every recurrence can be solved."""
        return None

    def open(self, batch: Batch) -> Window:
        """Return the windows of a batch."""
        kind = ReplayedWindow if batch.recurrence.replays else Window
        return kind(batch, self.window, keeps_pairs=self.measures_pairs)

    def round(self, window: Window, answer: Answer) -> None:
        """Do one round behind its evaluation."""
        measured = window.measure(answer.outputs)
        self.decide(window, measured)

    def decide(self, window: Window, measured: Measured) -> None:
        """Decide on what has been measured, and move."""
        window.correct(self.slopes(window, measured), measured)
        count, error = self.accept(window)
        window.move(count, error, self.entry)

    def accept(self, window: Window) -> tuple[Indices, Array]:
        """Return (S,) how many states of each window are accepted, and the error of the sample that this adds."""
        errors = estimate_errors(window, self.error_slopes(window))
        passed = self.passed(window)
        if passed is None:
            problem = window.problem
            share = (problem.tolerance / problem.steps) * (window.steps + 1)
            last = (window.hi == problem.steps) | (window.width == 0) if window.W > 2 else np.True_
            count = estimates.choose_accepted(errors, window.error_used, share, window.width, last)
        else:
            count = estimates.choose_passed(passed & window.inside, window.width)
        if window.strided:
            count = np.where(window.rough, np.minimum(count, 1), count)
        error = errors[window.rows, np.maximum(count - 1, 0)]
        return count, error if window.uniform else np.where(count > 0, error, 0.0)

    def solve(self, batch: Batch) -> Queries:
        """Solve the samples of a batch."""
        return iterate(self, batch)


def iterate(solver: Windowed, batch: Batch) -> Queries:
    """Solve the samples of a batch with a windowed solver."""
    window = batch.memory = solver.open(batch)
    while True:
        window.adopt()
        answer = yield window.query()
        if answer.sample is None:
            solver.round(window, answer)
            window.shrink()
        elif not len(answer.sample):  # samples have ended or have been added
            window.refresh()
        else:  # some samples still wait for outputs
            rows = np.array([window.row_of_place[int(place)] for place in answer.sample])
            part = window.take(rows)
            part.query()
            solver.round(part, answer)
            window.put(rows, part)


def estimate_errors(window: Window, slopes: Array) -> Array:
    """Return e (S, W): the estimated error of the sample if each state were the last to be accepted.

    Notes what this round says of the slopes; see error_estimate.py.

    Args:
        window: Behind its correction.
        slopes: (S, W) d, by which the growth of errors is judged.
    """
    problem, tables, W = window.problem, window.tables, window.W
    if W == 1:
        return np.zeros((len(window.places), 1))
    norm = np.sqrt(problem.dim)
    evaluated, moves = window.evaluated, window.last_moves[:, :W]
    largest_move = estimates.MAX_TRUSTED_MOVE * norm if tables.alpha is not None else np.inf
    trusted = evaluated & (moves > (10 * problem.rounding * norm) * window.rms) & (moves < largest_move * window.rms)
    if window.strided:
        trusted &= ~window.coarse[:, None]
    slope_errors = window.slope_errors
    slope_errors[:, W:] = estimates.slope_error(window.residuals, moves, trusted, slope_errors[:, W:])
    if window.uniform and not window.strided:
        window.last_moves[:, 1:] = window.moves
    else:
        fine = window.inside & ~window.coarse[:, None]
        window.last_moves[:, 1:] = np.where(fine, window.moves, window.last_moves[:, 1:])

    corrected = slopes is window.slopes and window.order is None
    if not window.uniform:
        slopes = np.where(window.inside, slopes, 0.0)
    chunks = window.chunks if corrected else correction.propagation(window.a, window.b, slopes)
    largest = estimates.largest_slope_error(slope_errors, evaluated.sum(1))
    remaining = estimates.remaining_error(slope_errors[:, W:], largest, window.moves, chunks)
    reach, safety, floor = None, estimates.SAFETY_UNKNOWN_SCHEDULE, True
    if tables.alpha is not None:
        reach, floor = estimates.MAX_GROWTH_TIMES_ALPHA * window.least / window.alpha_after, problem.transformed
        safety = estimates.SAFETY_UNKNOWN_SCHEDULE if problem.transformed else estimates.SLOPE_ERROR_SAFETY
    growth = window.growth(slopes)
    if not window.uniform:
        growth = np.where(window.inside, growth, 1.0)
    gain = estimates.gain_to_sample(growth, window.growth_behind(), window.least, reach, floor=floor)
    errors = estimates.error_to_sample(remaining, window.moves, gain, norm * np.sqrt(window.variance), safety)
    if window.strided:
        errors[:, 1:] = np.where(window.coarse[:, None], np.inf, errors[:, 1:])
    return errors
