"""Steps of one call each that differ in nothing but the state and the time: evaluated and answered without detours.

A round is one batch that is made in one go. When its steps are accepted, all their answers are made ready together
(:mod:`.ready_steps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, upload
from ..engine.executor import call_size, out_of_memory
from ..engine.rows import EvalBatch
from ..samplers.sampler import Sampler
from .batch import Layout
from .calls import RecordedCalls, copy_leaves, equal
from .evaluated_rounds import EvaluatedRounds
from .merger import Merger
from .observation import StepForm
from .output_slopes import ErrorGrowth
from .ready_steps import ReadySteps
from .rows import has_rows
from .signals import NotParallelizable
from .step_arguments import ExpectedCall
from .step_batch import StepBatch

__all__ = ["EqualSteps", "are_equal"]


class EqualSteps:
    """Evaluates steps, keeps their outputs, and answers the loop's calls from them.

    The real call that was observed is evaluated once more in the first batch: so the layout of the batch is checked,
    and what a batch changes in an output is measured.

    Args:
        form: How states, rows and outputs belong together: one call a step.
        call: What every call is expected to be.
        recorded: The calls of all steps.
        first: Number of the first step in the scheduler's timesteps.
        sampler: Of the steps.
        merger: Makes the network calls.

    Attributes:
        rounding: How far the combined rows of the observed call came out of the batch from what they were by
            themselves, relative, but at least the unit roundoff of the network.
        growth: Of errors.
    """

    def __init__(
        self,
        form: StepForm,
        call: ExpectedCall,
        recorded: RecordedCalls,
        first: int,
        sampler: Sampler,
        merger: Merger,
    ) -> None:
        self.form, self.call, self.recorded = form, call, recorded
        self.sampler, self.merger = sampler, merger
        self.rounding = float(torch.finfo(form.network_dtype).eps) / 2
        row_map = self._row_map = form.row_maps[0]
        samples = self._samples = form.shape[0]
        self._kind = recorded.kinds[0]
        self._batch = StepBatch(call, self._kind, form.calls[0], first, sampler.steps)
        self._groups = self._batch.groups
        outputs = form.outputs[0]
        self._batched = [o for o, leaf in enumerate(outputs) if has_rows(leaf, row_map.rows)]
        self._ready = ReadySteps(form, call, sampler, self._batched)
        self._layout: Layout | None = None  # until it is needed
        self._unchecked = self._writes = True  # the network into its input, as far as anybody knows
        self._slopes = np.zeros((sampler.steps, samples))  # d
        self.growth = ErrorGrowth(sampler.steps, samples)
        self._evaluated = EvaluatedRounds((sampler.steps, samples), self._batched)

    # -- evaluate -------------------------------------------------------------------------------------------------

    def evaluate(self, batch: EvalBatch) -> Tensor:
        """Evaluate rows of steps, in the same shape."""
        states = batch.x.reshape(len(batch.x), -1)
        steps, samples = batch.step.numpy(), batch.sample.numpy()
        self._evaluated.supersede(steps, samples)
        row_limit = None if self.merger.limit is None else max(1, self.merger.limit // self._groups)
        rows, parts = len(states), []
        first = 0
        while first < rows:
            # The observed call takes a row of the first one.
            last = rows if row_limit is None else min(first + max(1, row_limit - self._unchecked), rows)
            try:
                parts.append(self._evaluate(states[first:last], steps[first:last], samples[first:last]))
            except (RuntimeError, MemoryError) as error:
                if last == first + 1 or not out_of_memory(error):
                    raise
                row_limit = (last - first) // 2
                self.merger.limit = row_limit * self._groups
                continue
            first = last
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(batch.x.shape)

    def _evaluate(self, states: Tensor, steps: Indices, samples: Indices) -> Tensor:
        """Evaluate rows (n, dim) in one network call, and return the combined outputs."""
        form, row_map, count = self.form, self._row_map, states.shape[0]
        if self._layout is None:
            self._layout = self.merger.layout_of(self.recorded, self._kind)
        check, batch = self._unchecked, states
        if check:
            batch = torch.cat([states, form.inputs(form.calls[0])[:1]])
            steps, samples = np.append(steps, self.sampler.steps), np.append(samples, 0)
        groups, filled = self._groups, batch.shape[0]
        size = call_size(groups * filled, self.merger.buckets, groups) // groups
        if size > filled:  # the last row again, up to the next bucket
            batch = torch.cat([batch, batch[-1:].expand(size - filled, -1)])
            steps, samples = (np.append(index, np.repeat(index[-1:], size - filled)) for index in (steps, samples))
        leaves = self._batch.leaves(batch, steps, samples, self._layout, copy=self._writes and not check)
        version = _version(batch)
        outputs = copy_leaves(self.merger.call(self.call.call, leaves, groups * size))
        if check:
            self._writes = version is None or _version(batch) != version
        elif not self._writes and _version(batch) != version:
            raise NotParallelizable("the denoiser writes into its input at some calls only.")
        answers = row_map.answers(outputs, form.dtype).reshape(groups, size, -1)
        for o in self._batched:
            outputs[o] = outputs[o].unflatten(0, (groups, size))
        if check and not self._check(answers[:, count], self._layout):
            return self._evaluate(states, steps[:count], samples[:count])
        if size > count:
            answers, steps, samples = answers[:, :count], steps[:count], samples[:count]
        if groups == 1:
            combined = answers[0] if form.weights[0] == 1 else answers[0] * float(form.weights[0])
        else:
            combined = (answers * upload(form.weights, answers).view(-1, 1, 1)).sum(0)
        # What the network was given: it may have written into a copy of its own.
        inputs = states.to(form.network_dtype).to(form.dtype)
        self._evaluated.store(steps, samples, inputs, combined, outputs)
        self.merger.batched = True
        return combined

    def _check(self, rows: Tensor, layout: Layout) -> bool:
        """Compare the observed call in a batch, (G, dim), with itself; another layout is looked for if it differs."""
        merger, name = self.merger, self._kind.name
        observed = self._row_map.answers(self.form.outputs[0], self.form.dtype)
        single = observed[upload(self._batch.row_of[:, 0], rows.device)]
        weights = upload(self.form.weights, rows).unsqueeze(1)
        combined = _relative((weights * (rows - single)).sum(0), (weights * single).sum(0))
        error, self.rounding = _relative(rows - single, single), max(self.rounding, combined)
        if error <= layout.bound or not np.isfinite(error):
            merger.checked[name], self._unchecked = layout, False
            return True
        if name in merger.checked:  # found for this very network: it does not answer by its arguments alone
            raise NotParallelizable("batching calls of the denoiser changes its outputs.")
        merger.layouts.pop(name, None)  # the network has changed since an earlier run of the loop
        self._layout = None
        return False

    # -- answer ---------------------------------------------------------------------------------------------------

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes d of a correction; see :meth:`Recurrence.note_slopes`."""
        for s, start, count, row in zip(sample.tolist(), first.tolist(), counts.tolist(), slopes, strict=True):
            self._slopes[start : start + count, s] = row[:count]

    def inputs(self, step: int) -> Tensor:
        """Return (S, dim) the states at which a step was evaluated last."""
        return self._evaluated.of(range(step, step + 1))[0][0]

    def prepare(self, steps: range, states: Tensor) -> None:
        """Make ready to answer accepted steps at states (M, S, dim): all that belongs to them stays as it is now."""
        self._ready.prepare(steps, states, self._evaluated.of(steps), self._slopes[steps.start : steps.stop])
        self._evaluated.forget_before(steps.stop)

    def answer(self, step: int, call: int, leaves: Sequence[Any], share: float) -> tuple[list[Any] | None, float]:
        """Return the output leaves of the call of a step that is ready, and how far its state is from the accepted one.

        None if that is further than ``share``.
        """
        return self._ready.answer(step, leaves, share)

    def floor(self, steps: int) -> float:
        """Return what the rounding of the outputs of the first steps does to the states behind them, relative."""
        return self._ready.floor(steps, self._slopes, self.rounding, self.growth.beyond(self.rounding))

    def forget(self, step: int) -> None:
        """Let go of a step."""
        self._ready.forget(step)


def are_equal(form: StepForm, call: ExpectedCall, recorded: RecordedCalls) -> bool:
    """Return whether the steps are of this kind, and the observed call can stand for them."""
    row_map, before = form.row_maps[0], form.calls[0]
    if len(form.calls) > 1 or not row_map.batched or len(recorded.kinds) != len(recorded.calls):
        return False
    others = [i for i in range(len(before.leaves)) if i != row_map.slices[0].leaf and i not in call.tables]
    return len(recorded.repeated_kinds) == 1 and all(equal(before.leaves[i], call.call.leaves[i]) for i in others)


def _version(tensor: Tensor) -> int | None:
    """Return how often something has written into a tensor; None if that is not counted."""
    return None if tensor.is_inference() else tensor._version


def _relative(error: Tensor, value: Tensor) -> float:
    """Return the norm of an error over that of a value; 0 where that is 0."""
    norm = float(torch.linalg.vector_norm(value))
    return float(torch.linalg.vector_norm(error)) / norm if norm else 0.0
