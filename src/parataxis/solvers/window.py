"""The sliding window that windowed solvers share: its rows, its queries, and when a state is settled.

Rows of memory live in rings indexed by level, so the window moves without copying. States have two rings that
change roles every round: one holds the inputs that were evaluated, the other takes the corrected trajectory.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..solve import Copy, Inner, Load, Memory, Problem, Query, Request, Settle
from ..table import Response, Slots

__all__ = ["Window", "check_window"]

Array = NDArray[np.float64]
Asking = Generator[Request, Any, Any]


def check_window(window: int | None) -> None:
    """Raise unless ``window`` is None or a whole number of at least 1."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be a whole number of levels, at least 1, or None for all, got {window!r}.")


class Window:
    """The levels lo .. hi of one trajectory, of which points lo .. hi - 1 are evaluated in a round."""

    def __init__(self, problem: Problem, width: int | None, *, previous: bool = False) -> None:
        """Lay out the rows; with ``previous`` the outputs of the last round are kept for secants."""
        self.problem = problem
        self.local = problem.local
        self.steps = problem.steps
        self.width = min(width or self.steps, self.steps)
        self.lo = 0
        self.hi = self.width
        self.spent = 0.0
        self.finite = np.ones(0, bool)
        ring, lags = self.width + 1, self.local.lags
        bases = np.cumsum([0, ring, ring, self.width, self.width if previous else 0])
        self._states = [bases[0], bases[1]]
        self._outputs = [bases[2], bases[3] if previous else bases[2]]
        self._finals = bases[4]
        self._rows = int(bases[4]) + (self.width + lags if lags else 0)
        self._turn = 0
        self._variance = 1.0

    @property
    def done(self) -> bool:
        """Whether every level is settled."""
        return self.lo == self.steps

    def states(self, first: int, last: int, *, old: bool = False) -> Slots:
        """Return the slots of the states first .. last of this round, or (``old``) of the one before."""
        return self._states[self._turn ^ old] + np.arange(first, last + 1) % (self.width + 1)

    def outputs(self, first: int, stop: int, *, old: bool = False) -> Slots:
        """Return the slots of the outputs of points first .. stop - 1."""
        return self._outputs[self._turn ^ old] + np.arange(first, stop) % self.width

    def _final(self, first: int, stop: int) -> Slots:
        return self._finals + np.arange(first, stop) % (self.width + self.local.lags)

    def open(self) -> Asking:
        """Fill the first window: the given guess, or the initial state in the proportion of the expected size."""
        yield Memory(self._rows)
        if self.problem.guessed:
            levels = np.arange(self.hi + 1)
            yield Load(levels, self.states(0, self.hi))
        else:
            yield Load(np.zeros(1, np.int64), self.states(0, 0))
            yield from self.copy(0, 1, self.hi)

    def copy(self, source: int, first: int, last: int) -> Asking:
        """Fill states first .. last with copies of state ``source``, in the proportion of the expected size."""
        into = self.states(first, last)
        size = self.local.size
        yield Copy(np.full(len(into), self.states(source, source)[0]), into, size[first : last + 1] / size[source])

    def query(self) -> Asking:
        """Evaluate the whole window: one round."""
        self.hi = min(self.lo + self.width, self.steps)
        point = np.arange(self.lo, self.hi)
        states = self.states(self.lo, self.hi - 1)
        self.finite = yield Query(point, states, self.outputs(self.lo, self.hi), settled=1)

    def respond(self, slopes: Array) -> Generator[Request, Any, Array]:
        """Correct the window; return the squared norms of the change and of the new states lo + 1 .. hi, (R, 2)."""
        lo, hi, lags = self.lo, self.hi, self.local.lags
        norms = yield Response(
            start=lo,
            states=self.states(lo, hi),
            outputs=self.outputs(lo, hi),
            slopes=slopes,
            first=lo + 1,
            into=self.states(lo + 1, hi, old=True),
            history=self._final(lo - lags, lo),
            finals=self._final(lo, hi) if lags else None,
        )
        self._turn ^= 1
        broken = ~np.isfinite(norms).all(1)
        if broken.any():
            # The correction overflowed: go on from the last state that did not, and settle none of the others.
            good = self.lo + int(np.argmax(broken))
            yield from self._mend(good)
            norms[good - self.lo :] = np.inf
        norms[~self.finite] = np.inf
        return norms

    def _mend(self, good: int) -> Asking:
        # The states up to level ``good`` are sound; level lo is in the ring that was evaluated.
        if good == self.lo:
            slots = self.states(good, good, old=True), self.states(good, good)
            yield Copy(*slots, np.ones(1))
        yield from self.copy(good, good + 1, self.hi)

    def measure_variance(self) -> Asking:
        """Measure the mean square of the data prediction at the last point evaluated, before the response."""
        local, point = self.local, self.hi - 1
        if local.alpha is None or local.data_input is None or local.data_output is None:
            return
        state, output = self.states(point, point), self.outputs(point, point + 1)
        numbers = (yield Inner(state, output))[0]
        p, q = local.data_input[point], local.data_output[point]
        variance = float(p * p * numbers[0] + 2 * p * q * numbers[1] + q * q * numbers[2]) / self.problem.dim
        if not np.isfinite(variance) or variance <= 0:
            return
        # Near pure noise the data prediction is mostly the network's error divided by alpha.
        self._variance = min(variance, 1.0) if local.alpha[point] < 0.05 else variance

    def errors(self, norms: Array, growth: Array) -> Array:
        """Return the estimated relative error of the sample if states lo + 1 .. hi were accepted as they are, (R,).

        e_j = g_j rms(new_j - old_j) / sqrt(v), where g_j carries an error of state j to the sample: the product of the
        growth of the steps in the window and of the moment-matched growth behind it, at least the ratio of expected
        sizes; v is the mean square of the data prediction. The first state comes from a settled input: no error.
        """
        local, lo, hi = self.local, self.lo, self.hi
        behind = local.growth(local.moment_slopes(self._variance))[hi:]
        inside = np.append(np.cumprod(np.abs(growth[: hi - lo][:0:-1]))[::-1], 1.0)
        size = local.size
        gain = np.maximum(size[-1] / size[lo + 1 : hi + 1], inside * np.prod(np.abs(behind)))
        errors = gain * np.sqrt(norms[:, 0] / self.problem.dim / self._variance)
        errors[0] = 0.0
        return np.asarray(np.where(np.isnan(errors), np.inf, errors))

    def accept(self, errors: Array) -> int:
        """Return how many states to settle: those whose errors fit in the tolerance's share up to their level."""
        share = self.problem.tolerance * np.arange(self.lo + 1, self.hi + 1) / self.steps
        allowed = (errors == 0) | (self.spent + errors <= share)
        return len(allowed) if allowed.all() else max(int(np.argmin(allowed)), 1)

    def settle(self, count: int, error: float) -> Asking:
        """Settle the first ``count`` states; ``error`` is what accepting them adds to the error of the sample."""
        self.spent += error
        last = self.hi - 1
        place = int(self.states(last, last, old=True)[0]), int(self.outputs(last, last + 1, old=True)[0])
        sample = int(self.states(self.hi, self.hi)[0]) if self.hi == self.steps else None
        states = self.states(self.lo + 1, self.lo + count)
        self._moved = count
        yield Settle(self.lo + count, states, self.spent, (last, *place), sample)

    def enter(self, slopes: Array | None) -> Asking:
        """Move the window and fill its new rows.

        From the given guess; else by rolling on with the affine model of the last point evaluated, with these
        ``slopes`` (of that point, then of the new ones; the last is repeated); with None by copies.
        """
        lo = self.lo + self._moved
        last = min(lo + self.width, self.steps)
        first = self.hi + 1
        if first <= last:
            if self.problem.guessed:
                yield Load(np.arange(first, last + 1), self.states(first, last))
            elif slopes is None:
                yield from self.copy(self.hi, first, last)
            else:
                point, lags = self.hi - 1, self.local.lags
                yield Response(
                    start=point,
                    states=self.states(point, point, old=True),
                    outputs=self.outputs(point, point + 1, old=True),
                    slopes=slopes,
                    first=first,
                    into=self.states(first, last),
                    history=self._final(point - lags, point),
                    measure=False,
                    origin=int(self.states(point, point)[0]) if point > self.lo else None,
                )
        self.lo = lo

    def sample(self) -> int:
        """Return the slot of the sample."""
        return int(self.states(self.steps, self.steps)[0])
