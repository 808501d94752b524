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
from .replayed import ReplayedWindow
from .window import Measured, Window

__all__ = ["Windowed", "iterate"]


class Windowed:
    """A solver with a sliding window. A subclass is a frozen dataclass with a field ``window`` and gives the slopes.

    Attributes:
        window: Steps evaluated in a round; None for all.
        entry: How states enter the window: ``extrapolate`` or ``copy``.
        goes_forward: The noise of steps that lie behind or far ahead is not needed.
    """

    window: int | None
    entry = "extrapolate"
    adopts = True  # samples that begin later join the same windows
    goes_forward = True

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
        measured = window.measure(answer.take())
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
        errors, growth = window.errors, window.growth(window.slopes)
        estimate = errors.estimate(window, measured.pairs, window.residuals, window.moves, growth)
        window.batch.recurrence.note_growth(window.places, window.lo, window.width, errors.growth)
        passed = self.passed(window)
        problem = window.problem
        if passed is None:
            last = (window.hi == problem.steps) | (window.width == 0) | (window.W <= 2)
            shares, whole = (window.share, window.since_accepted), problem.steps == window.W
            count = estimates.choose_accepted(estimate, problem.tolerance, *shares, window.width, last, whole=whole)
        else:
            count = estimates.choose_passed(passed & window.inside, window.width)
        if window.strided:
            count = np.where(window.rough, np.minimum(count, 1), count)
        errors.take(window, estimate, count)
        if passed is None:
            window.batch.bounded[window.places] = errors.used <= problem.tolerance
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
