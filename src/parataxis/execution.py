"""Execution: how the rows of a round reach the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .solve import Rows

__all__ = ["Executor", "Network"]

# What allocators say, besides raising torch's own error: those of the CPU, of MPS and of CUDA's libraries.
_ALLOCATION = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Network:
    """The user's callable as a driver sees it: rows to outputs.

    Attributes:
        denoise: ``denoise(x, t)``, or ``denoise(x, t, condition)`` with a condition; see :func:`parataxis.sample`.
        times: (N,) what the network is told at every point.
        condition: Tensors (B, ...) of what it is told of every sample, or dicts, lists, tuples of them, or None.
    """

    denoise: Callable[..., Tensor]
    times: Tensor
    condition: Any = None

    def __call__(self, rows: Rows) -> Tensor:
        """Evaluate the rows in one call."""
        t = self.times[rows.point].to(rows.u.device)
        if self.condition is None:
            return self.denoise(rows.u, t)
        return self.denoise(rows.u, t, _pick(self.condition, rows.sample))


def _pick(condition: Any, index: Tensor) -> Any:
    if isinstance(condition, Tensor):
        return condition[index.to(condition.device)]
    if isinstance(condition, dict):
        return {name: _pick(value, index) for name, value in condition.items()}
    if isinstance(condition, (list, tuple)):
        return type(condition)(_pick(value, index) for value in condition)
    return condition


class Executor:
    """Evaluate rows in calls of a bounded number of rows; what comes back is the same as from one call.

    A call that runs out of memory is made again with half as many rows, and with no more from then on. With
    ``buckets`` a call has one of these numbers of rows, so that a compiled network or a CUDA graph sees few shapes: the
    last row is repeated, and what it gives is cut off.

    Args:
        evaluate: Rows to outputs.
        max_rows: Most rows of one call; None for no limit.
        buckets: The numbers of rows that a call may have, such as (1, 2, 4, 8); the largest is a limit as well.

    Raises:
        ValueError: If a number of rows is not at least 1.
        torch.cuda.OutOfMemoryError: When called, if there is no memory for the smallest call.
    """

    def __init__(
        self,
        evaluate: Callable[[Rows], Tensor],
        *,
        max_rows: int | None = None,
        buckets: Sequence[int] | None = None,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows!r}.")
        if buckets is not None and (not buckets or min(buckets) < 1):
            raise ValueError(f"buckets must be numbers of rows of at least 1, such as (1, 2, 4, 8), got {buckets!r}.")
        self.buckets = sorted(set(buckets or ()))
        limits = [limit for limit in (max_rows, *self.buckets[-1:]) if limit is not None]
        self.limit = min(limits, default=None)
        self._evaluate = evaluate

    def __call__(self, rows: Rows) -> Tensor:
        """Evaluate the rows."""
        count, first = len(rows.u), 0
        parts: list[Tensor] = []
        while first < count:
            own = min(self.limit or count, count - first)
            size = next((bucket for bucket in self.buckets if bucket >= own), own)
            try:
                outputs: Any = self._evaluate(_padded(rows, first, own, size))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._back_off(size, rows.u, error)
            else:
                if not isinstance(outputs, Tensor):
                    return outputs  # the driver says what is wrong with it
                parts.append(outputs if size == own else outputs[:own])
                first += own
                continue
            if rows.u.is_cuda:  # here the error is gone, and with it the tensors of the call that failed
                torch.cuda.empty_cache()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _back_off(self, size: int, u: Tensor, error: Exception) -> None:
        """Allow fewer rows than the ``size`` for which there is no memory."""
        smaller = [bucket for bucket in self.buckets if bucket < size]
        self.limit = (smaller[-1] if smaller else 0) if self.buckets else size // 2
        if self.limit == 0:
            rows = "a single row" if size == 1 else f"the smallest bucket, {size} rows,"
            raise torch.cuda.OutOfMemoryError(
                f"the network runs out of memory with {rows} of shape {tuple(u.shape[1:])} and {u.dtype} on "
                f"{u.device}: free memory, or use a smaller network, shape or dtype."
            ) from error


def _padded(rows: Rows, first: int, own: int, size: int) -> Rows:
    """Return ``own`` rows from ``first`` on and, up to ``size``, the last of them again."""
    if size == own:
        return Rows(*(one[first : first + own] for one in rows))
    index = torch.arange(first, first + size).clamp(max=first + own - 1)
    return Rows(rows.u[index.to(rows.u.device)], rows.point[index], rows.sample[index])


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _ALLOCATION)
