"""Steps of any form, evaluated and answered by recorded calls: several calls a step, and calls that feed others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, read, upload
from ..engine.rows import EvalBatch
from ..samplers.sampler import Sampler
from .calls import RecordedCalls
from .evaluate import StageEvaluator
from .known_outputs import KnownOutputs
from .merger import Merger
from .observation import StepForm
from .output_slopes import ErrorGrowth, OutputSlopes, relative_floor
from .rows import SMALLEST, row_index
from .structure import Stage, Structure

__all__ = ["GeneralSteps"]


class GeneralSteps:
    """Evaluates steps, keeps their outputs, and answers the loop's calls from them.

    Args:
        form: How states, rows and outputs belong together.
        calls: Of all steps, one step behind the other.
        sampler: Of these steps.
        merger: Makes the network calls.
        joint: Whether samples cannot be evaluated apart.

    Attributes:
        growth: Of errors.
    """

    def __init__(
        self, form: StepForm, calls: RecordedCalls, sampler: Sampler, merger: Merger, *, joint: bool = False
    ) -> None:
        self.form, self.sampler = form, sampler
        self.structure = _structure(form, calls, sampler)
        self.structure.joint_samples = joint
        self.known = KnownOutputs(self.structure)
        self._evaluate = StageEvaluator(Stage(self.structure, 0, calls), self.known, merger)
        self._merger = merger
        self._output_slopes = OutputSlopes(sampler, float(form.weights.sum()))
        shape = sampler.steps, self.structure.samples
        self._solved_slopes = np.zeros(shape)  # d
        self.growth = ErrorGrowth(*shape, joint=joint)
        self._output_norms: Tensor | None = None  # (N S,) of combined outputs
        self._sizes: Tensor | None = None  # (S,) of the latest answered states
        # Of accepted steps: states (S, dim), their norms (S,), and slopes (S, 1) or (S, dim) or None.
        self._ready: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def evaluate(self, batch: EvalBatch) -> Tensor:
        """Evaluate rows of steps, in the same shape."""
        outputs = self._evaluate(batch)
        samples, step = self.structure.samples, batch.step.numpy()
        joint = self.structure.joint_samples
        places = (
            (step[:, None] * samples + np.arange(samples)).ravel() if joint else step * samples + batch.sample.numpy()
        )
        norms = torch.linalg.vector_norm(outputs.reshape(len(places), -1), dim=1)
        if self._output_norms is None:
            self._output_norms = norms.new_zeros(self._solved_slopes.size)
        self._output_norms.index_copy_(0, upload(places, norms.device), norms)
        return outputs

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes of a correction; see :meth:`Recurrence.note_slopes`."""
        raw = [
            self._output_slopes.scalar(slice(start, start + count), row[:count, None])[:, 0]
            for start, count, row in zip(first, counts, slopes, strict=True)
        ]
        self.known.set_slopes(sample, first, counts, raw)
        for s, start, count, row in zip(sample.tolist(), first.tolist(), counts.tolist(), slopes, strict=True):
            column = slice(None) if self.structure.joint_samples else slice(s, s + 1)
            self._solved_slopes[start : start + count, column] = row[:count, None]

    def inputs(self, step: int) -> Tensor:
        """Return (S, dim) the states at which a step was evaluated last."""
        inputs = self.known.inputs_at_evaluation[step]
        assert inputs is not None
        return inputs

    def prepare(self, steps: range, states: Tensor) -> None:
        """Make ready to answer accepted steps at states (M, S, dim): all that belongs to them stays as it is now."""
        sizes = torch.linalg.vector_norm(states, dim=2).clamp(min=SMALLEST)
        evaluated = [step for step in steps if self.known.evaluated[step].all()]
        slopes = dict(zip(evaluated, self._slopes(evaluated), strict=True)) if evaluated else {}
        for step, state, size in zip(steps, states, sizes, strict=True):
            self._ready[step] = state, size, slopes.get(step)

    def answer(self, step: int, call: int, leaves: Sequence[Any], share: float) -> tuple[list[Any] | None, float]:
        """Return the output leaves of a call of a step that is ready, and how far its state is from the accepted one.

        None if that is further than ``share``.
        """
        accepted, size, slopes = self._ready[step]
        self._sizes = size
        row_map = self.form.row_maps[call]
        states = row_map.states(leaves, self.structure.dtype)
        if self.structure.samples > 1:
            index = row_index(row_map.sample_of_row, states)
            accepted, size = accepted[index], size[index]
        distance = float((torch.linalg.vector_norm(states - accepted, dim=1) / size).max())
        if not distance <= share:  # or not a number
            return None, distance
        return self.known.answer(step * len(self.form.calls) + call, step, states, slopes), distance

    def floor(self, steps: int) -> float:
        """Return what the rounding of the outputs of the first steps does to the states behind them, relative."""
        assert self._output_norms is not None
        assert self._sizes is not None
        measured = [layout.rounding for layout in self._merger.checked.values()]
        rounding = max([float(torch.finfo(self.form.network_dtype).eps) / 2, *measured])
        norms, sizes = read(self._output_norms).reshape(self._solved_slopes.shape)[:steps], read(self._sizes)
        return relative_floor(self.sampler, self._solved_slopes, rounding * norms, sizes, self.growth.beyond(rounding))

    def forget(self, step: int) -> None:
        """Let go of a step."""
        self._ready.pop(step, None)
        self.known.forget(step)

    def _slopes(self, steps: list[int]) -> Tensor:
        """Return the slopes of outputs at evaluated steps: (M, S, 1), or (M, S, dim) where predictions are clipped."""
        known, width = self.known, len(self.form.calls)
        inputs = torch.stack([self.inputs(step) for step in steps])
        if not self._output_slopes.by_element:
            return upload(known.slopes[steps], inputs).unsqueeze(2)
        combined, before = torch.zeros_like(inputs), 0
        for c in self.form.solved:
            row_map = self.form.row_maps[c]
            weights = upload(self.form.weights[row_map.guidance_index + before], combined).unsqueeze(1)
            before += int(row_map.guidance_index.max()) + 1
            place = row_map.slices[0]
            outputs = [(known.outputs[step * width + c] or [])[place.output] for step in steps]
            rows = torch.cat(outputs)[place.answer].reshape(len(steps), row_map.rows, -1).to(self.form.dtype)
            combined.index_add_(1, upload(row_map.sample_of_row, combined.device), rows * weights)
        chosen = np.array(steps)
        return self._output_slopes(chosen, inputs, combined, self._output_slopes.slopes(known.slopes[steps], chosen))


def _structure(form: StepForm, calls: RecordedCalls, sampler: Sampler) -> Structure:
    """Return the structure of the steps to come."""
    width, steps = len(form.calls), sampler.steps
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
        unit=float(torch.finfo(form.network_dtype).eps),
    )
