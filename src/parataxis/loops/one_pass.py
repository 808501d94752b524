"""A loop that steps a scheduler, run once, every line of it in its order: observe, speculate, verify.

1. *Observe.* A step is real: the network's calls and the scheduler's ``step`` are watched, which shows what the rows of
   a call are and what the loop makes of their outputs (:mod:`.observation`).
2. *Speculate.* The rest of the trajectory is solved by the scheduler's own recurrence, with the noise of a copy of the
   loop's generator (:mod:`.speculation`): when the loop makes a call, rounds are made until its step is accepted.
3. *Verify.* Every call is compared with what was expected of it. What differs throws away all that was solved: the call
   is evaluated for itself, its step is observed, and the rest is solved again from the state that is there.

Nothing has to be undone, because the loop is only ever given outputs that belong to its own inputs. After a few misses
in a row it goes on by itself, from where it is. Only where its first steps show that they cannot be foreseen, and all
that it reaches can be put back, does it end there, to be recorded instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from ..solvers.base import Solver
from .beginning import Beginning
from .calls import copy_call, flatten_arguments
from .foresight import Foresight
from .loop import Loop
from .networks import Networks
from .observation import ObservedStep
from .report import ABOVE_FLOOR, Report
from .schedulers import SchedulerStep, watch
from .signals import NotParallelizable, StartOver, Unforeseeable

__all__ = ["NO_CALL", "OnePass"]

MAX_CALLS = 64  # of denoisers without a step of a scheduler
FEW_CALLS = 16  # the same, of a loop that can begin anew
LATEST_START = 1 / 3  # share of the foreseen steps behind which a loop does not begin anew: they have taken rounds
NO_STEP = "the loop does not step its scheduler."
NO_CALL = "the loop called none of its denoisers."
ONE_STEP = "the window is one step."


class OnePass:
    """One run of a loop.

    Args:
        loop: The loop.
        schedulers: That it can see.
        solver: How the steps are solved.
        tolerance: Relative error allowed in the result.
        report: To be filled in.
        beginning: To which the loop can be put back; without it the loop is never ended.

    Attributes:
        networks: The denoisers.
        foresight: What is known of the steps to come.
        alone: Why the loop goes on by itself; empty while it does not.
        refused: Whether another call of the loop had better be recorded.
        single: Whether the window is one step, so that every step is real.
        steps: Of schedulers, that the loop has made.
    """

    def __init__(
        self,
        loop: Loop,
        schedulers: Sequence[Any],
        solver: Solver,
        tolerance: float,
        report: Report,
        beginning: Beginning | None = None,
    ) -> None:
        self.loop, self.schedulers, self.report, self.beginning = loop, schedulers, report, beginning
        self.networks = Networks(loop, None if beginning is None else beginning.world)
        self.foresight = Foresight(loop, self.networks, solver, tolerance, report)
        self.alone, self.refused, self.steps = "", False, 0
        self.single = getattr(solver, "window", None) == 1
        self._observed: ObservedStep | None = ObservedStep()  # the real step that is going on
        self._ahead = False  # whether a round has answered a part of the step in which the loop goes alone
        self._start_over: StartOver | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the loop.

        Raises:
            StartOver: If it is to be recorded.
        """
        report, networks, beginning = self.report, self.networks, self.beginning
        # A loop may leave a callback out of a pass, but one that has run cannot be undone.
        self._calls_back = self.loop.calls_back(kwargs)
        watched = nullcontext() if beginning is None else beginning.watched()
        try:
            with networks.installed(self._called), watch(self.schedulers, self._stepped), watched:
                value = self.loop.run(args, kwargs, False)
        finally:
            self.foresight.discard()
            report.calls, report.rows, report.real_calls = networks.calls, networks.merger.rows, networks.real_calls
            report.peak_rows, report.passes = networks.merger.peak_rows, 1
            networks.close()
        if self._start_over is not None:  # the loop has caught it
            raise self._start_over
        foreseen = self.foresight.solved or (self.single and not self.alone)
        self.refused = self.refused or not (foreseen or self.alone or not networks.answers)
        _conclude(report, self, foreseen=foreseen)
        return value

    def _called(self, module: int, args: Any, kwargs: Any) -> Any:
        """Answer a call of a denoiser."""
        with self._unwatched():
            return self._answer(module, args, kwargs)

    def _answer(self, module: int, args: Any, kwargs: Any) -> Any:
        if self.alone:
            return self.networks.real(module, args, kwargs)
        leaves, spec = flatten_arguments(args, kwargs)
        try:
            if torch.is_grad_enabled():
                self.networks.check_gradients(module, leaves)
            if self._observed is None:
                answer = self.foresight.answer(module, spec, leaves)
                if answer is not None:
                    return answer
            return self._observe(module, spec, leaves, args, kwargs)
        except NotParallelizable as reason:
            self._go_alone(reason)
        return self.networks.real(module, args, kwargs)

    def _observe(self, module: int, spec: TreeSpec, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        """Evaluate a call for itself, as a part of a real step."""
        if self._observed is None:
            self._observed = self.foresight.begun_step()
        calls = self._observed.calls
        if len(calls) >= (FEW_CALLS if self._can_start_over() else MAX_CALLS):
            raise Unforeseeable(NO_STEP)
        call = copy_call(module, spec, leaves, self._observed.outputs, None)
        result, outputs = self.networks.observe(call, args, kwargs)
        calls.append(call)
        self._observed.outputs.append(outputs)
        return result

    def _stepped(self, step: SchedulerStep, run: Callable[[], Any]) -> Any:
        """Watch a step of a scheduler."""
        if not self.networks.switch.answers:
            return run()
        observed = self._observed
        if observed is not None:
            observed.take(step)
        result = run()
        if self.alone or observed is not None:
            # A round that has answered a part of the step is counted already.
            self.report.rounds += not (self._ahead if observed is None else observed.ahead)
            self._ahead = False
            self.report.evaluations += len(step.sample) if step.sample.ndim else 1
        if not self.alone:
            self._learn(observed, step, result)
        self.steps += 1
        return result

    def _learn(self, observed: ObservedStep | None, step: SchedulerStep, result: Any) -> None:
        """Take what a step shows: a real one, or one whose calls were answered ahead."""
        try:
            if observed is not None:
                self._observed = ObservedStep() if self.single else None
                with self._unwatched(), torch.no_grad():
                    self.foresight.learn(observed, result)
            elif not self.foresight.take_step(step, result):
                self._observed = ObservedStep()
        except NotParallelizable as reason:
            self._go_alone(reason)

    def _go_alone(self, reason: NotParallelizable) -> None:
        """Let the loop go on by itself, or begin anew, to be recorded."""
        self.foresight.discard()
        if isinstance(reason, Unforeseeable):
            self.refused = True
            if self._can_start_over():
                self._start_over = StartOver(str(reason))
                raise self._start_over from None
        self._ahead = self.foresight.begun_step().ahead
        self.alone, self._observed = str(reason), None
        self.foresight.end()

    def _unwatched(self) -> AbstractContextManager[None]:
        """Watch nothing for a while: what happens here is not the loop's."""
        return nullcontext() if self.beginning is None else self.beginning.unwatched()

    def _can_start_over(self) -> bool:
        """Return whether the loop can be put back as it was: early on, and if no callback has run."""
        foreseen = self.report.steps  # fewer, or more, than it makes where it steps a scheduler twice at every time
        early = min(self.steps, foreseen - self.foresight.left) <= LATEST_START * foreseen
        untold = not self._calls_back or not self.steps
        if self.beginning is None or self.single or not (early and untold):
            return False
        return self.beginning.can_restore()


def _conclude(report: Report, one_pass: OnePass, *, foreseen: bool) -> None:
    """Say how the loop went."""
    foresight = one_pass.foresight
    if one_pass.alone or report.misses:
        report.steps = one_pass.steps  # it may have made others than those that its scheduler foresaw
    if foreseen:
        report.mode = "one pass"
        reason = ONE_STEP if one_pass.single else report.reason if report.misses else ""
        report.reason = one_pass.alone or reason
        bound = max(foresight.tolerance, foresight.rounding)
        if report.floor > bound:  # nothing is claimed below it
            report.error_estimate = max(report.error_estimate, report.floor)
            report.reason = f"{report.reason} {ABOVE_FLOOR}".lstrip()
        report.converged = report.error_estimate <= bound
    else:
        no_steps = NO_STEP if one_pass.networks.answers else NO_CALL
        report.mode, report.reason = "sequential", one_pass.alone or no_steps
        report.rounds, report.converged = 0, True
