"""Rows of S samples in one block of memory, region behind region: taken out, put back and kept by sample."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..arrays import Indices, upload

__all__ = ["RowBlock"]


class RowBlock:
    """Regions of rows. Behind the first lies one that stays zero, for indices that are to point to nothing.

    Attributes:
        count: S.
        rows: How many rows each region has for a sample.
        all: (rows, dim) the block.
        flat: The regions; ``first`` where each begins, and ``nothing`` where the row of zeros lies.
        ends: (n, S, dim) rows that lie apart, as the regions are read while they are written.
    """

    ends: Tensor

    def __init__(self, like: Tensor, rows: dict[str, int], count: int) -> None:
        self.count, self.rows = count, rows
        self.all = like.new_zeros(sum(rows.values()) * count + 1, like.shape[1])
        self.look()

    def look(self) -> None:
        """Make the views that every round uses: slicing them anew would cost as much as a small product."""
        self.first: dict[str, int] = {}
        self.flat: dict[str, Tensor] = {}
        first, self.nothing = 0, next(iter(self.rows.values())) * self.count
        for name, rows in self.rows.items():
            self.first[name], self.flat[name] = first, self.all[first : first + rows * self.count]
            first += rows * self.count + (first == 0)

    def view(self, name: str) -> Tensor:
        """Return a region as (S, rows, dim)."""
        return self.flat[name].view(self.count, -1, self.all.shape[1])

    def copy_rows(self, rows: Indices, into: RowBlock) -> None:
        """Copy the tensors of some samples to others of as many samples."""
        here, there = self.index(rows), into.index(np.arange(len(rows)))
        into.all.index_copy_(0, there, self.all.index_select(0, here))
        into.ends.copy_(self.ends.index_select(1, upload(rows, self.ends.device)))

    def put_rows(self, rows: Indices, part: RowBlock) -> None:
        """Take the tensors of some samples from others of as many samples."""
        here, there = self.index(rows), part.index(np.arange(len(rows)))
        self.all.index_copy_(0, here, part.all.index_select(0, there))
        self.ends.index_copy_(1, upload(rows, self.ends.device), part.ends)

    def state(self, row: int) -> dict[str, Tensor]:
        """Return the rows of a sample that are kept from round to round."""
        at = upload(np.array([row]), self.all.device)
        rows = {f"rows.{name}": self.view(name).index_select(0, at) for name in self.rows}
        return rows | {"rows.ends": self.ends[:, row]}

    def load(self, row: int, state: dict[str, Tensor]) -> None:
        """Take such rows."""
        for name in self.rows:
            self.view(name)[row] = state[f"rows.{name}"][0].to(self.all)
        self.ends[:, row] = state["rows.ends"].to(self.all)

    def clear_rows(self, rows: Indices) -> None:
        """Set the tensors of some samples to zero."""
        self.all.index_fill_(0, self.index(rows), 0)

    def keep_rows(self, rows: Indices) -> None:
        """Keep some samples only, in the same memory: no more than a region is copied at a time."""
        ends = self.ends.index_select(1, upload(rows, self.ends.device))
        first = 0
        for name, size in self.rows.items():
            # Regions move to the front, and never over one that has not moved yet.
            index = (rows[:, None] * size + np.arange(size)).reshape(-1)
            block = self.flat[name].index_select(0, upload(index, self.all.device))
            self.all[first : first + len(block)].copy_(block)
            if first == 0:
                self.all[len(block)].zero_()
                first = 1
            first += len(block)
        self.count = len(rows)
        self.all = self.all[:first]
        self.look()
        self.ends.copy_(ends)

    def index(self, rows: Indices) -> Tensor:
        """Return where the rows of some samples lie."""
        parts = [
            (self.first[name] + rows[:, None] * size + np.arange(size)).reshape(-1) for name, size in self.rows.items()
        ]
        return upload(np.concatenate(parts), self.all.device)
