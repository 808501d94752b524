"""What was done for a call of a loop."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Report"]


@dataclass
class Report:
    """What was done for the latest call of a loop; filled in by each call.

    Attributes:
        mode: ``recurrence`` (the loop's recurrence was solved), ``replay`` (the loop's Python answered every round),
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
        error_estimate: Estimated relative error of the result to the sequential loop's, with a margin; at least the
            floor, where that is above the tolerance.
        floor: Relative change of the loop's result when every output changes by its rounding: a unit in its last place,
            and what the network makes of one in the last place of its input.
        tolerance: Relative error allowed.
        converged: Whether the error estimate is within the tolerance, or the floor where that is larger.
    """

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
    error_estimate: float = 0.0
    floor: float = 0.0
    tolerance: float = 0.0
    converged: bool = False

    def reset(self, tolerance: float) -> None:
        """Begin a new call."""
        for field in fields(self):
            setattr(self, field.name, field.default)
        self.tolerance = tolerance

    def __str__(self) -> str:
        """Return one readable line."""
        if self.mode in ("none", "sequential"):
            return f"{self.mode}: {self.reason}"
        nfe_ratio = self.evaluations / max(self.steps * self.samples, 1)
        return (
            f"{self.mode}: {self.steps} steps in {self.rounds} rounds ({nfe_ratio:.2f} evaluations a step, "
            f"{self.calls} network calls of up to {self.peak_rows} rows, {self.passes} passes); error estimate "
            f"{self.error_estimate:.1e} (tolerance {self.tolerance:.1e}, floor {self.floor:.1e})"
            + ("" if self.converged else "; NOT CONVERGED")
            + (f"; {self.reason}" if self.reason else "")
        )
