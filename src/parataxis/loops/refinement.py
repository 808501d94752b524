"""When a replay of a stage is good enough, and what is tried where it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .error_estimate import estimate_error, satisfies_recurrence
from .passes import StageRecord
from .record import StageProgress
from .signals import NotParallelizable

__all__ = ["ROUNDING", "Judgement", "Refinement"]

ROUNDING = 64  # units of the states' own rounding below which nothing is claimed
MAX_REFINEMENTS = 2  # solves of the recurrence from the trajectory of a replay
# Times what the replay behind an evaluation of all steps shows: where a loop goes one way or another it makes more of
# an error than its slopes say, 30 times as much in one that was seen.
UNSEEN = 100
# The same of a loop with a recurrence, whose outputs stay near their slopes: an error is a part of the latest change.
CHANGE_MARGIN = 4
FLOOR_SAFETY = 4  # the floor is measured once, at random: a solution that was refined need not be nearer


class Judgement(NamedTuple):
    """What a replay is worth.

    Attributes:
        accepted: Whether the loop may go on behind the stage.
        within_tolerance: Whether the error estimate is within the tolerance, or what rounding makes of any result.
        estimate: Estimated relative error.
        not_linear: Whether the replay shows that the loop is not linear near its solution.
    """

    accepted: bool
    within_tolerance: bool
    estimate: float
    not_linear: bool


@dataclass(eq=False)
class Refinement:
    """How often a stage has been solved again, and whether that helped.

    Attributes:
        refinements: Solves from the trajectory of a replay.
        smallest_estimate: Of the error, of all replays.
        solver_is_content: Whether the solver's own estimate is within the tolerance.
        improving: Whether the error estimate falls from replay to replay.
        structure_outdated: Whether the structure of an earlier call does not fit this one.
        replay_each_round: Whether the loop is replayed in every round: it has no recurrence, or none to be trusted.
        evaluates_once: Whether all steps are only evaluated once more, at the states of the replay: the next replay
            shows how far they were off.
        guess: (N + 1, S, dim) trajectory to start from.
    """

    refinements: int = 0
    smallest_estimate: float = np.inf
    solver_is_content: bool = True
    improving: bool = True
    structure_outdated: bool = False
    replay_each_round: bool = False
    evaluates_once: bool = False
    guess: Tensor | None = None

    def begin(self, progress: StageProgress) -> bool:
        """Begin another solve from the latest replay; return whether the recurrence is to be rebased on it.

        First what the loop adds along the way is taken from that replay: in the first pass it carried the rounding of
        other states. If that does not help, the recurrence is not to be trusted, and the loop is replayed every round.

        Raises:
            NotParallelizable: If that replay is not finite: there is nothing to begin from.
        """
        self.guess = progress.trajectory()
        if not bool(torch.isfinite(self.guess).all()):
            raise NotParallelizable("its replay with the outputs of a converged solve is not finite: it may overflow.")
        self.refinements += 1
        usable = progress.structure.linear and not self.replay_each_round and self.improving
        rebase = usable and self.refinements <= MAX_REFINEMENTS
        # Where a solver was content, its replay is off by rounding, mostly, and so near that it would have nothing to
        # do. A window may say nothing of outputs that hardly differ: in 16 bits, or of a loop that is replayed. Of one
        # that is replayed in 16 bits, rounding hides what the next replay would show.
        few_bits = progress.structure.few_bits
        replayed_once = self.replay_each_round and self.refinements == 1 and not few_bits
        self.evaluates_once = self.solver_is_content or few_bits if rebase else replayed_once
        self.replay_each_round |= not rebase
        return rebase

    def judge(
        self, record: StageRecord, progress: StageProgress, tolerance: float, window: int | None, rounds_left: int
    ) -> Judgement:
        """Judge a replay: is its error within the tolerance, or as small as it gets?

        Args:
            record: Of the replay.
            progress: Of the stage.
            tolerance: Relative error allowed.
            window: Of the solver; None for all steps.
            rounds_left: Rounds until there were as many as steps.
        """
        structure = progress.structure
        assert progress.solution is not None
        estimate = shown = estimate_error(record, progress.solution, progress.solver_estimate)
        if self.evaluates_once and self.replay_each_round:
            estimate *= UNSEEN
        elif self.evaluates_once and not structure.few_bits:
            estimate *= CHANGE_MARGIN
        floor = (FLOOR_SAFETY if self.refinements else 1) * structure.floor
        allowed = max(tolerance, floor, ROUNDING * torch.finfo(structure.dtype).eps)
        good, self.solver_is_content = estimate <= allowed, progress.solver_estimate <= allowed
        self.improving = shown <= 0.5 * self.smallest_estimate
        satisfied = not structure.linear or satisfies_recurrence(record, progress.noise_terms, progress.noise_sizes)
        self.structure_outdated = progress.reused and not satisfied
        not_linear = not satisfied and not self.structure_outdated
        good &= not not_linear
        # Near the floor the estimate need not fall any more; elsewhere a replay in every round is still to be tried.
        refined = self.refinements > 0
        as_small_as_it_gets = satisfied and refined and not self.improving and estimate <= 4 * allowed
        accepted = good or as_small_as_it_gets or (refined and self.replay_each_round and not self.evaluates_once)
        # Solving again takes about a round for each window.
        rounds_needed = -(-structure.steps // (window or structure.steps)) + 2
        accepted |= self.replay_each_round and not not_linear and rounds_needed > rounds_left
        self.smallest_estimate = min(self.smallest_estimate, shown)
        within = good and estimate <= max(tolerance, ROUNDING * torch.finfo(structure.dtype).eps)
        return Judgement(accepted and not self.structure_outdated, within, estimate, not_linear)
