"""The rounds of one stage: solved by its recurrence, replayed in every round, or evaluated once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..engine.run import Run, drive, start
from ..samplers.recurrence import Recurrence
from ..solvers.base import Solver
from ..solvers.secant import Secant
from .equation import RecordedRecurrence, ReplayedRecurrence
from .evaluate import StageEvaluator
from .floor import FloorMeasurement, MeasuredSlopes, carried_to_the_end
from .passes import StageRecord
from .record import StageProgress
from .refinement import ROUNDING, Refinement
from .report import Report
from .runner import LoopRunner
from .signals import NotParallelizable, RowsInteract
from .structure import Structure

__all__ = ["StageSolver"]

ESTIMATE_MARGIN = 2  # by which errors may exceed the solver's estimate: of a recurrence,
REPLAY_ESTIMATE_MARGIN = 4  # of a loop that is replayed in every round
# Of solvers in 16 bits: below it they follow rounding, for many rounds. Their last states are not far off by then, so
# evaluating all steps once more, at the states of the replay, does the rest.
LOOSE = 16  # units in the last place
ROUGH = 1e-4  # rounding of outputs, relative, above which the network computes in 16 bits, or is chaotic
AS_MANY_ROUNDS = (
    "solving it takes as many rounds as it has steps: the tolerance is too small, or a step makes too much of an error "
    "of the one before."
)


@dataclass(frozen=True, eq=False)
class StageSolver:
    """Makes the rounds of a stage; its evaluations, its last state and the estimate of its error are left in it.

    Attributes:
        runner: Runs the loop.
        solver: Of recurrences.
        tolerance: Relative error allowed in the result.
        report: To be filled in.
        replay_until: A method that replays the loop up to a step, and keeps states from another one on.
    """

    runner: LoopRunner
    solver: Solver
    tolerance: float
    report: Report
    replay_until: Callable[[int, int], StageRecord]

    def solve(self, progress: StageProgress, refinement: Refinement) -> None:
        """Solve a stage in the way, and from the trajectory, that its refinement says."""
        measured = MeasuredSlopes(progress.structure) if not progress.measured_floor else None
        evaluator = StageEvaluator(progress.stage, progress.known, self.runner.merger, measured)
        make_rounds = self._evaluate_once if refinement.evaluates_once else self._run_solver
        while True:
            try:
                make_rounds(progress, refinement, evaluator)
                break
            except RowsInteract:
                progress.structure.joint_samples = True
        if measured is not None:
            measured.forget()
            self._measure_floor(progress, evaluator, measured)

    def _measure_floor(self, progress: StageProgress, evaluator: StageEvaluator, measured: MeasuredSlopes) -> None:
        """Measure what the loop makes of the rounding of its outputs, or let the next two passes do so."""
        structure, known, solution = progress.structure, progress.known, progress.solution
        if structure.rounding is None:
            structure.rounding = evaluator.rounding()
        rounding = structure.rounding
        if not isinstance(self.solver, Secant):  # its own are as good
            known.improve_slopes(measured.latest)
        across = measured.across(rounding) if rounding.max() > ROUGH else None
        if structure.linear and across is None and known.evaluated.all():
            assert solution is not None
            solution = solution.view(structure.samples, structure.dim)
            carried = carried_to_the_end(known, solution, measured.slopes)
            floor, amplification = (
                float(np.sqrt((error**2).sum(0)).max()) for error in (carried * rounding[:, None], carried)
            )
            progress.set_floor(floor, amplification)
        else:
            progress.floor = FloorMeasurement(rounding, measured.slopes, across)

    def _evaluate_once(self, progress: StageProgress, refinement: Refinement, evaluator: StageEvaluator) -> None:
        """Evaluate all steps at the states of the latest replay; how far the next one is from it shows its error."""
        structure, report, guess = progress.structure, self.report, refinement.guess
        assert guess is not None
        width = getattr(self.solver, "window", None) or structure.steps
        if report.rounds + -(-structure.steps // width) > report.steps:
            raise NotParallelizable(AS_MANY_ROUNDS)
        states = self.runner.spool.stack([structure.as_runs(states) for states in guess])
        report.rounds += evaluator.evaluate_trajectory(states, width)
        report.evaluations += structure.steps * structure.samples
        # The next replay has the same rounding, and does not show what the loop makes of it.
        unseen = structure.floor if refinement.replay_each_round else 0.0
        progress.solution, progress.solver_estimate = guess[-1], unseen

    def _run_solver(self, progress: StageProgress, refinement: Refinement, evaluator: StageEvaluator) -> None:
        """Let the solver make its rounds."""
        structure, report, loop = progress.structure, self.report, self.runner.loop
        replays, ranks, solver = refinement.replay_each_round, loop.ranks, self.solver
        equation: Recurrence = RecordedRecurrence.of(progress)
        if replays:
            equation = ReplayedRecurrence.of(progress, self.replay_until)
            if not hasattr(solver, "window"):
                raise ValueError(
                    f"{solver!r} needs a loop that is linear in its denoiser's outputs, and this one is not: "
                    "choose Secant or Picard."
                )
        guess = refinement.guess
        if guess is not None:
            guess = self.runner.spool.stack([structure.as_runs(states) for states in guess], 1)
        margin = REPLAY_ESTIMATE_MARGIN if replays else ESTIMATE_MARGIN
        tolerance, rounding = _solver_tolerance(self.tolerance / margin, structure, replays=replays)
        if ranks is not None:
            ranks.compare(
                noise=equation.start,
                added=torch.stack(progress.noise_terms),
                tolerance=tolerance,
                solver=solver,
                mode=report.mode,
            )
        runs = start(None, equation, solver, tolerance=tolerance, guess=guess, rounding=rounding)
        rounds_left = report.steps - report.rounds
        for _ in drive(runs, evaluator):
            loop.on_round(_accepted(runs, structure, rounds_left), structure.steps)
        if ranks is not None:
            ranks.end()
        progress.solution = torch.stack([run.solution.x for run in runs]).view(structure.samples, -1)
        progress.solver_estimate = margin * max(run.error for run in runs)
        _count_runs(report, runs, structure.samples)


def _solver_tolerance(tolerance: float, structure: Structure, *, replays: bool) -> tuple[float, float]:
    """Return the tolerance of a solver, and the unit roundoff of the network."""
    network = torch.finfo(structure.network_dtype)
    tolerance = max(tolerance, ROUNDING / 4 * torch.finfo(structure.dtype).eps)  # less is not claimed
    if structure.few_bits and replays:
        # Nothing is claimed below the floor, and where rounding is large a window never passes a stricter test.
        tolerance = max(tolerance, max(structure.floor, network.eps) / 4)
    elif structure.few_bits:
        tolerance = max(tolerance, LOOSE * network.eps)
    return tolerance, float(network.eps) / 2


def _accepted(runs: Sequence[Run], structure: Structure, rounds_left: int) -> int:
    """Return how many steps all runs have accepted, or raise where they have made too many rounds for that."""
    accepted = min(structure.steps if run.done else run.accepted for run in runs)
    if accepted < structure.steps and max(run.rounds for run in runs) >= rounds_left:
        raise NotParallelizable(AS_MANY_ROUNDS)
    return accepted


def _count_runs(report: Report, runs: Sequence[Run], samples: int) -> None:
    """Add the rounds of a solve."""
    report.samples = samples
    report.rounds += max(run.rounds for run in runs)
    report.evaluations += sum(run.evaluations for run in runs) * samples // len(runs)
    report.peak_width = max(report.peak_width, *(run.peak_width for run in runs))
