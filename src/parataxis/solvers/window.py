r"""A batch of sliding windows: S samples side by side, W steps of each. Measure, decide, move.

The window of a sample reaches over its states lo .. hi, of which lo is accepted. A round is

1. *evaluate*: the states lo .. hi - 1 go through the network, all samples in one :class:`~.base.Query`;
2. *measure*: the steps, the residuals r_i = step_i(U) - u_{i+1}, their Gram matrix and the few inner products that a
   solver wants, read from the device once;
3. *decide*: numpy on (S, W) and (S, W, W) arrays in float64: see :mod:`.windowed`;
4. *move*: corrected states, the shift of every window and the states that enter it, after one upload.

Arrays have entries for W steps of every sample. Windows are shorter than W near the end of the loop, and empty where a
place is free or its sample has ended: entries beyond a window are harmless zeros.

A window is made in layers, each in a file of its own: where the windows stand (:mod:`.frame`), which samples sit in
them (:mod:`.seats`), what a round asks for and measures (:mod:`.measuring`), and here what follows from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..arrays import Array, Indices, upload
from ..checks import is_int
from . import correction
from .frame import Flags
from .instructions import write_entering, write_frame, write_shift
from .measuring import Measured, Measuring

__all__ = ["Measured", "Window", "check_window"]


def check_window(window: int | None) -> None:
    """Raise unless ``window`` is None or a whole number of at least 1."""
    if window is not None and not is_int(window):
        raise ValueError(f"window must be a whole number of steps, at least 1, or None for all, got {window!r}.")


class Window(Measuring):
    """The windows of S samples; see the module, and the layers for what else a window holds.

    Attributes:
        moves, residuals: (S, W) norms of the corrections and of the residuals of this round.
    """

    always_enters = False  # whether the factors of entering states are written in every round

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
        if self.batch.residuals is not None:
            self.batch.note_residuals(self.places, self.lo, self.width, self.residuals)
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
        self.evaluated_until = until if self.uniform else np.where(present, until, self.evaluated_until)
        self.reached = self.reached | ((hi == steps) & present)
        self.last_evaluated = hi - 1 if self.uniform else np.where(present, hi - 1, self.last_evaluated)
        self.lo = ended
        self.rounds = self.rounds + present
        self.look()
        write_frame(self)
        self.carry_out(count, enter=enter)
        self.frame_sent = True
        self.batch.accept(self.places, count, None, self.errors.used)
        if guessed and entering.any():
            self._load_guess(entering)
        for row in np.flatnonzero((ended == steps) & present):
            place = int(self.places[row])
            self.batch.finished[place] = True
            self.batch.results[place] = self.tensors.x[row, 0].clone()

    def carry_out(self, count: Indices, *, enter: bool) -> None:
        """Send what has been written, and correct and move the tensors."""
        self.pack.send()
        self.tensors.correct()
        self.batch.keep(self.places, count, self.tensors.step)
        self.entered = self.tensors.move(enter=enter)

    def _load_guess(self, entering: Indices) -> None:
        """Fill the states that enter from the given trajectories."""
        guess, self.entered = self.batch.guess, None
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
        values = self.batch.recurrence_of(place, u)
        return values.coarse_step(step, steps, u[None], f[None])[0]

    # -- stop and resume -------------------------------------------------------------------------------------------

    def state(self, place: int) -> dict[str, Any]:
        """Return all that is known of a sample between two rounds."""
        row = self.row_of_place[place]
        return {**self.states(row), **self.errors.states(row), **self.tensors.state(row)}

    def load(self, place: int, state: dict[str, Tensor]) -> None:
        """Take such a state."""
        row = self.row_of_place[place]
        self.load_states(row, state)
        self.errors.load_states(row, state)
        self.tensors.load(row, state)
        self.entered = None
