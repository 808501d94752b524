"""The iteration of all windowed solvers: evaluate, measure, decide, move.

A windowed solver is a window and a function from measured numbers to slopes. What is done with the slopes, which states
are accepted and which enter is the same for all.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from ..arrays import Array, Indices
from ..samplers.coefficients import Coefficients
from . import correction
from . import error_estimate as estimates
from .base import Answer, Queries, Query
from .batch import Batch
from .replayed import ReplayedWindow
from .window import Measured, Window

__all__ = ["Windowed", "iterate"]


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

    def passed(self, window: Window) -> Array | None:
        """Return (S, W) which states pass a published acceptance test, or None to accept by the error estimate."""
        return None

    def open(self, batch: Batch) -> Window:
        """Return the windows of a batch."""
        kind = ReplayedWindow if batch.recurrence.replays else Window
        return kind(batch, self.window, measures_pairs=self.measures_pairs)

    def round(self, window: Window, answer: Answer) -> None:
        """Do one round behind its evaluation."""
        measured = window.measure(answer.outputs)
        window.correct(self.slopes(window, measured), measured)
        count, error = self.accept(window)
        window.move(count, error, self.entry)

    def accept(self, window: Window) -> tuple[Indices, Array]:
        """Return (S,) how many states of each window are accepted, and the error of the sample that this adds."""
        errors = estimate_errors(window, self.error_slopes(window))
        passed = self.passed(window)
        if passed is None:
            local = window.problem
            share = local.tolerance * (window.steps + 1) / local.steps
            last = (window.hi == local.steps) | (window.W <= 2) | (window.width == 0)
            count = estimates.choose_accepted(errors, window.error_used, share, window.width, last)
        else:
            count = estimates.choose_passed(passed & window.inside, window.width)
        count = np.where(window.rough, np.minimum(count, 1), count)
        rows = np.arange(len(count))
        return count, np.where(count > 0, errors[rows, np.maximum(count - 1, 0)], 0.0)

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """Every recurrence can be solved."""
        return None

    def solve(self, batch: Batch) -> Queries:
        """Solve the samples of a batch."""
        return iterate(self, batch)


def iterate(solver: Windowed, batch: Batch) -> Generator[Query, Answer, None]:
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

    Takes down what this round says of the slopes; see error_estimate.py.

    Args:
        window: Behind its correction.
        slopes: (S, W) d, as the growth of errors is judged by.
    """
    problem, tables, W = window.problem, window.tables, window.W
    size = np.sqrt(problem.dim)
    rms = tables.rms[window.steps] * size
    fine = ~window.coarse[:, None]
    moves = window.last_moves[:, :W]
    with np.errstate(invalid="ignore"):
        trusted = window.evaluated & fine & np.isfinite(moves) & (moves > 10 * problem.rounding * rms)
        if tables.alpha is not None:
            trusted &= moves < estimates.MAX_TRUSTED_MOVE * rms
    slope_errors = window.slope_errors
    slope_errors[:, W:] = estimates.slope_error(window.residuals, moves, trusted, slope_errors[:, W:])
    window.last_moves[:, 1:] = np.where(window.inside & fine, window.moves, window.last_moves[:, 1:])

    corrected = slopes is window.slopes and window.order is None
    slopes = np.where(window.inside, slopes, 0.0)
    chunks = window.chunks if corrected else correction.propagation(window.a, window.b, slopes)
    largest = estimates.largest_slope_error(slope_errors, window.evaluated.sum(1))
    remaining = estimates.remaining_error(slope_errors[:, W:], largest, window.moves, chunks)
    least = tables.rms[problem.steps] / tables.rms[window.steps + 1]
    reach, safety, floor = None, estimates.SAFETY_UNKNOWN_SCHEDULE, True
    if tables.alpha is not None:
        alpha = np.maximum(tables.alpha[window.steps + 1], np.finfo(np.float32).eps)
        reach, floor = estimates.MAX_GROWTH_TIMES_ALPHA * least / alpha, problem.transformed
        safety = estimates.SAFETY_UNKNOWN_SCHEDULE if problem.transformed else estimates.SLOPE_ERROR_SAFETY
    growth = np.where(window.inside, window.growth(slopes), 1.0)
    gain = estimates.gain_to_sample(growth, window.growth_behind(), least, reach, floor=floor)
    norm = size * np.sqrt(window.variance)
    errors = estimates.error_to_sample(remaining, window.moves, gain, norm, safety)
    return np.where(fine | (np.arange(W) == 0), errors, np.inf)
