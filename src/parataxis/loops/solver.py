r"""Any sampling loop, unmodified: record, solve, replay.

A loop belongs to someone else: a function, a pipeline. Its Python runs several times with stubs instead of the
networks (:mod:`.runner`), and the networks run only where the solver wants them.

1. *Record.* Two passes with random outputs show the loop's recurrence (:mod:`.fit`), a third confirms it and shows what
   the loop adds along the way (:mod:`.record`).
2. *Solve.* A solver works on that recurrence; the recorded calls of the steps that it evaluates are batched into few
   network calls (:mod:`.merger`). Where there is no recurrence, one pass of the loop says in every round which
   trajectory follows: a stub answers f_q + d_q (u - u_q), and the loop itself does the rest.
3. *Replay.* A last pass with the same stubs decodes and returns as the loop always does. How far its last state U_N
   comes out from the one that was solved for, V_N, is added to the solver's estimate of its error, with a margin:

       error estimate = margin * solver's estimate + |U_N - V_N| / |U_N|

   The solver's tolerance is divided by that margin, because about one estimate in ten is too small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import torch

from ..checks import is_finite
from ..solvers import as_solver
from ..solvers.base import Solver
from .answers import Answers
from .loop import Loop
from .passes import PassRecord, StageRecord
from .record import StageProgress, probe_again, record_stage
from .refinement import ROUNDING, Judgement, Refinement
from .report import ABOVE_FLOOR, Report
from .runner import FIRST_CALLS, LoopRunner
from .signals import CallbackChangedLoop, LoopChanged, NotParallelizable, OnlyThisCall
from .stage_plan import CallbackFree, StagePlan
from .stage_solve import StageSolver
from .structure import Structure

__all__ = ["LoopSolver", "check_options"]

MAX_NAMED_PARTS = 8  # of a module, in a message
MAX_CACHED_STRUCTURES = 16  # keys of calls whose first stage a loop remembers, the latest ones
# Of errors of outputs, on their way to the result. Loops have some 10, mostly, but for multistep methods of high order,
# which are not stable: there an error grows along directions that no scalar slope shows, and far beyond its estimate.
MAX_AMPLIFICATION = 50
AMPLIFIES = (
    "errors of its outputs grow {:.0f} times on their way to the result, as in a multistep method of high order that "
    "is not stable or in a chaotic network, so no estimate of the error would hold: choose a lower order, smaller "
    "steps, or a network in more bits."
)
NOT_NEAR = "the loop is linear elsewhere, but not near its solution."


class Phase(Enum):
    """What a solve of a loop does next."""

    RECORD = auto()  # the calls behind the stages that are solved
    SOLVE = auto()  # the last stage, within a pass that then replays it
    REPLAY = auto()  # all stages
    REFINE = auto()  # the last stage, whose replay came out too far away
    DONE = auto()


def check_options(solver: Solver | str | None, tolerance: Any) -> tuple[Any, float]:
    """Return the solver, ``Secant(window=8)`` by default, or ``auto``, and the tolerance, or raise."""
    if not (is_finite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be a relative error, finite and at least 0, got {tolerance!r}.")
    return "auto" if isinstance(solver, str) and solver == "auto" else as_solver(solver), float(tolerance)


class LoopSolver:
    """Solves one call of a loop, stage by stage.

    Args:
        runner: Runs the loop; its stubs are installed.
        solver: How recurrences are solved.
        tolerance: Relative error allowed in the result.
        report: To be filled in.
    """

    def __init__(self, runner: LoopRunner, solver: Solver, tolerance: float, report: Report) -> None:
        self.runner, self.loop = runner, runner.loop
        self.solver, self.tolerance, self.report = solver, tolerance, report
        self.stages: list[StageProgress] = []  # the last one is being solved
        self.refinement = Refinement()  # of that one
        self.measured_floor = False  # whether the latest pass was for that
        self.outdated: StageProgress | None = None  # solved with the structure of an earlier call, which did not fit

    def run(self) -> Any:
        """Solve every stage, replay, and return what the loop returns."""
        phase, passed = self.reuse_structure(), PassRecord([])
        while phase is not Phase.DONE:
            if phase is Phase.RECORD:
                phase = self.begin_stage(record_stage(self.runner, self.plans(), passed))
            elif phase is Phase.REFINE:
                phase = self.refine()
            else:
                solving = phase is Phase.SOLVE
                passed = self.run_pass(at_stage=self.solve_stage if solving else None)
                phase = self.next_phase(passed, solving=solving)
        return self.finish(passed)

    def reuse_structure(self) -> Phase:
        """Begin with the structure that an earlier call has shown: one pass shows what the loop adds."""
        structure = self.loop.structures.pop(self.runner.key, None)
        if structure is None or not (structure.linear or structure.settings == self.runner.world.settings()):
            return Phase.REPLAY  # with other settings a loop may have a recurrence that had none
        try:
            progress = probe_again(self.runner, structure)
        except LoopChanged:
            progress = None
        if progress is None:
            return Phase.REPLAY
        progress.reused = True
        return self.begin_stage(progress)

    def begin_stage(self, progress: StageProgress) -> Phase:
        """Take up a stage: it is solved by its recurrence if it has one."""
        self.refinement = Refinement()
        self.stages.append(progress)
        structure, reason = progress.structure, progress.structure.no_recurrence
        outdated, self.outdated = self.outdated, None
        if outdated is not None and outdated.structure.has_form_of(structure):
            trajectory = outdated.trajectory()
            self.refinement.guess = trajectory if bool(torch.isfinite(trajectory).all()) else None
            if structure.linear and outdated.structure.has_coefficients_of(
                structure
            ):  # it was not they that did not fit
                structure.linear, reason = False, NOT_NEAR
        single = self.runner.merger.single = getattr(self.solver, "window", None) == 1
        self.refinement.replay_each_round = single or not structure.linear
        self.report.reason = "the window is one step." if single else reason
        return Phase.SOLVE

    def plans(self) -> list[StagePlan]:
        """Return how the next pass answers the calls of all stages."""
        return [progress.plan() for progress in self.stages]

    def run_pass(self, at_stage: Callable[[], Answers | None] | None = None) -> PassRecord:
        """Run one pass through all stages, which are judged when the loop leaves the last one."""
        most_calls = None if self.stages else FIRST_CALLS
        passed = self.runner.run(self.plans(), accept=self.accept, at_stage=at_stage, most_calls=most_calls)
        if self.stages:
            progress = self.stages[-1]
            if not (at_stage is not None and self.refinement.replay_each_round):  # else the rounds were passes
                progress.record = passed.last
            if progress.followed is None:
                progress.followed = passed.followed
        return passed

    def next_phase(self, passed: PassRecord, *, solving: bool) -> Phase:
        """Return what follows a pass."""
        progress = self.stages[-1] if self.stages else None
        if solving and self.refinement.replay_each_round:
            return Phase.REPLAY  # the rounds were passes, which left nothing of this one
        if self.measured_floor and progress is not None:  # this pass was for the floor
            self.check_stable(progress)
            return Phase.REPLAY
        if progress is not None and not progress.accepted:
            return Phase.REFINE
        return Phase.DONE if passed.complete else Phase.RECORD

    def refine(self) -> Phase:
        """Go on from the trajectory of a replay that was not good enough.

        First with what the loop adds along the way taken from that replay: in the first pass it carried the rounding
        of other states. If that did not help, the recurrence is not to be trusted, and the loop is replayed every
        round.
        """
        progress, refinement = self.stages[-1], self.refinement
        if refinement.structure_outdated:
            self.outdated = progress
            self.stages.clear()
            return Phase.REPLAY
        if refinement.begin(progress):
            progress.rebase()
        return Phase.SOLVE

    def solve_stage(self) -> Answers | None:
        """Solve the last stage; return how the pass goes on, or None if there were passes within it."""
        progress, report = self.stages[-1], self.report
        report.mode = "replay" if self.refinement.replay_each_round or report.mode == "replay" else "recurrence"
        report.steps = sum(stage.structure.steps for stage in self.stages)
        StageSolver(self.runner, self.solver, self.tolerance, report, self.replay_until).solve(
            progress, self.refinement
        )
        self.check_stable(progress)
        return None if self.refinement.replay_each_round else progress.answers

    def check_stable(self, progress: StageProgress) -> None:
        """Raise if errors of outputs grow too much on their way to the result."""
        structure = progress.structure
        if not progress.measured_floor or self.runner.merger.single or structure.amplification <= MAX_AMPLIFICATION:
            return
        reason = AMPLIFIES.format(structure.amplification)
        if not progress.reused:
            raise NotParallelizable(reason)
        self.loop.structures[self.runner.key] = self.stages[0].structure
        raise OnlyThisCall(reason)

    def replay_until(self, first_step: int, last_step: int) -> StageRecord:
        """Replay the loop up to a step of the last stage; states before the first step are not kept."""
        plans = self.plans()
        return self.runner.run([*plans[:-1], self.stages[-1].plan(last_step, first_step)]).last

    def accept(self, record: StageRecord) -> bool:
        """Judge the replay of the last stage: may the loop go on behind it?"""
        progress = self.stages[-1]
        self.measured_floor = progress.measures_floor(record)
        if self.measured_floor:
            return False
        left = self.report.steps - self.report.rounds
        judgement = self.refinement.judge(record, progress, self.tolerance, getattr(self.solver, "window", None), left)
        if judgement.not_linear:
            progress.structure.linear = False
            self.report.reason = NOT_NEAR
        progress.accepted = judgement.accepted
        if judgement.accepted:
            _report_stage(self.report, judgement, progress.structure.floor, first=len(self.stages) == 1)
        return judgement.accepted

    def finish(self, passed: PassRecord) -> Any:
        """Return what the loop returned in its last pass, after one more with callbacks if there are any."""
        runner, loop, report = self.runner, self.loop, self.report
        if not self.stages:
            return _without_denoiser(loop, report, passed)
        loop.structures[runner.key] = self.stages[0].structure
        self.stages[0].structure.settings = runner.world.settings()
        if len(loop.structures) > MAX_CACHED_STRUCTURES:
            del loop.structures[next(iter(loop.structures))]
        if runner.callbacks_in_every_pass:
            report.reason = "a callback changes what the loop does, so it runs in every pass."
        _claim_no_less_than_floors(report, [progress.structure for progress in self.stages])
        if not runner.callbacks_in_every_pass and loop.calls_back(runner.kwargs):
            return self.replay_with_callbacks(passed)
        return passed.value

    def replay_with_callbacks(self, passed: PassRecord) -> Any:
        """Replay once more, with callbacks; if they change what the loop does, solve it with them in every pass."""
        for progress, record in zip(self.stages, passed.stages, strict=True):
            progress.callback_free = CallbackFree(record.inputs, progress.stage.calls)
        try:
            return self.runner.run(self.plans(), callbacks=True).value
        except CallbackChangedLoop:
            self.loop.changed_by_callbacks.add(self.runner.key)
            self.runner.callbacks_in_every_pass, self.stages = True, []
            del self.loop.structures[self.runner.key]
            self.report.reset(self.tolerance)
            return self.run()


def _without_denoiser(loop: Loop, report: Report, passed: PassRecord) -> Any:
    """Return what a pass returned that called no denoiser, if the loop has called one before."""
    if loop.structures:
        report.mode, report.reason = "sequential", "no denoiser was called this time."  # an action from a queue
        report.converged = True
        return passed.value
    names = ", ".join(type(module).__name__ for module in loop.denoisers)
    # A method of a module, such as a diffusion's sample(), sees that module, and calls one of its parts.
    parts = ", ".join(name for module in loop.denoisers for name, _ in list(module.named_children())[:MAX_NAMED_PARTS])
    raise NotParallelizable(
        f"it calls none of its denoisers ({names}): pass those that it calls with denoisers=[...]"
        + (f"; its parts are {parts}." if parts else ".")
    )


def _report_stage(report: Report, judgement: Judgement, floor: float, *, first: bool) -> None:
    """Add the judgement of a stage: the worst of all stages counts."""
    report.error_estimate = judgement.estimate if first else max(report.error_estimate, judgement.estimate)
    report.floor = floor if first else max(report.floor, floor)
    report.converged = judgement.within_tolerance and (first or report.converged)


def _claim_no_less_than_floors(report: Report, structures: Sequence[Structure]) -> None:
    """Claim nothing below what rounding does to the result, where that is more than the tolerance."""
    floors = [s.floor for s in structures if s.floor > max(report.tolerance, ROUNDING * torch.finfo(s.dtype).eps)]
    if floors:
        report.converged = False
        report.error_estimate = max(report.error_estimate, *floors)
        report.reason = f"{report.reason} {ABOVE_FLOOR}".lstrip()
