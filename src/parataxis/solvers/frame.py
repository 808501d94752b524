"""Where the windows of S samples stand, and the coefficients of their steps: host arrays, no tensors."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Array, Indices
from .batch import Batch
from .tables import Tables

__all__ = ["Frame", "PerSample"]

Flags = NDArray[np.bool_]
NEVER = np.zeros(1, bool)  # of rounds on all steps
GAUSSIAN, PREDICTION, SUM, WEIGHTS = (Tables.COLUMNS.index(name) for name in ("mm_fixed", "p_step", "b_sum", "a"))


class PerSample:
    """Arrays with an entry for every sample, which can be taken out, put back and begun anew.

    Attributes:
        STATES: Their names, with the values at the beginning.
    """

    STATES: ClassVar[dict[str, Any]] = {}

    def begin(self, rows: Indices) -> None:
        """Begin anew with these samples."""
        for name, value in self.STATES.items():
            getattr(self, name)[rows] = value

    def take_states(self, rows: Indices, source: PerSample) -> None:
        """Become copies of some samples of another."""
        for name in self.STATES:
            setattr(self, name, getattr(source, name)[rows])

    def put_states(self, rows: Indices, part: PerSample) -> None:
        """Take some samples from another."""
        for name in self.STATES:
            getattr(self, name)[rows] = getattr(part, name)

    def states(self, row: int) -> dict[str, Any]:
        """Return the entries of a sample."""
        return {name: getattr(self, name)[row] for name in self.STATES}

    def load_states(self, row: int, state: dict[str, Tensor]) -> None:
        """Take the entries of a sample."""
        for name in self.STATES:
            getattr(self, name)[row] = state[name].numpy()


class Frame(PerSample):
    """The steps lo .. hi - 1 of every window. Arrays have entries for W steps; those beyond a window are zeros.

    Attributes:
        W: Most steps of a window.
        places: (S,) of the samples in the batch.
        lo, hi, width: (S,) first and last state, and steps, of each window.
        rounds: (S,) rounds done.
        steps: (S, W) numbers of its steps.
        inside: (S, W) entries within a window.
        uniform: Whether all windows have W steps.
        evaluated: (S, W) steps that have been evaluated before.
        a, b, b_sum, b_inverse, rms, rms_ratio, reach, share: (S, W, ..) of its steps; see :class:`.tables.Tables`.
        weights: (L + 2, S, W) a and b of each lag; ``prediction`` (2, S, W) p and q.
        coarse: (S,) whether some outputs of this round are interpolated; ``rough`` whether no round before was on all
            steps; ``strided`` whether such rounds are asked for.
    """

    STATES: ClassVar[dict[str, Any]] = {
        "lo": 0,
        "rounds": 0,
        "evaluated_until": 0,
        "reached": False,
        "last_step": 0,
        "last_evaluated": 0,
    }

    def __init__(self, batch: Batch, width: int | None) -> None:
        self.batch, self.problem = batch, batch.problem
        self.W = min(width or self.problem.steps, self.problem.steps)
        self.lags = self.problem.coefficients.lags
        self.tables = Tables.of(self.problem.coefficients, self.W)
        self.strided = bool(self.problem.strides)
        self.offset = np.arange(self.W + 1)
        self.since_accepted = np.sqrt(self.offset[1:] / self.problem.steps)  # (W,) root of the part of the loop

    def seat_frame(self, places: Indices) -> None:
        """Begin anew with the samples at these places."""
        count = len(places)
        self.places, self.rows = places, np.arange(count)
        self.row_of_place = {int(place): row for row, place in enumerate(places)}
        self.everywhere = np.ones((count, self.W), bool)
        self.lo, self.rounds, self.evaluated_until = (np.zeros(count, np.int64) for _ in range(3))
        self.reached = np.zeros(count, bool)  # the last round has corrected the sample itself
        # Farthest step of the present round, and of the last one.
        self.last_step, self.last_evaluated = np.zeros(count, np.int64), np.zeros(count, np.int64)

    def look(self) -> None:
        """Read off what follows from where the windows stand, and which samples are being solved."""
        steps, width = self.problem.steps, self.W
        active = self.batch.active[self.places]
        everyone = bool(active.all())
        self.hi = np.minimum(self.lo + width, steps)
        if not everyone:
            self.hi = np.where(active, self.hi, self.lo)
        self.width = self.hi - self.lo
        self.uniform = everyone and int(self.lo.max()) + width <= steps
        self.steps = self.lo[:, None] + self.offset[:-1]
        self.inside = self.everywhere if self.uniform else self.offset[:-1] < self.width[:, None]
        self.evaluated = self.steps < self.evaluated_until[:, None]
        if not self.uniform:
            self.evaluated &= self.inside
        # Beyond the end of the loop the tables hold zeros; the windows of places without a sample are empty.
        columns = self.tables.windows[self.lo].transpose(1, 0, 2)
        if not everyone:
            columns[SUM:] *= self.inside
        self.b_inverse, self.rms, self.rms_ratio, self.reach, self.share = columns[:GAUSSIAN]
        self.gaussian, self.prediction, self.b_sum = columns[GAUSSIAN:SUM], columns[PREDICTION:SUM], columns[SUM]
        self.weights = columns[WEIGHTS:]
        self.a, self.b = self.weights[0], self.weights[1:].transpose(1, 2, 0)
        if self.strided:
            self._look_at_strides()
        else:
            self.coarse = self.rough = NEVER

    def _look_at_strides(self) -> None:
        padded = np.array([1, *self.problem.strides, 1, 1])  # of round -1, 0, 1, ..
        at = np.minimum(self.rounds + 1, len(padded) - 1)
        self.stride = padded[at]
        self.coarse = self.stride > 1
        self.rough = (self.rounds < len(self.problem.strides)) | (padded[at - 1] > 1)

    def nodes(self) -> Flags:
        """Return (S, W) the steps that are evaluated: all, or every so many and the last."""
        if not self.strided:
            return self.inside
        offset = self.offset[:-1]
        last = offset == self.width[:, None] - 1
        return self.inside & ((offset % self.stride[:, None] == 0) | last)

    def growth(self, slopes: Array) -> Array:
        """Return J (S, W) of slopes d (S, W): how a change of each state is carried on by its step."""
        return np.asarray(self.a + self.b_sum * slopes)

    def slopes_for_growth(self, growth: Array) -> Array:
        """Return d (S, W) for which :meth:`growth` is ``growth``; 0 where no output enters the step."""
        return np.asarray((growth - self.a) * self.b_inverse)

    def gaussian_growth(self, variance: Array) -> Array:
        """Return (S, W) growth of each step for Gaussian data of this variance (S,), 1 where it is unknown."""
        fixed, slope, alpha_2, sigma_2 = self.gaussian[:4]
        v = variance[:, None]
        return np.asarray(np.abs(fixed + slope * v / (alpha_2 * v + sigma_2)))

    def slopes_for_variance(self, variance: Array) -> Array:
        """Return d (S, W) of the exact network for Gaussian data of this variance (S,); else for a growth of 1."""
        if not self.tables.gaussian:
            return self.slopes_for_growth(np.ones_like(self.a))
        _, _, alpha_2, sigma_2, target, p, q = self.gaussian
        v = variance[:, None]
        return np.asarray((target * v / (alpha_2 * v + sigma_2) - p) / q)
