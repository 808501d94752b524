"""The rest of a loop's trajectory, solved ahead of the loop by the scheduler's own recurrence, round by round.

The loop's next call is answered as soon as its step is accepted: with the outputs that the solver holds, moved along
their slopes to the state that the loop has,

    f_k + e_k (u - u_k),        e_k = (d_k - p_k) / q_k

where u_k is the state at which f_k was evaluated and d_k the slope of what enters the recurrence, y = p u + q f. So the
loop goes the way of the accepted states by its own arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, upload
from ..engine.run import Run, drive, start
from ..samplers.recurrence import Recurrence
from ..samplers.sampler import Sampler
from ..solvers.base import Solver
from .calls import Call, CallKind, RecordedCalls, autocast_of
from .chain import Chain
from .equal_steps import EqualStepsEvaluator
from .known_outputs import KnownOutputs
from .merger import Merger
from .observation import StepForm
from .rows import RowMap, row_index
from .signals import NotParallelizable, RowsInteract
from .step_arguments import ArgumentRule, argument_rules, predicted_calls, same_argument
from .structure import Stage, Structure

__all__ = ["PredictedStep", "Speculation"]

SOLVERS_SHARE = 3 / 4  # of the tolerance; the rest is for the loop's way beside the accepted states
FLAT = 1e-3  # derivative of a clipped prediction below which no output moves it
ROUNDING = 32  # ulps by which the loop's state may differ from the accepted one, whatever the tolerance


@dataclass(frozen=True, eq=False)
class PredictedStep:
    """What every step to come is taken to be.

    Attributes:
        form: How states, rows and outputs belong together.
        calls: The calls of a step, with the arguments of the present one.
        rules: Their leaves that change with the step.
    """

    form: StepForm
    calls: list[Call]
    rules: list[dict[int, ArgumentRule]]


class Speculation:
    """The steps from ``first`` on, as far as they have been solved.

    Args:
        predicted: What the steps are.
        sampler: Of these steps: its first one is ``first``.
        recurrence: Of these steps, with their noise.
        first: Number of the first step, in the scheduler's timesteps.
        merger: Makes the network calls.
        solver: How the steps are solved.
        tolerance: Relative error allowed to the solver and to the loop's way beside it.
    """

    def __init__(
        self,
        predicted: PredictedStep,
        sampler: Sampler,
        recurrence: Recurrence,
        first: int,
        merger: Merger,
        solver: Solver,
        tolerance: float,
    ) -> None:
        form = self.form = predicted.form
        self.predicted, self.sampler, self.first, self.merger = predicted, sampler, first, merger
        self.solver, self.tolerance = solver, SOLVERS_SHARE * tolerance
        self.rounding = ROUNDING * float(torch.finfo(form.network_dtype).eps)
        self.share = max(tolerance, self.rounding)
        self.distance = 0.0  # of the loop's latest state from the accepted one, relative
        self.answered = 0  # steps
        steps = range(first, first + sampler.steps)
        self.calls = _PredictedCalls(
            predicted_calls(predicted.calls, predicted.rules, steps),
            form.row_maps * sampler.steps,
            len(predicted.calls),
        )
        self.structure = _structure(form, self.calls, sampler)
        self.known = KnownOutputs(self.structure)
        # Of accepted steps: states (S, dim), their norms (S,), and slopes (S, 1) or (S, dim) or None.
        self._ready: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._recurrence = recurrence
        self._begin()

    @classmethod
    def begin(
        cls, form: StepForm, chain: Chain, call: Call, merger: Merger, solver: Solver, tolerance: float
    ) -> Speculation:
        """Begin to solve the steps that a chain has left.

        Args:
            form: Of its steps, as the latest real one has shown it.
            chain: The scheduler's steps.
            call: The first call of the next step.
            merger: Makes the network calls.
            solver: How the steps are solved.
            tolerance: Relative error allowed in all.
        """
        calls = [call, *form.calls[1:]]
        rules = [
            argument_rules(before, now, chain.times, chain.step, {row_map.slices[0].leaf})
            for before, now, row_map in zip(form.calls, calls, form.row_maps, strict=True)
        ]
        sampler, recurrence = chain.recurrence(form.inputs(call).view(form.shape))
        predicted = PredictedStep(form, calls, rules)
        return cls(predicted, sampler, recurrence, chain.step, merger, solver, tolerance)

    def __repr__(self) -> str:
        """Return how far it has come."""
        return f"Speculation(steps {self.first} to {self.first + self.sampler.steps}, {self.answered} answered)"

    @property
    def width(self) -> int:
        """Calls of a step."""
        return len(self.predicted.calls)

    @property
    def error(self) -> float:
        """The solver's estimate of the relative error of the sample accepted so far."""
        return max(run.error for run in self.runs)

    @property
    def accepted(self) -> int:
        """How many of these steps are accepted for all samples."""
        return min(self.sampler.steps if run.done else run.accepted for run in self.runs)

    def difference(self, call: int, module: int, spec: Any, leaves: Sequence[Any]) -> str | None:
        """Return what of a call is not as it was expected, except the state; None if nothing is.

        Args:
            call: Number of the call in the present step.
            module: Which denoiser is called.
            spec: Form of its arguments.
            leaves: Their leaves.
        """
        if self.answered == self.sampler.steps:
            return "the loop goes on behind the scheduler's last step"
        expected = self.calls.calls[self.answered * self.width + call]
        same_form = spec is expected.spec or spec == expected.spec
        if module != expected.module or not same_form or autocast_of(leaves) != expected.autocast:
            return "the denoiser is called in another form"
        return _differing_argument(expected, leaves, self.form.row_maps[call], self.predicted.rules[call])

    def taken(self, call: int, leaves: Sequence[Any]) -> Call:
        """Return a call of the present step that is as it was expected, with a copy of its state."""
        expected, place = self.calls.calls[self.answered * self.width + call], self.form.row_maps[call].slices[0].leaf
        copies = list(expected.leaves)
        copies[place] = leaves[place].detach().clone()
        feeds = {leaf: (feeder % self.width, output) for leaf, (feeder, output) in expected.feeds.items()}
        return Call(expected.module, expected.spec, copies, feeds, expected.autocast, expected.output)

    def answer(self, call: int, leaves: Sequence[Any]) -> list[Any] | None:
        """Return the output leaves of a call of the present step, or None if its state is not the accepted one."""
        step, number = self.answered, self.answered * self.width + call
        if call not in self.form.solved:  # it only goes into another call's arguments, which is not evaluated now
            return [
                leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.structure.outputs[number].leaves
            ]
        self.advance(step + 1)
        if step not in self._ready:
            self._prepare(range(step, self.accepted))
        accepted, size, slopes = self._ready[step]
        row_map = self.form.row_maps[call]
        states = row_map.states(leaves, self.structure.dtype)
        if self.structure.samples > 1:
            index = row_index(row_map.sample_of_row, states)
            accepted, size = accepted[index], size[index]
        distance = float((torch.linalg.vector_norm(states - accepted, dim=1) / size).max())
        if not distance <= self.share:  # or not a number
            return None
        self.distance = distance
        return self.known.answer(number, step, states, slopes)

    def _prepare(self, steps: range) -> None:
        """Make ready to answer accepted steps: all that belongs to them stays as it is from now on."""
        inputs = self.known.inputs_at_evaluation
        held = [inputs[step] if (state := self.states.of(step)) is None else state for step in steps]
        states = torch.stack([state for state in held if state is not None])  # one of the two is always there
        sizes = torch.linalg.vector_norm(states, dim=2).clamp(min=1e-30)
        evaluated = [step for step in steps if self.known.evaluated[step].all()]
        slopes = (
            dict(zip(evaluated, _raw_slopes(self.form, self.sampler, self.known, evaluated), strict=True))
            if evaluated
            else {}
        )
        for step, state, size in zip(steps, states, sizes, strict=True):
            self._ready[step] = state, size, slopes.get(step)

    def take_step(self) -> None:
        """Go on to the next step: all calls of the present one have been answered."""
        self.states.forget(self.answered)
        self.known.forget(self.answered)
        self._ready.pop(self.answered, None)
        self.answered += 1

    def finish(self, state: Tensor) -> None:
        """Compare the scheduler's last state with the one that was solved for."""
        solution = torch.stack([run.solution.x for run in self.runs]).view(self.structure.samples, -1)
        last = state.detach().to(solution.dtype).flatten(1)[: len(solution)]
        distances = (last - solution).norm(dim=1) / last.norm(dim=1).clamp(min=1e-30)
        self.distance = float(distances.max())

    def advance(self, steps: int) -> None:
        """Make rounds until so many steps are accepted."""
        while self.accepted < steps:
            try:
                next(self._rounds)
            except RowsInteract:
                self.structure.joint_samples = True
                self._begin()
            except Exception as error:
                # What a network says to steps that the loop may never make: the loop will find out by itself.
                raise NotParallelizable(f"solving ahead raised {type(error).__name__}: {error}") from error

    def _begin(self) -> None:
        """Begin to solve."""
        structure, form = self.structure, self.form
        recurrence, transform = self._recurrence, self.sampler.transform
        if structure.joint_samples:
            noise = recurrence.noise
            noise = None if noise is None else noise.transpose(0, 1)[None]
            recurrence = Recurrence(recurrence.coefficients, recurrence.start[None], noise)
        p, q = (0.0, 1.0) if transform is None else (transform.x0_from_input, transform.x0_from_output)
        zeros = np.zeros(self.sampler.steps)
        held = _HeldRecurrence(
            recurrence.coefficients, recurrence.start, recurrence.noise, self.known, p + zeros, q + zeros
        )
        self.states = _AcceptedStates(structure.samples, recurrence.start)
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
        stage = Stage(structure, 0, self.calls)
        varying = {leaf for rules in self.predicted.rules for leaf in rules}
        self._rounds = drive(self.runs, EqualStepsEvaluator(stage, self.known, self.merger, varying))


