"""Does an output depend on the other rows of its call? Measured on rows of a solve, at the price of one row.

A parallel solve puts rows together that the sequential loop evaluates apart. Where a network's outputs depend on their
company (dynamic quantization takes its scale from all rows, batch normalisation its statistics), both draw different
samples, and no error estimate of the solver knows of it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .executor import Executor
from .rows import EvalBatch, rounding_of

__all__ = ["RowCheck"]

SHARE = 0.1  # of the tolerance: a smaller difference is within it


class RowCheck:
    """Evaluate rows; the first row of the first round is evaluated once more, in the company of a later round.

    That is the first round of fewer rows than there were before: its call becomes no larger than others were, and its
    rows lie at other noise levels. Nothing is read from the device before :meth:`warn`.

    Args:
        evaluate: The network; a call that would have to be split for one more row is left as it is.
    """

    def __init__(self, evaluate: Executor) -> None:
        self._evaluate = evaluate
        self._first: tuple[EvalBatch, Tensor] | None = None
        self._largest = 0
        self._difference: Tensor | None = None

    def __call__(self, rows: EvalBatch) -> Tensor:
        """Evaluate the rows."""
        count = rows.x.shape[0]
        if self._first is None or self._difference is not None or count >= self._largest or not self._has_room(count):
            first = None
            if self._first is None and count > 1 and bool((rows.step != rows.step[0]).any()):
                # Before the call: the network may write into its input.
                first = EvalBatch(rows.x[:1].clone(), rows.step[:1], rows.sample[:1])
            outputs = self._evaluate(rows)
            if first is not None:
                self._first = first, outputs[:2].clone()
            self._largest = max(self._largest, count)
            return outputs
        row, before = self._first
        outputs = self._evaluate(EvalBatch(*(torch.cat(parts) for parts in zip(rows, row, strict=True))))
        self._difference = (outputs[-1] - before[0]).float().norm() / before[0].float().norm()
        return outputs[:-1]

    def _has_room(self, count: int) -> bool:
        """Return whether one more row needs no other call, and no larger one than its bucket."""
        limit, buckets = self._evaluate.limit, self._evaluate.buckets
        return (limit is None or count < limit) and (not buckets or count not in buckets)

    def warn(self, tolerance: float) -> None:
        """Warn if the difference is more than rounding, and more than a part of the tolerance."""
        if self._difference is None or self._first is None:
            return
        difference, rounding = float(self._difference), rounding_of(self._first[1])
        if difference > max(SHARE * tolerance, 0.5 * rounding**0.5):
            warnings.warn(
                f"an output of the network changes by {difference:.1e} (relative) with the other rows of its call, so "
                "samples may differ from the sequential loop's by more than their error estimates: take out what mixes "
                "rows (dynamic quantization, batch statistics); parataxis.verify tells more.",
                RuntimeWarning,
                stacklevel=4,
            )
