"""What solvers are expected to take, and which of them is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..solvers.base import Solver

__all__ = ["Candidate", "Range", "choose", "expected_seconds"]

TIE = 0.98  # candidates whose seconds differ by less are equally fast
LEAST_GAIN = 0.95  # seconds over the loop's that are worth another solver


class Range(NamedTuple):
    """An estimate, and where eight of ten cases lie."""

    low: float
    median: float
    high: float

    def text(self, form: Callable[[float], str]) -> str:
        """Return the estimate, and in brackets its range where it has one."""
        estimate, low, high = form(self.median), form(self.low), form(self.high)
        return estimate if low == high else f"{estimate} ({low} to {high})"


class Candidate(NamedTuple):
    """What a solver is expected to take.

    Attributes:
        solver: With its window.
        rounds: Of the batch: of its slowest sample.
        seconds: Of the whole solve.
        overhead: Seconds of a round besides the network, measured.
    """

    solver: Solver
    rounds: Range
    seconds: Range
    overhead: float


def choose(candidates: Sequence[Candidate], loop: float) -> Candidate:
    """Return the fastest candidate, or the loop unless one beats it.

    Of those that are as fast, to a fiftieth, it is the narrowest: what timings do not tell apart is decided by the
    number of evaluations, and so decided alike every time.
    """
    best = min(candidate.seconds.median for candidate in candidates[:-1])
    if best >= LEAST_GAIN * loop:
        return candidates[-1]
    fast = [candidate for candidate in candidates[:-1] if candidate.seconds.median <= best / TIE]
    fast = [candidate for candidate in fast if candidate.seconds.median < loop]
    return min(
        fast, key=lambda candidate: (getattr(candidate.solver, "window", None) or math.inf, expected_seconds(candidate))
    )


def expected_seconds(candidate: Candidate) -> float:
    """Return the median of the seconds that a candidate is expected to take."""
    return candidate.seconds.median
