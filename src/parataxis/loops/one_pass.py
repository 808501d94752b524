"""A loop that steps a scheduler, run once, every line of it in its order: observe, speculate, verify.

1. *Observe.* A step is real: the network's calls and the scheduler's ``step`` are watched, which shows what the rows of
   a call are and what the loop makes of their outputs (:mod:`.observation`).
2. *Speculate.* The rest of the trajectory is solved by the scheduler's own recurrence, with the noise of a copy of the
   loop's generator (:mod:`.speculation`): when the loop makes a call, rounds are made until its step is accepted.
3. *Verify.* Every call is compared with what was expected of it. What differs throws away all that was solved: the call
   is evaluated for itself, its step is observed, and the rest is solved again from the state that is there.

Nothing has to be undone, because the loop is only ever given outputs that belong to its own inputs. After a few misses
in a row it goes on by itself, from where it is: it is never started again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from ..solvers.base import Solver
from .calls import Call, copy_call, flatten_arguments
from .chain import Chain
from .loop import Loop
from .networks import Networks
from .observation import ObservedStep, StepForm
from .report import ABOVE_FLOOR, Report
from .schedulers import SchedulerStep, watch
from .signals import NotParallelizable
from .speculation import Speculation

__all__ = ["NO_CALL", "OnePass"]

MIN_STEPS = 8  # shorter loops run sequentially
MAX_MISSES = 3  # more than a loop may have without steps between them that went as expected
STEPS_A_MISS = 8  # steps that went as expected and make up for a miss
MAX_CALLS = 64  # of denoisers without a step of a scheduler
NO_STEP = "the loop does not step its scheduler."
NO_CALL = "the loop called none of its denoisers."
ONE_STEP = "the window is one step."
UNFORESEEN = (RuntimeError, ValueError, TypeError, IndexError)  # the loop must not meet what it would not meet alone


class OnePass:
    """One run of a loop.

    Args:
        loop: The loop.
        schedulers: That it can see.
        solver: How the steps are solved.
        tolerance: Relative error allowed in the result.
        report: To be filled in.

    Attributes:
        networks: The denoisers.
        alone: Why the loop goes on by itself; empty while it does not.
        refused: Whether another call of the loop had better be recorded.
        single: Whether the window is one step, so that every step is real.
        rounding: What is no error, whatever the tolerance.
    """

    def __init__(self, loop: Loop, schedulers: Sequence[Any], solver: Solver, tolerance: float, report: Report) -> None:
        self.loop, self.schedulers, self.report = loop, schedulers, report
        self.solver, self.tolerance = solver, tolerance
        self.networks = Networks(loop)
        self.alone, self.refused = "", False
        self.single = getattr(solver, "window", None) == 1
        self._observed: ObservedStep | None = ObservedStep()  # the real step that is going on
        self._form: StepForm | None = None
        self._chain: Chain | None = None
        self._speculation: Speculation | None = None
        # Calls of the present step that were answered ahead; None where nobody will look at the call again.
        self._answered: list[tuple[Call | None, list[Any]]] = []
        self._good_steps = 0
        self.rounding = 0.0
        self._solved = False
        self._shown = 0  # accepted steps, when progress was last shown

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the loop."""
        report, networks = self.report, self.networks
        try:
            with networks.installed(self._called), watch(self.schedulers, self._stepped):
                value = self.loop.run(args, kwargs, False)
        finally:
            self._discard()
            report.calls, report.rows, report.real_calls = networks.calls, networks.merger.rows, networks.real_calls
            report.peak_rows, report.passes = networks.merger.peak_rows, 1
            networks.close()
        foreseen = self._solved or (self.single and not self.alone)
        self.refused = self.refused or not (foreseen or self.alone or not networks.answers)
        _conclude(report, self, foreseen=foreseen)
        return value

    def _called(self, module: int, args: Any, kwargs: Any) -> Any:
        """Answer a call of a denoiser."""
        if self.alone:
            return self.networks.real(module, args, kwargs)
        leaves, spec = flatten_arguments(args, kwargs)
        try:
            if torch.is_grad_enabled():
                self.networks.check_gradients(module, leaves)
            if self._speculation is None and self._observed is None:
                self._speculate(module, spec, leaves)
            if self._speculation is not None:
                answer = self._expected(self._speculation, module, spec, leaves)
                if answer is not None:
                    return answer
            if not self.alone:
                return self._observe(module, spec, leaves, args, kwargs)
        except NotParallelizable as reason:
            self._go_alone(str(reason))
        return self.networks.real(module, args, kwargs)

    def _expected(self, speculation: Speculation, module: int, spec: TreeSpec, leaves: list[Any]) -> Any:
        """Return the answer to a call that is as it was expected; else None, and what was solved is thrown away."""
        answered = self._answered
        place = len(answered)
        if self.networks.changed():
            difference: str | None = "the denoiser itself changes"
        elif place == speculation.width:
            difference = "the denoiser is called more often in a step"
        else:
            difference = speculation.difference(place, module, spec, leaves)
        if difference is None:
            needed = speculation.width > 1 or (self._chain is not None and self._chain.remembers)
            outputs = speculation.answer(place, leaves)
            self.networks.look()
            if outputs is not None:
                answered.append((speculation.taken(place, leaves) if needed else None, outputs))
                return speculation.tree(place, outputs)
            difference = "the loop changes the state between the scheduler's steps"
        self._miss(difference)
        return None

    def _observe(self, module: int, spec: TreeSpec, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        """Evaluate a call for itself, as a part of a real step."""
        if self._observed is None:
            answered, self._answered = self._answered, []
            self._observed = ObservedStep.of([(call, outputs) for call, outputs in answered if call is not None])
        call = copy_call(module, spec, leaves, self._observed.outputs, None)
        result, outputs = self.networks.observe(call, args, kwargs)
        self._observed.calls.append(call)
        self._observed.outputs.append(outputs)
        if len(self._observed.calls) > MAX_CALLS:
            self.refused = True
            raise NotParallelizable(NO_STEP)
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
            self.report.rounds += 1
            self.report.evaluations += len(step.sample) if step.sample.ndim else 1
        if self.alone:
            return result
        if observed is None:
            self._take_answered(step, result)
        else:
            with torch.no_grad():
                self._take_observed(observed)
        return result

    def _take_observed(self, observed: ObservedStep) -> None:
        """Take from a real step what it shows."""
        step, report = observed.step, self.report
        assert step is not None
        self._observed = ObservedStep() if self.single else None
        try:
            with _foreseen():
                form = self._form = observed.form()
                if self._chain is None or not self._chain.expects(step):
                    chain = self._chain = Chain.begin(observed)
                    report.steps, report.samples = report.steps + chain.left, form.shape[0]
                    if report.steps <= MIN_STEPS:
                        raise NotParallelizable(f"the loop has only {chain.left} steps.")
                self._chain.generator = step.generator
                self._chain.take(step, form, form.calls[0])
        except NotParallelizable as reason:
            self.refused = True
            self._go_alone(str(reason))

    def _take_answered(self, step: SchedulerStep, result: Any) -> None:
        """Take a step whose calls were answered ahead."""
        speculation, chain, answered = self._speculation, self._chain, self._answered
        self._answered = []
        if speculation is None or chain is None or not chain.expects(step) or len(answered) != speculation.width:
            self._miss("the scheduler's steps are others")
            self._observed = ObservedStep()
            return
        chain.take(step, speculation.form, answered[0][0])
        speculation.take_step()
        self._good_steps += 1
        if speculation.accepted != self._shown:
            self._shown = speculation.accepted
            self.loop.on_round(speculation.first + self._shown, chain.count)
        if not chain.left:
            speculation.finish(result.prev_sample if hasattr(result, "prev_sample") else result[0])
            self._discard()

    def _speculate(self, module: int, spec: TreeSpec, leaves: list[Any]) -> None:
        """Begin to solve the steps that are left, at the first call of a step."""
        form, chain = self._form, self._chain
        if form is None or chain is None or chain.left < 2:
            return
        if self.networks.changed():
            self._miss("the denoiser itself changes")  # after it was observed
            return
        call = copy_call(module, spec, leaves, [], form.calls[0].output)
        if call.signature() == form.calls[0].signature():
            merger = self.networks.merger
            with _foreseen():
                self._speculation = Speculation(form, chain, call, merger, self.solver, self.tolerance)
            self._solved, self._shown = True, 0

    def _miss(self, difference: str) -> None:
        """Throw away what was solved, because the loop has gone another way."""
        self._discard()
        self.report.misses += 1
        self.report.reason = f"solved again because {difference}."
        if self.report.misses > MAX_MISSES + self._good_steps // STEPS_A_MISS:
            self.refused = True
            self._go_alone(f"{difference}.")

    def _discard(self) -> None:
        """Throw away what was solved, and count what it took."""
        speculation, self._speculation = self._speculation, None
        if speculation is not None:
            _count(self.report, speculation)
            self.rounding = speculation.rounding

    def _go_alone(self, reason: str) -> None:
        """Let the loop go on by itself."""
        self.alone = reason
        self._discard()
        self._observed, self._answered = None, []
        self._form = self._chain = None


@contextmanager
def _foreseen() -> Iterator[None]:
    try:
        yield
    except UNFORESEEN as error:
        raise NotParallelizable(f"its steps cannot be foreseen ({type(error).__name__}: {error}).") from error


def _conclude(report: Report, one_pass: OnePass, *, foreseen: bool) -> None:
    """Say how the loop went."""
    if foreseen:
        report.mode = "one pass"
        reason = ONE_STEP if one_pass.single else report.reason if report.misses else ""
        report.reason = one_pass.alone or reason
        bound = max(one_pass.tolerance, one_pass.rounding)
        if report.floor > bound:  # nothing is claimed below it
            report.error_estimate = max(report.error_estimate, report.floor)
            report.reason = f"{report.reason} {ABOVE_FLOOR}".lstrip()
        report.converged = report.error_estimate <= bound
    else:
        no_steps = NO_STEP if one_pass.networks.answers else NO_CALL
        report.mode, report.reason = "sequential", one_pass.alone or no_steps
        report.rounds, report.converged = 0, True


def _count(report: Report, speculation: Speculation) -> None:
    """Add what was solved ahead."""
    runs = speculation.runs
    report.rounds += max(run.rounds for run in runs)
    report.evaluations += sum(run.evaluations for run in runs) * report.samples // len(runs)
    report.peak_width = max(report.peak_width, *(run.peak_width for run in runs))
    report.error_estimate += speculation.error + speculation.distance
    report.floor = math.hypot(report.floor, speculation.floor())
