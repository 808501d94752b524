r"""A batch of sliding windows: S samples side by side, W steps of each. Measure, decide, move.

The window of a sample reaches over its states lo .. hi, of which lo is accepted. A round is

1. *evaluate*: the states lo .. hi - 1 go through the network, all samples in one :class:`~.base.Query`;
2. *measure*: the steps, the residuals r_i = step_i(U) - u_{i+1}, their Gram matrix and the few inner products that a
   solver wants, read from the device once;
3. *decide*: numpy on (S, W) and (S, W, W) arrays in float64: see :mod:`.windowed`;
4. *move*: corrected states, the shift of every window and the states that enter it, after one upload.

Arrays have entries for W steps of every sample. Windows are shorter than W near the end of the loop, and empty where a
place is free or its sample has ended: entries beyond a window are harmless zeros. Tensors are flat, with one more row
that stays zero, for whatever indices must not point to anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Array, Indices, Packed, read
from ..checks import OutputError, is_whole
from ..samplers.coefficients import Coefficients
from ..samplers.recurrence import Recurrence
from . import correction, extrapolation
from .base import Problem, Query
from .batch import Batch

__all__ = ["Measured", "Tables", "Window", "check_window"]

Flags = NDArray[np.bool_]


def check_window(window: int | None) -> None:
    """Raise unless ``window`` is None or a whole number of at least 1."""
    if window is not None and not is_whole(window):
        raise ValueError(f"window must be a whole number of steps, at least 1, or None for all, got {window!r}.")


class Tables:
    """The coefficients of a loop, continued with zeros behind its end so that every window finds its entries.

    Attributes:
        a: (N + 2 W,) A_i.
        b: (N + 2 W, L + 1) B_{i,l}.
        b_sum: (N + 2 W,) sum_l B_{i,l}.
        rms: (N + 2 W + 1,) expected rms of the states; 1 behind the end.
        p, q: (N + 2 W,) of the data prediction p u + q f; 0 and 1 where it is unknown.
    """

    def __init__(self, coefficients: Coefficients, width: int) -> None:
        more = 2 * width

        def padded(values: Array, fill: float = 0.0) -> Array:
            return np.concatenate([values, np.full((more, *values.shape[1:]), fill)])

        steps = coefficients.steps
        self.a, self.b = padded(coefficients.state_weight), padded(coefficients.output_weight)
        self.b_sum, self.rms = self.b.sum(1), padded(coefficients.rms, 1.0)
        self.predicts = coefficients.x0_from_input is not None and coefficients.x0_from_output is not None
        self.p = padded(coefficients.x0_from_input if self.predicts else np.zeros(steps))  # type: ignore[arg-type]
        self.q = padded(coefficients.x0_from_output if self.predicts else np.ones(steps), 1.0)  # type: ignore[arg-type]
        self.alpha = None if coefficients.alpha is None else padded(coefficients.alpha, 1.0)
        self.sigma = None if coefficients.sigma is None else padded(coefficients.sigma, 1.0)
        self.scale = None if coefficients.scale is None else padded(coefficients.scale, 1.0)
        self.frozen = padded(coefficients.frozen_prediction_slopes())


@dataclass(eq=False)
class Measured:
    """What one round has measured, float64 on the host.

    Attributes:
        gram: (S, W, W) inner products of the residuals.
        pairs: (S, W, 2, 2) inner products of (dx, df): moves of input and output since the evaluation before, or from
            the origin for steps that are new; empty unless the solver measures them.
        finite: (S, W) whether the outputs were finite.
        corrections: (S, W, m, m) inner products of the corrections of the last m rounds, the present one first; empty
            unless the solver combines them.
    """

    gram: Array
    pairs: Array
    finite: Flags
    corrections: Array


class Window:
    """The windows of S samples; see the module.

    Args:
        batch: The samples.
        width: W; None for N.
        measures_pairs: Whether inputs and outputs of the evaluation before are kept, for secants.
        history: Rounds of corrected states that an accelerated method combines; 1 for none.
        order: Terms kept of the correction (I - K)^{-1}; None for all.

    Attributes:
        lo, hi, width: (S,) first and last state, and steps, of each window.
        steps: (S, W) numbers of its steps.
        inside: (S, W) entries within a window.
        a, b, b_sum: (S, W, ..) coefficients of its steps; zeros beyond it.
        variance: (S,) mean square of the data prediction.
        error_used: (S,) error of the sample that has been accepted.
        slope_errors: (S, 2 W) of the steps lo - W .. lo + W - 1, as last measured, or NaN.
        last_moves: (S, W + 1) |new - old| of the states lo .. lo + W, as last corrected, or NaN.
        slopes: (S, W) of the last round, or NaN.
        evaluated: (S, W) steps that have been evaluated before, on all steps.
        x, f: (S, W + 1, dim) states, (S, L + W, dim) outputs; the first L outputs are those of the steps before lo.
    """

    def __init__(
        self,
        batch: Batch,
        width: int | None,
        *,
        measures_pairs: bool = False,
        history: int = 1,
        order: int | None = None,
    ) -> None:
        problem = batch.problem
        self.batch, self.problem = batch, problem
        self.order = order
        self.W = min(width or problem.steps, problem.steps)
        self.lags = problem.coefficients.lags
        self.tables = Tables(problem.coefficients, self.W)
        self.measures_pairs, self.history = measures_pairs, history
        self._packs: dict[int, Packed] = {}
        self.places: Indices = np.zeros(0, np.int64)
        self._allocate(np.arange(len(batch)))
        self.reset(np.arange(len(batch)))

    # -- places ---------------------------------------------------------------------------------------------------

    def _allocate(self, places: Indices) -> None:
        """Make room for the samples at these places."""
        count, width, like = len(places), self.W, self.batch.start
        self.places = places
        self.row_of_place = {int(place): row for row, place in enumerate(places)}
        self.lo = np.zeros(count, np.int64)
        self.error_used, self.variance = np.zeros(count), np.ones(count)
        self.rounds = np.zeros(count, np.int64)
        self.slope_errors = np.full((count, 2 * width), np.nan)
        self.last_moves = np.full((count, width + 1), np.nan)
        self.slopes = np.full((count, width), np.nan)
        self.spans = np.zeros((count, 2, self.history - 1))  # lo and hi of the rounds that are kept, the latest first
        self.evaluated_until = np.zeros(count, np.int64)
        self.tensors = {name: like.new_zeros(rows * count + 1, like.shape[1]) for name, rows in self._rows().items()}
        self.reached = np.zeros(count, bool)  # the last round has corrected the sample itself
        self.last_step = np.zeros(count, np.int64)  # farthest step of the present round
        self.last_evaluated = np.zeros(count, np.int64)  # and of the last one
        self._frame_sent = False

    def _rows(self) -> dict[str, int]:
        """Return the tensors of a window and how many rows each has for a sample."""
        width = self.W
        rows = {"x": width + 1, "moved": width + 1, "r": width, "f": self.lags + width, "last_x": 1, "last_f": 1}
        if self.measures_pairs:
            rows |= {"dx": width, "df": width}
        for age in range(1, self.history):
            rows |= {f"new{age}": width + 1, f"old{age}": width + 1}
        return rows

    def _states(self) -> dict[str, Any]:
        names = ("lo", "error_used", "variance", "rounds", "slope_errors", "last_moves", "slopes", "spans", "evaluated_until", "reached", "last_step", "last_evaluated")
        return {name: getattr(self, name) for name in names}

    def take(self, rows: Indices) -> Window:
        """Return a window of some of the samples only, a copy."""
        part: Window = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.__dict__.pop("all_finite", None)
        part._allocate(self.places[rows])
        for name, values in self._states().items():
            getattr(part, name)[:] = values[rows]
        for name, count in self._rows().items():
            part.tensors[name][:-1] = self.tensors[name].index_select(0, self._index(rows, count))
        part.frame()
        return part

    def put(self, rows: Indices, part: Window) -> None:
        """Take back what :meth:`take` has given."""
        for name, values in part._states().items():
            getattr(self, name)[rows] = values
        for name, count in self._rows().items():
            self.tensors[name].index_copy_(0, self._index(rows, count), part.tensors[name][:-1])
        self.frame()
        self._frame_sent = False

    def _index(self, rows: Indices, count: int) -> Tensor:
        index = (rows[:, None] * count + np.arange(count)).reshape(-1)
        return torch.from_numpy(index).to(self.batch.start.device)

    def adopt(self) -> None:
        """Take up the samples that have been added to the batch since the last round."""
        batch = self.batch
        if not batch.added:
            return
        places = np.array(sorted(set(batch.added)))
        batch.added.clear()
        if places[-1] >= len(self.places):
            before, old = self.take(np.arange(len(self.places))), np.arange(len(self.places))
            self._allocate(np.arange(len(batch)))
            self.__dict__.pop("all_finite", None)
            self.put(old, before)
        self.reset(places)

    def refresh(self) -> None:
        """Look again at which samples are being solved."""
        self.frame()
        self._frame_sent = False

    def shrink(self) -> None:
        """Drop samples that have ended, once they are more than half."""
        active = np.flatnonzero(self.batch.active[self.places])
        if 0 < len(active) <= len(self.places) // 2 and not self.batch.refilled:
            part = self.take(active)
            self.__dict__.pop("all_finite", None)
            self.__dict__.update(part.__dict__)

    def reset(self, rows: Indices) -> None:
        """Fill the windows of new samples: the given guess, or the initial state in the proportion of expected sizes."""
        batch, problem, width = self.batch, self.problem, self.W
        for name, values in self._states().items():
            values[rows] = np.nan if values.ndim == 2 else 0
        lo = problem.frozen_steps
        self.lo[rows], self.evaluated_until[rows], self.variance[rows] = lo, lo, 1.0
        places = torch.from_numpy(self.places[rows]).to(batch.start.device)
        for name, count in self._rows().items():
            self.tensors[name].index_fill_(0, self._index(rows, count), 0)
        if batch.guess is not None:
            if lo:
                whole = batch.guess.index_select(0, places)
                counts = np.full(len(rows), lo)
                batch.accept(self.places[rows], counts, whole[:, 1 : lo + 1], np.zeros(len(rows)))
            states = batch.guess.index_select(0, places)[:, lo : lo + width + 1]
        else:
            rms = self.tables.rms[: width + 1]
            factors = torch.from_numpy(rms / rms[0]).to(batch.start)
            states = batch.start.index_select(0, places)[:, None] * factors[:, None]
        held = min(width, problem.steps - lo) + 1
        self.x[torch.from_numpy(rows).to(places.device), :held] = states[:, :held]
        self.frame()
        self._frame_sent = False

    # -- views ----------------------------------------------------------------------------------------------------

    def view(self, name: str) -> Tensor:
        """Return a tensor as (S, rows, dim)."""
        flat = self.tensors[name]
        return flat[:-1].view(len(self.places), -1, flat.shape[1])

    @property
    def x(self) -> Tensor:
        """(S, W + 1, dim) the states lo .. lo + W."""
        return self.view("x")

    @property
    def f(self) -> Tensor:
        """(S, L + W, dim) the outputs of the steps lo - L .. lo + W - 1."""
        return self.view("f")

    @property
    def coarse(self) -> Flags:
        """(S,) whether some outputs of this round are interpolated."""
        return self.stride > 1

    def frame(self) -> None:
        """Read off what follows from where the windows stand."""
        problem, tables = self.problem, self.tables
        active = self.batch.active[self.places]
        self.hi = np.where(active, np.minimum(self.lo + self.W, problem.steps), self.lo)
        self.width = self.hi - self.lo
        self.steps = self.lo[:, None] + np.arange(self.W)
        self.inside = np.arange(self.W) < self.width[:, None]
        # Beyond the end of the loop the tables hold zeros; the windows of places without a sample are empty.
        self.a, self.b, self.b_sum = tables.a[self.steps], tables.b[self.steps], tables.b_sum[self.steps]
        if not active.all():
            self.a, self.b, self.b_sum = self.a * active[:, None], self.b * active[:, None, None], self.b_sum * active[:, None]
        strides = problem.strides
        if strides:
            padded = np.array([1, *strides, 1, 1])  # of round -1, 0, 1, ..
            at = np.minimum(self.rounds + 1, len(padded) - 1)
            self.stride = padded[at]
            self.rough = (self.rounds < len(strides)) | (padded[at - 1] > 1)  # no round has been on all steps yet
        else:
            self.stride = np.ones(len(self.places), np.int64)
            self.rough = np.zeros(len(self.places), bool)

    @property
    def evaluated(self) -> Flags:
        """(S, W) steps that have been evaluated before."""
        return self.steps < np.minimum(self.evaluated_until, self.hi)[:, None]

    # -- evaluate -------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether every row of every window is evaluated."""
        return bool((self.width == self.W).all()) and not (self.problem.strides and self.coarse.any())

    def nodes(self) -> Flags:
        """Return (S, W) the steps that are evaluated: all, or every so many and the last."""
        if not self.problem.strides:
            return self.inside
        offset = np.arange(self.W)
        last = offset == self.width[:, None] - 1
        return self.inside & ((offset % self.stride[:, None] == 0) | last)

    def query(self) -> Query:
        """Return the states to be evaluated."""
        widths = np.zeros(len(self.batch), np.int64)
        if self.full:
            widths[self.places] = self.width
            rows = self.x[:, : self.W].reshape(-1, self.x.shape[2])
            if len(self.places) == 1:
                rows = rows.clone()  # the network may write into its input
            self._chosen: Indices | None = None
            return Query(rows, self.steps.reshape(-1), np.repeat(self.places, self.W), widths)
        chosen = self.nodes()
        widths[self.places] = chosen.sum(1)
        sample, offset = np.nonzero(chosen)
        self._chosen = sample * (self.lags + self.W) + self.lags + offset
        index = torch.from_numpy(sample * (self.W + 1) + offset).to(self.tensors["x"].device)
        rows = self.tensors["x"].index_select(0, index)
        return Query(rows, self.steps[chosen], self.places[sample], widths)

    # -- measure --------------------------------------------------------------------------------------------------

    @property
    def pack(self) -> Packed:
        """What a round sends to the device."""
        count = len(self.places)
        if count not in self._packs:
            self._packs[count] = Packed(self._numbers(count), self._indices(count), self.batch.start)
        return self._packs[count]

    def _numbers(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is sent for so many samples."""
        width, lags = self.W, self.lags
        tail = extrapolation.HISTORY + lags + (width + 1 if self.batch.recurrence.noise is not None else 0)
        numbers: dict[str, tuple[int, ...]] = {
            "a": (count, width, 1),
            "b": (lags + 1, count, width, 1),
            "pq": (count, 2),
            "slopes": (count, width, 1),
            "enter": (count, width + 1, tail),
        }
        for i, shape in enumerate(correction.chunk_shapes(width, lags, whole=self.order is not None)):
            numbers[f"chunk{i}"] = (count, *shape)
        return numbers

    def _indices(self, count: int) -> dict[str, int]:
        """Return how many indices of each kind are sent for so many samples."""
        width, lags = self.W, self.lags
        indices = {"noise": width, "last_x": 1, "last_f": 1, "size_x": 1, "before_x": width, "before_f": width}
        indices |= {"shift": width + 1, "history": lags}
        indices |= {"tail_moved": 2, "tail_f": 1, "tail_history": lags, "tail_noise": width + 1}
        return {name: size * count for name, size in indices.items()}

    def write_frame(self) -> None:
        """Write down what the device needs to know of where the windows stand."""
        pack, tables, count = self.pack, self.tables, np.arange(len(self.places))
        pack.begin()
        numbers, indices = pack.numbers, pack.indices
        numbers["a"][:, :, 0] = self.a
        numbers["b"][:, :, :, 0] = self.b.transpose(2, 0, 1)
        last = np.maximum(self.width - 1, 0)
        indices["last_x"][:] = count * (self.W + 1) + last
        indices["last_f"][:] = count * (self.lags + self.W) + self.lags + last
        point = self.lo + last
        if self.known_size:
            indices["size_x"][:] = indices["last_x"]
            numbers["pq"][:, 0], numbers["pq"][:, 1] = tables.p[point], tables.q[point]
        else:  # where the data prediction is unknown, the last state of the window stands for it
            indices["size_x"][:] = count * (self.W + 1) + self.width
            numbers["pq"][:, 0], numbers["pq"][:, 1] = 1.0, 0.0
        self.last_step = np.where(self.width > 0, point, self.last_step)
        if self.batch.recurrence.noise is not None:
            steps = np.minimum(self.steps, self.problem.steps - 1) + self.places[:, None] * self.problem.steps
            indices["noise"][:] = steps.reshape(-1)
        self._frame_sent = False

    @property
    def known_size(self) -> bool:
        """Whether the schedule tells a data prediction of every step."""
        return self.tables.alpha is not None and self.tables.predicts

    def measure(self, outputs: Tensor) -> Measured:
        """Store outputs (R, dim) of the last query, and measure.

        Raises:
            OutputError: If an output is not finite though its input is accepted.
        """
        gram, pairs, size, corrections, largest = self._measure(outputs, pairs=self.measures_pairs)
        finite = np.isfinite(largest)
        flags = self.all_finite
        if not finite.all():
            flags, outputs = self._repair(outputs, finite)
            gram, _, size, corrections, _ = self._measure(outputs, pairs=False)
        self._note_size(size)
        return Measured(gram, pairs, flags, corrections)

    def _measure(self, outputs: Tensor, *, pairs: bool) -> list[Array]:
        self.store(outputs)
        if not self._frame_sent:
            self.write_frame()
            self.pack.send()
            self._frame_sent = True
        parts = [*self.measure_tensors(pairs=pairs), torch.linalg.vector_norm(outputs, float("inf"), dim=1)]
        flat = read(torch.cat([part.reshape(-1) for part in parts]))
        found, first = [], 0
        for part in parts:
            found.append(flat[first : first + part.numel()].reshape(part.shape))
            first += part.numel()
        return found

    def store(self, outputs: Tensor) -> None:
        """Put the outputs of the last query in their places; between nodes they are interpolated."""
        outputs_of_steps = self.f[:, self.lags :]
        if self._chosen is None:
            outputs_of_steps.copy_(outputs.view(outputs_of_steps.shape))
            return
        self.tensors["f"].index_copy_(0, torch.from_numpy(self._chosen).to(outputs.device), outputs)
        if self.problem.strides and self.coarse.any():
            factors = extrapolation.between_nodes(self.nodes(), self.inside, self.steps, self.problem.coefficients, self.tables)
            by_output, by_state = (torch.from_numpy(own).to(outputs) for own in factors)
            whole = torch.bmm(by_output, outputs_of_steps).baddbmm_(by_state, self.x[:, : self.W])
            outputs_of_steps.copy_(whole)

    def measure_tensors(self, *, pairs: bool = True) -> list[Tensor]:
        """Return what is measured: Gram matrix of the residuals, products of (dx, df), norm of the prediction, products
        of corrections.
        """
        width, lags, sent = self.W, self.lags, self.pack.tensors
        x, f, moved, r = self.x, self.f, self.view("moved"), self.view("r")
        noise = self.batch.noise
        moved[:, :1] = x[:, :1]
        step = moved[:, 1:]
        if noise is None:
            torch.mul(f.narrow(1, lags, width), sent["b"][0], out=step)
        else:
            step.copy_(noise.view(-1, noise.shape[2]).index_select(0, sent["noise"]).view(step.shape))
            step.addcmul_(f.narrow(1, lags, width), sent["b"][0])
        for lag in range(1, lags + 1):
            step.addcmul_(f.narrow(1, lags - lag, width), sent["b"][lag])
        step.addcmul_(x[:, :width], sent["a"])
        torch.sub(step, x[:, 1:], out=r)
        inner = r.new_zeros(0)
        if pairs:
            dx, df = self.view("dx"), self.view("df")
            torch.sub(x[:, :width], dx, out=dx)
            torch.sub(f[:, lags:], df, out=df)
            inner = torch.stack([torch.linalg.vecdot(one, two) for one, two in ((dx, dx), (df, dx), (df, df))], -1)
        last_x, last_f = self.tensors["last_x"][:-1], self.tensors["last_f"][:-1]
        torch.index_select(self.tensors["x"], 0, sent["last_x"], out=last_x)
        torch.index_select(self.tensors["f"], 0, sent["last_f"], out=last_f)
        sized = last_x if self.known_size else self.tensors["x"].index_select(0, sent["size_x"])
        prediction = (sized * sent["pq"][:, :1]).addcmul_(last_f, sent["pq"][:, 1:])
        return [torch.bmm(r, r.mT), inner, torch.linalg.vector_norm(prediction, dim=1), r.new_zeros(0)]

    def _repair(self, outputs: Tensor, finite: Flags) -> tuple[Flags, Tensor]:
        """Put the last finite output before it in the place of each output that is not finite.

        Returns:
            (S, W) which outputs are finite; an interpolated one is if its neighbours are. And the outputs repaired.
        """
        chosen = self.nodes()
        sample, offset = np.nonzero(chosen)
        broken = (offset == 0) & ~finite
        if broken.any():
            row = sample[np.argmax(broken)]
            raise OutputError(
                f"the network returned NaN or Inf at step {self.lo[row]} of {self.problem.steps}, sample "
                f"{self.batch.numbers[self.places[row]]}, for an accepted input, so the sequential loop meets it too: check the network at that time, "
                "its dtype and its conditioning."
            )
        nearest = np.maximum.accumulate(np.where(finite, np.arange(len(finite)), -1))
        outputs = outputs.index_select(0, torch.from_numpy(nearest).to(outputs.device))
        flags = np.ones((len(self.places), self.W), bool)
        flags[chosen] = finite
        for row in np.flatnonzero(self.coarse):
            at = np.flatnonzero(chosen[row])
            inside = np.arange(self.width[row])
            flags[row, inside] = np.interp(inside, at, flags[row, at]) == 1
        return flags, outputs

    def _note_size(self, norm: Array) -> None:
        """Take the mean square of the data prediction."""
        variance = norm**2 / self.problem.dim
        known = np.isfinite(variance) & (variance > 0) & (self.W > 1) & (self.width > 0)
        if self.known_size:
            # Near pure noise the data prediction is mostly the network's error divided by alpha.
            assert self.tables.alpha is not None
            variance = np.where(self.tables.alpha[self.last_step] < 0.05, np.minimum(variance, 1.0), variance)
            self.variance = np.where(known, variance, self.variance)
        else:
            self.variance = np.where(known, variance, 1.0)

    @cached_property
    def all_finite(self) -> Flags:
        """(S, W) ones."""
        return np.ones((len(self.places), self.W), bool)

    # -- decide ---------------------------------------------------------------------------------------------------

    def growth(self, slopes: Array) -> Array:
        """Return J (S, W) of slopes d (S, W): how a change of each state is carried on by its step."""
        return np.asarray(self.a + self.b_sum * slopes)

    def slopes_for_growth(self, growth: Array) -> Array:
        """Return d (S, W) for which :meth:`growth` is ``growth``; 0 where no output enters the step."""
        return np.divide(growth - self.a, self.b_sum, out=np.zeros_like(self.a), where=self.b_sum != 0)

    def rms_ratio(self) -> Array:
        """Return (S, W) expected rms of the state behind each step over that of the state before it."""
        return np.asarray(self.tables.rms[self.steps + 1] / self.tables.rms[self.steps])

    def gaussian_slopes(self) -> Array:
        """Return d (S, W) of the exact network for Gaussian data of the measured variance; else for a growth of 1."""
        tables = self.tables
        if tables.alpha is None or tables.sigma is None or tables.scale is None or not tables.predicts:
            return self.slopes_for_growth(np.ones_like(self.a))
        return self._gaussian(self.steps, self.variance[:, None])

    def _gaussian(self, steps: Indices, variance: Array) -> Array:
        tables = self.tables
        assert tables.alpha is not None
        assert tables.sigma is not None
        assert tables.scale is not None
        alpha, sigma = tables.alpha[steps], tables.sigma[steps]
        target = alpha * variance / (alpha**2 * variance + sigma**2) / tables.scale[steps]
        return np.asarray((target - tables.p[steps]) / tables.q[steps])

    def growth_behind(self) -> Array:
        """Return (S,) growth of all steps behind the window, for Gaussian data of the measured variance."""
        steps = np.arange(self.problem.steps)
        local = self.problem.coefficients
        tables = self.tables
        if tables.alpha is None or tables.sigma is None or tables.scale is None or not tables.predicts:
            growth = np.broadcast_to(local.growth(local.slopes(np.ones(len(steps)))), (len(self.places), len(steps)))
        else:
            slopes = self._gaussian(steps[None], self.variance[:, None])
            growth = tables.a[steps] + tables.b_sum[steps] * slopes
        return np.asarray(np.prod(np.where(steps >= self.hi[:, None], np.abs(growth), 1.0), axis=1))

    def correct(self, slopes: Array, measured: Measured | None = None) -> None:
        """Take the slopes of a round: what trajectory follows is now decided, and is put in place by :meth:`move`.

        Args:
            slopes: (S, W) d.
            measured: What the round has measured; None if it is not known yet: :meth:`norms` is then to be called.
        """
        self.slopes = np.where(self.inside, slopes, np.nan)
        slopes = np.where(self.inside, slopes, 0.0)
        self.chunks = correction.propagation(self.a, self.b, slopes, self.order)
        self.pack.begin()
        for i, chunk in enumerate(self.chunks):
            self.pack.numbers[f"chunk{i}"][:] = chunk
        self.pack.numbers["slopes"][:, :, 0] = slopes
        self.batch.recurrence.note_slopes(self.places, self.lo, self.width, slopes)
        self.overflowed = np.zeros(len(self.places), np.int64)
        if measured is not None:
            self.norms(measured)

    def norms(self, measured: Measured) -> None:
        """Derive the norms of the corrections and of the residuals, (S, W) each, infinite where they are unknown.

        A correction that overflowed goes on from the last state that did not; none of the others is accepted. The first
        state is right even so: it is the loop's own step from an accepted state.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            changes, residuals = correction.corrected_norms(self.chunks, self.lags, measured.gram)
        self._take_norms(np.sqrt(changes), np.sqrt(residuals), measured.finite)

    def _take_norms(self, changes: Array, residuals: Array, finite: Flags) -> None:
        changes, residuals = (np.where(np.isfinite(one), one, np.inf) for one in (changes, residuals))
        broken = (np.isinf(changes) | np.isinf(residuals)) & self.inside
        broken[:, 0] = False
        if broken.any():
            good = np.argmax(broken, 1)  # the first that overflowed; the state before it is the last to go on from
            self.overflowed = np.where(broken.any(1), good, 0)
            lost = broken.any(1)[:, None] & (np.arange(self.W) >= good[:, None])
            changes, residuals = np.where(lost, np.inf, changes), np.where(lost, np.inf, residuals)
        if not finite.all():
            changes, residuals = np.where(finite, changes, np.inf), np.where(finite, residuals, np.inf)
        self.moves, self.residuals = np.where(self.inside, changes, 0.0), np.where(self.inside, residuals, 0.0)

    # -- move -----------------------------------------------------------------------------------------------------

    def move(self, count: Indices, error: Array, entry: str) -> None:
        """Accept the first ``count`` states of every window, and move it behind them.

        Args:
            count: (S,) at least 1, but 0 for empty windows.
            error: (S,) what accepting them adds to the error of the sample.
            entry: How states enter the window: ``extrapolate`` or ``copy``.
        """
        lo, hi, width, W, steps = self.lo, self.hi, self.width, self.W, self.problem.steps
        ended = lo + count
        entering = np.where(width > 0, np.minimum(ended + W, steps) - hi, 0)
        reached = np.where(self.overflowed > 0, self.overflowed, width)  # the last state to go on from
        self._write_move(count, reached)
        enter = bool(entering.any()) or bool((reached < width).any())
        if enter and self.batch.guess is None:
            self._write_entering(count, reached, entering, entry)
        elif enter and bool((reached < width).any()):
            self._write_entering(count, reached, np.zeros_like(entering), "copy")
        self.error_used = self.error_used + error
        self._shift(count)
        self.reached = self.reached | ((hi == steps) & (width > 0))
        self.last_evaluated = np.where(width > 0, hi - 1, self.last_evaluated)
        self.lo = ended
        self.rounds = self.rounds + (width > 0)
        self.frame()
        self.write_frame()
        self.pack.send()
        self._frame_sent = True
        self.move_tensors(enter=enter and (self.batch.guess is None or bool((reached < width).any())))
        if bool(count.any()):
            self.batch.accept(self.places, count, self.view("moved")[:, 1:], self.error_used)
        if enter and self.batch.guess is not None:
            self._load_guess(entering)
        for row in np.flatnonzero((self.lo == steps) & (width > 0)):
            place = int(self.places[row])
            self.batch.finished[place] = True
            self.batch.results[place] = self.x[row, 0].clone()

    def _write_move(self, count: Indices, reached: Indices) -> None:
        """Write down where every row of the next window comes from."""
        indices, W, lags = self.pack.indices, self.W, self.lags
        row, offset = np.arange(len(self.places))[:, None], np.arange(W + 1)
        nothing = len(self.places)
        source = count[:, None] + offset
        here = row * (W + 1) + source
        indices["shift"][:] = np.where(source <= reached[:, None], here, nothing * (W + 1)).reshape(-1)
        if self.measures_pairs:
            # States and outputs of steps that stay; interpolated outputs are no measurement.
            stays = (source[:, :W] < self.width[:, None]) & ~self.coarse[:, None]
            indices["before_x"][:] = np.where(stays, here[:, :W], nothing * (W + 1)).reshape(-1)
            place = row * (lags + W) + lags + source[:, :W]
            indices["before_f"][:] = np.where(stays, place, nothing * (lags + W)).reshape(-1)
        if lags:
            indices["history"][:] = (row * (lags + W) + count[:, None] + np.arange(lags)).reshape(-1)

    def _write_entering(self, count: Indices, reached: Indices, entering: Indices, entry: str) -> None:
        """Write down the states that enter as combinations of the tail; see :mod:`.extrapolation`."""
        numbers, indices, W, lags = self.pack.numbers, self.pack.indices, self.W, self.lags
        tables, local, row = self.tables, self.problem.coefficients, np.arange(len(self.places))
        overflowed = reached < self.width
        lost = np.where(overflowed, self.width - reached, 0)  # states of the window that are copies of the last good one
        new, origin = entering + lost, self.lo + reached
        most = int(new.max())
        tail = numbers["enter"].shape[2]
        if entry == "copy":
            factors = extrapolation.copied(tables, origin, most, tail)
        elif local.stochastic or local.alpha is None:
            factors = extrapolation.frozen(tables, origin, most, tail)
        else:
            factors = extrapolation.line(tables, self.lo, origin, W, most, tail)
        if overflowed.any():
            factors = np.where(overflowed[:, None, None], extrapolation.copied(tables, origin, most, tail), factors)
        enter = numbers["enter"]
        enter[:] = 0.0
        place = (reached - count + 1)[:, None] + np.arange(most)
        used = (np.arange(most) < new[:, None]) & (place <= W)
        sample, at = np.nonzero(used)
        enter[sample, place[used]] = factors[sample, at]
        last = np.maximum(reached - 1, 0)
        indices["tail_moved"][:] = (row[:, None] * (W + 1) + np.stack([reached, last], 1)).reshape(-1)
        early = np.maximum(0, last - W // 2)
        indices["tail_f"][:] = row * (lags + W) + lags + early
        if lags:
            history = row[:, None] * (lags + W) + last[:, None] + np.arange(lags)
            history[overflowed] = len(row) * (lags + W)
            indices["tail_history"][:] = history.reshape(-1)
        if self.batch.recurrence.noise is not None:
            steps = self.lo[:, None] + last[:, None] + np.arange(W + 1)
            steps = np.minimum(steps, self.problem.steps - 1) + self.places[:, None] * self.problem.steps
            indices["tail_noise"][:] = steps.reshape(-1)

    def _shift(self, count: Indices) -> None:
        """Shift what is known of states and steps with the windows."""
        W = self.W
        seen = np.where(self.coarse, self.lo, self.hi)
        self.evaluated_until = np.where(self.width > 0, seen, self.evaluated_until)

        def shifted(values: Array) -> Array:
            padded = np.concatenate([values, np.full((len(values), W + 1), np.nan)], 1)
            index = count[:, None] + np.arange(values.shape[1])
            return np.take_along_axis(padded, index, 1)

        self.slope_errors, self.last_moves, self.slopes = map(shifted, (self.slope_errors, self.last_moves, self.slopes))

    def move_tensors(self, *, enter: bool) -> None:
        """Put the corrected states, the shift and the entering states in place."""
        W, lags, sent, tensors = self.W, self.lags, self.pack.tensors, self.tensors
        self.correct_tensors()
        x, f, moved = self.x, self.f, self.view("moved")
        if self.measures_pairs:
            torch.index_select(tensors["x"], 0, sent["before_x"], out=tensors["dx"][:-1])
            torch.index_select(tensors["f"], 0, sent["before_f"], out=tensors["df"][:-1])
        parts = []
        if enter:
            count, dim = len(self.places), x.shape[2]
            parts = [
                tensors["moved"].index_select(0, sent["tail_moved"]).view(count, 2, dim),
                tensors["last_x"][:-1, None],
                tensors["last_f"][:-1, None],
                tensors["f"].index_select(0, sent["tail_f"])[:, None],
            ]
        if lags:
            # What was evaluated at an earlier guess, moved along its slope to the accepted state.
            f[:, lags:].addcmul_(moved[:, :W] - x[:, :W], sent["slopes"])
            if enter:
                parts.append(tensors["f"].index_select(0, sent["tail_history"]).view(count, lags, dim))
            f[:, :lags] = tensors["f"].index_select(0, sent["history"]).view(len(f), lags, -1)
        torch.index_select(tensors["moved"], 0, sent["shift"], out=tensors["x"][:-1])
        if enter:
            noise = self.batch.noise
            if noise is not None:
                parts.append(noise.view(-1, dim).index_select(0, sent["tail_noise"]).view(count, W + 1, dim))
            x.baddbmm_(sent["enter"], torch.cat(parts, 1))

    def correct_tensors(self) -> None:
        """Turn the steps into the corrected states: new = step + M r, chunk by chunk."""
        lags, sent = self.lags, self.pack.tensors
        step, r = self.view("moved")[:, 1:], self.view("r")
        if self.overflowed.any():
            r.nan_to_num_(0.0, 0.0, 0.0)
        for i, rows in enumerate(correction.rows_of(self.chunks)):
            part = step[:, rows]
            carried = torch.bmm(sent[f"chunk{i}"], r[:, max(rows.start - lags - 1, 0) if rows.start else 0 : rows.stop])
            part += carried
            if rows.stop < self.W:
                # What the next chunk starts from: the whole change of the states before it.
                r[:, rows.stop - lags - 1 : rows.stop] += carried[:, -lags - 1 :]

    def _load_guess(self, entering: Indices) -> None:
        """Fill the states that enter from the given trajectories."""
        guess, offset = self.batch.guess, np.arange(self.W + 1)
        assert guess is not None
        state = self.lo[:, None] + offset
        new = (state > (self.hi - entering)[:, None]) & (state <= self.hi[:, None])
        sample, at = np.nonzero(new)
        into = torch.from_numpy(sample * (self.W + 1) + at).to(guess.device)
        source = torch.from_numpy(self.places[sample] * guess.shape[1] + state[new]).to(guess.device)
        rows = guess.view(-1, guess.shape[2]).index_select(0, source)
        self.tensors["x"].index_copy_(0, into, rows)

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
            return self.x[row, steps - self.lo[row]]
        u, f, step = self.tensors["last_x"][row], self.tensors["last_f"][row], int(self.last_evaluated[row])
        if self.tables.predicts:
            return self.tables.p[step] * u + self.tables.q[step] * f
        if local.lags:
            return u
        noise = self.batch.noise
        one = Recurrence(local, u[None], None if noise is None else noise[place][None])
        return one.coarse_step(step, steps, u[None], f[None])[0]
