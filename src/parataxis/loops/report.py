"""What was done for a call of a loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..engine.latency import format_seconds
from ..html import figures

__all__ = ["ABOVE_FLOOR", "Report"]

ABOVE_FLOOR = "the rounding of outputs alone moves the result by more than the tolerance (the floor)."
SLOWER = 0.9  # speed-up below which a call counts as slower: timings are not better than a tenth


@dataclass
class Report:
    """What was done for the latest call of a loop; filled in by each call.

    Attributes:
        seconds: How long the call took, with everything that it did besides the loop.
        sequential_seconds: How long the unmodified loop takes: measured where it ran in this call, an earlier one or
            :func:`parataxis.plan`, else estimated from the median of a few single network calls and from the
            loop's own Python. 0 while it is not known.
        estimated: Whether ``sequential_seconds`` is an estimate.
        mode: ``one pass`` (the loop ran once, with outputs that were solved ahead of it by its scheduler's recurrence),
            ``recurrence`` (the loop's recurrence was solved), ``replay`` (the loop's Python answered every round),
            ``sequential`` (the unmodified loop), or ``none`` before the first call.
        reason: Why so.
        steps: N, over all stages.
        samples: Samples of the loop's batch.
        rounds: Rounds of network calls that waited for one another.
        evaluations: Steps evaluated, over all samples.
        calls: Network calls, with those for the form of outputs, the checks of batching and the floor.
        rows: Rows of these calls.
        peak_width: Most steps of one sample in a round.
        peak_rows: Most rows of one call.
        passes: Runs of the loop's Python.
        real_calls: In one pass, the calls of the loop that were evaluated for themselves.
        misses: In one pass, how often the loop went another way than expected, and the rest was solved again.
        error_estimate: Estimated relative error of the result to the sequential loop's, with a margin; at least the
            floor, where that is above the tolerance.
        floor: Relative change of the loop's result when every output changes by its rounding: a unit in its last place,
            and what the network makes of one in the last place of its input.
        tolerance: Relative error allowed.
        converged: Whether the error estimate is within the tolerance: a floor above it is no excuse.
    """

    seconds: float = 0.0
    sequential_seconds: float = 0.0
    estimated: bool = False
    mode: str = "none"
    reason: str = "not run yet"
    steps: int = 0
    samples: int = 0
    rounds: int = 0
    evaluations: int = 0
    calls: int = 0
    rows: int = 0
    peak_width: int = 0
    peak_rows: int = 0
    passes: int = 0
    real_calls: int = 0
    misses: int = 0
    error_estimate: float = 0.0
    floor: float = 0.0
    tolerance: float = 0.0
    converged: bool = False

    @property
    def speedup(self) -> float:
        """``sequential_seconds`` over ``seconds``; NaN while one of them is not known."""
        known = self.seconds > 0 and self.sequential_seconds > 0
        return self.sequential_seconds / self.seconds if known else math.nan

    def slower(self) -> str | None:
        """Return what to do if the call was slower than the loop, else None."""
        if not self.speedup < SLOWER:  # NaN is not
            return None
        return (
            f"running in parallel was slower: the call took {format_seconds(self.seconds)}, the unmodified loop takes "
            f"{'about ' if self.estimated else ''}{format_seconds(self.sequential_seconds)}. Pass solver='auto', which "
            "keeps the unmodified loop where that is faster, or print parataxis.plan(loop, ...) to see what would pay. "
            "This is said once."
        )

    def reset(self, tolerance: float) -> None:
        """Begin a new call."""
        for field in fields(self):
            setattr(self, field.name, field.default)
        self.tolerance = tolerance

    def _passes(self) -> str:
        """Return how the loop's own Python was run."""
        if self.mode != "one pass":
            return f", {self.passes} passes"
        return f", {self.misses} misses" if self.misses else ""

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        rows = [("why", self.reason)] if self.reason else []
        if math.isfinite(self.speedup):
            about = "about " if self.estimated else ""
            rows = [
                (
                    "seconds",
                    f"{format_seconds(self.seconds)}; the loop: {about}{format_seconds(self.sequential_seconds)}",
                ),
                ("times as fast as the loop", _times(self.speedup)),
                *rows,
            ]
        if self.mode not in ("none", "sequential"):
            rows += [
                ("rounds", f"{self.rounds} for {self.steps} steps"),
                ("evaluations a step", f"{self.evaluations / max(self.steps * self.samples, 1):.2f}"),
                ("network calls", f"{self.calls} of up to {self.peak_rows} rows"),
                (
                    "error estimate",
                    f"{self.error_estimate:.1e} ({self._bounds()})",
                ),
                ("converged", "yes" if self.converged else "NO"),
            ]
        return figures(f"{self.mode}, {self.samples} samples" if self.samples else self.mode, rows)

    def __str__(self) -> str:
        """Return one readable line, seconds first."""
        if self.mode in ("none", "sequential"):
            seconds = f"{format_seconds(self.seconds)}, " if self.seconds else ""
            return f"{seconds}{self.mode}: {self.reason}"
        nfe_ratio = self.evaluations / max(self.steps * self.samples, 1)
        return (
            f"{self._timing()}{self.mode}: {self.steps} steps in {self.rounds} rounds ({nfe_ratio:.2f} evaluations a "
            f"step, {self.calls} network calls of up to {self.peak_rows} rows{self._passes()}); error estimate "
            f"{self.error_estimate:.1e} ({self._bounds()})"
            + ("" if self.converged else "; NOT CONVERGED")
            + (f"; {self.reason}" if self.reason else "")
        )

    def _bounds(self) -> str:
        """Return what the error estimate is compared with."""
        return f"tolerance {self.tolerance:.1e}" + (f", floor {self.floor:.1e}" if self.floor else "")

    def _timing(self) -> str:
        if math.isnan(self.speedup):
            return ""
        about = "about " if self.estimated else ""
        return (
            f"{format_seconds(self.seconds)}, {_times(self.speedup)} times as fast as the loop "
            f"({about}{format_seconds(self.sequential_seconds)}); "
        )


def _times(ratio: float) -> str:
    """Return a speed-up with two figures, 1.0 and not 1."""
    return f"{ratio:.1f}" if 0.95 <= ratio < 9.95 else f"{ratio:.2g}"
