"""A recorded loop as a recurrence: solved by its coefficients, or by passes of its Python."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices
from ..samplers.coefficients import Coefficients
from ..samplers.recurrence import Recurrence
from .known_outputs import KnownOutputs
from .passes import StageRecord
from .record import StageProgress

__all__ = ["RecordedRecurrence", "ReplayedRecurrence"]

MAX_UNEXPLAINED = 0.9  # part of the change of a state that the coefficients of its step may leave unexplained
UNMEASURED_SHARE = 0.5  # that, where it was not measured: a loop that is linear elsewhere only


@dataclass(frozen=True, eq=False)
class RecordedRecurrence(Recurrence):
    """The loop's recurrence; a correction leaves its slopes with the evaluations, for the replay."""

    known: KnownOutputs | None = None

    @classmethod
    def of(cls, progress: StageProgress) -> RecordedRecurrence:
        """Return the recurrence of a stage."""
        as_runs = progress.structure.as_runs
        noise = progress.record.spool.stack([as_runs(term) for term in progress.noise_terms], 1)
        return cls(progress.structure.coefficients, as_runs(progress.start), noise, progress.known)

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes for the replay."""
        assert self.known is not None
        self.known.set_slopes(sample, first, counts, slopes)


@dataclass(frozen=True, eq=False)
class ReplayedRecurrence(Recurrence):
    """A loop without a recurrence: one pass of its Python says which trajectory follows.

    Attributes:
        unexplained: (N,) what part of a change of each state the coefficients do not explain.
    """

    replays = True
    unexplained: Array | None = None
    progress: StageProgress | None = None
    run: weakref.ref[Callable[[int, int], StageRecord]] | None = None

    @classmethod
    def of(cls, progress: StageProgress, run: Callable[[int, int], StageRecord]) -> ReplayedRecurrence:
        """Return the recurrence of a stage.

        Args:
            progress: Of the stage.
            run: A method that makes a pass up to a step, and returns its record of the steps from another one on; held
                weakly, because what it belongs to holds every tensor of the loop, and runs may live on until the
                garbage collector comes.
        """
        structure = progress.structure
        unexplained = np.full(structure.steps, 0.0 if structure.linear else UNMEASURED_SHARE)
        if structure.unexplained is not None:
            unexplained[: len(structure.unexplained)] = structure.unexplained
        # The coefficients only turn slopes into growth and back. Where they explain nothing (a state that is rolled), a
        # slope stands for the growth: divided by them it would be arbitrarily large.
        explains = unexplained <= MAX_UNEXPLAINED
        coefficients = Coefficients(
            np.where(explains, structure.coefficients.state_weight, 0.0),
            np.where(explains, structure.coefficients.output_weight.sum(1), 1.0)[:, None],
            np.zeros(structure.steps),
        )
        start = structure.as_runs(progress.start)
        return cls(coefficients, start, None, unexplained, progress, weakref.WeakMethod(run))

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes for the next pass."""
        assert self.progress is not None
        self.progress.known.set_slopes(sample, first, counts, slopes)

    def run_pass(self, first: int, last: int) -> None:
        """Make one pass of the loop for all runs, up to step ``last``; states from ``first`` on are wanted."""
        assert self.progress is not None
        run = None if self.run is None else self.run()
        assert run is not None
        self.progress.record = run(first, last)

    def states(self, sample: int, first: int, last: int) -> Tensor:
        """Return (n, dim) the states first .. last of a run in the latest pass."""
        assert self.progress is not None
        record = self.progress.record
        return torch.stack([record.state_of_run(step, sample) for step in range(first, last + 1)]).flatten(1)
