"""Accepted steps of one call each, made ready to be answered: outputs, their slopes and the accepted states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, read, upload
from ..samplers.sampler import Sampler
from .observation import StepForm
from .output_slopes import OutputSlopes, relative_floor
from .rows import SMALLEST
from .step_arguments import ExpectedCall
from .step_batch import copied

__all__ = ["ReadySteps"]


class ReadySteps:
    """Answers the calls of accepted steps.

    All that belongs to steps which are accepted together is made ready together, so what is left for each call of the
    loop is to compare its state x with the accepted one u, and to move the output along its slope: f + e (x - u), three
    operations on tensors.

    Args:
        form: How states, rows and outputs belong together: one call a step.
        call: What every call is expected to be.
        sampler: Of the steps.
        batched: Which output leaves have rows.
    """

    def __init__(self, form: StepForm, call: ExpectedCall, sampler: Sampler, batched: list[int]) -> None:
        self.form, self.call, self.sampler = form, call, sampler
        self._batched = batched
        row_map = self._row_map = form.row_maps[0]
        samples = self._samples = form.shape[0]
        order = row_map.guidance_index * samples + row_map.sample_of_row  # of (G, S) in a call's rows
        self._order = None if (order == np.arange(row_map.rows)).all() else order
        outputs, place = form.outputs[0], row_map.slices[0]
        self._answers_whole = outputs[place.output][0].numel() == place.size
        self._output_dtype = outputs[place.output].dtype
        self._output_slopes = OutputSlopes(sampler, float(form.weights.sum()))
        self._sizes = [0.0] * samples  # of the latest states
        # (N, S) of accepted steps: in one piece, as small tensors that stay between large ones that go split the heap.
        self._output_norms: Tensor | None = None
        # Of accepted steps: outputs, their slopes, accepted states, and norms of those (S,).
        self._ready: dict[int, tuple[list[Any], Tensor, Tensor, list[float]]] = {}

    def prepare(
        self, steps: range, states: Tensor, evaluated: tuple[Tensor, Tensor, list[Any]], solved_slopes: Array
    ) -> None:
        """Make ready to answer accepted steps at states (M, S, dim): all that belongs to them stays as it is now.

        Args:
            steps: Which, M of them.
            states: Accepted ones.
            evaluated: Inputs and combined outputs (M, S, dim) of their latest evaluations, and the output leaves.
            solved_slopes: (M, S) d, of the solver.
        """
        row_map, form = self._row_map, self.form
        place, count = row_map.slices[0], len(steps)
        inputs, combined, outputs = evaluated
        if self._order is not None:
            index = upload(self._order, inputs.device)
            outputs = [leaf.index_select(1, index) if o in self._batched else leaf for o, leaf in enumerate(outputs)]
        slopes = self._output_slopes(slice(steps.start, steps.stop), inputs, combined, solved_slopes)
        sizes = torch.linalg.vector_norm(states, dim=2).tolist()
        if self._output_norms is None:
            self._output_norms = combined.new_zeros(self.sampler.steps, self._samples)
        torch.linalg.vector_norm(combined, dim=2, out=self._output_norms[steps.start : steps.stop])
        moved = states - inputs
        if self._samples > 1:
            index = upload(row_map.sample_of_row, states.device)
            moved, slopes, states = (values.index_select(1, index) for values in (moved, slopes, states))
        output = outputs[place.output]
        if self._answers_whole:
            rows = output.reshape(count, row_map.rows, -1).to(form.dtype)  # any strides
            outputs[place.output] = torch.addcmul(rows, slopes, moved).reshape(output.shape)
        else:
            part = output[(slice(None), *place.answer)]
            part += (slopes * moved).reshape(count, -1, *part.shape[2:])
        box = [stop - begin for begin, stop in place.box]
        states = states.reshape(count, -1, *box)
        slopes = slopes.reshape(count, slopes.shape[1], *(box if slopes.shape[2] > 1 else [1] * len(box)))
        leaves = [
            leaf.unbind() if o in self._batched else [copied(leaf) for _ in steps] for o, leaf in enumerate(outputs)
        ]
        for j, (step, slope, state) in enumerate(zip(steps, slopes.unbind(), states.unbind(), strict=True)):
            self._ready[step] = [values[j] for values in leaves], slope, state, sizes[j]

    def answer(self, step: int, leaves: Sequence[Any], share: float) -> tuple[list[Any] | None, float]:
        """Return the output leaves of the call of a step that is ready, and how far its state is from the accepted one.

        None if that is further than ``share``.
        """
        outputs, slope, state, sizes = self._ready[step]
        self._sizes = sizes
        place = self._row_map.slices[0]
        state_rows = leaves[place.leaf]
        if not self.call.whole:
            state_rows = state_rows[place.state]
        moved = state_rows - state
        distance = float(torch.linalg.vector_norm(moved)) / (min(sizes) or SMALLEST)
        if not distance <= share and moved.shape[0] > 1:  # of all rows together; each of them may be near
            norms = torch.linalg.vector_norm(moved.flatten(1), dim=1).tolist()
            distance = max(
                norm / (sizes[s] or SMALLEST) for norm, s in zip(norms, self._row_map.sample_of_row, strict=True)
            )
        if not distance <= share:  # or not a number
            return None, distance
        output = outputs[place.output]
        if self._answers_whole:
            outputs[place.output] = torch.addcmul(output, slope, moved).to(self._output_dtype)
        else:
            output[place.answer] += slope * moved
        return outputs, distance

    def floor(self, steps: int, slopes: Array, rounding: float, growth: Array) -> float:
        """Return what the rounding of the outputs of the first steps does to the states behind them, relative.

        Args:
            steps: How many.
            slopes: (N, S) d, of the solver.
            rounding: Of combined outputs, relative.
            growth: (N, S) of errors, as moves have shown it.
        """
        assert self._output_norms is not None
        norms = read(self._output_norms)[:steps]
        return relative_floor(self.sampler, slopes, rounding * norms, np.array(self._sizes), growth)

    def forget(self, step: int) -> None:
        """Let go of a step."""
        self._ready.pop(step, None)
