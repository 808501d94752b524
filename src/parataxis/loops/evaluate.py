"""Evaluates the network at states of a solver, by batches of recorded calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, upload
from ..engine.rows import EvalBatch
from .answers import PROBE_SEED
from .error_estimate import relative_rounding
from .floor import MeasuredSlopes
from .known_outputs import KnownOutputs
from .merger import Merger
from .rows import RowIndex, RowRequest
from .structure import Stage

__all__ = ["StageEvaluator"]

ROUNDED_STEPS = 4  # at which the rounding of outputs is measured, in one network call


class StageEvaluator:
    """States of runs to the combined outputs of their steps; what is evaluated is stored as known.

    Args:
        stage: With its recorded calls.
        known: Takes the evaluations.
        merger: Makes the network calls.
        measured: Takes what the rounds show of slopes, if anybody wants to know.
    """

    def __init__(
        self, stage: Stage, known: KnownOutputs, merger: Merger, measured: MeasuredSlopes | None = None
    ) -> None:
        self.stage, self.known, self.merger, self.measured = stage, known, merger, measured

    def __call__(self, batch: EvalBatch) -> Tensor:
        """Evaluate rows (R, dim), or (R, S dim) where samples are joint, in the same shape."""
        structure = self.stage.structure
        states = batch.x.reshape(-1, structure.dim)
        step, sample = batch.step.numpy(), batch.sample.numpy()
        if structure.joint_samples:
            step = np.repeat(step, structure.samples)
            sample = np.tile(np.arange(structure.samples), len(batch.step))
        requests, items_of_request = self._requests(states, step, sample)
        outputs = self.merger.evaluate(self.stage.calls, requests)
        total = self._combine(states, requests, items_of_request, outputs)
        inputs = states.to(structure.network_dtype).to(structure.dtype)  # what the network was given
        finite = torch.isfinite(total).all(1).cpu().numpy()
        if self.measured is not None:
            self.measured.note(step, sample, inputs, total)
        for q in np.unique(step):
            items = np.flatnonzero(step == q)
            first, count = int(items[0]), len(items)
            beside = int(items[-1]) == first + count - 1  # rows of one sample, mostly
            states_of_step = inputs[first : first + count] if beside else inputs[upload(items, inputs.device)]
            self.known.store_inputs(int(q), sample[items], states_of_step, finite[items])
        return total.view(batch.x.shape)

    def evaluate_trajectory(self, states: Tensor, width: int) -> int:
        """Evaluate all steps at states (N + 1, R, dim) of the runs, so many steps at a time; return the rounds made."""
        steps, runs = self.stage.structure.steps, states.shape[1]
        firsts = range(0, steps, width)
        for first in firsts:
            last = min(first + width, steps)
            step, run = (torch.from_numpy(index.ravel()) for index in np.mgrid[first:last, :runs])
            self(EvalBatch(states[first:last].flatten(0, 1), step, run))
        return len(firsts)

    def rounding(self) -> Array:
        """Return (N,) the rounding of outputs, relative to them, see :attr:`Report.floor`: measured at a few steps."""
        structure = self.stage.structure
        unit, steps, count = structure.unit, structure.steps, 1 if self.merger.single else ROUNDED_STEPS
        chosen = sorted({(2 * k + 1) * steps // (2 * count) for k in range(count)})
        chosen = [step for step in chosen if self.known.evaluated[step].all()]
        if not chosen:
            return np.full(steps, unit)
        requests = []
        for step in chosen:
            inputs = self.known.inputs_at_evaluation[step]
            assert inputs is not None
            generator = torch.Generator("cpu").manual_seed(PROBE_SEED)
            noise = torch.randn(inputs.shape, generator=generator, device="cpu").to(inputs)
            near = inputs + unit * inputs.square().mean(1, keepdim=True).sqrt() * noise
            for call in structure.calls_of_step[step]:
                row_map = structure.row_maps[call]
                states = near[torch.from_numpy(row_map.sample_of_row).to(near.device)]
                requests.append(RowRequest(call, np.arange(row_map.rows), states))
        outputs: dict[int, list[tuple[int, list[Any]]]] = {}
        for request, output in zip(requests, self.merger.evaluate(self.stage.calls, requests), strict=True):
            outputs.setdefault(structure.step_of_call[request.call], []).append((request.call, output))
        measured = [np.hypot(unit, relative_rounding(self.known, outputs[step])) for step in chosen]
        return np.asarray(np.interp(np.arange(steps), chosen, measured))

    def _requests(self, states: Tensor, step: RowIndex, sample: RowIndex) -> tuple[list[RowRequest], list[RowIndex]]:
        """Return the rows of recorded calls that stand for states, and which state is behind each of their rows."""
        structure = self.stage.structure
        requests, items_of_request = [], []
        for q in np.unique(step):
            items = np.flatnonzero(step == q)
            item_of_sample = np.full(structure.samples, -1)
            item_of_sample[sample[items]] = items
            for call in structure.calls_of_step[q]:
                sample_of_row = structure.row_maps[call].sample_of_row
                rows = np.flatnonzero(item_of_sample[sample_of_row] >= 0)
                items_of_rows = item_of_sample[sample_of_row[rows]]
                requests.append(RowRequest(call, rows, states[upload(items_of_rows, states.device)]))
                items_of_request.append(items_of_rows)
        return requests, items_of_request

    def _combine(
        self,
        states: Tensor,
        requests: Sequence[RowRequest],
        items_of_request: Sequence[RowIndex],
        outputs: Sequence[list[Any]],
    ) -> Tensor:
        """Return the combined outputs of every state, and store all outputs."""
        structure = self.stage.structure
        total = torch.zeros_like(states)
        before: dict[int, int] = {}  # rows of a sample in the calls of each step so far
        for request, items_of_rows, output in zip(requests, items_of_request, outputs, strict=True):
            row_map, q = structure.row_maps[request.call], structure.step_of_call[request.call]
            self.known.store_outputs(request.call, request.rows, output)
            guidance_index = row_map.guidance_index[request.rows] + before.get(q, 0)
            before[q] = int(guidance_index.max()) + 1
            weights = upload(structure.guidance_weights[q][guidance_index], states).unsqueeze(1)
            weighted = row_map.answers(output, structure.dtype) * weights
            total.index_add_(0, upload(items_of_rows, states.device), weighted)
        return total
