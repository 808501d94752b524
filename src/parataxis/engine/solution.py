"""What comes out: the solution of one sample, and of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import plots
from ..arrays import Array
from ..html import figures, preformatted
from ..solvers.base import Problem, Solver
from .latency import format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..planning import Plan

__all__ = ["Round", "Solution", "Solutions"]


class Round(NamedTuple):
    """One round of one run: steps accepted before it, its width, and the error accepted so far, inf if unknown."""

    accepted: int
    width: int
    error: float


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """The result of one run.

    Attributes:
        x: (*shape) the sample, or the best guess of it if the run ended early.
        converged: Whether the solver's own test was passed.
        reason: Why the run ended: ``converged``, ``interrupted``, ``stopped:`` with the rule that ended it, ``failed:``
            with the error, where errors are returned, or ``not started``, if it was interrupted before it began.
        rounds: Network calls that waited for one another.
        evaluations: Steps evaluated (NFE).
        steps: N.
        solver: How it was solved.
        problem: What was solved.
        peak_width: Most steps of this sample in one round.
        error_estimate: Estimated relative error of ``x`` to the sequential sample; inf unless converged, as nothing is
            known of the error then. Solvers of :data:`parataxis.EXACT_IN_DISTRIBUTION` say 0: ``x`` has exactly the
            distribution of the sequential loop's samples, but is another sample than the loop's from the same noise.
        history: One entry a round.
        trajectory: (N + 1, *shape) every state, the sample last; only with ``keep_trajectory=True``, if converged, and
            from solvers that accept every state (not parareal).
        residuals: (rounds, N) how far each state was from the step that leads to it, as a norm relative to that of the
            state that is expected there; NaN where a step was not evaluated in a round, inf where it overflowed. Only
            with ``keep_residuals=True``, and from solvers with a window.
    """

    x: Tensor
    converged: bool
    reason: str
    rounds: int
    evaluations: int
    steps: int
    solver: Solver
    problem: Problem
    peak_width: int
    error_estimate: float
    history: tuple[Round, ...]
    trajectory: Tensor | None = None
    residuals: Array | None = None

    @property
    def failed(self) -> bool:
        """Whether an error ended the run: ``reason`` says which, and ``x`` is the last estimate before it."""
        return self.reason.startswith("failed:")

    @property
    def nfe_ratio(self) -> float:
        """Evaluations over N: 1 for the sequential loop."""
        return self.evaluations / self.steps

    def plot(self) -> Figure:
        """Return a figure of how the solve went; see :func:`parataxis.plots.rounds`."""
        return plots.rounds(self)

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        return figures(f"{self.reason}: {tuple(self.x.shape)}", self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        error = "not known" if math.isinf(self.error_estimate) else f"{self.error_estimate:.1e}"
        return [
            ("solver", repr(self.solver)),
            ("rounds", f"{self.rounds} for {self.steps} steps"),
            ("evaluations / N", f"{self.nfe_ratio:.2f}"),
            ("estimated error", f"{error} (tolerance {self.problem.tolerance:g})"),
        ]

    def __repr__(self) -> str:
        """Return one line, without tensors."""
        return (
            f"Solution({tuple(self.x.shape)}, {self.reason}: {self.rounds} rounds for {self.steps} steps, "
            f"{self.nfe_ratio:.2f} evaluations / N, estimated error {self.error_estimate:.1e})"
        )


class Solutions(Sequence[Solution]):
    """The results of a batch, one :class:`Solution` a sample, with the samples stacked in ``x``.

    Attributes:
        rounds: Network calls of the batch that waited for one another.
        seconds: How long the solve took.
        plan: How the solver was chosen, if it was.
    """

    def __init__(
        self, solutions: Sequence[Solution], rounds: int, seconds: float = 0.0, plan: Plan | None = None
    ) -> None:
        """Hold the solutions of a batch in its order."""
        self._solutions = tuple(solutions)
        self.rounds = rounds
        self.seconds = seconds
        self.plan = plan

    def bounded(self, report: Callable[[Solution], Solution]) -> Solutions:
        """Return the same with solutions as ``report`` makes them, such as a calibration's own error estimates."""
        return Solutions([report(solution) for solution in self], self.rounds, self.seconds, self.plan)

    def __getitem__(self, index: Any) -> Any:
        """Return one solution, or a tuple of several."""
        return self._solutions[index]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._solutions)

    def plot(self, sample: int = 0) -> Figure:
        """Return a figure of how the solve of one sample went; see :func:`parataxis.plots.rounds`."""
        return plots.rounds(self, sample)

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        worst = max((solution.error_estimate for solution in self), default=math.inf)
        reasons = ", ".join(sorted({solution.reason for solution in self}))
        rows = [
            ("solver", repr(self[0].solver)),
            ("rounds", f"{self.rounds} for {self[0].steps} steps"),
            ("evaluations / N", f"{self.evaluations / sum(solution.steps for solution in self):.2f}"),
            ("estimated error, worst", "not known" if math.isinf(worst) else f"{worst:.1e}"),
            ("seconds", format_seconds(self.seconds)),
        ]
        table = figures(f"{len(self)} x {tuple(self[0].x.shape)}: {reasons}", rows)
        return table if self.plan is None else table + preformatted(self.plan.compare(self.seconds))

    def __repr__(self) -> str:
        """Return one line, without tensors."""
        shape = tuple(self[0].x.shape)
        return f"Solutions({len(self)} x {shape}, {self.rounds} rounds, {format_seconds(self.seconds)})"

    @property
    def x(self) -> Tensor:
        """(B, *shape) the samples."""
        return torch.stack([solution.x for solution in self._solutions])

    @property
    def trajectory(self) -> Tensor | None:
        """(B, N + 1, *shape) the trajectories, if all runs kept and finished theirs."""
        trajectories = [solution.trajectory for solution in self._solutions]
        known = [trajectory for trajectory in trajectories if trajectory is not None]
        return torch.stack(known) if len(known) == len(trajectories) else None

    @property
    def converged(self) -> bool:
        """Whether every run passed its solver's test."""
        return all(solution.converged for solution in self._solutions)

    @property
    def evaluations(self) -> int:
        """Steps evaluated for all samples (NFE)."""
        return sum(solution.evaluations for solution in self._solutions)

    @property
    def sequential_seconds(self) -> float:
        """How long the sequential loop takes, as it was planned with; NaN without a plan."""
        return math.nan if self.plan is None else self.plan.loop_seconds

    @property
    def speedup(self) -> float:
        """``sequential_seconds`` over ``seconds``."""
        return self.sequential_seconds / self.seconds if self.seconds else math.nan

    def __str__(self) -> str:
        """Return what was done, seconds first, and how well it was forecast."""
        first, ratio = self[0], sum(solution.nfe_ratio for solution in self) / len(self)
        reasons = sorted({solution.reason for solution in self})
        timing = format_seconds(self.seconds)
        if self.plan is not None:
            loop = format_seconds(self.sequential_seconds)
            timing = f"{timing}, {self.speedup:.2g} times as fast as the loop ({loop})"
        text = (
            f"{timing}: {len(self)} x {first.steps} steps by {first.solver!r}: {', '.join(reasons)} after "
            f"{self.rounds} rounds, {ratio:.2f} evaluations / N"
        )
        return text if self.plan is None else f"{text}\n{self.plan.compare(self.seconds)}"
