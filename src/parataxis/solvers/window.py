r"""A batch of sliding windows: S samples side by side, W steps of each. Measure, decide, move.

The window of a sample reaches over its states lo .. hi, of which lo is accepted. A round is

1. *evaluate*: the states lo .. hi - 1 go through the network, all samples in one :class:`~.base.Query`;
2. *measure*: the steps, the residuals r_i = step_i(U) - u_{i+1}, their Gram matrix and the few inner products that a
   solver wants, read from the device once;
3. *decide*: numpy on (S, W) and (S, W, W) arrays in float64: see :mod:`.windowed`;
4. *move*: corrected states, the shift of every window and the states that enter it, after one upload.

Arrays have entries for W steps of every sample. Windows are shorter than W near the end of the loop, and empty where a
place is free or its sample has ended: entries beyond a window are harmless zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Array, Indices, read, upload
from ..checks import is_int
from ..samplers.coefficients import Coefficients
from ..samplers.recurrence import Recurrence
from . import correction, extrapolation
from .base import Query
from .batch import Batch
from .error_estimate import REACH, REACH_UNKNOWN, Estimate
from .tensors import WindowTensors

__all__ = ["Measured", "Tables", "Window", "check_window"]

Flags = NDArray[np.bool_]
SMALL = np.finfo(np.float32).eps
NEAR_NOISE = 0.05  # alpha below which a data prediction is the network's error divided by alpha
NOISY = 0.3  # signal below which a data prediction is mostly the network's error


def check_window(window: int | None) -> None:
    """Raise unless ``window`` is None or a whole number of at least 1."""
    if window is not None and not is_int(window):
        raise ValueError(f"window must be a whole number of steps, at least 1, or None for all, got {window!r}.")


class Tables:
    """The coefficients of a loop, continued with zeros behind its end so that every window finds its entries.

    Made once for a sampler and a width. All have N + 2 W rows, or one more.

    Attributes:
        a, b, b_sum, b_inverse: A_i, B_{i,l}, sum_l B_{i,l} and one over it, 0 where no output enters the step.
        rms, rms_ratio: Expected rms of the states, 1 behind the end, and that of the state behind a step over that of
            the state before it.
        p, q: Of the data prediction p u + q f; 0 and 1 where it is unknown.
        rms_of_sample: Ratio of the expected rms of the sample and of the state behind a step.
        reach: What may become of an error of the state behind a step on the way to the sample.
        frozen: Slopes that freeze the prediction of a step.
        columns: What a round reads of every step, side by side: see :attr:`COLUMNS`.
    """

    COLUMNS = ("a", "b_sum", "b_inverse", "rms", "rms_ratio", "reach", "mm_fixed", "mm_slope", "alpha_2", "sigma_2")

    def __init__(self, coefficients: Coefficients, width: int) -> None:
        self.steps, more = coefficients.steps, 2 * width

        def padded(values: Array, fill: float = 0.0) -> Array:
            return np.concatenate([values, np.full((more, *values.shape[1:]), fill)])

        steps = coefficients.steps
        self.a, self.b = padded(coefficients.state_weight), padded(coefficients.output_weight)
        self.b_sum, self.rms = self.b.sum(1), padded(coefficients.rms, 1.0)
        self.b_inverse = np.divide(1.0, self.b_sum, out=np.zeros_like(self.b_sum), where=self.b_sum != 0)
        self.rms_ratio = self.rms[1:] / self.rms[:-1]
        self.rms_of_sample = self.rms[steps] / self.rms[1:]
        self.predicts = coefficients.x0_from_input is not None and coefficients.x0_from_output is not None
        self.p = padded(coefficients.x0_from_input if self.predicts else np.zeros(steps))  # type: ignore[arg-type]
        self.q = padded(coefficients.x0_from_output if self.predicts else np.ones(steps), 1.0)  # type: ignore[arg-type]
        levels = (coefficients.alpha, coefficients.sigma, coefficients.scale)
        self.alpha, self.sigma, self.scale = (None if values is None else padded(values, 1.0) for values in levels)
        self.gaussian = self.predicts and all(values is not None for values in levels)
        self.signal = None  # signal over size of every state: alpha where the schedule preserves variance
        self.reach = np.full(steps + more, REACH_UNKNOWN)
        if self.alpha is not None and self.sigma is not None:
            self.signal = np.maximum(self.alpha / np.hypot(self.alpha, self.sigma), SMALL)
            self.reach = np.maximum(1.0, REACH * self.rms_of_sample / self.signal[1:])
        # The growth of a step for Gaussian data of variance v: mm_fixed + mm_slope v / (alpha_2 v + sigma_2).
        self.mm_fixed, self.mm_slope = np.ones(steps + more), np.zeros(steps + more)
        self.alpha_2, self.sigma_2 = np.ones(steps + more), np.ones(steps + more)
        if self.gaussian:
            assert self.alpha is not None
            assert self.sigma is not None
            assert self.scale is not None
            cut = slice(steps + more)
            self.mm_fixed = self.a - self.b_sum * self.p / self.q
            self.mm_slope = self.b_sum / (self.q * self.scale[cut]) * self.alpha[cut]
            self.alpha_2, self.sigma_2 = self.alpha[cut] ** 2, self.sigma[cut] ** 2
        self.frozen = padded(coefficients.frozen_prediction_slopes())
        self.extrapolates = "frozen" if coefficients.stochastic or coefficients.alpha is None else "line"
        self.columns = np.stack([getattr(self, name)[: steps + more] for name in self.COLUMNS], 1)
        self.entering: dict[Any, Array] = {}  # factors of states that enter, by where: the same for every sample

    @classmethod
    def of(cls, coefficients: Coefficients, width: int) -> Tables:
        """Return the tables of a sampler; they are kept with it, as small networks draw many samples of one."""
        known: dict[int, Tables] = coefficients.__dict__.setdefault("_tables", {})
        if width not in known:
            known[width] = cls(coefficients, width)
        return known[width]

    def gaussian_slopes(self, steps: Indices, variance: Array) -> Array:
        """Return d of the exact network for Gaussian data of this variance, at some steps."""
        assert self.alpha is not None
        assert self.sigma is not None
        assert self.scale is not None
        alpha, sigma = self.alpha[steps], self.sigma[steps]
        target = alpha * variance / (alpha**2 * variance + sigma**2) / self.scale[steps]
        return np.asarray((target - self.p[steps]) / self.q[steps])

    def factors(self, lo: int, origin: int, count: int, width: int, tail: int, entry: str) -> Array:
        """Return the factors (count, tail) of the states behind ``origin``; see :mod:`.extrapolation`."""
        key = (lo, origin, count, width, tail, entry)
        if key not in self.entering:
            if len(self.entering) > 4096:
                self.entering.clear()
            hi = np.array([origin])
            if entry == "copy":
                factors = extrapolation.copied(self, hi, count, tail)
            elif self.extrapolates == "frozen":
                factors = extrapolation.frozen(self, hi, count, tail)
            else:
                factors = extrapolation.line(self, np.array([lo]), hi, width, count, tail)
            self.entering[key] = factors[0]
        return self.entering[key]


@dataclass(eq=False)
class Measured:
    """What one round has measured, float64 on the host.

    Attributes:
        gram: (S, W, W) inner products of the residuals.
        pairs: (S, W, 2, 2) inner products of (dx, df): moves of input and output since the evaluation before, or from
            the origin for steps that are new; empty unless the solver measures them.
        finite: (S, W) whether the outputs were finite, or None if all were.
        corrections: (S, W, m, m) inner products of the corrections of the last m rounds, the present one first; empty
            unless the solver combines them.
    """

    gram: Array
    pairs: Array
    finite: Flags | None
    corrections: Array


class Window:
    """The windows of S samples; see the module.

    Args:
        batch: The samples.
        width: W; None for N.
        history: Rounds of corrections that an accelerated method combines; 1 for none.
        order: Terms kept of the correction (I - K)^{-1}; None for all.

    Attributes:
        lo, hi, width: (S,) first and last state, and steps, of each window.
        steps: (S, W) numbers of its steps.
        inside: (S, W) entries within a window.
        uniform: Whether all windows have W steps.
        a, b, b_sum: (S, W, ..) coefficients of its steps; zeros beyond it.
        variance: (S,) mean square of the data prediction.
        error_used: (S,) error of the sample that has been accepted.
        error_carried: (S,) absolute error of the accepted state of each window.
        known: (S, 5, 2 W) of the steps lo - W .. lo + W - 1, or NaN: the error of their slopes as last measured, the
            largest growth that was measured, and that over the growth for Gaussian data; their slopes, in the first W
            entries; and the largest move, over the expected rms, by which growth was measured.
        slopes: (S, W) of the last round, or NaN.
        moves, residuals: (S, W) norms of the corrections and of the residuals of this round.
    """

    tensors_type: type[WindowTensors] = WindowTensors
    always_enters = False  # whether the factors of entering states are written in every round
    STATES = (
        "lo",
        "error_used",
        "variance",
        "rounds",
        "error_carried",
        "variances",
        "known",
        "spans",
        "evaluated_until",
        "reached",
        "last_step",
        "last_evaluated",
    )

    def __init__(
        self,
        batch: Batch,
        width: int | None,
        *,
        history: int = 1,
        order: int | None = None,
    ) -> None:
        problem = batch.problem
        self.batch, self.problem = batch, problem
        self.W = min(width or problem.steps, problem.steps)
        self.order, self.history, self.lags = order, history, problem.coefficients.lags
        self.tables = Tables.of(problem.coefficients, self.W)
        self.offset = np.arange(self.W + 1)
        self.roots = np.sqrt((self.offset[:-1] + 1) / problem.steps)
        self.known_size = self.tables.alpha is not None and self.tables.predicts
        self._parts: dict[int, WindowTensors] = {}
        count = len(batch)
        self.tensors = self.tensors_type(
            batch,
            count,
            self.W,
            self.lags,
            # Errors of a single state are not estimated, and its slopes matter to a replay only.
            keeps_pairs=self.W > 1 or batch.recurrence.replays,
            predicts=self.known_size,
            order=order,
            history=history,
        )
        self._seat(np.arange(count), self.tensors)
        self.reset(np.arange(count))

    # -- places ---------------------------------------------------------------------------------------------------

    def _seat(self, places: Indices, tensors: WindowTensors) -> None:
        """Begin anew with the samples at these places."""
        count, width = len(places), self.W
        self.places, self.tensors, self.pack = places, tensors, tensors.pack
        self.rows = np.arange(count)
        self.row_of_place = {int(place): row for row, place in enumerate(places)}
        self.lo = np.zeros(count, np.int64)
        self.error_used, self.error_carried = np.zeros(count), np.zeros(count)
        self.variance, self.variances = np.ones(count), np.full((count, 3), np.inf)
        self.rounds = np.zeros(count, np.int64)
        # What is known of states and steps moves with the windows: one array, shifted once.
        self.known = np.full((count, 5, 2 * width), np.nan)
        self._name_known()
        self.spans = np.zeros((count, 2, self.history - 1))  # lo and hi of the rounds that are kept, the latest first
        self.evaluated_until = np.zeros(count, np.int64)
        self.reached = np.zeros(count, bool)  # the last round has corrected the sample itself
        self.last_step = np.zeros(count, np.int64)  # farthest step of the present round
        self.last_evaluated = np.zeros(count, np.int64)  # and of the last one
        self._frame_sent = False
        self._frame_key: Any = None

    def _name_known(self) -> None:
        self.slopes = self.known[:, 3, : self.W]

    def take(self, rows: Indices) -> Window:
        """Return a window of some of the samples only, a copy."""
        part: Window = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        if len(rows) not in self._parts:
            self._parts[len(rows)] = self.tensors.like(len(rows))
        part._seat(self.places[rows], self._parts[len(rows)])
        for name in self.STATES:
            setattr(part, name, getattr(self, name)[rows])
        part._name_known()
        self.tensors.copy_rows(rows, part.tensors)
        part.frame()
        return part

    def put(self, rows: Indices, part: Window) -> None:
        """Take back what :meth:`take` has given."""
        for name in self.STATES:
            getattr(self, name)[rows] = getattr(part, name)
        self.tensors.put_rows(rows, part.tensors)
        self.refresh()

    def adopt(self) -> None:
        """Take up the samples that have been added to the batch since the last round."""
        batch = self.batch
        if not batch.added:
            return
        places = np.array(sorted(set(batch.added)))
        batch.added.clear()
        if places[-1] >= len(self.places):
            rows = self.rows
            before = self.take(rows)
            self._parts.clear()
            self._seat(np.arange(len(batch)), self.tensors.like(len(batch)))
            self.put(rows, before)
        self.reset(places)

    def refresh(self) -> None:
        """Look again at which samples are being solved."""
        self.frame()
        self._frame_sent = False

    def shrink(self) -> None:
        """Drop samples that have ended, once they are at least half."""
        active = np.flatnonzero(self.batch.active[self.places])
        if 0 < len(active) <= len(self.places) // 2 and not self.batch.refilled:
            part = self.take(active)
            self.__dict__.update(part.__dict__)
            self._parts = {}  # these tensors are its own now

    def reset(self, rows: Indices) -> None:
        """Fill the windows of new samples: the given guess, or the initial state in the proportion of expected rms."""
        batch, problem, width, device = self.batch, self.problem, self.W, self.batch.start.device
        for name in self.STATES:
            getattr(self, name)[rows] = {"known": np.nan, "variances": np.inf}.get(name, 0)
        lo = problem.frozen_steps
        self.lo[rows], self.evaluated_until[rows], self.variance[rows] = lo, lo, 1.0
        places = upload(self.places[rows], device)
        self.tensors.clear_rows(rows)
        if batch.guess is not None:
            whole = batch.guess.index_select(0, places)
            if lo:
                batch.accept(self.places[rows], np.full(len(rows), lo), whole[:, 1 : lo + 1], np.zeros(len(rows)))
            states = whole[:, lo : lo + width + 1]
        else:
            rms = self.tables.rms[: width + 1]
            factors = upload(rms / rms[0], batch.start)
            states = batch.start.index_select(0, places)[:, None] * factors[:, None]
        held = min(width, problem.steps - lo) + 1
        self.tensors.x[upload(rows, device), :held] = states[:, :held]
        self.refresh()

    def frame(self) -> None:
        """Read off what follows from where the windows stand."""
        problem, tables, width = self.problem, self.tables, self.W
        active = self.batch.active[self.places]
        self.hi = np.minimum(self.lo + width, problem.steps)
        everyone = bool(active.all())
        if not everyone:
            self.hi = np.where(active, self.hi, self.lo)
        self.width = self.hi - self.lo
        self.uniform = everyone and int(self.width.min()) == width
        self.steps = self.lo[:, None] + self.offset[:-1]
        self.inside = self.offset[:-1] < self.width[:, None]
        # Beyond the end of the loop the tables hold zeros; the windows of places without a sample are empty.
        columns = tables.columns[self.steps]
        self.a, self.b_sum, self.b_inverse, self.rms, self.rms_ratio, self.reach, *self.mm = columns.transpose(2, 0, 1)
        self.b = tables.b[self.steps]
        if not everyone:
            self.a, self.b, self.b_sum = self.a * self.inside, self.b * self.inside[..., None], self.b_sum * self.inside
        self.strided = bool(problem.strides)
        self.coarse = self.rough = NEVER
        if self.strided:
            padded = np.array([1, *problem.strides, 1, 1])  # of round -1, 0, 1, ..
            at = np.minimum(self.rounds + 1, len(padded) - 1)
            self.stride = padded[at]
            self.coarse = self.stride > 1  # some outputs of this round are interpolated
            self.rough = (self.rounds < len(problem.strides)) | (padded[at - 1] > 1)  # no round was on all steps yet

    @property
    def evaluated(self) -> Flags:
        """(S, W) steps that have been evaluated before."""
        return self.steps < np.minimum(self.evaluated_until, self.hi)[:, None]

    # -- evaluate -------------------------------------------------------------------------------------------------

    def nodes(self) -> Flags:
        """Return (S, W) the steps that are evaluated: all, or every so many and the last."""
        if not self.strided:
            return self.inside
        offset = self.offset[:-1]
        last = offset == self.width[:, None] - 1
        return self.inside & ((offset % self.stride[:, None] == 0) | last)

    def query(self) -> Query:
        """Return the states to be evaluated."""
        widths = np.zeros(len(self.batch), np.int64)
        self._chosen: Indices | None = None
        if self.uniform and not self.coarse.any():
            widths[self.places] = self.W
            rows = self.tensors.inputs.clone()  # the network may write into its input
            return Query(rows.view(-1, rows.shape[2]), self.steps.reshape(-1), np.repeat(self.places, self.W), widths)
        chosen = self.nodes()
        widths[self.places] = chosen.sum(1)
        sample, offset = np.nonzero(chosen)
        self._chosen = sample * (self.lags + self.W) + self.lags + offset
        index = upload(sample * (self.W + 1) + offset, self.batch.start.device)
        return Query(self.tensors.flat["x"].index_select(0, index), self.steps[chosen], self.places[sample], widths)

    # -- measure --------------------------------------------------------------------------------------------------

    def measure(self, outputs: Tensor) -> Measured:
        """Store outputs (R, dim) of the last query, and measure.

        Raises:
            OutputError: If an output is not finite though its input is accepted.
        """
        if self.batch.returns_errors:
            outputs = self._fail_broken(outputs)
        gram, pairs, size, corrections, largest = self._measure(outputs, pairs=self.tensors.keeps_pairs)
        finite = np.isfinite(largest)
        flags = None
        if not finite.all():
            flags, outputs = self._repair(outputs, finite)
            gram, _, size, corrections, _ = self._measure(outputs, pairs=False)
        return self.take_measured(gram, pairs, size, corrections, flags)

    def _fail_broken(self, outputs: Tensor) -> Tensor:
        """End the samples that meet an output which the sequential loop meets too: their windows are empty then."""
        widths = self.nodes().sum(1)
        present = np.flatnonzero(widths)
        places, lo, widths = self.places[present], self.lo[present], widths[present]
        failed = self.batch.fail_broken(places, lo, widths, outputs, self.rounds[present])
        if not failed.any():
            return outputs
        self.refresh()
        return outputs.masked_fill(upload(np.repeat(failed, widths), outputs.device)[:, None], 0)

    def take_measured(
        self, gram: Array, pairs: Array, size: Array, corrections: Array, finite: Flags | None
    ) -> Measured:
        """Take what the device has measured; ``size`` (S, 2) are the norms of the data prediction at both ends."""
        self._note_size(size)
        return Measured(gram, pairs, finite, corrections)

    def _measure(self, outputs: Tensor, *, pairs: bool) -> list[Array]:
        self.store(outputs)
        if not self._frame_sent:
            self.write_frame()
            self.pack.send()
            self._frame_sent = True
        parts = [*self.tensors.measure(pairs=pairs), torch.linalg.vector_norm(outputs, float("inf"), dim=1)]
        return split(read(torch.cat([part.reshape(-1) for part in parts])), [part.shape for part in parts])

    def store(self, outputs: Tensor) -> None:
        """Put the outputs of the last query in their places; between nodes they are interpolated."""
        tensors = self.tensors
        if self._chosen is None:
            tensors.outputs.copy_(outputs.view(tensors.outputs.shape))
            return
        if self.strided:
            tensors.outputs.zero_()  # between nodes something not finite may have been left
        tensors.flat["f"].index_copy_(0, upload(self._chosen, outputs.device), outputs)
        if self.coarse.any():
            factors = extrapolation.between_nodes(
                self.nodes(), self.inside, self.steps, self.problem.coefficients, self.tables
            )
            by_output, by_state = (upload(factor, outputs) for factor in factors)
            tensors.outputs.copy_(torch.bmm(by_output, tensors.outputs).baddbmm_(by_state, tensors.inputs))

    def _repair(self, outputs: Tensor, finite: Flags) -> tuple[Flags, Tensor]:
        """Put the last finite output before it in the place of each output that is not finite.

        Returns:
            (S, W) which outputs are finite; an interpolated one is if its neighbours are. And the outputs repaired.
        """
        chosen = self.nodes()
        sample, offset = np.nonzero(chosen)
        broken = (offset == 0) & ~finite
        if broken.any():
            row = int(sample[np.argmax(broken)])
            raise self.batch.output_error(int(self.places[row]), int(self.lo[row]), int(self.rounds[row]) + 1)
        nearest = np.maximum.accumulate(np.where(finite, np.arange(len(finite)), -1))
        outputs = outputs.index_select(0, upload(nearest, outputs.device))
        flags = np.ones((len(self.places), self.W), bool)
        flags[chosen] = finite
        for row in np.flatnonzero(self.coarse).tolist() if self.strided else ():
            at, inside = np.flatnonzero(chosen[row]), np.arange(self.width[row])
            flags[row, inside] = np.interp(inside, at, flags[row, at]) == 1
        return flags, outputs

    def _note_size(self, norms: Array) -> None:
        """Take the mean square of the data prediction, from its norms (S, 2) at the first and the last step.

        A trajectory that still diverges would make every error look small. The prediction at the accepted state does
        not diverge, but shows less than the whole sample while there is much noise: so the last one counts up to the
        expected size of data, 1, or to the first one where that is larger.
        """
        if self.W == 1:  # errors of a single state are not estimated
            return
        first, variance = (norms**2 / self.problem.dim).T
        known = np.isfinite(variance) & (variance > 0) & (self.width > 0)
        if self.known_size:
            # Near pure noise the data prediction is mostly the network's error divided by alpha.
            signal = self.tables.alpha
            assert signal is not None
            limit = np.where(signal[self.lo] < NEAR_NOISE, 1.0, np.fmax(first, 1.0))
            self.variance = np.where(known, np.minimum(variance, limit), self.variance)
        else:
            self.variance = np.where(known, np.minimum(variance, np.where(first > 0, first, 1.0)), 1.0)
        self.variances[:, 1:] = self.variances[:, :-1]
        self.variances[:, 0] = self.variance

    def write_frame(self) -> None:
        """Write down what the device needs to know of where the windows stand."""
        pack, tables, row, width = self.pack, self.tables, self.rows, self.W
        pack.begin()
        numbers, indices = pack.numbers, pack.indices
        numbers["a"][:, :, 0] = self.a
        for lag in range(self.lags + 1):
            numbers[f"b{lag}"][:, :, 0] = self.b[:, :, lag]
        point = self.hi - 1
        if not self.uniform:
            point = np.maximum(point, self.lo)
            self.last_step = np.where(self.width > 0, point, self.last_step)
        else:
            self.last_step = point
        if not (self.uniform and self._frame_key == "uniform"):  # else they are as they were
            ends = np.stack([np.zeros_like(row), np.maximum(self.width - 1, 0)], 1)
            indices["end_x"][:] = (row[:, None] * (width + 1) + ends).reshape(-1)
            indices["end_f"][:] = (row[:, None] * (self.lags + width) + self.lags + ends).reshape(-1)
            ends[:, 1] = self.width
            indices["size_x"][:] = (row[:, None] * (width + 1) + ends).reshape(-1)
            self._frame_key = "uniform" if self.uniform else None
        if self.known_size:
            ends = np.stack([self.lo, point], 1)
            numbers["p"][:, :, 0], numbers["q"][:, :, 0] = tables.p[ends], tables.q[ends]
        else:  # where the data prediction is unknown, the last state of the window stands for it
            numbers["p"][:], numbers["q"][:] = 1.0, 0.0
        steps = self.steps if self.uniform else np.minimum(self.steps, self.problem.steps - 1)
        indices["step"][:] = steps.reshape(-1)
        if self.batch.noise is not None:
            indices["noise"][:] = (steps + (self.places * self.problem.steps)[:, None]).reshape(-1)
        self._frame_sent = False

    # -- decide ---------------------------------------------------------------------------------------------------

    def growth(self, slopes: Array) -> Array:
        """Return J (S, W) of slopes d (S, W): how a change of each state is carried on by its step."""
        return np.asarray(self.a + self.b_sum * slopes)

    def slopes_for_growth(self, growth: Array) -> Array:
        """Return d (S, W) for which :meth:`growth` is ``growth``; 0 where no output enters the step."""
        return np.asarray((growth - self.a) * self.b_inverse)

    def gaussian_slopes(self) -> Array:
        """Return d (S, W) of the exact network for Gaussian data of the measured variance; else for a growth of 1."""
        if not self.tables.gaussian:
            return self.slopes_for_growth(np.ones_like(self.a))
        return self.tables.gaussian_slopes(self.steps, self.variance[:, None])

    def gaussian_growth(self) -> Array:
        """Return (S, W) growth of each step for Gaussian data of the measured variance, 1 where that is unknown."""
        fixed, slope, alpha_2, sigma_2 = self.mm
        variance = self.variance[:, None]
        return np.abs(fixed + slope * variance / (alpha_2 * variance + sigma_2))

    def smallest_variance(self) -> Array:
        """Return (S,) the smallest mean square of the data prediction in the last three rounds, at most 1 near noise.

        A prediction that still diverges would make every error look small.
        """
        smallest = self.variances.min(1)
        if self.tables.signal is None:
            return smallest
        return np.where(self.tables.signal[self.hi] < NOISY, np.minimum(smallest, 1.0), smallest)

    def shares(self) -> tuple[Array, Array]:
        """Return (S, W) square roots of the part of the loop up to each state, and of the part since the first one."""
        steps = self.problem.steps
        return np.sqrt((self.steps + 1) / steps), self.roots

    def take_error(self, estimate: Estimate, count: Indices) -> None:
        """Take the error of the states that are accepted: absolute, to be carried on, and as it is reported."""
        at = np.maximum(count - 1, 0)
        carried, reported = estimate.accepted[self.rows, at], estimate.reported[self.rows, at]
        if not self.uniform:
            carried, reported = (
                np.where(count > 0, carried, self.error_carried),
                np.where(count > 0, reported, self.error_used),
            )
        self.error_carried, self.error_used = carried, reported

    def correct(self, slopes: Array, measured: Measured | None = None) -> None:
        """Take the slopes of a round: what trajectory follows is now decided, and is put in place by :meth:`move`.

        Args:
            slopes: (S, W) d.
            measured: What the round has measured; None if it is not known yet: :meth:`norms` is then to be called.
        """
        self.slopes[:] = slopes if self.uniform else np.where(self.inside, slopes, np.nan)
        slopes = self.slopes if self.uniform else np.where(self.inside, slopes, 0.0)
        self.pack.begin()
        self.chunks = correction.propagation(self.a, self.b, slopes, self.order)
        for i, chunk in enumerate(self.chunks):
            self.pack.numbers[f"chunk{i}"][:] = chunk
        if self.lags:
            self.pack.numbers["slopes"][:, :, 0] = slopes
        self.batch.recurrence.note_slopes(self.places, self.lo, self.width, slopes)
        self.overflow = False
        if measured is not None:
            self.norms(measured)

    def norms(self, measured: Measured) -> None:
        """Derive the norms of the corrections and of the residuals, (S, W) each, infinite where they are unknown.

        A correction that overflowed goes on from the last state that did not; none of the others is accepted. The first
        state is right even so: it is the loop's own step from an accepted state.
        """
        changes, residuals = correction.corrected_norms(self.chunks, self.lags, measured.gram)
        self.take_norms(np.sqrt(changes), np.sqrt(residuals), measured.finite)

    def take_norms(self, changes: Array, residuals: Array, finite: Flags | None) -> None:
        """Take the norms (S, W) of the corrections and of the residuals."""
        if not np.isfinite(changes.sum() + residuals.sum()):
            changes, residuals = (np.where(np.isfinite(values), values, np.inf) for values in (changes, residuals))
            broken = np.asarray((np.isinf(changes) | np.isinf(residuals)) & self.inside)
            broken[:, 0] = False
            # The first that overflowed; the state before it is the last to go on from.
            self.overflow = bool(broken.any())
            self.overflowed = np.where(broken.any(1), np.argmax(broken, 1), 0)
            lost = broken.any(1, keepdims=True) & (self.offset[:-1] >= self.overflowed[:, None])
            changes, residuals = np.where(lost, np.inf, changes), np.where(lost, np.inf, residuals)
        if finite is not None:
            changes, residuals = np.where(finite, changes, np.inf), np.where(finite, residuals, np.inf)
        if not self.uniform:
            changes, residuals = np.where(self.inside, changes, 0.0), np.where(self.inside, residuals, 0.0)
        self.moves, self.residuals = changes, residuals

    # -- move -----------------------------------------------------------------------------------------------------

    def move(self, count: Indices, entry: str) -> None:
        """Accept the first ``count`` states of every window, and move it behind them.

        Args:
            count: (S,) at least 1, but 0 for empty windows.
            entry: How states enter the window: ``extrapolate`` or ``copy``.
        """
        hi, width, W, steps = self.hi, self.width, self.W, self.problem.steps
        ended, guessed = self.lo + count, self.batch.guess is not None
        entering = np.minimum(ended + W, steps) - hi
        if not self.uniform:
            entering = np.where(width > 0, entering, 0)
        last = np.where(self.overflowed > 0, self.overflowed, width) if self.overflow else width
        self.tensors.overflowed = self.overflow
        self._write_shift(count, last)
        new = entering if not guessed else np.zeros_like(entering)
        enter = bool(new.any()) or self.overflow
        if enter or self.always_enters:
            self._write_entering(count, last, new, entry)
        self._shift_known(count)
        present = width > 0
        self.reached = self.reached | ((hi == steps) & present)
        self.last_evaluated = np.where(present, hi - 1, self.last_evaluated)
        self.lo = ended
        self.rounds = self.rounds + present
        self.frame()
        self.write_frame()
        self.carry_out(enter=enter)
        self._frame_sent = True
        self.batch.accept(self.places, count, self.tensors.step, self.error_used)
        if guessed and entering.any():
            self._load_guess(entering)
        for row in np.flatnonzero((ended == steps) & present):
            place = int(self.places[row])
            self.batch.finished[place] = True
            self.batch.results[place] = self.tensors.x[row, 0].clone()

    def carry_out(self, *, enter: bool) -> None:
        """Send what has been written, and move the tensors."""
        self.pack.send()
        self.tensors.move(enter=enter)

    def _write_shift(self, count: Indices, last: Indices) -> None:
        """Write down where every row of the next window comes from; states behind ``last`` are not gone on from."""
        indices, W, lags, row, nothing = self.pack.indices, self.W, self.lags, self.rows[:, None], len(self.places)
        source = count[:, None] + self.offset
        here = row * (W + 1) + source
        indices["shift"][:] = np.where(source <= last[:, None], here, nothing * (W + 1)).reshape(-1)
        if self.tensors.keeps_pairs:
            # States and outputs of steps that stay; interpolated outputs are no measurement.
            stays = source[:, :-1] < self.width[:, None]
            if self.strided:
                stays = stays & ~self.coarse[:, None]
            indices["before_x"][:] = np.where(stays, here[:, :-1], nothing * (W + 1)).reshape(-1)
            output = row * (lags + W) + lags + source[:, :-1]
            indices["before_f"][:] = np.where(stays, output, nothing * (lags + W)).reshape(-1)
        if lags:
            indices["history"][:] = (row * (lags + W) + count[:, None] + np.arange(lags)).reshape(-1)

    def _write_entering(self, count: Indices, last: Indices, entering: Indices, entry: str) -> None:
        """Write down the states that enter as combinations of the tail; see :mod:`.extrapolation`."""
        numbers, indices, W, lags, row = self.pack.numbers, self.pack.indices, self.W, self.lags, self.rows
        enter = numbers["enter"]
        enter[:] = 0.0
        # States of the window that are lost by an overflow are copies of the last good one, and so are new ones then.
        new = entering + (self.width - last)
        origin, first = self.lo + last, last - count + 1
        for s in np.flatnonzero(new):
            kind = "copy" if last[s] < self.width[s] else entry
            size = min(int(new[s]), W + 1 - int(first[s]))
            factors = self.tables.factors(int(self.lo[s]), int(origin[s]), size, W, enter.shape[2], kind)
            enter[s, first[s] : first[s] + size] = factors
        end = np.maximum(last - 1, 0)
        indices["tail_moved"][:] = (row[:, None] * (W + 1) + np.stack([last, end], 1)).reshape(-1)
        indices["tail_f"][:] = row * (lags + W) + lags + np.maximum(0, end - W // 2)
        if lags:
            history = row[:, None] * (lags + W) + end[:, None] + np.arange(lags)
            history[last < self.width] = len(row) * (lags + W)
            indices["tail_history"][:] = history.reshape(-1)
        if self.batch.noise is not None:
            steps = np.minimum((self.lo + end)[:, None] + self.offset, self.problem.steps - 1)
            indices["tail_noise"][:] = (steps + (self.places * self.problem.steps)[:, None]).reshape(-1)

    def _shift_known(self, count: Indices) -> None:
        """Shift what is known of states and steps with the windows."""
        until = np.where(self.coarse, self.lo, self.hi) if self.strided else self.hi
        self.evaluated_until = until if self.uniform else np.where(self.width > 0, until, self.evaluated_until)
        known = self.known
        for row, by in enumerate(count.tolist()):
            if by:
                known[row, :, :-by] = known[row, :, by:]
                known[row, :, -by:] = np.nan

    def _load_guess(self, entering: Indices) -> None:
        """Fill the states that enter from the given trajectories."""
        guess = self.batch.guess
        assert guess is not None
        state = self.lo[:, None] + self.offset
        new = (state > (self.hi - entering)[:, None]) & (state <= self.hi[:, None])
        sample, at = np.nonzero(new)
        into = upload(sample * (self.W + 1) + at, guess.device)
        source = upload(self.places[sample] * guess.shape[1] + state[new], guess.device)
        self.tensors.flat["x"].index_copy_(0, into, guess.view(-1, guess.shape[2]).index_select(0, source))

    # -- what others look at ---------------------------------------------------------------------------------------

    def estimate(self, place: int) -> Tensor:
        """Return (dim,) the present guess of a sample: its row if the window reaches it, else the data prediction.

        Where that is unknown, it is one coarse step from the farthest evaluation, and in multistep samplers the state
        there.
        """
        row = self.row_of_place[place]
        local, steps = self.problem.coefficients, self.problem.steps
        if self.rounds[row] == 0:
            return self.batch.start[place]
        if self.reached[row] or self.lo[row] == steps:
            return self.tensors.x[row, steps - self.lo[row]]
        u, f, step = self.tensors.last_x[row], self.tensors.last_f[row], int(self.last_evaluated[row])
        if self.tables.predicts:
            return self.tables.p[step] * u + self.tables.q[step] * f
        if local.lags:
            return u
        noise = self.batch.noise
        values = Recurrence(local, u[None], None if noise is None else noise[place, None])
        return values.coarse_step(step, steps, u[None], f[None])[0]

    # -- stop and resume -------------------------------------------------------------------------------------------

    def state(self, place: int) -> dict[str, Any]:
        """Return all that is known of a sample between two rounds."""
        row = self.row_of_place[place]
        numbers = {name: getattr(self, name)[row] for name in self.STATES}
        return {**numbers, **self.tensors.state(row)}

    def load(self, place: int, state: dict[str, Tensor]) -> None:
        """Take such a state."""
        row = self.row_of_place[place]
        for name in self.STATES:
            getattr(self, name)[row] = state[name].numpy()
        self.tensors.load(row, state)


NEVER = np.zeros(1, bool)  # of rounds on all steps


def split(flat: Array, shapes: Sequence[Sequence[int]]) -> list[Array]:
    """Return arrays of these shapes that lie one behind the other."""
    arrays, first = [], 0
    for shape in shapes:
        size = math.prod(shape)
        arrays.append(flat[first : first + size].reshape(shape))
        first += size
    return arrays
