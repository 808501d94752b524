"""Recording a stage: passes with random outputs show its structure, one more confirms it and shows what the loop adds.

In that last pass outputs are f = d u + noise, with d such that states keep their size: so the rounding of what the loop
adds along the way is that of states of the right size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..arrays import Array
from .analysis import check_calls, find_structure
from .answers import PROBE_SEED, AffineAnswers, PerturbedAnswers
from .calls import RecordedCalls
from .error_estimate import satisfies_recurrence
from .fit import fit_slopes
from .floor import FloorMeasurement
from .known_outputs import KnownOutputs
from .passes import PassRecord, StageRecord
from .rows import SMALLEST
from .runner import FIRST_CALLS, LoopRunner, same_leaves
from .signals import NotParallelizable
from .stage_plan import CallbackFree, StagePlan
from .structure import MIN_STEPS, Recording, Stage, Structure

__all__ = ["StageProgress", "probe_again", "record_stage"]

# Elements of a step, to fit its coefficients to; smaller loops are recorded more often. The first are enough for steps
# that use one output or two.
FIT_ELEMENTS = (12, 48)
MORE = 2.0  # times what a loop added when it was recorded: it may be that its coefficients have changed
MAX_EXTRA_RECORDINGS = 16
STARTS_DIFFERENTLY = (
    "its first call differs from pass to pass: it depends on something that cannot be put back (a clock, a file, "
    "another library's state)."
)


@dataclass(eq=False)
class StageProgress:
    """How far the solution of a stage has come.

    Attributes:
        stage: What is solved.
        known: Its evaluations.
        record: What the latest pass saw of it.
        start: (S, dim) the first state.
        noise_terms: What the loop adds at every step, (S, dim) each.
        noise_sizes: Size of the terms that each was the difference of, and so of its rounding.
        followed: Whether a call of a denoiser follows the stage at once, if that is known.
        reused: Whether the structure is that of an earlier call of the loop.
        accepted: Whether the loop may go on behind it.
        solution: (S, dim) the last state as the solver left it.
        solver_estimate: The solver's own estimate of its relative error.
        floor: Set while the next pass measures the floor.
        measured_floor: Whether it has been measured in this call.
        callback_free: What the stage was without callbacks.
    """

    stage: Stage
    known: KnownOutputs
    record: StageRecord
    start: Tensor
    noise_terms: list[Tensor]
    noise_sizes: list[float]
    followed: bool | None
    reused: bool = False
    accepted: bool = False
    solution: Tensor | None = None
    solver_estimate: float = 0.0
    floor: FloorMeasurement | None = None
    measured_floor: bool = False
    callback_free: CallbackFree | None = None

    @property
    def structure(self) -> Structure:
        """Of the stage."""
        return self.stage.structure

    @property
    def answers(self) -> AffineAnswers:
        """How the next pass answers its calls."""
        if self.floor is None:
            return AffineAnswers(self.known)
        return AffineAnswers(self.known, self.floor.noise, self.floor.slopes, self.floor.across)

    def measures_floor(self, record: StageRecord) -> bool:
        """Return whether a pass through the stage was for the floor: the last of them sets it."""
        if self.floor is None:
            return False
        floor = self.floor.take(record.last_state)
        if floor is not None:
            self.set_floor(floor, floor / float(self.floor.rounding.mean()))
            self.floor = None
        return True

    def set_floor(self, floor: float, amplification: float) -> None:
        """Take what this call of the loop makes of the rounding of its outputs, and of any such change."""
        self.structure.floor, self.structure.amplification = floor, amplification
        self.measured_floor = True

    def plan(self, last_step: int | None = None, first_step: int = 0) -> StagePlan:
        """Return how the next pass answers its calls, how far it goes, and from where on it keeps states."""
        known = self.accepted, self.followed, self.callback_free
        return StagePlan(self.structure, self.stage.first, self.answers, last_step, *known, first_step)

    def added(self) -> Array:
        """Return (N,) what the loop adds at every step, relative to the terms of the step."""
        pairs = zip(self.noise_terms, self.noise_sizes, strict=True)
        return np.array([float(term.norm()) / max(size, SMALLEST) for term, size in pairs])

    def rebase(self) -> None:
        """Take what the loop adds along the way from the latest pass."""
        self.start = self.record.inputs[0]
        self.noise_terms, self.noise_sizes = self.record.noise_terms()

    def trajectory(self) -> Tensor:
        """Return the states of the latest pass, (N + 1, S, dim); without a last state the one before is repeated."""
        record = self.record
        return record.spool.stack(record.states if record.final is not None else [*record.inputs, record.inputs[-1]])


def record_stage(runner: LoopRunner, plans: Sequence[StagePlan], record: PassRecord) -> StageProgress:
    """Find the structure of the calls behind the known stages.

    Args:
        runner: Runs the loop.
        plans: Of the known stages.
        record: Of a pass that has recorded the calls, with seed 0.

    Raises:
        NotParallelizable: With the reason.
    """
    first = plans[-1].stop if plans else 0
    if not first and len(record.calls) <= MIN_STEPS:
        raise NotParallelizable(f"the loop has only {len(record.calls)} steps.")
    if record.cut:  # a loop that looks at its outputs is found before it takes steps without end
        check_calls(record.calls, runner.run(plans, seed=1, most_calls=FIRST_CALLS).calls)
        record = runner.run(plans)
    recordings = _record_twice(runner, plans, record)
    structure, check = find_structure(recordings, first)
    elements = structure.samples * structure.dim
    for enough in FIT_ELEMENTS:
        wanted = 2 + min(-(-enough // elements), MAX_EXTRA_RECORDINGS) if elements < enough else 2
        if len(recordings) < wanted and (len(recordings) == 2 or not structure.linear):
            for seed in range(len(recordings), wanted):
                recordings.append(runner.run(plans, seed=seed).recording)
            structure, check = find_structure(recordings, first)
    followed = len(structure.row_maps) < len(recordings[0].calls)
    if not first and not followed and structure.steps <= MIN_STEPS:
        raise NotParallelizable(f"the loop has only {structure.steps} steps.")
    progress = probe_stage(runner, plans, structure, followed)
    if check is not None and not check.passes(progress.noise_terms):
        structure.linear = False
    if not structure.linear:
        second = probe_stage(runner, plans, structure, followed, seed=PROBE_SEED + 2)
        fit_slopes(structure, progress.record, second.record)
        progress = probe_stage(runner, plans, structure, followed)
    structure.added = progress.added()
    return progress


def probe_again(runner: LoopRunner, structure: Structure) -> StageProgress | None:
    """Make the probe pass of a first stage whose structure an earlier call has shown.

    Where the loop now adds much more than it did then, a second one with other outputs must see the same: else the
    structure is outdated, and this is None.

    Raises:
        LoopChanged: If the loop does not fit the structure.
    """
    progress = probe_stage(runner, [], structure, None)
    more = structure.added is not None and progress.added() > MORE * structure.added + structure.precision
    if structure.linear and bool(np.any(more)):
        second = probe_stage(runner, [], structure, None, seed=PROBE_SEED + 2)
        if not satisfies_recurrence(second.record, progress.noise_terms, progress.noise_sizes):
            return None
    return progress


def probe_stage(
    runner: LoopRunner,
    plans: Sequence[StagePlan],
    structure: Structure,
    followed: bool | None,
    seed: int = PROBE_SEED,
) -> StageProgress:
    """Make the pass that shows what the loop adds along the way; it also records the calls.

    Args:
        runner: Runs the loop.
        plans: Of the stages before.
        structure: Of the stage.
        followed: Whether a call of a denoiser follows the stage at once, if that is known.
        seed: Of the noise.

    Raises:
        LoopChanged: If the loop does not fit the structure.
    """
    first = plans[-1].stop if plans else 0
    plan = StagePlan(structure, first, PerturbedAnswers(structure, seed), followed=followed)
    passed = runner.run([*plans, plan])
    record = passed.last
    stage = Stage(structure, first, RecordedCalls(record.calls, structure.row_maps))
    known = KnownOutputs(structure, runner.spool)
    return StageProgress(stage, known, record, record.inputs[0], *record.noise_terms(), passed.followed)


def _record_twice(runner: LoopRunner, plans: Sequence[StagePlan], record: PassRecord) -> list[Recording]:
    """Return two recordings with different outputs, the first of which may be made anew."""
    while True:
        second = runner.run(plans, seed=1)
        if record.calls and second.calls and not same_leaves(record.calls[0].leaves, second.calls[0].leaves):
            raise NotParallelizable(STARTS_DIFFERENTLY)
        at_module = record.ended_at_module and second.ended_at_module
        if not at_module or not same_leaves(record.ending, second.ending):
            return [record.recording, second.recording]
        # A module that the loop calls along the way, with nothing that depends on outputs.
        runner.loop_constants.append(record.ending or [])
        record = runner.run(plans)
