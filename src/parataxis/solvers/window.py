"""The sliding window that windowed solvers share: its rows, its queries, and when a state is settled.

Rows of memory live in rings indexed by level, so the window moves without copying. Several rings of states take
turns: one holds the inputs that are being evaluated, the next takes the corrected trajectory, and the ones before
are the history of accelerated methods.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Slots
from ..checks import is_int
from ..engine.solve import Asking, Combine, Inner, Load, Memory, Problem, Query, Request, Settle
from ..samplers.recurrence import Response

__all__ = ["Window", "check_window"]

Array = NDArray[np.float64]

# Of the error estimate, from trained networks and exact mixtures: errors are larger than their estimate by average
# slopes, because they lie along directions that grow more.
SAFETY = 8.0  # in the misfit of a slope
DIRECTIONS = 24.0  # in the growth behind a state,
REACH = 1.5  # but no more than this over alpha: all that a state u can tell of the data is u / alpha
FAR = 0.1  # of a state: a larger move does not tell the misfit of a slope at smaller ones
BLIND = 16.0  # in the misfit, where the schedule is unknown, or slopes are not the network's as outputs are clipped
SMALLEST = 0.1  # part of a move that may remain, at least
UNKNOWN = 1e100  # a misfit that has not been measured: the whole move may remain


def check_window(window: int | None) -> None:
    """Raise unless ``window`` is None or a whole number of at least 1."""
    if window is not None and not is_int(window):
        raise ValueError(f"window must be a whole number of levels, at least 1, or None for all, got {window!r}.")


class Window:
    """The levels lo .. hi of one trajectory, of which points lo .. hi - 1 are evaluated in a round."""

    def __init__(self, problem: Problem, width: int | None, *, history: int = 1, previous: bool = False) -> None:
        """Lay out the rows; ``history`` rounds of inputs and, above 1, of corrected states are kept.

        With ``previous`` the outputs of the last round are kept too, for secants.
        """
        self.problem = problem
        self.coefficients = problem.coefficients
        self.steps = problem.steps
        self.width = min(width or self.steps, self.steps)
        self.lo = problem.frozen
        self.spent = 0.0
        self.finite = np.ones(0, bool)
        self.variance = 1.0
        self._strides = list(problem.strides)
        self._stride = 1
        self._begin()
        self._held = self.coefficients.frozen_prediction_slopes()
        ring, lags = self.width + 1, self.coefficients.lags
        rings = max(2, history) + (history if history > 1 else 0)
        self._inputs = [ring * i for i in range(max(2, history))]
        self._news = [ring * i for i in range(len(self._inputs), rings)]
        self._outputs = [ring * rings, ring * rings + (self.width if previous else 0)]
        self._finals = self._outputs[1] + self.width
        self._rows = self._finals + (self.width + lags if lags else 0)
        self._turn = 0
        self._advance = 0
        self._seen = self.lo  # points before it have been evaluated
        self._moved = np.full(self.steps + 1, np.nan)  # |new - old| of every state, as last corrected
        self._misfit = np.full(self.steps, np.nan)  # per unit of input, as last measured

    @property
    def done(self) -> bool:
        """Whether every level is settled."""
        return self.lo == self.steps

    def states(self, first: int, last: int, age: int = 0) -> Slots:
        """Return the slots of the states first .. last: the present inputs, those ``age`` rounds ago, or (-1) next."""
        ring = self._inputs[(self._turn - age) % len(self._inputs)]
        return ring + np.arange(first, last + 1) % (self.width + 1)

    def news(self, first: int, last: int, age: int = 0) -> Slots:
        """Return the slots of the corrected states first .. last of this round, or of ``age`` rounds ago."""
        if not self._news:
            return self.states(first, last, age - 1)
        ring = self._news[(self._turn - age) % len(self._news)]
        return ring + np.arange(first, last + 1) % (self.width + 1)

    def outputs(self, first: int, stop: int, age: int = 0) -> Slots:
        """Return the slots of the outputs of points first .. stop - 1, of this round or the one before."""
        return self._outputs[(self._turn - age) % 2] + np.arange(first, stop) % self.width

    def _final(self, first: int, stop: int) -> Slots:
        return self._finals + np.arange(first, stop) % (self.width + self.coefficients.lags)

    def open(self) -> Asking:
        """Fill the first window: the given guess, or the initial state in the proportion of the expected size."""
        yield Memory(self._rows)
        if self.problem.guessed:
            if self.lo:
                yield from self._frozen()
            yield Load(np.arange(self.lo, self.hi + 1), self.states(self.lo, self.hi))
        else:
            yield Load(np.zeros(1, np.int64), self.states(0, 0))
            yield self._copies(self.states(0, 0), 0, self.states(1, self.hi), 1)
        return 0

    def _frozen(self) -> Asking:
        """Settle the states of the guess that stay as they are, as many at a time as there is room for."""
        for first in range(1, self.lo + 1, self.width):
            last = min(first + self.width - 1, self.lo)
            yield Load(np.arange(first, last + 1), self.states(first, last))
            slot = int(self.states(last, last)[0])
            yield Settle(last, self.states(first, last), 0.0, slot)
        return 0

    def _copies(self, source: Slots, level: int, into: Slots, first: int) -> Combine:
        """Ask for copies of a state of ``level``, in the proportion of the expected size."""
        size = self.coefficients.rms
        factors = size[first : first + len(into), None] / size[level]
        return Combine((np.repeat(source, len(into)),), factors, into)

    def _begin(self) -> None:
        """Lay out the next round: on points lo .. hi - 1, or on every so many of them while strides are left."""
        self.hi = min(self.lo + self.width, self.steps)
        self._rough = bool(self._strides) or self.coarse  # no round has been on all points yet
        self._stride = self._strides.pop(0) if self._strides else 1

    @property
    def coarse(self) -> bool:
        """Whether some outputs of this round are interpolated."""
        return self._stride > 1

    def evaluate(self, *asks: Request) -> Generator[list[Request], Any, list[Any]]:
        """Evaluate the window: one round; return what is answered to ``asks`` once the outputs are there.

        The mean square of the data prediction is measured as well.
        """
        points = np.arange(self.lo, self.hi)
        nodes = np.unique(np.append(points[:: self._stride], points[-1])) if self.coarse else points
        place = nodes - self.lo
        states, outputs = self.states(self.lo, self.hi - 1), self.outputs(self.lo, self.hi)
        between = [self._interpolated(nodes, np.setdiff1d(points, nodes))] if self.coarse else []
        size = [self._size()] if self.width > 1 else []  # errors of a single state are not estimated
        query = Query(nodes, states[place], outputs[place], settled=1)
        finite, *answers = yield [query, *between, *size, *asks]
        self.finite = np.interp(points, nodes, finite) == 1 if self.coarse else finite
        if size:
            self._measure(answers[len(between)])
        return answers[len(between) + len(size) :]

    def _interpolated(self, nodes: Slots, points: Slots) -> Combine:
        """Ask for outputs between the nodes: the data prediction (else the output) on straight lines.

        Lines are straight in log(alpha/sigma), or in the number of the step where that is unknown.
        """
        local = self.coefficients
        after = np.searchsorted(nodes, points)
        left, right = nodes[after - 1], nodes[np.minimum(after, len(nodes) - 1)]
        place, inputs, data = np.arange(self.steps, dtype=np.float64), np.zeros(self.steps), np.ones(self.steps)
        if local.x0_from_input is not None and local.x0_from_output is not None:
            inputs, data = local.x0_from_input, local.x0_from_output
        if local.alpha is not None and local.sigma is not None and (local.alpha[:-1] > 0).all():
            place = np.log(local.alpha[:-1] / local.sigma[:-1])
        span = place[right] - place[left]
        share = np.divide(place[points] - place[left], span, out=np.zeros(len(points)), where=span != 0)
        factors = [(1 - share) * data[left], (1 - share) * inputs[left]]
        factors += [share * data[right], share * inputs[right], -inputs[points]]
        states, outputs = self.states(self.lo, self.hi - 1), self.outputs(self.lo, self.hi)
        lo = self.lo
        rows = (outputs[left - lo], states[left - lo], outputs[right - lo], states[right - lo], states[points - lo])
        return Combine(rows, np.stack(factors, 1) / data[points, None], outputs[points - lo])

    def response(self, slopes: Array | None = None, *, order: int | None = None) -> Response:
        """Return the request to correct the window into :meth:`news`; its answer is to be :meth:`checked`."""
        lo, hi, lags = self.lo, self.hi, self.coefficients.lags
        return Response(
            start=lo,
            states=self.states(lo, hi),
            outputs=self.outputs(lo, hi),
            slopes=slopes,
            first=lo + 1,
            into=self.news(lo + 1, hi),
            history=self._final(lo - lags, lo),
            finals=self._final(lo, hi) if lags else None,
            order=order,
        )

    def checked(self, norms: Array) -> Generator[Request, Any, Array]:
        """Return the squared norms (R, 2) of the change and of the residual of the states lo + 1 .. hi.

        They are infinite where the network's output was not finite or the correction overflowed. The first state is
        right even so: it is the loop's own step from a settled state.
        """
        lo, hi = self.lo, self.hi
        norms = np.where(np.isfinite(norms), norms, np.inf)
        broken = np.isinf(norms[1:]).any(1)
        if broken.any():
            # The correction overflowed: go on from the last state that did not, and settle none of the others.
            good = lo + 1 + int(np.argmax(broken))
            yield self._copies(self.news(good, good), good, self.news(good + 1, hi), good + 1)
            norms[good - lo :] = np.inf
        norms[~self.finite] = np.inf
        return norms

    def turn(self) -> None:
        """Take the states written to the next ring of inputs as the present ones."""
        self._turn += 1

    def _size(self) -> Inner:
        """Ask for the mean square of the data prediction at the last point evaluated, before the response.

        Where it is unknown, that of the window's last state stands for it.
        """
        local, point = self.coefficients, self.hi - 1
        if local.alpha is None or local.x0_from_input is None or local.x0_from_output is None:
            return Inner((self.states(self.hi, self.hi),))
        return Inner((self.states(point, point), self.outputs(point, point + 1)))

    def _measure(self, gram: Array) -> None:
        local, point = self.coefficients, self.hi - 1
        if local.alpha is None or local.x0_from_input is None or local.x0_from_output is None:
            size = float(gram[0, 0, 0]) / self.problem.dim
            self.variance = size if np.isfinite(size) and size > 0 else 1.0
            return
        weights = np.array([local.x0_from_input[point], local.x0_from_output[point]])
        with np.errstate(invalid="ignore", over="ignore"):
            variance = float(weights @ gram[0] @ weights) / self.problem.dim
        if np.isfinite(variance) and variance > 0:
            # Near pure noise the data prediction is mostly the network's error divided by alpha.
            self.variance = min(variance, 1.0) if local.alpha[point] < 0.05 else variance

    def errors(self, norms: Array, slopes: Array) -> Array:
        """Return the estimated relative error of the sample if states lo + 1 .. hi were accepted as corrected, (R,).

        The first state comes from a settled input: no error. For the others the response assumed slopes, and what
        it missed is known of every point that is evaluated again: the residual that it leaves, per unit that its
        input was moved, is the misfit m_i of the slope. A move c_i of this round then leaves about m_i c_i, carried
        on by the response, with the steps' growth J = A + B d:

            eps_{j+1} = J_j eps_j + m_j c_j,     e_j = gain_j SAFETY eps_j / sqrt(v)

        Points that are new in the window take the largest misfit of those before them; until there is one, eps_j is
        the whole move, and it is never less than a tenth of it. gain_j carries an error of state j to the sample: the
        growth of the steps in the window, then the moment-matched one, times DIRECTIONS or up to REACH / alpha. Where
        the schedule is unknown, and where outputs are clipped, it is at least the ratio of expected sizes, and SAFETY
        is BLIND. v is the mean square of the data prediction.
        """
        local, lo, hi = self.coefficients, self.lo, self.hi
        if self.coarse:
            return np.append(0.0, np.full(hi - lo - 1, np.inf))
        growth = local.growth(slopes, lo)
        behind = local.growth(local.gaussian_slopes(self.variance))[hi:]
        gain = np.append(np.cumprod(np.abs(growth[:0:-1]))[::-1], 1.0) * np.prod(np.abs(behind))
        least = local.rms[-1] / local.rms[lo + 1 : hi + 1]
        safety = BLIND
        if local.alpha is not None:
            reach = REACH * least / np.maximum(local.alpha[lo + 1 : hi + 1], np.finfo(np.float32).eps)
            reach = np.minimum(reach, DIRECTIONS * gain)
            least, safety = (np.maximum(least, reach), BLIND) if self.problem.transformed else (reach, SAFETY)
        gain = np.maximum(gain, least)
        moves = np.sqrt(norms[:, 0])
        left = np.clip(safety * self._left(moves, np.sqrt(norms[:, 1]), slopes), SMALLEST * moves, moves)
        with np.errstate(invalid="ignore"):  # of an overflow nothing is known, whatever its gain
            errors = gain * left / np.sqrt(self.problem.dim * self.variance)
        errors[0] = 0.0
        return np.asarray(np.where(np.isnan(errors), np.inf, errors))

    def _left(self, moves: Array, residuals: Array, slopes: Array) -> Array:
        """Return eps of the states lo + 1 .. hi, (R,): what the response is expected to have missed."""
        lo, hi, old = self.lo, self.hi, min(max(self._seen, self.lo), self.hi)
        before = self._moved[lo:old]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = residuals[: old - lo] / before
        trusted = before > 10 * self.problem.rounding * self.coefficients.rms[lo:old] * np.sqrt(self.problem.dim)
        trusted &= np.isfinite(before) & np.isfinite(found)
        if self.coefficients.alpha is not None:
            trusted &= before < FAR * self.coefficients.rms[lo:old] * np.sqrt(self.problem.dim)
        self._misfit[lo:old] = np.where(trusted, found, self._misfit[lo:old])
        self._moved[lo + 1 : hi + 1] = moves
        self._seen = hi
        known = self._misfit[max(old - self.width, 0) : old]
        known = known[np.isfinite(known)]
        misfit = np.where(np.isfinite(self._misfit[lo:hi]), self._misfit[lo:hi], known.max(initial=0.0) or UNKNOWN)
        missed = np.append(0.0, misfit[1:] * np.minimum(moves[:-1], UNKNOWN))
        return self.coefficients.carried(missed, slopes, lo)

    def accept(self, errors: Array, passed: NDArray[np.bool_] | None = None) -> int:
        """Return how many states to settle: those whose errors fit in the tolerance's share up to their level.

        The last point stays for another evaluation, which measures the misfit of its slope, unless it ends the loop.
        A published test tells instead which states ``passed``; then the first that did not is taken too. Of outputs
        that were interpolated, and in the first round on all points, only the first state is.
        """
        if self._rough:
            return 1
        if passed is not None:
            return len(passed) if passed.all() else int(np.argmin(passed)) + 1
        share = self.problem.tolerance * np.arange(self.lo + 1, self.hi + 1) / self.steps
        allowed = (errors == 0) | (self.spent + errors <= share)
        count = len(allowed) if allowed.all() else max(int(np.argmin(allowed)), 1)
        ahead = self.lo + count == self.hi < self.steps and self.width > 2
        return max(count - 1, 1) if ahead else count

    def settle(self, count: int, error: float) -> Asking:
        """Settle the first ``count`` states, after :meth:`turn`; ``error`` is what that adds to the sample's error."""
        self.spent += error
        last = self.hi - 1
        place = int(self.states(last, last, 1)[0]), int(self.outputs(last, last + 1, 1)[0])
        estimate = int(self.states(self.hi, self.hi)[0]) if self.hi == self.steps else (last, *place)
        states = self.states(self.lo + 1, self.lo + count)
        self._advance = count
        yield Settle(self.lo + count, states, self.spent, estimate)
        return 0

    def enter(self, *, roll: bool = True) -> Asking:
        """Move the window and fill its new rows: from the given guess; else by rolling on, or by copies.

        Where steps add noise, the last data prediction is held while rolling on; else outputs follow their line
        through the window. In a recorded loop, of which less is known, the last output is held.
        """
        lo = self.lo + self._advance
        first, last = self.hi + 1, min(lo + self.width, self.steps)
        if first <= last:
            into, point = self.states(first, last), self.hi - 1
            if self.problem.guessed:
                yield Load(np.arange(first, last + 1), into)
            elif not roll:
                yield self._copies(self.states(self.hi, self.hi), self.hi, into, first)
            elif self.coefficients.noise_std.any() or self.coefficients.alpha is None:
                yield Response(
                    start=point,
                    states=self.states(point, point, 1),
                    outputs=self.outputs(point, point + 1, 1),
                    slopes=self._held[point : point + 1],
                    first=first,
                    into=into,
                    history=self._final(point - self.coefficients.lags, point),
                    measure=False,
                    origin=int(self.states(point, point)[0]) if point > self.lo else None,
                )
            else:
                yield self._line(max(self.lo, point - self.width // 2), point, last)
        self.lo = lo
        self._begin()
        return 0

    def _line(self, early: int, late: int, last: int) -> Combine:
        """Ask for the states hi + 1 .. last, with outputs on the line through those of two points."""
        local, first = self.coefficients, self.hi
        place = (np.arange(first - local.lags, last) - late) / max(late - early, 1)
        outputs = np.stack([np.zeros(len(place)), 1 + place, -place], 1)
        state, factors = np.array([1.0, 0.0, 0.0]), []
        for k in range(last - first):
            weight = local.output_weight[first + k, ::-1]
            state = local.state_weight[first + k] * state + weight @ outputs[k : k + len(weight)]
            factors.append(state)
        count = len(factors)
        rows = (
            self.states(first, first),
            self.outputs(late, late + 1, 1),
            self.outputs(early, early + 1, 1),
        )
        return Combine(tuple(np.repeat(row, count) for row in rows), np.array(factors), self.states(first + 1, last))

    def sample(self) -> int:
        """Return the slot of the sample."""
        return int(self.states(self.steps, self.steps)[0])