class _PredictedCalls(RecordedCalls):
    """Calls that are the same at every step, except in arguments that are known."""

    def __init__(self, calls: list[Call], row_maps: list[Any], width: int) -> None:
        super().__init__(calls, row_maps)
        # Two steps as far apart as possible show which arguments differ; all others are like them.
        last = len(calls) - width
        ends = RecordedCalls([*calls[:width], *calls[last:]], row_maps[: 2 * width])
        kinds: dict[int, CallKind] = {}
        for c in range(width):
            kind = ends.kinds[c]
            if ends.kinds[width + c] is not kind:  # something else differs between steps: none is batched
                return
            members = list(range(c, len(calls), width))
            same = next((other for other in kinds.values() if other.key == kind.key), None)
            kind = CallKind(kind.key, kind.name, kind.roles, members, kind.ambiguous) if same is None else same
            if same is not None:
                same.members = sorted({*same.members, *members})
            kinds |= dict.fromkeys(members, kind)
        self.__dict__["kinds"] = kinds


@dataclass(frozen=True, eq=False)
class _HeldRecurrence(Recurrence):
    """A recurrence whose corrections leave their slopes with the evaluations."""

    known: KnownOutputs | None = None
    p: Array | None = None
    q: Array | None = None

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes of raw outputs."""
        assert self.known is not None
        assert self.p is not None
        assert self.q is not None
        steps = np.minimum(first[:, None] + np.arange(slopes.shape[1]), len(self.p) - 1)
        total = float(self.known.structure.guidance_weights[0].sum())
        raw = (slopes - self.p[steps]) / self.q[steps] / total
        self.known.set_slopes(sample, first, counts, raw)


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
            if count <= states.shape[1]:
                for j in range(count):
                    self._states[place][before + j + 1] = states[row, j].clone()

    def of(self, step: int) -> Tensor | None:
        """Return (S, dim) the states of a step, or None where they were not kept."""
        rows = [states[step] for states in self._states if step in states]
        return torch.stack(rows).view(self.samples, -1) if len(rows) == len(self._states) else None

    def forget(self, step: int) -> None:
        """Let go of a step."""
        for states in self._states:
            states.pop(step, None)


def _structure(form: StepForm, calls: RecordedCalls, sampler: Sampler) -> Structure:
    """Return the structure of the steps to come."""
    width = len(form.calls)
    steps = sampler.steps
    return Structure(
        signatures=[],  # calls are compared with those expected
        outputs=[call.output for call in calls.calls],
        row_maps=form.row_maps * steps,
        feeds=[call.feeds for call in calls.calls],
        calls_of_step=[[i * width + c for c in form.solved] for i in range(steps)],
        step_of_call=[c // width for c in range(steps * width)],
        samples=form.shape[0],
        dim=int(np.prod(form.shape[1:])),
        dtype=form.dtype,
        network_dtype=form.network_dtype,
        coefficients=sampler.coefficients,
        linear=True,
        guidance_weights=[form.weights] * steps,
        ends_with_state=True,
        slopes=np.zeros(steps),
    )


def _same_beside(now: Tensor, then: Tensor, box: tuple[slice, ...]) -> bool:
    """Return whether everything but the state is the same."""
    beside = torch.ones(now.shape, dtype=torch.bool, device=now.device)
    beside[box] = False
    return bool((now[beside] == then[beside]).all())


def _raw_slopes(form: StepForm, sampler: Sampler, known: KnownOutputs, steps: list[int]) -> Tensor:
    """Return the slopes of raw outputs at evaluated steps: (K, S, 1), or (K, S, dim) where predictions are clipped.

    What enters the recurrence, y = xhat + g (clipped(xhat) - xhat), is to move by d (u - u_k). Its derivative D by
    xhat is not the same for all elements, so xhat has to move by d / D, or not at all where D is 0.
    """
    transform, width = sampler.transform, len(form.calls)
    inputs = torch.stack([state for step in steps if (state := known.inputs_at_evaluation[step]) is not None])
    slopes = upload(known.slopes[steps], inputs).unsqueeze(2)
    if transform is None or (transform.clip is None and transform.quantile is None):
        return slopes
    combined, before = torch.zeros_like(inputs), 0
    for c in form.solved:
        row_map = form.row_maps[c]
        weights = upload(form.weights[row_map.guidance_index + before], combined).unsqueeze(1)
        before += int(row_map.guidance_index.max()) + 1
        place = row_map.slices[0]
        outputs = [(known.outputs[step * width + c] or [])[place.output] for step in steps]
        rows = torch.cat(outputs)[place.answer].reshape(len(steps), row_map.rows, -1).to(form.dtype)
        combined.index_add_(1, upload(row_map.sample_of_row, combined.device), rows * weights)
    p, q, gain = upload(transform.columns[:, steps], inputs).view(3, -1, 1, 1)
    data = p * inputs + q * combined
    if transform.quantile is None:
        limit, shrink = torch.full_like(p, transform.clip or 0.0), torch.ones_like(p)
    else:
        limit = torch.quantile(data.abs(), transform.quantile, dim=2, keepdim=True).clamp(1.0, transform.largest)
        shrink = 1 / limit
    derivative = torch.where(data.abs() > limit, 1 - gain, 1 + gain * (shrink - 1))
    q = q * float(form.weights.sum())
    slopes = torch.where(derivative.abs() > FLAT, (slopes * q + p) / derivative, 0.0)
    return (slopes - p) / q


def _differing_argument(
    expected: Call, leaves: Sequence[Any], row_map: RowMap, rules: dict[int, ArgumentRule]
) -> str | None:
    """Return what of a call's arguments is not as it was expected, except the state."""
    place = row_map.slices[0]
    for i, (now, then) in enumerate(zip(leaves, expected.leaves, strict=True)):
        if i in expected.feeds:
            continue  # it is what an earlier call of the step was answered
        if i == place.leaf:
            same = isinstance(now, Tensor) and now.shape == then.shape and now.dtype == then.dtype
            if not same or (now.numel() != now.shape[0] * place.size and not _same_beside(now, then, place.state)):
                return "what stands beside the state in the denoiser's input changes"
        elif not same_argument(then, now, is_time=i in rules):
            return f"an argument of the denoiser changes in a way that is not known ({type(now).__name__})"
    return None
