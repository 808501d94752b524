"""A recorded loop as a recurrence: solved by its coefficients, or by passes of its Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Answering, Read, upload
from ..samplers.coefficients import Coefficients
from ..samplers.recurrence import Part, Recurrence, Steps
from .known_outputs import KnownOutputs
from .passes import StageRecord
from .record import StageProgress

__all__ = ["RecordedRecurrence", "ReplayedRecurrence"]

Array = NDArray[np.float64]


def _note(known: KnownOutputs, parts: Sequence[Part]) -> bool:
    """Keep the slopes of Responses; return whether any is new, or there is a new evaluation to respond to."""
    changed = False
    for sample, _, ask in parts:
        samples = slice(None) if known.structure.joint_samples else slice(sample, sample + 1)
        assert ask.slopes is not None
        count = len(ask.outputs)
        inside, behind = ask.slopes[:count], ask.slopes[min(count, len(ask.slopes) - 1)]
        before = known.slopes[ask.start : ask.start + len(inside), samples]
        same = (before == inside[:, None]).all() and (known.extrapolation_slope[samples] == behind).all()
        changed |= ask.measure or not bool(same)
        before[:] = inside[:, None]
        known.extrapolation_slope[samples] = behind
    return changed


@dataclass(frozen=True, eq=False)
class RecordedRecurrence(Recurrence):
    """The loop's recurrence; a correction leaves its slopes with the evaluations, for the replay."""

    known: KnownOutputs | None = None

    @classmethod
    def of(cls, progress: StageProgress) -> RecordedRecurrence:
        """Return the recurrence of a stage."""
        as_runs = progress.structure.as_runs
        noise = torch.stack([as_runs(term) for term in progress.noise_terms], 1)
        return cls(progress.structure.coefficients, as_runs(progress.start), noise, progress.known)

    def respond(
        self, rows: Tensor, parts: Sequence[Part], steps: Steps | None = None
    ) -> Answering[list[Array | None] | Read]:
        """Answer from the recurrence."""
        assert self.known is not None
        _note(self.known, parts)
        return (yield from super().respond(rows, parts, steps))


@dataclass(frozen=True, eq=False)
class ReplayedRecurrence(Recurrence):
    """A loop without a recurrence: one pass of its Python says which trajectory follows."""

    progress: StageProgress | None = None
    run: Callable[[int], StageRecord] | None = None

    @classmethod
    def of(cls, progress: StageProgress, run: Callable[[int], StageRecord]) -> ReplayedRecurrence:
        """Return the recurrence of a stage; ``run(last)`` makes a pass up to step ``last`` and returns its record."""
        coefficients = progress.structure.coefficients
        # The coefficients only turn slopes into growth and back.
        coefficients = Coefficients(
            coefficients.state_weight,
            coefficients.output_weight.sum(1, keepdims=True),
            np.zeros(coefficients.steps),
        )
        return cls(coefficients, progress.structure.as_runs(progress.start), None, progress, run)

    def run_pass(self, last: int) -> None:
        """Make one pass of the loop for all runs, up to step ``last``."""
        assert self.progress is not None
        assert self.run is not None
        self.progress.record = self.run(last)

    def states(self, run: int, first: int, last: int) -> Tensor:
        """Return (n, dim) the states first .. last of a run in the latest pass."""
        assert self.progress is not None
        return torch.stack([self.progress.record.state_of_run(step, run) for step in range(first, last + 1)]).flatten(1)

    def steps(self, rows: Tensor, parts: Sequence[Part]) -> Answering[Steps | None]:
        """Return None: nothing of a pass is known before the slopes are."""
        yield []
        return None

    def respond(
        self, rows: Tensor, parts: Sequence[Part], steps: Steps | None = None
    ) -> Answering[list[Array | None] | Read]:
        """Answer by one pass of the loop for all runs, which goes on as far as windows may reach next."""
        yield []
        progress = self.progress
        assert progress is not None
        asks = [part.response for part in parts]
        if any(ask.order is not None for ask in asks):
            raise ValueError(
                "this solver asks for truncated responses, and a replayed loop has none: choose Secant or Picard."
            )
        last = max(ask.first + len(ask.into) - 1 for ask in asks)
        record = progress.record
        if _note(progress.known, parts) or last > len(record.inputs) - (record.final is None):
            ahead = max(len(ask.outputs) for ask in asks)
            self.run_pass(min(last + ahead, self.coefficients.steps))
        answers: list[Array | None] = []
        for sample, offset, ask in parts:
            new = self.states(sample, ask.first, ask.first + len(ask.into) - 1).to(rows)
            norms = None
            if ask.measure:
                assert ask.slopes is not None
                change = new - rows[upload(offset + ask.states[1:], rows.device)]
                # What the steps' own growth does not carry on stands for the residual.
                growth = upload(self.coefficients.growth(ask.slopes[: len(change)], ask.start), change)
                rest = change.clone()
                rest[1:] -= growth[1:, None] * change[:-1]
                norms = torch.stack([change.square().sum(1), rest.square().sum(1)], 1).double().cpu().numpy()
            rows[upload(offset + ask.into, rows.device)] = new
            answers.append(norms)
        return answers
