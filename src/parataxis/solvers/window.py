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

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, read, upload
from ..checks import is_int
from ..samplers.recurrence import Recurrence
from . import correction, extrapolation
from .base import Query
from .batch import Batch
from .error_record import ErrorRecord
from .frame import Flags, Frame
from .instructions import write_entering, write_frame, write_shift
from .tensors import WindowTensors

__all__ = ["Measured", "Window", "check_window"]


def check_window(window: int | None) -> None:
    """Raise unless ``window`` is None or a whole number of at least 1."""
    if window is not None and not is_int(window):
        raise ValueError(f"window must be a whole number of steps, at least 1, or None for all, got {window!r}.")


@dataclass(eq=False)
class Measured:
    """What one round has measured, float64 on the host.

    Attributes:
        gram: (S, W, W) inner products of the residuals.
        pairs: (S, W, 2, 2) inner products of (dx, df): moves of input and output since the evaluation before, or from
            the origin for steps that are new; empty for windows of one step.
        finite: (S, W) whether the outputs were finite, or None if all were.
        corrections: (S, W, m, m) inner products of the corrections of the last m rounds, the present one first; empty
            unless the solver combines them.
    """

    gram: Array
    pairs: Array
    finite: Flags | None
    corrections: Array


class Window(Frame):
    """The windows of S samples, with their tensors; see the module.

    Args:
        batch: The samples.
        width: W; None for N.
        history: Rounds of corrections that an accelerated method combines; 1 for none.
        order: Terms kept of the correction (I - K)^{-1}; None for all.

    Attributes:
        tensors: States and outputs, on the device.
        errors: What is known of their errors.
        slopes: (S, W) of the last round, or NaN.
        moves, residuals: (S, W) norms of the corrections and of the residuals of this round.
    """

    tensors_type: type[WindowTensors] = WindowTensors
    always_enters = False  # whether the factors of entering states are written in every round

    def __init__(self, batch: Batch, width: int | None, *, history: int = 1, order: int | None = None) -> None:
        super().__init__(batch, width)
        self.order, self.history = order, history
        self.parts: dict[int, WindowTensors] = {}  # of some of the samples, by their number
        tensors = self.tensors_type(
            batch,
            len(batch),
            self.W,
            self.lags,
            # Errors of a single state are not estimated, and its slopes matter to a replay only.
            keeps_pairs=self.W > 1 or batch.recurrence.replays,
            predicts=self.tables.alpha is not None and self.tables.predicts,
            order=order,
            history=history,
        )
        self.seat(np.arange(len(batch)), tensors)
        self.reset(self.rows)

    # -- places ---------------------------------------------------------------------------------------------------

    def seat(self, places: Indices, tensors: WindowTensors) -> None:
        """Begin anew with the samples at these places."""
        self.seat_frame(places)
        self.tensors, self.pack = tensors, tensors.pack
        self.errors = ErrorRecord(self)
        self.slopes = self.errors.slopes
        self.first_noise = (places * self.problem.steps)[:, None]
        self.rows_of_all = np.repeat(places, self.W)
        self.frame_sent = self.ends_are_uniform = False

    def take(self, rows: Indices) -> Window:
        """Return a window of some of the samples only, a copy."""
        part = copy.copy(self)
        if len(rows) not in self.parts:
            self.parts[len(rows)] = self.tensors.like(len(rows))
        part.seat(self.places[rows], self.parts[len(rows)])
        part.take_states(rows, self)
        part.errors.take_states(rows, self.errors)
        self.tensors.copy_rows(rows, part.tensors)
        part.look()
        return part

    def put(self, rows: Indices, part: Window) -> None:
        """Take back what :meth:`take` has given."""
        self.put_states(rows, part)
        self.errors.put_states(rows, part.errors)
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
            self.parts.clear()
            self.seat(np.arange(len(batch)), self.tensors.like(len(batch)))
            self.put(rows, before)
        self.reset(places)

    def refresh(self) -> None:
        """Look again at which samples are being solved."""
        self.look()
        self.frame_sent = False

    def shrink(self) -> None:
        """Drop samples that have ended, once they are at least half."""
        active = self.batch.active[self.places]
        if self.batch.refilled or not 0 < 2 * np.count_nonzero(active) <= len(active):
            return
        before, rows = copy.copy(self), np.flatnonzero(active)
        self.tensors.keep_rows(rows)
        self.seat(self.places[rows], self.tensors)
        self.take_states(rows, before)
        self.errors.take_states(rows, before.errors)
        self.look()

    def reset(self, rows: Indices) -> None:
        """Fill the windows of new samples: the given guess, or the initial state in the proportion of expected rms."""
        batch, problem, width, device = self.batch, self.problem, self.W, self.batch.start.device
        self.begin(rows)
        self.errors.begin(rows)
        lo = problem.frozen_steps
        self.lo[rows], self.evaluated_until[rows] = lo, lo
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

    # -- evaluate and measure -------------------------------------------------------------------------------------

    def query(self) -> Query:
        """Return the states to be evaluated."""
        widths = np.zeros(len(self.batch), np.int64)
        self.chosen: Indices | None = None  # places of the outputs, if they are not all
        if self.uniform and not self.coarse.any():
            widths[self.places] = self.W
            rows = self.tensors.inputs.clone()  # the network may write into its input
            return Query(rows.view(-1, rows.shape[2]), self.steps.reshape(-1), self.rows_of_all, widths)
        nodes = self.nodes()
        widths[self.places] = nodes.sum(1)
        sample, offset = np.nonzero(nodes)
        self.chosen = sample * (self.lags + self.W) + self.lags + offset
        index = upload(sample * (self.W + 1) + offset, self.batch.start.device)
        return Query(self.tensors.flat["x"].index_select(0, index), self.steps[nodes], self.places[sample], widths)

    def measure(self, outputs: Tensor) -> Measured:
        """Store outputs (R, dim) of the last query, and measure.

        Raises:
            OutputError: If an output is not finite though its input is accepted.
        """
        if self.batch.returns_errors:
            outputs = self._fail_broken(outputs)
        measured = self._measure(outputs, pairs=self.tensors.keeps_pairs)
        finite = np.isfinite(measured["largest"][: len(outputs)])
        flags, pairs = None, measured["pairs"]
        if not finite.all():
            flags, outputs = self._repair(outputs, finite)
            measured = self._measure(outputs, pairs=False)
        return self.take_measured({**measured, "pairs": pairs}, flags)

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

    def take_measured(self, measured: dict[str, Array], finite: Flags | None) -> Measured:
        """Take what the device has measured."""
        self.errors.note_size(self, measured["sizes"])
        return Measured(measured["gram"], measured["pairs"], finite, measured["corrections"])

    def _measure(self, outputs: Tensor, *, pairs: bool) -> dict[str, Array]:
        self._store(outputs)
        if not self.frame_sent:
            write_frame(self)
            self.pack.send()
            self.frame_sent = True
        self.tensors.measure(outputs, pairs=pairs)
        return self.tensors.split(read(self.tensors.measured))

    def _store(self, outputs: Tensor) -> None:
        """Put the outputs of the last query in their places; between nodes they are interpolated."""
        tensors = self.tensors
        if self.chosen is None:
            tensors.outputs.copy_(outputs.view(tensors.outputs.shape))
            return
        if self.strided:
            tensors.outputs.zero_()  # between nodes something not finite may have been left
        tensors.flat["f"].index_copy_(0, upload(self.chosen, outputs.device), outputs)
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
        nodes = self.nodes()
        sample, offset = np.nonzero(nodes)
        broken = (offset == 0) & ~finite
        if broken.any():
            row = int(sample[np.argmax(broken)])
            raise self.batch.output_error(int(self.places[row]), int(self.lo[row]), int(self.rounds[row]) + 1)
        nearest = np.maximum.accumulate(np.where(finite, np.arange(len(finite)), -1))
        outputs = outputs.index_select(0, upload(nearest, outputs.device))
        flags = np.ones((len(self.places), self.W), bool)
        flags[nodes] = finite
        for row in np.flatnonzero(self.coarse).tolist() if self.strided else ():
            at, inside = np.flatnonzero(nodes[row]), np.arange(self.width[row])
            flags[row, inside] = np.interp(inside, at, flags[row, at]) == 1
        return flags, outputs

    # -- decide ---------------------------------------------------------------------------------------------------

    def gaussian_slopes(self) -> Array:
        """Return d (S, W) of the exact network for Gaussian data of the measured variance; else for a growth of 1."""
        return self.slopes_for_variance(self.errors.variance)

    def correct(self, slopes: Array, measured: Measured | None = None) -> None:
        """Take the slopes of a round: what trajectory follows is now decided, and is put in place by :meth:`move`.

        Args:
            slopes: (S, W) d.
            measured: What the round has measured; None if it is not known yet: :meth:`norms` is then to be called.
        """
        if self.uniform:
            self.slopes[:] = slopes
        else:
            self.slopes[:] = np.where(self.inside, slopes, np.nan)
            slopes = np.where(self.inside, slopes, 0.0)
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
        self.take_norms(*correction.corrected_norms(self.chunks, self.lags, measured.gram), measured.finite)

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
        hi, width, steps, guessed = self.hi, self.width, self.problem.steps, self.batch.guess is not None
        ended, present = self.lo + count, width > 0
        entering = np.minimum(ended + self.W, steps) - hi
        if not self.uniform:
            entering = np.where(present, entering, 0)
        last = np.where(self.overflowed > 0, self.overflowed, width) if self.overflow else width
        self.tensors.overflowed = self.overflow
        write_shift(self, count, last)
        new = np.zeros_like(entering) if guessed else entering
        enter = bool(new.any()) or self.overflow
        if enter or self.always_enters:
            write_entering(self, count, last, new, entry)
        self.errors.shift(self, count)
        until = np.where(self.coarse, self.lo, hi) if self.strided else hi
        self.evaluated_until = np.where(present, until, self.evaluated_until)
        self.reached = self.reached | ((hi == steps) & present)
        self.last_evaluated = np.where(present, hi - 1, self.last_evaluated)
        self.lo = ended
        self.rounds = self.rounds + present
        self.look()
        write_frame(self)
        self.carry_out(enter=enter)
        self.frame_sent = True
        self.batch.accept(self.places, count, self.tensors.step, self.errors.used)
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
