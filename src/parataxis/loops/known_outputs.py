"""Evaluated outputs of a stage and their slopes: the affine model f_q + d_q (u - u_q) of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import upload
from .rows import RowIndex
from .spool import Spool
from .structure import Structure

__all__ = ["KnownOutputs"]

Array = NDArray[np.float64]


class KnownOutputs:
    """The evaluations of a stage that are known, with their slopes.

    Attributes:
        structure: Of the stage.
        evaluated: (N, S) whether there is a finite evaluation.
        inputs_at_evaluation: (S, dim) u_q a step.
        outputs: Output leaves of every call.
        slopes: (N, S) d_q.
        extrapolation_slope: (S,) slopes with which the last evaluation answers for later steps; NaN: its own.
    """

    def __init__(self, structure: Structure, spool: Spool | None = None) -> None:
        """Know nothing yet."""
        self.structure, self._spool = structure, Spool() if spool is None else spool
        self.evaluated = np.zeros((structure.steps, structure.samples), bool)
        self.inputs_at_evaluation: list[Tensor | None] = [None] * structure.steps
        self.outputs: list[list[Any] | None] = [None] * len(structure.row_maps)
        self.slopes = np.zeros((structure.steps, structure.samples))
        self.extrapolation_slope = np.full(structure.samples, np.nan)

    def __repr__(self) -> str:
        """Return how much is known."""
        return f"KnownOutputs({int(self.evaluated.all(1).sum())} of {self.structure.steps} steps)"

    def store_outputs(self, call: int, rows: RowIndex, output: Sequence[Any]) -> None:
        """Store the outputs (their leaves, these rows only) of an evaluated call."""
        row_map = self.structure.row_maps[call]
        stored = self.outputs[call]
        if len(rows) == row_map.rows and all(map(_is_whole, output, self.structure.outputs[call].leaves)):
            self.outputs[call] = [self._spool.keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in output]
            return
        if stored is None:
            like = self.structure.outputs[call].leaves
            stored = [leaf.contiguous().clone() if isinstance(leaf, Tensor) else leaf for leaf in like]
            self.outputs[call] = stored
        for target, leaf in zip(stored, output, strict=True):
            if row_map.has_rows(target):
                row_map.view(target)[upload(rows, target.device)] = row_map.view(leaf).to(target)

    def store_inputs(self, step: int, samples: RowIndex, states: Tensor, finite: NDArray[np.bool_]) -> None:
        """Store at which states (n, dim) these samples were evaluated at a step, and whether the outputs are finite."""
        inputs = self.inputs_at_evaluation[step]
        if len(samples) == self.structure.samples and np.array_equal(samples, np.arange(len(samples))):
            self.inputs_at_evaluation[step], self.evaluated[step] = self._spool.copy(states), finite
            return
        if inputs is None:
            shape = self.structure.samples, self.structure.dim
            inputs = self.inputs_at_evaluation[step] = states.new_zeros(shape)
        inputs[upload(samples, inputs.device)] = states
        self.evaluated[step, samples] = finite

    def set_slopes(self, runs: RowIndex, first: RowIndex, counts: RowIndex, slopes: Sequence[Array] | Array) -> None:
        """Set the slopes d (R, W) of runs at their steps first .. first + count - 1; the last holds for later steps."""
        for run, start, count, row in zip(runs, first, counts, slopes, strict=True):
            samples = slice(None) if self.structure.joint_samples else slice(run, run + 1)
            if count:
                self.slopes[start : start + count, samples] = row[:count, None]
                self.extrapolation_slope[samples] = row[count - 1]

    def improve_slopes(self, measured: Array) -> None:
        """Take slopes (N, S) that have been measured, where they are not NaN: a solver's may be but a rule (Picard)."""
        self.slopes = np.where(np.isnan(measured), self.slopes, measured)

    def forget(self, step: int) -> None:
        """Let go of the evaluations of a step."""
        self.evaluated[step] = False
        self.inputs_at_evaluation[step] = None
        for call in self.structure.calls_of_step[step]:
            self.outputs[call] = None

    def answer(
        self,
        call: int,
        step: int,
        states: Tensor,
        slopes: Tensor | None = None,
        across: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Any]:
        """Return f_q + d_q (u - u_q) at these states, of this step or of the last evaluated one before it.

        Args:
            call: Which call.
            step: Of it.
            states: (R, dim) u.
            slopes: (S, 1) or (S, dim) for a step that is evaluated, instead of those that are stored.
            across: What a move (R, dim) of the input of such a step adds beside that.
        """
        structure, row_map = self.structure, self.structure.row_maps[call]
        if self.evaluated[step].all():
            inputs = self.inputs_at_evaluation[step]
            assert inputs is not None
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.outputs[call] or []]
            if slopes is None:
                slopes = upload(self.slopes[step], states).unsqueeze(1)
            if structure.samples > 1:
                index = upload(row_map.sample_of_row, states.device)
                slopes, inputs = slopes[index], inputs[index]
            moves = states - inputs
            row_map.add(leaves, slopes * moves if across is None else slopes * moves + across(moves))
            return leaves
        leaves = [
            torch.zeros_like(leaf, memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf
            for leaf in structure.outputs[call].leaves
        ]
        sources = self._sources(call, step)
        change = torch.zeros_like(states)
        for source in {known for known in sources.values() if known is not None}:
            near, q = source
            rows = np.flatnonzero([sources[int(s)] == source for s in row_map.sample_of_row])
            index = upload(rows, states.device)
            for leaf, known in zip(leaves, self.outputs[near] or [], strict=True):
                if row_map.has_rows(leaf):
                    row_map.view(leaf)[index] = row_map.view(known)[index]
            samples = row_map.sample_of_row[rows]
            inputs = self.inputs_at_evaluation[q]
            assert inputs is not None
            factors = self.slopes[q]
            if q != step:
                factors = np.where(np.isnan(self.extrapolation_slope), factors, self.extrapolation_slope)
            factor = upload(factors[samples], states).unsqueeze(1)
            change[index] = factor * (states[index] - inputs[upload(samples, states.device)])
        row_map.add(leaves, change)
        return leaves

    def _sources(self, call: int, step: int) -> dict[int, tuple[int, int] | None]:
        """Return, for every sample, the call and step whose evaluation answers for it."""
        structure = self.structure
        place = structure.calls_of_step[step].index(call)
        sample_of_row = structure.row_maps[call].sample_of_row
        sources: dict[int, tuple[int, int] | None] = {}
        for s in range(structure.samples):
            sources[s] = None
            for q in range(step, -1, -1):
                calls = structure.calls_of_step[q]
                near = calls[place] if place < len(calls) else -1
                same_rows = near >= 0 and np.array_equal(structure.row_maps[near].sample_of_row, sample_of_row)
                if self.evaluated[q, s] and same_rows:
                    sources[s] = (near, q)
                    break
        return sources


def _is_whole(leaf: Any, form: Any) -> bool:
    """Return whether a leaf has the form of a whole output."""
    if not isinstance(form, Tensor):
        return True
    return isinstance(leaf, Tensor) and leaf.shape == form.shape and leaf.dtype == form.dtype
