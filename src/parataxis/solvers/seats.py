"""Which samples sit in the rows of a batch of windows: begun, taken out, put back, added and dropped."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..arrays import Indices, upload
from .batch import Batch
from .error_record import ErrorRecord
from .frame import Frame
from .tensors import WindowTensors

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Seats"]


class Seats(Frame):
    """The tensors of S windows, and what is known of their errors, by sample.

    Args:
        batch: The samples.
        width: W; None for N.
        history: Rounds of corrections that an accelerated method combines; 1 for none.
        order: Terms kept of the correction (I - K)^{-1}; None for all.

    Attributes:
        tensors: States and outputs, on the device.
        errors: What is known of their errors.
        slopes: (S, W) of the last round, or NaN.
        entered: (W, dim) a copy of the inputs of a single sample, for the network; None if there is none.
    """

    tensors_type: type[WindowTensors] = WindowTensors

    def __init__(self, batch: Batch, width: int | None, *, history: int = 1, order: int | None = None) -> None:
        super().__init__(batch, width)
        batch.hold_noise(2 * self.W + 1)  # a round looks back one step, and its window may move by its length
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
            # Four outputs say whether bends last; nothing enters a window over the whole loop.
            bends=self.tables.extrapolates == "line" and 4 <= self.W < self.problem.steps,
        )
        self.seat(np.arange(len(batch)), tensors)
        self.reset(self.rows)

    def seat(self, places: Indices, tensors: WindowTensors) -> None:
        """Begin anew with the samples at these places."""
        self.seat_frame(places)
        self.tensors, self.pack = tensors, tensors.pack
        self.errors = ErrorRecord(self)
        self.slopes = self.errors.slopes
        # Where the rows of each sample begin: of its noise; in the block its states, its outputs and its steps.
        self.first_noise = (places * (self.problem.steps if self.batch.held is None else self.batch.held.steps))[
            :, None
        ]
        first, W = tensors.first, self.W
        self.row_x = first["x"] + self.rows[:, None] * (W + 1)
        self.row_f = first["f"] + self.rows[:, None] * (self.lags + W) + self.lags
        self.row_step = first["step"] + self.rows[:, None] * W
        self.row_before = np.stack([self.row_x, self.row_f])
        self.first_x, self.first_f = self.row_x[:, 0], self.row_f[:, 0]
        self.rows_of_all = np.repeat(places, self.W)
        self.entered: Tensor | None = None
        self.frame_sent = self.ends_are_uniform = self.tail_is_uniform = False

    def take(self, rows: Indices) -> Self:
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

    def put(self, rows: Indices, part: Self) -> None:
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
        self.frame_sent, self.entered = False, None

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
