"""Which layout gives what single calls give; each is checked against them, on random inputs.

The most general layout that passes is taken: rows of any calls, else whole calls, else each call by itself. Outputs of
networks that compute in 16 bits are compared on random conditioning, where a wrong layout errs by order 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.executor import out_of_memory
from .batch import KindCalls, Layout, Merging, split_outputs
from .calls import Call, RecordedCalls, Role, equal
from .rows import RowRequest, has_rows, row_index

__all__ = ["NOTHING_TO_BATCH", "OUT_OF_MEMORY", "LayoutSearch", "compare", "random_request", "rows_of_sample"]

SAME = 5e-3  # relative; what is of no row and not the same in all calls differs more at random states and other times
WRONG = 0.1  # a wrong layout errs by order 1 on random rows
ROUNDINGS = 10  # times the rounding of copies of one call that a layout may differ
NO_BATCH_DIMENSION = "the denoiser's input has no batch dimension, so steps cannot share a network call."
NOTHING_TO_BATCH = "no two calls of the denoiser can be batched: they differ in more than rows and numbers."
BATCHING_CHANGES_OUTPUT = (
    "batching calls of the denoiser changes its outputs: it may read only the first timestep, mix rows of the batch, "
    "or return a number that is of no row, such as a mean or a loss."
)
BATCH_RAISES = (
    "a batch of its denoiser's calls raised {error!r}: let its forward take any number of rows, with a time for each, "
    "as a tensor of shape (batch,)."
)
MAPPED = Layout(Merging.MAPPED)
OUT_OF_MEMORY = "memory, max_rows or buckets allow fewer rows a network call than two steps have."


@dataclass(frozen=True, eq=False)
class LayoutSearch:
    """The search for the layout of one kind of call."""

    calls: KindCalls

    def find(self) -> Layout:
        """Find the most general layout that gives what single calls give, on random inputs.

        Raises an error that :func:`out_of_memory` knows where there is no room to try.
        """
        kind = self.calls.kind
        row_map = self.calls.row_map(kind.members[0])
        members = [kind.members[i] for i in sorted({0, len(kind.members) // 2, len(kind.members) - 1})]
        # In 16 bits a layout that swaps similar rows would pass, so their conditioning is made dissimilar.
        precise = torch.finfo(self.calls.dtype).bits >= 32
        trial = self if precise else LayoutSearch(randomize_conditioning(self.calls, members))
        generator = torch.Generator("cpu").manual_seed(0)
        scales = (1.0, 0.5, 2.0)
        whole = [random_request(trial.calls, c, generator, scale) for c, scale in zip(members, scales, strict=False)]
        answers = [trial.calls.run_single(request) for request in whole]
        samples = (int(row_map.sample_of_row.max()), 0)
        partial = [rows_of_sample(trial.calls, q, s) for q, s in zip(whole, samples, strict=False)] + whole[2:]
        try:
            return trial.find_layout(partial, whole, answers)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        return trial.find_layout(partial[:2], whole[:2], answers[:2])

    def find_layout(
        self, partial: Sequence[RowRequest], whole: Sequence[RowRequest], answers: Sequence[list[Any]]
    ) -> Layout:
        """Return the most general layout that gives the answers of single calls: for part of their rows, or whole."""
        dtype = self.calls.dtype
        smallest = max(2e-5, 2 * torch.finfo(dtype).eps)
        bound, measured = (smallest, False) if torch.finfo(dtype).bits >= 32 else (WRONG, True)
        layouts = list(self.candidates(whole[0]))
        raised: list[Exception] = []
        for layout in layouts:
            requests = partial if layout.merging is Merging.ROWS else whole
            error = compare(self.calls, requests, answers, layout, raised)[1]
            if bound < error <= WRONG and not measured:
                # A network may compute in fewer bits than its input has: copies of one call show its rounding.
                rounding = compare(self.calls, [whole[0]] * 2, [answers[0]] * 2, layout)[1]
                bound, measured = min(max(bound, ROUNDINGS * rounding), WRONG), True
            if error <= bound:
                return replace(layout, bound=min(max(smallest, ROUNDINGS * error), WRONG), rounding=error)
        if layouts == [MAPPED]:
            batched = self.calls.row_map(whole[0].call).batched
            return Layout(Merging.SINGLE, reason=NOTHING_TO_BATCH if batched else NO_BATCH_DIMENSION)
        raises = BATCH_RAISES.format(error=raised[0]) if len(raised) == len(layouts) else BATCHING_CHANGES_OUTPUT
        return Layout(Merging.SINGLE, reason=raises)

    def candidates(self, request: RowRequest) -> Iterator[Layout]:
        """Yield the layouts to try, the most general and most usual ones first."""
        kind, dtype = self.calls.kind, self.calls.dtype
        if Role.MAPPED in kind.roles or not self.calls.row_map(request.call).batched:
            yield MAPPED
            return
        leaves = self.calls.recorded.calls[request.call].leaves
        scalars = [leaf for leaf, role in zip(leaves, kind.roles, strict=True) if role is Role.SCALAR]
        narrow = (False, True) if any(_has_other_dtype(scalar, dtype) for scalar in scalars) else (False,)
        # As the states broadcast with it, or along several leading dimensions of batches.
        deepest = len(self.calls.row_map(request.call).slices[0].box)
        column = (0, *range(deepest, 0, -1)) if scalars else (0,)
        shared = (False, True) if kind.ambiguous else (False,)
        repeated = (False, True) if Role.REPEATED_PER_ROW in kind.roles else (False,)
        for merging in (Merging.ROWS, Merging.CALLS):
            for options in product(narrow, column, shared, repeated):
                yield Layout(merging, *options)
        if not self.calls.recorded.calls[request.call].feeds:
            yield MAPPED


def random_request(calls: KindCalls, call: int, generator: torch.Generator, scale: float = 1.0) -> RowRequest:
    """Return the request for a whole call at random states."""
    row_map, dtype = calls.row_map(call), torch.promote_types(calls.dtype, torch.float32)
    like = row_map.states(calls.recorded.calls[call].leaves, dtype)
    shape = int(row_map.sample_of_row.max()) + 1, like.shape[1]
    states = (torch.randn(shape, generator=generator, device="cpu") * scale).to(like)
    return RowRequest(call, np.arange(row_map.rows), states[row_index(row_map.sample_of_row, states)])


def rows_of_sample(calls: KindCalls, request: RowRequest, sample: int) -> RowRequest:
    """Return the request for the rows of one sample of a whole call."""
    rows = calls.row_map(request.call).rows_of(sample)
    return RowRequest(request.call, rows, request.states[row_index(rows, request.states)])


def randomize_conditioning(calls: KindCalls, members: Sequence[int]) -> KindCalls:
    """Return the same calls with conditioning at random in these members."""
    generator = torch.Generator("cpu").manual_seed(1)
    recorded = list(calls.recorded.calls)
    for c in members:
        leaves = list(recorded[c].leaves)
        for i, role in enumerate(calls.kind.roles):
            if role is Role.PER_ROW and leaves[i].is_floating_point() and leaves[i].ndim > 1:
                rms = leaves[i].float().square().mean().sqrt().nan_to_num(1.0, 1.0)
                random = torch.randn(leaves[i].shape, generator=generator, device="cpu")
                leaves[i] = (random.to(rms.device) * rms).to(leaves[i])
        old = recorded[c]
        recorded[c] = Call(old.module, old.spec, leaves, old.feeds, old.autocast, old.output)
    return replace(calls, recorded=RecordedCalls(recorded, calls.recorded.row_maps))


def compare(
    calls: KindCalls,
    requests: Sequence[RowRequest],
    answers: Sequence[list[Any] | None],
    layout: Layout,
    raised: list[Exception] | None = None,
) -> tuple[list[list[Any]], float]:
    """Evaluate several requests in one network call, and compare it with the answers of single calls that are known.

    What the network raises is added to ``raised``.

    Returns:
        The output leaves, and how far they are from the answers, relative; infinite where there are none.
    """
    row_map, count = calls.row_map(requests[0].call), len(requests)
    requests = calls.padded(requests, layout)
    answers = [*answers, *[None] * (len(requests) - count)]
    try:
        if layout.merging is Merging.MAPPED:
            outputs = calls.run_mapped(requests)
            of_no_row = [i for i, leaf in enumerate(outputs[0]) if not row_map.has_rows(leaf)]
        else:
            order, batch = calls.order(requests), calls.run_ordered(requests, layout)
            outputs = split_outputs(batch, requests, order)
            of_no_row = [i for i, leaf in enumerate(batch) if not has_rows(leaf, len(order))]
    except Exception as error:  # whatever a network says to a batch that it cannot take
        if out_of_memory(error):
            raise
        if raised is not None:
            raised.append(error)
        return [], float("inf")
    worst = 0.0
    for request, output, answer in zip(requests, outputs, answers, strict=True):
        if answer is None:
            continue
        # Rows that meet all rows of another argument, as along a second dimension of batches, are no rows.
        if any(o.shape[1:] != a.shape[1:] for o, a in zip(output, answer, strict=True) if isinstance(a, Tensor)):
            return outputs, float("inf")
        if any(not _same(output[i], answer[i]) for i in of_no_row):
            return outputs, float("inf")
        dtype = request.states.dtype
        batched, single = (row_map.answers(leaves, dtype).cpu().double() for leaves in (output, answer))
        single = single[row_index(request.rows, batched)]
        if batched.shape != single.shape:
            return outputs, float("inf")
        finite = torch.isfinite(single)  # what is not finite cannot be compared
        distance, norm = float((batched - single)[finite].norm()), float(single[finite].norm())
        if distance != 0:  # or not a number
            worst = max(worst, distance / norm) if norm > 0 and np.isfinite(distance) else float("inf")
    return outputs[:count], worst


def _same(output: Any, answer: Any) -> bool:
    """Return whether what a call returned besides its rows is what another one returned."""
    if isinstance(answer, (float, Tensor)) and type(output) is type(answer):
        left, right = (torch.as_tensor(value).cpu().double() for value in (output, answer))
        return left.shape == right.shape and torch.allclose(left, right, SAME, 0.0, equal_nan=True)
    return equal(output, answer)


def _has_other_dtype(scalar: Any, dtype: torch.dtype) -> bool:
    """Return whether a number, given one entry a row, has another floating-point dtype than the state."""
    if isinstance(scalar, Tensor):
        return scalar.is_floating_point() and scalar.dtype != dtype
    return isinstance(scalar, float) and torch.promote_types(dtype, torch.float32) != dtype
