"""Evaluates a single sample at steps that differ in nothing but the state and the time: one batch, made in one go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arrays import upload
from ..engine.executor import out_of_memory
from ..engine.rows import EvalBatch
from .batch import Layout, Merging, column_of_numbers
from .calls import Role, copy_leaves
from .evaluate import StageEvaluator
from .known_outputs import KnownOutputs
from .merger import Merger
from .structure import Stage

__all__ = ["EqualStepsEvaluator"]


class EqualStepsEvaluator:
    """What :class:`StageEvaluator` does, where every step is one call of one kind, without a request for each step.

    Anything else, and all until the layout of the batch has been checked, is left to that one.

    Args:
        stage: Its leaves are the same objects at every step, except those in ``varying``.
        known: Takes the evaluations.
        merger: Makes the network calls.
        varying: Leaves that change with the step.
    """

    def __init__(self, stage: Stage, known: KnownOutputs, merger: Merger, varying: set[int]) -> None:
        self.stage, self.known, self.merger, self.varying = stage, known, merger, varying
        self._general = StageEvaluator(stage, known, merger)
        structure, row_map = stage.structure, stage.structure.row_maps[0]
        self._applies = (
            structure.samples == 1
            and not structure.joint_samples
            and len(structure.row_maps) == structure.steps
            and len(stage.calls.kinds[0].members) == structure.steps
            and row_map.batched
            and len(row_map.slices) == 1
        )
        self._weights: Tensor | None = None  # (R, 1, 1), on the states' device
        self._tables: dict[int, Tensor] = {}  # of varying leaves

    def __call__(self, batch: EvalBatch) -> Tensor:
        """Evaluate rows (n, dim) of different steps, in the same shape."""
        layout = self.merger.checked.get(self.stage.calls.kinds[0].name) if self._applies else None
        rows = self.stage.structure.row_maps[0].rows * len(batch.x)
        limit = self.merger.limit
        if layout is None or layout.merging is Merging.SINGLE or len(batch.x) == 1 or rows > (limit or rows):
            return self._general(batch)
        try:
            return self._evaluate(batch, layout)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.merger.limit = max(1, rows // 2)
        return self._general(batch)

    def _evaluate(self, batch: EvalBatch, layout: Layout) -> Tensor:
        structure, known = self.stage.structure, self.known
        row_map = structure.row_maps[0]
        count, rows = len(batch.x), row_map.rows
        states = batch.x.reshape(count, -1)
        leaves = self._leaves(states, batch.step, layout)
        outputs = copy_leaves(self.merger.call(self.stage.calls.calls[0], leaves, rows * count))
        self.merger.batched = True
        # Every call's rows: its parts of the blocks of all first rows, all second ones...
        parts = [
            leaf.view(rows, count, *leaf.shape[1:]).unbind(1)
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows * count
            else [leaf] * count
            for leaf in outputs
        ]
        answers = row_map.answers(outputs, structure.dtype).view(rows, count, -1)
        if self._weights is None:
            self._weights = upload(structure.guidance_weights[0][row_map.guidance_index], answers).view(-1, 1, 1)
        total = answers[0] * self._weights[0] if rows == 1 else (answers * self._weights).sum(0)
        finite = torch.isfinite(total).all(1).cpu().numpy()
        inputs = states.to(structure.network_dtype).to(structure.dtype, copy=True)  # what the network was given
        for j, (step, state) in enumerate(zip(batch.step.tolist(), inputs.unsqueeze(1).unbind(), strict=True)):
            known.outputs[step] = [part[j] for part in parts]
            known.inputs_at_evaluation[step] = state
            known.evaluated[step] = finite[j]
        return total.view(batch.x.shape)

    def _leaves(self, states: Tensor, steps: Tensor, layout: Layout) -> list[Any]:
        """Return the arguments of the batch: all first rows of the steps, then all second ones."""
        calls, row_map = self.stage.calls, self.stage.structure.row_maps[0]
        place, count, rows = row_map.slices[0], len(states), row_map.rows
        leaves: list[Any] = []
        for i, (role, leaf) in enumerate(zip(calls.kinds[0].roles, calls.calls[0].leaves, strict=True)):
            if role is Role.STATE and place.size == leaf[0].numel():
                leaves.append(leaf.new_empty(rows * count, *leaf.shape[1:]))
            elif role is Role.PER_ROW and i in self.varying:
                leaves.append(self._table(i, states)[upload(steps, leaf.device)].transpose(0, 1).flatten(0, 1))
            elif role is Role.STATE or (role is Role.PER_ROW and not layout.shared):
                leaves.append(leaf.unsqueeze(1).expand(-1, count, *leaf.shape[1:]).flatten(0, 1).contiguous())
            elif role is Role.REPEATED_PER_ROW and layout.repeated:
                several = leaf.unflatten(0, (rows, 1, -1))
                leaves.append(several.expand(-1, count, *several.shape[2:]).flatten(0, 2).contiguous())
            elif role is Role.SCALAR:
                table = self._table(i, states)
                column = table[upload(steps, table.device)].repeat(rows)
                if layout.narrow and column.is_floating_point():
                    column = column.to(calls.calls[0].leaves[place.leaf].dtype)
                leaves.append(column.view(-1, *(1,) * layout.column))
            else:
                leaves.append(leaf.clone() if isinstance(leaf, Tensor) else leaf)
        row_map.write(leaves, states.repeat(rows, 1))
        return leaves

    def _table(self, leaf: int, states: Tensor) -> Tensor:
        """Return a leaf that changes with the step, at all steps: (N, R, ...), or (N,) where it is a number."""
        if leaf not in self._tables:
            values = [call.leaves[leaf] for call in self.stage.calls.calls]
            is_number = self.stage.calls.kinds[0].roles[leaf] is Role.SCALAR
            self._tables[leaf] = column_of_numbers(values, states) if is_number else torch.stack(values)
        return self._tables[leaf]
