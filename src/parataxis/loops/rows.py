"""How the rows of a denoiser's call belong to the states of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import upload

__all__ = ["SMALLEST", "Box", "RowIndex", "RowMap", "RowRequest", "StateSlice", "answered_box", "has_rows", "row_index"]

RowIndex = NDArray[np.int64]
SMALLEST = 1e-30  # norm of a state
Box = tuple[tuple[int, int], ...]  # (first, last + 1) for every dimension behind the rows


@dataclass(frozen=True)
class StateSlice:
    """The part of a call's arguments that is state, and the part of the output that answers it.

    Attributes:
        leaf: Which argument.
        box: The part.
        output: Which leaf of the output.
        answered: The part of that leaf, likewise; None for its leading part of the same shape.
    """

    leaf: int
    box: Box
    output: int
    answered: Box | None = None

    @cached_property
    def size(self) -> int:
        """Elements of a row."""
        return math.prod(stop - first for first, stop in self.box)

    @cached_property
    def state(self) -> tuple[slice, ...]:
        """The part of the argument, with its rows in front."""
        return (slice(None), *(slice(*ends) for ends in self.box))

    @cached_property
    def answer(self) -> tuple[slice, ...]:
        """The part of the output, with its rows in front."""
        answered = self.answered or [(0, stop - first) for first, stop in self.box]
        return (slice(None), *(slice(*ends) for ends in answered))


def answered_box(box: Box, input_shape: Sequence[int], output_shape: Sequence[int]) -> Box | None:
    """Return the part of an output that answers the part ``box`` of an input; None if they do not match.

    The same places, where the output is as long as the input, and else the leading ones: channels of a condition are
    not answered, and those of a learned variance come behind. So among the channels of an image it is always the
    leading ones. A dimension in which the state has size 1 may be missing in the output, and the output may have one
    more of size 1.

    Args:
        box: Of the state.
        input_shape: Shape of a row of the input.
        output_shape: Shape of a row of the output.
    """
    if len(output_shape) == len(input_shape) - 1:
        for axis, (first, stop) in enumerate(box):
            others = [size for i, size in enumerate(input_shape) if i != axis]
            if stop - first == 1 and others == list(output_shape):
                return box[:axis] + box[axis + 1 :]
        return None
    if len(output_shape) == len(input_shape) + 1:
        sizes = [stop - first for first, stop in box]
        for axis, there in enumerate(output_shape):
            if there == 1 and [*output_shape[:axis], *output_shape[axis + 1 :]] == sizes == list(input_shape):
                return (*box[:axis], (0, 1), *box[axis:])
        return None
    if len(output_shape) != len(input_shape):
        return None
    parts = []
    for axis, ((first, stop), size, there) in enumerate(zip(box, input_shape, output_shape, strict=True)):
        if there < stop - first:
            return None
        leading = size != there or (axis == 0 and len(input_shape) > 2)
        parts.append((0, stop - first) if leading else (first, stop))
    return tuple(parts)


@dataclass(frozen=True, eq=False)
class RowMap:
    """How the rows of a call belong to states.

    Attributes:
        slices: The state parts; a state is all of them, flattened, one behind the other.
        rows: R.
        batched: Whether the leaves' first dimension counts rows; else a leaf is one row.
        sample_of_row: (R,) the sample of each row: rows of a sample (guidance) have equal inputs.
    """

    slices: tuple[StateSlice, ...]
    rows: int
    batched: bool
    sample_of_row: RowIndex

    @cached_property
    def guidance_index(self) -> RowIndex:
        """(R,) how many rows of the same sample stand before each row."""
        order = np.argsort(self.sample_of_row, kind="stable")
        ordered = self.sample_of_row[order]
        before = np.empty_like(order)
        before[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        return before

    @cached_property
    def first_rows(self) -> Tensor:
        """(S,) the first row of every sample."""
        return torch.from_numpy(np.unique(self.sample_of_row, return_index=True)[1])

    def is_all_state(self, leaf: Any) -> bool:
        """Return whether an argument is the state and nothing else."""
        whole = isinstance(leaf, Tensor) and self.batched and leaf[0].numel() == self.slices[0].size
        return len(self.slices) == 1 and whole

    def rows_of(self, sample: int) -> RowIndex:
        """Return the rows of a sample."""
        return np.flatnonzero(self.sample_of_row == sample)

    def view(self, leaf: Tensor) -> Tensor:
        """Return a leaf with its rows in front."""
        return leaf if self.batched else leaf[None]

    def has_rows(self, leaf: Any) -> bool:
        """Return whether a leaf is a tensor with the rows of the call."""
        return isinstance(leaf, Tensor) and has_rows(self.view(leaf), self.rows)

    def states(self, leaves: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Return the state parts of arguments, (R, dim); zeros for a part that is None (no prediction before it)."""
        if len(self.slices) == 1:
            return self.view(leaves[self.slices[0].leaf])[self.slices[0].state].flatten(1).to(dtype, copy=True)
        like = next(leaves[p.leaf] for p in self.slices if leaves[p.leaf] is not None)
        parts = [
            like.new_zeros(self.rows, p.size)
            if leaves[p.leaf] is None
            else self.view(leaves[p.leaf])[p.state].flatten(1)
            for p in self.slices
        ]
        return torch.cat(parts, 1).to(dtype)

    def answers(self, leaves: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Return the parts of outputs that answer the states, (R, dim)."""
        if len(self.slices) == 1:
            return self.view(leaves[self.slices[0].output])[self.slices[0].answer].flatten(1).to(dtype)
        parts = [self.view(leaves[p.output])[p.answer].flatten(1) for p in self.slices]
        return torch.cat(parts, 1).to(dtype)

    def write(self, leaves: Sequence[Any], states: Tensor) -> None:
        """Put states (R, dim) into the state parts of arguments."""
        self._put([(leaves[p.leaf], p.state, p.size) for p in self.slices], states, add=False)

    def add(self, leaves: Sequence[Any], change: Tensor) -> None:
        """Add a change (R, dim) to the answering parts of outputs."""
        self._put([(leaves[p.output], p.answer, p.size) for p in self.slices], change, add=True)

    def _put(self, places: Sequence[tuple[Any, tuple[slice, ...], int]], rows: Tensor, *, add: bool) -> None:
        first = 0
        for leaf, box, size in places:
            if leaf is not None:
                part = self.view(leaf)[box]
                values = rows[:, first : first + size].view(part.shape)
                if add and part.dtype == values.dtype:
                    part.add_(values)
                else:
                    part.copy_(part.to(rows.dtype) + values if add else values)
            first += size


@dataclass(frozen=True, eq=False)
class RowRequest:
    """Rows to be evaluated of one recorded call.

    Attributes:
        call: Which call of the stage.
        rows: (n,) which rows of it, in order.
        states: (n, dim) their inputs.
    """

    call: int
    rows: RowIndex
    states: Tensor


def has_rows(leaf: Any, rows: int) -> bool:
    """Return whether a leaf is a tensor with so many rows."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def row_index(rows: RowIndex, like: Tensor) -> Tensor:
    """Return row numbers on the device of a tensor."""
    return upload(np.asarray(rows, np.int64), like.device)
