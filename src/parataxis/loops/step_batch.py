"""The arguments of one batch for steps that differ in nothing but the state and the time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Indices, upload
from .batch import Layout, column_of_numbers
from .calls import Call, CallKind, Role
from .step_arguments import ExpectedCall

__all__ = ["StepBatch", "copied"]


class StepBatch:
    """Makes the arguments of one network call for states of many steps.

    Args:
        call: What every call is expected to be.
        kind: The roles of its leaves.
        observed: A real call; it stands behind the steps, as if it were one more.
        first: Number of the first step in the scheduler's timesteps.
        count: Steps.

    Attributes:
        groups: Rows of a sample in a call (guidance), G.
        row_of: (G, S) the rows of every sample.
    """

    def __init__(self, call: ExpectedCall, kind: CallKind, observed: Call, first: int, count: int) -> None:
        self.call, self.kind, self.observed = call, kind, observed
        self.first, self.count = first, count
        samples = len(call.row_map.first_rows)
        self.groups = call.row_map.rows // samples
        self.row_of = np.stack([call.row_map.rows_of(s) for s in range(samples)], 1)
        self._columns: dict[int, Tensor] = {}  # of leaves that change with the step

    def leaves(self, states: Tensor, steps: Indices, samples: Indices, layout: Layout, *, copy: bool) -> list[Any]:
        """Return the arguments of the batch: all first rows of the states, then all second ones.

        With ``copy``, the network may write into its input without writing into the states.
        """
        call, row_map = self.call, self.call.row_map
        place, groups, count = row_map.slices[0], self.groups, states.shape[0]
        steps, rows = (steps, self.row_of[0, samples]) if groups == 1 else self._by_group(steps, samples)
        leaves: list[Any] = []
        for i, (role, leaf) in enumerate(zip(self.kind.roles, call.call.leaves, strict=True)):
            if role is Role.STATE and call.whole:
                rows_of_all = states.repeat(groups, 1) if groups > 1 else states
                rows_of_all = rows_of_all.to(leaf.dtype, copy=copy and groups == 1)
                leaves.append(rows_of_all.view(groups * count, *leaf.shape[1:]))
            elif role is Role.PER_ROW and i in call.tables:
                values = self._column(i, states).flatten(0, 1)
                leaves.append(values.index_select(0, upload(steps * row_map.rows + rows, leaf.device)))
            elif role is Role.STATE or (role is Role.PER_ROW and not layout.shared):
                leaves.append(leaf.index_select(0, upload(rows, leaf.device)))
            elif role is Role.REPEATED_PER_ROW and layout.repeated:
                parts = leaf.unflatten(0, (row_map.rows, -1)).index_select(0, upload(rows, leaf.device))
                leaves.append(parts.flatten(0, 1))
            elif role is Role.SCALAR:
                column = self._column(i, states)
                column = column.index_select(0, upload(steps, column.device))
                if layout.narrow and column.is_floating_point():
                    column = column.to(call.call.leaves[place.leaf].dtype)
                leaves.append(column.view(-1, *(1,) * layout.column))
            else:
                leaves.append(copied(leaf))
        if not call.whole:
            row_map.write(leaves, states.repeat(groups, 1))
        return leaves

    def _by_group(self, steps: Indices, samples: Indices) -> tuple[Indices, Indices]:
        """Return steps, and rows of the loop's call, of all rows of a batch."""
        return np.tile(steps, self.groups), self.row_of[:, samples].ravel()

    def _column(self, leaf: int, states: Tensor) -> Tensor:
        """Return a leaf at all steps, and in the observed call: (N + 1, R, ...), or (N + 1,) where it is a number."""
        if leaf not in self._columns:
            steps = self.call.tables[leaf][self.first : self.first + self.count]
            values = [*steps, self.observed.leaves[leaf]]
            is_number = self.kind.roles[leaf] is Role.SCALAR
            self._columns[leaf] = column_of_numbers(values, states) if is_number else torch.stack(values)
        return self._columns[leaf]


def copied(leaf: Any) -> Any:
    """Return a copy of a leaf that is a tensor, as a network or a loop may write into it."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
