"""Rows of several recorded calls as one network call.

With R rows in the first dimension of the state, the rows wanted of many calls become one call by the role of each other
leaf over all calls:

- a tensor with R rows, or several for each of them: its rows are taken along,
- a number, or a tensor of one element, that differs between calls (the timestep): one entry a row,
- anything that is the same in all calls: shared; calls that differ in anything else are not batched.

Where that does not give what single calls give (graphs in one flat batch, a second dimension of samples, no dimension
for them at all), :func:`torch.vmap` maps the network over whole calls.

Rows with equal inputs (guidance) stay apart in blocks, all first ones before all second ones, because some attention
processors split the batch so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from operator import is_not
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import upload
from ..engine.executor import call_size
from .calls import Call, CallKind, RecordedCalls, Role, copy_leaves, equal, feeders_of
from .rows import RowIndex, RowMap, RowRequest, has_rows, row_index

__all__ = ["KindCalls", "Layout", "Merging", "column_of_numbers", "split_outputs"]


class Merging(Enum):
    """What of calls becomes one network call."""

    ROWS = "any rows of any calls"
    CALLS = "whole calls"
    MAPPED = "whole calls, mapped over by torch.vmap: no call sees the rows of another"
    SINGLE = "each call is evaluated by itself"


@dataclass(frozen=True)
class Layout:
    """How the arguments of several calls become one batch.

    Attributes:
        merging: What becomes one network call.
        narrow: Numbers are given in the dtype of the state.
        column: How many dimensions of size 1 numbers have behind their rows: given as (R,), (R, 1), (R, 1, 1) ..
        shared: Leaves equal in all calls are shared even if they have as many rows as the call.
        repeated: Leaves with a multiple of the call's rows have several entries for each row, side by side.
        bound: How far, relative, outputs may be from those of single calls.
        rounding: How far they were when the layout was found.
        reason: Why calls stay single.
    """

    merging: Merging
    narrow: bool = False
    column: int = 0
    shared: bool = False
    repeated: bool = False
    bound: float = 0.0
    rounding: float = 0.0
    reason: str = ""


@dataclass(frozen=True, eq=False)
class KindCalls:
    """The recorded calls of one kind, to be evaluated one by one or as a batch.

    Attributes:
        recorded: All calls of the stage.
        kind: Which of them, and the roles of their leaves.
        network: ``network(call, leaves, rows)`` calls the denoiser once and returns its output leaves, which the next
            call may overwrite.
        buckets: The numbers of rows that batches may have; any, where there are none.
    """

    recorded: RecordedCalls
    kind: CallKind
    network: Callable[[Call, Sequence[Any], int], list[Any]]
    buckets: tuple[int, ...] = ()

    def row_map(self, call: int) -> RowMap:
        """Return how the rows of a call belong to states."""
        return self.recorded.row_maps[call]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state part of the arguments."""
        call = self.kind.members[0]
        dtype: torch.dtype = self.recorded.calls[call].leaves[self.row_map(call).slices[0].leaf].dtype
        return dtype

    def has_all_rows(self, requests: Sequence[RowRequest]) -> bool:
        """Return whether all rows of every call are requested."""
        return all(len(request.rows) == self.row_map(request.call).rows for request in requests)

    def run_single(self, request: RowRequest) -> list[Any]:
        """Evaluate one whole call with exactly the arguments that the loop gave."""
        call, row_map = self.recorded.calls[request.call], self.row_map(request.call)
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        row_map.write(leaves, request.states)
        for feeder, uses in feeders_of(call).items():
            outputs = self.run_feeders(feeder, [request])
            for leaf, output in uses:
                leaves[leaf] = outputs[output]
        return copy_leaves(self.network(call, leaves, row_map.rows))

    def run_feeders(self, feeder: int, requests: Sequence[RowRequest], layout: Layout | None = None) -> list[Any]:
        """Evaluate the calls whose outputs are arguments of the requested ones, before them."""
        offset = requests[0].call - feeder
        calls = replace(self, kind=self.recorded.kinds[feeder])
        feeding = [RowRequest(request.call - offset, request.rows, request.states) for request in requests]
        return calls.run_single(feeding[0]) if layout is None else copy_leaves(calls.run_ordered(feeding, layout))

    def run_batched(self, requests: Sequence[RowRequest], layout: Layout) -> list[list[Any]]:
        """Evaluate several requests in one network call, padded to the next bucket."""
        padded = self.padded(requests, layout)
        if layout.merging is Merging.MAPPED:
            return self.run_mapped(padded)[: len(requests)]
        return split_outputs(self.run_ordered(padded, layout), padded, self.order(padded))[: len(requests)]

    def padded(self, requests: Sequence[RowRequest], layout: Layout) -> Sequence[RowRequest]:
        """Return requests that fill a bucket: the last one again, or rows of one of its samples, as often as needed."""
        if not self.buckets:
            return requests
        rows, more = sum(len(request.rows) for request in requests), requests[-1]
        if layout.merging is Merging.ROWS:
            samples = self.row_map(more.call).sample_of_row[more.rows]
            part = np.flatnonzero(samples == samples[0])
            more = RowRequest(more.call, more.rows[part], more.states[row_index(part, more.states)])
        size = call_size(rows, self.buckets, len(more.rows))  # all rows are whole multiples of these
        return [*requests, *[more] * ((size - rows) // len(more.rows))]

    def run_mapped(self, requests: Sequence[RowRequest]) -> list[list[Any]]:
        """Map the network over whole calls, with the arguments that the loop gave."""
        first, row_map = self.recorded.calls[requests[0].call], self.row_map(requests[0].call)
        arguments = []  # of every call
        for request in requests:
            leaves = copy_leaves(self.recorded.calls[request.call].leaves)
            row_map.write(leaves, request.states)
            arguments.append(leaves)
        columns = [list(values) for values in zip(*arguments, strict=True)]
        mapped = [i for i, role in enumerate(self.kind.roles) if role is not Role.SHARED]
        stacked = [
            torch.stack(columns[i])
            if isinstance(columns[i][0], Tensor)
            else column_of_numbers(columns[i], requests[0].states)
            for i in mapped
        ]
        form: list[Any] = []  # of the output, without its tensors

        def evaluate(*values: Tensor) -> tuple[Tensor, ...]:
            leaves = list(arguments[0])
            for i, value in zip(mapped, values, strict=True):
                leaves[i] = value
            form[:] = self.network(first, leaves, len(requests) * row_map.rows)
            return tuple(leaf for leaf in form if isinstance(leaf, Tensor))

        with _without_fallback():
            outputs = torch.vmap(evaluate, randomness="error")(*stacked)
        parts = zip(*(output.unbind() for output in outputs), strict=True)
        filled = []  # a tensor of each call in the place of each tensor of the form
        for tensors in parts:
            left = iter(tensors)
            filled.append([next(left).clone() if isinstance(leaf, Tensor) else leaf for leaf in form])
        return filled

    def order(self, requests: Sequence[RowRequest]) -> RowIndex:
        """Return the order of all rows in the batch: all first rows of samples, then all second ones."""
        blocks = np.concatenate([self.row_map(request.call).guidance_index[request.rows] for request in requests])
        return np.argsort(blocks, kind="stable")

    def run_ordered(self, requests: Sequence[RowRequest], layout: Layout) -> list[Any]:
        """Call the network on the rows of all requests, in :meth:`order`, and return the output leaves."""
        leaves = self.build_batch(requests, layout)
        first = self.recorded.calls[requests[0].call]
        for feeder, uses in feeders_of(first).items():
            outputs = self.run_feeders(feeder, requests, layout)
            for leaf, output in uses:
                leaves[leaf] = outputs[output]
        return self.network(first, leaves, sum(len(request.rows) for request in requests))

    def build_batch(self, requests: Sequence[RowRequest], layout: Layout) -> list[Any]:
        """Return the argument leaves of one network call for the rows of all requests, in :meth:`order`."""
        order = self.order(requests)
        states = torch.cat([request.states for request in requests])
        if not np.array_equal(order, np.arange(len(order))):
            states = states[row_index(order, states)]
        calls = [self.recorded.calls[request.call] for request in requests]
        row_map = self.row_map(requests[0].call)
        leaves: list[Any] = []
        for i, role in enumerate(self.kind.roles):
            values = [call.leaves[i] for call in calls]
            if role is Role.PER_ROW and layout.shared and all(equal(values[0], value) for value in values):
                role = Role.SHARED
            if role is Role.STATE and row_map.is_all_state(values[0]):
                leaves.append(states.view(-1, *values[0].shape[1:]).to(values[0].dtype))
            elif role in (Role.PER_ROW, Role.STATE):
                parts = [value[row_index(q.rows, value)] for q, value in zip(requests, values, strict=True)]
                leaves.append(torch.cat(parts)[row_index(order, parts[0])])
            elif role is Role.REPEATED_PER_ROW and layout.repeated:
                parts = [value.unflatten(0, (row_map.rows, -1)) for value in values]
                parts = [part[row_index(q.rows, part)] for q, part in zip(requests, parts, strict=True)]
                leaves.append(torch.cat(parts)[row_index(order, parts[0])].flatten(0, 1))
            elif role is Role.SCALAR:
                counts = [len(request.rows) for request in requests]
                column = column_of_numbers(values, requests[0].states)
                column = column[row_index(np.repeat(np.arange(len(counts)), counts)[order], column)]
                if layout.narrow and column.is_floating_point():
                    column = column.to(self.dtype)
                leaves.append(column.view(-1, *(1,) * layout.column))
            else:
                leaves.append(values[0].clone() if isinstance(values[0], Tensor) else values[0])
        if not row_map.is_all_state(calls[0].leaves[row_map.slices[0].leaf]):
            row_map.write(leaves, states)
        return leaves


@contextmanager
def _without_fallback() -> Iterator[None]:
    """Let operators without a batching rule raise: they would be called one by one, which gains nothing."""
    functorch: Any = torch._C._functorch  # no public name for it
    enabled = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(enabled)


def split_outputs(leaves: Sequence[Any], requests: Sequence[RowRequest], order: RowIndex) -> list[list[Any]]:
    """Return the output leaves of each request from those of the batch, whose rows are in this order."""
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    outputs, first = [], 0
    for request in requests:
        index = position[first : first + len(request.rows)]
        first += len(request.rows)
        parts = [leaf[row_index(index, leaf)] if has_rows(leaf, len(order)) else leaf for leaf in leaves]
        outputs.append(parts if all(map(is_not, parts, leaves)) else copy_leaves(parts))
    return outputs


def column_of_numbers(values: Sequence[Any], like: Tensor) -> Tensor:
    """Return numbers, or tensors of one element, as one tensor; those of Python in the dtype of the states ``like``."""
    if isinstance(values[0], Tensor):
        return torch.stack([value.reshape(()) for value in values])
    return upload(np.array(values), like if isinstance(values[0], float) else like.device)
