"""What is known of the steps that a loop will make, and what has been solved of them ahead of the loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..solvers.base import Solver
from .calls import Call, copy_call, copy_leaves, flatten_output
from .chain import Chain
from .deferred import deferred
from .loop import Loop
from .networks import Networks
from .observation import ObservedStep, StepForm
from .pins import Pins
from .report import Report
from .schedulers import SchedulerStep
from .signals import NotParallelizable, Unforeseeable
from .speculation import Speculation

__all__ = ["Foresight"]

MIN_STEPS = 8  # shorter loops run sequentially
MAX_MISSES = 3  # more than a loop may have without steps between them that went as expected
SMALLEST_SHARE = 0.05  # of the tolerance, for a solve behind others that were thrown away
STEPS_A_MISS = 8  # steps that went as expected and make up for a miss
FEW_BITS = (  # recording measures what that does to the result
    "its network computes in 16 bits within the loop, whose rounding moves samples by more than their steps show."
)
UNFORESEEN = (RuntimeError, ValueError, TypeError, IndexError)  # the loop must not meet what it would not meet alone


class Foresight:
    """The steps to come, as real ones have shown them, and their calls as far as they can be answered ahead.

    Args:
        loop: The loop.
        networks: Its denoisers.
        solver: How the steps are solved.
        tolerance: Relative error allowed in the result.
        report: To be filled in.

    Attributes:
        solved: Whether anything has been solved ahead.
        rounding: What is no error, whatever the tolerance.
    """

    def __init__(self, loop: Loop, networks: Networks, solver: Solver, tolerance: float, report: Report) -> None:
        self.loop, self.networks, self.report = loop, networks, report
        self.solver, self.tolerance = solver, tolerance
        self.solved, self.rounding = False, 0.0
        self._form: StepForm | None = None
        self._chain: Chain | None = None
        self._speculation: Speculation | None = None
        self._returned: Tensor | None = None  # what the scheduler has made of the latest real step
        # Calls of the present step that were answered ahead; None where nobody will look at the call again.
        self._answered: list[tuple[Call | None, list[Any]]] = []
        self._good_steps = 0
        self._shown = 0  # accepted steps, when progress was last shown

    @property
    def left(self) -> int:
        """Steps that the present scheduler has left; 0 while none has been observed."""
        return 0 if self._chain is None else self._chain.left

    def learn(self, observed: ObservedStep, result: Any) -> None:
        """Take from a real step, and from what the scheduler has returned, what they show.

        Raises:
            Unforeseeable: If that says nothing of the steps to come.
            NotParallelizable: If there are too few of them.
        """
        step, report = observed.step, self.report
        assert step is not None
        with _foreseen():
            try:
                form = self._form = observed.form()
                if form.few_bits:
                    raise NotParallelizable(FEW_BITS)
                if self._chain is None or not self._chain.expects(step):
                    chain = self._chain = Chain.begin(observed)
                    report.steps, report.samples = report.steps + chain.left, form.shape[0]
            except NotParallelizable as reason:
                raise Unforeseeable(str(reason)) from reason
            if report.steps <= MIN_STEPS:
                raise NotParallelizable(f"the loop has only {report.steps} steps.")
            self._chain.generator = step.generator
            self._chain.take(step, form, form.calls[0])
            self._returned = _state(result).clone()  # the loop may write into it

    def answer(self, module: int, spec: TreeSpec, leaves: list[Any]) -> Any:
        """Return what a call of a denoiser is answered, or None where it must be evaluated for itself.

        Raises:
            NotParallelizable: If the steps cannot be solved, or go another way too often.
        """
        if self._speculation is None:
            self._speculate(module, spec, leaves)
        speculation, answered = self._speculation, self._answered
        if speculation is None:
            return None
        place = len(answered)
        if self.networks.changed():
            difference: str | None = "the denoiser itself changes"
        elif place == speculation.width:
            difference = "the denoiser is called more often in a step"
        else:
            difference = speculation.difference(place, module, spec, leaves, [outputs for _, outputs in answered])
        if difference is None:
            needed = speculation.width > 1 or (self._chain is not None and self._chain.remembers)
            outputs: list[Any] | None
            if speculation.only_feeds(place):
                outputs = self._deferred(speculation.taken(place, leaves))
            else:
                outputs = speculation.answer(place, leaves)
            self.networks.look()
            if outputs is not None:
                answered.append((speculation.taken(place, leaves) if needed else None, outputs))
                return speculation.tree(place, outputs)
            difference = "the loop changes the state between the scheduler's steps"
        self.miss(difference)
        return None

    def _deferred(self, call: Call) -> list[Any]:
        """Return the outputs of a call that only goes into another one's arguments."""

        def evaluate() -> list[Any]:
            args, kwargs = call.arguments(copy_leaves(call.leaves))
            with torch.no_grad(), call.context():
                outputs = flatten_output(self.networks.real(call.module, args, kwargs))[0]
            self.networks.look()
            return outputs

        return deferred(call.output.leaves, evaluate)

    def begun_step(self) -> ObservedStep:
        """Return the present step with its calls that were answered ahead, and let go of them."""
        answered, self._answered = self._answered, []
        return ObservedStep.of([(call, outputs) for call, outputs in answered if call is not None])

    def take_step(self, step: SchedulerStep, result: Any) -> bool:
        """Take a step whose calls were answered ahead; return whether it is the one that was expected."""
        speculation, chain, answered = self._speculation, self._chain, self._answered
        self._answered = []
        if speculation is None or chain is None or not chain.expects(step) or len(answered) != speculation.width:
            self.miss("the scheduler's steps are others")
            return False
        chain.take(step, speculation.form, answered[0][0])
        speculation.take_step()
        self._good_steps += 1
        if speculation.accepted != self._shown:
            self._shown = speculation.accepted
            self.loop.on_round(speculation.first + self._shown, chain.count)
        if not chain.left:
            speculation.finish(_state(result))
            self.discard()
        return True

    def miss(self, difference: str) -> None:
        """Throw away what was solved, because the loop has gone another way.

        Raises:
            Unforeseeable: If it does that too often.
        """
        self.discard()
        self.report.misses += 1
        self.report.reason = f"solved again because {difference}."
        if self.report.misses > MAX_MISSES + self._good_steps // STEPS_A_MISS:
            raise Unforeseeable(f"{difference}.")

    def discard(self) -> None:
        """Throw away what was solved, and count what it took."""
        speculation, self._speculation = self._speculation, None
        if speculation is not None:
            _count(self.report, speculation)
            self.rounding = speculation.rounding

    def end(self) -> None:
        """Let go of everything: the loop goes on by itself."""
        self.discard()
        self._form = self._chain = self._returned = None
        self._answered = []

    def _tolerance_left(self) -> float:
        """Return what solves that were thrown away have left of the tolerance."""
        return max(self.tolerance - self.report.error_estimate, SMALLEST_SHARE * self.tolerance)

    def _speculate(self, module: int, spec: TreeSpec, leaves: list[Any]) -> None:
        """Begin to solve the steps that are left, at the first call of a step."""
        form, chain = self._form, self._chain
        if form is None or chain is None or chain.left < 2:
            return
        if self.networks.changed():
            self.miss("the denoiser itself changes")  # after it was observed
            return
        call = copy_call(module, spec, leaves, [], form.calls[0].output)
        if call.signature() == form.calls[0].signature():
            merger, returned, self._returned = self.networks.merger, self._returned, None
            with _foreseen():
                entered = form.inputs(call).view(form.shape)
                pins = None if returned is None else Pins.between(returned, entered)
                self._speculation = Speculation(form, chain, call, merger, self.solver, self._tolerance_left(), pins)
            self.solved, self._shown = True, 0


@contextmanager
def _foreseen() -> Iterator[None]:
    try:
        yield
    except UNFORESEEN as error:
        raise Unforeseeable(f"its steps cannot be foreseen ({type(error).__name__}: {error}).") from error


def _state(result: Any) -> Tensor:
    """Return the state behind a step, of what a scheduler's ``step`` returns."""
    state: Tensor = result.prev_sample if hasattr(result, "prev_sample") else result[0]
    return state


def _count(report: Report, speculation: Speculation) -> None:
    """Add what was solved ahead."""
    runs = speculation.runs
    report.rounds += max(run.rounds for run in runs)
    report.evaluations += sum(run.evaluations for run in runs) * report.samples // len(runs)
    report.peak_width = max(report.peak_width, *(run.peak_width for run in runs))
    report.error_estimate += speculation.error + speculation.distance
    report.floor = math.hypot(report.floor, speculation.floor())
