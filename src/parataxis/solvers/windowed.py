"""The iteration of all windowed solvers: evaluate, measure, decide, move.

A windowed solver is a window and a function from measured numbers to slopes. What is done with the slopes, which states
are accepted and which enter is the same for all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Indices
from ..samplers.coefficients import Coefficients
from . import error_estimate as estimates
from .base import Answer, Queries
from .batch import Batch
from .error_estimate import Estimate
from .replayed import ReplayedWindow
from .window import Measured, Window

__all__ = ["Windowed", "estimate_errors", "iterate"]

SMALL = 1e-12  # growth for Gaussian data below which no ratio to it is taken


class Windowed:
    """A solver with a sliding window. A subclass is a frozen dataclass with a field ``window`` and gives the slopes.

    Attributes:
        window: Steps evaluated in a round; None for all.
        entry: How states enter the window: ``extrapolate`` or ``copy``.
    """

    window: int | None
    entry = "extrapolate"
    adopts = True  # samples that begin later join the same windows

    def slopes(self, window: Window, measured: Measured) -> Array:
        """Return d (S, W): how each output is assumed to move with its input."""
        raise NotImplementedError

    def passed(self, window: Window) -> NDArray[np.bool_] | None:
        """Return (S, W) which states pass a published acceptance test, or None to accept by the error estimate."""
        return None

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """Every recurrence can be solved."""
        return None

    def open(self, batch: Batch) -> Window:
        """Return the windows of a batch."""
        kind = ReplayedWindow if batch.recurrence.replays else Window
        return kind(batch, self.window)

    def round(self, window: Window, answer: Answer) -> None:
        """Do one round behind its evaluation."""
        measured = window.measure(answer.outputs)
        self.decide(window, measured)

    def decide(self, window: Window, measured: Measured) -> None:
        """Decide on what has been measured, and move."""
        # Overflows and divisions by a move of zero are met everywhere, and looked at where they matter.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            window.correct(self.slopes(window, measured), measured)
            count = self.accept(window, measured)
        window.move(count, self.entry)

    def accept(self, window: Window, measured: Measured) -> Indices:
        """Return (S,) how many states of each window are accepted; the window takes their error."""
        estimate = estimate_errors(window, measured)
        passed = self.passed(window)
        problem = window.problem
        if passed is None:
            last = (window.hi == problem.steps) | (window.width == 0) | (window.W <= 2)
            share, fresh = window.shares()
            count = estimates.choose_accepted(estimate, problem.tolerance, share, fresh, window.width, last)
        else:
            count = estimates.choose_passed(passed & window.inside, window.width)
        if window.strided:
            count = np.where(window.rough, np.minimum(count, 1), count)
        window.take_error(estimate, count)
        if passed is None:
            window.batch.bounded[window.places] = window.error_used <= problem.tolerance
        return count

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
        del answer  # its outputs are in their places; they are not kept while the network works


def estimate_errors(window: Window, measured: Measured) -> Estimate:
    """Return the estimate of a round, and note what it says of the slopes and of the growth; see error_estimate.py.

    Args:
        window: Behind its correction.
        measured: What the round has measured.
    """
    problem, tables, W, uniform = window.problem, window.tables, window.W, window.uniform
    at_end = window.steps >= problem.steps - 1
    if W == 1:
        nothing = np.zeros((len(window.places), 1))
        return Estimate(nothing, nothing, nothing, np.ones(len(window.places)), at_end)
    norm = np.sqrt(problem.dim)
    a, b, pairs = window.a, window.b_sum, measured.pairs
    dx_dx = pairs[..., 0, 0]
    moved = np.sqrt(dx_dx)
    near = window.evaluated & (moved > (10 * problem.rounding * norm) * window.rms)
    if tables.alpha is not None:
        near &= moved < (estimates.MAX_TRUSTED_MOVE * norm) * window.rms
    if window.strided:
        near &= ~window.coarse[:, None]
    square = a * a * dx_dx + 2 * a * b * pairs[..., 0, 1] + b * b * pairs[..., 1, 1]
    grown = np.sqrt(np.maximum(square, 0.0)) / moved
    missed = window.residuals / moved
    gaussian = window.gaussian_growth()
    near &= np.isfinite(grown) & np.isfinite(missed)
    known = window.known
    known[:, 0, W : 2 * W] = np.where(near, missed, known[:, 0, W : 2 * W])
    # What a network in few bits makes of a small move is its rounding: smaller moves than before say nothing of growth.
    size = moved / window.rms
    telling = near & ~(size < estimates.TELLING * known[:, 4, W : 2 * W])
    known[:, 1, W : 2 * W] = np.where(telling, np.fmax(grown, known[:, 1, W : 2 * W]), known[:, 1, W : 2 * W])
    known[:, 4, W : 2 * W] = np.where(telling, np.fmax(size, known[:, 4, W : 2 * W]), known[:, 4, W : 2 * W])
    known[:, 2, W : 2 * W] = known[:, 1, W : 2 * W] / np.maximum(gaussian, SMALL)
    slope_errors, growth = known[:, 0, W : 2 * W], known[:, 1, W : 2 * W]
    # New steps take the largest that is known of the steps before them.
    largest = np.fmax.reduce(known[:, :3, : 2 * W], axis=2)[..., None]
    unknown = np.isnan(growth)
    missed = np.where(
        np.isnan(slope_errors), np.where(largest[:, 0] > 0, largest[:, 0], estimates.UNMEASURED), slope_errors
    )
    local = np.fmax(
        np.where(unknown, largest[:, 2] * gaussian, growth), np.maximum(gaussian, np.abs(window.growth(window.slopes)))
    )
    gamma = np.fmax(np.where(unknown, largest[:, 1], growth), 1.0)
    if not uniform:
        local, gamma = np.where(window.inside, local, 1.0), np.where(window.inside, gamma, 1.0)
        unknown = unknown & window.inside
    left = estimates.local_error(missed, local, window.moves, estimates.SLOPE_ERROR_SAFETY)
    gain = estimates.gain_to_sample(gamma, ~unknown, window.reach, at_end)
    carry = estimates.carried(window.error_carried, gamma)
    estimate = Estimate(left, carry, gain, norm * np.sqrt(window.smallest_variance()), at_end)
    if window.strided:
        for values in (estimate.relative, estimate.planned):
            values[:, 1:] = np.where(window.coarse[:, None], np.inf, values[:, 1:])
    return estimate
