"""The rest of a loop's trajectory, solved ahead of the loop by the scheduler's own recurrence, round by round.

The loop's next call is answered as soon as its step is accepted: with the outputs that the solver holds, moved along
their slopes to the state that the loop has,

    f_k + e_k (u - u_k),        e_k = (d_k - p_k) / q_k

where u_k is the state at which f_k was evaluated and d_k the slope of what enters the recurrence, y = p u + q f. So the
loop goes the way of the accepted states by its own arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..arrays import Array, Indices, upload
from ..engine.rows import EvalBatch
from ..engine.run import Run, drive, start
from ..samplers.recurrence import Recurrence
from ..solvers.base import Solver
from .calls import Call, CallKind, RecordedCalls
from .chain import Chain
from .deferred import DeferredOutput
from .equal_steps import EqualSteps, are_equal
from .general_steps import GeneralSteps
from .merger import Merger
from .observation import StepForm
from .pins import Pins
from .rows import SMALLEST
from .signals import NotParallelizable, RowsInteract
from .step_arguments import ExpectedCall, argument_tables

__all__ = ["Speculation"]

# Of the tolerance: the solver's, which plans for less than it may report, and of the loop's way beside the accepted
# states.
SOLVERS_SHARE, LOOPS_SHARE = 0.8, 0.1
TOGETHER = 1 << 18  # elements of states that are made ready to be answered at a time: their copies take memory
ROUNDING = 32  # ulps by which the loop's state may differ from the accepted one, whatever the tolerance


class Speculation:
    """The steps from the next one of a chain on, as far as they have been solved.

    Args:
        form: Of the steps, as the latest real one has shown it.
        chain: The steps.
        call: The first call of the next one.
        merger: Makes the network calls.
        solver: How the steps are solved.
        tolerance: Relative error allowed in all: to the solver, and to the loop's way beside the accepted states.
        pins: Entries that the loop sets before every call, or None.

    Attributes:
        first: Number of the next step in the scheduler's timesteps.
        accepted: How many steps are accepted for all samples.
        answered: Steps whose calls have all been answered.
        distance: Of the loop's latest state from the accepted one, relative.
    """

    def __init__(
        self,
        form: StepForm,
        chain: Chain,
        call: Call,
        merger: Merger,
        solver: Solver,
        tolerance: float,
        pins: Pins | None = None,
    ) -> None:
        self.form, self.first, self.merger = form, chain.step, merger
        self.solver, self.tolerance = solver, SOLVERS_SHARE * tolerance
        self.rounding = ROUNDING * float(torch.finfo(form.network_dtype).eps)
        self.share = max(LOOPS_SHARE * tolerance, self.rounding)
        self.distance = 0.0
        self.answered = self.accepted = self._prepared = 0
        self._rounds: Iterator[int] = iter(())
        self._errors = _AcceptedErrors()
        self.states: _AcceptedStates
        self.sampler, self._recurrence = chain.recurrence(form.inputs(call).view(form.shape))
        self.pins = pins if Pins.can_hold(self.sampler) else None
        self._expected = [
            ExpectedCall(now, row_map, argument_tables(before, now, chain.times, chain.step, {row_map.slices[0].leaf}))
            for before, now, row_map in zip(form.calls, [call, *form.calls[1:]], form.row_maps, strict=True)
        ]
        try:
            self._begin(joint=False)
        except RowsInteract:
            self._begin(joint=True)

    def __repr__(self) -> str:
        """Return how far it has come."""
        return f"Speculation(steps {self.first} to {self.first + self.sampler.steps}, {self.answered} answered)"

    @property
    def width(self) -> int:
        """Calls of a step."""
        return len(self._expected)

    @property
    def error(self) -> float:
        """The solver's estimate of the relative error that the answered steps leave in the sample."""
        return self._errors.behind(self.answered)

    def difference(
        self, call: int, module: int, spec: TreeSpec, leaves: Sequence[Any], answered: Sequence[Sequence[Any]]
    ) -> str | None:
        """Return what of a call is not as it was expected, except the state; None if nothing is.

        Args:
            call: Number of the call in the present step.
            module: Which denoiser is called.
            spec: Form of its arguments.
            leaves: Their leaves.
            answered: Output leaves of the calls of this step so far.
        """
        if self.answered == self.sampler.steps:
            return "the loop goes on behind the scheduler's last step"
        for leaf, (feeder, output) in self.form.calls[call].feeds.items():
            value = leaves[leaf]
            if value is not answered[feeder][output] or not isinstance(value, DeferredOutput) or value.fill is None:
                return "the output of one denoiser is changed before it goes to another"
        return self._expected[call].difference(self.first + self.answered, module, spec, leaves)

    def taken(self, call: int, leaves: Sequence[Any]) -> Call:
        """Return a call of the present step that is as it was expected, with a copy of its state."""
        return self._expected[call].with_state(self.first + self.answered, leaves)

    def answer(self, call: int, leaves: Sequence[Any]) -> list[Any] | None:
        """Return the output leaves of a call of the present step, or None if its state is not the accepted one."""
        step = self.answered
        if step >= self._prepared:
            if step and not self._is_near(step, call, leaves):  # it would be a round for nothing
                return None
            self.advance(step + 1)
            self._prepare()
        outputs, distance = self.steps.answer(step, call, leaves, self.share)
        if outputs is not None:
            self.distance = distance
        return outputs

    def only_feeds(self, call: int) -> bool:
        """Return whether the outputs of a call of a step only go into another one's arguments."""
        return call not in self.form.solved

    def tree(self, call: int, outputs: list[Any]) -> Any:
        """Return output leaves in the form in which a call of a step returns them."""
        return self._expected[call].call.output.tree(outputs)

    def take_step(self) -> None:
        """Go on to the next step: all calls of the present one have been answered."""
        self.steps.forget(self.answered)
        self.answered += 1

    def finish(self, state: Tensor) -> None:
        """Compare the scheduler's last state with the one that was solved for."""
        solution = torch.stack([run.solution.x for run in self.runs]).view(self.form.shape[0], -1)
        last = state.detach().to(solution.dtype).flatten(1)[: len(solution)]
        if self.pins is not None:  # the loop sets them after this
            solution, last = self.pins.put(solution), self.pins.put(last)
        distances = (last - solution).norm(dim=1) / last.norm(dim=1).clamp(min=SMALLEST)
        self.distance = float(distances.max())

    def floor(self) -> float:
        """Return what the rounding of outputs does to the states, relative; 0 before any step is answered."""
        return self.steps.floor(self.answered) if self.answered else 0.0

    def advance(self, steps: int) -> None:
        """Make rounds until so many steps are accepted."""
        while self.accepted < steps:
            try:
                next(self._rounds)
            except RowsInteract:
                self._begin(joint=True)
            except Exception as error:
                # What a network says to steps that the loop may never make: the loop will find out by itself.
                raise NotParallelizable(f"solving ahead raised {type(error).__name__}: {error}") from error
            self.accepted = min(self.sampler.steps if run.done else run.accepted for run in self.runs)
            self._errors.take(self.accepted, max(run.error for run in self.runs))

    def _is_near(self, step: int, call: int, leaves: Sequence[Any]) -> bool:
        """Return whether a call has the state of a step that is not accepted yet, as far as it is known."""
        held = self._held(range(step, step + 1))
        if held is None:
            return True
        row_map, expected = self.form.row_maps[call], held[0]
        states = row_map.states(leaves, self.form.dtype)
        if len(states) > 1:
            expected = expected.index_select(0, upload(row_map.sample_of_row, states.device))
        distances, sizes = (rows.norm(dim=1).tolist() for rows in (states - expected, expected))
        # A distance that is not a number is not near.
        return all(
            distance <= self.share * max(size, SMALLEST) for distance, size in zip(distances, sizes, strict=True)
        )

    def _held(self, steps: range) -> Tensor | None:
        """Return (M, S, dim) the accepted states of steps as the loop will have them, or None if they are not known."""
        held = self.states.of(steps)
        return held if held is None or self.pins is None else self.pins.put(held)

    def _prepare(self) -> None:
        """Make ready to answer the steps that have been accepted since."""
        together = max(1, TOGETHER // math.prod(self.form.shape))
        for first in range(self._prepared, self.accepted, together):
            steps = range(first, min(first + together, self.accepted))
            held = self._held(steps)
            self.steps.prepare(steps, torch.stack([self.steps.inputs(i) for i in steps]) if held is None else held)
            for step in steps:
                self.states.forget(step)
        self._prepared = self.accepted

    def _begin(self, *, joint: bool) -> None:
        """Begin to solve."""
        form, recurrence, count = self.form, self._recurrence, self.sampler.steps
        self.accepted, self._prepared = 0, self.answered
        recorded = _PredictedCalls(self._expected, range(self.first, self.first + count))
        self.steps: EqualSteps | GeneralSteps
        if not joint and are_equal(form, self._expected[0], recorded):
            self.steps = EqualSteps(form, self._expected[0], recorded, self.first, self.sampler, self.merger)
        else:
            self.steps = GeneralSteps(form, recorded, self.sampler, self.merger, joint=joint)
        if joint:
            noise = recurrence.noise
            noise = None if noise is None else noise.transpose(0, 1)[None]
            recurrence = Recurrence(recurrence.coefficients, recurrence.start[None], noise)
        held = _HeldRecurrence(recurrence.coefficients, recurrence.start, recurrence.noise, self.steps)
        self.states = _AcceptedStates(form.shape[0], recurrence.start)
        epsilon = float(torch.finfo(form.network_dtype).eps)
        self.runs: list[Run] = start(
            self.sampler,
            held,
            self.solver,
            tolerance=self.tolerance,
            rounding=epsilon / 2,
            generator=torch.Generator("cpu").manual_seed(0),  # what the solver itself draws: not the loop's numbers
        )
        self.runs[0].group.batch.on_accept = self.states.take
        evaluate: Callable[[EvalBatch], Tensor] = self.steps.evaluate
        if self.pins is not None:
            evaluate = self.pins.around(evaluate, self.sampler, joint=joint)
        self._rounds = drive(self.runs, evaluate)


class _CallsAhead(Sequence[Call]):
    """The calls of steps, each made when it is asked for: the steps that are solved by their form need few of them."""

    def __init__(self, expected: Sequence[ExpectedCall], steps: range) -> None:
        self._expected, self._steps = expected, steps
        self._made: dict[int, Call] = {}

    def __len__(self) -> int:
        return len(self._expected) * len(self._steps)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number not in self._made:
            step, call = divmod(number, len(self._expected))
            self._made[number] = self._expected[call].at(self._steps[step], number - call)
        return self._made[number]


class _PredictedCalls(RecordedCalls):
    """The calls of all steps to come: the same at every step, except in arguments that are known."""

    def __init__(self, expected: Sequence[ExpectedCall], steps: range) -> None:
        width = len(expected)
        calls, row_maps = _CallsAhead(expected, steps), [call.row_map for call in expected]
        super().__init__(calls, row_maps * len(steps))
        feeding = {feeder for call in expected for feeder, _ in call.call.feeds.values()}
        self.__dict__["feeding"] = {c for c in range(len(calls)) if c % width in feeding}
        # Two steps as far apart as possible show which arguments differ; all others are like them.
        last = len(calls) - width
        ends = RecordedCalls([*calls[:width], *calls[last:]], row_maps * 2)
        kinds: dict[int, CallKind] = {}
        for c in range(width):
            kind = ends.kinds[c]
            if ends.kinds[width + c] is not kind:  # something else differs between steps: none is batched
                return
            members = list(range(c, len(calls), width))
            same = next((other for other in kinds.values() if other.key == kind.key), None)
            kind = replace(kind, members=members) if same is None else same
            if same is not None:
                same.members = sorted({*same.members, *members})
            kinds |= dict.fromkeys(members, kind)
        self.__dict__["kinds"] = kinds


@dataclass(frozen=True, eq=False)
class _HeldRecurrence(Recurrence):
    """A recurrence whose corrections leave their slopes with the steps."""

    steps: EqualSteps | GeneralSteps | None = None

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes."""
        assert self.steps is not None
        self.steps.note_slopes(sample, first, counts, slopes)

    def note_growth(
        self, sample: Indices, first: Indices, counts: Indices, measured: Callable[[], tuple[Array, Array]]
    ) -> None:
        """Keep by how much errors grow."""
        assert self.steps is not None
        self.steps.growth.note(sample, first, counts, *measured())


class _AcceptedErrors:
    """Estimated errors after every round: what was accepted but thrown away is no error of the loop."""

    def __init__(self) -> None:
        self._rounds: list[tuple[int, float]] = []

    def take(self, accepted: int, error: float) -> None:
        """Take how many steps are accepted after a round, and the estimate of their error in the sample."""
        self._rounds.append((accepted, error))

    def behind(self, steps: int) -> float:
        """Return the estimate of the first round behind which so many steps were accepted."""
        return next(error for accepted, error in self._rounds if accepted >= steps) if steps else 0.0


class _AcceptedStates:
    """The accepted states that the loop has not come to yet."""

    def __init__(self, samples: int, begin: Tensor) -> None:
        self.samples = samples
        self._states = [{0: row} for row in begin.flatten(1)]  # of each run
        self._counts = [0] * len(begin)

    def take(self, places: Indices, counts: Indices, states: Tensor) -> None:
        """Take states that a solver accepts; some solvers give only the last one."""
        for row, (place, count) in enumerate(zip(places.tolist(), counts.tolist(), strict=True)):
            before = self._counts[place]
            self._counts[place] = before + count
            kept_states = min(count, states.shape[1])
            for j, state in enumerate(states[row, :kept_states].unbind(), before + 1 + count - kept_states):
                self._states[place][j] = state.clone()  # each by itself: the last one stays longer

    def of(self, steps: range) -> Tensor | None:
        """Return (M, S, dim) the states of steps, or None where they were not all kept."""
        rows = [states[step] for step in steps for states in self._states if step in states]
        if len(rows) < len(steps) * len(self._states):
            return None
        return (torch.stack(rows) if len(rows) > 1 else rows[0]).view(len(steps), self.samples, -1)

    def forget(self, step: int) -> None:
        """Let go of a step."""
        for states in self._states:
            states.pop(step, None)
