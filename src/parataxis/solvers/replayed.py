"""Windows over somebody's loop that has no recurrence: one pass of the loop says which trajectory follows.

Measuring and deciding are as in :mod:`.window`. What differs is that residuals are not known: the loop itself answers,
for all samples at once, which states follow from the outputs and their slopes, and how far it came out from the guess
takes the place of the residuals.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, read, upload
from .tensors import WindowTensors
from .window import Measured, Window

__all__ = ["ReplayedTensors", "ReplayedWindow", "Replays"]

NO_EFFECT = 1e-5  # weight of an output in the next state, relative to the largest, below which it has none


class Replays(Protocol):
    """A recurrence with ``replays = True``.

    Attributes:
        unexplained: (N,) what part of a change of each state is not what its coefficients make of the one before.
    """

    unexplained: Array | None

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes with which outputs move; the last of a sample holds for all later steps."""
        ...

    def run_pass(self, first: int, last: int) -> None:
        """Run one pass of the loop that reaches state ``last``; states before ``first`` are not wanted."""
        ...

    def states(self, sample: int, first: int, last: int) -> Tensor:
        """Return (n, dim) the states first .. last of a sample in the last pass."""
        ...


class ReplayedTensors(WindowTensors):
    """Tensors of windows whose corrected states are put in place by a pass of the loop."""

    def measure_residuals(self) -> None:
        """Do nothing: residuals are not known."""

    def correct(self) -> None:
        """Do nothing: the corrected states are there."""


class ReplayedWindow(Window):
    """Windows whose trajectory follows by a pass of the loop."""

    tensors_type: type[WindowTensors] = ReplayedTensors

    def correct(self, slopes: Array, measured: Measured | None = None) -> None:
        """Run one pass of the loop with these slopes; the norms are those of what it gives."""
        super().correct(slopes, None)
        slopes = np.where(self.inside, slopes, 0.0)
        loop, moved, before = self._loop, self.tensors.step, self.tensors.targets
        present = np.flatnonzero(self.width)
        last = min(int(self.hi.max()) + int(self.width.max()), self.problem.steps)
        loop.run_pass(int(self.lo[present].min()), last)
        for row in present:
            states = loop.states(int(self.places[row]), int(self.lo[row]) + 1, int(self.hi[row]))
            moved[row, : self.width[row]] = states.to(moved)
        inside = upload(self.inside, moved.device)
        change = torch.where(inside[..., None], moved - before, 0)
        # What the steps' own growth does not carry on stands for the residual.
        growth = upload(self.growth(slopes), change)
        remainder = change.clone()
        remainder[:, 1:] -= growth[:, 1:, None] * change[:, :-1]
        changes, residuals = read(torch.stack([change.square().sum(2), remainder.square().sum(2)])).reshape(
            2, *growth.shape
        )
        changes, residuals = np.sqrt(changes), np.sqrt(residuals)
        if loop.unexplained is not None:
            # A loop that is no scalar recurrence may make more of a change than its coefficients say.
            unexplained = np.append(loop.unexplained, 0.0)[np.minimum(self.steps, len(loop.unexplained))]
            residuals = np.maximum(residuals, unexplained * changes)
        # An output that does not enter the next state enters a later one, with what its slope missed.
        delayed = np.abs(self.b_sum) <= NO_EFFECT * np.abs(self.b_sum).max(1, keepdims=True)
        residuals[:, :-1] = np.where(
            delayed[:, :-1], np.maximum(residuals[:, :-1], residuals[:, 1:]), residuals[:, :-1]
        )
        self.take_norms(changes, residuals, None if measured is None else measured.finite)

    @property
    def _loop(self) -> Replays:
        loop: Replays = self.batch.recurrence  # type: ignore[assignment]
        return loop

    def move(self, count: Indices, entry: str) -> None:
        """Accept states and move; entering states come from a pass with the last output of each window frozen."""
        lo, hi, width, frozen = self.lo, self.hi, self.width, self.tables.frozen
        entering = np.where(width > 0, np.minimum(lo + count + self.W, self.problem.steps) - hi, 0)
        super().move(count, entry)
        if entry == "copy" or self.batch.guess is not None or not entering.any():
            return
        rows = np.flatnonzero(entering > 0)
        self._loop.note_slopes(
            self.places[rows], hi[rows] - 1, np.ones(len(rows), np.int64), frozen[hi[rows] - 1][:, None]
        )
        self._loop.run_pass(int(hi[rows].min()), int((hi + entering)[rows].max()))
        x, self.entered = self.tensors.x, None
        for row in rows:
            states = self._loop.states(int(self.places[row]), int(hi[row]) + 1, int(hi[row] + entering[row]))
            first = int(hi[row] - self.lo[row]) + 1
            x[row, first : first + len(states)] = states.to(x)
