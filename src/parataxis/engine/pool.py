"""Samples that come and go, with one memory for as many as are there at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..samplers.recurrence import Recurrence
from .rows import EvalBatch
from .run import Run, answer_shares, evaluation, shares_of

__all__ = ["Pool"]


class Pool:
    """Runs of one equation that come and go.

    Samples whose solver follows each of them on its own share one group and its memory. Others, whose schedule is the
    same for all samples that began together, get a group each.

    Args:
        begin: Starts the first run for the one sample of a recurrence, as :func:`parataxis.start` does.
        rows: Most rows of a round; there are never more runs, as each asks for one at least.

    Attributes:
        runs: Those that have not ended, the oldest first.
    """

    def __init__(self, begin: Callable[[Recurrence], Run], rows: int) -> None:
        self.runs: list[Run] = []
        self._begin, self._rows = begin, rows
        self._free: list[int] = []
        self._slots = 0
        self._first: Run | None = None

    def add(self, number: int, recurrence: Recurrence, generator: torch.Generator | None = None) -> Run:
        """Start a run for the one sample of a recurrence; ``generator`` seeds its random stream if the solver draws."""
        slot = self._free.pop() if self._free else self._slots
        self._slots = max(self._slots, slot + 1)
        first, recurrence = self._first, recurrence.stored()  # samples that come and go share one block of noise
        if first is None or not first.shares_memory:
            run = self._begin(recurrence)
            run.begin_stream(number, slot, generator)
            self._first = first or run
        else:
            run = first.join(number, slot, recurrence, generator, room=self._rows)
        self.runs.append(run)
        return run

    def rounds(self, evaluate: Callable[[EvalBatch], Tensor], next_job: Callable[[], bool]) -> Iterator[list[Run]]:
        """Drive the runs: one call of ``evaluate`` a round, with all its rows as long as there is so much to do.

        The oldest runs are served first. What does not fit of a run's query waits for the next round; where there is
        room, ``next_job`` is asked to :meth:`add` another run.

        Args:
            evaluate: The network.
            next_job: Adds a run, or returns that there is none left.

        Yields:
            After each round the runs that have ended.
        """
        more = True
        while True:
            ended = [run for run in self.runs if run.done]
            self.runs = [run for run in self.runs if not run.done]
            yield ended
            self._free += [run.slot for run in ended]
            room = self._rows - _waiting(self.runs)
            while more and room > 0:
                before = len(self.runs)
                more = next_job()
                room -= _waiting(self.runs[before:])
            if not self.runs:
                return
            shares = shares_of(self.runs, self._rows)
            answer_shares(shares, evaluate(evaluation(shares)))


def _waiting(runs: list[Run]) -> int:
    """Return how many rows are left of the pending queries of runs."""
    return sum(count for share in shares_of(runs) for _, count, _ in share.parts)
